"""A fake engine that speaks `Event`, a group service around it, and one Ray for the tests that need it."""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import itertools
import json
import os
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import grpc
import pytest
import ray
import tokenizers
import uvicorn
from pydantic.warnings import PydanticDeprecatedSince20

from kvasir.cluster.config import GatewayConfig
from kvasir.cluster.group_client import Placement
from kvasir.cluster.group_service import GroupService
from kvasir.cluster.group_stream import Stream
from kvasir.cluster.router import Router
from kvasir.cluster.telemetry import Tracing
from kvasir.engine.config import EngineConfig
from kvasir.engine.errors import ConfigError, ContextLengthError, UnavailableError
from kvasir.engine.event import Event, Failed, Finished, Pooled, Timing, Token, TokenLogprob
from kvasir.engine.info import ModelInfo
from kvasir.engine.request import Request
from kvasir.engine.scheduler import Stats

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

    def start(self) -> None:
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
            return Stats(running=len(self.requests), waiting=0, kv_usage=len(self.requests) / 256)

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
    ray.init(
        "local", num_cpus=8, include_dashboard=False, object_store_memory=80 * 2**20, log_to_driver=False,
        logging_level="ERROR",
    )  # fmt: skip
    serve.start(proxy_location="Disabled", logging_config={"log_level": "CRITICAL"})
    yield serve
    serve.shutdown()
    ray.shutdown()
    os.chdir(before)


@pytest.fixture(name="make_engine")
def _make_engine():
    return make_engine


# ---- A gateway over a fake group, on real sockets -------------------------------------------------------------------

END, USER, ASSISTANT, SYSTEM, TOOL = range(256, 261)
_TEMPLATE = """{%- for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor -%}
{%- if tools %}<|tool|>{{ tools | tojson }}<|end|>{% endif -%}
{%- if add_generation_prompt %}<|assistant|>{% endif %}"""


@pytest.fixture(scope="session")
def byte_model(tmp_path_factory) -> Path:
    """A model's folder without weights: its tokens are the bytes, and <|end|>, <|user|>, ... (256 and on)."""
    folder = tmp_path_factory.mktemp("bytes")
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    moved = [byte for byte in range(256) if byte not in printable]
    vocab = {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(moved)}
    assert sorted(vocab) == alphabet
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    backend.add_special_tokens([f"<|{name}|>" for name in ("end", "user", "assistant", "system", "tool")])
    backend.save(str(folder / "tokenizer.json"))
    config = {"eos_token": "<|end|>", "chat_template": _TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    (folder / "generation_config.json").write_text(json.dumps({"temperature": 0.25, "eos_token_id": END}))
    return folder


class FakeGroup:
    """A GroupClient whose answers `script` tells: request and index -> token ids. It gives one token a step to each."""

    def __init__(self, model: str = "bytes", max_model_len: int = 4096, max_stream_buffer: int = 4096) -> None:
        self.info = ModelInfo(name=model, max_model_len=max_model_len, vocab_size=261, eos_token_ids=(END,))
        self.stats = Stats(
            running=3,
            waiting=1,
            kv_usage=0.25,
            prefix_queries=40,
            prefix_hits=16,
            prompt_tokens=40,
            disk_stored=7,
            host_bytes=9,
        )
        self.name = "group-1"
        self.member = Router().join(self.name)
        self.draining = False
        self.alive = True
        self.last_error = None
        self.script = lambda request, index: [*b"Hello, w\xc3\xb6rld!", END]
        self.vector = lambda request: [float(len(request.prompt_token_ids)), 0.5]
        """What a request for a vector gets."""
        self.step_s = 0.0
        self.refusal = None
        """Raised by submit."""
        self.dies_after = None
        """Steps after which each request fails."""
        self.requests: list[Request] = []
        self.aborted: list[tuple[str, int | None, str]] = []
        self.streams: dict[str, Stream] = {}
        self._limit = max_stream_buffer
        self._live: dict[str, set[int]] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    async def submit(self, request: Request, placement: Placement | None = None) -> Stream:
        if self.refusal is not None:
            raise self.refusal
        self.requests.append(request)
        stream = Stream(request, self._limit, lambda index, reason: self._abort(request, stream, index, reason))
        self.streams[request.request_id] = stream
        self._live[request.request_id] = set(range(request.sampling.streams))
        task = asyncio.ensure_future(self._run(request, stream))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return stream

    def sheds(self, streaming: bool) -> str:
        return ""

    @property
    def running(self) -> int:
        """Requests that hold anything."""
        return sum(bool(live) for live in self._live.values())

    def _abort(self, request: Request, stream: Stream, index: int | None, reason: str) -> None:
        self.aborted.append((request.request_id, index, reason))
        for one in [*self._live[request.request_id]] if index is None else [index]:
            if one in self._live[request.request_id]:
                self._live[request.request_id].discard(one)
                stream._push(Finished(request.request_id, one, reason, prompt_tokens=len(request.prompt_token_ids)))

    async def _run(self, request: Request, stream: Stream) -> None:
        name, live, began = request.request_id, self._live[request.request_id], time.time()
        if request.pooling is not None:
            await asyncio.sleep(self.step_s)
            live.clear()
            timing = Timing(began, began, time.time(), time.time())
            stream._push(Pooled(name, self.vector(request), len(request.prompt_token_ids), 1, timing))
            return
        outputs, begin = {index: [*self.script(request, index)] for index in live}, len(request.resume_token_ids)
        for step in itertools.count(begin):
            await asyncio.sleep(self.step_s)
            if self.dies_after is not None and step - begin >= self.dies_after:
                live.clear()
                stream._push(Failed(name, "unavailable", "the group died"))
            for index in [*live]:
                token = outputs[index][step]
                stream._push(self._token(request, index, step, token))
                if reason := self._reason(request, step, token, len(outputs[index])):
                    live.discard(index)
                    stop = token if reason == "stop" else None
                    timing = Timing(began, began, began + 0.001, time.time())
                    counts = {
                        "prompt_tokens": len(request.prompt_token_ids),
                        "cached_tokens": 2,
                        "output_tokens": step + 1,
                    }
                    stream._push(Finished(name, index, reason, stop, **counts, timing=timing))
            if not live:
                return

    def _reason(self, request: Request, step: int, token: int, length: int) -> str | None:
        sampling = request.sampling
        if (token == END and not sampling.ignore_eos) or token in sampling.stop_token_ids:
            return "stop"
        return "length" if step + 1 == sampling.max_tokens or step + 1 == length else None

    def _token(self, request: Request, index: int, step: int, token: int) -> Token:
        sampling = request.sampling
        scores = None if sampling.logprobs is None else [_score(token, sampling.logprobs)]
        prompt = None
        if sampling.prompt_logprobs is not None and step == index == 0:
            rest = request.prompt_token_ids[1:]
            prompt = [None, *(_score(one, sampling.prompt_logprobs) for one in rest)]
        return Token(request.request_id, index, (token,), scores, prompt)


def _score(token: int, top: int) -> TokenLogprob:
    return TokenLogprob(-0.5, 1, [(token, -0.5), *((65 + i, -1.0 - i) for i in range(20))][:top])


class FakeDirectory:
    """A GroupDirectory of fakes."""

    def __init__(self, *groups: FakeGroup) -> None:
        self.groups = {group.info.name: group for group in groups}
        self.sessions: list[str] = []
        """Of what was placed."""

    def find(self, model: str) -> FakeGroup:
        if not self.groups[model].alive:
            raise UnavailableError(f"model {model!r} isn't available: {self.missing()[model]}", retry_after_s=2.0)
        return self.groups[model]

    def place(self, model: str, request: Request, session: str = "") -> Placement:
        group = self.find(model)
        self.sessions.append(session)
        router = Router()
        route = router.place(request, [router.join("fake")], 0.0, session)
        return Placement(group, request, route)

    def move(self, model: str, request: Request, source: Placement, session: str = "") -> Placement:
        raise UnavailableError("there is no other group")

    def clients(self, model: str) -> list[FakeGroup]:
        return [self.groups[model]]

    def models(self) -> list[ModelInfo]:
        return [group.info for group in self.groups.values() if group.alive]

    def missing(self) -> dict[str, str]:
        return {name: group.last_error or "starting" for name, group in self.groups.items() if not group.alive}


class LiveGateway:
    """HTTP and gRPC servers over a fake group, in a thread with a loop of its own: `with live_gateway(...) as gateway`."""

    def __init__(
        self, folder: Path, config: GatewayConfig | None = None, tracing: Tracing | None = None, **options: Any
    ) -> None:
        from kvasir.cluster.auth import load_keys, tenant_of
        from kvasir.cluster.desk import Desk
        from kvasir.cluster.metrics import Metrics
        from kvasir.cluster.recordings import Recordings
        from kvasir.cluster.served_model import ServedModel

        engine = EngineConfig(model=str(folder), served_model_name=("bytes", "alias/bytes"))
        self.config = config or GatewayConfig(failover_timeout_s=0)
        keys = load_keys(self.config, {})
        self.group = FakeGroup(max_stream_buffer=self.config.max_stream_buffer)
        self.directory = FakeDirectory(self.group)
        self.model = ServedModel.load(dataclasses.replace(engine, **options))
        log_requests = self.config.enable_log_requests
        self.desk = Desk(
            [self.model],
            self.directory,
            Metrics(),
            tracing or Tracing(),
            log_requests=log_requests,
            failover_timeout_s=self.config.failover_timeout_s,
            tenant=tenant_of(self.config, keys),
            recordings=Recordings(keys, ttl_s=self.config.stream_ttl_s, max_bytes=self.config.stream_memory),
        )
        self.others: dict[str, str] = {}
        """Name of another gateway -> its URL."""
        self.loop = asyncio.new_event_loop()
        self.url = self.grpc_address = ""

    def __enter__(self) -> LiveGateway:
        self._thread = threading.Thread(target=self.loop.run_until_complete, args=(self._serve(),), daemon=True)
        self._started = threading.Event()
        self._thread.start()
        assert self._started.wait(10)
        return self

    def __exit__(self, *_: object) -> None:
        self.loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(10)
        self.loop.close()

    def call(self, function: Callable[[], Any]) -> Any:
        """Run it on the gateway's loop."""

        async def run() -> Any:
            return function()

        return asyncio.run_coroutine_threadsafe(run(), self.loop).result(10)

    async def _serve(self) -> None:
        from kvasir.cluster.gateway import close_app, create_app, create_grpc_server
        from kvasir.cluster.http_protocol import server_config
        from kvasir.cluster.sockets import bound_socket

        config, self._stop = self.config, asyncio.Event()

        async def find(name: str) -> str | None:
            return self.others.get(name)

        self.app = create_app(self.desk, config, find)
        options = server_config(self.app, config)
        server, self.server = uvicorn.Server(options), create_grpc_server(self.desk, config)
        self.connections = server.server_state.connections
        sock = bound_socket("127.0.0.1", 0, shared=False)
        self.url = f"{'https' if config.ssl_certfile else 'http'}://localhost:{sock.getsockname()[1]}"
        options.load()
        server.lifespan = options.lifespan_class(options)
        if config.ssl_certfile:
            pair = (Path(config.ssl_keyfile).read_bytes(), Path(config.ssl_certfile).read_bytes())
            port = self.server.add_secure_port("localhost:0", grpc.ssl_server_credentials([pair]))
        else:
            port = self.server.add_insecure_port("127.0.0.1:0")
        self.grpc_address = f"localhost:{port}"
        await self.server.start()
        await server.startup(sockets=[sock])
        self._started.set()
        await self._stop.wait()
        await self.server.stop(grace=0)
        server.force_exit = True
        await server.shutdown(sockets=[sock])
        await close_app(self.app)


@pytest.fixture
def live_gateway(byte_model: Path) -> Callable[..., LiveGateway]:
    """`with live_gateway(config, **engine options) as gateway`: `.url`, `.grpc_address`, `.group`, `.desk`."""
    return functools.partial(LiveGateway, byte_model)


@pytest.fixture(scope="module")
def gateway(byte_model: Path) -> Iterator[LiveGateway]:
    """One for all tests of a module that change nothing about it."""
    with LiveGateway(byte_model) as live:
        yield live


@pytest.fixture(scope="module")
def thinker(byte_model: Path) -> Iterator[LiveGateway]:
    """The same of a model that thinks and calls tools."""
    with LiveGateway(byte_model, tool_call_parser="hermes", reasoning_parser="think") as live:
        yield live
