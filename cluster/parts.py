"""The continuations of one request as requests of their own, read as one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Protocol

from kvasir.cluster.group_client import Placement
from kvasir.cluster.merged import EventStream, Merged
from kvasir.engine.event import Event, Finished, FinishReason, Token


class Part(EventStream, Protocol):
    """The stream of one continuation."""

    @property
    def placement(self) -> Placement: ...


class Parts:
    """The continuations of a request whose group died: index -> its stream."""

    def __init__(self, streams: Mapping[int, Part]) -> None:
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
