"""Closing a connection whose client still sends: it is read on for a little while, and thrown away.

A socket that is closed with input unread is reset, and a reset takes away what the client hasn't read of its answer, which
says why it was refused (RFC 9112, 9.6).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

LINGER_S = 5.0
"""A client that hasn't left by then isn't waited for."""
LINGER_BYTES = 32 * 2**20
"""Most that is thrown away: as much as a body has by default, as most clients send all of one before they read."""


class LingeringTransport:
    """A transport whose `close` lingers while `unread()` says that more of a request is to come. All else is its own."""

    def __init__(
        self, transport: Any, loop: asyncio.AbstractEventLoop, limit_s: float, unread: Callable[[], bool]
    ) -> None:
        self._transport = transport
        self._loop = loop
        self._limit_s = min(limit_s, LINGER_S)
        self._unread = unread
        self._timer: asyncio.TimerHandle | None = None
        self._left = LINGER_BYTES

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def is_closing(self) -> bool:
        """Nothing is written any more; what still arrives is to be given to `discard`."""
        return self._timer is not None or self._transport.is_closing()

    def close(self) -> None:
        """Behind what is written."""
        if self._unread() and not self._transport.is_closing():
            self.linger()
        else:
            self._transport.close()

    def linger(self) -> None:
        """End what is sent, and close when the client has, or sends too much or for too long."""
        if self._timer is None:
            self._timer = self._loop.call_later(self._limit_s, self._transport.close)
            self._transport.resume_reading()
            if self._transport.can_write_eof():  # TLS can't: its client knows the answer's end by its length
                self._transport.write_eof()

    def discard(self, size: int) -> None:
        """So many bytes came that nobody reads."""
        if self._timer is not None:
            self._left -= size
            if self._left < 0:
                self._transport.close()

    def lost(self) -> None:
        """The connection is gone."""
        if self._timer is not None:
            self._timer.cancel()
