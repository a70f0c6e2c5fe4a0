"""The HTTP server's settings, and its connections: what a request may take before it is a request: a head's size, and the
time until head and body are there.

uvicorn limits neither where httptools parses, and a client that never ends its request would be held for ever.
"""

from __future__ import annotations

import asyncio
from functools import partial
from typing import Any

import orjson
import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from kvasir.cluster.call import request_id_from
from kvasir.cluster.config import GatewayConfig
from kvasir.cluster.error_shapes import error_body
from kvasir.engine.errors import ClientError, KvasirError

MAX_HEAD_BYTES = 64 * 2**10
"""Of the request line and all headers."""
SLOWEST_BYTES_S = 64 * 2**10
"""What is larger may take longer: a second for so many bytes."""
_PHRASES = {408: "Request Timeout", 431: "Request Header Fields Too Large"}


class HeadTooLargeError(ClientError):
    """More than MAX_HEAD_BYTES."""

    code = "request_too_large"
    status = 431


class RequestTimeoutError(ClientError):
    """It didn't arrive within --receive-timeout."""

    code = "request_timeout"
    status = 408


def server_config(app: Any, config: GatewayConfig) -> uvicorn.Config:
    """How `app` is served."""
    protocol: Any = partial(Connection, receive_timeout_s=config.receive_timeout_s)
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
    """One connection. Requests that are too slow or too large to be read are refused, and the connection is closed."""

    def __init__(self, *args: Any, receive_timeout_s: float, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._limit_s = receive_timeout_s
        self._head = 0
        """Bytes of the head that is being read; behind it -1."""
        self._arrived = 0
        self._due = 0.0
        self._timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._wait()

    def connection_lost(self, exc: Exception | None) -> None:
        self._arrive()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        self._arrived += len(data)
        if self._head >= 0:
            self._head += len(data)
        super().data_received(data)
        if self._head > MAX_HEAD_BYTES:
            self._too_large()

    def on_message_begin(self) -> None:
        super().on_message_begin()
        if self._timer is None:
            self._wait()
        if self._head < 0:
            self._head = 0

    def on_headers_complete(self) -> None:
        size = len(self.url) + sum(len(name) + len(value) + 4 for name, value in self.headers)
        self._head = -1
        if size > MAX_HEAD_BYTES:
            self._too_large()
        else:
            super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        if not self.transport.is_closing():
            super().on_body(body)

    def on_message_complete(self) -> None:
        self._arrive()
        if not self.transport.is_closing():
            super().on_message_complete()

    def _wait(self) -> None:
        """A request begins."""
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
        if self._head == 0 and not self._arrived:  # it never said a word
            self.transport.close()
        elif self.cycle is None or self.cycle.response_complete or not self.cycle.response_started:
            text = f"the request didn't arrive within {self._limit_s:g} s (--receive-timeout)"
            self._refuse(RequestTimeoutError(text))
        else:
            self.transport.close()

    def _too_large(self) -> None:
        self._arrive()
        self._head = -1
        text = f"the request's line and headers have more than {MAX_HEAD_BYTES} bytes"
        self._refuse(HeadTooLargeError(text))

    def _refuse(self, error: KvasirError) -> None:
        """Answer in the place of the application, and close."""
        if self.transport.is_closing():
            return
        name = request_id_from(None, "X-Request-ID")
        path = self.url.decode("latin-1").partition("?")[0] if self.headers is not None else ""
        body = orjson.dumps(error_body(error, path, name))
        lines = [f"HTTP/1.1 {error.status} {_PHRASES[error.status]}", "content-type: application/json"]
        lines += [f"content-length: {len(body)}", f"x-request-id: {name}", f"request-id: {name}", "connection: close"]
        self.transport.write("\r\n".join([*lines, "", ""]).encode() + body)
        if self.cycle is not None and not self.cycle.response_complete:
            self.cycle.disconnected = True  # what the application still says goes nowhere
            self.cycle.message_event.set()
        self.transport.close()
