"""Whole blocks of the KV cache: taken out in one piece, put back, copied. Letters: C chunks of a block, N blocks, W numbers."""

from __future__ import annotations

from torch import Tensor

from kvasir.kernels.op import op


@op("triton")
def gather_blocks(chunks: Tensor, index: Tensor) -> Tensor:
    """chunks[C, N, W] of the blocks index[n] -> [n, C, W]."""
    return chunks.transpose(0, 1).index_select(0, index)


@op("triton")
def scatter_blocks(chunks: Tensor, index: Tensor, held: Tensor) -> None:
    """held[n, C, W], what `gather_blocks` gave, into the blocks index[n] of chunks[C, N, W], in place."""
    chunks.transpose(0, 1).index_copy_(0, index, held)


@op("triton")
def copy_blocks(chunks: Tensor, sources: Tensor, targets: Tensor) -> None:
    """Block sources[n] to targets[n], in place; all sources are read before any target is written."""
    chunks.index_copy_(1, targets, chunks.index_select(1, sources))
