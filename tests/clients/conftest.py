"""One `kvasir serve` for clients that others wrote."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from kvasir_server import LIMIT_S, READY
from waiting import until

KEY = "a-key"


@dataclass
class Server:
    """A server that runs: its addresses, and the key that it wants."""

    process: subprocess.Popen[str]
    url: str = ""
    grpc: str = ""
    key: str = KEY
    log: list[str] = field(default_factory=list)

    def count(self, name: str) -> float:
        """Sum over the series of one metric."""
        request = urllib.request.Request(self.url + "/metrics", headers={"Authorization": f"Bearer {KEY}"})
        with urllib.request.urlopen(request, timeout=LIMIT_S) as reply:
            found = re.findall(rf"^{re.escape(name)}(?:\{{.*\}})? (\S+)$", reply.read().decode(), re.MULTILINE)
        return sum(map(float, found))

    def cancelled(self, client: Callable[[], None]) -> None:
        """Whether the answer that `client` leaves ends early: it would take seconds. A client that is held up for so long leaves
        one that is over, so it comes again."""
        series = 'kvasir:request_failed_total{code="cancelled",model_name="skald"}'
        before = self._value(series)
        for limit_s in (30.0, 30.0, LIMIT_S):
            client()
            with contextlib.suppress(AssertionError):
                until(lambda: self._value(series) > before, limit_s)
                break
        assert self._value(series) > before
        until(lambda: self.count("vllm:num_requests_running") == 0)

    def _value(self, series: str) -> float:
        request = urllib.request.Request(self.url + "/metrics", headers={"Authorization": f"Bearer {KEY}"})
        with urllib.request.urlopen(request, timeout=LIMIT_S) as reply:
            found = re.findall(rf"^{re.escape(series)} (\S+)$", reply.read().decode(), re.MULTILINE)
        return float(found[0]) if found else 0.0

    def read(self) -> None:
        assert self.process.stdout is not None
        with self.process.stdout as lines:
            for line in lines:
                self.log.append(line)
                if found := re.search(READY, line):
                    self.url, self.grpc = found[1], found[2]


@pytest.fixture(scope="package")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("clients")
    (temporary := folder / "tmp").mkdir()
    command = [sys.executable, "-m", "kvasir.cluster.cli", "serve", "skald", "--port", "0", "--grpc-port", "0"]
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "OTEL_"))}
    environment |= {"KVASIR_API_KEY": KEY, "KVASIR_LOG_LEVEL": "warning", "TMPDIR": str(temporary)}
    environment["RAY_TMPDIR"] = tempfile.gettempdir()  # the names of its sockets mustn't get long
    process = subprocess.Popen(
        [*command, "--state-path", ":memory:"],
        cwd=folder, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    server = Server(process)
    reader = threading.Thread(target=server.read, daemon=True)
    reader.start()
    try:
        until(lambda: bool(server.grpc) or process.poll() is not None, limit_s=300)
        assert process.poll() is None, "".join(server.log)
        yield server
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
        status = process.wait(LIMIT_S)
        reader.join()
    assert status == 0, "".join(server.log)
    assert not [*Path(temporary).glob("kvasir-*")], "a start left a folder behind"
    assert "Traceback" not in "".join(server.log), "".join(server.log)
