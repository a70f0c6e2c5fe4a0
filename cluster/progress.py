"""How far a request has come, whichever groups work on it: what goes on with it elsewhere, and what its reader is told."""

from __future__ import annotations

import time
from dataclasses import replace

from kvasir.cluster.group_stream import Stream
from kvasir.engine.errors import DeadlineError
from kvasir.engine.event import Finished, FinishReason, Timing
from kvasir.engine.request import Request


class Progress:
    """A request and what was delivered of it."""

    def __init__(self, request: Request) -> None:
        self._request = request
        self._live: dict[int, list[int]] = {index: [] for index in range(request.sampling.streams)}
        """Continuations that haven't ended -> their tokens so far."""
        self._aborted: dict[int, FinishReason] = {}
        self._attempts = 0
        self._began, self._queued, self._first_token, self._earlier = time.monotonic(), time.time(), 0.0, 0.0
        self._resumed = False
        """Tokens came from more than one group."""
        self._origin: Stream | None = None
        """Of the first group, that was told to end, where this was continuation `_index`; None: it has the same number."""
        self._index: int | None = None

    def _dated(self, event: Finished) -> Finished:
        """With the times of the whole request. When its first group began with it, only that group knew."""
        if not self._resumed:
            return event
        of, queued = event.timing, self._queued
        begin = (queued, self._earlier) if self._earlier else (of.scheduled, of.first_token)
        left = self._origin.left() if self._origin is not None else []
        index = event.index if self._index is None else self._index
        first = next((one for one in left if isinstance(one, Finished) and one.index == index), event)
        return replace(event, cached_tokens=first.cached_tokens, timing=Timing(queued, *begin, of.finished))

    @property
    def _untouched(self) -> bool:
        """Nothing was delivered."""
        return len(self._live) == self._request.sampling.streams and not any(self._live.values())

    def _end(self, index: int, reason: FinishReason) -> Finished:
        """What its group would have said had it lived."""
        made = len(self._request.resume_token_ids) + len(self._live[index])
        timing = Timing(self._queued, self._queued, self._first_token, time.time())
        return Finished(self._request.request_id, index, reason, output_tokens=made, timing=timing)

    def _alone(self, index: int) -> Request:
        """One continuation, from where it is, as a request of its own."""
        request, sampling = self._request, self._request.sampling
        scores = None if index or self._live[index] else sampling.prompt_logprobs
        alone = replace(sampling, n=1, best_of=None, seed=_nth(sampling.seed, index), prompt_logprobs=scores)
        if sampling.streams > sampling.n:  # the best are chosen by them
            alone = replace(alone, logprobs=sampling.logprobs or 0)
        return replace(
            request,
            request_id=f"{request.request_id}.{self._attempts}.{index}",
            sampling=alone,
            resume_token_ids=(*request.resume_token_ids, *self._live[index]),
        )

    def _again(self) -> Request:
        """The request behind what was delivered of it."""
        request, sampling, told = self._request, self._request.sampling, any(self._live.values())
        self._attempts += 1
        left = request.deadline_s
        if left is not None and (left := left - (time.monotonic() - self._began)) <= 0:
            raise DeadlineError("the request's deadline passed when its group had died")
        return replace(
            request,
            request_id=f"{request.request_id}.{self._attempts}",
            sampling=replace(sampling, prompt_logprobs=None) if told else sampling,
            resume_token_ids=(*request.resume_token_ids, *self._live[0]) if told else request.resume_token_ids,
            deadline_s=left,
        )


def _nth(seed: int | None, index: int) -> int:
    """The seed with which continuation `index` draws, as SamplingParams takes it."""
    assert seed is not None, "the gateway chooses one"
    return (seed + index + 2**63) % 2**64 - 2**63
