"""Mixtures whose experts are run at once, stacked as on GPUs or packed as on CPUs, give what they give one by one."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from kvasir.engine import mlp
from kvasir.engine.arch import load_spec
from kvasir.engine.decoder import Decoder
from kvasir.engine.mlp import Mixture
from kvasir.engine.weights import load_decoder
from kvasir.kernels import moe, native

CPU = torch.device("cpu")
FAMILIES: dict[str, dict[str, Any]] = {
    "Mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "Qwen2Moe": {"num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 24, "decoder_sparse_step": 1},
    "GptOss": {"num_local_experts": 3, "num_experts_per_tok": 2, "head_dim": 16, "intermediate_size": 64},
}


def load(folder: Path) -> Decoder:
    spec = load_spec(json.loads((folder / "config.json").read_text()))
    return load_decoder(folder, spec, dtype=torch.float32, device=CPU)


def refuse(*_: object, **__: object) -> None:
    raise AssertionError("experts were run one by one")


@pytest.mark.parametrize("way", ["packed", "stacked", "triton"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_same_logits(
    family: str, way: str, checkpoint: Callable[..., Any], in_chunks: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = checkpoint(family, **FAMILIES[family])[0]
    prompts = [[3, 14, 15, 9, 26, 5, 35], [8, 9, 7, 93]]
    with monkeypatch.context() as alone:
        alone.setattr(mlp, "packed_experts", lambda *_, **__: None)
        one_by_one = in_chunks(load(folder), prompts, 4, seed=1)
    if way == "packed" and native.library() is None:
        pytest.skip(f"no compiled kernels: {native.native().text}")
    if way != "packed":
        monkeypatch.setattr(mlp, "STACKED", ("cpu",))
    together = load(folder)
    if way == "triton":
        found = pytest.importorskip("kvasir.kernels.moe_triton")
        monkeypatch.setitem(moe.stacked_experts._loaded, "cpu", found.stacked_experts)
        monkeypatch.setattr(moe, "experts", refuse)
    monkeypatch.setattr(mlp, "experts", refuse)
    for got, want in zip(in_chunks(together, prompts, 4, seed=1), one_by_one, strict=True):
        torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)


def test_stacked_experts_take_no_room_besides(checkpoint: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """What an expert has is a view: names, shapes and bytes are those of experts that lie apart."""
    folder = checkpoint("GptOss", **FAMILIES["GptOss"])[0]
    spec = load_spec(json.loads((folder / "config.json").read_text()))
    apart = Decoder(spec, torch.float32, CPU)
    monkeypatch.setattr(mlp, "STACKED", ("cpu",))
    stacked = Decoder(spec, torch.float32, CPU)
    assert {n: p.shape for n, p in stacked.places()} == {n: p.shape for n, p in apart.places()}
    assert sum(p.nbytes for p in stacked.parameters()) == sum(p.nbytes for p in apart.parameters())
    mixture = next(module for module in stacked.modules() if isinstance(module, Mixture))
    first, second = (mixture.experts[number].up.weight for number in "01")
    assert second.data_ptr() - first.data_ptr() == first.nbytes
    assert second.device == CPU
