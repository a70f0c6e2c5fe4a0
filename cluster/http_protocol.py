"""The HTTP server's settings, and its connections: what a request may take before it is a request: a head's size, and the
time until head and body are there; and how long an answer may lie unread.

uvicorn limits none of these where httptools parses, and a client that never ends its request would be held for ever.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import httptools
import orjson
import uvicorn
from starlette.types import Message, Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from kvasir.cluster.call import request_id_from
from kvasir.cluster.config import GatewayConfig
from kvasir.cluster.error_shapes import error_body
from kvasir.cluster.lingering import LingeringTransport
from kvasir.cluster.sockets import gone_after, set_options
from kvasir.cluster.straight import LINE, CycleLine
from kvasir.engine.errors import ClientError, KvasirError

MAX_HEAD_BYTES = 64 * 2**10
"""Of the request line and all headers."""
MAX_AHEAD = 16
"""Requests that wait on one connection for the answers of those before them."""
SLOWEST_BYTES_S = 64 * 2**10
"""What is larger may take longer: a second for so many bytes."""
_FRAMING = (b"content-length", b"transfer-encoding")
_PHRASES = {
    400: "Bad Request",
    408: "Request Timeout",
    429: "Too Many Requests",
    431: "Request Header Fields Too Large",
}


class HeadTooLargeError(ClientError):
    """More than MAX_HEAD_BYTES."""

    code = "request_too_large"
    status = 431


class TooFarAheadError(ClientError):
    """More than MAX_AHEAD."""

    code = "too_many_requests"
    status = 429


class RequestTimeoutError(ClientError):
    """It didn't arrive within --receive-timeout."""

    code = "request_timeout"
    status = 408


def server_config(app: Any, config: GatewayConfig, refused: Callable[[KvasirError], None]) -> uvicorn.Config:
    """How `app` is served. refused: hears of what is refused in its place."""
    protocol: Any = partial(Connection, receive_timeout_s=config.receive_timeout_s, refused=refused)
    return uvicorn.Config(
        app,
        http=protocol,
        log_config=None,
        access_log=False,
        ws="none",
        lifespan="off",
        server_header=False,
        ssl_keyfile=config.ssl_keyfile,
        ssl_certfile=config.ssl_certfile,
        timeout_graceful_shutdown=1,
    )


class Connection(HttpToolsProtocol):
    """One connection. Requests that are too slow or too large to be read are refused, and the connection is closed.

    A client may send a request before the one before it is answered. It waits: its time begins, and a refusal is said,
    when all answers before it are complete.
    """

    transport: Any
    """A LingeringTransport."""

    def __init__(
        self, *args: Any, receive_timeout_s: float, refused: Callable[[KvasirError], None], **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self._limit_s = receive_timeout_s
        self._refused = refused
        self._place: Literal["between", "head", "body"] = "between"
        """Where in a request the next byte belongs."""
        self._head = 0
        """Bytes since the last request ended."""
        self._framing = 0
        """Bytes since a piece of the body came: chunks' sizes and extensions, and trailers."""
        self._arrived = 0
        self._due = 0.0
        self._timer: asyncio.TimerHandle | None = None
        self._turn: Any = None
        """The cycle whose answer is, or was last, sent."""
        self._refusal: bytes | None = None
        """What is said behind the answers; nothing is read any more."""

    @property
    def _answering(self) -> bool:
        return self._turn is not None and not (self._turn.response_complete or self._turn.disconnected)

    @property
    def _deaf(self) -> bool:
        return self._refusal is not None or self.transport.is_closing()

    def connection_made(self, transport: Any) -> None:
        lingering: Any = LingeringTransport(transport, self.loop, self._limit_s, lambda: self._place == "body")
        super().connection_made(lingering)
        set_options(transport.get_extra_info("socket"), gone_after(self._limit_s))
        self._wait()

    def connection_lost(self, exc: Exception | None) -> None:
        self._arrive()
        if self._answering:
            self._disconnect()
        self.transport.lost()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._deaf:
            self.transport.discard(len(data))
            return
        if self._place != "body":
            self._head += len(data)
            self._wait()
        else:
            self._framing += len(data)
        self._arrived += len(data)
        self._unset_keepalive_if_required()
        self._parse(data)
        if (self._framing if self._place == "body" else self._head) > MAX_HEAD_BYTES:
            self._too_large()

    def _parse(self, data: bytes) -> None:
        """What is malformed is told the client and not the log, which anybody could fill. An offer to upgrade is ignored (RFC 9110,
        7.8; Java's clients offer h2c): the parser takes it for granted, and the body for what comes behind the upgrade."""
        rest = memoryview(data)
        try:
            while True:
                try:
                    self.parser.feed_data(rest)
                    return
                except httptools.HttpParserUpgrade as offer:
                    if self._deaf:
                        return
                    rest = rest[offer.args[0] :]
                    self._parse_body()
        except httptools.HttpParserError:
            self.send_400_response("Invalid HTTP request received.")

    def _parse_body(self) -> None:
        """Begin with the body of the head that was read, and go on with what comes behind it."""
        framing = [name + b": " + value for name, value in self.headers if name in _FRAMING]
        self.parser = httptools.HttpRequestParser(self)
        self.parser.set_dangerous_leniencies(lenient_data_after_close=True)  # as uvicorn's
        self.parser.feed_data(b"\r\n".join([b"POST / HTTP/1.1", *framing, b"", b""]))

    def on_message_begin(self) -> None:
        if self._place != "body":  # see _parse_body
            super().on_message_begin()
            self._place = "head"
            self._wait()

    def on_url(self, url: bytes) -> None:
        if self._place == "head":
            super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._place == "head":  # what comes behind the body is no header, and gives nobody a key (RFC 9110, 6.5.1)
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        if self._deaf or self._place == "body":
            return
        if len(self.url) + sum(len(name) + len(value) + 4 for name, value in self.headers) > MAX_HEAD_BYTES:
            self._too_large()
        elif len(self.pipeline) == MAX_AHEAD:
            text = f"more than {MAX_AHEAD} requests wait on this connection for the answers of those before them"
            self._refuse(TooFarAheadError(text))
        else:
            super().on_headers_complete()
            self._place, self._framing = "body", 0
            self.flow.resume_reading()  # else nobody would see that the client left

    def on_body(self, body: bytes) -> None:
        self._framing = 0
        if not self._deaf:
            super().on_body(body)

    def on_message_complete(self) -> None:
        if self.parser.should_upgrade() and not self._deaf:  # its body is still to come
            return
        self._place = "between"
        self._head = 0
        self._arrive()
        if not self._deaf:
            super().on_message_complete()

    def on_response_complete(self) -> None:
        super().on_response_complete()  # the next one's turn
        if self.transport.is_closing():
            return
        if self._refusal is not None and not self._answering:
            self._say_and_close(self._refusal)
        elif self._place != "between":
            self._unset_keepalive_if_required()
            self._wait()

    def send_400_response(self, msg: str) -> None:
        self._refuse(ClientError(msg))

    def _start_asgi_task(self, cycle: Any, app: Any) -> None:
        self._turn = cycle
        cycle.scope["extensions"] = {LINE: CycleLine(cycle)}
        if cycle.scope["http_version"] == "1.0":
            app = _Unchunked(cycle, app)
        super()._start_asgi_task(cycle, app)

    def _wait(self) -> None:
        """Its time begins, unless it did, or others are before it."""
        own = self._place == "body" and self._turn is self.cycle
        if self._timer is None and (own or not self._answering):
            self._arrived = 0
            self._due = self.loop.time() + self._limit_s
            self._timer = self.loop.call_at(self._due, self._late)

    def _arrive(self) -> None:
        """It is here, or will never be."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _late(self) -> None:
        due = self._due + self._arrived / SLOWEST_BYTES_S
        if due > self.loop.time():
            self._timer = self.loop.call_at(due, self._late)
            return
        self._timer = None
        if self._place == "between" and not self._arrived:  # it never said a word
            self.transport.close()
        else:
            text = f"the request didn't arrive within {self._limit_s:g} s (--receive-timeout)"
            self._refuse(RequestTimeoutError(text))

    def _too_large(self) -> None:
        what = "trailers" if self._place == "body" else "line and headers"
        text = f"the request's {what} have more than {MAX_HEAD_BYTES} bytes"
        self._refuse(HeadTooLargeError(text))

    def _refuse(self, error: KvasirError) -> None:
        """Answer what is being read in the place of the application, behind the answers before it, and close."""
        if self._deaf:
            return
        self._arrive()
        self._refusal = self._response(error)
        if self._place == "body" and self._turn is self.cycle:
            self._disconnect()  # what the application still says goes nowhere
            if self.cycle.response_started:  # it has an answer, and gets no second one
                self.transport.close()
                return
        elif self._place == "body":
            self.pipeline.popleft()  # the last that came
        self._refused(error)
        if not self._answering:
            self._say_and_close(self._refusal)

    def _response(self, error: KvasirError) -> bytes:
        name = request_id_from(None, "X-Request-ID")
        path = self.url.decode("latin-1").partition("?")[0] if self.headers is not None else ""
        body = orjson.dumps(error_body(error, path, name))
        lines = [f"HTTP/1.1 {error.status} {_PHRASES[error.status]}", "content-type: application/json"]
        lines += [f"content-length: {len(body)}", f"x-request-id: {name}", f"request-id: {name}", "connection: close"]
        return "\r\n".join([*lines, "", ""]).encode() + body

    def _say_and_close(self, refusal: bytes) -> None:
        self.transport.write(refusal)
        self.transport.linger()

    def _disconnect(self) -> None:
        self._turn.disconnected = True
        self._turn.message_event.set()


class _Unchunked:
    """An application for a client of HTTP/1.0, that knows no chunks (RFC 9112, 6.1): where uvicorn would send some the body
    goes out as it is, and ends with the connection, which it closes behind each answer to such a client."""

    def __init__(self, cycle: Any, app: Any) -> None:
        self._cycle, self._app = cycle, app
        self._bare = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def plain(message: Message) -> None:
            if message["type"] == "http.response.start":
                self._bare = all(name.lower() != b"content-length" for name, _ in message["headers"])
                self._cycle.chunked_encoding = False if self._bare else None
            elif self._bare:
                self._cycle.expected_content_length = len(message["body"])
            await send(message)

        await self._app(scope, receive, plain)
