"""Norms of rows by compiled code (rows_cpu.cpp)."""

from __future__ import annotations

import torch
from torch import Tensor

from kvasir.kernels import norm as plain
from kvasir.kernels.native import TYPES, library

TOLERANCE = {torch.float32: 2e-6, torch.float16: 4e-3, torch.bfloat16: 4e-2}
"""For values of size 1 to 4: sums run in another order, which may round a result to its neighbour."""


def rms_norm(
    x: Tensor, weight: Tensor | None, eps: float, offset: float = 0.0, mean_square: Tensor | None = None
) -> Tensor:
    """As the definition says; rows that are parts and weights for each head are left to it."""
    compiled = library()
    fits = mean_square is None and x.dim() in (2, 3) and _suits(x, weight)
    if compiled is None or not fits:
        return plain.rms_norm.reference(x, weight, eps, offset, mean_square)
    out = torch.empty(x.shape, dtype=x.dtype)
    compiled.rms_norm(
        TYPES[x.dtype],
        x.data_ptr(),
        x.stride(0),
        1 if x.dim() == 2 else x.shape[1],
        0 if x.dim() == 2 else x.stride(1),
        None,
        1.0,
        None if weight is None else weight.data_ptr(),
        offset,
        eps,
        None,
        out.data_ptr(),
        x.numel() // x.shape[-1],
        x.shape[-1],
        torch.get_num_threads(),
    )
    return out


def add_rms_norm(
    x: Tensor, y: Tensor, weight: Tensor, eps: float, offset: float = 0.0, scale: float = 1.0
) -> tuple[Tensor, Tensor]:
    """As the definition says."""
    compiled = library()
    rows, width = x.shape
    if compiled is None or not (_suits(x, weight) and x.is_contiguous() and y.is_contiguous() and y.dtype == x.dtype):
        return plain.add_rms_norm.reference(x, y, weight, eps, offset, scale)
    total, out = torch.empty_like(x), torch.empty_like(x)
    compiled.rms_norm(
        TYPES[x.dtype],
        x.data_ptr(),
        width,
        1,
        0,
        y.data_ptr(),
        scale,
        weight.data_ptr(),
        offset,
        eps,
        total.data_ptr(),
        out.data_ptr(),
        rows,
        width,
        torch.get_num_threads(),
    )
    return total, out


def _suits(x: Tensor, weight: Tensor | None) -> bool:
    """Whether the compiled code can read these."""
    same = weight is None or (weight.dtype == x.dtype and weight.dim() == 1 and weight.is_contiguous())
    return same and x.dtype in TYPES and x.stride(-1) == 1 and x.shape[-1] > 0
