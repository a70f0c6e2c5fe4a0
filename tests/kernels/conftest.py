"""Random ragged batches over a paged cache that holds NaN wherever nothing was written."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, fields, replace

import numpy as np
import pytest
import torch
from torch import Tensor

from kvasir.engine.cache import KVCache
from kvasir.engine.spec import Layer, Spec
from kvasir.kernels.cache import write
from kvasir.kernels.quantise import Cache
from kvasir.kernels.ragged import Ragged


@dataclass(frozen=True)
class Paged:
    """Inputs of attention."""

    q: Tensor
    k_cache: Tensor
    v_cache: Tensor
    ragged: Ragged

    def to(self, device: torch.device) -> Paged:
        """The same there; views keep how they lie in memory."""
        tensors = {
            f.name: t.to(device) for f in fields(Ragged) if isinstance(t := getattr(self.ragged, f.name), Tensor)
        }
        k, v = (cache.transpose(1, 2).to(device).transpose(1, 2) for cache in (self.k_cache, self.v_cache))
        return Paged(self.q.to(device), k, v, replace(self.ragged, plans={}, **tensors))


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where Triton's kernels run: its interpreter stands in for a GPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(scope="session")
def paged() -> Callable[..., Paged]:
    """`paged(parts, block_size, heads, kv_heads, head_dim, dtype, seed)`; parts are (length, rows at its end)."""

    def build(
        parts: list[tuple[int, int]],
        block_size: int = 16,
        heads: int = 8,
        kv_heads: int = 2,
        head_dim: int = 16,
        dtype: torch.dtype = torch.float32,
        seed: int = 0,
    ) -> Paged:
        rng, torch_rng = random.Random(seed), torch.Generator().manual_seed(seed)
        per = [-(-length // block_size) for length, _ in parts]
        free = rng.sample(range(sum(per) + 2), sum(per))
        table = np.zeros((len(parts), max(per)), np.int32)
        shape = (2, sum(per) + 2, kv_heads, block_size, head_dim)
        caches = torch.full(shape, torch.nan, dtype=dtype).transpose(2, 3)
        slots, positions = [], []
        for s, (length, rows) in enumerate(parts):
            table[s, : per[s]] = [free.pop() for _ in range(per[s])]
            own = torch.from_numpy(table[s]).long().repeat_interleave(block_size) * block_size
            own = (own + torch.arange(len(own)) % block_size)[:length]
            values = torch.randn(2, length, kv_heads, head_dim, generator=torch_rng).to(dtype)
            caches[:, own // block_size, own % block_size] = values
            slots.append(own[length - rows :])
            positions.append(torch.arange(length - rows, length))
        starts = np.cumsum([0, *(rows for _, rows in parts)]).astype(np.int32)
        lengths = np.array([length for length, _ in parts], np.int32)
        tensors = (torch.from_numpy(a) for a in (starts, lengths, table))
        ragged = Ragged(torch.cat(positions), torch.cat(slots), *tensors, starts, lengths)
        q = torch.randn(int(starts[-1]), heads, head_dim, generator=torch_rng).to(dtype)
        return Paged(q, caches[0], caches[1], ragged)

    return build


@pytest.fixture(scope="session")
def kept() -> Callable[..., tuple[Cache, Cache]]:
    """`kept(batch, dtype)`: the batch's keys and values in a cache of this type, laid out as the engine does."""

    def build(batch: Paged, dtype: torch.dtype) -> tuple[Cache, Cache]:
        blocks, size, heads, dim = batch.k_cache.shape
        facts = {"vocab": 1, "hidden": 1, "heads": heads, "kv_heads": heads, "head_dim": dim, "ffn": 1, "eps": 0.0}
        spec = Spec(**facts, max_len=1, layers=(Layer(),))  # type: ignore[arg-type]
        cache = KVCache(spec, blocks, size, dtype, torch.device("cpu"))
        cache.arena.fill_(255)  # NaN, as numbers or as scales
        k, v = cache.layer(0)
        assert v is not None
        there = ~batch.k_cache[..., 0, 0].isnan()
        at = there.flatten().nonzero()[:, 0]
        slots = Ragged(at, at, *[at] * 3, np.zeros(1, np.int32), np.zeros(1, np.int32))
        write(batch.k_cache[there], batch.v_cache[there], k, v, slots)
        return k, v

    return build
