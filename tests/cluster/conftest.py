"""A fake engine that speaks `Event`, a group service around it, and one Ray for the tests that need it."""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import grpc
import openai
import pytest
import ray
from fake_gateway import LiveGateway, write_byte_model
from pydantic.warnings import PydanticDeprecatedSince20

from kvasir.cluster import ray_token
from kvasir.cluster.group_service import GroupService
from kvasir.cluster.telemetry import Tracing
from kvasir.engine.config import EngineConfig
from kvasir.engine.errors import ConfigError, ContextLengthError
from kvasir.engine.event import Event, Failed, Finished, Pooled, Timing, Token, TokenLogprob
from kvasir.engine.info import ModelInfo
from kvasir.engine.request import Request
from kvasir.engine.scheduler import Stats
from kvasir.proto.open_inference_pb2_grpc import GRPCInferenceServiceStub

with warnings.catch_warnings():  # Ray's own, at its first import
    warnings.filterwarnings("ignore", category=PydanticDeprecatedSince20)
    from ray import serve

MAX_MODEL_LEN = 2**21


class FakeEngine:
    """One thread that gives each continuation a token every `step_s`: what `token` says of (seed, position), from 65 (A) on
    to 90 (Z) by default."""

    info = ModelInfo(name="fake", max_model_len=MAX_MODEL_LEN, vocab_size=2**17, eos_token_ids=(2,), max_num_seqs=256)

    def __init__(self, deliver: Callable[[Sequence[Event]], None], step_s: float = 0.001) -> None:
        self.deliver = deliver
        self.failure: BaseException | None = None
        self.step_s = step_s
        self.token = lambda seed, position: 65 + position % 26
        self.refusal = None
        """Raised by submit."""
        self.heartbeat = time.monotonic()
        self.on_blocks: Callable[..., None] | None = None
        """`on_blocks(tier, changes)` once a service listens."""
        self.requests: dict[str, tuple[Request, dict[int, int], float]] = {}
        self.submitted: list[Request] = []
        self.aborted: list[tuple[str, int | None, str]] = []
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def start(self, *, measure: bool = False) -> None:
        self._thread.start()

    def shutdown(self) -> None:
        self._stop.set()
        self._thread.join()

    def submit(self, request: Request) -> None:
        if len(request.prompt_token_ids) > MAX_MODEL_LEN:
            raise ContextLengthError(f"the prompt has more than {MAX_MODEL_LEN} tokens", param="prompt")
        if self.refusal is not None:
            raise self.refusal
        assert request.sampling.n == 1 or not request.resume_token_ids
        with self._lock:
            self.submitted.append(request)
            counts = dict.fromkeys(range(request.sampling.streams), len(request.resume_token_ids))
            self.requests[request.request_id] = (request, counts, time.time())

    def abort(self, request_id: str, index: int | None = None, reason: str = "abort") -> None:
        with self._lock:
            self.aborted.append((request_id, index, reason))
            if request_id not in self.requests:
                return
            counts = self.requests[request_id][1]
            gone = [i for i in counts if index in (None, i)]
            events = [Finished(request_id, i, reason, output_tokens=counts.pop(i)) for i in gone]
            if not counts:
                del self.requests[request_id]
        self.deliver(events)

    def stats(self) -> Stats:
        with self._lock:
            running = len(self.requests)
            return Stats(running=running, waiting=0, kv_usage=running / 256, decode_blocks=running)

    @property
    def stats_at(self) -> float:
        return time.monotonic()

    def serve_blocks(self, host: str) -> tuple[str, str]:
        return "", ""

    def listen(self, on_blocks: Callable[..., None]) -> None:
        self.on_blocks = on_blocks

    def fail(self) -> None:
        with self._lock:
            failed = [Failed(name, "unavailable", "told to fail") for name in self.requests]
            self.requests.clear()
        self.deliver(failed)

    def _run(self) -> None:
        while not self._stop.wait(self.step_s):
            self.heartbeat = time.monotonic()
            with self._lock:
                events = list(itertools.chain.from_iterable(map(self._advance, [*self.requests])))
            if events:
                self.deliver(events)

    def _advance(self, name: str) -> list[Event]:
        request, counts, began = self.requests[name]
        if request.pooling is not None:
            del self.requests[name]
            timing = Timing(queued=began, scheduled=began + 0.001, first_token=time.time(), finished=time.time())
            return [Pooled(name, (0.5, -1.0), len(request.prompt_token_ids), timing=timing)]
        events: list[Event] = []
        for index in [*counts]:
            events.append(self._token(request, index, counts[index]))
            counts[index] += 1
            if counts[index] == request.sampling.max_tokens:
                del counts[index]
                now = time.time()
                timing = Timing(queued=began, scheduled=began + 0.001, first_token=began + 0.002, finished=now)
                prompt = len(request.prompt_token_ids)
                facts = {"prompt_tokens": prompt, "output_tokens": request.sampling.max_tokens, "timing": timing}
                events.append(Finished(name, index, "length", **facts))
        if not counts:
            del self.requests[name]
        return events

    def _token(self, request: Request, index: int, position: int) -> Token:
        sampling, prompt = request.sampling, request.prompt_token_ids
        token = self.token((sampling.seed or 0) + index, position)
        scores = None if sampling.logprobs is None else [TokenLogprob(-0.25 * position, 1, ((token, -0.5),))]
        scored = sampling.prompt_logprobs is not None and not index and position == len(request.resume_token_ids)
        return Token(request.request_id, index, (token,), scores, [None] * len(prompt) if scored else None)


class Group:
    """A group service over a fake engine, in this process."""

    def __init__(self, tracing: Tracing | None = None, step_s: float = 0.001) -> None:
        self.service = GroupService(tracing or Tracing())
        self.engine = FakeEngine(self.service.deliver, step_s)

    async def __aenter__(self) -> Group:
        self.engine.start()
        self.endpoint = await self.service.start(self.engine, "127.0.0.1")
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.service.stop()
        self.engine.shutdown()


@pytest.fixture
def group_of_fakes() -> type[Group]:
    """`async with group_of_fakes() as group`: `.endpoint`, `.engine`, `.service`."""
    return Group


def make_engine(config: EngineConfig, deliver: Callable[[Sequence[Event]], None]) -> FakeEngine:
    """For rank actors. The model's name says how it behaves."""
    name = config.served_model_name[0] if config.served_model_name else config.model
    if name == "wrong":
        raise ConfigError("max_model_len is 9 and the model allows 8", param="max_model_len")
    if name == "broken":
        raise MemoryError("no room for 3 GiB of weights")
    engine = FakeEngine(deliver, step_s=0.01)
    if name == "short-lived":
        threading.Timer(1.0, lambda: setattr(engine, "failure", RuntimeError("the step loop ended"))).start()
    return engine


@pytest.fixture(scope="session")
def serve_on_ray(tmp_path_factory):
    """A Ray of this session with Serve in it; `make_engine` reaches its workers by value."""
    before = os.getcwd()
    os.chdir(tmp_path_factory.mktemp("neutral"))
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    ray_token.keep_private()  # in a new home two that start at once would each write a token of their own
    ray.init(
        "local", num_cpus=8, include_dashboard=False, object_store_memory=80 * 2**20, log_to_driver=False,
        logging_level="ERROR",
    )  # fmt: skip
    serve.start(proxy_location="Disabled", logging_config={"log_level": "CRITICAL"})
    yield serve
    serve.shutdown()
    started = [each.process for kind in ray._private.worker._global_node.all_processes.values() for each in kind]
    ray.shutdown()
    for process in started:  # Ray waits a second for those that it killed, and a late one is a warning, here an error
        process.wait()
    os.chdir(before)


@pytest.fixture(name="make_engine")
def _make_engine():
    return make_engine


@pytest.fixture(scope="session")
def byte_model(tmp_path_factory) -> Path:
    """A model's folder without weights, as fake_gateway has it."""
    write_byte_model(folder := tmp_path_factory.mktemp("bytes"))
    return folder


@pytest.fixture(scope="session")
def certificate(tmp_path_factory) -> tuple[Path, Path]:
    """(key, chain) of localhost, in PEM."""
    folder = tmp_path_factory.mktemp("tls")
    key, chain = folder / "key.pem", folder / "chain.pem"
    command = (
        "openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=localhost -addext subjectAltName=DNS:localhost"
    )
    try:
        subprocess.run([*command.split(), "-keyout", key, "-out", chain], check=True, capture_output=True)
    except FileNotFoundError:
        pytest.skip("there is no openssl to make a certificate with")
    return key, chain


@pytest.fixture
def live_gateway(byte_model: Path) -> Callable[..., LiveGateway]:
    """`with live_gateway(config, **engine options) as gateway`: `.url`, `.grpc_address`, `.group`, `.desk`."""
    return functools.partial(LiveGateway, byte_model)


@pytest.fixture(scope="module")
def gateway(byte_model: Path) -> Iterator[LiveGateway]:
    """One for all tests of a module that change nothing about it."""
    with LiveGateway(byte_model) as live:
        yield live


@pytest.fixture
def client(gateway: LiveGateway) -> Iterator[openai.OpenAI]:
    """OpenAI's own."""
    with openai.OpenAI(base_url=gateway.url + "/v1", api_key="any", max_retries=0) as client:
        yield client


@pytest.fixture
def connect() -> Iterator[Callable[[LiveGateway], GRPCInferenceServiceStub]]:
    """`connect(gateway)`: stubs of the Open Inference Protocol."""
    with contextlib.ExitStack() as channels:
        yield lambda gateway: GRPCInferenceServiceStub(
            channels.enter_context(grpc.insecure_channel(gateway.grpc_address))
        )


@pytest.fixture(scope="module")
def thinker(byte_model: Path) -> Iterator[LiveGateway]:
    """The same of a model that thinks and calls tools."""
    with LiveGateway(byte_model, tool_call_parser="hermes", reasoning_parser="think") as live:
        yield live
