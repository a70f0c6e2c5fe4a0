"""A gateway over a fake group, whose model's tokens are bytes."""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import json
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import tokenizers
import uvicorn

from kvasir.cluster.config import GatewayConfig
from kvasir.cluster.directory import BlockDirectory
from kvasir.cluster.group_client import Placement
from kvasir.cluster.group_stream import Stream
from kvasir.cluster.router import Router
from kvasir.cluster.telemetry import Tracing
from kvasir.engine.config import EngineConfig
from kvasir.engine.errors import UnavailableError
from kvasir.engine.event import Failed, Finished, Pooled, Timing, Token, TokenLogprob
from kvasir.engine.info import ModelInfo
from kvasir.engine.request import Request
from kvasir.engine.scheduler import Stats

END, USER, ASSISTANT, SYSTEM, TOOL = range(256, 261)
_TEMPLATE = """{%- for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor -%}
{%- if tools %}<|tool|>{{ tools | tojson }}<|end|>{% endif -%}
{%- if add_generation_prompt %}<|assistant|>{% endif %}"""


def write_byte_model(folder: Path) -> None:
    """A model's folder without weights: its tokens are the bytes, and <|end|>, <|user|>, ... (256 and on)."""
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
        self.drafts = (0, 0)
        """Tokens that speculation proposed for each continuation, and those that were taken."""
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

    async def close(self) -> None:
        """Whoever was aborted, or isn't read any more, is answered no longer."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

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
                stream._add(self._token(request, index, step, token))
                if reason := self._reason(request, step, token, len(outputs[index])):
                    live.discard(index)
                    stop = token if reason == "stop" else None
                    timing = Timing(began, began, began + 0.001, time.time())
                    counts = {
                        "prompt_tokens": len(request.prompt_token_ids),
                        "cached_tokens": 2,
                        "output_tokens": step + 1,
                        **dict(zip(("drafted", "accepted"), self.drafts, strict=True)),
                    }
                    stream._add(Finished(name, index, reason, stop, **counts, timing=timing))
            stream._deliver()
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


async def _left() -> list[str]:
    """Tasks beside this one that don't end within a moment."""
    tasks = asyncio.all_tasks() - {asyncio.current_task()}
    return [repr(task) for task in (await asyncio.wait(tasks, timeout=5.0))[1]] if tasks else []


def _score(token: int, top: int) -> TokenLogprob:
    return TokenLogprob(-0.5, 1, [(token, -0.5), *((65 + i, -1.0 - i) for i in range(20))][:top])


class FakeDirectory:
    """A GroupDirectory of fakes."""

    def __init__(self, *groups: FakeGroup) -> None:
        self.groups = {group.info.name: group for group in groups}
        self.sessions: list[str] = []
        """Of what was placed."""
        self._blocks = {name: BlockDirectory() for name in self.groups}

    def blocks(self) -> dict[str, BlockDirectory]:
        return self._blocks

    def find(self, model: str) -> FakeGroup:
        if not self.groups[model].alive:
            raise UnavailableError(f"model {model!r} isn't available: {self.missing()[model]}", retry_after_s=2.0)
        return self.groups[model]

    def place(self, model: str, request: Request, begun: Placement | None = None, session: str = "") -> Placement:
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
        if self.config.state_path is None:  # what one stores, no other finds
            self.config = dataclasses.replace(self.config, state_path=":memory:")
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
        self.left: list[str] = []
        """Tasks that were there when all was closed; asyncio would only print that they were destroyed."""
        self.loop = asyncio.new_event_loop()
        self.url = self.grpc_address = ""

    def __enter__(self) -> LiveGateway:
        self._thread = threading.Thread(target=self.loop.run_until_complete, args=(self._serve(),), daemon=True)
        self._started = threading.Event()
        self._thread.start()
        assert self._started.wait(60)
        return self

    def __exit__(self, *_: object) -> None:
        self.loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(60)
        self.loop.close()
        assert not self.left, "tasks of the gateway outlive it"

    def call(self, function: Callable[[], Any]) -> Any:
        """Run it on the gateway's loop."""

        async def run() -> Any:
            return function()

        return asyncio.run_coroutine_threadsafe(run(), self.loop).result(60)

    async def _serve(self) -> None:
        from kvasir.cluster.gateway import close_app, create_app, create_grpc_server
        from kvasir.cluster.http_protocol import server_config
        from kvasir.cluster.sockets import bound_socket

        config, self._stop = self.config, asyncio.Event()

        async def find(name: str) -> str | None:
            return self.others.get(name)

        self.app = create_app(self.desk, config, find)
        options = server_config(self.app, config, self.desk.metrics.refused)
        server, self.server = uvicorn.Server(options), create_grpc_server(self.desk, config, self.app.state.shelf)
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
        await self.group.close()
        self.left = await _left()
