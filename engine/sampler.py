"""Sampler: each seat's sampling parameters and token counts, and one batched call per step (see kernels/sample.py)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from kvasir.engine.event import TokenLogprob
from kvasir.engine.request import SamplingParams
from kvasir.engine.step import NewSequence
from kvasir.kernels.sample import draw, greedy, penalise, score, uniform
from torch import Tensor

Ints = npt.NDArray[np.int64]
NEUTRAL = {
    "temperature": 1.0,
    "top_p": 1.0,
    "top_k": 0,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
}
"""A parameter at this value has no effect (temperature apart)."""
PENALTIES = ("repetition_penalty", "presence_penalty", "frequency_penalty")


class Sampler:
    """Parameters lie in one array per kind, indexed by seat, so that a step gathers them without a loop."""

    def __init__(self, max_num_seqs: int, vocab: int, device: torch.device) -> None:
        self.max_num_seqs, self.vocab, self.device = max_num_seqs, vocab, device
        self.values = {name: np.full(max_num_seqs, value, np.float64) for name, value in NEUTRAL.items()}
        self.seeds = np.zeros(max_num_seqs, np.uint64)
        self.logprobs = np.full(max_num_seqs, -1, np.int64)
        self.biased: dict[int, tuple[list[int], list[float]]] = {}
        """seat -> (token ids, what is added to their logits)"""
        self.muted: dict[int, tuple[list[int], int]] = {}
        """seat -> (stop tokens, the position from which they may appear)"""
        self.counted: set[int] = set()
        """Seats with a penalty."""
        self.in_prompt: Tensor | None = None
        self.counts: Tensor | None = None

    def enter(self, new: NewSequence) -> None:
        """A sequence takes a seat."""
        seat, sampling = new.seat, new.sampling
        for name, array in self.values.items():
            array[seat] = getattr(sampling, name)
        self.seeds[seat] = new.seed % 2**64
        self.logprobs[seat] = -1 if sampling.logprobs is None else sampling.logprobs
        for kept in (self.biased, self.muted):
            kept.pop(seat, None)
        self.counted.discard(seat)
        if sampling.logit_bias:
            self.biased[seat] = list(sampling.logit_bias), list(sampling.logit_bias.values())
        if sampling.min_tokens and new.stop_token_ids:
            self.muted[seat] = list(new.stop_token_ids), new.prompt_len + sampling.min_tokens
        if _penalized(sampling):
            self._count(new)

    def sample(self, logits: Tensor, seats: Ints, positions: Ints) -> Tensor:
        """logits[R, V] of the sequences in seats[R] -> token ids[R] for positions[R]. `logits` stay as they are."""
        logits = self._adjust(logits, seats, positions)
        cold = self.values["temperature"][seats] == 0
        if cold.all():
            return greedy(logits)
        if not cold.any():
            return self._draw(logits, seats, positions)
        tokens = greedy(logits)
        rows = np.nonzero(~cold)[0]
        index = self._tensor(rows)
        return tokens.index_copy(0, index, self._draw(logits[index], seats[rows], positions[rows]))

    def remember(self, seats: Ints, token_ids: Tensor) -> None:
        """Count new tokens of the seats that have penalties."""
        rows = [i for i, seat in enumerate(seats.tolist()) if seat in self.counted]
        if rows and self.counts is not None:
            self.counts[self._tensor(seats[rows]), token_ids[self._tensor(np.array(rows))]] += 1

    def score_sampled(self, logits: Tensor, seats: Ints, token_ids: Tensor) -> list[TokenLogprob | None]:
        """Scores of sampled tokens under the raw logits[R, V], for the seats that ask; empty when none does."""
        top = self.logprobs[seats]
        rows = np.nonzero(top >= 0)[0]
        if not len(rows):
            return []
        index = self._tensor(rows)
        scores: list[TokenLogprob | None] = [None] * len(seats)
        for row, found in zip(rows, score_rows(logits[index], token_ids[index], top[rows].tolist()), strict=True):
            scores[row] = found
        return scores

    def _draw(self, logits: Tensor, seats: Ints, positions: Ints) -> Tensor:
        """Rows that don't use a filter get its neutral value: all tokens for top_k, 2 for top_p."""
        top_k, top_p, min_p = (self.values[name][seats] for name in ("top_k", "top_p", "min_p"))
        most = np.where(top_k == 0, self.vocab, np.minimum(top_k, self.vocab)).astype(np.int64)
        return draw(
            logits,
            torch.from_numpy(uniform(self.seeds[seats], positions)).to(self.device, non_blocking=True),
            self._row(self.values["temperature"][seats]),
            min_p=self._row(min_p) if min_p.any() else None,
            top_k=self._tensor(most) if top_k.any() else None,
            top_p=self._row(np.where(top_p >= 1, 2.0, top_p)) if (top_p < 1).any() else None,
            most=int(most.max()),
        )

    def _adjust(self, logits: Tensor, seats: Ints, positions: Ints) -> Tensor:
        """Biases, muted stop tokens and penalties; a copy when anything changes."""
        biased = [(row, *self.biased[seat]) for row, seat in enumerate(seats.tolist()) if seat in self.biased]
        muted = [
            (row, self.muted[seat][0], [-torch.inf] * len(self.muted[seat][0]))
            for row, seat in enumerate(seats.tolist())
            if seat in self.muted and positions[row] < self.muted[seat][1]
        ]
        if biased or muted:
            logits = self._add(logits, biased + muted)
        if self.counted and self.counted.intersection(seats.tolist()) and any(self._used(seats, n) for n in PENALTIES):
            assert self.in_prompt is not None
            assert self.counts is not None
            index = self._tensor(seats)
            repetition, presence, frequency = (self._row(self.values[name][seats]) for name in PENALTIES)
            logits = penalise(
                logits,
                self.counts[index],
                self.in_prompt[index],
                repetition=repetition,
                presence=presence,
                frequency=frequency,
            )
        return logits

    def _add(self, logits: Tensor, additions: Sequence[tuple[int, list[int], list[float]]]) -> Tensor:
        rows = np.repeat([row for row, _, _ in additions], [len(ids) for _, ids, _ in additions])
        ids = np.concatenate([ids for _, ids, _ in additions]).astype(np.int64)
        values = torch.tensor(np.concatenate([v for _, _, v in additions]), dtype=logits.dtype, device=self.device)
        return logits.index_put((self._tensor(rows), self._tensor(ids)), values, accumulate=True)

    def _count(self, new: NewSequence) -> None:
        """Note which tokens its prompt holds, and how often its output holds each."""
        if self.counts is None or self.in_prompt is None:
            shape = (self.max_num_seqs, self.vocab)
            self.in_prompt = torch.zeros(shape, dtype=torch.bool, device=self.device)
            self.counts = torch.zeros(shape, dtype=torch.int32, device=self.device)
        tokens = torch.tensor(new.token_ids, device=self.device)
        self.counted.add(new.seat)
        self.in_prompt[new.seat] = False
        self.in_prompt[new.seat, tokens[: new.prompt_len]] = True
        self.counts[new.seat] = torch.bincount(tokens[new.prompt_len :], minlength=self.vocab)

    def _used(self, seats: Ints, name: str) -> bool:
        return bool((self.values[name][seats] != NEUTRAL[name]).any())

    def _row(self, values: npt.NDArray[np.float64]) -> Tensor:
        return torch.from_numpy(values.astype(np.float32)).to(self.device, non_blocking=True)

    def _tensor(self, array: Ints) -> Tensor:
        return torch.from_numpy(array).to(self.device, non_blocking=True)


def score_rows(logits: Tensor, token_ids: Tensor, top: Sequence[int]) -> list[TokenLogprob]:
    """Scores of token_ids[R] under logits[R, V], each with its own number of likeliest tokens."""
    own, rank, ids, values = (t.tolist() for t in score(logits, token_ids, max(top)))
    return [
        TokenLogprob(own[i], rank[i], tuple(zip(ids[i][:count], values[i][:count], strict=True)))
        for i, count in enumerate(top)
    ]


def _penalized(sampling: SamplingParams) -> bool:
    return any(getattr(sampling, name) != NEUTRAL[name] for name in PENALTIES)
