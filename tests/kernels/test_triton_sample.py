"""Sampling by Triton against the definitions: the same tokens, but where two sums are equal up to a rounding."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("triton")

from kvasir.kernels import bitmask_triton, sample_triton
from kvasir.kernels.bitmask import allow
from kvasir.kernels.sample import draw, greedy, penalise, score

ROWS, VOCAB = 2, 300
CASES: list[dict[str, Any]] = [
    {},
    {"min_p": 0.1},
    {"top_k": 1},
    {"top_p": 0.3},
    {"top_p": 0.95},
    {"top_k": 20, "top_p": 0.8},
    {"top_k": 50, "top_p": 0.9, "min_p": 0.05},
    {"top_k": 10_000, "top_p": 1e-6},
]


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sample_triton, "BLOCK", 256)
    torch.manual_seed(0)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_draws(case: dict[str, Any], device: torch.device) -> None:
    logits = torch.randn(ROWS, VOCAB) * 3
    uniforms, temperature = torch.rand(ROWS, dtype=torch.float64), torch.rand(ROWS) * 1.7 + 0.3
    options = {name: torch.full((ROWS,), float(value)) for name, value in case.items() if name != "top_k"}
    if "top_k" in case:
        most = min(case["top_k"], VOCAB)
        options |= {"top_k": torch.full((ROWS,), most), "most": most}
    want = draw.reference(logits, uniforms, temperature, **options)
    near = draw.reference(logits, (uniforms - 1e-5).clamp(min=0), temperature, **options)
    there = {n: o.to(device) if isinstance(o, torch.Tensor) else o for n, o in options.items()}
    got = sample_triton.draw(logits.to(device), uniforms.to(device), temperature.to(device), **there).cpu()
    beyond = draw.reference(logits, (uniforms + 1e-5).clamp(max=1 - 2**-53), temperature, **options)
    assert all(int(g) in {int(w), int(n), int(b)} for g, w, n, b in zip(got, want, near, beyond, strict=True))


def test_the_first_of_equals_are_kept(device: torch.device) -> None:
    """Four tokens are equally likely, and there is room for two, by number or by mass."""
    logits = torch.full((2, 300), -20.0, device=device)
    logits[:, [3, 70, 260, 299]] = 5.0
    uniforms = torch.tensor([0.1, 0.9], dtype=torch.float64, device=device)
    ones = torch.ones(2, device=device)
    by_number = sample_triton.draw(logits, uniforms, ones, top_k=torch.full((2,), 2, device=device), most=2)
    by_mass = sample_triton.draw(logits, uniforms, ones, top_p=ones * 0.45)
    assert by_number.tolist() == by_mass.tolist() == [3, 70]


def test_rows_with_different_parameters(device: torch.device) -> None:
    logits = torch.randn(3, 500, device=device)
    top_k, top_p = torch.tensor([1, 500, 3], device=device), torch.tensor([2.0, 1e-6, 2.0], device=device)
    half, ones = torch.full((3,), 0.5, dtype=torch.float64, device=device), torch.ones(3, device=device)
    got = sample_triton.draw(logits, half, ones, top_k=top_k, top_p=top_p, most=500)
    assert got[:2].tolist() == logits[:2].argmax(-1).tolist()
    assert int(got[2]) in logits[2].topk(3).indices.tolist()


@pytest.mark.filterwarnings("ignore:(invalid value|overflow|divide by zero|All-NaN):RuntimeWarning")
@pytest.mark.parametrize("u", [0.0, 1 - 2**-53])
def test_never_leaves_the_distribution(u: float, device: torch.device) -> None:
    logits = torch.full((4, 300), -torch.inf, device=device)
    logits[0, 0] = logits[1, 299] = logits[2, 150] = 0.0
    logits[3] = torch.nan
    uniforms = torch.full((4,), u, dtype=torch.float64, device=device)
    filters = {"top_p": torch.full((4,), 0.9, device=device), "top_k": torch.full((4,), 5, device=device)}
    for options in ({}, filters):
        got = sample_triton.draw(logits, uniforms, torch.ones(4, device=device), **options)
        assert got[:3].tolist() == [0, 299, 150]
        assert 0 <= int(got[3]) < 300


def test_greedy_takes_the_first_of_the_best(device: torch.device) -> None:
    logits = (torch.randn(20, VOCAB) * 2).round().to(device)
    assert sample_triton.greedy(logits).tolist() == [row.tolist().index(max(row.tolist())) for row in logits]
    wide = torch.randn(3, VOCAB + 9, device=device)[:, :VOCAB]
    assert torch.equal(sample_triton.greedy(wide), greedy.reference(wide))


def test_scores(device: torch.device) -> None:
    logits, tokens = torch.randn(6, VOCAB, device=device), torch.randint(0, VOCAB, (6,), device=device)
    for got, want in zip(sample_triton.score(logits, tokens, 4), score.reference(logits, tokens, 4), strict=True):
        assert got.dtype == want.dtype
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("repetition", [False, True])
def test_penalties(repetition: bool, device: torch.device) -> None:
    rng = np.random.default_rng(0)
    outputs = torch.from_numpy(rng.integers(0, 4, (5, 300)) * (rng.random((5, 300)) < 0.4)).int().to(device)
    prompts = torch.from_numpy(rng.random((5, 300)) < 0.3).to(device)
    r, p, f = (torch.rand(5, device=device) + 0.5 for _ in range(3))
    facts = {"repetition": r if repetition else None, "presence": p, "frequency": f}
    logits = torch.randn(5, 300, device=device)
    for seen in (prompts, None):
        got = sample_triton.penalise(logits, outputs, seen, **facts)
        torch.testing.assert_close(got, penalise.reference(logits, outputs, seen, **facts), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("vocab", [64, 300])
def test_barred_tokens(vocab: int, device: torch.device) -> None:
    logits, rows = torch.randn(4, vocab, device=device), torch.tensor([2, 0], device=device)
    words = torch.randint(-(2**31), 2**31 - 1, (2, -(-vocab // 32)), dtype=torch.int32, device=device)
    before = logits.clone()
    assert torch.equal(bitmask_triton.allow(logits, rows, words), allow.reference(logits, rows, words))
    assert torch.equal(logits, before)
