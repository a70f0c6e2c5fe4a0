"""Stream: the events of one request, as a group sends them. Belongs to one asyncio loop."""

from __future__ import annotations

import asyncio
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
        self._events: list[Event] = []
        self._loop = asyncio.get_running_loop()
        self._wakeup: asyncio.Future[None] | None = None
        self._answer: asyncio.Future[None] = self._loop.create_future()
        self._reservation: Reservation | None = None
        self._interrupted = False
        self.taker: Callable[[list[Event]], bool] = lambda events: False
        """Asked to take a batch while the reader waits for one: what is to be done with it may cost less than to wake the
        reader. False: it is the reader's."""
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
        if await self.ready() is None:
            raise StopAsyncIteration
        return self._events.pop(0)

    async def batch(self) -> list[Event]:
        """All events that are here, at least one; none when the stream has ended."""
        while (events := self.take()) is None:
            await self.news()
        return events

    def take(self) -> list[Event] | None:
        """As `batch`, without waiting: None when there is nothing yet."""
        if not self._events and self._remaining > 0:
            if not self._interrupted:
                return None
            self._interrupted = False
        events, self._events = self._events, []
        return events

    def news(self) -> asyncio.Future[None]:
        """Done as soon as `take` may say something else."""
        self._wakeup = self._loop.create_future()
        return self._wakeup

    async def ready(self) -> Event | None:
        """The first event, once it is here: it can still be read. None: the stream has ended."""
        self._events = await self.batch()
        return self._events[0] if self._events else None

    def interrupt(self) -> None:
        """Whoever has read all events gets none once, as if the stream had ended; it isn't `complete`."""
        self._interrupted = True
        self._wake()

    def left(self) -> list[Event]:
        """What was never read."""
        return [*self._events]

    def _push(self, event: Event) -> None:
        """Take an event from the group."""
        self._add(event)
        self._deliver()

    def _add(self, event: Event) -> bool:
        """Take one of several events, behind which `_deliver` is called. Whether it is the request's last."""
        if self._remaining <= 0:
            return True
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
        if self._reservation is not None and self._reservation.tokens:
            self._reservation.streams()
        if self._remaining > 0:
            return False
        self._release()
        return True

    def _deliver(self) -> None:
        """The reader gets what was added, if it waits."""
        if self._wakeup is None:
            return
        events, self._events = self._events, []  # what is done with them may bring more
        if not events or not self.taker(events):
            self._events = events
            self._wake()

    def _wake(self) -> None:
        wakeup, self._wakeup = self._wakeup, None
        if wakeup is not None and not wakeup.done():
            wakeup.set_result(None)

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
