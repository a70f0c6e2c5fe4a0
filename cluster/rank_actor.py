"""Rank 0 of a group: a Ray actor whose process hosts the engine and the group service; the only one to load torch."""

from __future__ import annotations

import asyncio
import logging
import os
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import ray

from kvasir.cluster import telemetry, wire
from kvasir.cluster.group_service import GroupService, ServedEngine
from kvasir.cluster.telemetry import Tracing
from kvasir.cluster.wire import Endpoint
from kvasir.engine.config import EngineConfig
from kvasir.engine.errors import KvasirError
from kvasir.engine.event import Event

WATCH_PERIOD_S = 0.1


class OwnedEngine(ServedEngine, Protocol):
    """What the actor needs of an engine besides."""

    @property
    def failure(self) -> BaseException | None: ...
    def start(self) -> None: ...
    def shutdown(self) -> None: ...


MakeEngine = Callable[[EngineConfig, Callable[[Sequence[Event]], None]], OwnedEngine]
"""Loads a model; called in a thread of rank 0's process. Tests and benchmarks have engines of their own."""


def load_engine(config: EngineConfig, deliver: Callable[[Sequence[Event]], None]) -> OwnedEngine:
    """The real engine."""
    from kvasir.engine.engine import Engine

    engine: OwnedEngine = Engine(config, deliver)
    return engine


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a rank could not start, or ended. `final`: the configuration is to blame, it would end so again."""

    why: str
    final: bool = False


@dataclass(frozen=True, slots=True)
class RankSetup:
    """What a rank's process needs besides its engine's configuration."""

    make_engine: MakeEngine = load_engine
    environ: Mapping[str, str] = field(default_factory=dict)
    """OTEL_* variables."""
    log_level: str = "info"
    host: str | None = None
    """Address on which to listen for gateways; default: the node's."""


class RankActor:
    """Loads the model in `start`, serves it until `run` returns why it ended."""

    def __init__(self, config: EngineConfig, setup: RankSetup) -> None:
        telemetry.log_to_stderr(setup.log_level)
        self._config = config
        self._setup = setup

    async def start(self) -> Endpoint | Failure:
        """Load, then listen. Failures are told by value: Ray would wrap exceptions in its own tracebacks."""
        setup = self._setup
        try:
            self._tracing = Tracing.from_environment(setup.environ)
            self._service = GroupService(self._tracing)
            self._engine = await asyncio.to_thread(setup.make_engine, self._config, self._service.deliver)
            self._engine.start()
            host = setup.host or ray.util.get_node_ip_address()  # type: ignore[no-untyped-call]
            return await self._service.start(self._engine, host)
        except KvasirError as error:
            return Failure(_with_param(error), final=True)
        except Exception as error:  # the process's one broad handler: whatever it is, the coordinator must hear of it
            return Failure(explain(error))

    async def run(self) -> Failure:
        """Returns when the engine has failed or hangs; the process has to be replaced then."""
        while self._engine.failure is None:
            await asyncio.sleep(WATCH_PERIOD_S)
            if time.monotonic() - self._engine.heartbeat > wire.STALL_S:
                return Failure(f"the step loop made no turn for {wire.STALL_S:.0f} s")
        return Failure(explain(self._engine.failure))

    async def stop(self) -> None:
        """Close the streams, end the engine, export the last spans."""
        await self._service.stop()
        await asyncio.to_thread(self._engine.shutdown)
        await asyncio.to_thread(self._tracing.shutdown)

    def pid(self) -> int:
        """Of this process."""
        return os.getpid()


def explain(error: BaseException) -> str:
    """An error as a line for its reader, and where it was raised."""
    where = traceback.extract_tb(error.__traceback__)
    logging.getLogger(__name__).error("rank 0 failed", exc_info=error)
    at = f" (at {os.path.basename(where[-1].filename)}:{where[-1].lineno})" if where else ""
    return f"{type(error).__name__}: {error}{at}"


def _with_param(error: KvasirError) -> str:
    return f"{error.message} (see --{error.param.replace('_', '-')})" if error.param else error.message
