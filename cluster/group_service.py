"""The group's end of the streams to gateways: lives in rank 0's process, beside the engine.

All state belongs to the asyncio loop; the engine's thread only hands over each step's events.
"""

from __future__ import annotations

import asyncio
import hmac
import itertools
import logging
import secrets
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

from kvasir.cluster import wire
from kvasir.cluster.block_journal import BlockJournal
from kvasir.cluster.message_stream import MessageStream
from kvasir.cluster.sockets import authority
from kvasir.cluster.telemetry import Tracing
from kvasir.cluster.wire import Endpoint
from kvasir.engine.blocks import Changes, Tier
from kvasir.engine.config import Role
from kvasir.engine.errors import ClientError, KvasirError, OverloadedError, UnavailableError
from kvasir.engine.event import Event, Failed, Finished, FinishReason, Pooled, Token
from kvasir.engine.info import ModelInfo
from kvasir.engine.request import Request
from kvasir.engine.scheduler import Stats
from kvasir.proto import group_pb2 as pb

log = logging.getLogger(__name__)

MAX_QUEUED_BYTES = 4 * wire.MAX_MESSAGE_BYTES
UNREAD_S = 10.0
"""A gateway that reads nothing for so long though something waits, or lets MAX_QUEUED_BYTES wait, is cut off: its requests end."""
MAX_TOKEN_BYTES = 1024
"""Who hasn't said its token may send no more,"""
TOKEN_S = 10.0
"""and has so long to say it."""
STOP_S = 0.5
"""So long gateways may take to read what was sent before the end."""


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
    stream: MessageStream[pb.GatewayMessage] = field(init=False)
    requests: dict[int, _Running] = field(default_factory=dict)
    arrivals: deque[tuple[float, int]] = field(default_factory=deque)
    """(when, number) of requests that the reported load doesn't hold yet."""
    counted: int = 0
    """The last request that it does hold."""
    snapshot: Iterator[pb.Blocks] | None = None
    """On its way, little by little."""
    behind: list[pb.GroupMessage] = field(default_factory=list)
    """What happened to blocks meanwhile."""


@dataclass(slots=True, eq=False)
class _Running:
    """A request in the engine, that knows it as `request.request_id`."""

    link: _Link
    number: int
    request: Request
    remaining: int


class GroupService:
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
        self._links: set[_Link] = set()
        """Of gateways that have said the token."""
        self._strangers: set[_Link] = set()
        """Those that haven't yet."""
        self._running: dict[str, _Running] = {}
        self._numbers = itertools.count(1)

    async def start(self, engine: ServedEngine, host: str) -> Endpoint:
        """Listen on a free port of `host`."""
        self._engine = engine
        engine.listen(self.report_blocks)
        self._server = await self._loop.create_server(self._accept, host, 0)
        self._reporters = [self._loop.create_task(report) for report in (self._report(), self._publish())]
        port = self._server.sockets[0].getsockname()[1]
        return Endpoint(authority(host, port), self._incarnation, self._token)

    @property
    def failure(self) -> BaseException | None:
        """Why gateways hear no more of load and blocks: they would take the group for dead, and nobody else would."""
        ended = (reporter for reporter in self._reporters if reporter.done() and not reporter.cancelled())
        return next((reporter.exception() for reporter in ended), None)

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
        for reporter in self._reporters:
            reporter.cancel()
        self._server.close()
        for link in self._strangers:
            link.stream.abort()
        if streams := [link.stream for link in self._links]:
            for stream in streams:
                stream.close()
            await asyncio.wait([stream.closed for stream in streams], timeout=STOP_S)
            for stream in streams:
                stream.abort()

    def deliver(self, events: Sequence[Event]) -> None:
        """Engine's thread, once per step: the loop encodes them while the engine computes the next step."""
        self._loop.call_soon_threadsafe(self._dispatch, events)

    def report_blocks(self, tier: Tier, changes: Changes) -> None:
        """Any thread: what a tier stored and evicted."""
        self._loop.call_soon_threadsafe(self._journal.take, tier, changes)

    def _accept(self) -> MessageStream[pb.GatewayMessage]:
        """A connection: one gateway's, once it has said the token; until it breaks, is closed or cut off."""
        link = _Link(f"link{next(self._numbers)}")
        take, over = partial(self._receive, link), partial(self._gone, link)
        link.stream = MessageStream(pb.GatewayMessage, take, over, limit=MAX_TOKEN_BYTES)
        self._strangers.add(link)
        self._loop.call_later(TOKEN_S, self._expel, link)
        return link.stream

    def _expel(self, link: _Link) -> None:
        if link in self._strangers:
            link.stream.abort()

    def _welcome(self, link: _Link, token: str) -> None:
        if not hmac.compare_digest(token.encode(), self._token.encode()):
            link.stream.send(pb.GroupMessage(refused="wrong or missing kvasir-token"))
            link.stream.close()
            return
        self._strangers.discard(link)
        link.stream.limit = wire.MAX_MESSAGE_BYTES
        hello = pb.Hello(incarnation=self._incarnation, model=wire.encode_info(self._engine.info))
        self._post(link, pb.GroupMessage(hello=hello))
        self._post(link, self._load(link))
        self._resync(link)
        self._links.add(link)

    def _gone(self, link: _Link, error: Exception | None) -> None:
        """The gateway is gone: nobody waits for its requests."""
        if link in self._links and not isinstance(error, OSError | None):
            log.error("a gateway's message failed", exc_info=error)
        self._links.discard(link)
        self._strangers.discard(link)
        link.snapshot = None
        for running in [*link.requests.values()]:
            self._forget(running)
            self._engine.abort(running.request.request_id)

    def _post(self, link: _Link, message: pb.GroupMessage) -> None:
        """Send a message, or cut the gateway off when too much is queued."""
        link.stream.send(message)
        if link.stream.queued_bytes > MAX_QUEUED_BYTES:
            self._cut(link)

    def _cut(self, link: _Link) -> None:
        """Free what the gateway holds, and what waits for it."""
        log.warning("a gateway is cut off: it left messages unread")
        link.stream.abort()
        self._gone(link, None)

    def _receive(self, link: _Link, message: pb.GatewayMessage) -> None:
        if link not in self._links:
            self._welcome(link, message.token)
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
        """One message for each gateway that the step brought something for; those that could outgrow it have their own."""
        steps: dict[_Link, pb.GroupMessage] = {}
        for event in events:
            if (running := self._running.get(event.request_id)) is None:
                continue
            if isinstance(event, Token) and event.prompt_logprobs:  # a request's first
                own, sent = self._alone(running, event)
                self._count(running, sent)
                self._post(running.link, own)
                continue
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

    def _alone(self, running: _Running, event: Token | Failed) -> tuple[pb.GroupMessage, Event]:
        """A message of the first token with all prompt_logprobs, or of why it can't be sent: no other event can outgrow a message,
        and a few of these are more than a gateway that reads may let wait."""
        message = pb.GroupMessage()
        wire.add_event(message.step, running.number, event)
        if isinstance(event, Failed):
            return message, event
        try:
            wire.check_size(message, "prompt_logprobs")
            waiting = running.link.stream.queued_bytes + message.ByteSize()
            if waiting > MAX_QUEUED_BYTES // 2:
                text = f"prompt_logprobs would wait behind others: {waiting / 2**20:.0f} MiB are on their way to this gateway"
                raise OverloadedError(f"{text}; ask again later", param="prompt_logprobs")
        except KvasirError as error:
            self._engine.abort(event.request_id)
            return self._alone(running, Failed(event.request_id, error.code, error.message, param=error.param))
        return message, event

    def _forget(self, running: _Running) -> None:
        del self._running[running.request.request_id]
        del running.link.requests[running.number]

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
        """A new snapshot for one gateway."""
        link.snapshot, link.behind = self._journal.snapshot(), []
        self._send_part(link, link.snapshot)

    def _send_part(self, link: _Link, snapshot: Iterator[pb.Blocks]) -> None:
        """The next one; the loop has others to serve, too. Behind the last one goes what happened meanwhile."""
        if link.snapshot is not snapshot:
            return
        if (blocks := next(snapshot, None)) is not None:
            self._post(link, pb.GroupMessage(blocks=blocks))
            self._loop.call_soon(self._send_part, link, snapshot)
            return
        link.snapshot, behind, link.behind = None, link.behind, []
        for message in behind:
            self._post(link, message)

    async def _publish(self) -> None:
        """Tell every gateway what happens to blocks."""
        while True:
            await asyncio.sleep(wire.PUBLISH_PERIOD_S)
            for blocks in self._journal.flush():
                message = pb.GroupMessage(blocks=blocks)
                for link in [*self._links]:
                    if link.snapshot is None:
                        self._post(link, message)
                    else:
                        link.behind.append(message)
                await asyncio.sleep(0)

    async def _report(self) -> None:
        """Tell every gateway the load when it changes, and when it doesn't; cut off those that don't read."""
        while True:
            await asyncio.sleep(wire.PUBLISH_PERIOD_S)
            now, stats = time.monotonic(), self._engine.stats()
            if (
                self._reported is not None
                and stats == self._reported[0]
                and now < self._reported[1] + wire.LOAD_PERIOD_S
            ):
                continue
            self._reported = stats, now
            for link in [*self._links]:
                if link.stream.unread_s(now) > UNREAD_S:
                    self._cut(link)
            self._tell_load()

    def _tell_load(self) -> None:
        for link in [*self._links]:
            self._post(link, self._load(link))
