"""Group: the Serve deployment that stands for one copy of a model. Starts its ranks, watches them, replaces them.

The replica (the coordinator) and the ranks share the replica's placement group, which Serve makes and removes. Tokens
don't pass through here. When one rank ends, all are replaced: each holds a part of the model.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import os
import re
import signal
import time
from typing import Any, get_args

import ray
from ray.exceptions import RayActorError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from kvasir.cluster import telemetry, wire
from kvasir.cluster.placement import note_split, on_bundle, rank_bundles, spread
from kvasir.cluster.rank_actor import Failure, FollowerActor, RankActor, RankSetup
from kvasir.cluster.rank_start import UnstartedError, started
from kvasir.cluster.unplaced import placed
from kvasir.cluster.wire import Endpoint
from kvasir.engine.config import EngineConfig, Role
from kvasir.engine.errors import ConfigError
from kvasir.engine.processes import Exit, stopped

log = logging.getLogger(__name__)

RESTART_PAUSE_S = (0.2, 30.0)
"""First and longest pause before a rank is started again."""
LOOK_S = 0.25
"""How often the coordinator looks whether rank 0, on its node, stands still."""
ASK_S = 1.0
"""How often it asks rank 0 for a sign of life: what holds Python's lock there holds up its own look at its heartbeat, too."""
MUTE_S = 5.0
"""Rank 0 has so long to answer once another rank has ended; else as long as an exchange may take, or its step loop for a turn."""
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
        self._config = config
        self._options = {"num_cpus": 1, "num_gpus": gpus, "max_concurrency": 16, "max_restarts": 0}
        if not spread(config):
            self._options |= {"num_cpus": config.ranks, "num_gpus": gpus * config.ranks}
        self._arguments = (config, setup)
        self._drain_s = setup.drain_timeout_s
        self._role: Role = "both"
        self._processes: list[tuple[str, int]] = []
        self._exit = Exit(0)
        """Of rank 0's process."""
        self._followers: dict[int, Any] = {}
        self._runs: dict[int, Any] = {}
        self._watcher: asyncio.Task[None] | None = None
        self._why = "the model is loading"
        self._endpoint: Endpoint | None = None
        self._failed_starts = 0
        if (failure := await self._start()) is not None:
            change = "see above; rank 0 logged the traceback" if failure.logged else "correct that, then start again"
            raise GroupError(block(f"model {name!r} could not be started", failure.why, change))
        self._watcher = asyncio.get_running_loop().create_task(self._watch())

    async def reconfigure(self, user_config: dict[str, Any]) -> None:
        """Serve's way to change the role while it runs: {"role": "prefill"}."""
        if unknown := sorted(user_config.keys() - {"role"}):
            raise ConfigError(f"user_config has an unknown key {unknown[0]!r}; it takes role")
        role = user_config.get("role", "both")
        if role not in get_args(Role):
            raise ConfigError(f"user_config: role must be one of {', '.join(get_args(Role))}, got {role!r:.60}")
        await self._change_role(role)

    async def set_role(self, name: str, role: Role) -> bool:
        """The same, if it is the group of this name."""
        found = self._endpoint is not None and self._endpoint.incarnation.startswith(name)
        if found:
            await self._change_role(role)
        return found

    async def _change_role(self, role: Role) -> None:
        self._role = role
        if self._endpoint is not None:
            await self._rank.set_role.remote(role)

    async def endpoint(self) -> tuple[Endpoint | None, str]:
        """(where gateways find the rank, why there is none)."""
        return self._endpoint, self._why

    async def rank_pid(self) -> int:
        """Process id of rank 0 (tests kill it)."""
        return self._processes[0][1]

    async def rank_pids(self) -> list[int]:
        """Process ids of all ranks that are actors."""
        return [pid for _, pid in self._processes]

    async def rank_nodes(self) -> list[str]:
        """Node of each rank that is an actor, in their order."""
        return [node for node, _ in self._processes]

    async def check_health(self) -> None:
        """Serve replaces the replica when this raises."""
        if self._failed_starts > MAX_RESTARTS:
            raise RuntimeError(f"rank 0 of {self._name!r} can't be started: {self._why}")
        if self._watcher is not None and self._watcher.done() and not self._watcher.cancelled():
            raise RuntimeError(f"nobody watches the ranks of {self._name!r} any more") from self._watcher.exception()

    async def __del__(self) -> None:
        """Serve ends this replica."""
        if self._watcher is None:  # it never started
            return
        self._watcher.cancel()
        serving, self._endpoint = self._endpoint is not None, None
        try:
            if serving:
                await asyncio.wait_for(self._rank.drain.remote(), self._drain_s + 1)
            await asyncio.wait_for(self._rank.stop.remote(), 5.0)
        except (RayActorError, asyncio.TimeoutError):
            log.warning("rank 0 of %r didn't end by itself", self._name)
        self._kill()

    async def _start(self) -> Failure | None:
        """New ranks, that take the place of the last; None when they serve."""
        actor: Any = ray.remote(RankActor)
        self._rank = actor.options(**self._options, **on_bundle(0)).remote(*self._arguments)
        try:
            self._processes = [await self._started(0, self._rank)]
            self._exit = Exit(self._processes[0][1])
            failure = await self._start_followers() if spread(self._config) else None
            result = failure or await self._rank.start.remote()
            if not isinstance(result, Failure):
                await self._rank.set_role.remote(self._role)
        except Exception as error:  # whatever it is: they are started again, and nobody else would do that
            result = self._failure(error)
        if isinstance(result, Failure):
            self._kill()
            return result
        self._endpoint = result
        return None

    async def _start_followers(self) -> Failure | None:
        opened: tuple[str, str] | Failure = await self._rank.open.remote()
        if isinstance(opened, Failure):
            return opened
        await placed(self._name)
        actor: Any = ray.remote(FollowerActor)
        for rank, bundle in enumerate(rank_bundles(self._config)):
            if rank:
                follower = actor.options(**self._options | {"max_concurrency": 2}, **on_bundle(bundle))
                self._followers[rank] = follower.remote(*self._arguments)
        starting = asyncio.gather(*(self._started(rank, follower) for rank, follower in self._followers.items()))
        try:
            failure: Failure | None = await self._rank.check.remote()
            if failure is not None:
                return failure
            self._processes += await starting
            note_split(self._name, [node for node, _ in self._processes], self._config.tensor_parallel_size)
        finally:
            starting.cancel()
            await asyncio.gather(starting, return_exceptions=True)  # else its end is logged with a traceback
        for rank, follower in self._followers.items():  # whose limit of time for connecting begins with rank 0's start
            self._runs[rank] = asyncio.ensure_future(follower.run.remote(rank, *opened))
        return None

    async def _started(self, rank: int, actor: Any) -> tuple[str, int]:
        """(node id, process id)"""
        return await started(actor.where.remote(), f"rank {rank} of {self._name!r}")

    def _kill(self) -> None:
        """All ranks, whatever they do: one that stands still wouldn't hear of Ray's kill."""
        for actor in (self._rank, *self._followers.values()):
            ray.kill(actor)
        for node, pid in self._processes:
            if node == ray.get_runtime_context().get_node_id():
                _kill_stopped(pid)
            else:
                there = NodeAffinitySchedulingStrategy(node, soft=False)
                ray.remote(_kill_stopped).options(num_cpus=0, scheduling_strategy=there).remote(pid)
        self._processes = []
        self._exit.close()
        for run in self._runs.values():
            run.cancel()
        self._followers, self._runs = {}, {}

    async def _watch(self) -> None:
        """Replace the rank whenever it ends."""
        while True:
            run = asyncio.ensure_future(self._rank.run.remote())
            mute = asyncio.ensure_future(self._mute())
            try:
                while not run.done() and not mute.done() and not stopped(self._processes[0][1]):
                    await asyncio.wait([run, mute], timeout=LOOK_S, return_when=asyncio.FIRST_COMPLETED)
                failure = await self._end_of(run, mute)
            finally:
                mute.cancel()
            self._endpoint = None
            await self._restart(failure)

    async def _mute(self) -> Failure:
        """Returns when rank 0 runs and answers nothing."""
        alone = self._config.ranks == 1  # nobody waits for it in an exchange
        patient_s = wire.STALL_S if alone else min(wire.STALL_S, self._config.collective_timeout)
        while True:
            answer, begin = asyncio.ensure_future(self._rank.where.remote()), time.monotonic()
            try:
                while not (await asyncio.wait([answer], timeout=LOOK_S))[0]:
                    late = time.monotonic() - begin
                    if late > (MUTE_S if any(run.done() for run in self._runs.values()) else patient_s):
                        return Failure(f"rank 0 has answered nothing for {late:.0f} s: it hangs")
                answer.exception()  # of a process that is gone `run` tells more
            finally:
                answer.cancel()  # else its end is logged with a traceback
            await asyncio.sleep(ASK_S)

    async def _end_of(self, run: asyncio.Future[Failure], mute: asyncio.Future[Failure]) -> Failure:
        if not run.done():
            run.cancel()
            return mute.result() if mute.done() else Failure("rank 0 was stopped (SIGSTOP)")
        try:
            return run.result()
        except Exception as error:  # whatever it is
            return self._failure(error)

    def _failure(self, error: Exception) -> Failure:
        """What went wrong with a rank's process, or on the way to it."""
        if isinstance(error, RayActorError):
            ended = self._exit.text()
            return Failure(f"its process ended: {ended}" if ended else _died(error))
        if isinstance(error, UnstartedError):
            return Failure(str(error))
        log.error("the coordinator failed", exc_info=error)
        return Failure(f"{type(error).__name__}: {error}", logged=True)

    async def _restart(self, failure: Failure | None) -> None:
        """Until the ranks serve again."""
        failure = await self._with_deaths(failure)
        self._kill()
        pause = RESTART_PAUSE_S[0]
        while failure is not None:
            self._why = f"rank 0 is being restarted; it ended: {failure.why}"
            change = "nothing if this is rare, it is being started again; else look for the kernel's out-of-memory log"
            log.error(
                "%s",
                block(
                    f"rank 0 of {self._name!r} ended; its requests go on in other groups, or once it is back",
                    failure.why,
                    change,
                ),
            )
            await asyncio.sleep(pause)
            pause = min(2 * pause, RESTART_PAUSE_S[1])
            failure = await self._start()
            self._failed_starts = 0 if failure is None else self._failed_starts + 1

    async def _with_deaths(self, failure: Failure | None) -> Failure | None:
        """The failure, and what Ray knows of other ranks' ends."""
        if failure is None or not self._runs:
            return failure
        await asyncio.wait(self._runs.values(), timeout=0.5)
        deaths = [
            f"rank {rank}: {_died(run.exception())}"
            for rank, run in self._runs.items()
            if run.done() and not run.cancelled() and isinstance(run.exception(), RayActorError)
        ]
        return dataclasses.replace(failure, why="\n".join([failure.why, *deaths]))


def _kill_stopped(pid: int) -> None:
    if stopped(pid, "Tt"):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def _died(error: RayActorError) -> str:
    """Ray's account of an actor's death, without its page of advice."""
    detail = re.search(r"Worker exit detail: (.*?)(?: Some common causes|$)", str(error), re.DOTALL)
    how = detail[1].strip() if detail else str(error).strip().splitlines()[-1].strip()
    return f"its process is gone: killed, out of memory, or crashed. Ray says: {how}"
