"""Normalisation of rows: by the root of the mean square (Zhang & Sennrich 2019, arXiv:1910.07467), or LayerNorm."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kvasir.kernels.op import op


@op("native", "triton")
def rms_norm(
    x: Tensor, weight: Tensor | None, eps: float, offset: float = 0.0, mean_square: Tensor | None = None
) -> Tensor:
    """x[..., M] / rms(x) in float32, rounded to x.dtype, then times weight[M]: the order in which Llama was trained.

    With an offset the stored weight is smaller by that much, and the product is rounded instead: Gemma's order. A weight
    [H, M] holds for the last two dimensions; None is all ones. mean_square[..., 1] is given where x is a part of the rows.
    """
    y = x.float()
    y = y * torch.rsqrt((y.square().mean(-1, keepdim=True) if mean_square is None else mean_square) + eps)
    if weight is None:
        return y.to(x.dtype)
    return (y * (weight.float() + offset)).to(x.dtype) if offset else y.to(x.dtype) * weight


@op("native", "triton")
def add_rms_norm(
    x: Tensor, y: Tensor, weight: Tensor, eps: float, offset: float = 0.0, scale: float = 1.0
) -> tuple[Tensor, Tensor]:
    """(x + scale * y, its rms_norm), x and y[T, M]: a branch's result joins the residual before the next branch."""
    total = x + y if scale == 1 else x + y * scale
    return total, rms_norm.reference(total, weight, eps, offset)


@op("triton")
def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """(x[..., M] - mean) / standard deviation, times weight, plus bias, in float32 and rounded once (arXiv:1607.06450).
    A weight [H, M] holds for the last two dimensions."""
    if weight is None or weight.dim() == 1:
        return F.layer_norm(x, x.shape[-1:], weight, bias, eps)
    y = F.layer_norm(x.float(), x.shape[-1:], eps=eps) * weight.float()
    return (y if bias is None else y + bias.float()).to(x.dtype)


@op("triton")
def add_layer_norm(
    x: Tensor, y: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, scale: float = 1.0
) -> tuple[Tensor, Tensor]:
    """(x + scale * y, its layer_norm), x and y[T, M]."""
    total = x + y if scale == 1 else x + y * scale
    return total, layer_norm.reference(total, weight, bias, eps)


@op("triton")
def sum_of_squares(x: Tensor) -> Tensor:
    """x[T, M] -> [T] in float32: what norms over several ranks' parts of a row need."""
    return x.float().square().sum(-1)
