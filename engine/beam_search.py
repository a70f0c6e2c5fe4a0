"""BeamSearch: which continuations of a prompt are likely as a whole. It knows no blocks and no seats.

The rules are those of transformers' `generate`: every live beam offers its likeliest next tokens; the best `width` of all that
don't end live on; those that end, if among the best `width`, are kept by score / length ** length_penalty.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from kvasir.engine.event import FinishReason, TokenLogprob
from kvasir.engine.request import SamplingParams
from kvasir.engine.step import Candidate


@dataclass(frozen=True, slots=True)
class Beam:
    """One continuation so far."""

    token_ids: tuple[int, ...] = ()
    score: float = 0.0
    """Sum of log probabilities, with the request's biases and penalties."""
    logprobs: tuple[TokenLogprob, ...] = ()
    """Of each token, when asked for."""

    def then(self, candidate: Candidate) -> Beam:
        """With one more token; the candidate's score counts from the prompt on."""
        token, score, logprob = candidate
        return Beam((*self.token_ids, token), score, self.logprobs if logprob is None else (*self.logprobs, logprob))


@dataclass(frozen=True, slots=True)
class Ending:
    """A continuation that is complete."""

    beam: Beam
    score: float
    reason: FinishReason
    stop_token_id: int | None = None


class BeamSearch:
    """`live` beams, best first; `endings` that were found, best first. `limit`: tokens of the longest continuation."""

    def __init__(self, sampling: SamplingParams, stops: Collection[int], limit: int) -> None:
        self.live = [Beam()]
        self.endings: list[Ending] = []
        self._width, self._stops, self._limit = sampling.continuations, stops, limit
        self._penalty, self._patience = sampling.length_penalty, sampling.early_stopping

    def advance(self, offers: Sequence[Sequence[Candidate]]) -> list[tuple[int, int]]:
        """Each live beam's likeliest next tokens -> (number of the old beam, token) of the new ones; none: it is over."""
        length = len(self.live[0].token_ids) + 1
        found = [
            (number, (token, beam.score + score, logprob))
            for number, (beam, offer) in enumerate(zip(self.live, offers, strict=True))
            for token, score, logprob in offer
        ]
        found.sort(key=lambda entry: -entry[1][1])
        ends = [length >= self._limit or candidate[0] in self._stops for _, candidate in found]
        for (number, candidate), end in list(zip(found, ends, strict=True))[: self._width]:
            if end:
                self._end(self.live[number].then(candidate))
        going = [entry for entry, end in zip(found, ends, strict=True) if not end][: self._width]
        self.live = [self.live[number].then(candidate) for number, candidate in going]
        if not going or self._settled(length):
            return []
        return [(number, candidate[0]) for number, candidate in going]

    def best(self, count: int) -> list[Ending]:
        """Up to `count` continuations; fewer where there are no more, as under a grammar."""
        return self.endings[:count]

    def _end(self, beam: Beam) -> None:
        token = beam.token_ids[-1]
        stop = token if token in self._stops else None
        score = beam.score / len(beam.token_ids) ** self._penalty
        self.endings.append(Ending(beam, score, "length" if stop is None else "stop", stop))
        self.endings.sort(key=lambda ending: -ending.score)
        del self.endings[self._width :]

    def _settled(self, length: int) -> bool:
        """Nothing better is expected: by early_stopping as soon as there are enough endings ("yes"), when the best live beam
        would be worse than all if it ended now ("no"), or could be nowhere better ("never")."""
        if len(self.endings) < self._width:
            return False
        if self._patience == "yes":
            return True
        reached = self._limit if self._patience == "never" and self._penalty > 0 else length
        best: float = self.live[0].score / reached**self._penalty
        return best <= self.endings[-1].score
