"""Adapters of a batch by Triton: rows are sorted by adapter, and each tile of them reads one matrix."""

from __future__ import annotations

import torch
from torch import Tensor

from kvasir.kernels.grouped_triton import grouped
from kvasir.kernels.groups import Groups

TOLERANCE = {torch.float32: 1e-4, torch.float16: 4e-3, torch.bfloat16: 3e-2}
"""For results of size 4: products are added up in another order."""


def shrink(x: Tensor, down: Tensor, adapter: Tensor, *, deterministic: bool = False) -> Tensor:
    """As the definition says."""
    out = torch.zeros(len(x), down.shape[1], dtype=torch.float32, device=x.device)
    return grouped(x, down, Groups.of(adapter, len(down)), out, deterministic=deterministic)


def expand(h: Tensor, up: Tensor, adapter: Tensor, scales: Tensor, out: Tensor, *, deterministic: bool = False) -> None:
    """As the definition says."""
    groups = Groups.of(adapter, len(up))
    grouped(h, up, groups, out, scales=scales.float(), add=True, deterministic=deterministic)
