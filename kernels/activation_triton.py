"""Activations by Triton, gate and up read once (Shazeer 2020, arXiv:2002.05202)."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvasir.kernels import activation as definition

KINDS = {"silu": 0, "gelu": 1, "gelu_tanh": 2, "relu": 3, "clamped": 4}
TOLERANCE = {torch.float32: 2e-6, torch.float16: 4e-3, torch.bfloat16: 4e-2}
"""For values of size 1 to 4: the exponential differs in its last bits, which may round a result to its neighbour."""
BLOCK = 1024


@triton.jit
def activated(x, KIND: tl.constexpr):
    """x in float32 through one of KINDS but the last."""
    if KIND == 0:
        x = x / (1 + tl.exp(-x))
    elif KIND == 1:
        x = 0.5 * x * (1 + tl.erf(x * 0.7071067811865476))
    elif KIND == 2:
        inner = 0.7978845608028654 * (x + 0.044715 * x * x * x)
        x = x * (1 - 1 / (tl.exp(2 * inner) + 1))
    else:
        x = tl.maximum(x, 0.0)
    return x


@triton.jit
def gate_times_up(gate, up, limit, KIND: tl.constexpr, LIMITED: tl.constexpr, ROUND: tl.constexpr):
    """Both in float32; the activation is rounded to ROUND before it meets the other, as torch does."""
    if KIND == 4:
        if LIMITED:
            gate = tl.minimum(gate, limit)
            up = tl.minimum(tl.maximum(up, -limit), limit)
        return gate / (1 + tl.exp(-1.702 * gate)) * (up + 1)
    return activated(gate, KIND).to(ROUND).to(tl.float32) * up


@triton.jit
def _gated(
    x_ptr, out_ptr, width, limit, GATED: tl.constexpr, KIND: tl.constexpr, LIMITED: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    at = x_ptr + row * width * (2 if GATED else 1) + column
    x = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    if GATED:
        up = tl.load(at + width, mask=inside, other=0.0).to(tl.float32)
        x = gate_times_up(x, up, limit, KIND, LIMITED, out_ptr.dtype.element_ty)
    else:
        x = activated(x, KIND)
    tl.store(out_ptr + row * width + column, x.to(out_ptr.dtype.element_ty), mask=inside)


def gated(x: Tensor, activation: str, limit: float | None = None) -> Tensor:
    """As the definition says."""
    if not x.is_contiguous():
        return definition.gated.reference(x, activation, limit)
    return _run(x, x.shape[-1] // 2, activation, limit, gate=True)


def plain(x: Tensor, activation: str) -> Tensor:
    """As the definition says."""
    if not x.is_contiguous():
        return definition.plain.reference(x, activation)
    return _run(x, x.shape[-1], activation, None, gate=False)


def _run(x: Tensor, width: int, activation: str, limit: float | None, *, gate: bool) -> Tensor:
    out = x.new_empty(*x.shape[:-1], width)
    if out.numel():
        _gated[(out.numel() // width, triton.cdiv(width, BLOCK))](
            x, out, width, limit or 0.0, GATED=gate, KIND=KINDS[activation], LIMITED=limit is not None, BLOCK=BLOCK
        )
    return out
