"""Rotation alone, by Triton: for latent attention, and where a norm comes between it and the cache."""

from __future__ import annotations

from torch import Tensor

from kvasir.kernels import rope as plain
from kvasir.kernels.cache_triton import run
from kvasir.kernels.rope import Angles


def rotate(x: Tensor, angles: Angles, *, interleaved: bool = False) -> Tensor:
    """As the definition says."""
    if x.dim() != 3:
        return plain.rotate.reference(x, angles, interleaved=interleaved)
    return run(x, None, angles, interleaved=interleaved)
