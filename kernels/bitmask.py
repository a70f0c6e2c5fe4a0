"""Which tokens a row may take, as packed bits. Letters: R rows, V vocabulary, W = ceil(V / 32) words."""

from __future__ import annotations

import torch
from torch import Tensor

from kvasir.kernels.op import op


@op("native", "triton")
def allow(logits: Tensor, rows: Tensor, mask: Tensor) -> Tensor:
    """logits[R, V] with -inf in rows[N] wherever bit v % 32 of word v // 32 of mask[N, W] int32 is 0."""
    bit = torch.ones(32, dtype=torch.int32, device=mask.device) << torch.arange(32, device=mask.device).int()
    barred = ((mask[:, :, None] & bit) == 0).flatten(1)[:, : logits.shape[1]]
    return logits.index_copy(0, rows, logits[rows].masked_fill_(barred, -torch.inf))


@op("native")
def bar(logits: Tensor, rows: Tensor, mask: Tensor) -> Tensor:
    """What `allow` gives, in logits[R, V] themselves."""
    logits[rows] = allow.reference(logits[rows], torch.arange(len(rows), device=rows.device), mask)
    return logits


@op("native")
def best_allowed(logits: Tensor, rows: Tensor, mask: Tensor) -> Tensor:
    """The first of the largest of logits[R, V] in rows[N], of those that mask[N, W] leaves -> [N] int64."""
    return allow.reference(logits[rows], torch.arange(len(rows), device=rows.device), mask).argmax(-1)
