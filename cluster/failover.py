"""Streams that outlive the groups which serve them: prompt and delivered tokens are resubmitted to a living group.

What a token is depends on the request, its seed and the tokens before it alone. So the continuation is the one that would
have been, and the reader sees a pause.

A group that drains, or that only computes prompts, hands its streams over in the same way, without the pause: it goes on
until the next one has its first token. What both have made is compared; where the two differ (bfloat16 rounds a prompt
otherwise than one token at a time), the next one begins again behind what was delivered.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import TypeGuard

from kvasir.cluster.group_client import Placement
from kvasir.cluster.group_stream import Stream
from kvasir.cluster.heirs import Heirs
from kvasir.cluster.overlap import Differs, Overlap
from kvasir.cluster.parts import Parts
from kvasir.cluster.progress import Progress
from kvasir.engine.errors import ERRORS, KvasirError, OverloadedError, ServerError, UnavailableError
from kvasir.engine.event import Event, Failed, Finished, FinishReason, Token
from kvasir.engine.request import Request

WHOLE = -1
MOVE_PAUSE_S = (0.05, 2.0)
"""First and longest pause between two tries to move."""
MOVE_TRIES, MAX_AHEAD = 3, 4
"""A group that was so many tokens behind when it was ready is asked again: it has most of it then. At the last try it
takes over anyhow."""
MIN_LEFT = 8
"""A stream with fewer tokens to come isn't worth a move."""
PAUSE_S = (0.05, 0.5)
"""First and longest pause between two looks for a group."""
MAX_DEATHS = 3
"""So many groups in a row die before one makes a token for a request; then it may be to blame, and fails."""


@dataclass(frozen=True, slots=True)
class Failover:
    """What a request does when its group dies."""

    place: Callable[[Request, Placement | None], Placement]
    """A living group for it, of the version of where it was begun. Raises UnavailableError."""
    timeout_s: float = 0.0
    """How long it waits for a group that takes it; 0: it fails with its group."""
    stage: Callable[[], AbstractContextManager[None]] = nullcontext
    """Around the wait."""
    move: Callable[[Request, Placement], Placement] | None = None
    """Another group for a request that runs; None: it stays where it is. Raises UnavailableError."""
    moved: Callable[[str, Placement, float], None] = lambda why, to, seconds: None
    """Told of every move: why, where to, and how long it was prepared."""


class LastingStream(Progress):
    """Events of one request, whichever groups they come from: `start`, read `batch`es, `close`.

    The events of a step come in one message: a continuation whose end wasn't delivered has more to come, unless it was
    aborted from this side.
    """

    def __init__(self, request: Request, failover: Failover) -> None:
        super().__init__(request)
        self._failover = failover
        self._stream: Stream | None = None
        self._parts: Parts | None = None
        self._placement: Placement | None = None
        self._failed: Failed | None = None
        """Its group died of this, and nothing has been done about it yet."""
        self._deaths = 0
        self._mover: asyncio.Task[None] | None = None
        self._trying = False
        self._heirs: Heirs[LastingStream] | None = None
        """They go on as soon as what its group has made is read."""
        self._overlap = Overlap({})
        """What the group before has delivered, and this one makes once more."""
        self._closed = False
        self._take: Callable[[list[Event]], None] | None = None
        self._free: Callable[[], bool] = lambda: False
        self._broken: Exception | None = None
        """What `_take` raised."""

    @property
    def placement(self) -> Placement:
        """Where it runs, or ran last."""
        assert self._placement is not None, "start comes first"
        return self._parts.placement if self._parts else self._placement

    @property
    def _running(self) -> tuple[Placement, Stream]:
        assert self._placement is not None, "start comes first"
        assert self._stream is not None, "start comes first"
        return self._placement, self._stream

    async def start(self) -> None:
        """Submit it. Raises the KvasirError with which it is refused; at once when no group is alive."""
        deadline, pause = time.monotonic() + self._failover.timeout_s, PAUSE_S[0]
        while True:
            placement = self._failover.place(self._request, None)
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
                stream = self._stream
                assert stream is not None, "start comes first"
                while (taken := stream.take()) is None:  # as its `batch`, which would be one more coroutine per token
                    await stream.news()
                events = taken
                if not events or not isinstance(events[-1], Token) or self._origin is not None:
                    events = self._living(events)
            if events:
                return self._noted(events)
        if self._broken is not None:
            raise self._broken
        return []

    def pour(self, take: Callable[[list[Event]], None], free: Callable[[], bool]) -> None:
        """Give batches of tokens that come while `batch` is awaited to `take`, as long as it is `free`. To wake whoever
        awaits them costs as much as all that is done with them. What `take` raises is raised by `batch`."""
        self._take, self._free = take, free

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
        self._stay()
        if self._parts is not None:
            self._parts.close()
        if self._stream is not None:
            self._stream.close()

    async def _submit(self, placement: Placement) -> None:
        self._attach(placement, await placement.submit())

    def _attach(self, placement: Placement, stream: Stream) -> None:
        """Read from this one from now on."""
        self._placement, self._stream = placement, stream
        stream.on_leave, stream.taker = self._consider, self._poured
        if self._closed:
            stream.close()
        for index, reason in self._aborted.items():  # while it was asked
            stream.abort(index, reason)
        self._consider()

    def _living(self, events: list[Event]) -> list[Event]:
        """What the group says; its death is put aside."""
        if not events and self._heirs is not None:
            self._hand_over(self._heirs)
        elif not events:
            self._closed = self._stream is None or self._stream.complete
        elif self._is_death(last := events[-1]):
            self._failed, self._deaths = last, self._deaths + 1
            events.pop()
        return events if self._origin is None else self._fresh(events)

    def _poured(self, events: list[Event]) -> bool:
        """Whether a batch was given to `_take`. Ends, and groups that take over, need more than that."""
        if self._take is None or self._origin is not None or not isinstance(events[-1], Token) or not self._free():
            return False
        try:
            self._take(self._noted(events))
        except Exception as error:  # it concerns this request alone; who called has the events of all
            self._broken = error
            self.close()
        return True

    def _is_death(self, event: Event) -> TypeGuard[Failed]:
        return isinstance(event, Failed) and event.code == UnavailableError.code and self._failover.timeout_s > 0

    def _noted(self, events: list[Event]) -> list[Event]:
        """The events, remembered."""
        first, self._first_token = not self._first_token, self._first_token or time.time()
        for place, event in enumerate(events):
            if isinstance(event, Token):
                self._live[event.index] += event.token_ids
                self._deaths = 0
            elif isinstance(event, Finished):
                self._live.pop(event.index, None)
                events[place] = self._dated(event)
            else:
                self._live.clear()
        if not self._live:
            self._stay()
        elif first:
            self._consider()
        return events

    async def _go_on(self, failed: Failed) -> list[Event]:
        """Let another group take over; what it can't is ended by the events that this returns."""
        if ended := [(index, reason) for index, reason in self._aborted.items() if index in self._live]:
            return [self._end(index, reason) for index, reason in ended]
        if self._mover is not None and self._trying and self._deaths < MAX_DEATHS:  # another group is about to have it
            await asyncio.wait([self._mover])
        if self._heirs is not None:
            self._failed = None
            self._hand_over(self._heirs)
            return []
        if self._mover is not None:  # asleep until its next try, that was for the group which is gone
            self._mover.cancel()
            self._mover = None
        if self._deaths >= MAX_DEATHS:
            return [replace(failed, message=f"{failed.message}; so did the {self._deaths - 1} before it")]
        self._failed = None
        if self._request.sampling.streams == 1 or self._untouched:
            return await self._resubmit(failed)
        self._parts = Parts({index: self._part(index, failed) for index in self._live})
        return []

    def _part(self, index: int, failed: Failed) -> LastingStream:
        """One continuation, from where it is, as a request of its own."""
        part = LastingStream(self._alone(index), self._failover)
        part._failed, part._deaths, part._placement = failed, self._deaths, self._placement
        part._began, part._queued, part._first_token = self._began, self._queued, self._first_token
        part._earlier, part._resumed = self._first_token, True
        return part

    async def _resubmit(self, failed: Failed) -> list[Event]:
        """Until a group takes it; else what is to be said instead."""
        limit, pause = self._failover.timeout_s, PAUSE_S[0]
        deadline = time.monotonic() + limit
        with self._failover.stage():
            while not self._closed:
                try:
                    request = self._again()
                    self._earlier, self._resumed = self._first_token, True
                    begun = self._placement if request.resume_token_ids else None
                    await self._submit(self._failover.place(request, begun))
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

    # -- to another group, while this one goes on

    def _consider(self) -> None:
        """Look for another group if this one wants to be rid of it."""
        if self._mover is None and self._heirs is None and self._why_move:
            self._mover = asyncio.ensure_future(self._move())
            self._mover.add_done_callback(self._settled)

    def _settled(self, mover: asyncio.Task[None]) -> None:
        if self._mover is mover:
            self._mover = None

    @property
    def _why_move(self) -> str:
        """Why its group wants to be rid of it; empty: it stays."""
        if self._placement is None or self._failover.move is None or self._failed or self._closed or not self._live:
            return ""
        if self._deaths >= MAX_DEATHS:
            return ""
        made = max(map(len, self._live.values()))
        why = "" if self._parts else self._placement.client.sheds(made > 0)
        limit = self._request.sampling.max_tokens
        short = limit is not None and limit - len(self._request.resume_token_ids) - made < MIN_LEFT
        return "" if short and why == "prefill" else why

    async def _move(self) -> None:
        """Until another group is ready to go on."""
        pause, began = MOVE_PAUSE_S[0], time.monotonic()
        while why := self._why_move:
            self._trying = True
            try:
                self._heirs = await self._find_heirs()
            except KvasirError:  # they are full, or there is none now
                self._trying = False
                if self._failed:  # its reader waits for this one try
                    return
                await asyncio.sleep(pause)
                pause = min(2 * pause, MOVE_PAUSE_S[1])
            else:
                self._running[1].interrupt()
                self._failover.moved(why, self._heirs.placement, time.monotonic() - began)
                return
            finally:
                self._trying = False

    async def _find_heirs(self) -> Heirs[LastingStream]:
        """Streams at another group, with their first tokens. Later tries have less to catch up: what was computed for the
        earlier ones is there already. Raises KvasirError."""
        left = MOVE_TRIES
        while True:
            heirs, left = self._make_heirs(), left - 1
            try:
                await asyncio.gather(*(heir._prepare(self) for heir in heirs.streams.values()))
            except BaseException:
                heirs.close()
                raise
            ahead = max((len(tokens) - heirs.told[index] for index, tokens in self._live.items()), default=0)
            if not left or ahead <= MAX_AHEAD or self._failed:
                return heirs
            heirs.close()

    def _make_heirs(self) -> Heirs[LastingStream]:
        told = {index: len(tokens) for index, tokens in self._live.items()}
        if self._request.sampling.streams == 1 or self._untouched:
            return Heirs({WHOLE: LastingStream(self._again(), self._failover)}, told)
        self._attempts += 1
        failed = Failed(self._request.request_id, UnavailableError.code, "it moves")
        return Heirs({index: self._part(index, failed) for index in self._live}, told)

    async def _prepare(self, source: LastingStream) -> None:
        """Run elsewhere than `source`, up to the first token. Raises what it fails with."""
        move = self._failover.move
        assert move is not None, "asked for by _why_move"
        self._failed = None
        self._placement = move(self._request, source.placement)
        stream = self._stream = await self._placement.submit()
        if self._closed:
            stream.close()
        event = await stream.ready()
        if event is None or isinstance(event, Failed):
            source._deaths += event is not None and event.code == UnavailableError.code
            raise ERRORS.get(event.code, ServerError)(event.message) if event else UnavailableError("it was closed")

    def _hand_over(self, heirs: Heirs[LastingStream]) -> None:
        """All that the old group made was read: the others go on."""
        (_, old), self._heirs, self._mover = self._running, None, None
        old.on_leave = lambda: None
        old.abort()
        self._origin, self._earlier, self._resumed = self._origin or old, self._earlier or self._first_token, True
        since = {index: tokens[heirs.told[index] :] for index, tokens in self._live.items()}
        if (heir := heirs.streams.get(WHOLE)) is not None:
            self._overlap = Overlap(since)
            for index in heirs.told.keys() - self._live.keys():  # they have ended meanwhile
                self._aborted[index] = "abort"
            self._attach(*heir._running)
            return
        for index in heirs.streams.keys() - self._live.keys():  # they have ended meanwhile
            heirs.streams.pop(index).close()
        for index, part in heirs.streams.items():
            part._inherit(index, old, since[index], self._aborted.get(index))
        self._parts = Parts(heirs.streams)

    def _inherit(self, index: int, origin: Stream, since: list[int], aborted: FinishReason | None) -> None:
        """Go on as the continuation `index` of `origin`, that delivered these tokens since this one was asked."""
        self._origin, self._index = origin, index
        self._live, self._overlap = {0: since}, Overlap({0: since})
        self._aborted = {0: aborted} if aborted else {}
        self._attach(*self._running)

    def _stay(self) -> None:
        """Nothing is left to be moved."""
        if self._mover is not None:
            self._mover.cancel()
        if self._heirs is not None:
            self._heirs.close()
        self._heirs = None

    def _fresh(self, events: list[Event]) -> list[Event]:
        """What comes behind the overlap, of continuations that the group before hasn't ended. Where this group says
        otherwise than that one, it has to begin again."""
        found: list[Event] = []
        try:
            for event in events:
                if isinstance(event, Token | Finished) and event.index not in self._live:
                    continue
                if isinstance(event, Finished) and event.index in self._aborted and event.index in self._overlap:
                    found.append(self._end(event.index, event.reason))
                elif (fresh := self._overlap.fresh(event)) is not None:
                    found.append(fresh)
        except Differs:
            _, stream = self._running
            stream.on_leave = lambda: None
            stream.close()
            self._overlap = Overlap({})
            self._failed = Failed(self._request.request_id, UnavailableError.code, "the next group went on otherwise")
        return found
