"""A simulated group on the wall clock, with an engine's interface: real gateways talk to it as to a model."""

from __future__ import annotations

import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace

from kvasir.cluster.simulated_group import LETTER, Run, Shape, SimulatedGroup
from kvasir.engine.blocks import Changes, Tier
from kvasir.engine.config import Role
from kvasir.engine.errors import ClientError, ContextLengthError
from kvasir.engine.event import Event, Finished, FinishReason, Timing, Token
from kvasir.engine.request import Request
from kvasir.engine.scheduler import Stats

IDLE_S = 0.05


class SimulatedEngine:
    """Takes requests and delivers events as kvasir.engine.engine.Engine does, at the pace of `shape.step_time`.

    role: `prefill` has steps of `shape.prefill_budget` tokens; gateways are told of it by the service.
    """

    def __init__(self, shape: Shape, deliver: Callable[[Sequence[Event]], None], role: Role = "both") -> None:
        self._group = SimulatedGroup("", shape, self._on_tokens)
        self._group.role = role
        self.info = self._group.info
        self.failure: BaseException | None = None
        self.heartbeat = self.stats_at = time.monotonic()
        self._stats = Stats()
        self._deliver = deliver
        self._events: list[Event] = []
        self._runs: dict[tuple[str, int], Run] = {}
        self._index: dict[int, int] = {}
        """id of a run -> number of its continuation"""
        self._inbox: deque[Request | tuple[str, int | None, FinishReason]] = deque()
        self._wake = threading.Event()
        self._stopping = False
        self._on_blocks: Callable[[Tier, Changes], None] | None = None
        self._thread = threading.Thread(target=self._loop, name="kvasir-simulated", daemon=True)

    def start(self, *, measure: bool = False) -> None:
        """Begin the loop."""
        self._thread.start()

    def shutdown(self) -> None:
        """End it; what runs gets no more events."""
        self._stopping = True
        self._wake.set()
        self._thread.join()

    def submit(self, request: Request) -> None:
        """Queue a request. Raises ClientError when it can never run."""
        if request.pooling is not None:
            raise ClientError("a simulated group has no vectors", param="task")
        tokens = len(request.prompt_token_ids) + (request.sampling.max_tokens or 1)
        if tokens > self.info.max_model_len:
            limit = self.info.max_model_len
            raise ContextLengthError(f"prompt and output have {tokens} tokens; the limit is {limit}", param="prompt")
        self._inbox.append(request)
        self._wake.set()

    def abort(self, request_id: str, index: int | None = None, reason: FinishReason = "abort") -> None:
        """End one continuation, or all."""
        self._inbox.append((request_id, index, reason))
        self._wake.set()

    def stats(self) -> Stats:
        """Load as of `stats_at`."""
        return self._stats

    def serve_blocks(self, host: str) -> tuple[str, str]:
        """Where others would fetch blocks: nowhere, but what a hint says they hold comes after as long as it takes."""
        return (f"{host}:0/{uuid.uuid4().hex}", "simulated") if self._group.shape.token_bytes else ("", "")

    def listen(self, on_blocks: Callable[[Tier, Changes], None]) -> None:
        """Tell from now on which blocks can be found."""
        self._on_blocks = on_blocks

    def _loop(self) -> None:
        try:
            self._run()
        except BaseException as error:  # whoever watches the group ends it
            self.failure = error

    def _run(self) -> None:
        while not self._stopping:
            self.heartbeat = time.monotonic()
            self._take_in()
            self._stats, self.stats_at = self._group.stats(), self.heartbeat
            if self._group.idle:
                self._flush()
                self._wake.wait(IDLE_S)
                continue
            self._group.step(self._group.now)
            time.sleep(max(0.0, self._group.now - time.monotonic()))
            self._flush()

    def _take_in(self) -> None:
        self._wake.clear()
        while self._inbox:
            message, now = self._inbox.popleft(), time.monotonic()
            if isinstance(message, Request):
                prompt = [*message.prompt_token_ids, *message.resume_token_ids]
                whole = replace(message, prompt_token_ids=prompt)
                for index in range(message.sampling.n):
                    left = (message.sampling.max_tokens or 1) - len(message.resume_token_ids)
                    run = Run(whole, max(1, left), time.time())
                    self._runs[message.request_id, index], self._index[id(run)] = run, index
                    self._group.submit(run, now, told=message.peers[0].tokens if message.peers else 0)
            else:
                name, index_, reason = message
                for key, run in [*self._runs.items()]:
                    if key[0] == name and index_ in (None, key[1]):
                        self._group.abort(run)
                        self._end(run, reason)

    def _flush(self) -> None:
        events, self._events = self._events, []
        if events:
            self._deliver(events)
        if self._on_blocks is not None and (changes := self._group.pool.drain()):
            self._on_blocks("device", changes)

    def _on_tokens(self, run: Run, count: int) -> None:
        index = self._index[id(run)]
        self._events.append(Token(run.request.request_id, index, (LETTER,) * count))
        if run.produced >= run.output:
            self._end(run, "length")

    def _end(self, run: Run, reason: FinishReason) -> None:
        index, name = self._index.pop(id(run)), run.request.request_id
        del self._runs[name, index]
        timing = Timing(queued=run.arrived, scheduled=run.arrived, first_token=time.time(), finished=time.time())
        resumed = len(run.request.resume_token_ids)
        prompt = run.prompt_tokens - resumed
        counts = {
            "prompt_tokens": prompt,
            "cached_tokens": min(prompt, run.cached),
            "output_tokens": run.produced + resumed,
        }
        self._events.append(Finished(name, index, reason, timing=timing, **counts))
