"""The group's end of the streams to gateways: lives in rank 0's process, beside the engine.

All state belongs to the asyncio loop; the engine's thread only hands over each step's events.
"""

from __future__ import annotations

import asyncio
import hmac
import itertools
import secrets
import time
import uuid
from collections import deque
from collections.abc import AsyncIterable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import grpc

from kvasir.cluster import wire
from kvasir.cluster.block_journal import BlockJournal
from kvasir.cluster.telemetry import Tracing
from kvasir.cluster.wire import Endpoint
from kvasir.engine.blocks import Changes, Tier
from kvasir.engine.config import Role
from kvasir.engine.errors import ClientError, KvasirError, UnavailableError
from kvasir.engine.event import Event, Failed, Finished, FinishReason, Pooled, Token
from kvasir.engine.info import ModelInfo
from kvasir.engine.request import Request
from kvasir.engine.scheduler import Stats
from kvasir.proto import group_pb2 as pb
from kvasir.proto.group_pb2_grpc import GroupServicer, add_GroupServicer_to_server

MAX_QUEUED_BYTES = 64 * 2**20
UNREAD_S = 10.0
"""A gateway that leaves a message unread this long, or MAX_QUEUED_BYTES behind it, is cut off: its requests end."""
SERVER_OPTIONS = [
    ("grpc.max_send_message_length", wire.MAX_MESSAGE_BYTES),
    ("grpc.max_receive_message_length", wire.MAX_MESSAGE_BYTES),
    ("grpc.so_reuseport", 0),
    ("grpc.keepalive_time_ms", 5000),  # a gateway's machine that vanished sends no FIN
    ("grpc.keepalive_timeout_ms", 3000),
]


class ServedEngine(Protocol):
    """What the service needs of an engine: kvasir.engine.engine.Engine, or a fake in tests."""

    @property
    def info(self) -> ModelInfo: ...
    @property
    def heartbeat(self) -> float: ...
    @property
    def stats_at(self) -> float: ...
    def submit(self, request: Request) -> None: ...
    def abort(self, request_id: str, index: int | None = None, reason: FinishReason = "abort") -> None: ...
    def stats(self) -> Stats: ...
    def listen(self, on_blocks: Callable[[Tier, Changes], None]) -> None: ...


@dataclass(slots=True, eq=False)
class _Link:
    """One gateway's stream."""

    name: str
    queue: asyncio.Queue[pb.GroupMessage | None] = field(default_factory=asyncio.Queue)
    """None ends the stream."""
    queued_bytes: int = 0
    writing_since: float | None = None
    cut: bool = False
    requests: dict[int, _Running] = field(default_factory=dict)
    arrivals: deque[tuple[float, int]] = field(default_factory=deque)
    """(when, number) of requests that the reported load doesn't hold yet."""
    counted: int = 0
    """The last request that it does hold."""


@dataclass(slots=True, eq=False)
class _Running:
    """A request in the engine, that knows it as `request.request_id`."""

    link: _Link
    number: int
    request: Request
    remaining: int


class GroupService(GroupServicer):
    """Serves an engine to gateways that know its secret. Create it in the loop; the engine's thread calls `deliver`."""

    def __init__(self, tracing: Tracing) -> None:
        self._tracing = tracing
        self._token = secrets.token_hex(32)
        self._incarnation = uuid.uuid4().hex
        self._journal = BlockJournal(self._incarnation)
        self._reported: tuple[Stats, float] | None = None
        self._role: Role = "both"
        self._draining = False
        self._loop = asyncio.get_running_loop()
        self._server = grpc.aio.server(options=SERVER_OPTIONS)
        self._links: set[_Link] = set()
        self._running: dict[str, _Running] = {}
        self._numbers = itertools.count(1)

    async def start(self, engine: ServedEngine, host: str) -> Endpoint:
        """Listen on a free port of `host`."""
        self._engine = engine
        engine.listen(self.report_blocks)
        add_GroupServicer_to_server(self, self._server)
        port = self._server.add_insecure_port(f"{host}:0")
        await self._server.start()
        self._reporter = self._loop.create_task(self._report())
        return Endpoint(f"{host}:{port}", self._incarnation, self._token)

    def set_role(self, role: Role) -> None:
        """What the group is for, as gateways are told at once."""
        self._role = role
        self._tell_load()

    async def drain(self, timeout_s: float) -> None:
        """Take no new requests; returns when gateways have moved those that run, or they have ended, or it took too long."""
        self._draining = True
        self._tell_load()
        deadline = time.monotonic() + timeout_s
        while self._running and time.monotonic() < deadline:
            await asyncio.sleep(wire.PUBLISH_PERIOD_S)

    async def stop(self) -> None:
        """Close every stream."""
        self._reporter.cancel()
        for link in self._links:
            link.queue.put_nowait(None)
        await self._server.stop(grace=0.5)

    def deliver(self, events: Sequence[Event]) -> None:
        """Engine's thread, once per step: the loop encodes them while the engine computes the next step."""
        self._loop.call_soon_threadsafe(self._dispatch, events)

    def report_blocks(self, tier: Tier, changes: Changes) -> None:
        """Any thread: what a tier stored and evicted."""
        self._loop.call_soon_threadsafe(self._journal.take, tier, changes)

    async def Connect(self, request_iterator: Any, context: Any) -> None:  # noqa: N802
        """One gateway's stream: until it breaks, is closed or cut off; then its requests are aborted."""
        sent = dict(context.invocation_metadata()).get(wire.TOKEN_METADATA, "")
        if not hmac.compare_digest(str(sent).encode(), self._token.encode()):
            await context.abort(grpc.StatusCode.UNAUTHENTICATED, "wrong or missing kvasir-token")
        link = _Link(f"link{next(self._numbers)}")
        hello = pb.Hello(incarnation=self._incarnation, model=wire.encode_info(self._engine.info))
        self._post(link, pb.GroupMessage(hello=hello))
        self._post(link, self._load(link))
        self._resync(link)
        self._links.add(link)
        work = (self._read(link, request_iterator), self._write(link, context))
        tasks = [self._loop.create_task(part) for part in work]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            self._links.discard(link)
            self._abort_all(link)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        if link.cut:
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "cut off: messages were left unread")

    async def _read(self, link: _Link, messages: AsyncIterable[pb.GatewayMessage]) -> None:
        """Take messages until the gateway closes the stream."""
        async for message in messages:
            self._receive(link, message)

    async def _write(self, link: _Link, context: Any) -> None:
        """Send what is queued; flow control may hold this up, `_report` watches for how long."""
        while not link.cut and (message := await link.queue.get()) is not None:
            link.writing_since = time.monotonic()
            await context.write(message)
            link.writing_since = None
            link.queued_bytes -= message.ByteSize()

    def _post(self, link: _Link, message: pb.GroupMessage) -> None:
        """Queue a message, or cut the gateway off when too much is queued."""
        if link.cut:
            return
        link.queued_bytes += message.ByteSize()
        link.queue.put_nowait(message)
        if link.queued_bytes > MAX_QUEUED_BYTES:
            self._cut(link)

    def _cut(self, link: _Link) -> None:
        """Free what the gateway holds; the stream itself ends when it reads again, or goes away."""
        link.cut = True
        self._abort_all(link)
        while not link.queue.empty():
            link.queue.get_nowait()

    def _receive(self, link: _Link, message: pb.GatewayMessage) -> None:
        if link.cut:
            return
        if message.WhichOneof("message") == "submit":
            answer = pb.Answer(number=message.submit.number)
            try:
                self._submit(link, message.submit)
            except KvasirError as error:
                answer.error.CopyFrom(wire.encode_error(error))
            link.arrivals.append((time.monotonic(), message.submit.number))
            self._post(link, pb.GroupMessage(answer=answer))
        elif message.WhichOneof("message") == "resync":
            self._resync(link)
        elif running := link.requests.get(message.abort.number):
            abort = message.abort
            index = abort.index if abort.HasField("index") else None
            self._engine.abort(running.request.request_id, index, "stop" if abort.reason == "stop" else "abort")

    def _submit(self, link: _Link, message: pb.Submit) -> None:
        """Hand a request to the engine, named so that gateways don't collide. Raises KvasirError."""
        if self._draining:  # whoever asks hasn't heard of it yet
            raise UnavailableError("the group is draining", retry_after_s=1.0)
        name = f"{link.name}/{message.request_id}"
        if name in self._running or message.number in link.requests:
            raise ClientError(f"request id {message.request_id!r} is already in use", param="request_id")
        request = wire.decode_request(message, name)
        self._engine.submit(request)
        running = _Running(link, message.number, request, request.sampling.streams)
        self._running[name] = link.requests[message.number] = running

    def _dispatch(self, events: Sequence[Event]) -> None:
        """One message for each gateway that the step brought something for."""
        steps: dict[_Link, pb.GroupMessage] = {}
        for event in events:
            if (running := self._running.get(event.request_id)) is None:
                continue
            if isinstance(event, Token) and event.prompt_logprobs:
                event = self._fitting(event)
            if (message := steps.get(running.link)) is None:
                message = steps[running.link] = pb.GroupMessage()
            wire.add_event(message.step, running.number, event)
            self._count(running, event)
        for link, message in steps.items():
            self._post(link, message)

    def _count(self, running: _Running, event: Event) -> None:
        """After its last event a request is forgotten."""
        if isinstance(event, Finished):
            self._tracing.stages(running.request, event)
            running.remaining -= 1
        elif isinstance(event, Pooled):
            self._tracing.stages(running.request, event)
            running.remaining = 0
        elif isinstance(event, Failed):
            running.remaining = 0
        if running.remaining == 0:
            self._forget(running)

    def _fitting(self, event: Token) -> Token | Failed:
        """The first token with all prompt_logprobs, the only event that can outgrow a message."""
        step = pb.Step()
        wire.add_event(step, 0, event)
        try:
            wire.check_size(step, "prompt_logprobs")
        except ClientError as error:
            self._engine.abort(event.request_id)
            return Failed(event.request_id, error.code, error.message, param=error.param)
        return event

    def _forget(self, running: _Running) -> None:
        del self._running[running.request.request_id]
        del running.link.requests[running.number]

    def _abort_all(self, link: _Link) -> None:
        """The gateway is gone: nobody waits for its requests."""
        for running in [*link.requests.values()]:
            self._forget(running)
            self._engine.abort(running.request.request_id)

    def _load(self, link: _Link) -> pb.GroupMessage:
        """The load, and which of this gateway's requests it holds."""
        made = self._engine.stats_at  # before the figures: they may be newer, not older
        stats = self._engine.stats()
        while link.arrivals and link.arrivals[0][0] < made:
            link.counted = link.arrivals.popleft()[1]
        age = max(0.0, time.monotonic() - self._engine.heartbeat)
        load = pb.Load(
            heartbeat_age_s=age,
            stats=wire.encode_stats(stats),
            counted=link.counted,
            role=self._role,
            draining=self._draining,
        )
        return pb.GroupMessage(load=load)

    def _resync(self, link: _Link) -> None:
        """A snapshot for one gateway, the latest changes for the others."""
        self._publish_blocks()
        for blocks in self._journal.snapshot():
            self._post(link, pb.GroupMessage(blocks=blocks))

    def _publish_blocks(self) -> None:
        for blocks in self._journal.flush():
            message = pb.GroupMessage(blocks=blocks)
            for link in [*self._links]:
                self._post(link, message)

    async def _report(self) -> None:
        """Tell every gateway load and blocks when they change, the load also when it doesn't; cut off those that don't read."""
        while True:
            await asyncio.sleep(wire.PUBLISH_PERIOD_S)
            self._publish_blocks()
            now, stats = time.monotonic(), self._engine.stats()
            if (
                self._reported is not None
                and stats == self._reported[0]
                and now < self._reported[1] + wire.LOAD_PERIOD_S
            ):
                continue
            self._reported = stats, now
            for link in self._links:
                if link.writing_since is not None and now - link.writing_since > UNREAD_S:
                    self._cut(link)
            self._tell_load()

    def _tell_load(self) -> None:
        for link in [*self._links]:
            self._post(link, self._load(link))
