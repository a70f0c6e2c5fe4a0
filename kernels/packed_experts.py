"""A mixture's experts as one compiled call (experts_cpu.cpp), once their matrices lie in our own order."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kvasir.kernels.activation_native import KINDS, limit_of
from kvasir.kernels.linear import Packed, Weight
from kvasir.kernels.native import TYPES, library

P, N, F = ctypes.c_void_p, ctypes.c_int64, ctypes.c_double


class ExpertC(ctypes.Structure):
    _fields_ = tuple((name, P) for name in ("up", "up_bias", "down", "down_bias"))


class FactsC(ctypes.Structure):
    _fields_ = (
        *((name, N) for name in ("type", "hidden", "ffn", "gate", "first", "count", "on_input")),
        ("limit", F),
    )


@dataclass(frozen=True, eq=False)
class Expert:
    """Matrices up[2 F, M] (gate and up) and down[M, F], and their biases."""

    up: Weight
    up_bias: Tensor | None
    down: Weight
    down_bias: Tensor | None


class PackedExperts:
    """The experts first..first + E - 1 of a mixture, all gated and of one shape; where they are must not change.

    The products, gates and roundings are those of experts that are called one by one, so a row's result is the same to the
    bit in any batch; what its experts give is added up in float32, in the order of their choice, and rounded once.
    """

    def __init__(self, experts: Sequence[Expert], *, activation: str, limit: float | None, first: int) -> None:
        self._experts = experts  # what the table points to
        self._table = (ExpertC * len(experts))(*map(_expert, experts))
        up, down = experts[0].up, experts[0].down
        assert isinstance(up, Packed)
        assert isinstance(down, Packed)
        self.dtype, self.hidden = up.blocks.dtype, up.inputs
        gate = KINDS[activation]
        self._facts = [
            FactsC(TYPES[self.dtype], up.inputs, down.inputs, gate, first, len(experts), on_input, limit_of(limit))
            for on_input in (False, True)
        ]

    def __call__(self, x: Tensor, index: Tensor, weight: Tensor, *, on_input: bool) -> Tensor:
        """x[T, M] through the experts index[T, k], which weigh weight[T, k] -> [T, M]; others' add nothing."""
        facts, compiled = self._facts[on_input], library()
        assert compiled is not None
        self.check(x)
        x, index, weight = x.contiguous(), index.contiguous(), weight.to(x.dtype).contiguous()
        rows, k = index.shape
        out, room = torch.empty_like(x), x.new_empty(rows * k * (facts.hidden + 3 * facts.ffn))
        compiled.run_experts(
            ctypes.addressof(facts),
            ctypes.addressof(self._table),
            x.data_ptr(),
            index.data_ptr(),
            weight.data_ptr(),
            out.data_ptr(),
            room.data_ptr(),
            rows,
            k,
            torch.get_num_threads(),
        )
        return out

    def check(self, x: Tensor) -> None:
        """ValueError unless they can take x[T, M]: the kernel reads what it is told is there."""
        if x.dtype != self.dtype or x.dim() != 2 or x.shape[1] != self.hidden:
            raise ValueError(f"x{list(x.shape)} in {x.dtype} by experts in {self.dtype} with {self.hidden} inputs")

    def addresses(self, *, on_input: bool) -> tuple[int, int]:
        """Where the compiled code finds their facts, and the experts themselves (mixture.h)."""
        return ctypes.addressof(self._facts[on_input]), ctypes.addressof(self._table)


def packed_experts(
    experts: Sequence[Expert], *, activation: str, limit: float | None, gate: bool, first: int
) -> PackedExperts | None:
    """None where they can't be called at once: without a gate, by a rarer activation, or in another order than our own."""
    whole = all(isinstance(weight, Packed) for expert in experts for weight in (expert.up, expert.down))
    if not experts or not gate or activation not in KINDS or not whole:
        return None
    return PackedExperts(experts, activation=activation, limit=limit, first=first)


def _expert(expert: Expert) -> ExpertC:
    assert isinstance(expert.up, Packed)
    assert isinstance(expert.down, Packed)
    up_bias, down_bias = (None if bias is None else bias.data_ptr() for bias in (expert.up_bias, expert.down_bias))
    return ExpertC(expert.up.blocks.data_ptr(), up_bias, expert.down.blocks.data_ptr(), down_bias)
