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
    return _angles(ragged.positions, frequencies, magnitude, dtype, interleaved)


def _angles(
    positions: Tensor, frequencies: Tensor, magnitude: Tensor | float, dtype: torch.dtype, interleaved: bool
) -> Angles:
    angles = positions[:, None, None].float() * frequencies
    cos, sin = (angles.cos() * magnitude).to(dtype), (angles.sin() * magnitude).to(dtype)
    if interleaved:
        return cos.repeat_interleave(2, -1), torch.stack((-sin, sin), -1).flatten(-2)
    return torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)


class Dial:
    """On a CPU the angles of the first positions are worked out once and looked up: 5 us a step instead of 23 (Zen 4), and no
    threads that wake for a cosine."""

    KEPT = 16_384
    """Positions beyond this are worked out anew in each step."""

    def __init__(self, turning: Turning, dtype: torch.dtype, *, interleaved: bool) -> None:
        self._turning, self._dtype, self._interleaved = turning, dtype, interleaved
        self._angles: Angles | None = None

    def angles(self, positions: Tensor, longest: int) -> Angles | None:
        """As `rope_angles` has them, of positions[T] below `longest`; None: too many."""
        if longest > self.KEPT:
            return None
        if self._angles is None or len(self._angles[0]) < longest:
            every = torch.arange(min(self.KEPT, max(1024, 2 * longest)), device=positions.device)
            self._angles = _angles(
                every, self._turning.frequencies, self._turning.magnitude, self._dtype, self._interleaved
            )
        cos, sin = self._angles
        return cos.index_select(0, positions), sin.index_select(0, positions)


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
