"""A whole mixture in one compiled call: what its parts give one after the other, to the bit in any batch."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from kvasir.kernels import native
from kvasir.kernels.activation import gated
from kvasir.kernels.linear import Packed, Product, linear, packed
from kvasir.kernels.moe import Routing, route
from kvasir.kernels.packed_experts import Expert, packed_experts
from kvasir.kernels.packed_mixture import PackedMixture, Router, Shared

pytestmark = pytest.mark.skipif(native.library() is None, reason=f"no compiled kernels: {native.native().text}")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
COUNT, HIDDEN, FFN, SHARED = 8, 70, 40, 54
ROUTINGS = [
    Routing(3),
    Routing(2, "sigmoid", scale=2.5, groups=4, groups_used=2, group_score="top2"),
    Routing(1, "sigmoid", renormalise=False),
]


def product(outputs: int, inputs: int, dtype: torch.dtype, *, biased: bool) -> Product:
    weight = packed((torch.randn(outputs, inputs) / inputs**0.5).to(dtype), invariant=True)
    assert isinstance(weight, Packed)
    return Product(weight, torch.randn(outputs).to(dtype) if biased else None)


class Mixture:
    """Random, in one call and in parts."""

    def __init__(
        self,
        dtype: torch.dtype,
        routing: Routing,
        shared: str = "none",
        *,
        on_input: bool = False,
        biased: bool = False,
    ) -> None:
        torch.manual_seed(1)
        bias = torch.randn(COUNT) if routing.scoring == "sigmoid" else None
        self.router = Router(product(COUNT, HIDDEN, torch.float32, biased=biased), routing, bias)
        pairs = [
            (product(2 * FFN, HIDDEN, dtype, biased=biased), product(HIDDEN, FFN, dtype, biased=biased))
            for _ in range(COUNT)
        ]
        made = [Expert(up.weight, up.bias, down.weight, down.bias) for up, down in pairs]
        experts = packed_experts(made, activation="silu", limit=None, gate=True, first=0)
        assert experts is not None
        self.experts, self.on_input, self.shared = experts, on_input, None
        if shared != "none":
            up, down = product(2 * SHARED, HIDDEN, dtype, biased=biased), product(HIDDEN, SHARED, dtype, biased=biased)
            self.shared = Shared(up, down, product(1, HIDDEN, dtype, biased=biased) if shared == "gated" else None)
        self.whole = PackedMixture(self.router, experts, on_input=on_input, shared=self.shared)

    def parts(self, x: Tensor) -> Tensor:
        router = self.router.product
        index, weight = route(
            linear(x.float(), router.weight, router.bias), self.router.routing, self.router.choice_bias
        )
        out = self.experts(x, index, weight, on_input=self.on_input)
        if (own := self.shared) is None:
            return out
        y = gated(linear(x, own.up.weight, own.up.bias), "silu")
        shared = linear(y, own.down.weight, own.down.bias)
        return out + (shared if own.gate is None else shared * linear(x, own.gate.weight, own.gate.bias).sigmoid())


def rows_of(count: int, dtype: torch.dtype) -> Tensor:
    torch.manual_seed(count)
    return torch.randn(count, HIDDEN).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("routing", ROUTINGS, ids=lambda routing: f"{routing.per_token} by {routing.scoring}")
@pytest.mark.parametrize("shared", ["none", "plain", "gated"])
@pytest.mark.parametrize("biased", [False, True])
def test_whole_equals_its_parts(dtype: torch.dtype, routing: Routing, shared: str, biased: bool) -> None:
    mixture = Mixture(dtype, routing, shared, on_input=routing.per_token == 1, biased=biased)
    for rows in (0, 1, 5, 300):
        x = rows_of(rows, dtype)
        found, want = mixture.whole(x), mixture.parts(x)
        if shared != "gated":
            assert torch.equal(found, want)
        else:  # torch's sigmoid of the gate is another one
            torch.testing.assert_close(found, want)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("threads", [1, 2])
def test_a_row_is_the_same_in_any_batch(dtype: torch.dtype, threads: int) -> None:
    mixture, x, before = Mixture(dtype, ROUTINGS[1], "gated").whole, rows_of(300, dtype), torch.get_num_threads()
    torch.set_num_threads(threads)
    together = mixture(x)
    torch.set_num_threads(before)
    for part in (slice(0, 1), slice(7, 12), slice(90, 290), slice(299, 300)):
        assert torch.equal(mixture(x[part]), together[part])


def test_rows_needn_t_lie_together() -> None:
    mixture, x = Mixture(torch.bfloat16, ROUTINGS[0]).whole, rows_of(9, torch.bfloat16)
    assert torch.equal(mixture(torch.cat((x, x), 1)[:, :HIDDEN]), mixture(x))


def test_what_does_not_fit_is_refused() -> None:
    made = Mixture(torch.bfloat16, ROUTINGS[0], "gated")
    for wrong in (rows_of(2, torch.float32), rows_of(2, torch.bfloat16)[:, 1:]):
        with pytest.raises(ValueError, match="by experts in"):
            made.whole(wrong)
    for bad in (product(COUNT, HIDDEN, torch.bfloat16, biased=False), product(COUNT, 64, torch.float32, biased=False)):
        with pytest.raises(ValueError, match="a router in"):
            PackedMixture(replace(made.router, product=bad), made.experts, on_input=False, shared=None)
    with pytest.raises(ValueError, match="9 of 8"):
        PackedMixture(replace(made.router, routing=Routing(9)), made.experts, on_input=False, shared=None)
    for bias in (torch.zeros(2), torch.zeros(COUNT, dtype=torch.bfloat16), torch.zeros(2 * COUNT)[::2]):
        bad = replace(made.router.product, bias=bias)
        with pytest.raises(ValueError, match="a bias"):
            PackedMixture(replace(made.router, product=bad), made.experts, on_input=False, shared=None)
    assert made.shared is not None
    narrow = product(2 * SHARED, 64, torch.bfloat16, biased=False)
    for shared in (
        replace(made.shared, up=narrow),
        replace(made.shared, down=narrow),
        replace(made.shared, gate=narrow),
    ):
        with pytest.raises(ValueError, match="shared"):
            PackedMixture(made.router, made.experts, on_input=False, shared=shared)
