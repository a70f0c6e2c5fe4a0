"""Caches of another type than the model's: 8 bits with scales, in torch and compiled, against the definitions."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch

from kvasir.kernels import attention_cpu, attention_native, cache_native, native
from kvasir.kernels.attention import attention
from kvasir.kernels.cache import turn_and_write
from kvasir.kernels.quantise import LARGEST, Quantised, get, quantise

FLOATS = [torch.float32, torch.bfloat16, torch.float16]
KINDS = [*LARGEST, *FLOATS]
OFF = {torch.int8: 0.007, torch.float8_e4m3fn: 0.03, torch.float8_e5m2: 0.06}
"""Root mean square of what quantising normally distributed rows of 64 changes, in standard deviations: the tolerance."""
needs_compiler = pytest.mark.skipif(native.library() is None, reason=f"no compiled kernels: {native.native().text}")


@pytest.mark.parametrize("dtype", LARGEST)
@pytest.mark.parametrize("size", [1e-30, 1e-3, 1.0, 1e4, 1e30])
def test_rows_come_back_as_they_were(dtype: torch.dtype, size: float) -> None:
    """Whatever their size: nothing overflows, nothing vanishes."""
    torch.manual_seed(0)
    x = torch.randn(500, 64) * size
    values, scales = quantise(x, dtype)
    assert values.dtype == dtype
    assert scales.shape == (500,)
    off = (values.float() * scales[:, None] - x) / size
    assert off.square().mean().sqrt() < OFF[dtype]
    assert (values.float().abs().amax(-1) == LARGEST[dtype]).all()


@pytest.mark.parametrize("dtype", LARGEST)
def test_odd_rows(dtype: torch.dtype) -> None:
    """Zeros stay zeros; what isn't a number doesn't become one; the smallest row doesn't overflow."""
    values, scales = quantise(torch.tensor([[0.0, 0.0], [1.0, torch.nan], [-torch.inf, 1.0], [1e-45, 0.0]]), dtype)
    back = values.float() * scales[:, None]
    assert back[0].tolist() == [0, 0]
    assert scales[1].isnan()
    assert back[2, 0].isnan()
    assert not back[3].isnan().any()


def rounded(cache: Any, blocks: int) -> torch.Tensor:
    return get(cache, torch.arange(blocks)).nan_to_num()


@needs_compiler
@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("dim", [8, 64, 80])
def test_written_equal_to_the_definition(
    kind: torch.dtype, dtype: torch.dtype, dim: int, paged: Callable[..., Any], kept: Callable[..., Any]
) -> None:
    """Turned keys may differ where a sum of products is rounded to its neighbour; without a turn bit for bit."""
    torch.manual_seed(dim)
    batch = paged([(37, 3), (5, 1), (90, 70)], 5, 6, 2, dim, dtype)
    x = torch.randn(74, 10, dim).to(dtype) * torch.tensor([1e-4, 1.0, 300.0]).repeat(25)[:74, None, None].to(dtype)
    x[7] = 0
    angles = torch.ones(74, 1, dim).to(dtype), torch.zeros(74, 1, dim).to(dtype)
    ours, theirs = kept(batch, kind), kept(batch, kind)
    cache_native.turn_and_write(
        *x.clone().split_with_sizes([6, 2, 2], 1), angles, *ours, batch.ragged, interleaved=False
    )
    turn_and_write.reference(*x.split_with_sizes([6, 2, 2], 1), angles, *theirs, batch.ragged, interleaved=False)
    for got, want in zip(ours, theirs, strict=True):
        assert torch.equal(rounded(got, len(batch.k_cache)), rounded(want, len(batch.k_cache)))


@needs_compiler
@pytest.mark.parametrize("kind", LARGEST, ids=str)
@pytest.mark.parametrize("odd", [torch.nan, torch.inf, -torch.inf])
def test_what_is_no_number_is_written_as_none(
    kind: torch.dtype, odd: float, paged: Callable[..., Any], kept: Callable[..., Any]
) -> None:
    batch = paged([(3, 3)], 16, 2, 2, 24, torch.bfloat16)
    q, k, v = torch.ones(3, 3, 2, 24, dtype=torch.bfloat16)
    k[1, 0, 20] = v[1, 1, 3] = odd
    angles = torch.ones(3, 1, 24).bfloat16(), torch.zeros(3, 1, 24).bfloat16()
    caches = kept(batch, kind)
    cache_native.turn_and_write(q, k, v, angles, *caches, batch.ragged, interleaved=False)
    for cache, head in zip(caches, (0, 1), strict=True):
        slots = batch.ragged.slots
        rows = get(cache, slots // 16)[torch.arange(3), slots % 16]
        assert rows[1, head].isnan().any()
        assert rows[1, 1 - head].isfinite().all()
        assert rows[[0, 2]].isfinite().all()


@needs_compiler
@pytest.mark.parametrize("seed", range(24))
def test_read_equal_to_the_definition(seed: int, paged: Callable[..., Any], kept: Callable[..., Any]) -> None:
    """Compiled and in torch, over mixes of chunks, heads, block sizes and types; slots that nobody wrote hold NaN."""
    rng = random.Random(seed)
    dtype, kind = rng.choice(FLOATS), rng.choice(KINDS)
    kv_heads, group = rng.choice([(1, 4), (2, 3), (8, 4), (3, 1)])
    parts = [(rng.choice([1, 17, rng.randint(1, 1500)]), 1) for _ in range(rng.randint(1, 4))]
    parts = [(length, rng.randint(1, min(length, 150))) for length, _ in parts]
    size, dim = rng.choice([1, 3, 16, 64]), rng.choice([8, 64, 72, 128])
    batch = paged(parts, size, kv_heads * group, kv_heads, dim, dtype, seed)
    k, v = kept(batch, kind)
    facts = {"scale": 0.2, "window": rng.choice([None, 7, 300]), "softcap": rng.choice([None, 20.0])}
    want = attention.reference(batch.q, k, v, batch.ragged, **facts)
    # torch's path rounds scores and what it reads to the type of q
    for run, roundings in ((attention_native.attention, 2), (attention_cpu.attention, 4)):
        got = run(batch.q, k, v, batch.ragged, **facts)
        close = roundings * attention_native.TOLERANCE[dtype]
        torch.testing.assert_close(got.float(), want.float(), atol=close, rtol=0)


@needs_compiler
@pytest.mark.parametrize("kind", LARGEST, ids=str)
def test_values_inside_the_keys_equal_the_definition(kind: torch.dtype, paged: Callable[..., Any], kept: Any) -> None:
    batch = paged([(70, 1), (33, 20), (1200, 1)], 16, 8, 1, 72, torch.bfloat16)
    k, _ = kept(batch, kind)
    want = attention.reference(batch.q, k, None, batch.ragged, scale=0.1, value_dim=64)
    for run in (attention_native.attention, attention_cpu.attention):
        got = run(batch.q, k, None, batch.ragged, scale=0.1, value_dim=64)
        torch.testing.assert_close(got.float(), want.float(), atol=0.03, rtol=0)


@needs_compiler
@pytest.mark.parametrize("kind", LARGEST, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_a_row_is_the_same_in_any_batch(
    kind: torch.dtype, dtype: torch.dtype, paged: Callable[..., Any], kept: Callable[..., Any]
) -> None:
    batch = paged([(1500, 1), (300, 40), (3, 3)], 16, 12, 3, 64, dtype)
    k, v = kept(batch, kind)
    together = attention_native.attention(batch.q, k, v, batch.ragged, scale=0.2)
    alone = paged([(1500, 1)], 16, 12, 3, 64, dtype).ragged
    alone.table.copy_(batch.ragged.table[:1])
    assert torch.equal(attention_native.attention(batch.q[:1], k, v, alone, scale=0.2), together[:1])


@pytest.mark.parametrize("kind", LARGEST, ids=str)
def test_close_to_the_float_cache(kind: torch.dtype, paged: Callable[..., Any], kept: Callable[..., Any]) -> None:
    """Of attention over 400 keys, as far off as one value is."""
    batch = paged([(400, 50), (90, 1)], 16, 8, 2, 64)
    k, v = kept(batch, kind)
    assert isinstance(k, Quantised)
    want = attention.reference(batch.q, batch.k_cache, batch.v_cache, batch.ragged, scale=0.125)
    got = attention.reference(batch.q, k, v, batch.ragged, scale=0.125)
    assert (got - want).square().mean().sqrt() < OFF[kind]
