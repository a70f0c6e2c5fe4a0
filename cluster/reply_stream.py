"""Answers of any dialect, streamed or whole. A stream has one write per step, and errors behind the first write as the
dialect has them; where its client may come back it is recorded, and the client reads the recording.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from contextlib import aclosing
from typing import Any, Protocol

from starlette.types import Send

from kvasir.cluster.generation import Generation
from kvasir.cluster.http_front import send_json, warning_header
from kvasir.cluster.recordings import RESUMABLE, STREAM_ID, Recording
from kvasir.cluster.straight import Straight
from kvasir.engine.errors import KvasirError
from kvasir.engine.transcript import Delta

SSE = (b"content-type", b"text/event-stream; charset=utf-8")
NDJSON = (b"content-type", b"application/x-ndjson")
UNBUFFERED = ((b"cache-control", b"no-cache"), (b"x-accel-buffering", b"no"))

Headers = Iterable[tuple[bytes, bytes]]
Keep = Callable[[], Awaitable[object]]


class Frames(Protocol):
    """Writes an answer piece by piece."""

    def frames(self, deltas: Sequence[tuple[int, Delta]]) -> bytes:
        """What one step brings."""

    def closing(self) -> bytes:
        """What comes behind the last step."""


async def whole(
    generation: Generation, answer: Callable[[], Any], send: Send, headers: Headers, keep: Keep | None = None
) -> None:
    """The answer in one piece, as JSON. `keep`: done before the client is told."""
    async for _ in generation:
        pass
    if keep is not None:
        await keep()
    warnings = (f"{RESUMABLE} (only streams are)",) if generation.recording.resumable else ()
    await send_json(send, 200, answer(), [*headers, *warning_header(warnings), generation.timing.header()])


async def stream(
    generation: Generation,
    reply: Frames,
    send: Straight,
    headers: Headers,
    failed: Callable[[KvasirError], bytes],
    keep: Keep | None = None,
) -> None:
    """Headers go out with the first tokens: what fails before has a status of its own; later it is `failed`'s bytes.
    When the client may come back they go out at once, since they hold the id for that. `keep`: done when the answer is
    complete, before the client is told."""
    recording, headers = generation.recording, [*headers]
    recording.open(dict(headers)[b"content-type"], failed)
    if recording.resumable:
        recording.record(_events(generation, reply, recording.kind == SSE[1], keep))
        await play(recording, 0, send, headers)
        return
    begun = False

    def put(deltas: Sequence[tuple[int, Delta]]) -> None:
        if (frames := reply.frames(deltas)) and send.line is not None:
            send.line.write(frames)

    try:
        async for deltas in generation:
            if not begun:
                await _start(send, recording, headers)
                begun = True
                if send.line is not None:
                    generation.pour(put, send.line.free)
            if frames := reply.frames(deltas):
                await send.chunk(frames)
        last = reply.closing()
        if keep is not None:
            await keep()
    except KvasirError as error:
        if not begun:
            raise
        last = failed(error)
    await send({"type": "http.response.body", "body": last})


async def play(recording: Recording, after: int, send: Straight, headers: Headers) -> None:
    """The events behind number `after`, those that are there and those to come."""
    last = b""
    await _start(send, recording, headers)
    try:
        async with aclosing(recording.read(after)) as batches:
            async for events in batches:
                await send.chunk(b"".join(events))
    except KvasirError as error:
        last = recording.failed(error)
    await send({"type": "http.response.body", "body": last})


async def _start(send: Send, recording: Recording, headers: Headers) -> None:
    start = [*headers, *UNBUFFERED, (STREAM_ID.encode(), recording.id.encode())]
    await send({"type": "http.response.start", "status": 200, "headers": start})


async def _events(
    generation: Generation, reply: Frames, sse: bool, keep: Keep | None
) -> AsyncIterator[Sequence[bytes]]:
    """The answer event by event, each server-sent one with its number."""
    recording = generation.recording

    def put(deltas: Sequence[tuple[int, Delta]]) -> None:
        if events := _cut(reply.frames(deltas), sse, recording.count):
            recording.add(events)

    generation.pour(put, lambda: True)
    async for deltas in generation:
        if events := _cut(reply.frames(deltas), sse, recording.count):
            yield events
    closing = reply.closing()
    if keep is not None:
        await keep()
    yield _cut(closing, sse, recording.count)


def _cut(frames: bytes, sse: bool, count: int) -> list[bytes]:
    """Lines of JSON, or server-sent events, to which numbers are given from `count` + 1 on."""
    if not sse:
        return frames.splitlines(keepends=True)
    return [b"id: %d\n%s\n\n" % (number, event) for number, event in enumerate(frames.split(b"\n\n")[:-1], count + 1)]
