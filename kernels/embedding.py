"""Looking up tokens in a table, or in the part of it that a rank holds."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from kvasir.kernels.op import op


@op("triton")
def embed(tokens: Tensor, table: Tensor, first: int = 0, whole: bool = True) -> Tensor:
    """Row tokens[T] - first of table[V, M] -> [T, M]; unless the table is `whole`, zeros for tokens that it doesn't have."""
    if whole:
        return F.embedding(tokens - first if first else tokens, table)
    here = (tokens >= first) & (tokens < first + len(table))
    x = F.embedding((tokens - first).clamp(0, len(table) - 1), table)
    return x * here[:, None]
