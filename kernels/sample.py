"""From logits to tokens, many rows at once and without waiting for the device.

A feature that no row uses is passed as None and costs nothing; a row that doesn't use one passes its neutral value.
Letters: R rows, V vocabulary.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kvasir.kernels.op import op

WEIGHT_BITS = 40
"""Draws take probabilities as whole multiples of 2^-40: sums of integers are exact, whatever the order of addition."""


def uniform(seeds: npt.NDArray[np.uint64], positions: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    """One number in [0, 1) for each (seed, position), and nothing else it depends on.

    Each seed is scrambled into the state of a SplitMix64 stream (Steele et al. 2014, "Fast splittable pseudorandom
    number generators"), of which the position-th number is taken, so that neighbouring seeds have unrelated streams.
    """
    state = _mix(seeds) + (positions.astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    return (_mix(state) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _mix(x: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """SplitMix64's finaliser, a bijection."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


@op("native", "triton")
def penalise(
    logits: Tensor,
    outputs: Tensor,
    prompts: Tensor | None,
    *,
    repetition: Tensor | None,
    presence: Tensor,
    frequency: Tensor,
    seats: Tensor | None = None,
) -> Tensor:
    """logits[R, V] after penalties[R]; outputs[R, V] counts a row's generated tokens, prompts[R, V] marks its prompt's. With
    seats[R] they are outputs[N, V] and prompts[N, V], and a row's are those of its seat.

    repetition r: logits of tokens that were seen anywhere become x / r when positive, else x * r (Keskar et al. 2019,
    arXiv:1909.05858). Then presence is subtracted once and frequency times the count, for generated tokens alone.
    """
    if seats is not None:
        outputs, prompts = outputs[seats], None if prompts is None else prompts[seats]
    if repetition is not None:
        seen = outputs > 0 if prompts is None else (outputs > 0) | prompts
        r = repetition[:, None]
        logits = torch.where(seen, torch.where(logits > 0, logits / r, logits * r), logits)
    return logits - frequency[:, None] * outputs - presence[:, None] * (outputs > 0)


@op("cpu", "triton")
def greedy(logits: Tensor) -> Tensor:
    """The first of the largest of logits[R, V] -> [R] int64."""
    return logits.argmax(-1)


@op("native", "cpu", "triton")
def draw(
    logits: Tensor,
    uniforms: Tensor,
    temperature: Tensor,
    *,
    min_p: Tensor | None = None,
    top_k: Tensor | None = None,
    top_p: Tensor | None = None,
    most: int = 0,
) -> Tensor:
    """One token for each row of logits[R, V] by inverting its distribution at uniforms[R] in [0, 1) -> [R] int64.

    temperature divides, min_p drops what is less likely than min_p times the most likely (Nguyen et al. 2024,
    arXiv:2407.01082), top_k all but the k most likely (`most` is the largest k), top_p all but the smallest set of the
    most likely whose sum reaches it (Holtzman et al. 2019, arXiv:1904.09751; neutral: 2, a sum may round to above 1).
    """
    x = tempered(logits, temperature, min_p)
    if top_k is None and top_p is None:
        return invert(x, uniforms)
    values, ids = x.sort(-1, descending=True) if top_k is None else x.topk(most)
    return choose(values, ids, uniforms, top_k, top_p)


def tempered(logits: Tensor, temperature: Tensor, min_p: Tensor | None) -> Tensor:
    """Log probabilities up to a constant: the best of a row is 0, so that no temperature overflows."""
    x = (logits - logits.amax(-1, keepdim=True)) / temperature[:, None]
    return x if min_p is None else x.masked_fill(x < min_p.log()[:, None], -torch.inf)


def choose(values: Tensor, ids: Tensor, uniforms: Tensor, top_k: Tensor | None, top_p: Tensor | None) -> Tensor:
    """Filter the candidates (values[R, K] descending, their ids[R, K]) and draw one's id."""
    if top_k is not None:
        rank = torch.arange(values.shape[-1], device=values.device)
        values = values.masked_fill(rank >= top_k[:, None], -torch.inf)
    if top_p is not None:
        values = values.masked_fill(mass_before(values.softmax(-1)) >= top_p[:, None], -torch.inf)
    # drawn in the order of ids: in the order of probability, two that differ by a rounding error would change places
    ids, order = ids.sort(-1)
    place = invert(values.gather(-1, order), uniforms)
    return ids.gather(-1, place[:, None])[:, 0]


def mass_before(p: Tensor) -> Tensor:
    """Sum of the probabilities in front of each, [R, K] float64."""
    exact = p.double()
    return exact.cumsum(-1) - exact


def invert(x: Tensor, uniforms: Tensor) -> Tensor:
    """The first index whose cumulated softmax of x[R, K] exceeds uniforms[R]: never one of probability 0."""
    weights = (x.softmax(-1) * 2.0**WEIGHT_BITS).long()
    sums = weights.cumsum(-1)
    target = (uniforms[:, None] * sums[:, -1:]).long()  # below the sum: a uniform is at most 1 - 2^-53
    return torch.searchsorted(sums, target, right=True)[:, 0].clamp_(max=x.shape[-1] - 1)


@op("native", "triton")
def score(logits: Tensor, tokens: Tensor, best: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of tokens[R] under logits[R, V]: log probability[R], rank[R] (1 = most likely), and the ids and log probabilities
    of the `best` most likely ones [R, best]."""
    # logsumexp of a single row is cut into threads' parts, and would differ from the same row among others
    scores = logits.log_softmax(-1)
    own = tokens[:, None]
    rank = (logits > logits.gather(-1, own)).sum(-1) + 1
    ids = logits.topk(best)[1]
    return scores.gather(-1, own)[:, 0], rank, ids, scores.gather(-1, ids)
