"""What several Triton kernels share: products of tiles, and which rows a tile holds."""

from __future__ import annotations

import functools
import os

os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # said once, or Triton warns that its default will change

import triton
import triton.language as tl
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")
"""Bodies run on the CPU, for tests: Triton's interpreter multiplies bfloat16 as if it were integers."""
LOG2E = tl.constexpr(1.4426950408889634)


def target() -> GPUTarget | None:
    """What kernels are compiled for now; None: they are interpreted."""
    return None if INTERPRETED.value else _target(driver.active.get_current_device())


@functools.cache
def _target(_device: int) -> GPUTarget:
    return driver.active.get_current_target()


def power_of_two(n: int, least: int = 1) -> int:
    """The least power of two that is at least both."""
    return max(least, 1 << max(0, n - 1).bit_length())


def dense(*given: Tensor | None) -> list[Tensor | None]:
    """The same numbers, one behind the other, as kernels read what comes without strides."""
    return [None if tensor is None else tensor.contiguous() for tensor in given]


@triton.jit
def dot(a, b, acc):
    """acc[M, N] + a[M, K] b[K, N] in float32; float32 operands aren't rounded to TF32."""
    if INTERPRETED:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee")
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def tile_of(tile, starts_ptr, sequences, PER_ROW: tl.constexpr, M: tl.constexpr):
    """(sequence, the tile's place in it): sequence s has PER_ROW lines a row, cut into tiles of M.

    Tile starts[s] * PER_ROW / M + s is the first of sequence s, so that no host has to list them; a few are empty.
    """
    low = 0
    high = sequences
    while high - low > 1:
        middle = (low + high) // 2
        if tl.load(starts_ptr + middle) * PER_ROW // M + middle <= tile:
            low = middle
        else:
            high = middle
    return low, tile - (tl.load(starts_ptr + low) * PER_ROW // M + low)
