"""The way of a streamed answer's chunks: straight to the connection, past all that is wrapped around the application.

What is around it (the framework's handlers of errors, CORS, ids of requests) wraps `send` and looks at an answer's head
alone; for each chunk it would cost as much as the chunk itself.
"""

from __future__ import annotations

from typing import Any, Protocol

from starlette.types import Message, Scope, Send

LINE = "kvasir.line"
"""The ASGI extension of a server that takes chunks of an answer which has begun: its value is a Line."""


class Line(Protocol):
    """A connection, for one answer that has begun."""

    def free(self) -> bool:
        """It takes a chunk now; else the client reads too slowly, or it is no answer in chunks."""

    def write(self, chunk: bytes) -> None:
        """While it is `free`: a part of the body that isn't the last. Goes nowhere once the client is gone."""


class Straight:
    """As `send`; `chunk` is for parts of the body, but not for the last."""

    def __init__(self, scope: Scope, send: Send) -> None:
        self._send = send
        self.line: Line | None = scope.get("extensions", {}).get(LINE)

    async def __call__(self, message: Message) -> None:
        await self._send(message)

    async def chunk(self, body: bytes) -> None:
        """Waits when the client reads too slowly."""
        if self.line is not None and self.line.free():
            self.line.write(body)
        else:
            await self._send({"type": "http.response.body", "body": body, "more_body": True})


class CycleLine:
    """The line of a request that uvicorn serves (its RequestResponseCycle)."""

    def __init__(self, cycle: Any) -> None:
        self._cycle, self._flow, self._write = cycle, cycle.flow, cycle.transport.write

    def free(self) -> bool:
        return self._cycle.chunked_encoding and not self._flow.write_paused

    def write(self, chunk: bytes) -> None:
        if not self._cycle.disconnected:
            self._write(b"%x\r\n%b\r\n" % (len(chunk), chunk))
