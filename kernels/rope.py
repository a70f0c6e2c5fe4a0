"""Rotary position embedding (Su et al. 2021, arXiv:2104.09864)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kvasir.kernels.op import op
from kvasir.kernels.ragged import Ragged

Angles = tuple[Tensor, Tensor]
"""cos and sin [T, 1, dim] of every row; sin is negative where a pair's first half is, so that `rotate` needs no split."""


@dataclass(frozen=True, eq=False)
class Turning:
    """How fast the pairs of a head turn: radians per position, `frequencies`[dim / 2] in float32."""

    frequencies: Tensor
    magnitude: float = 1.0
    """cos and sin are multiplied by this."""

    def to(self, device: torch.device) -> Turning:
        return Turning(self.frequencies.to(device), self.magnitude)


def rope_angles(
    ragged: Ragged, turning: Turning, stretched: Turning, dtype: torch.dtype, *, interleaved: bool = False
) -> Angles:
    """Angles of a step's rows in float32, rounded to dtype once. Rows of stretched sequences turn as `stretched` says."""
    frequencies: Tensor = turning.frequencies
    magnitude: Tensor | float = turning.magnitude
    if ragged.stretched is not None:
        long = ragged.stretched[:, None, None]
        frequencies = torch.where(long, stretched.frequencies, frequencies)
        magnitude = torch.where(long, stretched.magnitude, turning.magnitude)
    angles = ragged.positions[:, None, None].float() * frequencies
    cos, sin = (angles.cos() * magnitude).to(dtype), (angles.sin() * magnitude).to(dtype)
    if interleaved:
        return cos.repeat_interleave(2, -1), torch.stack((-sin, sin), -1).flatten(-2)
    return torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)


@op("triton")
def rotate(x: Tensor, angles: Angles, *, interleaved: bool = False) -> Tensor:
    """x[T, H, D] with its first `dim` numbers turned by `angles`[T, 1, dim]: x[i] pairs with x[i + dim / 2], or with its
    neighbour when interleaved."""
    cos, sin = angles
    dim = cos.shape[-1]
    if dim < x.shape[-1]:
        return torch.cat((rotate(x[..., :dim], angles, interleaved=interleaved), x[..., dim:]), -1)
    partner = x.reshape(*x.shape[:-1], -1, 2).flip(-1).flatten(-2) if interleaved else x.roll(dim // 2, -1)
    return torch.addcmul(x * cos, partner, sin)
