"""Packed masks put on logits by compiled code (rows_cpu.cpp), in one pass."""

from __future__ import annotations

import torch
from torch import Tensor

from kvasir.kernels import bitmask as plain
from kvasir.kernels.native import library

ALONE = 1 << 18
"""Numbers that one thread handles sooner than two would have met: 32 rows of 3,072 take it 25 us (Zen 5)."""


def allow(logits: Tensor, rows: Tensor, mask: Tensor) -> Tensor:
    """As the definition says; float32 alone is compiled."""
    compiled = library()
    if compiled is None or not _readable(logits, rows, mask):
        return plain.allow.reference(logits, rows, mask)
    count, vocab = logits.shape
    which = torch.full((count,), -1, dtype=torch.int64)
    which[rows] = torch.arange(len(rows))
    out = torch.empty(count, vocab)
    compiled.allow(
        logits.data_ptr(),
        logits.stride(0),
        which.data_ptr(),
        mask.data_ptr(),
        mask.shape[1],
        out.data_ptr(),
        count,
        vocab,
        torch.get_num_threads() if logits.numel() > ALONE else 1,
    )
    return out


def bar(logits: Tensor, rows: Tensor, mask: Tensor) -> Tensor:
    """As the definition says."""
    compiled = library()
    if compiled is None or not _readable(logits, rows, mask):
        return plain.bar.reference(logits, rows, mask)
    compiled.bar(
        logits.data_ptr(),
        logits.stride(0),
        rows.data_ptr(),
        mask.data_ptr(),
        mask.shape[1],
        len(rows),
        logits.shape[1],
        torch.get_num_threads() if len(rows) * logits.shape[1] > ALONE else 1,
    )
    return logits


def best_allowed(logits: Tensor, rows: Tensor, mask: Tensor) -> Tensor:
    """As the definition says."""
    compiled = library()
    if compiled is None or not _readable(logits, rows, mask):
        return plain.best_allowed.reference(logits, rows, mask)
    found = torch.empty(len(rows), dtype=torch.int64)
    compiled.best_allowed(
        logits.data_ptr(),
        logits.stride(0),
        rows.data_ptr(),
        mask.data_ptr(),
        mask.shape[1],
        found.data_ptr(),
        len(rows),
        logits.shape[1],
        torch.get_num_threads() if len(rows) * logits.shape[1] > ALONE else 1,
    )
    return found


def _readable(logits: Tensor, rows: Tensor, mask: Tensor) -> bool:
    return logits.dtype == torch.float32 and logits.stride(-1) == 1 and rows.is_contiguous() and mask.is_contiguous()
