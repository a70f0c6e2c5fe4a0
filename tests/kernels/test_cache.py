from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from kvasir.kernels.cache import write


def test_write_touches_only_its_slots(paged: Callable[..., Any]) -> None:
    batch = paged([(37, 3), (5, 1)], block_size=4, kv_heads=2, head_dim=8)
    k_before, v_before = batch.k_cache.clone(), batch.v_cache.clone()
    k, v = torch.randn(4, 2, 8), torch.randn(4, 2, 8)
    write(k, v, batch.k_cache, batch.v_cache, batch.ragged)
    slots = batch.ragged.slots
    for cache, before, rows in ((batch.k_cache, k_before, k), (batch.v_cache, v_before, v)):
        torch.testing.assert_close(cache[slots // 4, slots % 4], rows)
        cache[slots // 4, slots % 4] = before[slots // 4, slots % 4]
        torch.testing.assert_close(cache, before, equal_nan=True)
