"""Activations of an MLP, plain or gated (Shazeer 2020, arXiv:2002.05202)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch.nn.functional as F
from torch import Tensor

from kvasir.kernels.op import op

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
}


@op("triton")
def plain(x: Tensor, activation: str) -> Tensor:
    """activation(x[T, F]) -> [T, F]."""
    return ACTIVATIONS[activation](x)


@op("native", "triton")
def gated(x: Tensor, activation: str, limit: float | None = None) -> Tensor:
    """activation(gate) * up -> [T, F], where x[T, 2 F] holds gate in its first half and up in its second.

    "clamped": gate up to `limit` and up within +-limit, then gate * sigmoid(1.702 gate) * (up + 1).
    """
    gate, up = x.chunk(2, -1)
    if activation != "clamped":
        return ACTIVATIONS[activation](gate) * up
    if limit is not None:
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    return gate * (gate * 1.702).sigmoid() * (up + 1)
