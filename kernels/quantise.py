"""Rows of numbers in 8 bits, each with a scale of its own: half the memory of bfloat16, twice the context.

Whatever the type, a row's largest magnitude becomes the largest number of the type, so nothing overflows and nothing needs
calibrating. A row of 64 normally distributed numbers is off by (root mean square) 0.6 % in int8, 2.5 % in float8_e4m3fn and
5.0 % in float8_e5m2; benchmarks/kv_dtypes.py shows what one scale for all rows would cost.
"""

from __future__ import annotations

from typing import NamedTuple, Union

import torch
from torch import Tensor

LARGEST = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0, torch.float8_e5m2: 57344.0}
"""The types of 8 bits, and their largest number."""


class Quantised(NamedTuple):
    """Keys or values of a cache: values[N, P, K, D] times scales[N, P, K]."""

    values: Tensor
    """[N, P, K, D] of a type in LARGEST."""
    scales: Tensor
    """[N, P, K] float32, one for each slot and head."""


Cache = Union[Tensor, Quantised]
"""Keys or values in blocks, [N, P, K, D]."""


def numbers(cache: Cache) -> Tensor:
    """[N, P, K, D]: its numbers, without scales."""
    return cache.values if isinstance(cache, Quantised) else cache


def quantise(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """x[..., D] -> (values[..., D] of `dtype`, to the nearest even; scales[...] float32). A row of zeros has the scale 0."""
    x, largest = x.float(), LARGEST[dtype]
    scales = x.abs().amax(-1) / largest
    y = (x / torch.where(scales == 0, 1.0, scales)[..., None]).clamp(-largest, largest)
    return (y.round() if dtype == torch.int8 else y).to(dtype), scales


def put(cache: Cache, places: tuple[Tensor, Tensor], x: Tensor) -> None:
    """x[T, K, D] goes to these (blocks[T], slots[T]), in the cache's type."""
    if isinstance(cache, Tensor):
        cache.index_put_(places, x.to(cache.dtype))
        return
    values, scales = quantise(x, cache.values.dtype)
    cache.values.view(torch.uint8).index_put_(places, values.view(torch.uint8))  # torch puts no float8
    cache.scales.index_put_(places, scales)


def get(cache: Cache, blocks: Tensor) -> Tensor:
    """[B, P, K, D] of these blocks[B]: float32 where they are quantised."""
    if isinstance(cache, Tensor):
        return cache[blocks]
    found = cache.values.view(torch.uint8)[blocks].view(cache.values.dtype)
    return found.float() * cache.scales[blocks][..., None]
