"""Streamed answers, each with an id: who knows it may cancel it, and read it again from any event if that was asked for.

An answer whose client sent `kvasir-resumable: true` goes on while nobody reads it. It is kept for a while, in memory, by
the gateway that began it; the id says which one that is.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping, Sequence

from kvasir.cluster.auth import ApiKeys
from kvasir.engine.errors import ClientError, KvasirError, ServerError

log = logging.getLogger(__name__)

RESUMABLE = "kvasir-resumable"
"""Header, or metadata of a gRPC call."""
STREAM_ID = "kvasir-stream-id"
"""Header of the answer, or its initial metadata."""
PIECE_BYTES = 64 * 2**10
"""About what a reader gets at a time: who reads slowly mustn't have a copy of all."""
_WORDS = {"true": True, "1": True, "false": False, "0": False, "": False}


class StreamNotFoundError(ClientError):
    """No such stream, or it is another key's."""

    code = "stream_not_found"
    status = 404


class EventsGoneError(ClientError):
    """The events that were asked for aren't held any more."""

    code = "events_gone"
    status = 410


class StreamCancelledError(ClientError):
    """Who knows the stream's id cancelled it."""

    code = "cancelled"
    status = 499


class Recording:
    """One streamed answer. `events` are kept only when it is resumable."""

    def __init__(self, recordings: Recordings, owner: bytes, resumable: bool) -> None:
        self.id = f"{recordings.gateway}-{secrets.token_hex(16)}"
        self.owner = owner
        """Of the key that began it."""
        self.resumable = resumable
        self.kind = b""
        """Content type of what the events make up."""
        self.running = False
        """Its events are being recorded."""
        self.size = 0
        """Bytes of the events that are held."""
        self.readers = 0
        self.on_end: Callable[[], None] = lambda: None
        """Called when it is recorded to its end."""
        self.on_cancel: Callable[[KvasirError], None] = lambda _: None
        """Makes its source raise the error."""
        self.failed: Callable[[KvasirError], bytes] = lambda _: b""
        """What tells HTTP clients of an error in mid-stream."""
        self._recordings = recordings
        self._events: list[bytes] = []
        self._lost = 0
        self._ended = False
        self._error: KvasirError | None = None
        self._waiting: list[asyncio.Future[None]] = []
        self._task: asyncio.Task[None] | None = None
        self._timer: asyncio.TimerHandle | None = None

    @property
    def count(self) -> int:
        """Events so far; the first one is number 1."""
        return self._lost + len(self._events)

    @property
    def ended(self) -> bool:
        return self._ended

    def open(self, kind: bytes, failed: Callable[[KvasirError], bytes] = lambda _: b"") -> None:
        """The answer begins: from now on its id is known."""
        self.kind, self.failed = kind, failed
        self._recordings.hold(self)

    def record(self, source: AsyncIterator[Sequence[bytes]]) -> None:
        """Take all events of `source`, whether anybody reads them or not."""
        self.running = True
        self._task = asyncio.get_running_loop().create_task(self._record(source))

    def add(self, events: Sequence[bytes]) -> None:
        """What its source brings beside what is read of it."""
        self._events += events
        grown = sum(map(len, events))
        self.size += grown
        self._recordings.grown(self, grown)
        self._wake()

    def check(self, after: int) -> None:
        """Raise unless it can be read from behind event number `after`."""
        if after > self.count:
            raise ClientError(f"after is {after}, and this stream has {self.count} events so far", param="after")
        if after < self._lost:
            text = f"events {after + 1} to {self._lost} are no longer held (--stream-memory); read it sooner"
            raise EventsGoneError(text, param="after")

    async def read(self, after: int) -> AsyncGenerator[Sequence[bytes], None]:
        """Events behind number `after`, as they come; to be closed. Raises what ended it before it was complete."""
        self._join()
        try:
            while True:
                self.check(after)
                if after < self.count:
                    events = self._piece(after)
                    after += len(events)
                    yield events
                elif not self._ended:
                    self._waiting.append(news := asyncio.get_running_loop().create_future())
                    await news
                elif self._error is not None:
                    raise self._error
                else:
                    return
        finally:
            self._leave()

    def _piece(self, after: int) -> Sequence[bytes]:
        """Some of the events behind number `after`."""
        first = end = after - self._lost
        size = 0
        while end < len(self._events) and size < PIECE_BYTES:
            size += len(self._events[end])
            end += 1
        return self._events[first:end]

    def trim(self) -> None:
        """Forget the older half of the events."""
        half = -(-len(self._events) // 2)
        self.size -= sum(map(len, self._events[:half]))
        self._lost += half
        del self._events[:half]

    def close(self) -> None:
        """Nobody will read it: abort what still runs."""
        self._stop_timer()
        if self._task is not None and self.running:
            self._task.cancel()

    async def _record(self, source: AsyncIterator[Sequence[bytes]]) -> None:
        try:
            async for events in source:
                self.add(events)
        except KvasirError as error:
            self._error = error
        except Exception:  # readers mustn't wait for ever, whatever happened
            log.exception("a stream failed")
            self._error = ServerError("internal error; the server's log says more")
        finally:
            self.running, self._ended = False, True
            self._wake()
            self.on_end()
            self._start_timer()

    def _wake(self) -> None:
        waiting, self._waiting = self._waiting, []
        for news in waiting:
            if not news.done():
                news.set_result(None)

    def _join(self) -> None:
        self.readers += 1
        self._stop_timer()

    def _leave(self) -> None:
        self.readers -= 1
        self._start_timer()

    def _start_timer(self) -> None:
        """From now on, if nobody reads it, it is kept for so long."""
        self._stop_timer()
        if not self.readers:
            later = asyncio.get_running_loop().call_later
            self._timer = later(self._recordings.ttl_s, self._recordings.drop, self)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


class Recordings:
    """All streams of one gateway. `max_bytes`: of the events of all of them together."""

    def __init__(
        self, keys: ApiKeys | None = None, *, ttl_s: float = 60.0, max_bytes: int = 64 * 2**20, gateway: str = ""
    ) -> None:
        self.gateway = gateway or secrets.token_hex(4)
        self.ttl_s = ttl_s
        self._keys = keys or ApiKeys(())
        self._max_bytes = max_bytes
        self._bytes = 0
        self._held: dict[str, Recording] = {}

    def new(self, headers: Mapping[str, str]) -> Recording:
        """For a call with these headers (lower case). ClientError when `kvasir-resumable` is neither true nor false."""
        given = headers.get(RESUMABLE, "")
        if (resumable := _WORDS.get(given.lower())) is None:
            raise ClientError(f"{RESUMABLE} must be true or false, got {given!r:.60}", param=RESUMABLE)
        return Recording(self, self._owner(headers), resumable)

    def hold(self, recording: Recording) -> None:
        """From now on its id is known."""
        self._held[recording.id] = recording

    def drop(self, recording: Recording) -> None:
        """Its id is known no more; what runs for it alone ends."""
        self._forget(recording)
        recording.close()

    def find(self, stream_id: str, headers: Mapping[str, str]) -> Recording:
        """Raises StreamNotFoundError, for those that belong to another key, too."""
        recording = self._held.get(stream_id)
        if recording is None or recording.owner != self._owner(headers):
            ended = (
                f"ended, over {self.ttl_s:g} s ago (--stream-ttl) or without {RESUMABLE}: true in its request's headers"
            )
            ways = f"{ended}; was cancelled; never was; or is another API key's"
            raise StreamNotFoundError(f"there is no stream {stream_id!r:.80}: it {ways}")
        return recording

    def resumed(self, stream_id: str, after: int, headers: Mapping[str, str], kinds: Sequence[bytes]) -> Recording:
        """The one that can be read from behind event `after`, and is of one of these kinds."""
        recording = self.find(stream_id, headers)
        if not recording.resumable:
            raise ClientError(
                f"stream {stream_id!r} isn't kept: send {RESUMABLE}: true with its request", param=RESUMABLE
            )
        if recording.kind not in kinds:
            spoken = recording.kind.decode()
            raise ClientError(f"stream {stream_id!r} is {spoken}: resume it by the protocol that began it")
        recording.check(after)
        return recording

    def cancel(self, stream_id: str, headers: Mapping[str, str]) -> None:
        """End it: its readers are told. Raises StreamNotFoundError."""
        recording = self.find(stream_id, headers)
        recording.on_cancel(StreamCancelledError("the stream was cancelled by its id"))
        if recording.running:  # who reads it hears of it
            self._forget(recording)
        else:
            self.drop(recording)

    def is_elsewhere(self, stream_id: str) -> bool:
        """Another gateway began it."""
        return not stream_id.startswith(f"{self.gateway}-")

    def need_here(self, stream_id: str) -> None:
        """StreamNotFoundError where another gateway began it. A gRPC channel stays with one of those that share a port; after a
        new connection it may be another."""
        if self.is_elsewhere(stream_id):
            text = f"stream {stream_id!r:.80} wasn't begun by this gateway: connect again until it is, or begin anew"
            raise StreamNotFoundError(text)

    def grown(self, recording: Recording, count: int) -> None:
        """It holds `count` bytes more: others may have to go."""
        if recording.id not in self._held:
            return
        self._bytes += count
        while self._bytes > self._max_bytes:
            self._shrink()

    def _shrink(self) -> None:
        """Those that have ended go first; else the largest loses what is oldest of it."""
        ended = next((one for one in self._held.values() if one.ended and not one.readers), None)
        if ended is not None:
            self.drop(ended)
            return
        largest = max(self._held.values(), key=lambda one: one.size)
        self._bytes -= largest.size
        largest.trim()
        self._bytes += largest.size

    def _forget(self, recording: Recording) -> None:
        """Its id is known no more; who reads it reads on."""
        if self._held.pop(recording.id, None) is not None:
            self._bytes -= recording.size

    def _owner(self, headers: Mapping[str, str]) -> bytes:
        return self._keys.owner(headers.get("authorization"), headers.get("x-api-key"))
