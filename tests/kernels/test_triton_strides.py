"""What lies apart in memory: each Triton kernel reads columns of wider tensors as it reads tensors of their own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from kvasir.kernels import (
    attention_triton,
    bitmask_triton,
    blocks_triton,
    cache_triton,
    embedding_triton,
    lora_triton,
    moe_triton,
    norm_triton,
    rope_triton,
    sample_triton,
)
from kvasir.kernels.moe import Routing
from kvasir.kernels.ragged import Ragged

pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")


def column(dense: Tensor) -> Tensor:
    """The same numbers as a column of a tensor twice as wide, beside others."""
    return torch.stack((dense, dense.flip(0)), -1)[..., 0]


def ragged_columns(ragged: Ragged) -> Ragged:
    names = {"positions", "slots", "starts", "lengths"}
    return replace(ragged, **{f.name: column(getattr(ragged, f.name)) for f in fields(Ragged) if f.name in names})


@pytest.fixture
def numbers(device: torch.device) -> Callable[..., Tensor]:
    torch.manual_seed(0)
    return lambda *shape: torch.rand(*shape, device=device) + 0.1


def test_blocks(device: torch.device) -> None:
    chunks = torch.randint(0, 100, (3, 9, 64), dtype=torch.uint8, device=device)
    index, other = torch.tensor([4, 0, 8], device=device), torch.tensor([1, 2, 3], device=device)
    held = blocks_triton.gather_blocks(chunks, column(index))
    assert torch.equal(held, chunks[:, index].transpose(0, 1))
    blocks_triton.scatter_blocks(chunks, column(other), held)
    assert torch.equal(chunks[:, other].transpose(0, 1), held)
    before = chunks.clone()
    blocks_triton.copy_blocks(chunks, *torch.stack((index, other), 1).unbind(1))  # as pairs come
    assert torch.equal(chunks[:, other], before[:, index])


def test_rows(device: torch.device, numbers: Callable[..., Tensor]) -> None:
    tokens, table = torch.tensor([3, 0, 2], device=device), numbers(4, 20)
    assert torch.equal(embedding_triton.embed(column(tokens), column(table)), table[tokens])
    x, weight, squares = numbers(3, 20), numbers(20), numbers(3, 2)
    for one in squares.split(1, 1):
        got = norm_triton.rms_norm(x, weight, 1e-5, 0.0, one)
        assert torch.equal(got, norm_triton.rms_norm(x, weight, 1e-5, 0.0, one.clone()))


def test_turning_and_writing(paged: Callable[..., Any], device: torch.device) -> None:
    batch = paged([(37, 3), (5, 1)], 16, 2, 2, 16).to(device)
    q, k, v = torch.randn(3, 4, 2, 16, device=device)
    angles = torch.randn(4, 1, 16, device=device), torch.randn(4, 1, 16, device=device)
    caches = [(batch.k_cache.clone(), batch.v_cache.clone()) for _ in range(2)]
    want = cache_triton.turn_and_write(q, k, v, angles, *caches[0], batch.ragged, interleaved=False)
    cos, sin = map(column, angles)
    apart = map(column, (q, k, v))
    got = cache_triton.turn_and_write(*apart, (cos, sin), *caches[1], ragged_columns(batch.ragged), interleaved=False)
    assert torch.equal(got, want)
    for ours, theirs in zip(*caches, strict=True):
        torch.testing.assert_close(ours, theirs, atol=0, rtol=0, equal_nan=True)
    assert torch.equal(rope_triton.rotate(q, (cos, sin)), rope_triton.rotate(q, angles))


def test_attention(paged: Callable[..., Any], device: torch.device) -> None:
    batch = paged([(70, 1), (20, 12)], 16, 4, 2, 16).to(device)
    facts = {"sinks": torch.randn(4, device=device), "slopes": torch.rand(4, device=device)}
    want = attention_triton.attention(batch.q, batch.k_cache, batch.v_cache, batch.ragged, scale=0.2, **facts)
    ragged = ragged_columns(batch.ragged)
    ragged = replace(ragged, table=column(ragged.table))
    apart = {name: column(fact) for name, fact in facts.items()}
    got = attention_triton.attention(batch.q, batch.k_cache, batch.v_cache, ragged, scale=0.2, **apart)
    assert torch.equal(got, want)


def test_sampling(device: torch.device, numbers: Callable[..., Tensor]) -> None:
    logits, uniforms, temperature = numbers(4, 300) * 9, numbers(4).double() * 0.9, numbers(4)
    whole = torch.tensor([3, 40, 200, 7], device=device)
    facts = {"min_p": numbers(4) / 9, "top_k": whole, "top_p": numbers(4) * 0.9}
    want = sample_triton.draw(logits, uniforms, temperature, **facts)
    apart = {name: column(fact) for name, fact in facts.items()}
    assert torch.equal(sample_triton.draw(logits, column(uniforms), column(temperature), **apart), want)
    for got, dense in zip(
        sample_triton.score(logits, column(whole), 2), sample_triton.score(logits, whole, 2), strict=True
    ):
        assert torch.equal(got, dense)
    counts = torch.randint(0, 3, (4, 300), dtype=torch.int32, device=device)
    rules = {"repetition": numbers(4), "presence": numbers(4), "frequency": numbers(4)}
    want = sample_triton.penalise(logits, counts, counts > 1, **rules)
    rules = {name: column(rule) for name, rule in rules.items()}
    assert torch.equal(sample_triton.penalise(logits, column(counts), column(counts > 1), **rules), want)
    rows, words = torch.tensor([2, 0], device=device), torch.arange(20, dtype=torch.int32, device=device).view(2, 10)
    want = bitmask_triton.allow(logits, rows, words)
    assert torch.equal(bitmask_triton.allow(logits, column(rows), column(words)), want)


def test_experts_and_adapters(device: torch.device, numbers: Callable[..., Tensor]) -> None:
    logits, bias = numbers(9, 6), numbers(6)
    index, weight = moe_triton.route(logits, Routing(2, "sigmoid"), bias)
    got = moe_triton.route(column(logits), Routing(2, "sigmoid"), column(bias))
    assert torch.equal(got[0], index)
    assert torch.equal(got[1], weight)
    x, up, down = numbers(9, 40), numbers(6, 96, 40), numbers(6, 40, 48)
    facts = {"up_bias": numbers(6, 96), "down_bias": numbers(6, 40)}
    want = moe_triton.stacked_experts(x, index, weight, up, down, activation="silu", **facts)
    apart = {name: column(fact) for name, fact in facts.items()}
    got = moe_triton.stacked_experts(x, column(index), column(weight), up, down, activation="silu", **apart)
    assert torch.equal(got, want)
    which, scales = torch.tensor([1, -1, 0], device=device), numbers(2)
    h = lora_triton.shrink(x[:3], numbers(2, 8, 40), column(which))
    ours, theirs = torch.zeros(2, 3, 50, device=device)
    matrices = numbers(2, 50, 8)
    lora_triton.expand(h, matrices, which, scales, theirs)
    lora_triton.expand(h, matrices, column(which), column(scales), ours)
    assert torch.equal(ours, theirs)
