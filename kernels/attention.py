"""Causal attention over keys and values in blocks (Kwon et al. 2023, arXiv:2309.06180, section 4.3).

Letters: T rows in the batch, S sequences, H query heads, K kv heads, D head dim, N blocks, P tokens per block.
A cache is [N, P, K, D] to its readers and lies in memory as [N, K, P, D], so that a head reads whole rows of a block.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvasir.kernels.op import op
from kvasir.kernels.ragged import Ragged


@op("cpu")
def attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    ragged: Ragged,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """q[T, H, D] over k_cache and v_cache[N, P, K, D] -> [T, H, D]: each row attends to its sequence up to itself.

    window: only to the last `window` positions, its own included. softcap: scores become cap * tanh(score / cap).
    Slots that no row may attend to are never read, so whatever lies there (NaN too) has no effect.
    """
    out = torch.empty_like(q)
    for s, length in enumerate(ragged.host_lengths):
        rows = slice(int(ragged.host_starts[s]), int(ragged.host_starts[s + 1]))
        k = _read(k_cache, ragged.table[s], int(length))
        v = _read(v_cache, ragged.table[s], int(length))
        out[rows] = _attend(q[rows], k, v, scale, window, softcap)
    return out


def _read(cache: Tensor, table: Tensor, length: int) -> Tensor:
    """The first `length` slots [length, K, D] of the blocks in table[B]."""
    return cache[table.long()].flatten(0, 1)[:length]


def _attend(q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None, softcap: float | None) -> Tensor:
    """The last rows q[n, H, D] of one sequence over all its k and v[L, K, D], in float32."""
    group = q.shape[1] // k.shape[1]
    k, v = k.float().repeat_interleave(group, 1), v.float().repeat_interleave(group, 1)
    scores = torch.einsum("qhd,khd->hqk", q.float(), k) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    key = torch.arange(len(k), device=q.device)
    behind = key[len(k) - len(q) :, None] - key
    hidden = (behind < 0) | (behind >= (window or len(k)))
    weights = scores.masked_fill(hidden, -torch.inf).softmax(-1)
    return torch.einsum("hqk,khd->qhd", weights, v).to(q.dtype)
