"""Numbers in 8 bits inside Triton kernels. Where a GPU can't convert float8 by itself, bits are moved by hand."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvasir.kernels.quantise import Cache, Quantised
from kvasir.kernels.tile_triton import target

FORMATS = {torch.int8: 1, torch.float8_e4m3fn: 2, torch.float8_e5m2: 3}
"""Numbers that kernels know types by; 0: floats, without scales."""


class Stored(NamedTuple):
    """A cache as kernels take it."""

    values: Tensor
    """[N, P, K, D], float8 as bytes."""
    scales: Tensor | None
    """[N, P, K]"""
    format_: int

    @property
    def strides(self) -> tuple[int, ...]:
        """Of blocks, slots and heads: of the numbers, then of the scales."""
        scales = (0, 0, 0) if self.scales is None else self.scales.stride()
        return (*self.values.stride()[:3], *scales)


def stored(cache: Cache) -> Stored:
    """Its parts, without copying."""
    if not isinstance(cache, Quantised):
        assert cache.stride(-1) == 1, "a head's numbers lie in one piece"
        return Stored(cache, None, 0)
    format_ = FORMATS[cache.values.dtype]
    return Stored(cache.values if format_ == 1 else cache.values.view(torch.uint8), cache.scales, format_)


def converts_float8() -> bool:
    """Whether the GPU does so by itself: NVIDIA's from compute capability 8.9 on."""
    found = target()
    return found is not None and found.backend == "cuda" and found.arch >= 89


@triton.jit
def decode(raw, kind: tl.constexpr, FORMAT: tl.constexpr, NATIVE: tl.constexpr):
    """What was loaded as numbers of `kind`, without their scales; exact."""
    if FORMAT == 2:
        if NATIVE:
            return raw.to(tl.float8e4nv, bitcast=True).to(kind)
        wide = raw.to(tl.int16)
        half = (((wide & 128) << 8) | ((wide & 127) << 7)).to(tl.float16, bitcast=True)
        return (half * 256.0).to(kind)  # the exponent is 8 less than float16's
    if FORMAT == 3:
        return (raw.to(tl.int16) << 8).to(tl.float16, bitcast=True).to(kind)
    if FORMAT == 1:
        return raw.to(tl.float32).to(kind)
    return raw.to(kind)


@triton.jit
def encode(x, FORMAT: tl.constexpr):
    """x[R, D] as (numbers in 8 bits, scales[R]): see `quantise`."""
    x = x.to(tl.float32)
    largest: tl.constexpr = 127.0 if FORMAT == 1 else (448.0 if FORMAT == 2 else 57344.0)
    scale = tl.div_rn(tl.max(tl.abs(x), 1), tl.full((x.shape[0],), largest, tl.float32))
    scale = tl.where(tl.sum((x != x).to(tl.int32), 1) > 0, float("nan"), scale)
    y = tl.div_rn(x, tl.where(scale == 0, 1.0, scale)[:, None] + tl.zeros_like(x))
    y = tl.minimum(tl.maximum(y, -largest), largest)
    if FORMAT == 1:
        numbers = ((y + 12582912.0) - 12582912.0).to(tl.int8)  # to the nearest even: 1.5 * 2^23 leaves no fraction
    else:
        # the smaller type's exponent, as bits at the same place; then lower bits are rounded away, to the nearest even
        drop: tl.constexpr = 20 if FORMAT == 2 else 21
        bits = (tl.abs(y) * (2.0**-120 if FORMAT == 2 else 2.0**-112)).to(tl.int32, bitcast=True)
        bits = (bits + ((1 << (drop - 1)) - 1) + ((bits >> drop) & 1)) >> drop
        sign = (y.to(tl.int32, bitcast=True) >> 24) & 128
        numbers = (bits | sign).to(tl.uint8)
    return numbers, scale
