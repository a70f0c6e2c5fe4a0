"""Attention by Triton: equal to its definition, and with `deterministic` bit for bit the same in any batch and any chunks.

Without a GPU the bodies run in Triton's interpreter, so shapes are small, and keys are cut into parts early.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("triton")

from interpreted import row_by_row
from triton.backends.compiler import GPUTarget

from kvasir.kernels import attention_triton, quantise_triton
from kvasir.kernels.attention import attention
from kvasir.kernels.attention_triton import TOLERANCE, tiles
from kvasir.kernels.quantise import LARGEST, Quantised
from kvasir.kernels.ragged import Ragged

# the interpreter computes with what rows that nobody asked for hold
pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")


@pytest.fixture(autouse=True)
def _small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_triton, "SPAN", 64)


def compare(batch: Any, device: torch.device, *, latent: bool = False, **facts: Any) -> None:
    """Triton against the definition, which runs on the CPU."""
    given = batch.to(device)
    here = {name: fact.to(device) if isinstance(fact, torch.Tensor) else fact for name, fact in facts.items()}
    v, v_here = (None, None) if latent else (batch.v_cache, given.v_cache)
    got = attention_triton.attention(given.q, given.k_cache, v_here, given.ragged, **here)
    facts.pop("deterministic", None)
    want = attention.reference(batch.q, batch.k_cache, v, batch.ragged, **facts)
    assert got.dtype == want.dtype
    torch.testing.assert_close(got.cpu().float(), want.float(), atol=TOLERANCE[want.dtype], rtol=0)


@pytest.mark.parametrize("seed", range(12))
def test_equals_its_definition(seed: int, paged: Callable[..., Any], device: torch.device) -> None:
    """Any mix of chunks and single rows, heads, sizes, types and what may shape attention."""
    rng = random.Random(seed)
    torch.manual_seed(seed)
    parts = []
    for _ in range(rng.choice([1, 2, 3])):
        length = rng.choice([1, 15, 16, 17, rng.randint(1, 90), rng.randint(60, 150)])
        parts.append((length, rng.choice([0, 1, 1, min(length, 5), rng.randint(1, min(40, length))])))
    if not any(rows for _, rows in parts):
        parts = [(40, 2)]
    dtype, dim = rng.choice(list(TOLERANCE)), rng.choice([64, 64, 72, 96, 128])
    kv_heads, group = rng.choice([(1, 4), (2, 1), (2, 3), (1, 20)])
    heads = kv_heads * group
    batch = paged(parts, rng.choice([1, 16, 16, 32, 128]), heads, kv_heads, dim, dtype, seed)
    facts: dict[str, Any] = {"scale": 0.2, "causal": rng.random() < 0.7, "deterministic": rng.random() < 0.5}
    facts["window"] = rng.choice([None, None, 1, 7, 64])
    facts["softcap"] = rng.choice([None, None, 3.0])
    facts["chunk"] = rng.choice([None, None, 5, 32])
    if rng.random() < 0.3:
        facts["sinks"] = torch.randn(heads, dtype=dtype)
    if rng.random() < 0.3:
        facts["slopes"] = torch.rand(heads) * 0.3
    if rng.random() < 0.2:
        facts |= {"sparse": (8, 2, 3, 1, 4), "causal": True}
    compare(batch, device, **facts)


@pytest.mark.parametrize("kind", [*LARGEST, torch.float32], ids=str)
@pytest.mark.parametrize("latent", [False, True])
def test_caches_of_another_type(
    kind: torch.dtype, latent: bool, paged: Callable[..., Any], kept: Callable[..., Any], device: torch.device
) -> None:
    """In 8 bits with scales, or wider than the queries; slots that nobody wrote hold NaN."""
    batch = paged([(70, 1), (20, 12)], 16, 4, 1 if latent else 2, 72, torch.bfloat16)
    caches = kept(batch, kind)
    facts: dict[str, Any] = {"scale": 0.2, "value_dim": 64 if latent else None}
    k, v = (Quantised(*(t.to(device) for t in c)) if isinstance(c, Quantised) else c.to(device) for c in caches)
    given = batch.to(device)
    got = attention_triton.attention(given.q, k, None if latent else v, given.ragged, **facts)
    want = attention.reference(batch.q, caches[0], None if latent else caches[1], batch.ragged, **facts)
    torch.testing.assert_close(got.cpu().float(), want.float(), atol=2 * TOLERANCE[torch.bfloat16], rtol=0)


@pytest.mark.parametrize("dim", [64, 128, 256])
def test_head_dims(dim: int, paged: Callable[..., Any], device: torch.device) -> None:
    compare(paged([(70, 1), (20, 20)], 16, 4, 2, dim, torch.bfloat16), device, scale=dim**-0.5)


def test_queries_that_lie_apart(paged: Callable[..., Any], device: torch.device) -> None:
    batch = paged([(70, 1), (20, 12)], 16, 4, 2, 64)
    q = torch.full((13, 6, 128), torch.nan)[:, 1:-1, :64].copy_(batch.q)
    compare(replace(batch, q=q), device, scale=0.2)


@pytest.mark.parametrize("deterministic", [False, True])
def test_values_inside_the_keys(deterministic: bool, paged: Callable[..., Any], device: torch.device) -> None:
    """Latent attention: one wide key head, whose first numbers are the values."""
    batch = paged([(70, 1), (33, 9)], 16, 20, 1, 72, torch.bfloat16)
    compare(batch, device, latent=True, scale=0.1, value_dim=64, deterministic=deterministic)


def test_a_long_context(paged: Callable[..., Any], device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys in the most parts that there are, which have grown."""
    monkeypatch.setattr(attention_triton, "MOST_PARTS", 4)
    batch = paged([(1100, 1), (64, 1)], 128, 2, 1, 64, torch.bfloat16)
    compare(batch, device, scale=0.125)


@pytest.mark.slow
def test_a_hundred_thousand_tokens(
    paged: Callable[..., Any], device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In float32: such means are small, and a part that is missing shows. What interpreting takes goes by the number of tiles."""
    monkeypatch.setattr(attention_triton, "SPAN", 512 if device.type == "cuda" else 2048)
    if device.type == "cpu":
        few = attention_triton._all(attention_triton.Tiles(lines=16, keys=2048, warps=4, stages=1))
        monkeypatch.setattr(attention_triton, "tiles", lambda *_, **__: few)
    compare(paged([(100_000, 1)], 16, 1, 1, 64, torch.float32), device, scale=0.125)


@pytest.mark.parametrize("dim", [64, 256])
@pytest.mark.parametrize("itemsize", [2, 4])
def test_tiles_are_a_gpus_own(dim: int, itemsize: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """AMD's compute units and NVIDIA's before and after Hopper have others; each kind of heads has some in every table."""
    nvidia = [GPUTarget("cuda", arch, 32) for arch in (80, 90, 100)]
    targets = *nvidia, GPUTarget("hip", "gfx942", 64), None
    found = []
    for target in targets:
        monkeypatch.setattr(attention_triton, "target", lambda target=target: target)
        found.append([tiles(dim, itemsize, size, latent=latent) for size in (1, 4) for latent in (False, True)])
    ampere, hopper, blackwell, cdna, interpreted = found
    assert hopper == interpreted
    assert cdna != hopper
    assert (ampere == hopper) is (itemsize == 4)
    assert (blackwell == hopper) is (itemsize == 4 or dim == 256)


def test_who_converts_float8(monkeypatch: pytest.MonkeyPatch) -> None:
    for target, expected in (
        (GPUTarget("cuda", 80, 32), False),
        (GPUTarget("cuda", 89, 32), True),
        (GPUTarget("hip", "gfx942", 64), False),
        (None, False),
    ):
        monkeypatch.setattr(quantise_triton, "target", lambda target=target: target)
        assert quantise_triton.converts_float8() is expected


@pytest.mark.parametrize("longest", [257, 513, 770])
def test_a_shorter_sequence_may_have_more_parts(
    longest: int, paged: Callable[..., Any], device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 257 keys there are three parts of 128, of 256 four of 64."""
    monkeypatch.setattr(attention_triton, "MOST_PARTS", 4)
    parts = [(length, 1) for length in (longest, 1, 64, 65, 191, 192, 193, 255, 256)]
    compare(paged(parts, 16, 2, 1, 64), device, scale=0.2)


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("parts", [0, 1, 3, 5])
def test_parts_keep_to_their_room(
    parts: int, deterministic: bool, paged: Callable[..., Any], device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With room for fewer parts than the keys have, parts grow; where they may not, none are put aside."""
    batch, aside = paged([(300, 1), (70, 1)], 16, 4, 2, 64), []
    room = 4 * 2 * 4 * (64 + 2)
    monkeypatch.setattr(attention_triton, "MOST_WORK_BYTES", parts * room)
    launch = attention_triton._Call._launch

    def watched(self: Any, *args: Any) -> None:
        aside.append(sum(t.nbytes for t in args[7:]))
        launch(self, *args)

    monkeypatch.setattr(attention_triton._Call, "_launch", watched)
    compare(batch, device, scale=0.2, deterministic=deterministic)
    assert aside == [parts * room if parts == 5 or (parts == 3 and not deterministic) else 0]


def rows_of(ragged: Ragged, s: int, start: int, stop: int) -> tuple[slice, Ragged]:
    """Rows start..stop of sequence s as a batch of their own: (where they are, the batch)."""
    first, last = ragged.host_starts[s : s + 2].tolist()
    length = int(ragged.host_lengths[s]) - (last - first) + stop
    at = slice(first + start, first + stop)
    starts, lengths = np.array([0, stop - start], np.int32), np.array([length], np.int32)
    device = ragged.table.device
    sent = torch.from_numpy(starts).to(device), torch.from_numpy(lengths).to(device)
    return at, Ragged(ragged.positions[at], ragged.slots[at], *sent, ragged.table[s : s + 1], starts, lengths)


@pytest.mark.parametrize("seed", range(4))
def test_a_row_is_the_same_in_any_batch(
    seed: int, paged: Callable[..., Any], device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit: alone as in a decoding step, among others, in a chunk of any size; one row in 12 is tried alone."""
    row_by_row(monkeypatch)
    rng = random.Random(seed)
    others = [(rng.randint(100, 200), 1), (3, 3), (rng.randint(70, 90), 12)]
    parts = [(rng.randint(140, 150), 25), rng.choice(others)]
    dtype = torch.float32 if seed < 3 else torch.bfloat16  # bfloat16 rounds small differences away
    batch = paged(parts, 16, 3, 1, 64, dtype, seed).to(device)
    facts: dict[str, Any] = {"scale": 0.2, "deterministic": True, "window": rng.choice([None, 50])}
    facts["softcap"] = rng.choice([None, 3.0])
    if rng.random() < 0.5:
        facts["sinks"] = torch.randn(3, device=device)
    together = attention_triton.attention(batch.q, batch.k_cache, batch.v_cache, batch.ragged, **facts)
    for s, count in enumerate(np.diff(batch.ragged.host_starts).tolist()):
        cut = rng.randint(0, count)
        pieces = [(0, cut), (cut, count), *((row, row + 1) for row in range(seed, count, 12))]
        for start, stop in pieces:
            if start < stop:
                at, alone = rows_of(batch.ragged, s, start, stop)
                found = attention_triton.attention(batch.q[at], batch.k_cache, batch.v_cache, alone, **facts)
                assert torch.equal(found, together[at]), (s, start, stop)
