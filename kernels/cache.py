"""Writing keys and values into their blocks (Kwon et al. 2023, arXiv:2309.06180)."""

from __future__ import annotations

import torch
from torch import Tensor

from kvasir.kernels.op import op
from kvasir.kernels.quantise import Cache, numbers, put
from kvasir.kernels.ragged import Ragged
from kvasir.kernels.rope import Angles, rotate


@op("triton")
def write(k: Tensor, v: Tensor | None, k_cache: Cache, v_cache: Cache | None, ragged: Ragged) -> None:
    """Row t of k and v[T, K, D] goes to slot ragged.slots[t] of k_cache and v_cache[N, P, K, D], in place, rounded to their
    type or quantised. v None: keys alone."""
    places = ragged.plans.get("write")
    if places is None:
        block_size = numbers(k_cache).shape[1]
        blocks = torch.div(ragged.slots, block_size, rounding_mode="floor")
        places = ragged.plans["write"] = (blocks, ragged.slots - blocks * block_size)
    put(k_cache, places, k)
    if v is not None and v_cache is not None:
        put(v_cache, places, v)


@op("native", "triton")
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
    """`rotate` of q[T, H, D] and k[T, K, D], and `write` of keys and values -> the turned queries; q may be overwritten."""
    write(rotate(k, angles, interleaved=interleaved), v, k_cache, v_cache, ragged)
    return rotate(q, angles, interleaved=interleaved)
