"""Low-rank adapters of a batch whose rows use different ones (Hu et al. 2021, arXiv:2106.09685; Punica, arXiv:2310.18547).

Letters: T rows, A adapters, R rank, I inputs, O outputs. A row of adapter -1 uses none.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvasir.kernels.op import op


@op("triton")
def shrink(x: Tensor, down: Tensor, adapter: Tensor, *, deterministic: bool = False) -> Tensor:
    """x[T, I] times down[A, R, I] of its adapter[T] -> [T, R] float32; zeros without one."""
    out = torch.zeros(len(x), down.shape[1], dtype=torch.float32, device=x.device)
    for number, matrix in enumerate(down):
        rows = (adapter == number).nonzero()[:, 0]
        out[rows] = x[rows].float() @ matrix.float().t()
    return out


@op("triton")
def expand(h: Tensor, up: Tensor, adapter: Tensor, scales: Tensor, out: Tensor, *, deterministic: bool = False) -> None:
    """Adds scales[A] times h[T, R] up[A, O, R] of its adapter[T] to out[T, O], in place; `shrink` gave h.

    h is rounded to the type of `up` first. out may be a part of wider rows: the outputs of one of several stacked matrices.
    """
    for number, matrix in enumerate(up):
        rows = (adapter == number).nonzero()[:, 0]
        part = h[rows].to(up.dtype).float() @ matrix.float().t() * scales[number]
        out[rows] = (out[rows].float() + part).to(out.dtype)
