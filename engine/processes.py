"""Processes: the ranks of this node as processes of their own (`--distributed-executor-backend mp`); whether one stands still."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import struct
import subprocess
import sys
from pathlib import Path

from kvasir.engine.config import EngineConfig
from kvasir.engine.worker import json_of

PIDFD_INFO = struct.Struct("<Q52xi")
"""Of struct pidfd_info (<linux/pidfd.h>), what is wanted or known, and exit_code."""
PIDFD_GET_INFO, PIDFD_INFO_EXIT = 0xC000FF0B | PIDFD_INFO.size << 16, 1 << 3


class Processes:
    """Ranks 1 to config.ranks - 1. They end with their connection to rank 0, and `kill` makes sure."""

    def __init__(self, config: EngineConfig, address: str, token: str) -> None:
        self._running: dict[int, subprocess.Popen[bytes]] = {}
        for rank in range(1, config.ranks):
            self._running[rank] = process = subprocess.Popen(
                [sys.executable, "-m", "kvasir.engine.worker"],
                stdin=subprocess.PIPE,
                stdout=sys.stderr.fileno() if _has_file(sys.stderr) else subprocess.DEVNULL,
                start_new_session=True,  # Ctrl-C is rank 0's to handle
                env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
            )
            said = {"config": json_of(config), "address": address, "token": token, "rank": rank}
            assert process.stdin is not None
            with process.stdin as pipe:
                pipe.write(json.dumps(said).encode())

    def ended(self, rank: int) -> str | None:
        """How its process ended; None while it runs."""
        process = self._running.get(rank)
        code = process.poll() if process is not None else None
        return None if code is None else _said(code)

    def kill(self) -> None:
        """End them at once, those that stand still too, and wait for them."""
        for process in self._running.values():
            process.kill()
        for process in self._running.values():
            process.wait()


class Exit:
    """How a process of this node ends that needn't be a child of this one: of a file descriptor of it Linux tells since 6.15, once
    its parent has asked."""

    def __init__(self, pid: int) -> None:
        self._file: int | None = None
        try:
            self._file = os.pidfd_open(pid)
            self._info()
        except (OSError, AttributeError):  # it is gone already; the system is older, or another
            self.close()

    @property
    def known(self) -> bool:
        """The system will say."""
        return self._file is not None

    def text(self) -> str | None:
        """In words; None: it runs, or it isn't known."""
        if self._file is None:
            return None
        try:
            mask, status = self._info()
        except OSError:  # Linux 6.13 and 6.14 know nothing of one that is gone
            return None
        return _said(os.waitstatus_to_exitcode(status)) if mask & PIDFD_INFO_EXIT else None

    def close(self) -> None:
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def _info(self) -> tuple[int, int]:
        """(what is known, the status that wait gives)"""
        info = bytearray(PIDFD_INFO.size)
        PIDFD_INFO.pack_into(info, 0, PIDFD_INFO_EXIT, 0)
        fcntl.ioctl(self._file or 0, PIDFD_GET_INFO, info)
        mask, status = PIDFD_INFO.unpack(info)
        return mask, status


def _said(code: int) -> str:
    return f"exit code {code}" if code >= 0 else f"killed by {signal.Signals(-code).name}"


def _has_file(stream: object) -> bool:
    try:
        stream.fileno()  # type: ignore[attr-defined]
    except (OSError, AttributeError, ValueError):  # tests and notebooks replace it
        return False
    return True


def stopped(pid: int, states: str = "T") -> bool:
    """The process of this node stands still because of a signal (Linux); with "Tt", because of a debugger, too, which may go on
    in a moment."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return stat.rpartition(")")[2].split()[:1] in [[state] for state in states]
