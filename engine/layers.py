"""The parts a decoder is made of. Parameters are allocated, never initialised: a checkpoint fills them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from kvasir.engine.spec import Rope
from kvasir.kernels.linear import linear, packed


def empty(*shape: int, dtype: torch.dtype, device: torch.device) -> nn.Parameter:
    """An unfilled parameter that takes no gradient."""
    return nn.Parameter(torch.empty(shape, dtype=dtype, device=device), requires_grad=False)


class Linear(nn.Module):
    """x[T, I] -> [T, O]. `parts` names the matrices that lie stacked in it: one large product beats several small."""

    def __init__(
        self, inputs: int, parts: Mapping[str, int], bias: bool, dtype: torch.dtype, device: torch.device
    ) -> None:
        super().__init__()
        self.parts = dict(parts)
        outputs = sum(parts.values())
        self.weight: Tensor = empty(outputs, inputs, dtype=dtype, device=device)
        self.bias = empty(outputs, dtype=dtype, device=device) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)

    def pack(self) -> None:
        """Give the filled weight the order this device reads fastest; `places` ends here."""
        weight = packed(self.weight)
        del self.weight  # a parameter's name takes no plain tensor
        self.weight = weight

    def places(self) -> Iterator[tuple[str, Tensor]]:
        """(name in the checkpoint, the view to fill) of every part."""
        first = 0
        for part, rows in self.parts.items():
            for kind, tensor in (("weight", self.weight), ("bias", self.bias)):
                if tensor is not None:
                    yield f"{part}.{kind}", tensor[first : first + rows]
            first += rows


def rope_frequencies(rope: Rope, head_dim: int) -> Tensor:
    """Radians per position [D / 2] in float32: theta^(-2i / D), stretched as the rope says."""
    plain = 1.0 / rope.theta ** (torch.arange(0, head_dim, 2).float() / head_dim) / rope.factor
    if rope.llama3 is None:
        return plain
    s = rope.llama3
    turns = s.original_len * plain / (2 * math.pi)
    kept = ((turns - s.low) / (s.high - s.low)).clamp(0, 1)
    return plain / s.factor * (1 - kept) + plain * kept
