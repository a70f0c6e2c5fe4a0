"""Barring tokens by Triton: bits are read as they are packed."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 4096


@triton.jit
def _allow(out_ptr, rows_ptr, mask_ptr, vocab, words, BLOCK: tl.constexpr):
    number = tl.program_id(0).to(tl.int64)
    token = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    word = tl.load(mask_ptr + number * words + token // 32, mask=token // 32 < words, other=-1)
    barred = ((word >> (token % 32)) & 1) == 0
    at = out_ptr + tl.load(rows_ptr + number) * vocab + token
    tl.store(
        at, tl.full((BLOCK,), -float("inf"), tl.float32).to(out_ptr.dtype.element_ty), mask=barred & (token < vocab)
    )


def allow(logits: Tensor, rows: Tensor, mask: Tensor) -> Tensor:
    """As the definition says."""
    out = logits.clone(memory_format=torch.contiguous_format)
    if len(rows):
        _allow[(len(rows), triton.cdiv(out.shape[1], BLOCK))](
            out, rows.contiguous(), mask.contiguous(), out.shape[1], mask.shape[1], BLOCK=BLOCK, num_warps=8
        )
    return out
