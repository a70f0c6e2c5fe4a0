"""Rows times the matrix of their group by Triton: experts of a mixture, adapters of a batch. Nothing waits for the device."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from kvasir.kernels.groups import Groups, few_rows
from kvasir.kernels.tile_triton import dense, dot, power_of_two


@triton.jit
def _grouped(
    x_ptr, weights_ptr, bias_ptr, factor_ptr, scale_ptr, order_ptr, ends_ptr, out_ptr, outputs, inputs, groups,
    x_row, w_group, w_output, out_row,
    DIVIDE: tl.constexpr, GATHER: tl.constexpr, SCATTER: tl.constexpr, BIAS: tl.constexpr, FACTOR: tl.constexpr,
    SCALE: tl.constexpr, ADD: tl.constexpr, ON_INPUT: tl.constexpr, G: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
    K: tl.constexpr,
):  # fmt: skip
    """One tile of a group's rows times N outputs of its matrix. Groups are cut into tiles of M, one after the other."""
    tile = tl.program_id(0)
    g = tl.arange(0, G)
    end = tl.load(ends_ptr + g, mask=g < groups, other=0)
    start = tl.load(ends_ptr + g - 1, mask=(g > 0) & (g < groups), other=0)
    tiles = tl.where(g < groups, (end - start + M - 1) // M, 0).to(tl.int32)
    behind = tl.cumsum(tiles, 0)
    group = tl.sum(((behind <= tile) & (g < groups)).to(tl.int32), 0)
    if group >= groups:
        return
    own = g == group
    first = tl.sum(tl.where(own, start, 0), 0) + (tile - tl.sum(tl.where(own, behind - tiles, 0), 0)) * M
    place = first + tl.arange(0, M)
    real = place < tl.sum(tl.where(own, end, 0), 0)
    row = tl.load(order_ptr + place, mask=real, other=0)
    source = row // DIVIDE if GATHER else place
    output = tl.program_id(1) * N + tl.arange(0, N)
    column = tl.arange(0, K)
    x_at = x_ptr + source.to(tl.int64)[:, None] * x_row
    w_at = weights_ptr + group.to(tl.int64) * w_group + output.to(tl.int64)[None, :] * w_output
    acc = tl.zeros((M, N), tl.float32)
    kind = weights_ptr.dtype.element_ty
    for at in range(0, inputs, K):
        there = at + column < inputs
        x = tl.load(x_at + (at + column)[None, :], mask=real[:, None] & there[None, :], other=0.0)
        if ON_INPUT:
            factor = tl.load(factor_ptr + row, mask=real, other=0.0).to(x.dtype)
            x = (x.to(tl.float32) * factor.to(tl.float32)[:, None]).to(kind)
        w = tl.load(w_at + (at + column)[:, None], mask=there[:, None] & (output < outputs)[None, :], other=0.0)
        acc = dot(x.to(kind), w, acc)
    inside = real[:, None] & (output < outputs)[None, :]
    if BIAS:
        bias = tl.load(bias_ptr + group * outputs + output, mask=output < outputs, other=0.0)
        acc += bias.to(tl.float32)[None, :]
    if SCALE:
        acc *= tl.load(scale_ptr + group)
    target = row if SCATTER else place
    at = out_ptr + target.to(tl.int64)[:, None] * out_row + output[None, :]
    kind = out_ptr.dtype.element_ty
    if FACTOR:
        factor = tl.load(factor_ptr + row, mask=real, other=0.0).to(kind).to(tl.float32)
        acc = acc.to(kind).to(tl.float32) * factor[:, None]
    if ADD:
        acc += tl.load(at, mask=inside, other=0.0).to(tl.float32)
    tl.store(at, acc.to(kind), mask=inside)


def grouped(
    x: Tensor,
    weights: Tensor,
    groups: Groups,
    out: Tensor,
    *,
    bias: Tensor | None = None,
    divide: int = 1,
    gather: bool = True,
    scatter: bool = True,
    factors: Tensor | None = None,
    on_input: bool = False,
    scales: Tensor | None = None,
    add: bool = False,
    deterministic: bool = False,
) -> Tensor:
    """Into out[R, O]: row r of x times weights[G, O, I] of its group, plus bias[G, O], times scales[G] and factors[R].

    gather: row r is row r // divide of x, else x lies in the groups' order; scatter: out lies as the rows do, else in that
    order. Rows without a group are left alone. deterministic: tiles of one size, however many rows there are.
    """
    assert x.stride(-1) == weights.stride(-1) == out.stride(-1) == 1, "rows lie in one piece"
    rows, (count, outputs, inputs) = len(groups.order), weights.shape
    if not rows:
        return out
    few = not deterministic and few_rows(rows, count)
    wide = x.dtype.itemsize == 4
    m, n, k = (16, 32 if wide else 64, 32 if wide else 128) if few else (32 if wide else 64, 64, 32 if wide else 64)
    n, k = min(n, power_of_two(outputs, 16)), min(k, power_of_two(inputs, 16))
    _grouped[(rows // m + min(count, rows), triton.cdiv(outputs, n))](
        x, weights, *dense(bias, factors, scales), groups.order, groups.ends, out, outputs, inputs, count,
        x.stride(0), weights.stride(0), weights.stride(1), out.stride(0),
        DIVIDE=divide, GATHER=gather, SCATTER=scatter, BIAS=bias is not None,
        FACTOR=factors is not None and not on_input, SCALE=scales is not None, ADD=add, ON_INPUT=on_input,
        G=power_of_two(count, 16), M=m, N=n, K=k, num_warps=4, num_stages=3,
    )  # fmt: skip
    return out
