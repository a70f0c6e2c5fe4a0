"""Gated activations by compiled code (rows_cpu.cpp)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from kvasir.kernels import activation as plain
from kvasir.kernels.native import TYPES, library

KINDS = {"silu": 0, "gelu_tanh": 1, "clamped": 2}
TOLERANCE = {torch.float32: 2e-6, torch.float16: 4e-3, torch.bfloat16: 4e-2}
"""For values of size 1 to 4: the exponential differs in its last bits, which may round a result to its neighbour."""


def gated(x: Tensor, activation: str, limit: float | None = None) -> Tensor:
    """As the definition says; rarer activations are left to it."""
    compiled = library()
    if compiled is None or activation not in KINDS or x.dtype not in TYPES or not x.is_contiguous():
        return plain.gated.reference(x, activation, limit)
    width = x.shape[-1] // 2
    out = x.new_empty(*x.shape[:-1], width)
    threads = torch.get_num_threads()
    rows, kind = out.numel() // max(1, width), KINDS[activation]
    compiled.gated(TYPES[x.dtype], x.data_ptr(), out.data_ptr(), rows, width, kind, limit_of(limit), threads)
    return out


def limit_of(limit: float | None) -> float:
    """As the compiled code takes it."""
    return math.inf if limit is None else limit
