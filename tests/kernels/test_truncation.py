"""Against transformers' own filters, and against loops written after the papers."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from kvasir.kernels.truncation import mirostat, nucleus, surprises, tail_free, truncated, typical

VOCAB = 300


def sorted_logits(rows: int = 60, vocab: int = VOCAB, seed: int = 0) -> torch.Tensor:
    """Descending, of many temperatures; some rows have candidates that are dropped already."""
    scales = torch.linspace(0.2, 8, rows)[:, None]
    x = torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * scales
    values = x.sort(dim=-1, descending=True).values
    values[::5, vocab // 3 :] = -torch.inf
    values[7, 1:] = -torch.inf
    values[8, 2:] = -torch.inf
    return values


def full(rows: int, value: float) -> torch.Tensor:
    return torch.full((rows,), value, dtype=torch.float64)


def kept(values: torch.Tensor) -> list[list[int]]:
    return [row.isfinite().nonzero()[:, 0].tolist() for row in values]


@pytest.mark.parametrize("mass", [0.05, 0.2, 0.5, 0.9, 0.95, 0.999])
def test_typical_equals_transformers(mass: float) -> None:
    transformers = pytest.importorskip("transformers")
    values = sorted_logits()
    expected = transformers.TypicalLogitsWarper(mass=mass)(None, values.clone())
    assert kept(typical(values, full(len(values), mass))) == kept(expected)


@pytest.mark.parametrize("mass", [0.05, 0.5, 0.95])
def test_nucleus_equals_transformers(mass: float) -> None:
    transformers = pytest.importorskip("transformers")
    values = sorted_logits()
    expected = transformers.TopPLogitsWarper(top_p=mass)(None, values.clone())
    assert kept(nucleus(values, full(len(values), mass))) == kept(expected)


def naive_tail_free(logits: np.ndarray, z: float) -> list[int]:
    """One row, as llama.cpp had it."""
    x = [float(v) for v in logits if v > -math.inf]
    p = np.exp(np.array(x) - max(x))
    p /= p.sum()
    if z >= 1 or len(p) <= 2:
        return list(range(len(p)))
    first = [p[i] - p[i + 1] for i in range(len(p) - 1)]
    second = [abs(first[i] - first[i + 1]) for i in range(len(first) - 1)]
    total = sum(second)
    second = [s / total for s in second] if total > 1e-6 else [1 / len(second)] * len(second)
    running = 0.0
    for i, share in enumerate(second):
        running += share
        if running > z and i >= 1:
            return list(range(i))
    return list(range(len(p)))


@pytest.mark.parametrize("z", [0.01, 0.3, 0.7, 0.95, 0.99, 1.0])
def test_tail_free_equals_a_loop(z: float) -> None:
    values = sorted_logits()
    got = kept(tail_free(values, full(len(values), z if z < 1 else 2.0)))
    assert got == [naive_tail_free(row.double().numpy(), z) for row in values]
    flat = torch.zeros(1, 20)
    assert kept(tail_free(flat, full(1, 0.5))) == [naive_tail_free(flat[0].numpy(), 0.5)]


def naive_mirostat(logits: np.ndarray, most: float, version: int, vocab: int) -> list[int]:
    """One row after Basu et al. 2021, algorithms 1 and 2."""
    x = np.array([v for v in logits if v > -math.inf], np.float64)
    p = np.exp(x - x.max())
    p /= p.sum()
    if version == 2:
        return [i for i in range(len(p)) if i == 0 or -math.log2(p[i]) <= most]
    pairs = range(min(100, len(p)) - 1)
    t = [math.log((i + 2) / (i + 1)) for i in pairs]
    b = [math.log(p[i] / p[i + 1]) for i in pairs]
    s = sum(u * v for u, v in zip(t, b, strict=True)) / sum(u * u for u in t) if t else 1e-3
    s = max(s, 1e-3)
    e = s - 1
    k = ((e * 2**most) / (1 - vocab ** (-e))) ** (1 / s) if s > 0.02 else math.inf
    count = len(p) if k > len(p) else max(1, round(k))
    return list(range(count))


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("most", [0.5, 3.0, 6.0, 10.0])
def test_mirostat_equals_a_loop(version: int, most: float) -> None:
    values = sorted_logits()
    rows = len(values)
    got = kept(mirostat(values, full(rows, most), torch.full((rows,), version), 32000))
    expected = [naive_mirostat(row.double().numpy(), most, version, 32000) for row in values]
    assert got == expected
    assert min(map(len, got)) >= 1


@pytest.mark.parametrize("version", [1, 2])
def test_what_was_dropped_before_mirostat_changes_nothing(version: int) -> None:
    """Typical sampling drops the likeliest tokens, too."""
    values = sorted_logits()[:, :40]
    rows, number = len(values), torch.full((len(values),), version)
    gaps = torch.full((rows, 100), -torch.inf)
    places = torch.arange(1, 81, 2)
    gaps[:, places] = values
    for most in (0.5, 3.0, 6.0):
        expected = mirostat(values, full(rows, most), number, 32000)
        assert mirostat(gaps, full(rows, most), number, 32000)[:, places].equal(expected)


def test_zipf_of_exponent_one_has_its_limit() -> None:
    """s = 1 divides zero by zero: k is 2^most / ln V."""
    values = -(torch.arange(200).double() + 1).log()[None]
    assert len(kept(mirostat(values, full(1, 7.0), torch.tensor([1]), 1000))[0]) == round(2**7 / math.log(1000))


def test_neutral_values_drop_nothing_and_rows_keep_to_themselves() -> None:
    values = sorted_logits()
    rows = len(values)
    two, none = full(rows, 2.0), torch.zeros(rows, dtype=torch.int64)
    for same in (tail_free(values, two), typical(values, two), nucleus(values, two)):
        assert same.equal(values)
    assert mirostat(values, full(rows, 0.0), none, VOCAB).equal(values)
    mixed = torch.where(torch.arange(rows) % 2 == 0, 0.3, 2.0).double()
    for op in (tail_free, typical, nucleus):
        assert op(values, mixed)[1::2].equal(values[1::2])
        assert op(values, mixed)[::2].equal(op(values[::2], mixed[::2]))


def test_filters_follow_each_other() -> None:
    x = sorted_logits(20)[:, torch.randperm(VOCAB, generator=torch.Generator().manual_seed(1))]
    rows = len(x)
    top_k, shares = torch.full((rows,), 50), {"tfs_z": 0.95, "typical_p": 0.9, "top_p": 0.8}
    most, version = full(rows, 4.0), torch.full((rows,), 2)
    tensors = {name: full(rows, value) for name, value in shares.items()}
    values, ids, bits = truncated(x, top_k=top_k, most=most, version=version, **tensors)
    assert x.gather(-1, ids)[values.isfinite()].equal(values[values.isfinite()])
    expected = x.gather(-1, ids)
    expected[:, 50:] = -torch.inf
    for op, name in ((tail_free, "tfs_z"), (typical, "typical_p"), (nucleus, "top_p")):
        expected = op(expected, tensors[name])
    assert bits.equal(surprises(expected))
    assert values.equal(mirostat(expected, most, version, VOCAB))
    assert 1 <= min(map(len, kept(values))) < max(map(len, kept(values)))


@pytest.mark.parametrize("left_out", ["tfs_z", "typical_p", "top_p", "most"])
def test_what_no_row_asks_for_is_left_out(left_out: str) -> None:
    x = sorted_logits(20)[:, torch.randperm(VOCAB, generator=torch.Generator().manual_seed(1))]
    rows = len(x)
    neutral = {name: full(rows, 2.0) for name in ("tfs_z", "typical_p", "top_p")}
    neutral |= {"most": full(rows, 4.0), "version": torch.zeros(rows, dtype=torch.int64)}
    asked = {**neutral, **{name: full(rows, 0.8) for name in ("tfs_z", "typical_p", "top_p") if name != left_out}}
    less = {name: value for name, value in asked.items() if name not in (left_out, "version" * (left_out == "most"))}
    top_k = torch.full((rows,), 50)
    (values, ids, _), (want, wanted, _) = truncated(x, top_k=top_k, **less), truncated(x, top_k=top_k, **asked)
    assert values.equal(want)
    assert ids.equal(wanted)
