"""A mixture's experts in one compiled call: what they give one by one, to the bit in any batch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from kvasir.kernels import native
from kvasir.kernels.activation import gated
from kvasir.kernels.linear import linear, packed
from kvasir.kernels.moe import experts, stacked_experts
from kvasir.kernels.packed_experts import Expert, PackedExperts, packed_experts

pytestmark = pytest.mark.skipif(native.library() is None, reason=f"no compiled kernels: {native.native().text}")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
CLOSE = {torch.float32: 1e-5, torch.bfloat16: 4e-2, torch.float16: 5e-3}
COUNT, HIDDEN, FFN = 6, 70, 40


class Mixture:
    """Random experts, stacked and packed."""

    def __init__(self, dtype: torch.dtype, *, biased: bool = True, activation: str = "silu", first: int = 0) -> None:
        torch.manual_seed(1)
        self.dtype, self.first = dtype, first
        self.up = (torch.randn(COUNT, 2 * FFN, HIDDEN) / HIDDEN**0.5).to(dtype)
        self.down = (torch.randn(COUNT, HIDDEN, FFN) / FFN**0.5).to(dtype)
        self.up_bias = torch.randn(COUNT, 2 * FFN).to(dtype) if biased else None
        self.down_bias = torch.randn(COUNT, HIDDEN).to(dtype) if biased else None
        self.facts: dict[str, Any] = {"activation": activation, "limit": 1.5 if activation == "clamped" else None}
        self.list = [
            Expert(
                packed(self.up[e], invariant=True),
                self.up_bias[e] if self.up_bias is not None else None,
                packed(self.down[e], invariant=True),
                self.down_bias[e] if self.down_bias is not None else None,
            )
            for e in range(COUNT)
        ]

    def together(self) -> PackedExperts:
        found = packed_experts(self.list, **self.facts, gate=True, first=self.first)
        assert found is not None
        return found

    def definition(self, x: Tensor, index: Tensor, weight: Tensor, *, on_input: bool) -> Tensor:
        stacked = (t.float() for t in (self.up, self.down))
        biases = {"up_bias": self.up_bias, "down_bias": self.down_bias}
        floats = {name: None if bias is None else bias.float() for name, bias in biases.items()}
        weight = weight.to(self.dtype).float()
        return stacked_experts.reference(
            x.float(), index, weight, *stacked, **self.facts, **floats, on_input=on_input, first=self.first
        )

    def one_by_one(self, x: Tensor, index: Tensor, weight: Tensor, *, on_input: bool) -> Tensor:
        def run(number: int, rows: Tensor) -> Tensor | None:
            if not 0 <= number - self.first < COUNT:
                return None
            own = self.list[number - self.first]
            y = gated(linear(rows, own.up, own.up_bias), self.facts["activation"], self.facts["limit"])
            return linear(y, own.down, own.down_bias)

        return experts(x, index, weight, run, on_input=on_input)


def routed(rows: int, dtype: torch.dtype, *, k: int = 3, among: int = COUNT) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(rows)
    index = torch.stack([torch.randperm(among)[:k] for _ in range(rows)]) if rows else torch.empty(0, k).long()
    return torch.randn(rows, HIDDEN).to(dtype), index, torch.rand(rows, k)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh", "clamped"])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("on_input", [False, True])
def test_they_equal_the_definition(dtype: torch.dtype, activation: str, biased: bool, on_input: bool) -> None:
    mixture = Mixture(dtype, biased=biased, activation=activation)
    for rows in (0, 1, 5, 40):
        x, index, weight = routed(rows, dtype)
        found = mixture.together()(x, index, weight, on_input=on_input)
        want = mixture.definition(x, index, weight, on_input=on_input)
        torch.testing.assert_close(found.float(), want, atol=CLOSE[dtype], rtol=CLOSE[dtype])
        each = mixture.one_by_one(x, index, weight, on_input=on_input)
        torch.testing.assert_close(found, each, atol=CLOSE[dtype] / 2, rtol=CLOSE[dtype] / 2)


@pytest.mark.parametrize("dtype", DTYPES)
def test_experts_that_live_elsewhere_add_nothing(dtype: torch.dtype) -> None:
    mixture = Mixture(dtype, first=2)
    x, index, weight = routed(30, dtype, among=10)
    assert not ((index >= 2) & (index < 8)).all()
    found = mixture.together()(x, index, weight, on_input=False)
    want = mixture.definition(x, index, weight, on_input=False)
    torch.testing.assert_close(found.float(), want, atol=CLOSE[dtype], rtol=CLOSE[dtype])
    nobody = mixture.together()(x, torch.full_like(index, 9), weight, on_input=False)
    assert not nobody.any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("threads", [1, 2])
def test_a_row_is_the_same_in_any_batch(dtype: torch.dtype, threads: int) -> None:
    """Bit for bit; 500 rows, of which one expert has all and others some or none, are cut into chunks."""
    mixture, before = Mixture(dtype).together(), torch.get_num_threads()
    x, index, weight = routed(500, dtype, among=5)
    index[:, 1:] = torch.where(index[:, 1:] == 3, index[:, :1], index[:, 1:])
    index[:, 0] = 3
    torch.set_num_threads(threads)
    together = mixture(x, index, weight, on_input=False)
    torch.set_num_threads(before)
    for part in (slice(0, 1), slice(7, 12), slice(90, 490), slice(499, 500)):
        alone = mixture(x[part], index[part], weight[part], on_input=False)
        assert torch.equal(alone, together[part])


def test_rows_needn_t_lie_together() -> None:
    mixture = Mixture(torch.bfloat16).together()
    x, index, weight = routed(9, torch.bfloat16)
    wide = torch.cat((x, x), 1)[:, :HIDDEN]
    found = mixture(wide, index.t().contiguous().t(), weight.t().contiguous().t(), on_input=True)
    assert torch.equal(found, mixture(x, index, weight, on_input=True))


def test_what_cannot_be_called_at_once() -> None:
    made = Mixture(torch.float32).list
    kind: dict[str, Any] = {"activation": "silu", "limit": None, "gate": True, "first": 0}
    assert packed_experts(made, **kind) is not None
    for other in ({"gate": False}, {"activation": "relu"}):
        assert packed_experts(made, **kind | other) is None
    assert packed_experts([], **kind) is None
    plain = [Expert(torch.zeros(2, 2), None, torch.zeros(2, 1), None)]
    assert packed_experts(plain, **kind) is None


def test_rows_of_another_type_or_width_are_refused() -> None:
    mixture = Mixture(torch.bfloat16).together()
    x, index, weight = routed(2, torch.bfloat16)
    for wrong in (x.float(), x[:, 1:]):
        with pytest.raises(ValueError, match="by experts in"):
            mixture(wrong, index, weight, on_input=False)
