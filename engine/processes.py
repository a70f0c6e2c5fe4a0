"""Processes: the ranks of this node as processes of their own (`--distributed-executor-backend mp`); whether one stands still."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

from kvasir.engine.config import EngineConfig
from kvasir.engine.worker import json_of


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
        if code is None:
            return None
        return f"exit code {code}" if code >= 0 else f"killed by {signal.Signals(-code).name}"

    def kill(self) -> None:
        """End them at once, those that stand still too, and wait for them."""
        for process in self._running.values():
            process.kill()
        for process in self._running.values():
            process.wait()


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
