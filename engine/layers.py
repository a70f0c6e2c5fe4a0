"""The parts a decoder is made of. Parameters are allocated, never initialised: a checkpoint fills them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from kvasir.engine.spec import Spec
from kvasir.kernels.huge_pages import Room
from kvasir.kernels.linear import Packed, Product, Weight, is_packed, linear, packed
from kvasir.kernels.norm import add_layer_norm, add_rms_norm, layer_norm, rms_norm


def empty(*shape: int, dtype: torch.dtype, device: torch.device) -> nn.Parameter:
    """An unfilled parameter that takes no gradient."""
    return nn.Parameter(torch.empty(shape, dtype=dtype, device=device), requires_grad=False)


class Norm(nn.Module):
    """x[..., M] -> [..., M], by the spec's kind of norm. `shape` is the weight's: (M,), or (H, M) for a norm per head."""

    def __init__(self, spec: Spec, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.rms, self.eps, self.offset = spec.norm == "rms", spec.eps, spec.norm_offset
        self.weight = empty(*shape, dtype=dtype, device=device)
        self.bias = empty(*shape, dtype=dtype, device=device) if spec.norm_bias else None

    def forward(self, x: Tensor) -> Tensor:
        if self.rms:
            return rms_norm(x, self.weight, self.eps, self.offset)
        return layer_norm(x, self.weight, self.bias, self.eps)

    def added(self, x: Tensor, y: Tensor, scale: float = 1.0) -> tuple[Tensor, Tensor]:
        """(x + scale * y, its norm), both [T, M]."""
        if self.rms:
            return add_rms_norm(x, y, self.weight, self.eps, self.offset, scale)
        return add_layer_norm(x, y, self.weight, self.bias, self.eps, scale)

    def part(self, x: Tensor, mean_square: Tensor) -> Tensor:
        """x[T, W] is a part of rows whose mean_square[T, 1] is known; the weight is the same part's."""
        assert self.rms, "LayerNorm over parts of rows isn't needed by any family"
        return rms_norm(x, self.weight, self.eps, self.offset, mean_square)

    def places(self) -> Iterator[tuple[str, Tensor]]:
        """(name behind the module's own, the tensor to fill)."""
        yield from ((f".{name}", tensor) for name, tensor in self.named_parameters())


class Linear(nn.Module):
    """x[T, I] -> [T, O]. `parts` names the matrices that lie stacked in it: one large product beats several small."""

    def __init__(
        self, inputs: int, parts: Mapping[str, int], bias: bool, dtype: torch.dtype, device: torch.device
    ) -> None:
        super().__init__()
        self.parts = dict(parts)
        outputs = sum(parts.values())
        self.weight: Weight = empty(outputs, inputs, dtype=dtype, device=device)
        self.bias = empty(outputs, dtype=dtype, device=device) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)

    def pack(self, *, invariant: bool = False, room: Room | None = None) -> None:
        """Give the filled weight the order this device reads fastest, or one whose products don't depend on the number of
        rows; `places` ends here. `room`: see `packed`."""
        if not isinstance(self.weight, Tensor) or is_packed(self.weight):
            return
        weight = packed(self.weight, invariant=invariant, room=room)
        del self.weight  # a parameter's name takes no plain tensor
        self.weight = weight

    def product(self) -> Product | None:
        """As compiled code takes it; None unless it lies in our own order."""
        return Product(self.weight, self.bias) if isinstance(self.weight, Packed) else None

    def places(self) -> Iterator[tuple[str, Tensor]]:
        """(name in the checkpoint, the view to fill) of every part."""
        first = 0
        for part, rows in self.parts.items():
            for kind, tensor in (("weight", self.weight), ("bias", self.bias)):
                if isinstance(tensor, Tensor):
                    yield f"{part}.{kind}", tensor[first : first + rows]
            first += rows
