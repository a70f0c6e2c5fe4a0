"""Rotation fused with the cache write, by Triton: a step's queries, keys and values are read once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvasir.kernels.quantise import Cache
from kvasir.kernels.quantise_triton import encode, stored
from kvasir.kernels.ragged import Ragged
from kvasir.kernels.rope import Angles
from kvasir.kernels.tile_triton import dense, power_of_two

TOLERANCE = {torch.float32: 1e-6, torch.float16: 4e-3, torch.bfloat16: 3e-2}
"""For values of size 1 to 4: a sum of two products that is rounded to its neighbour."""


@triton.jit
def turned(x_ptr, cos_ptr, sin_ptr, inside, d, kind, DIM: tl.constexpr, INTERLEAVED: tl.constexpr):
    """Numbers d of the heads at x_ptr[HB, 1], the first DIM of which turn: x * cos, rounded, + partner * sin."""
    x = tl.load(x_ptr + d[None, :], mask=inside, other=0.0)
    if DIM:
        partner = d ^ 1 if INTERLEAVED else (d + DIM // 2) % DIM
        partner = tl.where(d < DIM, partner, d)
        other = tl.load(x_ptr + partner[None, :], mask=inside, other=0.0).to(tl.float32)
        cos = tl.load(cos_ptr + d, mask=d < DIM, other=1.0).to(tl.float32)
        sin = tl.load(sin_ptr + d, mask=d < DIM, other=0.0).to(tl.float32)
        x = ((x.to(tl.float32) * cos[None, :]).to(kind).to(tl.float32) + other * sin[None, :]).to(kind)
    return x


@triton.jit
def _put(
    x, cache_ptr, scales_ptr, slot, head, inside, d, block_, slot_, head_, s_block, s_slot, s_head,
    HEADS: tl.constexpr, P: tl.constexpr, FORMAT: tl.constexpr,
):  # fmt: skip
    """x[HB, BD] of these heads into a slot."""
    block, place = slot // P, slot % P
    target = cache_ptr + block * block_ + place * slot_ + head[:, None] * head_ + d[None, :]
    if FORMAT:
        numbers, scale = encode(x, FORMAT)
        tl.store(scales_ptr + block * s_block + place * s_slot + head * s_head, scale, mask=head < HEADS)
        tl.store(target, numbers, mask=inside)
    else:
        tl.store(target, x.to(cache_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _turn(
    q_ptr, k_ptr, v_ptr, cos_ptr, sin_ptr, slots_ptr, out_ptr, k_cache_ptr, v_cache_ptr, k_scales_ptr, v_scales_ptr,
    q_row, q_head, k_row, k_head, v_row, v_head,
    k_block, k_slot, k_part, ks_block, ks_slot, ks_part, v_block, v_slot, v_part, vs_block, vs_slot, vs_part,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, P: tl.constexpr, DIM: tl.constexpr,
    INTERLEAVED: tl.constexpr, VALUES: tl.constexpr, FORMAT: tl.constexpr, HB: tl.constexpr,
):  # fmt: skip
    """HB heads of a row: first those of the queries, into out[T, H, D], then those of keys and values, into their slot."""
    row = tl.program_id(0).to(tl.int64)
    number = tl.program_id(1)
    d = tl.arange(0, BD)
    if DIM:
        cos_ptr += row * DIM
        sin_ptr += row * DIM
    query_tiles: tl.constexpr = (HEADS + HB - 1) // HB
    if number < query_tiles:
        head = number * HB + tl.arange(0, HB)
        inside = (head < HEADS)[:, None] & (d < D)[None, :]
        at = q_ptr + row * q_row + head[:, None] * q_head
        q = turned(at, cos_ptr, sin_ptr, inside, d, out_ptr.dtype.element_ty, DIM, INTERLEAVED)
        tl.store(out_ptr + (row * HEADS + head[:, None]) * D + d[None, :], q, mask=inside)
    elif KV_HEADS:
        head = (number - query_tiles) * HB + tl.arange(0, HB)
        inside = (head < KV_HEADS)[:, None] & (d < D)[None, :]
        slot = tl.load(slots_ptr + row)
        at = k_ptr + row * k_row + head[:, None] * k_head
        k = turned(at, cos_ptr, sin_ptr, inside, d, k_ptr.dtype.element_ty, DIM, INTERLEAVED)
        _put(
            k, k_cache_ptr, k_scales_ptr, slot, head, inside, d, k_block, k_slot, k_part, ks_block, ks_slot, ks_part,
            KV_HEADS, P, FORMAT,
        )  # fmt: skip
        if VALUES:
            v = tl.load(v_ptr + row * v_row + head[:, None] * v_head + d[None, :], mask=inside, other=0.0)
            _put(
                v, v_cache_ptr, v_scales_ptr, slot, head, inside, d,
                v_block, v_slot, v_part, vs_block, vs_slot, vs_part, KV_HEADS, P, FORMAT,
            )  # fmt: skip


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
    """As the definition says; q stays as it is."""
    return run(q, (k, v, k_cache, v_cache, ragged), angles, interleaved=interleaved)


def write(k: Tensor, v: Tensor | None, k_cache: Cache, v_cache: Cache | None, ragged: Ragged) -> None:
    """As the definition says."""
    run(k[:, :0], (k, v, k_cache, v_cache, ragged), None, interleaved=False)


Written = tuple[Tensor, "Tensor | None", Cache, "Cache | None", Ragged]
"""k, v, k_cache, v_cache, and where they go"""


def run(q: Tensor, written: Written | None, angles: Angles | None, *, interleaved: bool) -> Tensor:
    """q[T, H, D] by its angles -> the turned queries; keys and values, if there are any, into their slots."""
    rows, heads, dim = q.shape
    out = q.new_empty(rows, heads, dim)
    # what stands for a cache that nothing is written to looks the same, however many rows there are
    k, v, k_cache, v_cache, ragged = written or (q, None, q[:1][None], None, None)
    kv_heads = 0 if written is None else k.shape[1]
    keys = stored(k_cache)
    values = keys if v is None or v_cache is None else stored(v_cache)
    q, k = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k))
    v = v if v is None or v.stride(-1) == 1 else v.contiguous()
    cos, sin = angles or (None, None)
    block = power_of_two(dim, 16)
    together = max(1, 1024 // block)
    grid = rows, triton.cdiv(heads, together) + triton.cdiv(kv_heads, together)
    if not (rows and grid[1]):
        return out
    _turn[grid](
        q, k, v, *dense(cos, sin, None if ragged is None else ragged.slots), out,
        keys.values, values.values, keys.scales, values.scales,
        *q.stride()[:2], *k.stride()[:2], *((0, 0) if v is None else v.stride()[:2]), *keys.strides, *values.strides,
        HEADS=heads, KV_HEADS=kv_heads, D=dim, BD=block, P=keys.values.shape[1],
        DIM=0 if cos is None else cos.shape[-1], INTERLEAVED=interleaved, VALUES=v is not None, FORMAT=keys.format_,
        HB=together,
    )  # fmt: skip
    return out
