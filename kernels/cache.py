"""Writing keys and values into their blocks (Kwon et al. 2023, arXiv:2309.06180)."""

from __future__ import annotations

import torch
from torch import Tensor

from kvasir.kernels.ragged import Ragged


def write(k: Tensor, v: Tensor | None, k_cache: Tensor, v_cache: Tensor | None, ragged: Ragged) -> None:
    """Row t of k and v[T, K, D] goes to slot ragged.slots[t] of k_cache and v_cache[N, P, K, D], in place. v None: keys alone."""
    places = ragged.plans.get("write")
    if places is None:
        block_size = k_cache.shape[1]
        blocks = torch.div(ragged.slots, block_size, rounding_mode="floor")
        places = ragged.plans["write"] = (blocks, ragged.slots - blocks * block_size)
    k_cache.index_put_(places, k)
    if v is not None and v_cache is not None:
        v_cache.index_put_(places, v)
