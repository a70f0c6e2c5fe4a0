"""Stream: the events of one request, as a group sends them. Belongs to one asyncio loop."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable

from kvasir.cluster.member import Reservation
from kvasir.engine.errors import KvasirError, UnavailableError
from kvasir.engine.event import Event, Failed, Finished, FinishReason, Token
from kvasir.engine.request import Request


class Stream:
    """Events of one request, one by one or in batches: ends behind the last `Finished`, or behind `Failed`.

    Holds at most `limit` events for a reader that is slow; then the request is aborted and fails as overloaded.
    """

    def __init__(self, request: Request, limit: int, send_abort: Callable[[int | None, FinishReason], None]) -> None:
        self.request_id = request.request_id
        self._remaining = request.sampling.streams
        self._limit = limit
        self._send_abort = send_abort
        self._events: deque[Event] = deque()
        self._wakeup: asyncio.Future[None] | None = None
        self._answer: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._reservation: Reservation | None = None
        self._interrupted = False
        self.on_leave: Callable[[], None] = lambda: None
        """Called when the group's role changes, or when it drains."""

    @property
    def complete(self) -> bool:
        """Nothing more will come from the group."""
        return self._remaining <= 0

    def abort(self, index: int | None = None, reason: FinishReason = "abort") -> None:
        """End continuation `index`, or all; its `Finished` still comes."""
        if not self.complete:
            self._send_abort(index, reason)

    def close(self) -> None:
        """The reader goes away: abort what still runs, hold nothing."""
        self.abort()
        self._remaining = 0
        self._events.clear()
        self._release()
        self._wake()

    def __aiter__(self) -> Stream:
        return self

    async def __anext__(self) -> Event:
        if not self._events:
            await self._some()
        if self._events:
            return self._events.popleft()
        raise StopAsyncIteration

    async def batch(self) -> list[Event]:
        """All events that are here, at least one; none when the stream has ended."""
        if not self._events:
            await self._some()
        events = [*self._events]
        self._events.clear()
        return events

    async def ready(self) -> Event | None:
        """The first event, once it is here: it can still be read. None: the stream has ended."""
        if not self._events:
            await self._some()
        return self._events[0] if self._events else None

    def interrupt(self) -> None:
        """Whoever has read all events gets none once, as if the stream had ended; it isn't `complete`."""
        self._interrupted = True
        self._wake()

    def left(self) -> list[Event]:
        """What was never read."""
        return [*self._events]

    async def _some(self) -> None:
        """Wait for events, for the end, or for an interruption."""
        while not self._events and self._remaining > 0:
            if self._interrupted:
                self._interrupted = False
                return
            self._wakeup = asyncio.get_running_loop().create_future()
            await self._wakeup

    def _push(self, event: Event) -> None:
        """Take an event from the group."""
        if self._remaining <= 0:
            return
        if isinstance(event, Token):
            if len(self._events) >= self._limit:
                self.abort()
                why = f"the client reads too slowly: {self._limit} events are waiting"
                event = Failed(self.request_id, "overloaded", why)
                self._remaining = 0
        elif isinstance(event, Finished):
            self._remaining -= 1
        else:
            self._remaining = 0
        self._events.append(event)
        if self._reservation is not None:
            self._reservation.streams()
            if self._remaining <= 0:
                self._release()
        self._wake()

    def _wake(self) -> None:
        if self._wakeup and not self._wakeup.done():
            self._wakeup.set_result(None)

    def _answered(self, error: KvasirError | None) -> None:
        """The group took the request, or refused it."""
        if error is None and not self._answer.done():
            self._answer.set_result(None)
        elif error is not None and not self._answer.done():
            self._remaining = 0
            self._release()
            self._answer.set_exception(error)

    def _release(self) -> None:
        """The group has nothing to do for it any more."""
        if self._reservation is not None:
            self._reservation.settle()
            self._reservation = None

    def _break(self, why: str) -> None:
        """The group is gone."""
        self._answered(UnavailableError(why, retry_after_s=1.0))
        self._push(Failed(self.request_id, "unavailable", why))
