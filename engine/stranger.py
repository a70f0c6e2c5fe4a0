"""Stranger: who has connected to rank 0 (`control`) and hasn't shown the group's token. Anybody may: nothing waits for it, and
what it says is taken as anything at all."""

from __future__ import annotations

import hmac
import json
import socket
import time
from dataclasses import dataclass, field

from kvasir.engine.frames import HEAD, KINDS

MAX_HELLO = 512
"""Bytes: so short that nothing in it nests deeply either."""
HELLO_S = 5.0
"""A stranger has so long for its hello, all of it."""


class StrangerError(Exception):
    """This is no rank of the group."""


@dataclass(frozen=True, slots=True)
class Hello:
    """Of a rank, or `stopped`: of who watches it, because it stands still."""

    rank: int
    pid: int
    stopped: bool


@dataclass(eq=False)
class Stranger:
    """Its connection, which doesn't block."""

    host: str
    connection: socket.socket
    since: float = field(default_factory=time.monotonic)
    buffer: bytearray = field(default_factory=bytearray)

    def hello(self, token: str) -> Hello | None:
        """Of who knows the token; None: it hasn't said all of it yet. Never waits."""
        while missing := self._missing():
            try:
                data = self.connection.recv(missing)
            except BlockingIOError:
                return None
            except OSError as error:
                raise StrangerError(str(error)) from error
            if not data:
                raise StrangerError("it has closed its connection")
            self.buffer += data
        return _identity(self.buffer[HEAD.size :], token)

    def _missing(self) -> int:
        """Bytes; what comes behind the hello isn't read here."""
        if len(self.buffer) < HEAD.size:
            return HEAD.size - len(self.buffer)
        size, kind = HEAD.unpack_from(self.buffer)
        if size > MAX_HELLO or kind != KINDS.index("hello"):
            raise StrangerError("this is no hello")
        return HEAD.size + int(size) - len(self.buffer)


def _identity(hello: bytes | bytearray, token: str) -> Hello:
    try:
        said = json.loads(hello)
        shown = str(said["token"]).encode() if isinstance(said, dict) else b""
    except (ValueError, KeyError) as error:
        raise StrangerError("this is no hello") from error
    if not hmac.compare_digest(shown, token.encode()):
        raise StrangerError("it doesn't know the token")
    rank, pid = said.get("rank"), said.get("pid")
    if not isinstance(rank, int) or not isinstance(pid, int):
        raise StrangerError("it doesn't say who it is")
    return Hello(rank, pid, said.get("stopped") is True)
