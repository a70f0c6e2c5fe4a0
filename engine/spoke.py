"""Spoke: how a rank other than 0 hears from rank 0 (`control`), by its connection and, on rank 0's node, by the board.

It says hello before torch is loaded, which takes seconds, and half a minute on a busy machine.
"""

from __future__ import annotations

import contextlib
import json
import select
import socket
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING

from kvasir.engine.frames import BEAT_S, BOARD, Kind, receive, send, tune

if TYPE_CHECKING:
    from kvasir.engine.board import Reader

NAP_S = 0.1
"""How often a rank that waits for steps from the board looks whether something else has come."""


class Spoke:
    """Another rank's end: says hello, and every BEAT_S that it lives. When rank 0 is gone, `gone` is called."""

    def __init__(self, address: str, token: str, rank: int, pid: int, *, gone: Callable[[], None]) -> None:
        host, _, port = address.rpartition(":")
        self._connection = socket.create_connection((host, int(port)), 10.0)
        self.host = self._connection.getsockname()[0]
        """This node's address, as rank 0's node sees it."""
        self._connection.settimeout(None)
        tune(self._connection)
        self._poll = select.poll()  # select itself knows no descriptors from 1024 on
        self._poll.register(self._connection, select.POLLIN)
        self._lock = threading.Lock()
        self._rank = rank
        self._reader: Reader | None = None
        self._follows = False
        """The board has announced a step that comes by the connection; no later one is read before it."""
        self._long: bytes | None = None  # such a step that came before its turn
        self._gone = gone
        self._closing = threading.Event()
        self.send("hello", json.dumps({"token": token, "rank": rank, "pid": pid}).encode())
        threading.Thread(target=self._beat, name="kvasir-heartbeat", daemon=True).start()

    def send(self, kind: Kind, content: bytes = b"") -> None:
        """Any thread."""
        with self._lock:
            send(self._connection, kind, content)

    def assemble(self) -> None:
        """Wait until every rank calls this: see `Hub.assemble`. EOFError when rank 0 is gone."""
        self.send("here")
        kind, _ = self.receive()
        assert kind == "go"

    def ready(self, where: str | None = None, size: int = 0) -> None:
        """This rank has loaded its share. From now on it reads steps of `size` ranks from the board at `where`, if it can."""
        from kvasir.engine.board import Reader

        if where is not None:
            with contextlib.suppress(OSError):
                self._reader = Reader(where, self._rank, size)
        self.send("ready", b"" if self._reader is None else BOARD)

    def receive(self) -> tuple[Kind, bytes]:
        """The next frame. Steps keep their order, whichever way they come; they may never cease, so what else has come is taken
        first. EOFError when rank 0 is gone, and what it said before is done."""
        while self._reader is not None:
            if self._long is None and (self._follows or self._is_readable()):
                try:
                    kind, content = receive(self._connection)
                except EOFError:
                    if self._follows or (step := self._reader.take(0)[1]) is None:
                        raise
                    return "step", step
                if kind != "step":
                    return kind, content
                self._long = content
            step = None
            if not self._follows:
                self._follows, step = self._reader.take(NAP_S)
            if self._follows and step is None:
                step, self._long = self._long, None
            if step is not None:
                self._follows = False
                return "step", step
        return receive(self._connection)

    def _is_readable(self) -> bool:
        return bool(self._poll.poll(0))

    def close(self) -> None:
        """End: rank 0 sees it."""
        self._closing.set()
        self._connection.close()

    def _beat(self) -> None:
        while not self._closing.wait(BEAT_S):
            try:
                self.send("beat")
            except OSError:
                if not self._closing.is_set():
                    self._gone()
                return
