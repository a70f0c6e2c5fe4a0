"""How a process ended that isn't a child: Linux 6.15 and later say so."""

from __future__ import annotations

import os
import platform
import re
import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest
from waiting import until

from kvasir.engine import processes
from kvasir.engine.control import Hub
from kvasir.engine.processes import Exit
from kvasir.engine.spoke import Spoke

RELEASE = re.match(r"(\d+)\.(\d+)", platform.release()) if sys.platform == "linux" else None
SAYS = RELEASE is not None and (int(RELEASE[1]), int(RELEASE[2])) >= (6, 15)
says = pytest.mark.skipif(not SAYS, reason="this system doesn't say")


@pytest.fixture
def process() -> Iterator[int]:
    """Of a shell that waits for it, and of nobody else."""
    with subprocess.Popen(["sh", "-c", "sleep 600 & echo $!; wait"], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        yield pid
        parent.kill()


@says
def test_who_killed_it(process: int) -> None:
    found = Exit(process)
    assert found.text() is None
    os.kill(process, signal.SIGKILL)
    until(lambda: not os.path.exists(f"/proc/{process}"))
    assert found.text() == "killed by SIGKILL"
    found.close()
    assert (found.known, found.text()) == (False, None)


@says
def test_its_code() -> None:
    with subprocess.Popen(["sh", "-c", "read line; exit 7"], stdin=subprocess.PIPE) as child:
        found = Exit(child.pid)
    assert found.text() == "exit code 7"
    found.close()


def test_nobody_is_there() -> None:
    with subprocess.Popen(["true"]) as child:
        pass
    assert not Exit(child.pid).known


def test_a_system_that_forgets_who_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Linux 6.13 and 6.14 answer only while the process is there."""

    def forgets(*_: object) -> None:
        raise ProcessLookupError

    monkeypatch.setattr(processes.fcntl, "ioctl", lambda *_: 0)
    found = Exit(os.getpid())
    assert found.known
    monkeypatch.setattr(processes.fcntl, "ioctl", forgets)
    assert found.text() is None
    found.close()


def test_a_rank_that_is_nobody_s_child_here(process: int) -> None:
    """As Ray's actors are."""
    hub = Hub("127.0.0.1", 2)
    spoke = Spoke(hub.address, hub.token, 1, process, gone=lambda: None)
    try:
        hub.meet(20)
        os.kill(process, signal.SIGKILL)
        until(lambda: not os.path.exists(f"/proc/{process}"))
        spoke.close()
        failure = until(lambda: hub.failure)
        how = "killed by SIGKILL" if SAYS else "its connection was closed"
        assert str(failure) == f"rank 1 (pid {process} on 127.0.0.1) died: {how}"
    finally:
        hub.close()
