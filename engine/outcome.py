"""Outcome: what a step produced on a rank, some of which isn't known yet when the next step begins."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

from kvasir.engine.event import TokenLogprob
from kvasir.engine.step import Candidate, Result


@dataclass
class Part:
    """The rows that one forward sampled."""

    token_ids: Sequence[int]
    scores: Sequence[TokenLogprob | None] = ()
    """As many, or none when nobody asked."""
    ended: Future[dict[int, str | None]] | None = None
    """row -> see `Result.ended`, once the grammars have taken the tokens in."""
    stuck: dict[int, str] = field(default_factory=dict)
    offers: dict[int, Sequence[Candidate]] = field(default_factory=dict)


@dataclass
class Outcome:
    """Of one step. Any thread may ask for its result, and waits for it."""

    step: int
    parts: list[Part] = field(default_factory=list)
    prompt_scores: dict[int, Sequence[TokenLogprob]] = field(default_factory=dict)
    pooled: dict[int, Sequence[float]] = field(default_factory=dict)

    @property
    def token_ids(self) -> list[int]:
        """What was sampled, in the order of the slices."""
        return [token for part in self.parts for token in part.token_ids]

    def result(self) -> Result:
        """All of it."""
        scores: list[TokenLogprob | None] = []
        ended: dict[int, str | None] = {}
        offers: dict[int, Sequence[Candidate]] = {}
        count = 0
        for part in self.parts:
            over: dict[int, str | None] = {} if part.ended is None else part.ended.result()
            ended |= {count + row: why for row, why in (over | part.stuck).items()}
            offers |= {count + row: found for row, found in part.offers.items()}
            count += len(part.token_ids)
            scores += part.scores or [None] * len(part.token_ids)
        kept = scores if any(scores) else ()
        return Result(self.step, self.token_ids, kept, self.prompt_scores, ended, self.pooled, offers)
