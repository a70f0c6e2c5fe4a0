"""What Triton does row by row: equal to the definitions, over shapes, types and strides."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from kvasir.kernels import (
    activation_triton,
    blocks_triton,
    cache_triton,
    embedding_triton,
    norm_triton,
    rope_triton,
)
from kvasir.kernels.activation import gated, plain
from kvasir.kernels.blocks import copy_blocks, gather_blocks, scatter_blocks
from kvasir.kernels.cache import turn_and_write, write
from kvasir.kernels.embedding import embed
from kvasir.kernels.norm import add_layer_norm, add_rms_norm, layer_norm, rms_norm, sum_of_squares
from kvasir.kernels.quantise import LARGEST, Quantised
from kvasir.kernels.rope import rotate

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def close(got: torch.Tensor, want: torch.Tensor, tolerance: dict[torch.dtype, float]) -> None:
    assert (got.shape, got.dtype) == (want.shape, want.dtype)
    size = tolerance[want.dtype]  # of values up to 4; larger ones are rounded more coarsely
    torch.testing.assert_close(got.cpu().float(), want.cpu().float(), atol=size, rtol=size / 2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "width"), [(0, 64), (1, 1), (37, 96), (2, 4096)])
def test_sums_of_squares(rows: int, width: int, dtype: torch.dtype, device: torch.device) -> None:
    """Of a part of wider rows, and of rows that lie side by side."""
    x = torch.randn(rows, width + 3, device=device).to(dtype)[:, 2:-1]
    for each in (x, x.T.contiguous().T):
        found, wanted = norm_triton.sum_of_squares(each), sum_of_squares.reference(each)
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(0, 64), (1, 1), (3, 96), (2, 4096), (5, 3, 64)])
def test_norms(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
    x = torch.randn(shape, device=device).to(dtype)
    weight, bias = (torch.randn(shape[-1], device=device).to(dtype) for _ in range(2))
    for offset in (0.0, 1.0):
        close(
            norm_triton.rms_norm(x, weight, 1e-5, offset),
            rms_norm.reference(x, weight, 1e-5, offset),
            norm_triton.TOLERANCE,
        )
    close(norm_triton.rms_norm(x, None, 1e-5), rms_norm.reference(x, None, 1e-5), norm_triton.TOLERANCE)
    close(
        norm_triton.layer_norm(x, weight, bias, 1e-5),
        layer_norm.reference(x, weight, bias, 1e-5),
        norm_triton.TOLERANCE,
    )
    if len(shape) == 2:
        y = torch.randn(shape, device=device).to(dtype)
        for scale in (1.0, 0.3):
            got = norm_triton.add_rms_norm(x, y, weight, 1e-5, 0.0, scale)
            for a, b in zip(got, add_rms_norm.reference(x, y, weight, 1e-5, 0.0, scale), strict=True):
                close(a, b, norm_triton.TOLERANCE)
            got = norm_triton.add_layer_norm(x, y, weight, bias, 1e-5, scale)
            for a, b in zip(got, add_layer_norm.reference(x, y, weight, bias, 1e-5, scale), strict=True):
                close(a, b, norm_triton.TOLERANCE)


@pytest.mark.parametrize("dtype", DTYPES)
def test_norms_of_parts_of_rows(dtype: torch.dtype, device: torch.device) -> None:
    """Heads that lie inside wider rows, a weight for each head, and rows whose mean square is known."""
    x = torch.randn(5, 7, 64, device=device).to(dtype)[:, 2:5]
    weight = torch.randn(3, 64, device=device).to(dtype)
    close(norm_triton.rms_norm(x, weight, 1e-5), rms_norm.reference(x, weight, 1e-5), norm_triton.TOLERANCE)
    close(
        norm_triton.layer_norm(x, weight, None, 1e-5),
        layer_norm.reference(x, weight, None, 1e-5),
        norm_triton.TOLERANCE,
    )
    flat, squares = x.reshape(5, -1), torch.rand(5, 1, device=device) + 0.5
    weight = weight.flatten()
    close(
        norm_triton.rms_norm(flat, weight, 1e-5, 0.0, squares),
        rms_norm.reference(flat, weight, 1e-5, 0.0, squares),
        norm_triton.TOLERANCE,
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_activations(dtype: torch.dtype, device: torch.device) -> None:
    x = torch.randn(3, 2 * 1100, device=device).to(dtype) * 2
    for name in activation_triton.KINDS:
        for limit in (None, 1.5) if name == "clamped" else (None,):
            close(activation_triton.gated(x, name, limit), gated.reference(x, name, limit), activation_triton.TOLERANCE)
        if name != "clamped":
            close(activation_triton.plain(x, name), plain.reference(x, name), activation_triton.TOLERANCE)
    assert activation_triton.gated(x[:0], "silu").shape == (0, 1100)


@pytest.mark.parametrize("seed", range(8))
def test_turning_and_writing(seed: int, paged: Callable[..., Any], device: torch.device) -> None:
    """Whole heads or a part of them turn, in halves or as neighbours; what lies in other slots stays (NaN)."""
    rng = random.Random(seed)
    torch.manual_seed(seed)
    dtype, dim, block = rng.choice(DTYPES), rng.choice([64, 80, 128, 256]), rng.choice([1, 16, 128])
    heads, kv_heads = rng.choice([(4, 4), (6, 2), (9, 3)])
    batch = paged([(37, 3), (5, 1), (9, 0)], block, heads, kv_heads, dim, dtype, seed).to(device)
    qkv = torch.randn(4, heads + 2 * kv_heads, dim, device=device).to(dtype)
    q, k, v = qkv.split_with_sizes([heads, kv_heads, kv_heads], 1)
    turned = rng.choice([dim, dim // 2])
    angles = tuple(torch.randn(4, 1, turned, device=device).to(dtype) for _ in range(2))
    interleaved = rng.random() < 0.5
    caches = [(batch.k_cache.clone(), batch.v_cache.clone()) for _ in range(2)]
    got = cache_triton.turn_and_write(q, k, v, angles, *caches[0], batch.ragged, interleaved=interleaved)
    want = turn_and_write.reference(q.clone(), k, v, angles, *caches[1], batch.ragged, interleaved=interleaved)
    close(got, want, cache_triton.TOLERANCE)
    for ours, theirs in zip(*caches, strict=True):
        size = cache_triton.TOLERANCE[dtype]
        torch.testing.assert_close(ours, theirs, atol=size, rtol=size / 2, equal_nan=True)
    close(
        rope_triton.rotate(q, angles, interleaved=interleaved),
        rotate.reference(q, angles, interleaved=interleaved),
        cache_triton.TOLERANCE,
    )


@pytest.mark.parametrize("kind", LARGEST, ids=str)
@pytest.mark.parametrize("dim", [64, 80])
def test_writing_in_8_bits(
    kind: torch.dtype, dim: int, paged: Callable[..., Any], kept: Callable[..., Any], device: torch.device
) -> None:
    """Rows of any size, bit for bit: rounding is to the nearest even, as torch's; zeros have the scale 0."""
    batch = paged([(37, 8), (5, 1)], 5, 6, 3, dim)
    k, v = torch.randn(2, 9, 3, dim) * torch.tensor([1e-30, 1e-3, 1.0, 300.0, 1e30]).repeat(2)[:9, None, None]
    k[7] = 0
    expected = kept(batch, kind)
    ours = [Quantised(*(t.clone().to(device) for t in cache)) for cache in expected]
    write.reference(k, v, *expected, batch.ragged)
    cache_triton.write(k.to(device), v.to(device), *ours, batch.to(device).ragged)
    for got, want in zip(ours, expected, strict=True):
        assert torch.equal(got.values.view(torch.uint8).cpu(), want.values.view(torch.uint8))
        assert torch.equal(got.scales.cpu().nan_to_num(), want.scales.nan_to_num())


def test_writing_alone(paged: Callable[..., Any], device: torch.device) -> None:
    batch = paged([(37, 3), (5, 1)], 4, 2, 2, 24).to(device)
    k, v = torch.randn(2, 4, 2, 24, device=device)
    for values in (v, None):
        caches = [(batch.k_cache.clone(), batch.v_cache.clone()) for _ in range(2)]
        cache_triton.write(k, values, *caches[0], batch.ragged)
        write.reference(k, values, *caches[1], batch.ragged)
        for ours, theirs in zip(*caches, strict=True):
            torch.testing.assert_close(ours, theirs, atol=0, rtol=0, equal_nan=True)


@pytest.mark.parametrize("first", [0, 30])
def test_embedding(first: int, device: torch.device) -> None:
    table, tokens = torch.randn(40, 100, device=device), torch.tensor([30, 0, 39, 69, 70, 31], device=device)
    assert torch.equal(
        embedding_triton.embed(tokens, table, first, False), embed.reference(tokens, table, first, False)
    )
    own = tokens[:3]
    assert torch.equal(embedding_triton.embed(own, table), embed.reference(own, table))


@pytest.mark.parametrize(("dtype", "width"), [(torch.bfloat16, 1200), (torch.uint8, 7), (torch.float32, 33)])
def test_blocks(dtype: torch.dtype, width: int, device: torch.device) -> None:
    """Out, back in, and copied when targets are sources as well."""
    chunks = torch.randint(0, 100, (3, 9, width), device=device).to(dtype)
    index = torch.tensor([4, 0, 8], device=device)
    held = blocks_triton.gather_blocks(chunks, index)
    assert torch.equal(held, gather_blocks.reference(chunks, index))
    ours, theirs = chunks.clone(), chunks.clone()
    other = torch.tensor([1, 2, 3], device=device)
    blocks_triton.scatter_blocks(ours, other, held)
    scatter_blocks.reference(theirs, other, held)
    assert torch.equal(ours, theirs)
    sources, targets = torch.tensor([0, 1, 2], device=device), torch.tensor([1, 2, 5], device=device)
    blocks_triton.copy_blocks(ours, sources, targets)
    copy_blocks.reference(theirs, sources, targets)
    assert torch.equal(ours, theirs)
