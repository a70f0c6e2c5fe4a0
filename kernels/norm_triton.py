"""Norms by Triton: a row is read once, with the residual that is added to it (arXiv:1910.07467, arXiv:1607.06450)."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvasir.kernels import norm as plain
from kvasir.kernels.tile_triton import dense, power_of_two

TOLERANCE = {torch.float32: 2e-6, torch.float16: 4e-3, torch.bfloat16: 4e-2}
"""For values of size 1 to 4: sums run in another order, which may round a result to its neighbour."""
WIDEST = 65536
"""Numbers in a row: they are held at once."""


@triton.jit(do_not_specialize=["rows"])
def _norm(
    x_ptr, y_ptr, weight_ptr, bias_ptr, squares_ptr, total_ptr, out_ptr,
    rows, per, x_row, x_part, eps, offset, scale,
    M: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, MEAN: tl.constexpr, ADD: tl.constexpr,
    SCALED: tl.constexpr, OFFSET: tl.constexpr, WEIGHT: tl.constexpr, PER_PART: tl.constexpr, BIAS: tl.constexpr,
    SQUARES: tl.constexpr,
):  # fmt: skip
    """ROWS rows of M numbers; row r is part r % per of x[r / per]. MEAN: LayerNorm, else RMSNorm."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    inside = (row < rows)[:, None] & (column < M)[None, :]
    at = (row // per).to(tl.int64) * x_row + (row % per) * x_part
    out_at = row.to(tl.int64)[:, None] * M + column[None, :]
    kind = out_ptr.dtype.element_ty
    x = tl.load(x_ptr + at[:, None] + column[None, :], mask=inside, other=0.0).to(tl.float32)
    if ADD:
        y = tl.load(y_ptr + out_at, mask=inside, other=0.0).to(tl.float32)
        if SCALED:
            y = (y * scale).to(kind).to(tl.float32)
        x = (x + y).to(kind)
        tl.store(total_ptr + out_at, x, mask=inside)
        x = x.to(tl.float32)
    if MEAN:
        x = tl.where(inside, x - (tl.sum(x, 1) / M)[:, None], 0.0)
    if SQUARES:
        squares = tl.load(squares_ptr + row // per, mask=row < rows, other=1.0)
    else:
        squares = tl.sum(x * x, 1) / M
    x = x * (1 / tl.sqrt(squares + eps))[:, None]
    if WEIGHT:
        weight_at = tl.zeros((ROWS, 1), tl.int32) + column[None, :]
        if PER_PART:
            weight_at += (row % per)[:, None] * M
        weight = tl.load(weight_ptr + weight_at, mask=inside, other=0.0).to(tl.float32)
        if OFFSET:
            weight += offset
        elif not MEAN:
            x = x.to(kind).to(tl.float32)  # rounded before the weight, as Llama was trained
        x = x * weight
        if BIAS:
            x += tl.load(bias_ptr + weight_at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + out_at, x.to(kind), mask=inside)


@triton.jit(do_not_specialize=["rows"])
def _squares(x_ptr, out_ptr, rows, x_row, M: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    inside = (row < rows)[:, None] & (column < M)[None, :]
    x = tl.load(x_ptr + row.to(tl.int64)[:, None] * x_row + column[None, :], mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + row, tl.sum(x * x, 1), mask=row < rows)


def sum_of_squares(x: Tensor) -> Tensor:
    """As the definition says."""
    rows, width = x.shape
    if x.stride(1) != 1 or width > WIDEST:
        return plain.sum_of_squares.reference(x)
    out = torch.empty(rows, dtype=torch.float32, device=x.device)
    block = power_of_two(width)
    together = max(1, 1024 // block)
    if rows:
        _squares[(triton.cdiv(rows, together),)](
            x, out, rows, x.stride(0), M=width, BLOCK=block, ROWS=together, num_warps=_warps(block)
        )
    return out


def rms_norm(
    x: Tensor, weight: Tensor | None, eps: float, offset: float = 0.0, mean_square: Tensor | None = None
) -> Tensor:
    """As the definition says."""
    if not _suits(x, weight):
        return plain.rms_norm.reference(x, weight, eps, offset, mean_square)
    return _run(x, weight, eps, offset=offset, squares=mean_square)[1]


def add_rms_norm(
    x: Tensor, y: Tensor, weight: Tensor, eps: float, offset: float = 0.0, scale: float = 1.0
) -> tuple[Tensor, Tensor]:
    """As the definition says."""
    if not (_suits(x, weight) and _alike(x, y)):
        return plain.add_rms_norm.reference(x, y, weight, eps, offset, scale)
    return _run(x, weight, eps, y, offset=offset, scale=scale)


def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """As the definition says."""
    if not (_suits(x, weight) and (bias is None or (weight is not None and _suits(x, bias)))):
        return plain.layer_norm.reference(x, weight, bias, eps)
    return _run(x, weight, eps, bias=bias, mean=True)[1]


def add_layer_norm(
    x: Tensor, y: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, scale: float = 1.0
) -> tuple[Tensor, Tensor]:
    """As the definition says."""
    if not (_suits(x, weight) and _alike(x, y) and (bias is None or (weight is not None and _suits(x, bias)))):
        return plain.add_layer_norm.reference(x, y, weight, bias, eps, scale)
    return _run(x, weight, eps, y, bias=bias, scale=scale, mean=True)


def _suits(x: Tensor, weight: Tensor | None) -> bool:
    """Whether the kernel can read these: parts of a row lie in one piece each."""
    same = weight is None or (weight.dtype == x.dtype and weight.is_contiguous() and weight.dim() <= 2)
    return same and x.dim() in (2, 3) and x.stride(-1) == 1 and 0 < x.shape[-1] <= WIDEST


def _alike(x: Tensor, y: Tensor) -> bool:
    return x.shape == y.shape and x.dtype == y.dtype and y.is_contiguous()


def _run(
    x: Tensor,
    weight: Tensor | None,
    eps: float,
    y: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    squares: Tensor | None = None,
    offset: float = 0.0,
    scale: float = 1.0,
    mean: bool = False,
) -> tuple[Tensor, Tensor]:
    """(x + scale * y, its norm)"""
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    total = x if y is None else torch.empty_like(out)
    per, width = 1 if x.dim() == 2 else x.shape[1], x.shape[-1]
    rows, block = out.numel() // width, power_of_two(width)
    together = max(1, 1024 // block)
    if not rows:
        return total, out
    _norm[(triton.cdiv(rows, together),)](
        x, y, weight, bias, *dense(squares), total, out, rows, per, x.stride(0), x.stride(1) if x.dim() == 3 else 0,
        eps, offset, scale, M=width, BLOCK=block, ROWS=together, MEAN=mean, ADD=y is not None, SCALED=scale != 1,
        OFFSET=offset != 0, WEIGHT=weight is not None, PER_PART=weight is not None and weight.dim() == 2,
        BIAS=bias is not None, SQUARES=squares is not None, num_warps=_warps(block),
    )  # fmt: skip
    return total, out


def _warps(block: int) -> int:
    return min(16, max(4, block // 1024))
