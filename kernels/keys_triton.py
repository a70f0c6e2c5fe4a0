"""Softmax attention, one tile of keys after the other: what kernels over blocks are made of (arXiv:2205.14135)."""

from __future__ import annotations

import triton
import triton.language as tl

from kvasir.kernels.quantise_triton import decode
from kvasir.kernels.tile_triton import LOG2E, dot


@triton.jit
def merge(m, l, acc, m_new, l_new, acc_new):
    """Two softmaxes over different keys as one; both maxima may be -inf."""
    top = tl.maximum(m, m_new)
    safe = tl.where(top == -float("inf"), 0.0, top)
    a, b = tl.exp2(m - safe), tl.exp2(m_new - safe)
    return top, l * a + l_new * b, acc * a[:, None] + acc_new * b[:, None]


@triton.jit
def keys_step(
    q, q_rest, m, l, acc, start, end, low, row, turn, slope, scale, softcap,
    k_ptr, v_ptr, ks_ptr, vs_ptr, table_ptr, k_block, k_slot, ks_block, ks_slot, v_block, v_slot, vs_block, vs_slot,
    FORMAT: tl.constexpr, NATIVE: tl.constexpr, P: tl.constexpr, VALUE: tl.constexpr, REST: tl.constexpr,
    DV: tl.constexpr, DR: tl.constexpr, LATENT: tl.constexpr,
    WINDOW: tl.constexpr, CHUNK: tl.constexpr, CAUSAL: tl.constexpr, SOFTCAP: tl.constexpr, SLOPES: tl.constexpr,
    SIZE: tl.constexpr, LOCAL: tl.constexpr, STRIDE: tl.constexpr, MASKED: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """One step over keys start..start + N: what a row doesn't see weighs exactly 0, what nobody sees isn't read."""
    key = start + tl.arange(0, N)
    d = tl.arange(0, DV)
    there = (key >= low) & (key < end)
    number = tl.load(table_ptr + key // P, mask=there, other=0).to(tl.int64)
    at = number * k_block + (key % P) * k_slot
    k = tl.load(k_ptr + at[:, None] + d[None, :], mask=there[:, None] & (d < VALUE)[None, :], other=0)
    k = decode(k, q.dtype, FORMAT, NATIVE)
    scores = dot(q, tl.trans(k), tl.zeros((q.shape[0], N), tl.float32))
    if REST:
        r = tl.arange(0, DR)
        rest = tl.load(k_ptr + VALUE + at[:, None] + r[None, :], mask=there[:, None] & (r < REST)[None, :], other=0)
        scores = dot(q_rest, tl.trans(decode(rest, q.dtype, FORMAT, NATIVE)), scores)
    if FORMAT:
        k_scales = tl.load(ks_ptr + number * ks_block + (key % P) * ks_slot, mask=there, other=0.0)
        scores = scores * k_scales[None, :]
    if SOFTCAP:
        scores = softcap * (1 - 2 / (tl.exp2(scores * (scale * 2 * LOG2E / softcap)) + 1)) * LOG2E
    else:
        scores = scores * (scale * LOG2E)
    distance = row[:, None] - key[None, :]
    if SLOPES:
        scores = scores - slope[:, None] * tl.abs(distance).to(tl.float32) * LOG2E
    if MASKED:
        seen = there[None, :]
        if CAUSAL:
            seen = seen & (distance >= 0)
        if WINDOW:
            seen = seen & (tl.abs(distance) < WINDOW)
        if CHUNK:
            seen = seen & (row[:, None] // CHUNK == key[None, :] // CHUNK)
        if SIZE:
            near = row[:, None] // SIZE - key[None, :] // SIZE < LOCAL
            seen = seen & (near | ((key[None, :] // SIZE + turn[:, None] + 1) % STRIDE == 0))
        scores = tl.where(seen, scores, -float("inf"))
    top = tl.maximum(m, tl.max(scores, 1))
    safe = tl.where(top == -float("inf"), 0.0, top)
    weights = tl.exp2(scores - safe[:, None])
    shrink = tl.exp2(m - safe)
    l = l * shrink + tl.sum(weights, 1)
    acc = acc * shrink[:, None]
    if LATENT:
        v = k
        if FORMAT:
            weights = weights * k_scales[None, :]
    else:
        at = number * v_block + (key % P) * v_slot
        v = tl.load(v_ptr + at[:, None] + d[None, :], mask=there[:, None] & (d < VALUE)[None, :], other=0)
        v = decode(v, q.dtype, FORMAT, NATIVE)
        if FORMAT:
            v_scales = tl.load(vs_ptr + number * vs_block + (key % P) * vs_slot, mask=there, other=0.0)
            weights = weights * v_scales[None, :]
    return top, l, dot(weights.to(v.dtype), v, acc)
