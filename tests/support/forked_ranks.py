"""Ranks begun by forking a process that has imported torch and the engine, where the engine would begin each with
`python -m kvasir.engine.worker`: importing takes two seconds of a core each time. They are processes like any other.

    python forked_ranks.py    # the process that is forked: told by messages on its standard input, which is a socket
"""

from __future__ import annotations

import atexit
import importlib
import json
import os
import selectors
import signal
import socket
import subprocess
import sys
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any


class Parent:
    """The process that is forked, once a first rank is wanted; `close` ends it."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._connection, self._theirs = socket.socketpair()

    def start(self, files: list[int], environment: dict[str, str]) -> None:
        """Begin a rank with these as its files 0, 1, 2; what the last one is connected to is told its pid and its end."""
        if self._process is None:
            self._process = subprocess.Popen(
                [sys.executable, __file__], stdin=self._theirs, env=environment, start_new_session=True
            )
        message = json.dumps(environment).encode()
        socket.send_fds(self._connection, [len(message).to_bytes(4, "little")], files)
        self._connection.sendall(message)

    def close(self) -> None:
        for end in (self._connection, self._theirs):
            end.close()
        if self._process is not None:
            self._process.wait()


class Rank:
    """As much of subprocess.Popen as `engine.processes` uses."""

    def __init__(
        self, parent: Parent, command: list[str], *, stdin: int, stdout: int, start_new_session: bool, env: Any
    ) -> None:
        assert command == [sys.executable, "-m", "kvasir.engine.worker"]
        assert stdin == subprocess.PIPE
        assert start_new_session
        reader, writer = os.pipe()
        self._said, other = socket.socketpair()
        null = os.open(os.devnull, os.O_WRONLY)
        parent.start([reader, null if stdout == subprocess.DEVNULL else stdout, 2, other.fileno()], dict(env))
        for file in (reader, null):
            os.close(file)
        other.close()
        self.stdin = os.fdopen(writer, "wb")
        self.pid = int.from_bytes(self._said.recv(4, socket.MSG_WAITALL), "little")
        self.returncode: int | None = None
        self._asking = threading.Lock()  # who listens to the ranks polls while another waits

    def poll(self) -> int | None:
        return self._ended(socket.MSG_DONTWAIT)

    def wait(self) -> int | None:
        return self._ended(0)

    def kill(self) -> None:
        if self.poll() is None:
            with suppress(ProcessLookupError):  # it has just ended
                os.kill(self.pid, signal.SIGKILL)

    def _ended(self, flags: int) -> int | None:
        if not self._asking.acquire(blocking=not flags):
            return self.returncode
        try:
            if self.returncode is None:
                status = self._said.recv(4, flags | socket.MSG_WAITALL)
                self.returncode = int.from_bytes(status, "little", signed=True)
                self._said.close()
        except BlockingIOError:
            pass
        finally:
            self._asking.release()
        return self.returncode


def serve(connection: socket.socket) -> None:
    """Fork what is asked for, and tell how each ended."""
    wake, woken = socket.socketpair()
    woken.setblocking(False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(woken.fileno(), warn_on_full_buffer=False)
    waiting: dict[int, socket.socket] = {}
    with selectors.DefaultSelector() as selector:
        for one in (connection, wake):
            selector.register(one, selectors.EVENT_READ)
        while True:
            ready = [key.fileobj for key, _ in selector.select()]
            if wake in ready:
                wake.recv(4096)
                _reap(waiting)
            if connection in ready:
                size, files, _, _ = socket.recv_fds(connection, 4, 4)
                if not size:
                    return
                environment = json.loads(connection.recv(int.from_bytes(size, "little"), socket.MSG_WAITALL))
                pid = os.fork()
                if pid == 0:
                    signal.set_wakeup_fd(-1)
                    selector.close()
                    _become(files, environment)
                said = socket.socket(fileno=files.pop())
                said.sendall(pid.to_bytes(4, "little"))
                waiting[pid] = said
                for file in files:
                    os.close(file)


def _reap(waiting: dict[int, socket.socket]) -> None:
    while waiting:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if not pid:
            return
        with waiting.pop(pid) as said, suppress(BrokenPipeError):  # nobody wants to know
            said.sendall(os.waitstatus_to_exitcode(status).to_bytes(4, "little", signed=True))


def _become(files: list[int], environment: dict[str, str]) -> None:
    """In the new process: what `python -m kvasir.engine.worker` does, with these files as 0, 1, 2. Doesn't return."""
    code = 1
    try:
        os.setsid()
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        for target, file in enumerate(files[:3]):
            os.dup2(file, target)
        os.closerange(3, 1024)
        os.environ.clear()
        os.environ.update(environment)
        sys.stdin = os.fdopen(0)
        paths = environment["PYTHONPATH"].split(os.pathsep)
        sys.path[:] = [*paths, *(path for path in sys.path if path not in paths)]
        importlib.invalidate_caches()
        first = Path(paths[0], "sitecustomize.py")
        if first.exists():
            exec(compile(first.read_text(), str(first), "exec"), {"__name__": "sitecustomize"})
        from kvasir.engine import worker

        worker.main()
        code = 0
    except SystemExit as end:
        code = int(end.code or 0)
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    import kvasir.engine.executor
    import kvasir.engine.load
    import kvasir.engine.mesh
    import kvasir.engine.remote_grammars
    import kvasir.engine.spoke
    import kvasir.engine.worker  # noqa: F401

    serve(socket.socket(fileno=os.dup(0)))
