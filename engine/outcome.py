"""Outcome: what a step produced on a rank, some of which isn't known yet when the next step begins."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from kvasir.engine.event import TokenLogprob
from kvasir.engine.step import Candidate, Result

Scores = Sequence["TokenLogprob | None"]


class Copy:
    """A tensor on its way to the host: whoever reads `values` waits for it, the device for nobody."""

    def __init__(self, tensor: Tensor) -> None:
        self._host, self._arrived = tensor, None
        if tensor.is_cuda:
            self._host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            self._host.copy_(tensor, non_blocking=True)
            self._arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._arrived.record()

    @cached_property
    def values(self) -> list[Any]:
        """As nested lists."""
        if self._arrived is not None:
            self._arrived.synchronize()
        found: list[Any] = self._host.tolist()
        return found


@dataclass
class Part:
    """The rows that one forward sampled."""

    sampled: Copy
    """[R] token ids."""
    scores: Callable[[], Scores]
    """As many, or none when nobody asked."""
    ended: Future[dict[int, str | None]] | None = None
    """row -> see `Result.ended`, once the grammars have taken the tokens in."""
    stuck: Callable[[], dict[int, str]] = dict
    """row -> why its rules leave no token"""
    offers: dict[int, Callable[[], list[Candidate]]] = field(default_factory=dict)
    """row -> what its beam offers"""

    @property
    def token_ids(self) -> list[int]:
        return self.sampled.values


@dataclass
class Outcome:
    """Of one step. Any thread may ask for its tokens and its result, and waits for them."""

    step: int
    parts: list[Part] = field(default_factory=list)
    prompt_scores: list[tuple[int, Callable[[], Sequence[TokenLogprob]]]] = field(default_factory=list)
    """(seat, scores of some prompt tokens of its sequence), in their order."""
    pooled: dict[int, Sequence[float]] = field(default_factory=dict)
    spoiled: Sequence[int] = ()

    @property
    def token_ids(self) -> list[int]:
        """What was sampled, in the order of the slices."""
        return [token for part in self.parts for token in part.token_ids]

    def result(self) -> Result:
        """All of it."""
        scores: list[TokenLogprob | None] = []
        ended: dict[int, str | None] = {}
        offers: dict[int, Sequence[Candidate]] = {}
        prompts: dict[int, Sequence[TokenLogprob]] = {}
        count = 0
        for part in self.parts:
            over: dict[int, str | None] = {} if part.ended is None else part.ended.result()
            ended |= {count + row: why for row, why in (over | part.stuck()).items()}
            offers |= {count + row: found() for row, found in part.offers.items()}
            count += len(part.token_ids)
            scores += part.scores() or [None] * len(part.token_ids)
        for seat, some in self.prompt_scores:
            prompts[seat] = [*prompts.get(seat, ()), *some()]
        kept = scores if any(scores) else ()
        return Result(self.step, self.token_ids, kept, prompts, ended, self.pooled, offers, self.spoiled)
