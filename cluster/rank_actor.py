"""The ranks of a group as Ray actors. Rank 0's process hosts the engine and the group service; these and the other ranks'
are the only ones to load torch."""

from __future__ import annotations

import asyncio
import logging
import os
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Protocol

import ray

from kvasir.cluster import telemetry, wire
from kvasir.cluster.group_service import GroupService, ServedEngine
from kvasir.cluster.telemetry import Tracing
from kvasir.cluster.wire import Endpoint
from kvasir.engine.config import EngineConfig, Role
from kvasir.engine.errors import ConfigError, KvasirError
from kvasir.engine.event import Event
from kvasir.engine.interfaces import named_address

if TYPE_CHECKING:
    from kvasir.engine.control import Hub

WATCH_PERIOD_S = 0.1
ECHO_S = 2.0
"""When another rank is gone the engine notices, unless gloo holds it: only the end of this process frees it then."""


class OwnedEngine(ServedEngine, Protocol):
    """What the actor needs of an engine besides."""

    @property
    def failure(self) -> BaseException | None: ...
    def serve_blocks(self, host: str) -> tuple[str, str]: ...
    def start(self, *, measure: bool = False) -> None: ...
    def shutdown(self) -> None: ...


MakeEngine = Callable[[EngineConfig, Callable[[Sequence[Event]], None]], OwnedEngine]
"""Loads a model; called in a thread of rank 0's process. Tests and benchmarks have engines of their own."""


def load_engine(config: EngineConfig, deliver: Callable[[Sequence[Event]], None]) -> OwnedEngine:
    """The real engine, of one copy of the model."""
    from kvasir.engine.engine import Engine

    backend = config.distributed_executor_backend
    alone = replace(config, data_parallel_size=1, distributed_executor_backend="auto" if backend == "ray" else backend)
    engine: OwnedEngine = Engine(alone, deliver)
    return engine


def lead_engine(hub: Hub, config: EngineConfig, deliver: Callable[[Sequence[Event]], None]) -> OwnedEngine:
    """The real engine over ranks that connect to `hub`."""
    from kvasir.engine.engine import Engine
    from kvasir.engine.executor import remote_executor

    engine: OwnedEngine = Engine(config, deliver, executor=remote_executor(config, hub))
    return engine


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a rank could not start, or ended. `logged`: the rank's log has the traceback."""

    why: str
    logged: bool = False


@dataclass(frozen=True, slots=True)
class RankSetup:
    """What a rank's process needs besides its engine's configuration."""

    make_engine: MakeEngine = load_engine
    environ: Mapping[str, str] = field(default_factory=dict)
    """OTEL_* variables."""
    log_level: str = "info"
    host: str | None = None
    """Address on which to listen for gateways; default: the node's."""
    drain_timeout_s: float = 0.0
    """How long what runs may take to go elsewhere, or to end, when the group ends."""
    network: Mapping[str, str] = field(default_factory=dict, repr=False)
    """NCCL_*, HF_TOKEN and others; what is set on a node itself goes before."""

    def enter(self) -> None:
        """First of all in a rank's process: NCCL reads the environment when it is loaded."""
        telemetry.log_to_stderr(self.log_level)
        for name, value in self.network.items():
            os.environ.setdefault(name, value)


class RankActor:
    """Loads the model in `start`, serves it until `run` returns why it ended."""

    def __init__(self, config: EngineConfig, setup: RankSetup) -> None:
        setup.enter()
        self._config = config
        self._setup = setup
        self._hub: Hub | None = None

    async def open(self) -> tuple[str, str] | Failure:
        """Listen for the other ranks: (address, the token that lets them in)."""
        from kvasir.engine.control import Hub

        try:
            self._hub = Hub(named_address() or self._host(), self._config.ranks)
        except ConfigError as error:
            return _failure(error)
        return self._hub.address, self._hub.token

    async def check(self) -> Failure | None:
        """Why so many ranks can't hold the model; loads this process's libraries besides. Both while the others start."""
        try:
            await asyncio.to_thread(_check, self._config)
        except Exception as error:
            return _failure(error)
        return None

    async def start(self) -> Endpoint | Failure:
        """Load, then listen."""
        setup = self._setup
        try:
            self._tracing = Tracing.from_environment(setup.environ)
            self._service = GroupService(self._tracing)
            make = setup.make_engine if self._hub is None else partial(lead_engine, self._hub)
            self._engine = await asyncio.to_thread(make, self._config, self._service.deliver)
            blocks = self._setup.host or named_address() or self._host()
            address, secret = await asyncio.to_thread(self._engine.serve_blocks, blocks)
            await asyncio.to_thread(self._engine.start, measure=True)
            endpoint = await self._service.start(self._engine, self._host())
            return replace(endpoint, kv_address=address, kv_secret=secret)
        except Exception as error:
            return _failure(error)

    async def run(self) -> Failure:
        """Returns when the engine, or who reports of it, has failed or hangs; the process has to be replaced then."""
        lost: float | None = None
        while self._engine.failure is None:
            await asyncio.sleep(WATCH_PERIOD_S)
            if self._hub is not None and self._hub.failure is not None:
                lost = lost or time.monotonic()
                if time.monotonic() - lost > ECHO_S:
                    return Failure(str(self._hub.failure))
            if (error := self._service.failure) is not None:
                return Failure(explain(error), logged=True)
            if time.monotonic() - self._engine.heartbeat > wire.STALL_S:
                return Failure(f"the step loop made no turn for {wire.STALL_S:.0f} s")
        return Failure(explain(self._engine.failure), logged=True)

    async def set_role(self, role: Role) -> None:
        """What the group is for from now on."""
        self._service.set_role(role)

    async def drain(self) -> None:
        """Take no new requests; returns when those that run have moved, or ended."""
        await self._service.drain(self._setup.drain_timeout_s)

    async def stop(self) -> None:
        """Close the streams, end the engine, export the last spans."""
        await self._service.stop()
        await asyncio.to_thread(self._engine.shutdown)
        await asyncio.to_thread(self._tracing.shutdown)

    def where(self) -> tuple[str, int]:
        """(node id, process id)"""
        return ray.get_runtime_context().get_node_id(), os.getpid()

    def _host(self) -> str:
        found: str = self._setup.host or ray.util.get_node_ip_address()  # type: ignore[no-untyped-call]
        return found


class FollowerActor:
    """A rank other than 0."""

    def __init__(self, config: EngineConfig, setup: RankSetup) -> None:
        setup.enter()
        self._config = config

    def run(self, rank: int, address: str, token: str) -> None:
        """Serve as this rank, until rank 0 is done. What fails is told to rank 0."""
        from kvasir.engine import worker

        worker.run(self._config, address, token, rank, gone=lambda: os._exit(1))

    def where(self) -> tuple[str, int]:
        """(node id, process id)"""
        return ray.get_runtime_context().get_node_id(), os.getpid()


def explain(error: BaseException) -> str:
    """An error as a line for its reader, and where it was raised."""
    where = traceback.extract_tb(error.__traceback__)
    logging.getLogger(__name__).error("rank 0 failed", exc_info=error)
    at = f" (at {os.path.basename(where[-1].filename)}:{where[-1].lineno})" if where else ""
    return f"{type(error).__name__}: {error}{at}"


def _check(config: EngineConfig) -> None:
    from kvasir.engine.load import check_ranks

    check_ranks(config)


def _failure(error: Exception) -> Failure:
    """Told by value, and whatever it is, for the coordinator must hear of it: Ray would wrap it in tracebacks of its own."""
    if not isinstance(error, KvasirError):
        return Failure(explain(error), logged=True)
    return Failure(f"{error.message} (see --{error.param.replace('_', '-')})" if error.param else error.message)
