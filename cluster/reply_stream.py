"""A streamed answer of any dialect: one write per step, and errors behind the first write as the dialect has them."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import Protocol

from starlette.types import Send

from kvasir.cluster.generation import Generation
from kvasir.engine.errors import KvasirError
from kvasir.engine.transcript import Delta

SSE = (b"content-type", b"text/event-stream; charset=utf-8")
NDJSON = (b"content-type", b"application/x-ndjson")
UNBUFFERED = ((b"cache-control", b"no-cache"), (b"x-accel-buffering", b"no"))


class Frames(Protocol):
    """Writes an answer piece by piece."""

    def frames(self, deltas: Sequence[tuple[int, Delta]]) -> bytes:
        """What one step brings."""

    def closing(self) -> bytes:
        """What comes behind the last step."""


async def stream(
    generation: Generation,
    reply: Frames,
    send: Send,
    headers: Iterable[tuple[bytes, bytes]],
    failed: Callable[[KvasirError], bytes],
    keep: Callable[[], Awaitable[None]] | None = None,
) -> None:
    """Headers go out with the first tokens: what fails before has a status of its own; later it is `failed`'s bytes.
    `keep`: done when the answer is complete, before the client is told."""
    begun = False
    try:
        async for deltas in generation:
            if not begun:
                start = [*headers, *UNBUFFERED]
                await send({"type": "http.response.start", "status": 200, "headers": start})
                begun = True
            if frames := reply.frames(deltas):
                await send({"type": "http.response.body", "body": frames, "more_body": True})
        last = reply.closing()
        if keep is not None:
            await keep()
    except KvasirError as error:
        if not begun:
            raise
        last = failed(error)
    await send({"type": "http.response.body", "body": last})
