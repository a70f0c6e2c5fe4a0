"""`kvasir serve` in a process of its own, as its users start it."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import openai
from waiting import until

ROOM = ("--hf-overrides", '{"max_position_embeddings": 32768}')
"""For streams of seconds: a small model's own limit is reached before a client that is held up has left, or killed anything."""
LIMIT_S = 150.0
"""As `until` has it."""
READY = r"^ready after \S+ s: HTTP (http://[\w.:]+)(?:, gRPC ([\w.:]+))?"
"""The line that tells the addresses."""


@dataclass
class Server:
    """A running `kvasir serve`."""

    process: subprocess.Popen[str]
    url: str
    grpc_address: str
    log: list[str]
    reader: threading.Thread
    folder: Path
    """Its own, in which its processes work."""

    def get(self, path: str) -> tuple[int, str]:
        try:
            with urllib.request.urlopen(self.url + path, timeout=LIMIT_S) as reply:
                return reply.status, reply.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()

    def client(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=self.url + "/v1", api_key="none", max_retries=0, timeout=LIMIT_S)

    def series(self, name: str) -> list[float]:
        """Those of one metric."""
        found = re.findall(rf"^{re.escape(name)}(?:\{{.*\}})? (\S+)$", self.get("/metrics")[1], re.MULTILINE)
        return [*map(float, found)]

    def metric(self, name: str) -> float:
        """Their sum. A group's are missing while it is held up."""
        return sum(until(lambda: self.series(name)))

    def rank(self) -> int:
        """Process id of this server's rank."""
        return child_of(self.process.pid, "ray::RankActor")

    @contextlib.contextmanager
    def nothing_starts(self) -> Iterator[None]:
        """Ray makes no process meanwhile: what was killed isn't back before that has been looked at."""
        raylet = child_of(self.process.pid, r"\S+/raylet ")
        os.kill(raylet, signal.SIGSTOP)
        try:
            yield
        finally:
            os.kill(raylet, signal.SIGCONT)

    def stop(self) -> int:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        return self.wait()

    def wait(self) -> int:
        """The exit status, once all output is read and no process is left: a rank's keeps its blocks on the disk to itself."""
        status = self.process.wait(LIMIT_S)
        self.reader.join()
        until(lambda: not [pid for pid in descendants(1) if self.folder.resolve() in working_folder(pid).parents])
        return status


def command_line(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")
    except OSError:
        return ""


def working_folder(pid: int) -> Path:
    try:
        return Path(f"/proc/{pid}/cwd").readlink()
    except OSError:
        return Path()


def descendants(root: int) -> list[int]:
    """Every process below `root`, and those of the Ray session that it started."""
    parents: dict[int, int] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError, IndexError):
                parents[int(entry.name)] = int((entry / "stat").read_text().rsplit(")", 1)[1].split()[1])
    below, grown = {root}, True
    while grown:
        more = {pid for pid, parent in parents.items() if parent in below} - below
        below, grown = below | more, bool(more)
    return sorted(below - {root})


def child_of(root: int, pattern: str) -> int:
    """The one process below `root` with such a command line: another may be about to end, and one that is being started has its
    parent's."""
    return until(
        lambda: len(found := [pid for pid in descendants(root) if re.match(pattern, command_line(pid))]) == 1 and found
    )[0]


def read(process: subprocess.Popen[str], log: list[str]) -> None:
    """Gather what the process prints, until it ends."""
    assert process.stdout is not None
    with process.stdout as lines:
        for line in lines:
            log.append(line)  # noqa: PERF402  others read it meanwhile


def own_cache(tmp_path: Path) -> Path:
    """A cache folder with the compiled kernels of the session's, which take ten seconds, and nothing else."""
    cache = tmp_path / "cache"
    kept = cache / "kvasir" / "compiled"
    kept.mkdir(mode=0o700, parents=True, exist_ok=True)
    for compiled in Path(os.environ["XDG_CACHE_HOME"]).glob("kvasir/compiled/*.so"):
        with contextlib.suppress(FileExistsError):
            (kept / compiled.name).symlink_to(compiled)
    return cache


def start(tmp_path: Path, *flags: str, env: dict[str, str] | None = None) -> Server:
    """Start `kvasir serve` on free ports and wait until it says that it is ready."""
    command = [sys.executable, "-m", "kvasir.cluster.cli", "serve", "--port", "0", "--grpc-port", "0", *flags]
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "OTEL_"))}
    environment |= {"XDG_CACHE_HOME": str(own_cache(tmp_path)), **(env or {})}
    process = subprocess.Popen(
        command, cwd=tmp_path, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    log: list[str] = []
    reader = threading.Thread(target=read, args=(process, log), daemon=True)
    reader.start()
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline and process.poll() is None:
        if told := re.search(READY, "".join(log), re.MULTILINE):
            return Server(process, told[1], told[2] or "", log, reader, tmp_path)
        time.sleep(0.05)
    process.kill()
    process.wait()
    reader.join()
    raise AssertionError("kvasir serve did not come up:\n" + "".join(log))
