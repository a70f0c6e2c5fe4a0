"""Trails: rules that look back at a sequence's tokens, or name some of the vocabulary, for all seats that have any."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kvasir.engine.batch import Ints, send
from kvasir.engine.request import SamplingParams
from kvasir.engine.step import NewSequence
from kvasir.engine.trail import Trail
from kvasir.engine.words import Spellings
from kvasir.kernels.bitmask import allow
from kvasir.kernels.sample import penalise

PENALTIES = ("repetition_penalty", "presence_penalty", "frequency_penalty")
Words = npt.NDArray[np.int32]


class Trails:
    """Nothing is kept of seats without such a rule, and a step without any costs one look."""

    def __init__(self, vocab: int, device: torch.device) -> None:
        self._vocab, self._device = vocab, device
        self._seats: dict[int, Trail] = {}
        self._windowed: dict[int, tuple[float, ...]] = {}
        """seat -> its penalties, when they don't look at everything"""
        self._allowed: dict[int, Words] = {}

    def enter(self, new: NewSequence, barred: Spellings, spared: Collection[int]) -> None:
        """A sequence takes a seat."""
        seat, sampling = new.seat, new.sampling
        for kept in (self._seats, self._windowed, self._allowed):
            kept.pop(seat, None)
        if looks_back(sampling):
            self._windowed[seat] = tuple(getattr(sampling, name) for name in PENALTIES)
        if seat in self._windowed or barred:
            window = None if sampling.repeat_last_n < 0 else sampling.repeat_last_n
            self._seats[seat] = Trail(new.token_ids, new.prompt_len, barred=barred, window=window, spared=spared)
        if sampling.allowed_token_ids:
            self._allowed[seat] = _mask(sampling.allowed_token_ids, self._vocab)

    def penalise(self, logits: Tensor, seats: Ints) -> Tensor:
        """logits[R, V] of the sequences in `seats` after the penalties of those with windows."""
        if not self._windowed:
            return logits
        return self._penalise(
            logits, [(row, seat) for row, seat in enumerate(seats.tolist()) if seat in self._windowed]
        )

    def bar(self, logits: Tensor, seats: Ints) -> tuple[Tensor, list[int]]:
        """(logits[R, V] of what the sequences in `seats` may say, the rows that something is barred from)."""
        if not self._seats and not self._allowed:
            return logits, []
        taken = seats.tolist()
        barred = [(row, self._seats[seat].barred()) for row, seat in enumerate(taken) if seat in self._seats]
        barred = [(row, tokens) for row, tokens in barred if tokens]
        masks = [(row, self._allowed[seat]) for row, seat in enumerate(taken) if seat in self._allowed]
        if barred:
            rows = np.repeat([row for row, _ in barred], [len(tokens) for _, tokens in barred])
            ids = np.concatenate([tokens for _, tokens in barred]).astype(np.int64)
            logits = logits.index_put((self._tensor(rows), self._tensor(ids)), logits.new_full((), -torch.inf))
        if masks:
            rows = np.array([row for row, _ in masks])
            logits = allow(logits, self._tensor(rows), self._tensor(np.stack([words for _, words in masks])))
        return logits, sorted({row for row, _ in barred} | {row for row, _ in masks})

    def remember(self, seats: Ints, token_ids: Callable[[], Sequence[int]]) -> None:
        """The tokens that were sampled."""
        if self._seats and not self._seats.keys().isdisjoint(taken := seats.tolist()):
            for seat, token in zip(taken, token_ids(), strict=True):
                if seat in self._seats:
                    self._seats[seat].tokens.append(token)

    def _penalise(self, logits: Tensor, windowed: list[tuple[int, int]]) -> Tensor:
        """Of rows with windows only the logits of the windows' tokens are touched."""
        if not windowed:
            return logits
        found = [self._seats[seat].counted() for _, seat in windowed]
        sizes = [len(ids) for ids, _, _ in found]
        ids, counts, prompt = (np.concatenate(parts) for parts in zip(*found, strict=True))
        values = np.repeat(np.array([self._windowed[seat] for _, seat in windowed], np.float32), sizes, axis=0)
        place = self._tensor(np.repeat([row for row, _ in windowed], sizes)), self._tensor(ids)
        repetition, presence, frequency = (self._tensor(values[:, i]) for i in range(3))
        changed = penalise(
            logits[place][:, None],
            self._tensor(counts)[:, None],
            self._tensor(prompt)[:, None],
            repetition=repetition,
            presence=presence,
            frequency=frequency,
        )
        return logits.index_put(place, changed[:, 0].to(logits.dtype))

    def _tensor(self, array: npt.NDArray[np.generic] | Ints) -> Tensor:
        return send(array, self._device)


NEUTRAL_PENALTIES: Mapping[str, float] = dict(zip(PENALTIES, (1.0, 0.0, 0.0), strict=True))


def penalized(sampling: SamplingParams) -> bool:
    """It has a penalty."""
    return any(getattr(sampling, name) != neutral for name, neutral in NEUTRAL_PENALTIES.items())


def looks_back(sampling: SamplingParams) -> bool:
    """It has penalties that don't look at all tokens."""
    return penalized(sampling) and (sampling.repeat_last_n >= 0 or not sampling.penalize_newline)


def _mask(token_ids: Sequence[int], vocab: int) -> Words:
    """Bit v % 32 of word v // 32 says whether token v is among `token_ids`."""
    bits = np.zeros(-(-vocab // 32) * 32, np.uint8)
    bits[list(token_ids)] = 1
    return np.packbits(bits, bitorder="little").view("<i4").astype(np.int32)
