"""Streams of events as one: what is read of a request, and several of it side by side."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Protocol

from kvasir.engine.event import Event, FinishReason


class EventStream(Protocol):
    """The events of one request."""

    async def batch(self) -> Sequence[Event]:
        """All events that are here, at least one; none when the stream has ended."""

    def abort(self, index: int | None = None, reason: FinishReason = "abort") -> None:
        """End continuation `index`, or all; its `Finished` still comes."""

    def close(self) -> None:
        """The reader goes away."""


class Merged:
    """Several streams read as one. Holds one batch at most: for slow readers the streams have their own limit."""

    def __init__(self, streams: Sequence[EventStream]) -> None:
        self._queue: asyncio.Queue[tuple[int, Sequence[Event] | Exception]] = asyncio.Queue(maxsize=1)
        self._tasks = [asyncio.ensure_future(self._pump(number, stream)) for number, stream in enumerate(streams)]

    async def next(self) -> tuple[int, Sequence[Event]]:
        """(stream's number, its events); no events: that stream has ended. Raises what a stream raises."""
        number, events = await self._queue.get()
        if isinstance(events, Exception):
            raise events
        return number, events

    def close(self) -> None:
        """Who waits is told that a stream has ended."""
        for task in self._tasks:
            task.cancel()
        if self._queue.empty():
            self._queue.put_nowait((0, ()))

    async def _pump(self, number: int, stream: EventStream) -> None:
        try:
            while events := await stream.batch():
                await self._queue.put((number, events))
        except Exception as error:  # whoever reads has to know
            await self._queue.put((number, error))
        else:
            await self._queue.put((number, ()))
