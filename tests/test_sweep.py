"""benchmarks/sweep.py: what it says must be read and computed, and a run of it."""

from __future__ import annotations

import importlib
import json
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch

from kvasir.engine.spec import Experts, Latent, Layer, Rope, Spec
from kvasir.engine.weights import random_decoder

FOLDER = Path(__file__).parents[1] / "benchmarks"
BF16 = torch.bfloat16
ROPE = Rope(10000.0, 16)
SPEC = Spec(
    vocab=50, hidden=32, heads=4, kv_heads=2, head_dim=16, ffn=48, eps=1e-5, max_len=64, layers=(Layer(ROPE),) * 3
)
WINDOW = replace(SPEC, layers=(Layer(ROPE), Layer(ROPE, window=7), Layer(ROPE, chunk=7)))
LATENT = replace(SPEC, kv_heads=1, latent=Latent(16, 16, 8, 8, 8), layers=(Layer(Rope(10000.0, 8)),))
MIXTURE = replace(SPEC, layers=(Layer(ROPE, experts=True),), experts=Experts(count=8, per_token=2, ffn=16))


@pytest.fixture
def sweep(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module("sweep")


@pytest.mark.parametrize("spec", [SPEC, replace(SPEC, tied=True), WINDOW], ids=["plain", "tied", "windows"])
def test_a_step_reads_all_matrices_and_what_its_rows_see(spec: Spec, sweep: ModuleType) -> None:
    decoder = random_decoder(spec, BF16, torch.device("cpu"), pack=False)
    read = sum(p.numel() for name, p in decoder.named_parameters() if p.dim() > 1 and (name != "embed" or spec.tied))
    for batch, length in ((1, 1), (5, 20)):
        seen = sum(min(length, layer.window or length, layer.chunk or length) for layer in spec.layers)
        found = sweep.decoding(spec, BF16, torch.int8, batch, length)
        assert found.bytes_ == 2 * read + batch * seen * 2 * 2 * (16 + 4)  # a scale beside each head's numbers
        assert found.operations == batch * (2 * read + seen * 4 * 16 * 4)


def test_prompts_are_computed_as_their_tokens_one_by_one(sweep: ModuleType) -> None:
    """But for the head, which sees the last one alone."""
    for spec in (SPEC, WINDOW, LATENT):
        steps = [sweep.decoding(spec, BF16, BF16, 3, length) for length in range(1, 21)]
        head = 3 * 2 * 19 * spec.vocab * spec.hidden
        assert sweep.prefilling(spec, BF16, BF16, 3, 20).operations == sum(s.operations for s in steps) - head


def test_more_rows_read_more_experts(sweep: ModuleType) -> None:
    each = 3 * 32 * 16 * 2
    few, many = (sweep.decoding(MIXTURE, BF16, BF16, rows, 1).bytes_ - rows * 4 * 32 for rows in (1, 1000))
    assert many - few == pytest.approx(6 * each)


def test_lines_say_what_is_reached(
    sweep: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of a random shape, by the engine itself; ceilings are what they are told to be."""
    monkeypatch.setattr(sweep, "ceilings", lambda: (2e9, 1e12))
    monkeypatch.setitem(sweep.RANDOM, "tiny", sweep.RANDOM["10M"] | {"num_hidden_layers": 1, "vocab_size": 500})
    file = tmp_path / "sweep.json"
    given = f"engine --sweep tiny --batch 1 3 --contexts 8 40 --outputs 4 --dtype float32 --threads 1 --json {file}"
    monkeypatch.setattr(sys, "argv", given.split())
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    importlib.import_module("engine").main()
    found = json.loads(file.read_text())
    assert [(line["batch"], line["context"]) for line in found] == [(1, 8), (3, 8), (1, 40), (3, 40)]
    read = (256 * 64 * (4 + 2 + 2 + 4) + 3 * 256 * 512 + 256 * 500) * 4
    for line in found:
        moved = read + line["batch"] * (line["context"] + 2) * 2 * 2 * 64 * 4
        assert line["decode_share"] == pytest.approx(moved / 2e9 * line["decode"] / line["batch"])
        assert 0 < line["p50"] <= line["p99"]
    assert capsys.readouterr().out.count("tiny") == 4
