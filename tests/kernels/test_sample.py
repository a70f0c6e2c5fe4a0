"""Against references written for reading in float64 numpy."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from kvasir.kernels import native, sample_cpu, sample_native
from kvasir.kernels.sample import draw, greedy, penalise, score, uniform

ROWS = 200
needs_compiler = pytest.mark.skipif(native.library() is None, reason=f"no compiled kernels: {native.native().text}")
compiled = pytest.param("native", marks=needs_compiler)
DRAWS: dict[str, Any] = {"reference": draw.reference, "cpu": sample_cpu.draw, "native": sample_native.draw}


def logits_of(rows: int, vocab: int, seed: int = 0, scale: float = 3.0) -> torch.Tensor:
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * scale


def naive_distribution(
    logits: np.ndarray, temperature: float, min_p: float = 0.0, top_k: int = 0, top_p: float = 1.0
) -> np.ndarray:
    """What one row is drawn from, float64."""
    p = np.exp((logits - logits.max()) / temperature)
    p /= p.sum()
    p[p < min_p * p.max()] = 0
    if top_k:
        p[np.argsort(-p)[top_k:]] = 0
    p /= p.sum()
    if top_p < 1:
        order = np.argsort(-p)
        count = int(np.searchsorted(np.cumsum(p[order]), top_p)) + 1
        p[order[count:]] = 0
    return p / p.sum()


def naive_draw(p: np.ndarray, u: float) -> int:
    return int(np.searchsorted(np.cumsum(p), u * p.sum(), side="right"))


CASES: list[dict[str, Any]] = [
    {},
    {"min_p": 0.1},
    {"top_k": 1},
    {"top_k": 7},
    {"top_p": 0.3},
    {"top_p": 0.95},
    {"top_p": 0.999},
    {"top_k": 20, "top_p": 0.8},
    {"top_k": 50, "top_p": 0.9, "min_p": 0.05},
]


@pytest.mark.parametrize("name", ["reference", "cpu", compiled])
@pytest.mark.parametrize("vocab", [7, 300, 1000])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_draws_equal_a_naive_reference(name: str, vocab: int, case: dict[str, Any]) -> None:
    implementation, case = DRAWS[name], case | ({"top_k": min(case["top_k"], vocab)} if "top_k" in case else {})
    logits = logits_of(ROWS, vocab)
    rng = np.random.default_rng(1)
    uniforms, temperature = rng.random(ROWS), rng.uniform(0.3, 2, ROWS)
    options: dict[str, Any] = {n: torch.full((ROWS,), float(v)) for n, v in case.items() if n != "top_k"}
    if "top_k" in case:
        options |= {"top_k": torch.full((ROWS,), case["top_k"]), "most": case["top_k"]}
    got = implementation(logits, torch.from_numpy(uniforms), torch.from_numpy(temperature).float(), **options)
    for row in range(ROWS):
        p = naive_distribution(logits[row].double().numpy(), float(np.float32(temperature[row])), **case)
        assert p[got[row]] > 0
        assert int(got[row]) == naive_draw(p, uniforms[row]) or near_a_border(p, uniforms[row])


def near_a_border(p: np.ndarray, u: float) -> bool:
    return bool(np.abs(np.cumsum(p) - u).min() < 1e-5)


def test_rows_with_different_parameters_in_one_call() -> None:
    logits = logits_of(3, 500)
    top_k, top_p = torch.tensor([1, 500, 3]), torch.tensor([2.0, 1e-6, 2.0])
    got = draw(logits, torch.full((3,), 0.5, dtype=torch.float64), torch.ones(3), top_k=top_k, top_p=top_p, most=500)
    assert got[:2].tolist() == logits[:2].argmax(-1).tolist()
    assert int(got[2]) in logits[2].topk(3).indices.tolist()


@pytest.mark.parametrize("name", ["reference", "cpu", compiled])
@pytest.mark.parametrize("u", [0.0, 0.5, 1 - 2**-53])
def test_draw_never_leaves_the_distribution(u: float, name: str) -> None:
    logits = torch.full((5, 1000), -torch.inf)
    logits[0, 0] = logits[1, 999] = logits[2, 500] = 0.0
    logits[3] = 0.0
    logits[4, :3] = 0.0  # three times float32's 1/3 is above 1
    filters = {"top_p": torch.full((5,), 0.9), "top_k": torch.full((5,), 900), "most": 900}
    for options in ({}, {"top_p": filters["top_p"]}, filters):
        got = DRAWS[name](logits, torch.full((5,), u, dtype=torch.float64), torch.ones(5), **options)
        assert got[:3].tolist() == [0, 999, 500]
        assert 0 <= int(got[3]) < 1000
        assert int(got[4]) in (0, 1, 2)


@pytest.mark.parametrize("temperature", [1e-5, 1e8])
def test_extreme_temperatures_and_logits_stay_finite(temperature: float) -> None:
    logits = torch.tensor([[1e30, 1e30 * (1 - 1e-6), -1e30, -torch.inf]])
    got = draw(logits, torch.tensor([0.3], dtype=torch.float64), torch.tensor([temperature]))
    assert int(got) == 0


@pytest.mark.parametrize("options", [{}, {"top_p": 0.9}, {"top_k": 3}], ids=str)
@pytest.mark.parametrize("number", [torch.nan, -torch.inf, torch.inf])
def test_broken_logits_give_a_token_in_range(number: float, options: dict[str, float]) -> None:
    logits, uniforms = torch.full((3, 70), number), torch.tensor([0.1, 0.9, 0.5], dtype=torch.float64)
    logits[2, 11:15] = 1.0
    filters: dict[str, Any] = {name: torch.full((3,), value) for name, value in options.items()}
    got = draw(logits, uniforms, torch.ones(3), **filters, most=int(options.get("top_k", 0)))
    assert all(0 <= int(token) < 70 for token in got)


@needs_compiler
@pytest.mark.parametrize("seed", range(40))
def test_compiled_draws_equal_their_definition(seed: int) -> None:
    """Flat and peaked distributions, with barred tokens and equals among them; some logits lie in wider rows."""
    rng = np.random.default_rng(seed)
    rows, vocab = int(rng.integers(1, 6)), int(rng.choice([1, 5, 16, 511, 512, 513, 3000, 40_000]))
    logits = logits_of(rows, vocab + 3, seed, float(rng.choice([0.1, 1, 3, 10])))[:, :vocab]
    if rng.random() < 0.3:
        logits = (logits * 2).round() / 2
    if rng.random() < 0.5:
        logits = logits.masked_fill(torch.from_numpy(rng.random((rows, vocab)) < 0.3), -torch.inf)
        logits[:, -1] = 1.0
    uniforms = torch.from_numpy(rng.random(rows))
    temperature = torch.from_numpy(rng.uniform(0.2, 2, rows)).float()
    options: dict[str, Any] = {}
    if rng.random() < 0.4:
        options["min_p"] = torch.from_numpy(rng.choice([0.0, 0.01, 0.2, 1.0], rows)).float()
    if rng.random() < 0.6:
        options["top_p"] = torch.from_numpy(rng.choice([1e-6, 0.3, 0.9, 0.999, 2.0], rows)).float()
    if rng.random() < 0.5:
        options["top_k"] = torch.from_numpy(np.minimum(rng.choice([1, 2, 40, 2000, 10**6], rows), vocab))
        options["most"] = int(options["top_k"].max())
    got = sample_native.draw(logits, uniforms, temperature, **options)
    assert torch.equal(got[-1:], sample_native.draw(*last(logits, uniforms, temperature), **lasts(options)))
    if options.keys() & {"top_k", "top_p"} and len(logits.unique()) < logits.numel() / 2:
        return  # of equals the definition keeps whichever its sort puts first
    sides = [
        uniforms,
        (uniforms - sample_native.NEAR).clamp(min=0),
        (uniforms + sample_native.NEAR).clamp(max=1 - 2**-53),
    ]
    allowed = [draw.reference(logits, u, temperature, **options) for u in sides]
    for row in range(rows):
        assert int(got[row]) in {int(tokens[row]) for tokens in allowed}


def last(*parts: torch.Tensor) -> list[torch.Tensor]:
    return [part[-1:] for part in parts]


def lasts(options: dict[str, Any]) -> dict[str, Any]:
    return {name: value[-1:] if isinstance(value, torch.Tensor) else value for name, value in options.items()}


@needs_compiler
def test_of_equals_the_same_first_ones_are_kept() -> None:
    """Four tokens are equally likely, and there is room for two, by number or by mass; or for half of a flat row."""
    logits = torch.full((2, 3000), -20.0)
    logits[:, [3, 70, 2600, 2999]] = 5.0
    uniforms, ones = torch.tensor([0.1, 0.9], dtype=torch.float64), torch.ones(2)
    by_number = sample_native.draw(logits, uniforms, ones, top_k=torch.full((2,), 2), most=2)
    by_mass = sample_native.draw(logits, uniforms, ones, top_p=ones * 0.45)
    assert by_number.tolist() == by_mass.tolist() == [3, 70]
    flat = sample_native.draw(torch.zeros(2, 3000), uniforms, ones, top_p=ones * 0.5)
    assert flat.tolist() == [150, 1350]


def test_draws_follow_the_distribution() -> None:
    """Chi-square over 20,000 positions of one seed: 9 degrees of freedom, 99.9 % are below 27.9."""
    p = np.array([0.3, 0.2, 0.15, 0.1, 0.08, 0.07, 0.05, 0.03, 0.015, 0.005])
    count = 20_000
    u = uniform(np.full(count, 42, np.uint64), np.arange(count))
    logits = torch.from_numpy(np.log(p)).float().expand(count, -1)
    seen = np.bincount(draw(logits, torch.from_numpy(u), torch.ones(count)).numpy(), minlength=10)
    assert ((seen - p * count) ** 2 / (p * count)).sum() < 27.9


def test_uniform_is_the_same_for_ever() -> None:
    """Streams that were started by an older version go on in a newer one."""
    got = uniform(np.array([0, 1, 2**64 - 1], np.uint64), np.array([0, 7, 131072]))
    assert got.tolist() == [0.8833108082136426, 0.18594545577485155, 0.8368766893055196]


def test_uniform_has_unrelated_neighbours() -> None:
    seeds, positions = np.meshgrid(np.arange(200, dtype=np.uint64), np.arange(200))
    u = uniform(seeds.ravel(), positions.ravel()).reshape(200, 200)
    assert len(np.unique(u)) == 40_000
    assert u.min() >= 0
    assert u.max() < 1
    assert abs(u.mean() - 0.5) < 0.01
    for a, b in ((u[1:], u[:-1]), (u[:, 1:], u[:, :-1]), (u[1:, 1:], u[:-1, :-1]), (u[1:, :-1], u[:-1, 1:])):
        assert abs(np.corrcoef(a.ravel(), b.ravel())[0, 1]) < 0.02


@pytest.mark.parametrize("implementation", [greedy.reference, sample_cpu.greedy], ids=["reference", "cpu"])
def test_greedy_takes_the_first_of_the_best(implementation: Any) -> None:
    logits = logits_of(20, 333).round()
    expected = [row.tolist().index(max(row.tolist())) for row in logits]
    assert implementation(logits).tolist() == expected


@pytest.mark.parametrize("name", ["reference", compiled])
@pytest.mark.parametrize("seated", [False, True])
def test_penalties_equal_a_naive_reference(name: str, seated: bool) -> None:
    rows, vocab = 20, 50
    rng = np.random.default_rng(0)
    logits = logits_of(rows, vocab)
    outputs = rng.integers(0, 4, (rows, vocab)) * (rng.random((rows, vocab)) < 0.4)
    prompts = rng.random((rows, vocab)) < 0.3
    r, p, f = rng.uniform(0.5, 2, rows), rng.uniform(-2, 2, rows), rng.uniform(-2, 2, rows)
    seats = torch.from_numpy(rng.permutation(rows))
    counts, marks = torch.from_numpy(outputs).int(), torch.from_numpy(prompts)
    if seated:
        counts, marks = torch.empty_like(counts).index_copy(0, seats, counts), marks.clone().index_copy(0, seats, marks)
    got = {"reference": penalise.reference, "native": sample_native.penalise}[name](
        logits,
        counts,
        marks,
        repetition=torch.from_numpy(r),
        presence=torch.from_numpy(p),
        frequency=torch.from_numpy(f),
        seats=seats if seated else None,
    )
    for i in range(rows):
        for v in range(vocab):
            x = float(logits[i, v])
            if outputs[i, v] or prompts[i, v]:
                x = x / r[i] if x > 0 else x * r[i]
            x -= f[i] * outputs[i, v] + (p[i] if outputs[i, v] else 0)
            assert float(got[i, v]) == pytest.approx(x, abs=1e-5)


@pytest.mark.parametrize("name", ["reference", compiled])
@pytest.mark.parametrize("vocab", [9, 100, 1040])
@pytest.mark.parametrize("best", [0, 1, 5, 9])
def test_scores_equal_a_naive_reference(name: str, vocab: int, best: int) -> None:
    logits = logits_of(10, vocab)
    tokens = torch.randint(0, vocab, (10,), generator=torch.Generator().manual_seed(0))
    logprob, rank, ids, top = {"reference": score.reference, "native": sample_native.score}[name](logits, tokens, best)
    for row in range(10):
        exact = logits[row].double().log_softmax(-1)
        order = exact.argsort(descending=True).tolist()
        assert float(logprob[row]) == pytest.approx(float(exact[tokens[row]]), abs=1e-5)
        assert int(rank[row]) == order.index(int(tokens[row])) + 1
        assert ids[row].tolist() == order[:best]
        assert top[row].tolist() == pytest.approx(exact[order[:best]].tolist(), abs=1e-5)


def test_wide_top_p_is_sorted_and_narrow_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    sorted_rows = []
    real = torch.Tensor.sort
    monkeypatch.setattr(torch.Tensor, "sort", lambda x, *a, **k: (sorted_rows.append(x.shape), real(x, *a, **k))[1])
    logits = torch.stack((torch.zeros(5000), torch.zeros(5000)))
    logits[1, 77] = 20.0
    got = sample_cpu.draw(
        logits, torch.tensor([0.99, 0.99], dtype=torch.float64), torch.ones(2), top_p=torch.tensor([0.9, 0.9])
    )
    assert (1, 5000) in sorted_rows
    assert (2, 5000) not in sorted_rows
    assert int(got[1]) == 77
