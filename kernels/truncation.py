"""Truncations of a distribution that need it sorted: tail-free, locally typical, nucleus and Mirostat.

Each takes values[R, K], log weights in descending order (-inf: dropped already, anywhere), and drops more; a row that doesn't
use one passes its neutral value. Letters: R rows, K candidates.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from kvasir.kernels.sample import mass_before

NEUTRAL_MASS = 2.0
"""A share that no sum reaches, rounded or not."""
ZIPF_TOKENS = 100
"""So many of the most likely tokens show how steep the distribution is (Mirostat 1's m)."""
LEAST_SLOPE = 1e-3
"""A flatter distribution counts as so steep: its exponent would leave float64."""


def tail_free(values: Tensor, z: Tensor) -> Tensor:
    """Drops the tail: candidates from where the second derivatives of the sorted probabilities, taken absolutely and
    normalised, add up to more than z[R] (Bricken 2019, "Tail Free Sampling"; borders as in llama.cpp). Neutral: 2."""
    if values.shape[-1] <= 2:
        return values
    count = (values > -torch.inf).sum(-1, keepdim=True)
    place = torch.arange(values.shape[-1], device=values.device)
    p = values.softmax(-1).double()
    bends = p.diff(n=2).abs() * (place[:-2] < count - 2)
    total = bends.sum(-1, keepdim=True)
    level = 1 / (count - 2).clamp(min=1) * (place[:-2] < count - 2)
    sums = torch.where(total > 1e-6, bends / total.clamp(min=1e-300), level).cumsum(-1)
    kept = ((sums <= z[:, None]).cumprod(-1)).sum(-1, keepdim=True).clamp(min=1)
    kept = torch.where((z[:, None] >= 1) | (kept >= count - 2), count, kept)
    return values.masked_fill(place >= kept, -torch.inf)


def typical(values: Tensor, mass: Tensor) -> Tensor:
    """Keeps the smallest set of candidates whose surprise is nearest to the entropy that holds mass[R] (Meister et al. 2022,
    arXiv:2202.00666). Neutral: 2."""
    log_p = values.log_softmax(-1)
    p = log_p.exp()
    entropy = -torch.where(p > 0, p * log_p, 0.0).sum(-1, keepdim=True)
    distance, order = (-log_p - entropy).abs().sort(dim=-1, stable=True)
    before = mass_before(p.gather(-1, order))
    last = (before < mass[:, None]).sum(-1, keepdim=True).clamp(min=1) - 1
    dropped = (-log_p - entropy).abs() > distance.gather(-1, last)
    return values.masked_fill(dropped & (mass[:, None] < 1), -torch.inf)


def nucleus(values: Tensor, mass: Tensor) -> Tensor:
    """Keeps the smallest set of the most likely whose sum reaches mass[R] (`draw`'s top_p). Neutral: 2."""
    return values.masked_fill(mass_before(values.softmax(-1)) >= mass[:, None], -torch.inf)


def surprises(values: Tensor) -> Tensor:
    """-log2 of the candidates' probabilities, [R, K] float64."""
    return -values.double().log_softmax(-1) / math.log(2)


def mirostat(values: Tensor, most: Tensor, version: Tensor, vocab: int) -> Tensor:
    """Drops what would be too surprising, where most[R] bits is what is tolerated (Basu et al. 2021, arXiv:2007.14966).

    Version 2 drops candidates that are more surprising; 1 keeps as many as a Zipf distribution of the `vocab` tokens with
    the slope of the most likely ones would need; 0 does nothing. The most likely candidate stays.
    """
    bits = surprises(values)
    above = (bits > most[:, None]) & (version[:, None] == 2)
    rank = (values > -torch.inf).cumsum(-1) - 1
    above |= (rank >= _zipf_count(values, most, vocab)[:, None]) & (version[:, None] == 1)
    return values.masked_fill(above & (bits > bits.amin(-1, keepdim=True)), -torch.inf)


def _zipf_count(values: Tensor, most: Tensor, vocab: int) -> Tensor:
    """k = (e 2^most / (1 - vocab^-e))^(1/s) with e = s - 1, and s estimated by least squares; [R] float64."""
    head = values.topk(min(ZIPF_TOKENS, values.shape[-1])).values.double()  # what was dropped may stand among them
    falls = head[:, :-1] - head[:, 1:]
    place = torch.arange(falls.shape[-1], device=values.device, dtype=torch.float64)
    steps = ((place + 2) / (place + 1)).log()
    there = head[:, 1:] > -torch.inf
    slope = (torch.where(there, falls * steps, 0.0).sum(-1)) / (there * steps**2).sum(-1).clamp(min=1e-300)
    slope = slope.clamp(min=LEAST_SLOPE)
    e = slope - 1
    near_one = e.abs() < 1e-6
    shape = torch.where(
        near_one, 1 / math.log(vocab), e / -torch.expm1(-torch.where(near_one, 1.0, e) * math.log(vocab))
    )
    power = (shape.log() + most * math.log(2)) / slope
    return power.clamp(min=0, max=40).exp().round()


def truncated(
    x: Tensor,
    *,
    top_k: Tensor,
    tfs_z: Tensor | None = None,
    typical_p: Tensor | None = None,
    top_p: Tensor | None = None,
    most: Tensor | None = None,
    version: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Log weights x[R, V] -> (values[R, V] of the candidates in descending order, ids[R, V], bits[R, V] of surprise before
    Mirostat's own truncation). Applied in the order of the arguments, each to what the one before has left; None is the same
    as neutral in every row, in no time. Without Mirostat nobody needs bits, and they are None."""
    values, ids = x.sort(dim=-1, descending=True, stable=True)
    rank = torch.arange(values.shape[-1], device=values.device)
    values = values.masked_fill(rank >= top_k[:, None], -torch.inf)
    for rule, share in ((tail_free, tfs_z), (typical, typical_p), (nucleus, top_p)):
        if share is not None:
            values = rule(values, share)
    if most is None or version is None:
        return values, ids, None
    return mirostat(values, most, version, x.shape[-1]), ids, surprises(values)
