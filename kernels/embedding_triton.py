"""Looking up tokens by Triton: also where a rank has a part of the table, in one go."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024


@triton.jit
def _embed(tokens_ptr, table_ptr, out_ptr, first, vocab, width, table_row, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    token = tl.load(tokens_ptr + row) - first
    here = (token >= 0) & (token < vocab)
    x = tl.load(table_ptr + token * table_row + column, mask=column < tl.where(here, width, 0), other=0.0)
    tl.store(out_ptr + row * width + column, x, mask=column < width)


def embed(tokens: Tensor, table: Tensor, first: int = 0, whole: bool = True) -> Tensor:
    """As the definition says; a token that a whole table lacks gives zeros instead of an error on the device."""
    rows, width = len(tokens), table.shape[1]
    table = table if table.stride(1) == 1 else table.contiguous()
    out = table.new_empty(rows, width)
    if rows:
        _embed[(rows, triton.cdiv(width, BLOCK))](
            tokens.contiguous(), table, out, first, len(table), width, table.stride(0), BLOCK=BLOCK
        )
    return out
