"""Rotary position embedding (Su et al. 2021, arXiv:2104.09864), halves of a head paired as in GPT-NeoX."""

from __future__ import annotations

import torch
from torch import Tensor


def rope_angles(positions: Tensor, frequencies: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin[T, 1, D] of positions[T] x frequencies[D / 2], in float32, rounded to dtype once.

    sin is negative in its first half, so that `rotate` needs no split: it is the same for every layer of a step.
    """
    angles = positions[:, None, None].float() * frequencies
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    return torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x[T, H, D] turned by the angles of `rope_angles`: the pair (x[i], x[i + D / 2]) by angle i."""
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin)
