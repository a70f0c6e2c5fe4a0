"""Calls that want vectors instead of tokens: embeddings, labels, scores of pairs. All inputs run side by side."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace

from kvasir.cluster.failover import Failover, LastingStream
from kvasir.cluster.metrics import CallRecord
from kvasir.cluster.served_model import ServedModel
from kvasir.cluster.telemetry import RequestSpan
from kvasir.cluster.timing import CallTiming
from kvasir.engine.errors import ERRORS, ClientError, OverloadedError, ServerError, UnavailableError
from kvasir.engine.event import Event, Failed, Pooled
from kvasir.engine.info import ModelInfo
from kvasir.engine.passage import Passage
from kvasir.engine.request import PoolingParams, Request

MAX_INPUTS = 2048
"""Inputs in one call, as OpenAI has it."""
WINDOW = 256
"""Requests of one call that run at a time: enough to fill a step, and no call fills a group's queue alone."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PoolingCall:
    """Inputs for one model, each to become one vector."""

    model: str
    """Empty: the only model of a server that serves one."""
    inputs: Sequence[Passage | Sequence[int]]
    params: PoolingParams
    operation: str
    """embeddings (OpenTelemetry's name), classify, score or rerank."""
    param: str = "input"
    """The client's field that holds the inputs."""
    truncate: int | None = None
    """Tokens that are kept of each input, -1: as many as the model takes; None: what is too long is refused."""
    priority: int = 0
    cache_salt: str = ""
    deadline_s: float | None = None

    def __post_init__(self) -> None:
        if not self.inputs:
            raise ClientError(f"{self.param} must hold at least one input", param=self.param)
        if len(self.inputs) > MAX_INPUTS:
            text = f"{self.param} holds {len(self.inputs)} inputs; at most {MAX_INPUTS} in one request"
            raise ClientError(text, param=self.param)

    @property
    def places(self) -> list[str]:
        """What an error calls each input."""
        count = len(self.inputs)
        return [self.param] if count == 1 else [f"{self.param}[{number}]" for number in range(count)]


class Vectors:
    """What runs for one call. `run` gives every input's vector, in their order; `close` in any case."""

    def __init__(
        self,
        model: ServedModel,
        info: ModelInfo,
        requests: Sequence[Request],
        failover: Failover,
        *,
        span: RequestSpan,
        record: CallRecord,
    ) -> None:
        self.model, self.info, self.requests = model, info, requests
        self.error: str | None = None
        """Once closed: the code of what went wrong; `cancelled` when the client went away."""
        self.truncated_tokens = sum(request.truncated_tokens for request in requests)
        self._failover = failover
        self._span, self._record = span, record
        self._started = time.monotonic()
        self._found: dict[int, Pooled] = {}
        self._streams: set[LastingStream] = set()
        self._closed = False
        self._group = ""

    @property
    def prompt_tokens(self) -> int:
        """Of all inputs."""
        return sum(len(request.prompt_token_ids) for request in self.requests)

    @property
    def cached_tokens(self) -> int:
        return sum(event.cached_tokens for event in self._found.values())

    @property
    def timing(self) -> CallTiming:
        """Complete when all inputs are done; a vector is there when its prompt was read."""
        times = (event.timing for event in self._found.values())
        return CallTiming.of(
            (replace(one, first_token=one.finished) for one in times),
            total_s=time.monotonic() - self._started,
            cached_tokens=self.cached_tokens,
            group=self._group,
        )

    async def run(self) -> list[Pooled]:
        """Raises the KvasirError with which an input failed; then the others are aborted."""
        waiting, window = deque(range(len(self.requests))), WINDOW
        running: dict[asyncio.Task[Pooled], int] = {}
        try:
            while waiting or running:
                while waiting and len(running) < window:
                    number = waiting.popleft()
                    running[asyncio.ensure_future(self._one(self.requests[number]))] = number
                done, _ = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    number = running.pop(task)
                    if isinstance(task.exception(), OverloadedError) and (running or self._found):
                        waiting.append(number)  # the queue is shorter than the window: what runs makes room
                        window = max(1, len(running))
                        continue
                    self._found[number] = task.result()
                    self._record.pooled(self._found[number])
        finally:
            for task in running:
                task.cancel()
            await asyncio.gather(*running, return_exceptions=True)
        return [self._found[number] for number in range(len(self.requests))]

    async def _one(self, request: Request) -> Pooled:
        stream = LastingStream(request, self._failover)
        self._streams.add(stream)
        try:
            await stream.start()
            self._group = stream.placement.client.name
            return _pooled(await stream.batch())
        finally:
            stream.close()
            self._streams.discard(stream)

    def abandon(self) -> None:
        """Abort what still runs; who waits is told that the group is unavailable."""
        for stream in [*self._streams]:
            stream.close()

    def close(self) -> None:
        """End span and record."""
        if self._closed:
            return
        self._closed = True
        self.abandon()
        if len(self._found) < len(self.requests):
            self.error = self.error or "cancelled"
        self._span.end(
            response_id=self.requests[0].request_id,
            input_tokens=self.prompt_tokens,
            cached_tokens=self.cached_tokens,
            error=self.error,
        )

    def summary(self) -> str:
        """One line for the log: no text of anybody's."""
        name, seconds = self.requests[0].request_id.rsplit("-", 2)[0], time.monotonic() - self._started
        counts = f"{len(self.requests)} inputs, {self.prompt_tokens} tokens, {self.cached_tokens} cached"
        return f"{name} {self.model.name}: {counts}, {seconds:.3f} s, {self.error or 'done'}"


def _pooled(events: Sequence[Event]) -> Pooled:
    """The one event of a request for a vector; none: the stream was closed from this side."""
    event = events[0] if events else None
    if isinstance(event, Failed):
        raise ERRORS.get(event.code, ServerError)(event.message, param=event.param)
    if not isinstance(event, Pooled):
        raise UnavailableError("the server ended this request before it was complete", retry_after_s=1.0)
    return event
