"""Experts by torch's grouped product (CUTLASS's on Hopper and Blackwell)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kvasir.kernels.activation import gated
from kvasir.kernels.activation import plain as ungated
from kvasir.kernels.groups import Groups
from kvasir.kernels.measured import kind_of_gpu

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 4e-2}
"""As Triton's."""
ALIGNED = 16
"""Bytes in a row of a matrix, a multiple."""
LIMITS = "bfloat16, without biases, matrices of multiples of 8 rows and columns, not with --deterministic"


def absent() -> str:
    """Why it can't be had in this process; empty: it can."""
    gpu = kind_of_gpu()
    if not gpu.startswith(("sm_9", "sm_10")):
        return f"its grouped product runs on the GPU alone from Hopper to Blackwell (sm_90 to sm_10x), not on {gpu or 'none'}"
    return ""


def unfit(
    x: Tensor,
    index: Tensor,
    weight: Tensor,
    up: Tensor,
    down: Tensor,
    *,
    up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    deterministic: bool = False,
    **_: Any,
) -> str:
    """Why it can't do this call; empty: it can."""
    if x.dtype != torch.bfloat16 or up.dtype != x.dtype:
        return "it takes bfloat16 alone"
    if up_bias is not None or down_bias is not None:
        return "it knows no biases"
    if deterministic:
        return "how it adds up may depend on how many rows there are"
    if any(size * x.itemsize % ALIGNED for size in (*up.shape[1:], *down.shape[1:])):
        return f"it takes matrices whose rows are multiples of {ALIGNED} bytes"
    return ""


def stacked_experts(
    x: Tensor,
    index: Tensor,
    weight: Tensor,
    up: Tensor,
    down: Tensor,
    *,
    activation: str,
    limit: float | None = None,
    gate: bool = True,
    on_input: bool = False,
    first: int = 0,
    **_: Any,
) -> Tensor:
    """As the definition says, of calls that aren't `unfit`."""
    rows, k = index.shape
    if not rows:
        return x
    groups = Groups.of(index.flatten() - first, len(up))
    ends, weight = groups.ends.int(), weight.to(x.dtype)
    y = x[groups.order // k]
    if on_input:
        y *= weight.flatten()[groups.order, None]
    y = F.grouped_mm(y, up.transpose(1, 2), offs=ends)
    y = gated(y, activation, limit) if gate else ungated(y, activation)
    y = F.grouped_mm(y, down.transpose(1, 2), offs=ends)
    elsewhere = torch.arange(rows * k, device=x.device) >= ends[-1]  # they come last, and nothing was written there
    y.masked_fill_(elsewhere[:, None], 0)
    y = torch.empty_like(y).index_copy_(0, groups.order, y).view(rows, k, -1)
    return y.sum(1) if on_input else y.mul_(weight[..., None]).sum(1)
