"""One end of a connection on which gateways and groups tell each other messages: each is its length (4 bytes) and its
protobuf form. gRPC's streams cost several times as much CPU, and there is a message for every step."""

from __future__ import annotations

import asyncio
import struct
import time
from collections.abc import Callable
from typing import Generic, TypeVar, cast

from google.protobuf.message import Message

from kvasir.cluster.sockets import gone_after, set_options

M = TypeVar("M", bound=Message)

_LENGTH = struct.Struct("<I")
GONE_S = 10
"""The other end is gone when it hasn't acknowledged anything for so long: a machine that vanished says no goodbye."""
_SOCKET = {"TCP_NODELAY": 1, **gone_after(GONE_S)}


class MessageStream(asyncio.Protocol, Generic[M]):
    """`take` gets each message of `kind` that comes. `over` is called once the connection has ended: with what `take` or the
    connection raised, or None when the other end closed it. Belongs to one asyncio loop."""

    def __init__(
        self, kind: type[M], take: Callable[[M], None], over: Callable[[Exception | None], None], *, limit: int
    ) -> None:
        self.limit = limit
        """Bytes of the largest message that is taken."""
        self.closed = asyncio.get_running_loop().create_future()
        self._kind, self._take, self._over = kind, take, over
        self._came = bytearray()
        self._written = self._gone = 0
        self._moved = time.monotonic()
        self._error: Exception | None = None

    @property
    def queued_bytes(self) -> int:
        """What waits to be sent."""
        return 0 if self._transport.is_closing() else self._transport.get_write_buffer_size()

    def unread_s(self, now: float) -> float:
        """Seconds in which nothing went of what waits to be sent, as far as this was asked: ask now and then."""
        queued = self.queued_bytes
        if not queued or self._written - queued > self._gone:
            self._moved = now
        self._gone = self._written - queued
        return now - self._moved

    def send(self, message: Message) -> None:
        """Goes nowhere once the connection is closed."""
        if not self._transport.is_closing():
            data = message.SerializeToString()
            self._written += _LENGTH.size + len(data)
            self._transport.write(_LENGTH.pack(len(data)) + data)

    def close(self) -> None:
        """When all that was sent is on its way."""
        self._transport.close()

    def abort(self) -> None:
        """At once."""
        self._transport.abort()

    # -- asyncio's side

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        set_options(transport.get_extra_info("socket"), _SOCKET)

    def data_received(self, data: bytes) -> None:
        came, at = self._came, 0
        came += data
        try:
            while len(came) >= (begin := at + _LENGTH.size):
                (size,) = _LENGTH.unpack_from(came, at)
                if size > self.limit:
                    raise ValueError(f"a message of {size} bytes; at most {self.limit}")
                if len(came) < begin + size:
                    break
                at = begin + size
                self._take(self._kind.FromString(bytes(came[begin:at])))
                if self._transport.is_closing():
                    return
        except Exception as error:
            self._error = error
            self.abort()
        del came[:at]

    def connection_lost(self, error: Exception | None) -> None:
        self._over(self._error or error)
        if not self.closed.done():
            self.closed.set_result(None)
