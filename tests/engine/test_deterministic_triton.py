"""What --deterministic does on a GPU, by Triton's interpreter: bit for bit the same logits in any mixture of rows."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from interpreted import row_by_row

from kvasir.engine import determinism, mlp
from kvasir.engine.decoder import Decoder
from kvasir.engine.mesh import Mesh
from kvasir.engine.share import share_of
from kvasir.engine.spec import Experts, Latent, Layer, Rope, Spec
from kvasir.engine.weights import random_decoder
from kvasir.kernels import attention_triton, linear, moe_triton, op
from kvasir.kernels.linear import Tiled

CPU = torch.device("cpu")
LLAMA = Spec(
    vocab=97, hidden=48, ffn=56, heads=6, kv_heads=3, head_dim=16, eps=1e-5, max_len=512,
    layers=(Layer(Rope(10000.0, dim=16)),),
)  # fmt: skip
SPECS = {
    "dense": LLAMA,
    "mixture": replace(LLAMA, layers=(Layer(Rope(10000.0, dim=16), experts=True),), experts=Experts(4, 2, 24)),
    "latent": replace(LLAMA, heads=4, kv_heads=1, latent=Latent(16, 16, 8, 8, 8), layers=(Layer(Rope(10000.0, dim=8)),)),
    "norms of heads, a window, a cap": replace(
        LLAMA, layers=(Layer(Rope(10000.0, dim=16), window=20),), qk_norm="row", attn_softcap=20.0, placement="sandwich"
    ),
    "layer norms, biases, sinks": replace(
        LLAMA, norm="layer", norm_bias=True, qkv_bias=True, o_bias=True, mlp_bias=True, gated=False, activation="gelu",
        sinks=True, tied=True, head_bias=True,
    ),
}  # fmt: skip


def told_to(run: Callable[..., Any]) -> Callable[..., Any]:
    """It is called for the same bits in any batch: in small batches they may be the same without."""

    def checked(*args: Any, deterministic: bool = False, **facts: Any) -> Any:
        assert deterministic
        return run(*args, deterministic=True, **facts)

    return checked


def by_triton(patch: pytest.MonkeyPatch) -> None:
    """From now on a CPU does everything as a GPU does."""
    row_by_row(patch)
    for module, name in ((attention_triton, "attention"), (moe_triton, "stacked_experts")):
        patch.setattr(module, name, told_to(getattr(module, name)))
    patch.setitem(op.BACKENDS, "cpu", ("triton",))
    for each in op.every_op().values():
        patch.setattr(each, "_loaded", {})
    patch.setattr(mlp, "STACKED", ("cpu",))
    patch.setattr(linear, "TILED", ("cpu",))


def decoder_of(spec: Spec, dtype: torch.dtype, *, deterministic: bool) -> Decoder:
    mesh = Mesh()
    mesh.invariant = deterministic
    decoder = random_decoder(spec, dtype, CPU, share=share_of(spec, mesh))
    decoder.attend_by("auto")
    return decoder


@pytest.mark.parametrize("name", SPECS)
def test_logits_are_the_same_bits(name: str, in_chunks: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """All rows in one step, and few at a time; and what a CPU gives, but for rounding."""
    prompts = [[random.Random(n).randrange(97) for _ in range(n)] for n in (11, 3)]
    wanted = in_chunks(decoder_of(SPECS[name], torch.float32, deterministic=False), prompts, 16, 0)
    by_triton(monkeypatch)
    decoder = decoder_of(SPECS[name], torch.float32, deterministic=True)
    assert all(isinstance(weight, Tiled) for weight in determinism.multiplied(decoder))
    first, other = (in_chunks(decoder, prompts, 16, seed) for seed in (7, 6))
    for ours, theirs, same in zip(first, wanted, other, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)
        assert torch.equal(ours, same)
