"""How fast each pair of a head's dimensions turns: the frequencies behind a Rope's facts."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from kvasir.engine.spec import Dynamic, Linear, Llama3, LongRope, Rope, Yarn
from kvasir.kernels.rope import Turning


def turning(rope: Rope) -> Turning:
    """The frequencies of sequences up to `rope.original_len` tokens."""
    plain = _plain(rope.theta, rope.dim)
    match rope.scaling:
        case Linear(factor=factor):
            return Turning(plain / factor)
        case Llama3() as scaling:
            return Turning(_llama3(plain, scaling))
        case Yarn() as scaling:
            return Turning(_yarn(plain, rope, scaling), scaling.magnitude)
        case LongRope() as scaling:
            return Turning(plain / torch.tensor(scaling.short), scaling.short_magnitude)
        case _:
            return Turning(plain)


def stretched_turning(rope: Rope, max_len: int) -> Turning:
    """The same for longer sequences, when at most `max_len` tokens are served."""
    match rope.scaling:
        case Dynamic(factor=factor, original_len=original, doubling=doubling):
            ratio = max(max_len, original) / original
            growth = factor * (2 ** math.ceil(math.log2(ratio)) if doubling else ratio) - (factor - 1)
            return Turning(_plain(rope.theta * growth ** (rope.dim / (rope.dim - 2)), rope.dim))
        case LongRope() as scaling:
            return Turning(_plain(rope.theta, rope.dim) / torch.tensor(scaling.long), scaling.long_magnitude)
        case _:
            return turning(rope)


def _plain(theta: float, dim: int) -> Tensor:
    """Radians per position [dim / 2] in float32: theta^(-2i / dim)."""
    return 1.0 / theta ** (torch.arange(0, dim, 2).float() / dim)


def _llama3(plain: Tensor, s: Llama3) -> Tensor:
    turns = s.original_len * plain / (2 * math.pi)
    kept = ((turns - s.low) / (s.high - s.low)).clamp(0, 1)
    return plain / s.factor * (1 - kept) + plain * kept


def _yarn(plain: Tensor, rope: Rope, s: Yarn) -> Tensor:
    """Dimensions that turn more than `fast` times within the original length stay, those below `slow` are stretched."""

    def border(turns: float) -> float:
        return rope.dim * math.log(s.original_len / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = border(s.fast), border(s.slow)
    if s.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rope.dim - 1)
    stretched = ((torch.arange(rope.dim // 2).float() - low) / (max(high - low, 0.001))).clamp(0, 1)
    return plain / s.factor * stretched + plain * (1 - stretched)
