"""Group: the Serve deployment that stands for one copy of a model. Starts its rank, watches it, replaces it.

The replica (the coordinator) and the rank share the replica's placement group, which Serve makes and removes. Tokens
don't pass through here.
"""

from __future__ import annotations

import asyncio
import logging
import re
from typing import Any

import ray
from ray.exceptions import RayActorError

from kvasir.cluster import telemetry
from kvasir.cluster.rank_actor import Failure, RankActor, RankSetup
from kvasir.cluster.wire import Endpoint
from kvasir.engine.config import EngineConfig

log = logging.getLogger(__name__)

RESTART_PAUSE_S = (0.2, 30.0)
"""First and longest pause before a rank is started again."""
MAX_RESTARTS = 3
"""Failed starts in a row, after which Serve is asked to replace the replica, perhaps on another node."""


class GroupError(Exception):
    """The message is a block of text for the user; `kvasir serve` finds it behind this class's name."""


def block(what: str, why: str, change: str) -> str:
    """What a person reads when something failed."""
    lines = why.strip().splitlines() or ["unknown"]
    return "\n".join([what, "  why:    " + "\n          ".join(lines), f"  change: {change}"])


class Group:
    """Coordinator of one group; ready once the model is loaded."""

    async def __init__(  # type: ignore[misc]  # Serve awaits it
        self, config: EngineConfig, name: str, gpus: float, setup: RankSetup
    ) -> None:
        telemetry.log_to_stderr(setup.log_level)
        self._name = name
        self._options = {"num_cpus": 1, "num_gpus": gpus, "max_concurrency": 16, "max_restarts": 0}
        self._arguments = (config, setup)
        self._watcher: asyncio.Task[None] | None = None
        self._why = "the model is loading"
        self._endpoint: Endpoint | None = None
        self._failed_starts = 0
        if (failure := await self._start()) is not None:
            change = "correct that, then start again" if failure.final else "see above; rank 0 logged the traceback"
            raise GroupError(block(f"model {name!r} could not be started", failure.why, change))
        self._watcher = asyncio.get_running_loop().create_task(self._watch())

    async def endpoint(self) -> tuple[Endpoint | None, str]:
        """(where gateways find the rank, why there is none)."""
        return self._endpoint, self._why

    async def rank_pid(self) -> int:
        """Process id of rank 0 (tests kill it)."""
        return int(await self._rank.pid.remote())

    async def check_health(self) -> None:
        """Serve replaces the replica when this raises."""
        if self._failed_starts > MAX_RESTARTS:
            raise RuntimeError(f"rank 0 of {self._name!r} can't be started: {self._why}")

    async def __del__(self) -> None:
        """Serve ends this replica."""
        if self._watcher is None:  # it never started
            return
        self._watcher.cancel()
        self._endpoint = None
        try:
            await asyncio.wait_for(self._rank.stop.remote(), 5.0)
        except (RayActorError, asyncio.TimeoutError):
            log.warning("rank 0 of %r didn't end by itself", self._name)
        ray.kill(self._rank)

    async def _start(self) -> Failure | None:
        """A new rank, that takes the place of the last; None when it serves."""
        actor: Any = ray.remote(RankActor)
        self._rank = actor.options(**self._options).remote(*self._arguments)
        try:
            result = await self._rank.start.remote()
        except RayActorError as error:
            result = Failure(_died(error))
        if isinstance(result, Failure):
            ray.kill(self._rank)
            return result
        self._endpoint = result
        return None

    async def _watch(self) -> None:
        """Replace the rank whenever it ends."""
        while True:
            try:
                failure = await self._rank.run.remote()
            except RayActorError as error:
                failure = Failure(_died(error))
            self._endpoint = None
            await self._restart(failure)

    async def _restart(self, failure: Failure | None) -> None:
        """Until a rank serves again."""
        ray.kill(self._rank)
        pause = RESTART_PAUSE_S[0]
        while failure is not None:
            self._why = f"rank 0 is being restarted; it ended: {failure.why}"
            change = "nothing if this is rare, it is being started again; else look for the kernel's out-of-memory log"
            log.error("%s", block(f"rank 0 of {self._name!r} ended; its requests failed", failure.why, change))
            await asyncio.sleep(pause)
            pause = min(2 * pause, RESTART_PAUSE_S[1])
            failure = await self._start()
            self._failed_starts = 0 if failure is None else self._failed_starts + 1


def _died(error: RayActorError) -> str:
    """Ray's account of an actor's death, without its page of advice."""
    detail = re.search(r"Worker exit detail: (.*?)(?: Some common causes|$)", str(error), re.DOTALL)
    how = detail[1].strip() if detail else str(error).strip().splitlines()[-1].strip()
    return f"its process is gone: killed, out of memory, or crashed. Ray says: {how}"
