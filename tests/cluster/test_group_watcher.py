"""The coordinator's watcher over ranks that aren't real: whatever goes wrong, ranks are started again or Serve is told."""

from __future__ import annotations

import asyncio
import re
from types import SimpleNamespace

import pytest
from ray.exceptions import ActorUnschedulableError, RayActorError
from waiting import until_async

from kvasir.cluster import group
from kvasir.cluster.rank_actor import Failure
from kvasir.engine.config import EngineConfig
from kvasir.engine.processes import Exit


class Group(group.Group):
    """Whose ranks serve already."""

    def __new__(cls, ranks):
        self = object.__new__(cls)
        self._name, self._config, self._role = "m", EngineConfig(), "both"
        self._options, self._arguments, self._processes = {}, (), [("node", 0)]
        self._followers, self._runs, self._exit = {}, {}, Exit(0)
        self._rank, self._endpoint, self._why, self._failed_starts = ranks, "first", "", 0
        self._watcher = asyncio.get_running_loop().create_task(self._watch())
        return self

    def __init__(self, ranks):
        pass

    def __del__(self):
        pass


def ranks(monkeypatch, **calls):
    """Rank 0s that do by turns what is named here, an answer or an error, and serve when no more is named."""
    calls = {"run": [Failure("first death")], **calls}
    usual = {"start": "second", "set_role": None, "where": ("node", 0)}

    async def call(name):
        answer = calls[name].pop(0) if calls.get(name) else usual.get(name)
        if name == "run" and answer is None:
            await asyncio.Event().wait()
        if asyncio.iscoroutine(answer):
            answer = await answer
        if isinstance(answer, Exception):
            raise answer
        return answer

    def method(name):
        return SimpleNamespace(remote=lambda *_: asyncio.ensure_future(call(name)))

    actors = SimpleNamespace(**{name: method(name) for name in ("run", "start", "set_role", "where")})
    actors.options = lambda **_: SimpleNamespace(remote=lambda *_: actors)
    context = SimpleNamespace(get_node_id=lambda: "node")
    fake = SimpleNamespace(remote=lambda _: actors, kill=lambda _: None, get_runtime_context=lambda: context)
    monkeypatch.setattr(group, "ray", fake)
    monkeypatch.setattr(group, "on_bundle", lambda _: {})
    monkeypatch.setattr(group, "stopped", lambda *_: False)
    monkeypatch.setattr(group, "RESTART_PAUSE_S", (0.001, 0.001))
    return actors


@pytest.mark.parametrize("error", [RayActorError(), ActorUnschedulableError("no node"), OSError("no memory")])
@pytest.mark.parametrize("call", ["run", "where", "start", "set_role"])
def test_whatever_fails_ranks_are_started_again(monkeypatch, call, error):
    actors = ranks(monkeypatch, **{call: [error, error]})

    async def main():
        coordinator = Group(actors)
        await until_async(lambda: coordinator._endpoint == "second" and not coordinator._failed_starts)
        await coordinator.check_health()
        coordinator._watcher.cancel()

    asyncio.run(main())


def test_how_rank_0_ended_is_told(monkeypatch):
    """Where the system says so: it isn't the coordinator's child."""
    actors = ranks(monkeypatch, run=[RayActorError()])
    monkeypatch.setattr(group, "Exit", lambda _: SimpleNamespace(text=lambda: "killed by SIGSEGV", close=lambda: None))

    async def main():
        coordinator = Group(actors)
        coordinator._exit = group.Exit(7)
        await until_async(lambda: coordinator._endpoint == "second")
        assert coordinator._why.endswith("it ended: its process ended: killed by SIGSEGV")
        coordinator._watcher.cancel()

    asyncio.run(main())


@pytest.mark.parametrize("limit", ["another rank's end", "a turn of the step loop"])
def test_a_rank_0_that_holds_pythons_lock_is_replaced(monkeypatch, limit):
    """It can't see itself that it hangs, and is waited for less long once another rank has given up waiting for it."""
    ended = limit == "another rank's end"
    actors = ranks(monkeypatch, run=[], where=[asyncio.Event().wait()])
    monkeypatch.setattr(group, "LOOK_S", 0.001)
    if ended:
        monkeypatch.setattr(group, "MUTE_S", 0.01)
    if limit == "a turn of the step loop":
        monkeypatch.setattr(group.wire, "STALL_S", 0.01)

    async def main():
        coordinator = Group(actors)
        if ended:
            coordinator._runs[1] = asyncio.ensure_future(asyncio.sleep(0))
        await until_async(lambda: coordinator._endpoint == "second")
        assert re.search(r"rank 0 has answered nothing for \d+ s: it hangs", coordinator._why)
        coordinator._watcher.cancel()

    asyncio.run(main())


@pytest.mark.parametrize("ranks_there", [1, 2])
def test_ranks_that_exchange_are_held_to_the_limit_of_exchanges(monkeypatch, ranks_there):
    actors = ranks(monkeypatch, where=[asyncio.Event().wait()])
    monkeypatch.setattr(group, "LOOK_S", 0.001)

    async def main():
        coordinator = Group(actors)
        coordinator._watcher.cancel()
        coordinator._config = EngineConfig(tensor_parallel_size=ranks_there, collective_timeout=0.01)
        mute = asyncio.ensure_future(coordinator._mute())
        assert bool((await asyncio.wait([mute], timeout=0.1 if ranks_there == 1 else None))[0]) == (ranks_there == 2)
        mute.cancel()

    asyncio.run(main())


def test_serve_is_told_when_nobody_watches(monkeypatch):
    actors = ranks(monkeypatch)

    async def main():
        coordinator = Group(actors)
        await coordinator.check_health()
        monkeypatch.setattr(group.ray, "kill", lambda _: 1 / 0)
        await until_async(coordinator._watcher.done)
        with pytest.raises(RuntimeError, match="nobody watches the ranks of 'm' any more") as caught:
            await coordinator.check_health()
        assert isinstance(caught.value.__cause__, ZeroDivisionError)

    asyncio.run(main())
