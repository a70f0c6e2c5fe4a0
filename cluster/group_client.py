"""A gateway's end of the stream to a group: `GroupClient` takes `Request`s. It belongs to one asyncio loop."""

from __future__ import annotations

import asyncio
import itertools
import logging
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias, cast

import grpc

from kvasir.cluster import wire
from kvasir.cluster.group_stream import Stream
from kvasir.cluster.member import Member, Reservation
from kvasir.cluster.router import Route, Router
from kvasir.cluster.wire import Endpoint
from kvasir.engine.config import Role
from kvasir.engine.errors import UnavailableError
from kvasir.engine.event import Event, Failed, FinishReason
from kvasir.engine.info import ModelInfo
from kvasir.engine.request import Request
from kvasir.engine.scheduler import Stats
from kvasir.proto import group_pb2 as pb
from kvasir.proto.group_pb2_grpc import GroupStub

log = logging.getLogger(__name__)

SILENCE_S = 1.5
"""A group that says nothing for six of its load periods is dead, or not to be told from it."""
BACKOFF_S = (0.05, 1.0)
"""First and longest pause between attempts to connect."""
WARY_S = 2.0
"""So long after a group said that it can't go on, others are asked first: its process may outlive its engine a little."""

_ADDRESS = re.compile(r"\s*\b(?:ipv[46]:\S+|\d+(?:\.\d+){3}(?::\d+)?):?")
"""As gRPC writes it into its errors."""

GroupCall: TypeAlias = "grpc.aio.StreamStreamCall[pb.GatewayMessage, pb.GroupMessage]"


class GroupClient:
    """One gateway's stream to one life of one group; connects by itself, and again when the stream breaks.

    `on_break` is called whenever a stream has broken.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        *,
        max_stream_buffer: int = 4096,
        on_break: Callable[[], None] = lambda: None,
        member: Member | None = None,
    ) -> None:
        self.endpoint = endpoint
        self.member = member or Router().join(self.name)
        """The group as its model's router knows it."""
        self.info: ModelInfo | None = None
        """None until the first connection."""
        self.stats: Stats | None = None
        """As of the last report, up to half a second ago."""
        self.last_error: str | None = None
        """Why there is no connection."""
        self.draining = False
        """It takes no new requests, and what runs there goes on elsewhere if it can."""
        self._limit = max_stream_buffer
        self._on_break = on_break
        self._streams: dict[int, Stream] = {}
        self._numbers = itertools.count(1)
        self._outbox: asyncio.Queue[pb.GatewayMessage] | None = None
        self._heartbeat = self._seen = 0.0
        self._failed_at: float | None = None
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin to connect; needs a running loop."""
        self._task = asyncio.get_running_loop().create_task(self._run(), name=f"group {self.endpoint.address}")

    async def close(self) -> None:
        """Break the stream; what runs on it fails."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def finish(self) -> None:
        """Take no more requests, and close as soon as nothing runs any more."""
        await asyncio.sleep(wire.LOAD_PERIOD_S)  # if it has died its streams break meanwhile
        self._change(True, self.member.role)
        while self._streams:
            await asyncio.sleep(wire.LOAD_PERIOD_S)
        await self.close()

    @property
    def alive(self) -> bool:
        """Connected, and the group's step loop turned within `wire.STALL_S`."""
        return self._outbox is not None and time.monotonic() - self._heartbeat < wire.STALL_S

    @property
    def name(self) -> str:
        """Tells this life of this group from others."""
        return self.endpoint.incarnation[:8]

    @property
    def failing(self) -> bool:
        """It said within `WARY_S` that it can't serve a request."""
        return self._failed_at is not None and time.monotonic() - self._failed_at < WARY_S

    def sheds(self, streaming: bool) -> str:
        """Why it wants to be rid of a request, that `streaming` says has its first token: drain, prefill, or nothing."""
        if self.draining:
            return "drain"
        return "prefill" if streaming and self.member.role == "prefill" else ""

    @property
    def load(self) -> int:
        """Requests that run or wait there: of all gateways as reported, or of this one as counted."""
        return max(self.stats.running + self.stats.waiting if self.stats else 0, len(self._streams))

    async def submit(self, request: Request, placement: Placement | None = None) -> Stream:
        """Send `request`; returns when the group took it. Raises the KvasirError with which the group refused it."""
        if self._outbox is None:
            raise UnavailableError(f"the group can't be reached: {self.last_error or 'connecting'}", retry_after_s=1.0)
        number = next(self._numbers)
        stream = Stream(request, self._limit, lambda index, reason: self._abort(number, index, reason))
        message = pb.GatewayMessage(submit=wire.encode_request(request, number))
        wire.check_size(message, "prompt")
        self._outbox.put_nowait(message)
        self._streams[number] = stream
        if placement is not None:
            stream._reservation = placement.sent(number)
        try:
            await stream._answer
        except BaseException:  # a refusal, or the caller was cancelled while it waited
            stream.close()
            self._streams.pop(number, None)
            raise
        return stream

    def _abort(self, number: int, index: int | None, reason: FinishReason) -> None:
        if self._outbox is not None and number in self._streams:
            self._outbox.put_nowait(pb.GatewayMessage(abort=pb.Abort(number=number, index=index, reason=reason)))

    async def _run(self) -> None:
        """Connect, converse until the stream breaks, pause, again."""
        pause = BACKOFF_S[0]
        while True:
            began = time.monotonic()
            try:
                await self._converse()
            except grpc.aio.AioRpcError as error:
                self._lost(error.details() or error.code().name.lower())
            except UnavailableError as error:
                self._lost(error.message)
            finally:
                self._disconnected()
            pause = BACKOFF_S[0] if self._seen > began else min(2 * pause, BACKOFF_S[1])
            await asyncio.sleep(pause)

    def _lost(self, why: str) -> None:
        """There is no connection. Clients are told why, but no address of ours, which only the log says."""
        told = _ADDRESS.sub("", why)
        if told != self.last_error:
            log.info("group %s at %s: %s", self.name, self.endpoint.address, why)
        self.last_error = told

    async def _converse(self) -> None:
        """One connection's life: raises when it breaks."""
        async with grpc.aio.insecure_channel(self.endpoint.address, options=wire.CHANNEL_OPTIONS) as channel:
            call = GroupStub(channel).Connect(metadata=((wire.TOKEN_METADATA, self.endpoint.token),))
            self._seen = time.monotonic()
            outbox: asyncio.Queue[pb.GatewayMessage] = asyncio.Queue()
            work = (self._read(call, outbox), _write(call, outbox), self._watch())
            tasks = [asyncio.ensure_future(part) for part in work]
            try:
                done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
                done.pop().result()
            finally:
                call.cancel()
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)

    async def _read(self, call: GroupCall, outbox: asyncio.Queue[pb.GatewayMessage]) -> None:
        """Take messages; from the first one on, requests may be sent."""
        while (message := await call.read()) is not grpc.aio.EOF:
            self._seen = time.monotonic()
            self._receive(cast(pb.GroupMessage, message), outbox)
        raise UnavailableError("the group closed the stream")

    def _receive(self, message: pb.GroupMessage, outbox: asyncio.Queue[pb.GatewayMessage]) -> None:
        kind = message.WhichOneof("message")
        if kind == "step":
            self._take(message.step)
        elif kind == "answer":
            self._answered(message.answer)
        elif kind == "load":
            self.stats = wire.decode_stats(message.load.stats)
            self._heartbeat = self._seen - message.load.heartbeat_age_s
            self.member.report(self.stats, message.load.counted, self._seen)
            self._change(self.draining or message.load.draining, wire.decode_role(message.load.role))
        elif kind == "blocks":
            if self.member.blocks(message.blocks):
                outbox.put_nowait(pb.GatewayMessage(resync=pb.Resync()))
        elif kind == "hello":
            self._welcome(message.hello)
            self._outbox = outbox

    def _welcome(self, hello: pb.Hello) -> None:
        """Another life behind the same address (a port is soon used again) may serve another model: it isn't ours."""
        if hello.incarnation != self.endpoint.incarnation:
            raise UnavailableError("the group was replaced")
        self.info = wire.decode_info(hello.model)
        self.member.welcome(self.info, hello.incarnation)
        self.last_error = None
        self._heartbeat = self._seen

    def _change(self, draining: bool, role: Role) -> None:
        """It drains, or has another role: what runs there may have to go."""
        if (draining, role) != (self.draining, self.member.role):
            self.draining, self.member.role = draining, role
            for stream in [*self._streams.values()]:
                stream.on_leave()

    def _answered(self, answer: pb.Answer) -> None:
        if stream := self._streams.get(answer.number):
            error = wire.decode_error(answer.error) if answer.HasField("error") else None
            if isinstance(error, UnavailableError):
                self._failed_at = time.monotonic()
            stream._answered(error)

    def _take(self, step: pb.Step) -> None:
        """Each request gets at once what the step brings for it."""
        touched: dict[int, Stream] = {}
        for number, stream, event in wire.step_events(step, self._streams.get):
            touched[number] = stream
            if stream._add(event):
                self._ended(number, event)
        for stream in touched.values():
            stream._deliver()

    def _ended(self, number: int, event: Event) -> None:
        """This was its last event."""
        if isinstance(event, Failed) and event.code == UnavailableError.code:
            self._failed_at = time.monotonic()
        del self._streams[number]

    async def _watch(self) -> None:
        """Raises when the group is silent for SILENCE_S. A turn that comes late says that our own loop was held up."""
        while True:
            due = time.monotonic() + wire.LOAD_PERIOD_S
            await asyncio.sleep(wire.LOAD_PERIOD_S)
            now = time.monotonic()
            if now - due < wire.LOAD_PERIOD_S and now - self._seen > SILENCE_S:
                raise UnavailableError(f"the group said nothing for {SILENCE_S} s")

    def _disconnected(self) -> None:
        """Fail what was running."""
        self._outbox = None
        self.member.lost()
        streams, self._streams = self._streams, {}
        for stream in streams.values():
            stream._break(f"the group died while it served this request: {self.last_error}")
        self._on_break()


async def _write(call: GroupCall, outbox: asyncio.Queue[pb.GatewayMessage]) -> None:
    """Send what is queued."""
    while True:
        try:
            await call.write(await outbox.get())
        except asyncio.InvalidStateError as error:  # the stream broke while something was queued
            raise UnavailableError("the stream to the group ended") from error


@dataclass(frozen=True, slots=True)
class Placement:
    """A request and the group that was chosen and reserved for it: submit it, before anything is awaited."""

    client: GroupClient
    request: Request
    route: Route

    async def submit(self) -> Stream:
        """As GroupClient.submit."""
        try:
            return await self.client.submit(self.request, self)
        except BaseException:  # refused, or cancelled
            self.route.reservation.settle()
            raise

    def sent(self, number: int) -> Reservation:
        """The request is on its way under this number."""
        self.route.reservation.number = number
        return self.route.reservation
