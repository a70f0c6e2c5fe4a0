"""Mixture of experts: the choice against a naive reference, ties included, and each row through its own experts."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from kvasir.kernels import moe_native, native
from kvasir.kernels.moe import Routing, experts, route

NATIVE = pytest.param(
    moe_native.route, id="native", marks=pytest.mark.skipif(native.library() is None, reason="no compiled kernels")
)
Route = Callable[..., tuple[Tensor, Tensor]]
every_route = pytest.mark.parametrize("choose", [pytest.param(route.reference, id="definition"), NATIVE])


def chosen(scores: list[float], count: int) -> list[int]:
    """The best, the first of equals first."""
    return sorted(range(len(scores)), key=lambda e: (-scores[e], e))[:count]


@every_route
@given(st.lists(st.lists(st.integers(-3, 3), min_size=6, max_size=6), min_size=1, max_size=5), st.integers(1, 6))
def test_the_best_are_chosen_and_the_first_of_equals(choose: Route, rows: list[list[int]], count: int) -> None:
    index, weight = choose(torch.tensor(rows, dtype=torch.float32), Routing(count))
    for row, got, weights in zip(rows, index.tolist(), weight.tolist(), strict=True):
        assert got == chosen([float(x) for x in row], count)
        powers = [math.exp(row[e]) for e in got]
        assert weights == pytest.approx([p / sum(powers) for p in powers], rel=1e-5)


@every_route
def test_weights_are_left_as_they_are_and_scaled(choose: Route) -> None:
    logits = torch.tensor([[1.0, 3.0, 2.0, 0.0]])
    index, weight = choose(logits, Routing(2, renormalise=False, scale=2.5))
    assert index.tolist() == [[1, 2]]
    torch.testing.assert_close(weight, logits.softmax(-1)[:, [1, 2]] * 2.5)


@every_route
def test_a_bias_chooses_but_doesnt_count(choose: Route) -> None:
    """DeepSeek-V3: expert 3 is chosen for its bias, and weighed by its sigmoid alone."""
    logits, bias = torch.tensor([[2.0, 1.0, 0.0, -1.0]]), torch.tensor([0.0, 0.0, 0.0, 9.0])
    index, weight = choose(logits, Routing(2, "sigmoid", renormalise=False), bias)
    assert index.tolist() == [[3, 0]]
    torch.testing.assert_close(weight, logits.sigmoid()[:, [3, 0]])


@every_route
@pytest.mark.parametrize(("score", "expected"), [("max", [0, 1]), ("top2", [2, 3])])
def test_only_experts_of_the_best_groups(choose: Route, score: str, expected: list[int]) -> None:
    """Groups (0, 1) and (2, 3): the first has the best expert, the second the better two."""
    logits = torch.tensor([[5.0, 0.0, 4.0, 3.9]])
    index, _ = choose(logits, Routing(2, "sigmoid", groups=2, groups_used=1, group_score=score))
    assert sorted(index[0].tolist()) == expected


@every_route
def test_sparsemixer_weighs_only_what_comes_close(choose: Route) -> None:
    """Far from the best, an expert has no share; the second is chosen among the rest (arXiv:2310.00811)."""
    index, weight = choose(torch.tensor([[10.0, 1.0, 0.0]]), Routing(2, "sparsemixer", jitter=0.01))
    assert index.tolist() == [[0, 1]]
    torch.testing.assert_close(weight, torch.tensor([[1.0, 1.0]]))


@every_route
def test_no_rounding_decides(choose: Route) -> None:
    """Scores that float32 takes for equal."""
    logits = torch.full((1, 4), 20.0)
    logits[0, 2] += 1e-5
    assert logits.sigmoid().unique().numel() == 1
    assert choose(logits, Routing(1, "sigmoid"))[0].tolist() == [[2]]


@st.composite
def routings(draw: st.DrawFn) -> tuple[Routing, int]:
    """With how many experts there are."""
    groups, best_two = draw(st.sampled_from([1, 1, 2, 3, 8])), draw(st.booleans())
    used, size = draw(st.integers(1, groups)), draw(st.integers(2, 20))
    routing = Routing(
        draw(st.integers(1, used * size)),
        draw(st.sampled_from(["softmax", "sigmoid", "sparsemixer"])),
        draw(st.booleans()),
        draw(st.sampled_from([1.0, 2.5])),
        groups,
        used,
        "top2" if best_two else "max",
        draw(st.sampled_from([0.01, 0.3])),
    )
    return routing, groups * size


@pytest.mark.skipif(native.library() is None, reason="no compiled kernels")
@given(routings(), st.integers(0, 200), st.booleans(), st.booleans(), st.sampled_from([torch.float32, torch.bfloat16]))
def test_compiled_choice_equals_the_definition(
    facts: tuple[Routing, int], rows: int, biased: bool, ties: bool, dtype: torch.dtype
) -> None:
    """Also of many rows, which are shared out, and of many that are alike."""
    (routing, count), seed = facts, torch.Generator().manual_seed(rows)
    logits = torch.randn(rows, count, generator=seed) * 3
    logits = (logits.round() if ties else logits).to(dtype)
    bias = torch.randn(count, generator=seed) if biased else None
    found, want = moe_native.route(logits, routing, bias), route.reference(logits, routing, bias)
    assert torch.equal(found[0], want[0])
    torch.testing.assert_close(found[1], want[1], atol=1e-7, rtol=1e-6)


@pytest.mark.skipif(native.library() is None, reason="no compiled kernels")
@pytest.mark.parametrize("odd", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("scoring", ["softmax", "sigmoid", "sparsemixer"])
def test_experts_are_chosen_whatever_the_logits(scoring: str, odd: float) -> None:
    """Whose equal the definition is: an index beside the experts would be read."""
    logits = torch.randn(9, 16)
    logits[::2, ::3] = odd
    logits[1] = odd
    routing = Routing(4, scoring, groups=4, groups_used=2, group_score="top2")
    found, want = moe_native.route(logits, routing), route.reference(logits, routing)
    assert ((found[0] >= 0) & (found[0] < 16)).all()
    if scoring != "sparsemixer":
        assert torch.equal(found[0], want[0])
        torch.testing.assert_close(found[1], want[1], equal_nan=True, atol=1e-7, rtol=1e-6)


@pytest.mark.parametrize(
    ("routing", "bias", "word"),
    [
        (Routing(7), None, "7 of 6"),
        (Routing(2, groups=4, groups_used=1), None, "4 groups"),
        (Routing(2, groups=6, groups_used=2, group_score="top2"), None, "top2"),
        (Routing(2), torch.zeros(5), "choice_bias"),
    ],
)
@pytest.mark.skipif(native.library() is None, reason="no compiled kernels")
def test_choices_that_can_t_be_are_refused(routing: Routing, bias: Tensor | None, word: str) -> None:
    """By the definition, too, which takes a bias of any shape that can be added."""
    with pytest.raises(ValueError, match=word):
        moe_native.route(torch.zeros(1, 6), routing, bias)
    if bias is None:
        with pytest.raises(ValueError, match=word):
            route.reference(torch.zeros(1, 6), routing)


MATRICES = torch.randn(5, 8, 8, generator=torch.Generator().manual_seed(0))


def through(expert: int, rows: Tensor) -> Tensor:
    return rows @ MATRICES[expert]


@pytest.mark.parametrize("on_input", [False, True])
@pytest.mark.parametrize("rows", [0, 1, 17])
def test_each_row_goes_through_its_experts(rows: int, on_input: bool) -> None:
    x, logits = torch.randn(rows, 8), torch.randn(rows, 5)
    index, weight = route(logits, Routing(2))
    got = experts(x, index, weight, through, on_input=on_input)
    want = torch.zeros_like(x)
    for t in range(rows):
        for e, w in zip(index[t].tolist(), weight[t].tolist(), strict=True):
            want[t] += through(e, x[t] * w) if on_input else through(e, x[t]) * w
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


def test_a_row_s_result_doesnt_depend_on_the_others() -> None:
    x, logits = torch.randn(9, 8), torch.randn(9, 5)
    index, weight = route(logits, Routing(3))
    together = experts(x, index, weight, through)
    for t in range(9):
        alone = experts(x[t : t + 1], index[t : t + 1], weight[t : t + 1], through)
        torch.testing.assert_close(together[t : t + 1], alone, atol=1e-6, rtol=1e-6)


def test_experts_that_live_elsewhere_add_nothing() -> None:
    x, logits = torch.randn(6, 8), torch.randn(6, 5)
    index, weight = route(logits, Routing(2))
    parts = [
        experts(x, index, weight, lambda e, rows, own=own: through(e, rows) if e in own else None)
        for own in ((0, 1, 2), (3, 4))
    ]
    torch.testing.assert_close(sum(parts), experts(x, index, weight, through), atol=1e-5, rtol=1e-5)
