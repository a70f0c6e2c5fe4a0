"""Causal attention over keys and values in blocks (Kwon et al. 2023, arXiv:2309.06180, section 4.3).

Letters: T rows in the batch, S sequences, H query heads, K kv heads, D head dim, N blocks, P tokens per block.
A cache is [N, P, K, D] to its readers and lies in memory as [N, K, P, D], so that a head reads whole rows of a block.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kvasir.kernels.op import op
from kvasir.kernels.quantise import Cache, get, numbers
from kvasir.kernels.ragged import Ragged

Sparse = tuple[int, int, int, int, int]
"""(positions per block, blocks that are always seen, stride of the others, by how many blocks the next head's are shifted,
number of the first head): see `_sparse`."""

FEW_ROWS = 8
"""What counts as few rows of a sequence, beside all of a prompt's."""
MOST_WORK_BYTES = 1 << 28
"""What an implementation may take on the device besides its result."""


def _few(q: Tensor, k_cache: Cache, v_cache: Cache | None, ragged: Ragged, **_: Any) -> bool:
    return len(q) <= FEW_ROWS * len(ragged.lengths)


@op("native", "cpu", "triton", "torch", few=_few)
def attention(
    q: Tensor,
    k_cache: Cache,
    v_cache: Cache | None,
    ragged: Ragged,
    *,
    scale: float,
    window: int | None = None,
    chunk: int | None = None,
    softcap: float | None = None,
    causal: bool = True,
    sinks: Tensor | None = None,
    slopes: Tensor | None = None,
    sparse: Sparse | None = None,
    value_dim: int | None = None,
) -> Tensor:
    """q[T, H, D] over k_cache and v_cache[N, P, K, D] -> [T, H, D]: each row attends to its sequence up to itself.

    window: only to the last `window` positions, its own included. chunk: only from the last multiple of `chunk` on.
    softcap: scores become cap * tanh(score / cap). causal False: a row sees its whole sequence. sinks[H]: a logit more in
    each head's softmax, without a value. slopes[H]: scores fall by slope * distance. v_cache None: the first `value_dim`
    numbers of the keys are the values -> [T, H, value_dim].
    Caches may be of another type than q, or quantised: then what is read is value times scale.
    Blocks that no row may attend to are never read, so whatever lies there (NaN too) has no effect.
    """
    dim = q.shape[-1] if value_dim is None else value_dim
    out, size = q.new_empty(*q.shape[:2], dim), numbers(k_cache).shape[1]
    for s, length in enumerate(ragged.host_lengths.tolist()):
        rows = slice(int(ragged.host_starts[s]), int(ragged.host_starts[s + 1]))
        start = length - (rows.stop - rows.start)
        first = max(0, start - (window or length) + 1, start // chunk * chunk if chunk else 0)
        first = first // size * size if causal else 0
        k = _read(k_cache, ragged.table[s], first, length)
        v = k[..., :dim] if v_cache is None else _read(v_cache, ragged.table[s], first, length)
        seen = _seen(start, first, length, q, window=window, chunk=chunk, causal=causal)
        if sparse is not None:
            seen = seen & _sparse(start, first, length, q, sparse)
        out[rows] = _attend(q[rows], k, v, seen, start - first, scale, softcap, sinks, slopes)
    return out


def _read(cache: Cache, table: Tensor, first: int, length: int) -> Tensor:
    """Slots first..length - 1 [length - first, K, D] of the blocks in table[B]; `first` is a block's first slot."""
    size = numbers(cache).shape[1]
    return get(cache, table[first // size : -(-length // size)].long()).flatten(0, 1)[: length - first]


def _seen(
    start: int, first: int, length: int, q: Tensor, *, window: int | None, chunk: int | None, causal: bool
) -> Tensor:
    """[1, n, L]: whether the row at `start` + i sees the key at `first` + j."""
    key = torch.arange(first, length, device=q.device)
    row = torch.arange(start, length, device=q.device)[:, None]
    distance = row - key if causal else (row - key).abs()
    seen = (distance >= 0) & (distance < (window or length))
    if chunk:
        seen &= torch.div(key, chunk, rounding_mode="floor") == torch.div(row, chunk, rounding_mode="floor")
    return seen[None]


def _sparse(start: int, first: int, length: int, q: Tensor, sparse: Sparse) -> Tensor:
    """[H, n, L]: near blocks, and those of a head's stride (arXiv:2404.14219)."""
    size, local, stride, shift, first_head = sparse
    key = torch.arange(first, length, device=q.device) // size
    row = torch.arange(start, length, device=q.device)[:, None] // size
    head = torch.arange(first_head, first_head + q.shape[1], device=q.device)[:, None, None] * shift
    return (row - key < local) | ((key + head + 1) % stride == 0)


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    seen: Tensor,
    ahead: int,
    scale: float,
    softcap: float | None,
    sinks: Tensor | None,
    slopes: Tensor | None,
) -> Tensor:
    """Rows q[n, H, D], the first of which is key `ahead`, over k and v[L, K, D], in float32."""
    group = q.shape[1] // k.shape[1]
    k, v = k.float().repeat_interleave(group, 1), v.float().repeat_interleave(group, 1)
    scores = torch.einsum("qhd,khd->hqk", q.float(), k) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if slopes is not None:
        row = torch.arange(ahead, ahead + len(q), device=q.device)[:, None]
        scores = scores - slopes[:, None, None] * (row - torch.arange(len(k), device=q.device)).abs()
    scores = scores.masked_fill(~seen, -torch.inf)
    if sinks is None:
        weights = scores.softmax(-1)
    else:
        column = sinks.float()[:, None, None].expand(-1, len(q), 1)
        weights = torch.cat((scores, column), -1).softmax(-1)[..., :-1]
    return torch.einsum("hqk,khd->qhd", weights, v).to(q.dtype)
