"""Mixture of experts: the choice against a naive reference, ties included, and each row through its own experts."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from kvasir.kernels.moe import experts, route


def chosen(scores: list[float], count: int) -> list[int]:
    """The best, the first of equals first."""
    return sorted(range(len(scores)), key=lambda e: (-scores[e], e))[:count]


@given(st.lists(st.lists(st.integers(-3, 3), min_size=6, max_size=6), min_size=1, max_size=5), st.integers(1, 6))
def test_the_best_are_chosen_and_the_first_of_equals(rows: list[list[int]], count: int) -> None:
    index, weight = route(torch.tensor(rows, dtype=torch.float32), per_token=count)
    for row, got, weights in zip(rows, index.tolist(), weight.tolist(), strict=True):
        assert got == chosen([float(x) for x in row], count)
        powers = [math.exp(row[e]) for e in got]
        assert weights == pytest.approx([p / sum(powers) for p in powers], rel=1e-5)


def test_weights_are_left_as_they_are_and_scaled() -> None:
    logits = torch.tensor([[1.0, 3.0, 2.0, 0.0]])
    index, weight = route(logits, per_token=2, renormalise=False, scale=2.5)
    assert index.tolist() == [[1, 2]]
    torch.testing.assert_close(weight, logits.softmax(-1)[:, [1, 2]] * 2.5)


def test_a_bias_chooses_but_doesnt_count() -> None:
    """DeepSeek-V3: expert 3 is chosen for its bias, and weighed by its sigmoid alone."""
    logits, bias = torch.tensor([[2.0, 1.0, 0.0, -1.0]]), torch.tensor([0.0, 0.0, 0.0, 9.0])
    index, weight = route(logits, per_token=2, scoring="sigmoid", choice_bias=bias, renormalise=False)
    assert index.tolist() == [[3, 0]]
    torch.testing.assert_close(weight, logits.sigmoid()[:, [3, 0]])


@pytest.mark.parametrize(("score", "expected"), [("max", [0, 1]), ("top2", [2, 3])])
def test_only_experts_of_the_best_groups(score: str, expected: list[int]) -> None:
    """Groups (0, 1) and (2, 3): the first has the best expert, the second the better two."""
    logits = torch.tensor([[5.0, 0.0, 4.0, 3.9]])
    index, _ = route(logits, per_token=2, scoring="sigmoid", groups=2, groups_used=1, group_score=score)
    assert sorted(index[0].tolist()) == expected


def test_sparsemixer_weighs_only_what_comes_close() -> None:
    """Far from the best, an expert has no share; the second is chosen among the rest (arXiv:2310.00811)."""
    index, weight = route(torch.tensor([[10.0, 1.0, 0.0]]), per_token=2, scoring="sparsemixer", jitter=0.01)
    assert index.tolist() == [[0, 1]]
    torch.testing.assert_close(weight, torch.tensor([[1.0, 1.0]]))


MATRICES = torch.randn(5, 8, 8, generator=torch.Generator().manual_seed(0))


def through(expert: int, rows: Tensor) -> Tensor:
    return rows @ MATRICES[expert]


@pytest.mark.parametrize("on_input", [False, True])
@pytest.mark.parametrize("rows", [0, 1, 17])
def test_each_row_goes_through_its_experts(rows: int, on_input: bool) -> None:
    x, logits = torch.randn(rows, 8), torch.randn(rows, 5)
    index, weight = route(logits, per_token=2)
    got = experts(x, index, weight, through, on_input=on_input)
    want = torch.zeros_like(x)
    for t in range(rows):
        for e, w in zip(index[t].tolist(), weight[t].tolist(), strict=True):
            want[t] += through(e, x[t] * w) if on_input else through(e, x[t]) * w
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


def test_a_row_s_result_doesnt_depend_on_the_others() -> None:
    x, logits = torch.randn(9, 8), torch.randn(9, 5)
    index, weight = route(logits, per_token=3)
    together = experts(x, index, weight, through)
    for t in range(9):
        alone = experts(x[t : t + 1], index[t : t + 1], weight[t : t + 1], through)
        torch.testing.assert_close(together[t : t + 1], alone, atol=1e-6, rtol=1e-6)


def test_experts_that_live_elsewhere_add_nothing() -> None:
    x, logits = torch.randn(6, 8), torch.randn(6, 5)
    index, weight = route(logits, per_token=2)
    parts = [
        experts(x, index, weight, lambda e, rows, own=own: through(e, rows) if e in own else None)
        for own in ((0, 1, 2), (3, 4))
    ]
    torch.testing.assert_close(sum(parts), experts(x, index, weight, through), atol=1e-5, rtol=1e-5)
