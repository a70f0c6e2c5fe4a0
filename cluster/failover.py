"""Streams that outlive the groups which serve them: prompt and delivered tokens are resubmitted to a living group.

What a token is depends on the request, its seed and the tokens before it alone. So the continuation is the one that would
have been, and the reader sees a pause.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import TypeGuard

from kvasir.cluster.group_client import Placement
from kvasir.cluster.group_stream import Stream
from kvasir.cluster.merged import Merged
from kvasir.engine.errors import DeadlineError, KvasirError, OverloadedError, UnavailableError
from kvasir.engine.event import Event, Failed, Finished, FinishReason, Timing, Token
from kvasir.engine.request import Request

PAUSE_S = (0.05, 0.5)
"""First and longest pause between two looks for a group."""
MAX_DEATHS = 3
"""So many groups in a row die before one makes a token for a request; then it may be to blame, and fails."""


@dataclass(frozen=True, slots=True)
class Failover:
    """What a request does when its group dies."""

    place: Callable[[Request], Placement]
    """A living group for it. Raises UnavailableError."""
    timeout_s: float = 0.0
    """How long it waits for a group that takes it; 0: it fails with its group."""
    stage: Callable[[], AbstractContextManager[None]] = nullcontext
    """Around the wait."""


class LastingStream:
    """Events of one request, whichever groups they come from: `start`, read `batch`es, `close`.

    The events of a step come in one message: a continuation whose end wasn't delivered has more to come, unless it was
    aborted from this side.
    """

    def __init__(self, request: Request, failover: Failover) -> None:
        self._request, self._failover = request, failover
        self._stream: Stream | None = None
        self._parts: _Parts | None = None
        self._placement: Placement | None = None
        self._live: dict[int, list[int]] = {index: [] for index in range(request.sampling.streams)}
        """Continuations that haven't ended -> their tokens so far."""
        self._aborted: dict[int, FinishReason] = {}
        self._failed: Failed | None = None
        """Its group died of this, and nothing has been done about it yet."""
        self._deaths = self._attempts = 0
        self._began, self._queued, self._first_token, self._earlier = time.monotonic(), time.time(), 0.0, 0.0
        self._closed = False

    @property
    def placement(self) -> Placement:
        """Where it runs, or ran last."""
        assert self._placement is not None, "start comes first"
        return self._parts.placement if self._parts else self._placement

    async def start(self) -> None:
        """Submit it. Raises the KvasirError with which it is refused; at once when no group is alive."""
        deadline, pause = time.monotonic() + self._failover.timeout_s, PAUSE_S[0]
        while True:
            placement = self._failover.place(self._request)
            try:
                await self._submit(placement)
                return
            except UnavailableError:  # it died just now: the next look finds another one, or says that there is none
                if time.monotonic() + pause > deadline:
                    raise
            await asyncio.sleep(pause)
            pause = min(2 * pause, PAUSE_S[1])

    async def batch(self) -> list[Event]:
        """All events that are here, at least one; none when the stream has ended."""
        while self._live and not self._closed:
            if self._parts is not None:
                return await self._parts.batch()
            if self._failed is not None:
                events = await self._go_on(self._failed)
            else:
                assert self._stream is not None, "start comes first"
                events = self._living(await self._stream.batch())
            if events:
                return self._noted(events)
        return []

    def abort(self, index: int | None = None, reason: FinishReason = "abort") -> None:
        """End continuation `index`, or all; its `Finished` still comes."""
        self._aborted |= {one: reason for one in self._live if index in (None, one)}
        if self._parts is not None:
            self._parts.abort(index, reason)
        elif self._stream is not None:
            self._stream.abort(index, reason)

    def close(self) -> None:
        """The reader goes away: abort what still runs, hold nothing."""
        self._closed = True
        if self._parts is not None:
            self._parts.close()
        if self._stream is not None:
            self._stream.close()

    async def _submit(self, placement: Placement) -> None:
        self._stream = await placement.submit()
        self._placement = placement
        if self._closed:
            self._stream.close()
        for index, reason in self._aborted.items():  # while it was asked
            self._stream.abort(index, reason)

    def _living(self, events: list[Event]) -> list[Event]:
        """What the group says; its death is put aside."""
        if not events:
            self._closed = True
        elif self._is_death(last := events[-1]):
            self._failed, self._deaths = last, self._deaths + 1
            events.pop()
        return events

    def _is_death(self, event: Event) -> TypeGuard[Failed]:
        return isinstance(event, Failed) and event.code == UnavailableError.code and self._failover.timeout_s > 0

    def _noted(self, events: list[Event]) -> list[Event]:
        """The events, remembered."""
        self._first_token = self._first_token or time.time()
        for place, event in enumerate(events):
            if isinstance(event, Token):
                self._live[event.index] += event.token_ids
                self._deaths = 0
            elif isinstance(event, Finished):
                self._live.pop(event.index, None)
                events[place] = self._dated(event)
            else:
                self._live.clear()
        return events

    def _dated(self, event: Finished) -> Finished:
        """With the times of the whole request. When its first group began with it, only that group knew."""
        if not self._attempts:
            return event
        of, queued = event.timing, self._queued
        begin = (queued, self._earlier) if self._earlier else (of.scheduled, of.first_token)
        return replace(event, timing=Timing(queued, *begin, of.finished))

    async def _go_on(self, failed: Failed) -> list[Event]:
        """Let another group take over; what it can't is ended by the events that this returns."""
        if ended := [(index, reason) for index, reason in self._aborted.items() if index in self._live]:
            return [self._end(index, reason) for index, reason in ended]
        if self._deaths >= MAX_DEATHS:
            return [replace(failed, message=f"{failed.message}; so did the {self._deaths - 1} before it")]
        self._failed = None
        if self._request.sampling.streams == 1 or self._untouched:
            return await self._resubmit(failed)
        self._parts = _Parts({index: self._part(index, failed) for index in self._live})
        return []

    @property
    def _untouched(self) -> bool:
        """Nothing was delivered."""
        return len(self._live) == self._request.sampling.streams and not any(self._live.values())

    def _end(self, index: int, reason: FinishReason) -> Finished:
        """What its group would have said had it lived."""
        made = len(self._request.resume_token_ids) + len(self._live[index])
        timing = Timing(self._queued, self._queued, self._first_token, time.time())
        return Finished(self._request.request_id, index, reason, output_tokens=made, timing=timing)

    def _part(self, index: int, failed: Failed) -> LastingStream:
        """One continuation, from where it is, as a request of its own."""
        request, sampling = self._request, self._request.sampling
        scores = None if index or self._live[index] else sampling.prompt_logprobs
        alone = replace(sampling, n=1, best_of=None, seed=_nth(sampling.seed, index), prompt_logprobs=scores)
        if sampling.streams > sampling.n:  # the best are chosen by them
            alone = replace(alone, logprobs=sampling.logprobs or 0)
        own = replace(
            request,
            request_id=f"{request.request_id}.{index}",
            sampling=alone,
            resume_token_ids=(*request.resume_token_ids, *self._live[index]),
        )
        part = LastingStream(own, self._failover)
        part._failed, part._deaths, part._placement = failed, self._deaths, self._placement
        part._began, part._queued, part._first_token = self._began, self._queued, self._first_token
        return part

    def _again(self) -> Request:
        """The request behind what was delivered of it."""
        request, sampling, told = self._request, self._request.sampling, any(self._live.values())
        self._attempts += 1
        self._earlier = self._first_token
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

    async def _resubmit(self, failed: Failed) -> list[Event]:
        """Until a group takes it; else what is to be said instead."""
        limit, pause = self._failover.timeout_s, PAUSE_S[0]
        deadline = time.monotonic() + limit
        with self._failover.stage():
            while not self._closed:
                try:
                    await self._submit(self._failover.place(self._again()))
                    return []
                except (UnavailableError, OverloadedError) as error:  # who was accepted waits, however full it is
                    why = f"{failed.message}; no other took it within {limit:g} s (--failover-timeout): {error.message}"
                except KvasirError as error:
                    return [replace(failed, code=error.code, message=error.message)]
                if time.monotonic() + pause > deadline:
                    return [replace(failed, message=why)]
                await asyncio.sleep(pause)
                pause = min(2 * pause, PAUSE_S[1])
        return []


class _Parts:
    """The continuations of a request whose group died: index -> its stream."""

    def __init__(self, streams: Mapping[int, LastingStream]) -> None:
        self._indexes, self._streams = [*streams], [*streams.values()]
        self._merged = Merged(self._streams)
        self._open = len(streams)

    @property
    def placement(self) -> Placement:
        return self._streams[-1].placement

    async def batch(self) -> list[Event]:
        while self._open > 0:
            number, events = await self._merged.next()
            if events:
                return [self._named(event, number) for event in events]
            self._open -= 1
        return []

    def abort(self, index: int | None, reason: FinishReason) -> None:
        for one, stream in zip(self._indexes, self._streams, strict=True):
            if index in (None, one):
                stream.abort(None, reason)

    def close(self) -> None:
        self._open = 0
        self._merged.close()
        for stream in self._streams:
            stream.close()

    def _named(self, event: Event, number: int) -> Event:
        """As the whole request has it. What the first one of them left in the cache is no hit of the others."""
        if isinstance(event, Finished):
            cached = 0 if number else event.cached_tokens
            return replace(event, index=self._indexes[number], cached_tokens=cached)
        return replace(event, index=self._indexes[number]) if isinstance(event, Token) else event


def _nth(seed: int | None, index: int) -> int:
    """The seed with which continuation `index` draws, as SamplingParams takes it."""
    assert seed is not None, "the gateway chooses one"
    return (seed + index + 2**63) % 2**64 - 2**63
