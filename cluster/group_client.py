"""A gateway's end of the stream to a group: `GroupClient` takes `Request`s. It belongs to one asyncio loop."""

from __future__ import annotations

import asyncio
import itertools
import logging
import os
import time
from collections.abc import Callable
from dataclasses import dataclass

from kvasir.cluster import wire
from kvasir.cluster.group_stream import Stream
from kvasir.cluster.member import Member, Reservation
from kvasir.cluster.message_stream import MessageStream
from kvasir.cluster.router import Route, Router
from kvasir.cluster.wire import Endpoint
from kvasir.engine.config import Role
from kvasir.engine.errors import UnavailableError
from kvasir.engine.event import Event, Failed, FinishReason
from kvasir.engine.info import ModelInfo
from kvasir.engine.request import Request
from kvasir.engine.scheduler import Stats
from kvasir.proto import group_pb2 as pb

log = logging.getLogger(__name__)

SILENCE_S = 1.5
"""A group that says nothing for six of its load periods is dead, or not to be told from it."""
BACKOFF_S = (0.05, 1.0)
"""First and longest pause between attempts to connect."""
WARY_S = 2.0
"""So long after a group said that it can't go on, others are asked first: its process may outlive its engine a little."""


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
        """Why there is no connection. Clients are told, so it holds no address of ours."""
        self.draining = False
        """It takes no new requests, and what runs there goes on elsewhere if it can."""
        self._limit = max_stream_buffer
        self._on_break = on_break
        self._streams: dict[int, Stream] = {}
        self._numbers = itertools.count(1)
        self._line: MessageStream[pb.GroupMessage] | None = None
        """Where requests may be sent: the group has said hello."""
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
        return self._line is not None and time.monotonic() - self._heartbeat < wire.STALL_S

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
        if self._line is None:
            raise UnavailableError(f"the group can't be reached: {self.last_error or 'connecting'}", retry_after_s=1.0)
        number = next(self._numbers)
        stream = Stream(request, self._limit, lambda index, reason: self._abort(number, index, reason))
        message = pb.GatewayMessage(submit=wire.encode_request(request, number))
        wire.check_size(message, "prompt")
        self._line.send(message)
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
        if self._line is not None and number in self._streams:
            self._line.send(pb.GatewayMessage(abort=pb.Abort(number=number, index=index, reason=reason)))

    async def _run(self) -> None:
        """Connect, converse until the stream breaks, pause, again."""
        pause = BACKOFF_S[0]
        while True:
            began = time.monotonic()
            try:
                await self._converse()
            except UnavailableError as error:
                self._lost(error.message)
            except OSError as error:  # whose own text may hold the address
                why = os.strerror(error.errno) if error.errno else type(error).__name__
                self._lost(f"the connection failed: {why}")
            except Exception as error:  # it said what can't be read: no reason never to ask it again
                log.error("group %s: its message failed", self.name, exc_info=error)
                self._lost("a message of the group can't be read")
            finally:
                self._disconnected()
            pause = BACKOFF_S[0] if self._seen > began else min(2 * pause, BACKOFF_S[1])
            await asyncio.sleep(pause)

    def _lost(self, why: str) -> None:
        """There is no connection."""
        if why != self.last_error:
            log.info("group %s at %s: %s", self.name, self.endpoint.address, why)
        self.last_error = why

    async def _converse(self) -> None:
        """One connection's life: raises when it breaks."""
        self._seen = time.monotonic()
        tasks = [asyncio.ensure_future(part) for part in (self._talk(), self._watch())]
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            done.pop().result()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _talk(self) -> None:
        """Connect, and take messages; from the hello on, requests may be sent."""
        loop = asyncio.get_running_loop()
        ended: asyncio.Future[None] = loop.create_future()

        def take(message: pb.GroupMessage) -> None:
            self._seen = time.monotonic()
            self._receive(message, line)

        def over(error: Exception | None) -> None:
            if not ended.done():
                ended.set_exception(error or UnavailableError("the group closed the stream"))

        line = MessageStream(pb.GroupMessage, take, over, limit=wire.MAX_MESSAGE_BYTES)
        host, _, port = self.endpoint.address.rpartition(":")
        await loop.create_connection(lambda: line, host.strip("[]"), int(port))
        try:
            line.send(pb.GatewayMessage(token=self.endpoint.token))
            await ended
        finally:
            line.abort()

    def _receive(self, message: pb.GroupMessage, line: MessageStream[pb.GroupMessage]) -> None:
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
            if self.member.lacks_blocks():
                line.send(pb.GatewayMessage(resync=pb.Resync()))
        elif kind == "blocks":
            if self.member.blocks(message.blocks):
                line.send(pb.GatewayMessage(resync=pb.Resync()))
        elif kind == "hello":
            self._welcome(message.hello)
            self._line = line
        elif kind == "refused":
            raise UnavailableError(f"the group refused the connection: {message.refused}")

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
        self._line = None
        self.member.lost()
        streams, self._streams = self._streams, {}
        for stream in streams.values():
            stream._break(f"the group died while it served this request: {self.last_error}")
        self._on_break()


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
