"""Whole blocks by Triton: as words of 8 bytes (or less), whatever type they hold."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024
WORDS = (torch.int64, torch.int32, torch.int16, torch.uint8)


@triton.jit
def _move(chunks_ptr, index_ptr, held_ptr, chunks, chunk, block, width, OUT: tl.constexpr, BLOCK: tl.constexpr):
    """One chunk of one block, out of the cache into held, or back."""
    number, part = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    column = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    here = chunks_ptr + part * chunk + tl.load(index_ptr + number) * block + column
    there = held_ptr + (number * chunks + part) * width + column
    if OUT:
        tl.store(there, tl.load(here, mask=inside), mask=inside)
    else:
        tl.store(here, tl.load(there, mask=inside), mask=inside)


def gather_blocks(chunks: Tensor, index: Tensor) -> Tensor:
    """As the definition says."""
    held = chunks.new_empty(len(index), chunks.shape[0], chunks.shape[2])
    _run(chunks, index, held, out=True)
    return held


def scatter_blocks(chunks: Tensor, index: Tensor, held: Tensor) -> None:
    """As the definition says."""
    _run(chunks, index, held.contiguous(), out=False)


def copy_blocks(chunks: Tensor, sources: Tensor, targets: Tensor) -> None:
    """As the definition says."""
    scatter_blocks(chunks, targets, gather_blocks(chunks, sources))


def _run(chunks: Tensor, index: Tensor, held: Tensor, *, out: bool) -> None:
    assert chunks.stride(-1) == 1, "a chunk of a block lies in one piece"
    if not held.numel():
        return
    word = _word(chunks)
    chunks, held = chunks.view(word), held.view(word)
    grid = len(index), chunks.shape[0], triton.cdiv(chunks.shape[2], BLOCK)
    _move[grid](
        chunks,
        index.contiguous(),
        held,
        chunks.shape[0],
        chunks.stride(0),
        chunks.stride(1),
        chunks.shape[2],
        OUT=out,
        BLOCK=BLOCK,
    )


def _word(chunks: Tensor) -> torch.dtype:
    """The widest type that everything is a multiple of."""
    size = chunks.element_size()
    sizes = chunks.shape[2] * size, chunks.stride(0) * size, chunks.stride(1) * size, chunks.data_ptr()
    return next(word for word in WORDS if word.itemsize >= size and all(n % word.itemsize == 0 for n in sizes))
