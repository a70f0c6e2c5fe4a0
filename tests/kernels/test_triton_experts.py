"""Experts and adapters by Triton: equal to their definitions, and with `deterministic` the same bits in any batch."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from kvasir.kernels import lora_triton, moe_triton
from kvasir.kernels.lora import expand, shrink
from kvasir.kernels.moe import Routing, route, stacked_experts

DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


ROUTES: list[dict[str, Any]] = [
    {"per_token": 2},
    {"per_token": 8, "renormalise": False, "scale": 2.5},
    {"per_token": 4, "scoring": "sigmoid", "groups": 4, "groups_used": 2, "group_score": "top2", "biased": True},
    {"per_token": 3, "groups": 8, "groups_used": 3},
    {"per_token": 2, "scoring": "sparsemixer"},
]


@pytest.mark.parametrize("facts", ROUTES, ids=str)
@pytest.mark.parametrize("count", [32, 24])
def test_routes(facts: dict[str, Any], count: int, device: torch.device) -> None:
    """Whole numbers as logits: many experts are equally good, and the first are taken."""
    facts = dict(facts)
    bias = torch.rand(count, device=device) if facts.pop("biased", False) else None
    routing = Routing(**facts)
    logits = torch.randint(-3, 4, (9, count), device=device).float()
    index, weight = moe_triton.route(logits, routing, bias)
    expected = route.reference(logits, routing, bias)
    assert torch.equal(index, expected[0])
    torch.testing.assert_close(weight, expected[1], atol=1e-6, rtol=1e-6)
    assert moe_triton.route(logits[:0], routing, bias)[0].shape == (0, routing.per_token)


@pytest.mark.parametrize(
    ("routing", "word"),
    [
        (Routing(2, groups=32, groups_used=2, group_score="top2"), "32 groups.* top2"),
        (Routing(2, groups=4, groups_used=5), "best 5"),
        (Routing(33), "33 of 32"),
    ],
    ids=["groups of one", "too many groups", "too many experts"],
)
def test_routes_that_can_t_be_are_refused(routing: Routing, word: str, device: torch.device) -> None:
    """As the definition refuses them: the kernel would choose experts twice, or ones that aren't there."""
    for choose in (moe_triton.route, route.reference):
        with pytest.raises(ValueError, match=word):
            choose(torch.zeros(1, 32, device=device), routing)


def mixture(rows: int, dtype: torch.dtype, device: torch.device, count: int = 6) -> tuple[torch.Tensor, ...]:
    """x, index, weight, and the experts' matrices and biases."""
    x = torch.randn(rows, 40, device=device).to(dtype)
    index, weight = route(torch.randn(rows, count, device=device), Routing(2))
    up, down = torch.randn(count, 96, 40, device=device) / 6, torch.randn(count, 40, 48, device=device) / 6
    biases = torch.randn(count, 96, device=device), torch.randn(count, 40, device=device)
    return x, index, weight, *(t.to(dtype) for t in (up, down, *biases))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("facts", [{}, {"on_input": True}, {"gate": False}, {"first": 4, "biased": True}], ids=str)
@pytest.mark.parametrize("rows", [0, 1, 37])
def test_experts(rows: int, facts: dict[str, Any], dtype: torch.dtype, device: torch.device) -> None:
    """All of them, or those from the fifth on, as one rank of several has them."""
    x, index, weight, up, down, up_bias, down_bias = mixture(rows, dtype, device)
    facts = {"activation": "silu"} | facts
    if facts.pop("biased", False):
        facts |= {"up_bias": up_bias, "down_bias": down_bias}
    if not facts.get("gate", True):
        down = torch.cat((down, down), -1)
    got = moe_triton.stacked_experts(x, index, weight, up, down, **facts)
    want = stacked_experts.reference(x, index, weight, up, down, **facts)
    size = moe_triton.TOLERANCE[dtype]
    torch.testing.assert_close(got.float(), want.float(), atol=size, rtol=size)


def test_a_row_is_the_same_in_any_batch(device: torch.device) -> None:
    """Bit for bit, with as many rows as make the tiles of the fast way larger."""
    x, index, weight, up, down, *_ = mixture(150, torch.bfloat16, device, 2)
    together = moe_triton.stacked_experts(x, index, weight, up, down, activation="silu", deterministic=True)
    for row in (0, 77, 149):
        at = slice(row, row + 1)
        alone = moe_triton.stacked_experts(
            x[at], index[at], weight[at], up, down, activation="silu", deterministic=True
        )
        assert torch.equal(alone, together[at])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("adapter", [[-1, 2, 0, 2, 2, -1, 1, 0], [-1] * 8, [1] * 8, []])
def test_adapters(adapter: list[int], dtype: torch.dtype, device: torch.device) -> None:
    """A batch of several, of none, of one; into a part of wider rows."""
    rows, which = len(adapter), torch.tensor(adapter, device=device, dtype=torch.int64)
    x = torch.randn(rows, 80, device=device).to(dtype)
    down = (torch.randn(3, 8, 80, device=device) / 8).to(dtype)
    up = torch.randn(3, 50, 8, device=device).to(dtype)
    scales = torch.tensor([1.0, 0.5, 2.0], device=device)
    size = lora_triton.TOLERANCE[dtype]
    h = lora_triton.shrink(x, down, which)
    torch.testing.assert_close(h, shrink.reference(x, down, which), atol=size, rtol=size)
    wide = torch.randn(rows, 70, device=device).to(dtype)
    ours, theirs = wide.clone(), wide.clone()
    lora_triton.expand(h, up, which, scales, ours[:, 10:60])
    expand.reference(h, up, which, scales, theirs[:, 10:60])
    torch.testing.assert_close(ours.float(), theirs.float(), atol=4 * size, rtol=size)
    assert torch.equal(ours[:, :10], wide[:, :10])
