"""Rotation fused with the cache write, by compiled code (rows_cpu.cpp)."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from kvasir.kernels import cache as plain
from kvasir.kernels.native import TYPES, cache_of, library
from kvasir.kernels.quantise import Cache
from kvasir.kernels.ragged import Ragged
from kvasir.kernels.rope import Angles

WIDEST = 1008
"""Head dim."""
TOLERANCE = {torch.float32: 1e-6, torch.float16: 4e-3, torch.bfloat16: 3e-2}
"""For values of size 1 to 4: a sum of two products that is rounded to its neighbour."""


def turn_and_write(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    angles: Angles,
    k_cache: Cache,
    v_cache: Cache,
    ragged: Ragged,
    *,
    interleaved: bool,
) -> Tensor:
    """As the definition says; q is overwritten."""
    compiled, cache = library(), cache_of(k_cache, v_cache)
    if compiled is None or cache is None or not _suits(q, k, v, angles):
        return plain.turn_and_write.reference(q, k, v, angles, k_cache, v_cache, ragged, interleaved=interleaved)
    cos, sin = angles
    compiled.turn_and_write(
        TYPES[q.dtype],
        q.data_ptr(),
        q.stride(0),
        k.data_ptr(),
        k.stride(0),
        v.data_ptr(),
        v.stride(0),
        cos.data_ptr(),
        sin.data_ptr(),
        ctypes.addressof(cache),
        ragged.slots.data_ptr(),
        *q.shape[:2],
        k.shape[1],
        q.shape[2],
        cos.shape[-1],
        interleaved,
        torch.get_num_threads(),
    )
    return q


def _suits(q: Tensor, k: Tensor, v: Tensor, angles: Angles) -> bool:
    """Whether the compiled code can read these: heads are whole and lie side by side."""
    dim = q.shape[-1]
    rows = all(t.stride()[1:] == (dim, 1) and t.dtype == q.dtype for t in (q, k, v))
    turned = all(t.dtype == q.dtype and t.is_contiguous() for t in angles)
    return rows and turned and q.dtype in TYPES and dim <= WIDEST
