"""Gated activations (Shazeer 2020, arXiv:2002.05202)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch.nn.functional as F
from torch import Tensor

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
}


def gated(x: Tensor, activation: str) -> Tensor:
    """activation(gate) * up -> [T, F], where x[T, 2 F] holds gate in its first half and up in its second."""
    gate, up = x.chunk(2, -1)
    return ACTIVATIONS[activation](gate) * up
