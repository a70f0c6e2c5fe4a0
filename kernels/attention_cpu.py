"""Attention on CPUs as a few large batched products: pieces of equal row count and similar length share one call.

torch's scaled_dot_product_attention was measured slower on one Zen 5 core (32 / 8 heads of 64, bfloat16): 32 sequences
of 160 tokens, one row each, keys already gathered: 1.4 ms against 0.4; 256 rows from position 0: 6.5 ms against 2.4.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Union

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kvasir.kernels import attention as reference
from kvasir.kernels.quantise import Cache, numbers
from kvasir.kernels.ragged import Ragged

ROWS = 64
"""Rows that are attended to at once at least: a chunk of c rows computes c / 2 scores per row in vain."""
ELEMENTS = 1 << 20
"""Most elements in a temporary, so that it stays in the CPU's cache (measured from 1 << 18 to 1 << 22)."""
WASTE = 1.2
"""Most that padding to the longest may add to a batch."""
SLACK = 1 << 14
"""Scores per head that a batch of whole texts may compute in vain besides: about what another batch's calls cost."""


@dataclass(frozen=True)
class Piece:
    """`count` rows of q from `row`, the last at position end - 1; the blocks they read begin at position `first`."""

    row: int
    count: int
    end: int
    first: int
    blocks: npt.NDArray[np.int32]
    position: int
    """Of its first row."""


@dataclass(frozen=True)
class Batch:
    """S pieces of c rows each, that read B blocks each. A piece's slots l run to L = B * P."""

    rows: slice | Tensor
    """The S * c rows of q; a piece that has fewer than c repeats its last one."""
    kept: Tensor | None
    """Which of the S * c aren't repeated; None: all."""
    count: int
    blocks: Tensor
    """[S, K, B]: rows of a cache seen as [N * K, P * D]."""
    stale: tuple[Tensor, Tensor]
    """(s, l) of slots beyond their piece's end, where anything may lie: set to zero, because 0 * NaN is NaN."""
    mask: Tensor | None
    """[S, 1, c or 1, 1, L]: -inf where a row must not look; None when every row may look at everything."""
    distance: Tensor | None = None
    """[S, 1, c, 1, L]: how far slots are from a row, when scores fall with that."""


@dataclass(frozen=True)
class Kind:
    """What rows see of their sequence: layers of one kind share a step's plan."""

    window: int | None
    chunk: int | None
    causal: bool
    sloped: bool
    dtype: torch.dtype
    """That is computed in."""

    def first(self, row: int) -> int:
        """The first position that the row at this position sees."""
        near = 0 if self.window is None else max(0, row - self.window + 1)
        return near if self.chunk is None else max(near, row // self.chunk * self.chunk)

    def hidden(self, rows: npt.NDArray[np.int64], slots: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
        """Whether rows must not look at slots, both positions that broadcast."""
        found = slots > rows
        if self.window is not None:
            found |= rows - slots >= self.window
        if self.chunk is not None:
            found |= slots < rows // self.chunk * self.chunk
        return found


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
    sparse: reference.Sparse | None = None,
    value_dim: int | None = None,
) -> Tensor:
    """As the definition says. bfloat16 scores are rounded once, the softmax between the products is float32."""
    near = (window is not None or chunk is not None) and not causal
    if near or sparse is not None:
        return reference.attention.reference(
            q,
            k_cache,
            v_cache,
            ragged,
            scale=scale,
            window=window,
            chunk=chunk,
            softcap=softcap,
            causal=causal,
            sinks=sinks,
            slopes=slopes,
            sparse=sparse,
            value_dim=value_dim,
        )
    # falling scores are too far apart for bfloat16
    dtype = torch.float32 if slopes is not None else _working(q.dtype)
    kind = Kind(window, chunk, causal, slopes is not None, dtype)
    batches = ragged.plans.get(kind)
    if batches is None:
        batches = ragged.plans[kind] = _plan(ragged, numbers(k_cache), q.shape[1], kind)
    scoring = Scoring(scale, softcap, sinks, slopes)
    k_rows, v_rows = _rows_of(k_cache), None if v_cache is None else _rows_of(v_cache)
    out = q.new_empty(*q.shape[:2], q.shape[-1] if value_dim is None else value_dim)
    for batch in batches:
        found = _attend(q[batch.rows].to(dtype), k_rows, v_rows, batch, scoring, out)
        if batch.kept is None:
            out[batch.rows] = found
        else:
            assert isinstance(batch.rows, Tensor)
            out[batch.rows[batch.kept]] = found[batch.kept]
    return out


def _working(dtype: torch.dtype) -> torch.dtype:
    """What products are computed in: float32 where a CPU multiplies no bfloat16, and for float16, which none does and which may
    overflow."""
    return dtype if dtype == torch.bfloat16 and multiplies_bfloat16() else torch.float32


@functools.cache
def multiplies_bfloat16() -> bool:
    """Whether torch has more than plain loops for products of bfloat16 on this CPU."""
    return torch._C._has_mkldnn and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


Stored = tuple[Tensor, Union[Tensor, None]]
"""Numbers [N * K, P, D] and scales [N * K, P] of a cache: one row per block and head, which is what a batched product wants
to read."""


def _rows_of(cache: Cache) -> Stored:
    n, p, k, d = numbers(cache).shape
    if isinstance(cache, Tensor):
        return cache.transpose(1, 2).view(n * k, p, d), None
    # a block's rows and scales are one piece of memory: all rows have the same stride
    values, scales = (t.transpose(1, 2) for t in cache)
    rows = values.as_strided((n * k, p, d), (values.stride(1), *values.stride()[2:]))
    return rows, scales.as_strided((n * k, p), (scales.stride(1), scales.stride(2)))


@dataclass(frozen=True)
class Scoring:
    """How products become weights."""

    scale: float
    softcap: float | None
    sinks: Tensor | None
    """[H]"""
    slopes: Tensor | None
    """[H]"""

    def of_heads(self, first: int, stop: int, kv_heads: int) -> Scoring:
        """For the query heads of kv heads first..stop alone, [stop - first, G]."""
        own = (None if t is None else t.view(kv_heads, -1)[first:stop] for t in (self.sinks, self.slopes))
        return Scoring(self.scale, self.softcap, *own)


def _attend(q: Tensor, k_rows: Stored, v_rows: Stored | None, batch: Batch, scoring: Scoring, like: Tensor) -> Tensor:
    """The batch's rows q[S * c, H, D] -> [S * c, H, V] of the type and width of `like`, a few kv heads at a time when scores
    would get too large."""
    pieces, kv_heads, blocks = batch.blocks.shape
    width = like.shape[-1]
    queries = q.view(pieces, batch.count, kv_heads, -1, q.shape[-1]).transpose(1, 2)
    scores = pieces * batch.count * queries.shape[3] * blocks * k_rows[0].shape[1]
    step = max(1, min(kv_heads, ELEMENTS // scores))
    out = like.new_empty(len(q), q.shape[1], width)
    heads = out.view(pieces, batch.count, kv_heads, -1, width)
    for h in range(0, kv_heads, step):
        index = batch.blocks[:, h : h + step]
        k = _gather(k_rows, index, batch.stale, q.dtype)
        v = k[..., :width] if v_rows is None else _gather(v_rows, index, batch.stale, q.dtype)
        own = scoring.of_heads(h, h + step, kv_heads)
        heads[:, :, h : h + step] = _products(queries[:, h : h + step], k, v, batch, own)
    return out


def _gather(stored: Stored, index: Tensor, stale: tuple[Tensor, Tensor], dtype: torch.dtype) -> Tensor:
    """Blocks index[S, K, B] -> [S, K, L, D], stale slots zeroed."""
    (rows, scales), (pieces, heads, _), dim, flat = stored, index.shape, stored[0].shape[-1], index.flatten()
    if scales is None:
        out = rows.flatten(1).index_select(0, flat).to(dtype)
    else:
        found = rows.view(torch.uint8).index_select(0, flat).view(rows.dtype)  # torch selects no float8
        out = (found.float() * scales.index_select(0, flat)[..., None]).to(dtype)
    out = out.view(pieces, heads, -1, dim)
    if len(stale[0]):
        out.transpose(1, 2).index_put_(stale, out.new_zeros(()))
    return out


def _products(q: Tensor, k: Tensor, v: Tensor, batch: Batch, scoring: Scoring) -> Tensor:
    """q[S, K, c, G, D] over k[S, K, L, D] and v[S, K, L, V] -> [S, c, K, G, V]."""
    s, heads, c, g, d = q.shape
    flat_k, flat_v = k.flatten(0, 1), v.flatten(0, 1)
    flat_q = q.reshape(s * heads, c * g, d)
    scores = torch.baddbmm(flat_q.new_empty(()), flat_q, flat_k.transpose(1, 2), beta=0, alpha=scoring.scale)
    if scoring.softcap is not None:
        scores.div_(scoring.softcap).tanh_().mul_(scoring.softcap)
    if scoring.slopes is not None and batch.distance is not None:
        scores.view(s, heads, c, g, -1).addcmul_(scoring.slopes.view(heads, 1, g, 1), batch.distance, value=-1)
    if batch.mask is not None:
        scores.view(s, heads, c, g, -1).add_(batch.mask)
    out = torch.bmm(scores.softmax(-1), flat_v).view(s, heads, c, g, -1)
    if scoring.sinks is not None:  # what is left of the softmax beside one logit more
        total = scores.float().logsumexp(-1).view(s, heads, c, g)
        out *= (total - scoring.sinks.float().view(heads, 1, g)).sigmoid()[..., None]
    return out.transpose(1, 2)


def _plan(ragged: Ragged, k_cache: Tensor, heads: int, kind: Kind) -> list[Batch]:
    """Cut sequences into pieces and gather like pieces: once per step, for all layers of this kind."""
    _, block_size, kv_heads, head_dim = k_cache.shape
    if not kind.causal:
        pieces = sorted(_whole(ragged, block_size, heads // kv_heads), key=lambda p: (len(p.blocks), p.count))
        most = 4 * ELEMENTS // (block_size * kv_heads * head_dim)
        return [_whole_batch(group, block_size, kv_heads, kind) for group in _close(pieces, block_size, most)]
    pieces = sorted(_cut(ragged, block_size, heads // kv_heads, kind), key=lambda p: (p.count, len(p.blocks)))
    most = ELEMENTS // (block_size * kv_heads * max(head_dim, heads // kv_heads))
    return [_batch(group, block_size, kv_heads, kind) for group in _alike(pieces, most)]


def _cut(ragged: Ragged, block_size: int, group: int, kind: Kind) -> Iterator[Piece]:
    """Chunks of rows: short ones near the start of a sequence, where later keys needn't be scored; never too large."""
    table = ragged.table.numpy()
    for s, (begin, stop) in enumerate(pairwise(ragged.host_starts.tolist())):
        length = int(ragged.host_lengths[s])
        rows = max(1, min(max(ROWS, length // 4), ELEMENTS // (group * length)))
        for row in range(begin, stop, rows):
            count = min(rows, stop - row)
            end = length - (stop - row) + count
            first = kind.first(end - count) // block_size
            yield Piece(row, count, end, first * block_size, table[s, first : -(-end // block_size)], end - count)


def _whole(ragged: Ragged, block_size: int, group: int) -> Iterator[Piece]:
    """Rows that see all of their sequence: as many at once as their scores leave room for."""
    table = ragged.table.numpy()
    for s, (begin, stop) in enumerate(pairwise(ragged.host_starts.tolist())):
        length = int(ragged.host_lengths[s])
        rows = max(1, ELEMENTS // (group * length))
        for row in range(begin, stop, rows):
            blocks = table[s, : -(-length // block_size)]
            yield Piece(row, min(rows, stop - row), length, 0, blocks, length - (stop - row))


def _close(pieces: list[Piece], block_size: int, most: int) -> Iterator[list[Piece]]:
    """Runs of sorted pieces of similar size: at most `most` blocks, padding included, and few scores in vain."""
    group: list[Piece] = []
    real = widest = 0
    for piece in pieces:
        scores = piece.count * len(piece.blocks) * block_size
        rows, blocks = max(widest, piece.count), (len(group) + 1) * len(piece.blocks)
        fits = blocks <= most and blocks * block_size * rows <= WASTE * (real + scores) + SLACK
        if group and not fits:
            yield group
            group, real, rows = [], 0, piece.count
        group.append(piece)
        real, widest = real + scores, rows
    if group:
        yield group


def _whole_batch(pieces: list[Piece], block_size: int, kv_heads: int, kind: Kind) -> Batch:
    """Rows and blocks are padded to the longest; slots beyond a sequence's end are hidden from all rows alike."""
    counts = np.array([p.count for p in pieces])[:, None]
    blocks = _blocks(pieces, kv_heads)
    offsets = np.arange(counts.max())
    rows = np.array([p.row for p in pieces])[:, None] + np.minimum(offsets, counts - 1)
    beyond = np.arange(blocks.shape[2] * block_size) >= np.array([p.end for p in pieces])[:, None]
    stale = beyond.nonzero()
    positions = np.array([p.position for p in pieces])[:, None, None] + offsets[:, None]
    return Batch(
        torch.from_numpy(rows.ravel()),
        None if (counts == counts.max()).all() else torch.from_numpy((offsets < counts).ravel().nonzero()[0]),
        int(counts.max()),
        torch.from_numpy(blocks),
        (torch.from_numpy(stale[0]), torch.from_numpy(stale[1])),
        _mask(beyond[:, None], kind.dtype) if beyond.any() else None,
        _distance(positions - np.arange(beyond.shape[1])) if kind.sloped else None,
    )


def _blocks(pieces: list[Piece], kv_heads: int) -> npt.NDArray[np.int64]:
    """[S, K, B]: rows of a cache seen as [N * K, P * D], padded with block 0."""
    table = np.zeros((len(pieces), max(len(p.blocks) for p in pieces)), np.int64)
    for line, piece in zip(table, pieces, strict=True):
        line[: len(piece.blocks)] = piece.blocks
    return table[:, None] * kv_heads + np.arange(kv_heads)[:, None]


def _alike(pieces: list[Piece], most: int) -> Iterator[list[Piece]]:
    """Runs of sorted pieces with equal count: padded blocks (times rows) stay below `most`, and little is wasted."""
    group: list[Piece] = []
    real = 0
    for piece in pieces:
        size = len(piece.blocks)
        padded = (len(group) + 1) * size
        fits = padded * piece.count <= most and padded <= WASTE * (real + size)
        if group and not (fits and piece.count == group[0].count):
            yield group
            group, real = [], 0
        group.append(piece)
        real += size
    if group:
        yield group


def _batch(pieces: list[Piece], block_size: int, kv_heads: int, kind: Kind) -> Batch:
    count, blocks = pieces[0].count, _blocks(pieces, kv_heads)
    ends = np.array([p.end for p in pieces])[:, None, None]
    slots = np.array([p.first for p in pieces])[:, None, None] + np.arange(blocks.shape[2] * block_size)
    positions = ends - count + np.arange(count)[:, None]
    hidden = kind.hidden(positions, slots)
    stale = (slots >= ends)[:, 0].nonzero()
    return Batch(
        _rows(pieces, count),
        None,
        count,
        torch.from_numpy(blocks),
        (torch.from_numpy(stale[0]), torch.from_numpy(stale[1])),
        _mask(hidden, kind.dtype) if hidden.any() else None,
        _distance(positions - slots) if kind.sloped else None,
    )


def _rows(pieces: list[Piece], count: int) -> slice | Tensor:
    """A slice where the pieces' rows follow one another: views instead of copies."""
    rows = np.array([p.row for p in pieces])
    if (np.diff(rows) == count).all():
        return slice(int(rows[0]), int(rows[0]) + count * len(rows))
    return torch.from_numpy((rows[:, None] + np.arange(count)).ravel())


def _distance(behind: npt.NDArray[np.int64]) -> Tensor:
    """behind[S, c, L] -> [S, 1, c, 1, L] float32."""
    return torch.from_numpy(np.abs(behind).astype(np.float32))[:, None, :, None]


def _mask(hidden: npt.NDArray[np.bool_], dtype: torch.dtype) -> Tensor:
    """hidden[S, c, L] -> [S, 1, c, 1, L] to be added to scores."""
    mask = torch.zeros(hidden.shape, dtype=dtype).masked_fill_(torch.from_numpy(hidden), -torch.inf)
    return mask[:, None, :, None]
