"""Attention on CPUs by compiled code (attention_cpu.cpp): a row's result doesn't depend on what else is in the batch."""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor

from kvasir.kernels import attention_cpu
from kvasir.kernels.attention import Sparse
from kvasir.kernels.native import TYPES, cache_of, library
from kvasir.kernels.quantise import Cache, numbers
from kvasir.kernels.ragged import Ragged

TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}
"""How far values of size 1 may be from the definition's: bfloat16 weights are rounded before they meet the values."""


def unfit(
    q: Tensor, k_cache: Cache, v_cache: Cache | None, ragged: Ragged | None, *, sparse: Sparse | None = None, **_: Any
) -> str:
    """Why such a call is left to torch; empty: it isn't."""
    if sparse is not None:
        return "its rows don't skip what only blocks of a stride see (block-sparse layers)"
    return "" if q.dtype in TYPES and q.shape[-1] % 2 == 0 else f"it takes no heads of {q.shape[-1]} in {q.dtype}"


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
    """As the definition says; keys that only blocks of a stride see and odd head dims are left to torch."""
    compiled, cache = library(), cache_of(k_cache, v_cache)
    if compiled is None or cache is None or q.stride(-1) != 1 or unfit(q, k_cache, v_cache, ragged, sparse=sparse):
        return attention_cpu.attention(
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
    rows, heads, dim = q.shape
    kv_heads = numbers(k_cache).shape[2]
    value_dim = value_dim or dim
    out = q.new_empty(rows, heads, value_dim)
    sinks = None if sinks is None else sinks.float()
    slopes = None if slopes is None else slopes.float()
    compiled.attention(
        TYPES[q.dtype],
        q.data_ptr(),
        *q.stride()[:2],
        ctypes.addressof(cache),
        ragged.table.data_ptr(),
        ragged.table.stride(0),
        ragged.starts.data_ptr(),
        ragged.lengths.data_ptr(),
        len(ragged.lengths),
        heads,
        kv_heads,
        dim,
        value_dim,
        scale,
        softcap or 0.0,
        window or 0,
        chunk or 0,
        causal,
        None if sinks is None else sinks.data_ptr(),
        None if slopes is None else slopes.data_ptr(),
        out.data_ptr(),
        torch.get_num_threads(),
    )
    return out
