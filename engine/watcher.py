"""Watcher: a small process beside a rank that isn't on rank 0's node. It sees there what rank 0 can't and the rank itself doesn't
live to tell: that it stands still (SIGSTOP). Silence alone says so much later, for it may be a busy machine's, too.

`python -m kvasir.engine.watcher` reads what it needs to know as JSON from its standard input.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time

from kvasir.engine.frames import BEAT_S, send
from kvasir.engine.processes import stopped

LOOK_S = 0.1
TELL_S = 1.0
"""Rank 0 has so long to hear of it."""


class Watcher:
    """Of this process, as `rank`. It ends with it."""

    def __init__(self, address: str, token: str, rank: int) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "kvasir.engine.watcher"],
            stdin=subprocess.PIPE,
            start_new_session=True,  # what stops the rank's session leaves it alone
            env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
        )
        assert self._process.stdin is not None
        with self._process.stdin as pipe:
            pipe.write(json.dumps({"address": address, "token": token, "rank": rank, "pid": os.getpid()}).encode())

    def close(self) -> None:
        self._process.kill()
        self._process.wait()


def watch(address: str, token: str, rank: int, pid: int) -> None:
    """Until the rank ends. One that stands still is told to rank 0 and ended: it is lost to its group, and who would end it may
    be on another node."""
    since = None
    while os.getppid() == pid:
        time.sleep(LOOK_S)
        since = (since or time.monotonic()) if stopped(pid) else None
        if since is not None and time.monotonic() - since >= BEAT_S:
            _tell(address, {"token": token, "rank": rank, "pid": pid, "stopped": True})
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def _tell(address: str, hello: dict[str, object]) -> None:
    host, _, port = address.rpartition(":")
    with contextlib.suppress(OSError), socket.create_connection((host, int(port)), TELL_S) as connection:
        send(connection, "hello", json.dumps(hello).encode())
        connection.recv(1)  # it hangs up when it has heard


if __name__ == "__main__":
    watch(**json.load(sys.stdin))
