"""What every test may use: the shared data (KVASIR_DATA, or `shared/data` beside the checkout) and the bundled models."""

from __future__ import annotations

import functools
import gc
import hashlib
import inspect
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import grpc
import httpx
import jsonschema
import pytest
import ray
from hypothesis import HealthCheck, settings
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceResponse
from opentelemetry.proto.collector.trace.v1.trace_service_pb2_grpc import (
    TraceServiceServicer,
    add_TraceServiceServicer_to_server,
)
from xdist.scheduler import LoadScopeScheduling

from kvasir.kernels.block_ids import SOURCES
from kvasir.kernels.compiled import NativeError, compiled, compiler, key_of

ROOT = Path(__file__).resolve().parents[1]
GPU = any(Path(device).exists() for device in ("/dev/nvidiactl", "/dev/kfd"))
# read when triton is imported: its kernels run on the CPU where there is no GPU
os.environ.setdefault("TRITON_INTERPRET", "0" if GPU else "1")
for wait in ("connect", "read", "write", "pool"):  # five seconds are little on a busy machine
    setattr(httpx._config.DEFAULT_TIMEOUT_CONFIG, wait, 60.0)
# each client, of which httpx.post makes one, would read all certificates again: 25 ms of a core
httpx._transports.default.create_ssl_context = functools.cache(httpx._transports.default.create_ssl_context)
LIBRARIES = {
    "kernels": sorted((ROOT / "kernels").glob("*_cpu.cpp")),
    "block_ids": [ROOT / "kernels" / name for name in SOURCES],
}
DATA = Path(os.environ.get("KVASIR_DATA") or ROOT.parent / "shared" / "data")
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "kvasir"
"""The user's, where all runs find what one of them has compiled."""


# what a busy machine takes for one example says nothing about the code
settings.register_profile(
    "untimed", deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture]
)
settings.load_profile("untimed")


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Any:
    """A million objects come while modules are imported and tests collected, and all stay: no look at them frees anything."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


def pytest_unconfigure() -> None:
    gc.unfreeze()


def pytest_configure() -> None:
    """Workers of one run (pytest -n) share the cores out: threads of several that spin for the same one take many times as
    long."""
    if (worker := os.environ.get("PYTEST_XDIST_WORKER")) and hasattr(os, "sched_setaffinity"):
        number, count = int(worker.removeprefix("gw")), int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, own := cores[number::count] or cores)
        if torch := sys.modules.get("torch"):  # it has looked before
            torch.set_num_threads(len(own))


LONGEST = (
    "tests/engine/test_group_deaths.py::test_chaos",
    "tests/kernels/test_native.py::test_under_sanitizers",
    "tests/engine/test_group_network.py",
    "tests/kernels/test_instruction_sets.py",
    "tests/engine/test_groups.py",
    "tests/engine/test_group_deaths.py",
    "tests/engine/test_tiers.py",
    "tests/engine/test_beam_search.py",
    "tests/engine/test_peers.py",
    "tests/engine/test_parity.py",
    "tests/cluster/test_cli.py",
    "tests/cluster/test_group_ranks.py::test_chaos",
    "tests/test_end_to_end.py",
    "tests/clients",
    "tests/test_serving_lives.py::test_streams_survive_their_group",
    "tests/test_serving_lives.py::test_a_prompt_starts_from_the_disk",
    "tests/test_serving_lives.py::test_streams_are_found",
    "tests/test_serving_lives.py::test_files_are_named",
    "tests/test_serving_lives.py::test_rank_killed",
    "tests/cluster/test_group_nodes.py",
    "tests/test_batches.py",
    "tests/cluster/test_group_ranks.py",
)
"""What takes longest: begun first, so that no process works on alone at the end; and what is shared out by itself."""


def share_of(nodeid: str) -> str:
    """What the processes of one run (pytest -n) share out: modules, and what is named above."""
    found = [name for name in LONGEST if nodeid.startswith(name)]
    return max(found, key=len) if found else nodeid.partition("::")[0]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The order in which they are shared out; and within a module, so that it doesn't depend on how many processes there are."""
    places = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(share_of(item.nodeid), len(places)))


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    class Shares(LoadScopeScheduling):  # type: ignore[misc, unused-ignore]
        def _split_scope(self, nodeid: str) -> str:
            return share_of(nodeid)

    return Shares(config, log)


@pytest.fixture(scope="session")
def data() -> Callable[[str], Path]:
    """`data("folder/file")`: its path in the shared data; skips the test that asks for what isn't there."""

    def find(path: str) -> Path:
        if not (DATA / path).exists():
            pytest.skip(f"shared data {path} is not at {DATA} (set KVASIR_DATA)")
        return DATA / path

    return find


@pytest.fixture(scope="session", autouse=True)
def own_folders(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What servers keep by default lies in folders of this run, not in the user's."""
    cache = tmp_path_factory.mktemp("cache")
    kept = cache / "kvasir" / "compiled"
    kept.mkdir(mode=0o700, parents=True)
    with suppress(
        NativeError, OSError, subprocess.SubprocessError
    ):  # it takes half a minute: once for all processes and runs
        for name, sources in LIBRARIES.items():
            shutil.copy(compiled(name, sources)[0], kept)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(cache))
        patch.setenv("XDG_STATE_HOME", str(tmp_path_factory.mktemp("state")))
        yield


@pytest.fixture(scope="session")
def compiled_once() -> Callable[..., Path]:
    """`compiled_once(name, sources, flags, make)`: what `make(path)` compiled of them at `path`, now or in an earlier run."""

    def find(name: str, sources: list[Path], flags: tuple[str, ...], make: Callable[[Path], None]) -> Path:
        program = compiler()
        assert program is not None
        shaped = hashlib.blake2b(repr(flags).encode(), digest_size=8).hexdigest()
        target = CACHE / f"test-{name}-{shaped}-{key_of(program, sources)}"
        if not target.exists():
            for old in CACHE.glob(f"test-{name}-{shaped}-*"):
                if time.time() - old.stat().st_mtime > 86_400:  # nobody is about to load it
                    old.unlink(missing_ok=True)
            CACHE.mkdir(mode=0o700, parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=CACHE) as scratch:
                make(made := Path(scratch) / "made")
                made.replace(target)
        return target

    return find


class OtlpReceiver(TraceServiceServicer):  # type: ignore[misc]
    """A real OTLP/gRPC collector: keeps the spans it is sent."""

    def __init__(self) -> None:
        self.spans: list[Any] = []
        self._server = grpc.server(ThreadPoolExecutor(2))
        add_TraceServiceServicer_to_server(self, self._server)
        self.endpoint = f"http://127.0.0.1:{self._server.add_insecure_port('127.0.0.1:0')}"
        self._server.start()

    def Export(self, request: Any, context: Any) -> ExportTraceServiceResponse:  # noqa: N802
        for resource in request.resource_spans:
            for scope in resource.scope_spans:
                self.spans.extend(scope.spans)
        return ExportTraceServiceResponse()

    def stop(self) -> None:
        self._server.stop(None).wait()

    def trace(self, trace_id: str, names: set[str]) -> dict[str, Any]:
        """Spans of one trace by name, once all of `names` are there."""
        limit = time.monotonic() + 60
        while True:
            found = {span.name: span for span in self.spans if span.trace_id.hex() == trace_id}
            if names <= set(found):
                return found
            assert time.monotonic() < limit, f"only {sorted(found)} came"
            time.sleep(0.1)

    @staticmethod
    def attributes(span: Any) -> dict[str, Any]:
        return {item.key: getattr(item.value, item.value.WhichOneof("value")) for item in span.attributes}


def _receiver() -> Iterator[OtlpReceiver]:
    receiver = OtlpReceiver()
    yield receiver
    receiver.stop()


otlp_receiver = pytest.fixture(name="otlp_receiver")(_receiver)
collector = pytest.fixture(name="collector", scope="module")(_receiver)
"""The same for all tests of a module, whose server outlives a test."""


STREAMS = ("text/event-stream", "application/x-ndjson")


class Judge:
    """`judge(path, method, answer)` raises where an answer isn't as described."""

    def __init__(self, document: dict[str, Any]) -> None:
        self._document = document
        self._paths = sorted(document["paths"], key=lambda path: path.count("{"))

    def __call__(self, path: str, method: str, answer: httpx.Response) -> None:
        assert answer.status_code < 500 or answer.status_code == 503, answer.text
        responses = self._item(path)[method]["responses"]
        status = str(answer.status_code)
        found = responses.get(status) or responses[f"{status[0]}XX"]
        kind = answer.headers["content-type"].partition(";")[0]
        assert kind in found["content"], f"{method} {path}: {status} {kind}"
        content = found["content"][kind]
        if kind in STREAMS:
            for event in events(kind, answer.text):
                self._check(content.get("x-events", content["schema"]), event)
        elif kind == "application/json":
            self._check(content["schema"], answer.json())

    def _item(self, path: str) -> dict[str, Any]:
        parts = path.partition("?")[0].split("/")
        for known in self._paths:
            names = known.split("/")
            if len(names) == len(parts) and all(a.startswith("{") or a == b for a, b in zip(names, parts, strict=True)):
                return self._document["paths"][known]
        raise AssertionError(f"{path} isn't in the document")

    def _check(self, schema: dict[str, Any], value: Any) -> None:
        whole = {**schema, "components": self._document["components"]}
        validator = jsonschema.Draft202012Validator(whole)
        errors = [f"{'/'.join(map(str, error.path))}: {error.message:.200}" for error in validator.iter_errors(value)]
        assert not errors, f"{errors} in {json.dumps(value):.500}"


def events(kind: str, text: str) -> Iterator[Any]:
    """What a stream's events or lines hold."""
    if kind == "application/x-ndjson":
        assert text.endswith("\n")
        yield from map(json.loads, text.splitlines())
        return
    assert text.endswith("\n\n")
    for block in text.split("\n\n")[:-1]:
        fields = [line.partition(": ") for line in block.split("\n")]
        assert {name for name, _, _ in fields} <= {"event", "data", "id"}, block
        (data,) = [value for name, _, value in fields if name == "data"]
        if data == "[DONE]":
            assert block == text[-len(block) - 2 : -2], "something follows [DONE]"
            continue
        event = json.loads(data)
        assert all(event["type"] == value for name, _, value in fields if name == "event")
        if "error" not in event or "object" in event:
            yield event


@pytest.fixture(scope="session")
def judge_of() -> type[Judge]:
    """The same by another document."""
    return Judge


@pytest.fixture(scope="session")
def judge() -> Judge:
    """Whether HTTP answers are as our OpenAPI document says."""
    from kvasir.cluster.openapi import document

    return Judge(document())


# ---- Ranks that fail when they are told to ----------------------------------------------------------------------------


def obey(folder: str) -> None:
    """In a rank's process: from when a file in this folder is named like it, fail the way that the file says."""
    import os
    import threading
    import time

    def fail(how: str) -> None:
        import ctypes

        import torch

        from kvasir.engine.decoder import Decoder

        def raises(*_: object) -> None:
            raise RuntimeError("a kernel raised")

        def grows(*_: object) -> torch.Tensor:
            return torch.empty(1 << 52)

        def hangs(*_: object) -> None:
            time.sleep(600)

        if how == "lock":  # Python's: no thread of it runs any more
            ctypes.PyDLL(None).sleep(600)
        Decoder.through = {"raise": raises, "out of memory": grows, "hang": hangs}[how]  # type: ignore[assignment, method-assign]

    def wait() -> None:
        order = os.path.join(folder, str(os.getpid()))
        while not os.path.exists(order):
            time.sleep(0.01)
        with open(order) as file:
            fail(file.read())

    threading.Thread(target=wait, daemon=True).start()


class Level(str):
    """A log level, which is what every rank of Ray's sets first: then it obeys."""

    def __new__(cls, folder: str) -> Level:
        found = super().__new__(cls, "info")
        found.folder = folder
        return found

    folder: str

    def __reduce__(self) -> tuple[type[Level], tuple[str]]:
        return Level, (self.folder,)

    def upper(self) -> str:
        obey(self.folder)
        return super().upper()


class Orders:
    """Failures of ranks: `level` is the log level of Ray's ranks that obey, `path` a folder of Python's that makes others."""

    def __init__(self, folder: Path) -> None:
        ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
        self.folder, self.path = folder / "orders", folder / "path"
        self.folder.mkdir()
        self.path.mkdir()
        self.level = Level(str(self.folder))
        source = f"{inspect.getsource(obey)}\n\nobey({str(self.folder)!r})\n"
        (self.path / "sitecustomize.py").write_text(f"from __future__ import annotations\n\n\n{source}")

    def give(self, pid: int, how: str) -> None:
        """`how` it is to fail: raise, out of memory, hang, lock."""
        written = self.folder / "new"
        written.write_text(how)
        written.rename(self.folder / str(pid))


@pytest.fixture
def orders(tmp_path: Path) -> Orders:
    return Orders(tmp_path)


@pytest.fixture(scope="session")
def segments() -> Callable[[], set[str]]:
    """`segments()`: shared memory that no process has open, so that nobody will give it back. Other tests' comes and goes."""

    def orphans() -> set[str]:
        held = set()
        for process in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):
                held.update(re.findall(r"/dev/shm/(\S+)", (process / "maps").read_text()))
                held.update(Path(os.readlink(file)).name for file in (process / "fd").iterdir())
        return set(os.listdir("/dev/shm")) - held

    return orphans
