"""Rows times a matrix by Triton, for --deterministic: torch's products choose how to add up by how many rows there are."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvasir.kernels.tile_triton import dense, dot, power_of_two

TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 4e-2}
"""For results of size 1 to 4: products are added up in another order."""
TOGETHER = 8
"""Tiles of rows that read a tile of the matrix one after the other, while a GPU's cache has it."""


@dataclass(frozen=True)
class Tiles:
    """How a product is cut: rows, outputs, and inputs that are multiplied at once."""

    rows: int
    outputs: int
    inputs: int
    warps: int
    stages: int


def few_rows(outputs: int, itemsize: int) -> Tiles:
    """As many programs as GPUs have processors; 64 rows are what one instruction of theirs multiplies, since Hopper."""
    if itemsize == 4:
        return Tiles(32, 32, 32, 4, 2)
    return Tiles(64, 32 if outputs <= 8192 else 64, 64, 4, 4)


MANY_ROWS = Tiles(128, 128, 64, 8, 3)


@triton.jit(do_not_specialize=["rows"])
def _linear(
    x_ptr, w_ptr, bias_ptr, out_ptr, rows, outputs, inputs, x_row, x_head, w_head, w_output, w_input, out_row,
    BIAS: tl.constexpr, TOGETHER: tl.constexpr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """One tile of M rows and N outputs of one head, over all inputs in their order."""
    tile = tl.program_id(0)
    head = tl.program_id(1).to(tl.int64)
    across = tl.cdiv(outputs, N)
    first = tile // (TOGETHER * across) * TOGETHER
    together = tl.minimum(tl.cdiv(rows, M) - first, TOGETHER)
    within = tile % (TOGETHER * across)
    row = (first + within % together) * M + tl.arange(0, M)
    output = within // together * N + tl.arange(0, N)
    column = tl.arange(0, K)
    x_at = x_ptr + head * x_head + row.to(tl.int64)[:, None] * x_row
    w_at = w_ptr + head * w_head + output.to(tl.int64)[None, :] * w_output
    real, asked = (row < rows)[:, None], (output < outputs)[None, :]
    acc = tl.zeros((M, N), tl.float32)
    for at in range(0, inputs, K):
        there = at + column < inputs
        x = tl.load(x_at + (at + column)[None, :], mask=real & there[None, :], other=0.0)
        w = tl.load(w_at + (at + column).to(tl.int64)[:, None] * w_input, mask=there[:, None] & asked, other=0.0)
        acc = dot(x, w, acc)
    if BIAS:
        acc += tl.load(bias_ptr + output, mask=output < outputs, other=0.0).to(tl.float32)[None, :]
    at = out_ptr + head * outputs + row.to(tl.int64)[:, None] * out_row + output[None, :]
    tl.store(at, acc.to(out_ptr.dtype.element_ty), mask=real & asked)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, wide: bool = False) -> Tensor:
    """x[T, I] times weight[O, I] transposed, plus bias[O] -> [T, O]. No row's result depends on T; with `wide` tiles for more
    rows only where `agrees` says so."""
    x = x if x.stride(1) == 1 else x.contiguous()
    out = x.new_empty(len(x), len(weight))
    _launch(x[:, None], weight[None], out[:, None], bias, wide=wide)
    return out


def linear_heads(x: Tensor, weight: Tensor, *, wide: bool = False) -> Tensor:
    """x[T, H, I], each head's rows times its weight[H, O, I] transposed -> [T, H, O]; the weight may lie in any order."""
    x = x if x.stride(2) == 1 else x.contiguous()
    out = x.new_empty(len(x), *weight.shape[:2])
    _launch(x, weight, out, None, wide=wide)
    return out


@functools.cache
def agrees(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether this device gives the same bits by either kind of tiles: it does where an instruction adds a few inputs to what
    it has, however large the tile. Tried, not assumed; while a model is loaded."""
    if dtype.itemsize == 4:
        return False
    drawn = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(n, 300, generator=drawn).to(device, dtype) for n in (160, 140))
    return torch.equal(linear(x, weight), linear(x, weight, wide=True))


def _launch(x: Tensor, weight: Tensor, out: Tensor, bias: Tensor | None, *, wide: bool) -> None:
    """x[T, H, I] by weight[H, O, I] into out[T, H, O]."""
    if x.dtype != weight.dtype or x.shape[1:] != (len(weight), weight.shape[2]):  # it reads what it is told is there
        raise ValueError(f"x{list(x.shape)} in {x.dtype} by weights{list(weight.shape)} in {weight.dtype}")
    if bias is not None and (bias.dtype != x.dtype or bias.numel() != weight.shape[1]):
        raise ValueError(f"a bias{list(bias.shape)} in {bias.dtype} for {weight.shape[1]} outputs in {x.dtype}")
    (heads, outputs, inputs), rows = weight.shape, len(x)
    tiles = few_rows(outputs, x.dtype.itemsize)
    if wide and rows > tiles.rows:
        tiles = MANY_ROWS
    n = min(tiles.outputs, power_of_two(outputs, 16))
    if not rows:
        return
    _linear[(triton.cdiv(rows, tiles.rows) * triton.cdiv(outputs, n), heads)](
        x, weight, *dense(bias), out, rows, outputs, inputs, x.stride(0), x.stride(1), *weight.stride(), out.stride(0),
        BIAS=bias is not None, TOGETHER=TOGETHER, M=tiles.rows, N=n, K=tiles.inputs, num_warps=tiles.warps,
        num_stages=tiles.stages,
    )  # fmt: skip
