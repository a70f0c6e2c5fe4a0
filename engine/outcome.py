"""Outcome: what a step produced on a rank, some of which isn't known yet when the next step begins."""

from __future__ import annotations

import threading
import time
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


NAP_S = 50e-6
"""How often it is looked whether a device is done: a thread that spins takes Python's lock from the one that launches."""


class Patience:
    """Waits for a device whose kernels may wait for another rank: for `limit_s`, and no longer once the group is given up."""

    def __init__(self, limit_s: float) -> None:
        self._limit_s, self._over = limit_s, threading.Event()

    def end(self) -> None:
        """Any thread: whoever waits gets an error."""
        self._over.set()

    def wait(self, arrived: torch.cuda.Event) -> None:
        """RuntimeError when that is in vain, or the device was freed by giving up: what it has then means nothing."""
        begin = time.monotonic()
        while True:
            done: bool = arrived.query()  # type: ignore[no-untyped-call]
            if self._over.is_set():
                raise RuntimeError("another rank is gone, or gave up: what the device has means nothing")
            if done:
                return
            if time.monotonic() - begin > self._limit_s:
                raise RuntimeError(f"timed out: the device isn't done after {self._limit_s:g} s (--collective-timeout)")
            self._over.wait(NAP_S)


class Copy:
    """A tensor on its way to the host: whoever reads `values` waits for it, the device for nobody."""

    def __init__(self, tensor: Tensor, patience: Patience | None = None) -> None:
        self._host, self._arrived, self._patience = tensor, None, patience
        if tensor.is_cuda:
            self._host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            self._host.copy_(tensor, non_blocking=True)
            self._arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._arrived.record()

    @cached_property
    def values(self) -> list[Any]:
        """As nested lists."""
        if self._arrived is not None and self._patience is not None:
            self._patience.wait(self._arrived)
        elif self._arrived is not None:
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
