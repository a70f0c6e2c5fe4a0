"""Attention over blocks by Triton (Kwon et al. 2023, arXiv:2309.06180; Dao et al. 2022, arXiv:2205.14135).

A sequence's n rows are n * H / K lines for each kv head: its queries times the heads that share a key. Tiles of M lines walk
over tiles of N keys with a running softmax. Sequences of few rows are also cut along their keys (flash decoding): part z
has `span` keys, and a second kernel puts the parts together. Nothing is read on the host but what it already knows.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvasir.kernels.attention import FEW_ROWS, MOST_WORK_BYTES, Sparse
from kvasir.kernels.keys_triton import keys_step, merge
from kvasir.kernels.quantise import Cache
from kvasir.kernels.quantise_triton import Stored, converts_float8, stored
from kvasir.kernels.ragged import Ragged
from kvasir.kernels.tile_triton import LOG2E, dense, power_of_two, target, tile_of

TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}
"""How far values of size 1 may be from the definition's: weights are rounded to the cache's type before they meet the values."""
SPAN = 512
"""Keys in a part, at least, into which those of sequences of at most FEW_ROWS are cut."""
MOST_PARTS = 32
"""Beyond as many parts they grow instead, which bounds the grid of a CUDA graph; earlier where all parts of all sequences took
more than MOST_WORK_BYTES."""
FIXED_PARTS = 1 << 20
"""Parts never grow: where a row's sums must not depend on what comes behind it."""


@dataclass(frozen=True)
class Tiles:
    """How the work is cut: by head dim, types and GPU alone, never by what is in the batch."""

    lines: int
    keys: int
    warps: int
    stages: int


@dataclass(frozen=True)
class Kinds:
    """For few rows, whose tiles are small, for many, and one for both, with which a row's sums are the same: `deterministic`."""

    few: Tiles
    many: Tiles
    same: Tiles


def _all(tile: Tiles) -> Kinds:
    return Kinds(tile, tile, tile)


HOPPER = {
    "narrow": Kinds(few=Tiles(16, 64, 4, 3), many=Tiles(128, 64, 8, 3), same=Tiles(64, 64, 8, 2)),
    "wide": Kinds(few=Tiles(16, 32, 4, 3), many=Tiles(64, 32, 8, 2), same=Tiles(32, 32, 8, 2)),
    "latent": Kinds(few=Tiles(16, 32, 8, 2), many=Tiles(32, 32, 8, 2), same=Tiles(16, 32, 8, 2)),
    "narrow float32": _all(Tiles(16, 32, 4, 1)),
    "wide float32": _all(Tiles(16, 16, 16, 1)),
    "latent float32": _all(Tiles(16, 16, 8, 1)),
}
"""By heads (narrow: up to 128) and type; none of them spills registers, as tests/kernels/compile_triton.py says."""
BLACKWELL = HOPPER | {
    "narrow": replace(HOPPER["narrow"], same=Tiles(64, 32, 8, 2)),
    "narrow 8-bit": HOPPER["narrow"],
}
"""`same` spilled 16 bytes with 64 keys of 16 bits, and 32 with 32 of 8."""
AMPERE = HOPPER | {
    "narrow": Kinds(few=Tiles(16, 64, 4, 3), many=Tiles(64, 64, 8, 3), same=Tiles(32, 64, 8, 2)),
    "narrow 8-bit": Kinds(few=Tiles(16, 64, 4, 3), many=Tiles(64, 32, 8, 3), same=Tiles(32, 64, 8, 2)),
    "wide 8-bit": Kinds(few=Tiles(16, 32, 4, 3), many=Tiles(32, 32, 8, 2), same=Tiles(32, 32, 8, 2)),
}
"""Here registers hold the operands of products, too, and 8 bits are widened in them. Other caches in 8 bits: as their heads."""
CDNA = HOPPER | {
    "narrow 8-bit": Kinds(few=Tiles(16, 64, 4, 3), many=Tiles(64, 32, 4, 2), same=Tiles(32, 32, 4, 2)),
    "wide 8-bit": Kinds(few=Tiles(16, 32, 4, 3), many=Tiles(32, 32, 4, 2), same=Tiles(32, 32, 4, 2)),
    "latent": _all(Tiles(16, 32, 4, 1)),
    "wide float32": _all(Tiles(16, 16, 4, 1)),
    "latent float32": _all(Tiles(16, 16, 4, 1)),
}
"""AMD's: with more than 4 warps each has half as many registers."""


def tiles(value_dim: int, itemsize: int, cache_itemsize: int, *, latent: bool) -> Kinds:
    """For the GPU that kernels are compiled for; interpreted: any."""
    found = target()
    table = HOPPER
    if found is not None and found.backend == "hip":
        table = CDNA
    elif found is not None:
        table = AMPERE if found.arch < 90 else HOPPER if found.arch < 100 else BLACKWELL
    kind = "latent" if latent else "wide" if value_dim > 128 else "narrow"
    if itemsize == 4:
        return table[f"{kind} float32"]
    return table.get(f"{kind} 8-bit", table[kind]) if cache_itemsize == 1 else table[kind]


@triton.jit
def _span(length, most_parts, SPAN: tl.constexpr):
    """Keys in a part of so long a sequence."""
    return SPAN * tl.maximum(1, tl.cdiv(length, SPAN * most_parts))


@triton.jit(do_not_specialize=["sequences", "least", "most", "per", "parts", "most_parts", "table_row"])
def _attention(
    q_ptr, k_ptr, v_ptr, ks_ptr, vs_ptr, out_ptr, parts_ptr, sums_ptr, table_ptr, starts_ptr, lengths_ptr, sinks_ptr, slopes_ptr,
    scale, softcap, sequences, least, most, per, parts, most_parts,
    q_row, q_head, k_block, k_slot, k_head, ks_block, ks_slot, ks_head,
    v_block, v_slot, v_head, vs_block, vs_slot, vs_head, table_row, FORMAT: tl.constexpr, NATIVE: tl.constexpr,
    HEADS: tl.constexpr, GROUP: tl.constexpr, P: tl.constexpr, VALUE: tl.constexpr, REST: tl.constexpr,
    DV: tl.constexpr, DR: tl.constexpr, LATENT: tl.constexpr, WINDOW: tl.constexpr, CHUNK: tl.constexpr,
    CAUSAL: tl.constexpr, SOFTCAP: tl.constexpr, SINKS: tl.constexpr, SLOPES: tl.constexpr,
    SIZE: tl.constexpr, LOCAL: tl.constexpr, STRIDE: tl.constexpr, SHIFT: tl.constexpr, FIRST_HEAD: tl.constexpr,
    SPAN: tl.constexpr, CUT: tl.constexpr, MERGE: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """Lines of sequences of least..most rows. CUT: keys of part program_id(2) alone, into parts and sums; else all keys into
    out, with MERGE part after part, as they would be put together."""
    if per:
        s, tile = tl.program_id(0) // per, tl.program_id(0) % per
    else:
        s, tile = tile_of(tl.program_id(0), starts_ptr, sequences, GROUP, M)
    kv_head = tl.program_id(1)
    first_row = tl.load(starts_ptr + s)
    rows = tl.load(starts_ptr + s + 1) - first_row
    if (rows < least) | (rows > most) | (tile * M >= rows * GROUP):
        return
    length = tl.load(lengths_ptr + s)
    line = tile * M + tl.arange(0, M)
    real = line < rows * GROUP
    query, head = line // GROUP, kv_head * GROUP + line % GROUP
    row = length - rows + query
    turn = (FIRST_HEAD + head) * SHIFT
    d = tl.arange(0, DV)
    q_at = (first_row + query).to(tl.int64) * q_row + head * q_head
    q = tl.load(q_ptr + q_at[:, None] + d[None, :], mask=real[:, None] & (d < VALUE)[None, :], other=0.0)
    q_rest = q
    if REST:
        r = tl.arange(0, DR)
        q_rest = tl.load(
            q_ptr + VALUE + q_at[:, None] + r[None, :], mask=real[:, None] & (r < REST)[None, :], other=0.0
        )
    slope = tl.zeros((M,), tl.float32)
    if SLOPES:
        slope = tl.load(slopes_ptr + head, mask=real, other=0.0).to(tl.float32)

    top_row = length - rows + tile * M // GROUP
    last_row = length - rows + tl.minimum((tile * M + M - 1) // GROUP, rows - 1)
    low, end = 0, length
    if CAUSAL:
        end = last_row + 1
    if WINDOW:
        low = tl.maximum(low, top_row - WINDOW + 1)
        end = tl.minimum(end, last_row + WINDOW)
    if CHUNK:
        low = tl.maximum(low, top_row // CHUNK * CHUNK)
        end = tl.minimum(end, (last_row // CHUNK + 1) * CHUNK)

    span = _span(length, most_parts, SPAN)
    if CUT:
        begin, stop, span_here = tl.program_id(2), tl.program_id(2) + 1, span
    elif MERGE:
        begin, stop, span_here = low // span, tl.cdiv(end, span), span
    else:
        begin, stop, span_here = 0, 1, tl.cdiv(length, N) * N
    k_ptr += kv_head * k_head
    v_ptr += kv_head * v_head
    if FORMAT:
        ks_ptr += kv_head * ks_head
        vs_ptr += kv_head * vs_head
    table_ptr += s * table_row
    m_all = tl.full((M,), -float("inf"), tl.float32)
    l_all = tl.zeros((M,), tl.float32)
    acc_all = tl.zeros((M, DV), tl.float32)
    for part in range(begin, stop):
        m = tl.full((M,), -float("inf"), tl.float32)
        l = tl.zeros((M,), tl.float32)
        acc = tl.zeros((M, DV), tl.float32)
        start = tl.maximum(low // N * N, part * span_here)
        ended = tl.minimum(end, (part + 1) * span_here)
        whole = start
        if WINDOW + CHUNK + SIZE == 0:
            whole = ended // N * N
            if CAUSAL:
                whole = tl.minimum(whole, (top_row + 1) // N * N)
        for at in range(start, whole, N):
            m, l, acc = keys_step(
                q, q_rest, m, l, acc, at, ended, low, row, turn, slope, scale, softcap,
                k_ptr, v_ptr, ks_ptr, vs_ptr, table_ptr, k_block, k_slot, ks_block, ks_slot,
                v_block, v_slot, vs_block, vs_slot, FORMAT, NATIVE, P, VALUE, REST, DV, DR, LATENT,
                WINDOW, CHUNK, CAUSAL, SOFTCAP, SLOPES, SIZE, LOCAL, STRIDE, False, N,
            )  # fmt: skip
        for at in range(tl.maximum(start, whole), ended, N):
            m, l, acc = keys_step(
                q, q_rest, m, l, acc, at, ended, low, row, turn, slope, scale, softcap,
                k_ptr, v_ptr, ks_ptr, vs_ptr, table_ptr, k_block, k_slot, ks_block, ks_slot,
                v_block, v_slot, vs_block, vs_slot, FORMAT, NATIVE, P, VALUE, REST, DV, DR, LATENT,
                WINDOW, CHUNK, CAUSAL, SOFTCAP, SLOPES, SIZE, LOCAL, STRIDE, True, N,
            )  # fmt: skip
        if MERGE:
            m_all, l_all, acc_all = merge(m_all, l_all, acc_all, m, l, acc)
        else:
            m_all, l_all, acc_all = m, l, acc
    if CUT:
        place = ((s * most + query) * HEADS + head).to(tl.int64) * parts + tl.program_id(2)
        tl.store(parts_ptr + place[:, None] * VALUE + d[None, :], acc_all, mask=real[:, None] & (d < VALUE)[None, :])
        tl.store(sums_ptr + place * 2, m_all, mask=real)
        tl.store(sums_ptr + place * 2 + 1, l_all, mask=real)
    else:
        out_at = (first_row + query).to(tl.int64) * HEADS + head
        if SINKS:
            sink = tl.load(sinks_ptr + head, mask=real, other=0.0).to(tl.float32) * LOG2E
            one, none = tl.full((M,), 1.0, tl.float32), tl.zeros((M, DV), tl.float32)
            m_all, l_all, acc_all = merge(m_all, l_all, acc_all, sink, one, none)
        out = (acc_all / l_all[:, None]).to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + out_at[:, None] * VALUE + d[None, :], out, mask=real[:, None] & (d < VALUE)[None, :])


@triton.jit(do_not_specialize=["least", "most", "parts", "most_parts"])
def _together(
    parts_ptr, sums_ptr, out_ptr, starts_ptr, lengths_ptr, sinks_ptr, least, most, parts, most_parts,
    HEADS: tl.constexpr, VALUE: tl.constexpr, DV: tl.constexpr, SINKS: tl.constexpr, SPAN: tl.constexpr,
):  # fmt: skip
    """The parts of one row and head, one after the other, into out."""
    s, query, head = tl.program_id(0) // most, tl.program_id(0) % most, tl.program_id(1)
    first_row = tl.load(starts_ptr + s)
    rows = tl.load(starts_ptr + s + 1) - first_row
    if (rows < least) | (rows > most) | (query >= rows):
        return
    length = tl.load(lengths_ptr + s)
    d = tl.arange(0, DV)
    place = ((s * most + query) * HEADS + head).to(tl.int64) * parts
    m = tl.full((1,), -float("inf"), tl.float32)
    l = tl.zeros((1,), tl.float32)
    acc = tl.zeros((1, DV), tl.float32)
    one = tl.arange(0, 1)
    for part in range(tl.cdiv(length, _span(length, most_parts, SPAN))):
        at = place + part + one
        new = tl.load(parts_ptr + at[:, None] * VALUE + d[None, :], mask=(d < VALUE)[None, :], other=0.0)
        m, l, acc = merge(m, l, acc, tl.load(sums_ptr + at * 2), tl.load(sums_ptr + at * 2 + 1), new)
    if SINKS:
        sink = tl.load(sinks_ptr + head + one).to(tl.float32) * LOG2E
        m, l, acc = merge(m, l, acc, sink, 1.0 + tl.zeros((1,), tl.float32), tl.zeros((1, DV), tl.float32))
    out_at = ((first_row + query).to(tl.int64) * HEADS + head + one) * VALUE
    tl.store(
        out_ptr + out_at[:, None] + d[None, :],
        (acc / l[:, None]).to(out_ptr.dtype.element_ty),
        mask=(d < VALUE)[None, :],
    )


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
    deterministic: bool = False,
) -> Tensor:
    """As the definition says. `deterministic`: not a bit of a row's result depends on what else is in the batch, or on how
    its sequence was cut into chunks."""
    assert q.stride(-1) == 1, "a head's numbers lie in one piece"
    keys = stored(k_cache)
    rows, heads, dim = q.shape
    value = dim if value_dim is None else value_dim
    out = q.new_empty(rows, heads, value)
    if not rows:
        return out
    call = _Call(
        (q, out),
        (keys, keys if v_cache is None else stored(v_cache)),
        ragged,
        dense(ragged.table, ragged.starts, ragged.lengths),
        dense(sinks, slopes),
        (scale, softcap or 0.0),
        deterministic,
        {"SPAN": SPAN, "SINKS": sinks is not None},
        _shape(q, keys.values, value, window or 0, chunk or 0, sparse or (0, 0, 1, 0, 0))
        | {"LATENT": v_cache is None, "CAUSAL": causal, "SOFTCAP": softcap is not None, "SLOPES": slopes is not None},
    )
    counts = ragged.host_starts[1:] - ragged.host_starts[:-1]
    few = counts <= FEW_ROWS
    if few.any():
        call.few(int(counts[few].max()), int(ragged.host_lengths[few].max()))
    if not few.all():
        call.many()
    return out


def _shape(q: Tensor, k_cache: Tensor, value: int, window: int, chunk: int, sparse: Sparse) -> dict[str, int]:
    size, local, stride, shift, first_head = sparse
    heads, dim = q.shape[1:]
    block_size, kv_heads = k_cache.shape[1:3]
    return {
        "HEADS": heads, "GROUP": heads // kv_heads, "P": block_size,
        "VALUE": value, "DV": power_of_two(value, 16), "REST": dim - value, "DR": power_of_two(dim - value, 16),
        "WINDOW": window, "CHUNK": chunk,
        "SIZE": size, "LOCAL": local, "STRIDE": stride, "SHIFT": shift, "FIRST_HEAD": first_head,
    }  # fmt: skip


@dataclass(frozen=True)
class _Call:
    """What both launches of a call share."""

    rows: tuple[Tensor, Tensor]
    """q, out"""
    caches: tuple[Stored, Stored]
    """keys, values"""
    ragged: Ragged
    places: list[Tensor | None]
    """The ragged's table, starts and lengths."""
    per_head: list[Tensor | None]
    """sinks, slopes"""
    numbers: tuple[float, float]
    """scale, softcap"""
    deterministic: bool
    cut: dict[str, int]
    """How keys are cut into parts."""
    shape: dict[str, int]

    def few(self, most: int, longest: int) -> None:
        """Sequences of 1 to `most` rows, the longest of them `longest`."""
        q, out = self.rows
        sequences, heads, value = len(self.ragged.lengths), self.shape["HEADS"], self.shape["VALUE"]
        room = MOST_WORK_BYTES // (4 * sequences * most * heads * (value + 2))
        most_parts = FIXED_PARTS if self.deterministic else max(1, min(MOST_PARTS, room))
        parts = min(-(-longest // SPAN), most_parts)  # where its own have grown, a shorter one's may not have
        if self.deterministic:
            parts = parts if parts <= room else 1  # one after the other, which adds up the same
        elif 0 < self.shape["WINDOW"] <= 2 * SPAN:  # what a row sees is short: cutting it up isn't worth it
            parts = 1
        tile = self._tiles(few=True)
        per = -(-most * self.shape["GROUP"] // tile.lines)
        if parts == 1:
            self._launch(tile, sequences * per, 1, most, per, most_parts)
            return
        kept = q.new_empty(sequences * most * heads * parts, value, dtype=torch.float32)
        sums = q.new_empty(sequences * most * heads * parts, 2, dtype=torch.float32)
        self._launch(tile, sequences * per, 1, most, per, most_parts, parts, kept, sums)
        names = ("HEADS", "VALUE", "DV")
        _together[(sequences * most, heads)](
            kept, sums, out, *self.places[1:], self.per_head[0], 1, most, parts, most_parts,
            **{name: self.shape[name] for name in names}, **self.cut, enable_fp_fusion=not self.deterministic,
        )  # fmt: skip

    def many(self) -> None:
        """Sequences of more than FEW_ROWS rows."""
        tile, sequences = self._tiles(few=False), len(self.ragged.lengths)
        count = len(self.rows[0]) * self.shape["GROUP"] // tile.lines + sequences
        self._launch(tile, count, FEW_ROWS + 1, 1 << 30, 0, FIXED_PARTS if self.deterministic else MOST_PARTS)

    def _tiles(self, *, few: bool) -> Tiles:
        sizes = (tensor.dtype.itemsize for tensor in (self.rows[0], self.caches[0].values))
        kinds = tiles(self.shape["VALUE"], *sizes, latent=bool(self.shape["LATENT"]))
        return kinds.same if self.deterministic else kinds.few if few else kinds.many

    def _launch(
        self,
        tile: Tiles,
        count: int,
        least: int,
        most: int,
        per: int,
        most_parts: int,
        parts: int = 1,
        kept: Tensor | None = None,
        sums: Tensor | None = None,
    ) -> None:
        (q, out), (k, v), (sequences, width) = self.rows, self.caches, self.ragged.table.shape
        _attention[(count, k.values.shape[2], parts)](
            q, k.values, v.values, k.scales, v.scales, out, kept, sums, *self.places, *self.per_head,
            *self.numbers, sequences, least, most, per, parts, most_parts, *q.stride()[:2], *k.strides, *v.strides, width,
            FORMAT=k.format_, NATIVE=converts_float8(),
            **self.shape, **self.cut, CUT=kept is not None, MERGE=self.deterministic and kept is None,
            M=tile.lines, N=tile.keys, num_warps=tile.warps, num_stages=tile.stages,
            enable_fp_fusion=not self.deterministic,
        )  # fmt: skip
