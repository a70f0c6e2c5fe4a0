"""A rank on another node that stands still: told within a second by who watches it there, who leaves nothing behind."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from waiting import until

from kvasir.engine.control import Hub
from kvasir.engine.processes import stopped

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="elsewhere nobody sees it, and 127.0.0.2 is no address")

RANK = """
import functools, os, socket, sys
from kvasir.engine import worker
from kvasir.engine.config import EngineConfig

socket.create_connection = functools.partial(socket.create_connection, source_address=("127.0.0.2", 0))

def serve(config, spoke, rank, token):
    spoke.send("awake")
    spoke.send("ready")
    spoke.receive()

worker._serve = serve
worker.run(EngineConfig(model="m"), sys.argv[1], sys.argv[2], 1, gone=lambda: os._exit(1))
"""
"""Of a model that takes no time to load, seen by rank 0 at an address of its own."""


def ended(pid: int) -> bool:
    """Whether or not somebody has asked how."""
    try:
        return " Z " in Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return True


@pytest.fixture
def rank() -> Iterator[tuple[Hub, subprocess.Popen[bytes], int]]:
    """(rank 0's hub, rank 1, the process that watches it)"""
    hub = Hub("127.0.0.1", 2)
    with subprocess.Popen([sys.executable, "-c", RANK, hub.address, hub.token]) as process:
        try:
            assert hub.meet(60)[1] == "127.0.0.2"
            hub.all_ready()
            children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
            watcher = int(until(lambda: children.read_text().split())[0])
            yield hub, process, watcher
        finally:
            hub.close()
            process.kill()


def test_it_is_told_and_ended(rank: tuple[Hub, subprocess.Popen[bytes], int]) -> None:
    hub, process, watcher = rank
    process.send_signal(signal.SIGSTOP)
    failure = until(lambda: hub.failure)
    assert str(failure) == f"rank 1 (pid {process.pid} on 127.0.0.2) was stopped (SIGSTOP)"
    assert process.wait(60) == -signal.SIGKILL
    until(lambda: ended(watcher))


def test_rank_0_needn_t_be_there_for_its_end(rank: tuple[Hub, subprocess.Popen[bytes], int]) -> None:
    hub, process, watcher = rank
    process.send_signal(signal.SIGSTOP)
    hub.close()
    assert process.wait(60) == -signal.SIGKILL
    until(lambda: ended(watcher))


@pytest.mark.parametrize("by", [signal.SIGKILL, None])
def test_its_watcher_ends_with_it(rank: tuple[Hub, subprocess.Popen[bytes], int], by: signal.Signals | None) -> None:
    hub, process, watcher = rank
    if by is None:
        hub.close()
    else:
        process.send_signal(by)
    assert process.wait(60) == (-by if by else 0)
    until(lambda: ended(watcher))


def test_a_debugger_ends_nothing() -> None:
    """Which holds a process for the moment that a backtrace takes."""
    ptrace = ctypes.CDLL(None).ptrace
    ptrace.argtypes = [ctypes.c_long, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p]
    with subprocess.Popen(["sleep", "60"]) as process:
        try:
            if ptrace(16, process.pid, None, None):  # PTRACE_ATTACH
                pytest.skip("no debuggers here")
            os.waitpid(process.pid, 0)
            assert not stopped(process.pid)
            assert stopped(process.pid, "Tt")
            ptrace(17, process.pid, None, None)  # PTRACE_DETACH
        finally:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
