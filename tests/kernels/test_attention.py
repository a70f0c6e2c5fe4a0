"""attention: the definition against torch's own operator, and the CPU equal against the definition."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from kvasir.kernels import attention_cpu
from kvasir.kernels.attention import attention

TOLERANCE = {torch.float32: 5e-6, torch.float16: 2e-3, torch.bfloat16: 3e-2}


def test_definition_is_causal_softmax_attention(paged: Callable[..., Any]) -> None:
    """One sequence, everything in one go, against scaled_dot_product_attention over the same keys in order."""
    batch = paged([(37, 37)], heads=4, kv_heads=4)
    order = batch.ragged.slots
    k, v = (c[order // 16, order % 16].transpose(0, 1) for c in (batch.k_cache, batch.v_cache))
    want = F.scaled_dot_product_attention(batch.q.transpose(0, 1), k, v, is_causal=True, scale=0.3).transpose(0, 1)
    got = attention.reference(batch.q, batch.k_cache, batch.v_cache, batch.ragged, scale=0.3)
    torch.testing.assert_close(got, want, atol=1e-6, rtol=0)


def test_window_hides_all_but_the_last(paged: Callable[..., Any]) -> None:
    """With a window of 1 a row sees only itself: the answer is its own value."""
    batch = paged([(9, 4), (40, 1)], heads=2, kv_heads=2)
    own = batch.v_cache[batch.ragged.slots // 16, batch.ragged.slots % 16]
    for run in (attention, attention.reference):
        got = run(batch.q, batch.k_cache, batch.v_cache, batch.ragged, scale=1.0, window=1)
        torch.testing.assert_close(got, own)


@pytest.mark.parametrize("seed", range(60))
def test_cpu_equals_definition(seed: int, paged: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Random mixes of chunks and single rows, of grouped heads, block sizes, windows, soft caps and types."""
    rng = random.Random(seed)
    parts = []
    for _ in range(rng.choice([1, 2, 5, 12])):
        length = rng.choice([1, 2, 15, 16, 17, rng.randint(1, 200)])
        parts.append((length, rng.choice([1, 1, 1, min(length, 5), length, rng.randint(1, length)])))
    kv_heads, group = rng.choice([(1, 4), (2, 1), (2, 3), (3, 3), (8, 4)])
    dtype = rng.choice(list(TOLERANCE))
    batch = paged(parts, rng.choice([1, 3, 8, 16, 32]), kv_heads * group, kv_heads, rng.choice([8, 64]), dtype, seed)
    facts = {"scale": 0.2, "window": rng.choice([None, None, 1, 7, 64]), "softcap": rng.choice([None, None, 3.0])}
    facts["causal"] = rng.random() < 0.6
    if facts["causal"]:
        facts["chunk"] = rng.choice([None, None, 5, 32])
    torch.manual_seed(seed)
    if rng.random() < 0.3:
        facts["sinks"] = torch.randn(kv_heads * group, dtype=dtype)
    if rng.random() < 0.3:
        facts["slopes"] = torch.rand(kv_heads * group)
    multiplies = rng.random() < 0.5
    monkeypatch.setattr(attention_cpu, "multiplies_bfloat16", lambda: multiplies)
    monkeypatch.setattr(attention_cpu, "ELEMENTS", rng.choice([1 << 12, 1 << 21]))
    monkeypatch.setattr(attention_cpu, "ROWS", rng.choice([4, 64]))
    monkeypatch.setattr(attention_cpu, "SLACK", rng.choice([0, 1 << 14]))
    got = attention_cpu.attention(batch.q, batch.k_cache, batch.v_cache, batch.ragged, **facts)
    want = attention.reference(batch.q, batch.k_cache, batch.v_cache, batch.ragged, **facts)
    assert got.dtype == dtype
    torch.testing.assert_close(got.float(), want.float(), atol=TOLERANCE[dtype], rtol=0)


def test_bfloat16_that_a_cpu_does_not_multiply_is_computed_in_float32(
    paged: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Then a result is rounded once, in the end."""
    batch = paged([(300, 1), (90, 90)], dtype=torch.bfloat16)
    monkeypatch.setattr(attention_cpu, "multiplies_bfloat16", lambda: False)
    got = attention_cpu.attention(batch.q, batch.k_cache, batch.v_cache, batch.ragged, scale=0.3)
    want = attention.reference(batch.q, batch.k_cache, batch.v_cache, batch.ragged, scale=0.3)
    assert (got == want).float().mean() > 0.99


def test_layers_share_one_plan(paged: Callable[..., Any]) -> None:
    """The same step with other queries and caches reads the plan of the first layer; another window has its own."""
    batch = paged([(20, 1), (33, 3)])
    other = paged([(20, 1), (33, 3)], seed=0)
    attention_cpu.attention(batch.q, batch.k_cache, batch.v_cache, batch.ragged, scale=1.0)
    before = dict(batch.ragged.plans)
    got = attention_cpu.attention(other.q * 2, other.k_cache, other.v_cache, batch.ragged, scale=1.0)
    assert batch.ragged.plans == before
    want = attention.reference(other.q * 2, other.k_cache, other.v_cache, batch.ragged, scale=1.0)
    torch.testing.assert_close(got, want, atol=1e-5, rtol=0)
    attention_cpu.attention(batch.q, batch.k_cache, batch.v_cache, batch.ragged, scale=1.0, window=4)
    assert len(batch.ragged.plans) == len(before) + 1


def test_padding_is_bounded(paged: Callable[..., Any]) -> None:
    """One long sequence among short ones must not make them pay for its length."""
    batch = paged([(8, 1)] * 30 + [(400, 1)])
    attention_cpu.attention(batch.q, batch.k_cache, batch.v_cache, batch.ragged, scale=1.0)
    (plan,) = batch.ragged.plans.values()
    assert sum(b.blocks[:, 0].numel() for b in plan) <= attention_cpu.WASTE * (30 + 25)


@pytest.mark.parametrize("lengths", [[8] * 30 + [400], [3, 60, 61, 7, 7, 120, 1]])
def test_whole_texts_are_batched(lengths: list[int], paged: Callable[..., Any]) -> None:
    """Texts of which every row sees all go together by size: few batches, few scores in vain."""
    batch = paged([(length, length) for length in lengths])
    for run in (attention_cpu.attention, attention.reference):
        got = run(batch.q, batch.k_cache, batch.v_cache, batch.ragged, scale=0.3, causal=False)
        if run is attention_cpu.attention:
            found = got
    torch.testing.assert_close(found, got, atol=2e-6, rtol=0)
    (plan,) = batch.ragged.plans.values()
    assert len(plan) <= 3
    scores = sum(b.blocks.shape[0] * b.count * b.blocks.shape[2] * 16 for b in plan)
    real = sum(length * (-(-length // 16) * 16) for length in lengths)
    assert scores <= attention_cpu.WASTE * real + len(plan) * attention_cpu.SLACK


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_inside_the_keys(dtype: torch.dtype, paged: Callable[..., Any]) -> None:
    """Latent attention: one wide key head, whose first numbers are the values."""
    batch = paged([(70, 1), (33, 20), (5, 5), (120, 1)], 16, 8, 1, 72, dtype)
    facts = {"scale": 0.1, "value_dim": 64}
    got = attention_cpu.attention(batch.q, batch.k_cache, None, batch.ragged, **facts)
    want = attention.reference(batch.q, batch.k_cache, None, batch.ragged, **facts)
    assert got.shape == (27, 8, 64)
    torch.testing.assert_close(got.float(), want.float(), atol=TOLERANCE[dtype], rtol=0)


def test_a_long_context(paged: Callable[..., Any]) -> None:
    """100,000 tokens behind one row, and a chunk of rows beside it."""
    batch = paged([(100_000, 1), (64, 64)], 128, 4, 2, 64)
    got = attention(batch.q, batch.k_cache, batch.v_cache, batch.ragged, scale=0.125)
    want = attention.reference(batch.q, batch.k_cache, batch.v_cache, batch.ragged, scale=0.125)
    torch.testing.assert_close(got, want, atol=1e-5, rtol=0)
