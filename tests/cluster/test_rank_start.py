"""Ray takes its time to start a rank's process: the log says whose, and it isn't waited for without end."""

from __future__ import annotations

import asyncio
import gc
import os
import re
import socket
import sys
import time
from types import SimpleNamespace

import pytest
import ray

from kvasir.cluster import application, group, rank_actor
from kvasir.cluster.group_service import GroupService
from kvasir.cluster.rank_actor import Failure, FollowerActor, RankActor, RankSetup
from kvasir.cluster.rank_start import UnstartedError, started
from kvasir.cluster.telemetry import Tracing
from kvasir.cluster.wire import Endpoint
from kvasir.engine import interfaces
from kvasir.engine.config import EngineConfig
from kvasir.engine.control import RankError


def notes(caplog):
    return [record.getMessage() for record in caplog.records if record.name == "kvasir.cluster.rank_start"]


def test_a_process_that_comes_late_is_named_until_it_is_there(caplog):
    async def main():
        process = asyncio.get_running_loop().create_future()
        waiting = asyncio.ensure_future(started(process, "rank 3 of 'm'", note_s=0.01))
        while len(notes(caplog)) < 2:
            await asyncio.sleep(0.005)
        process.set_result(("node", 7))
        return await waiting

    assert asyncio.run(main()) == ("node", 7)
    assert re.match(r"Ray hasn't started the process of rank 3 of 'm' for \d+ s: pending\. ", notes(caplog)[0])
    assert "`ray list actors`" in notes(caplog)[0]


def test_one_that_is_there_is_no_news(caplog):
    async def main():
        async def process():
            return "node", 7

        return await started(process(), "rank 3 of 'm'")

    assert asyncio.run(main()) == ("node", 7)
    assert not notes(caplog)


def test_what_goes_wrong_is_told_at_once():
    async def process():
        raise OSError("no such image")

    with pytest.raises(OSError, match="no such image"):
        asyncio.run(started(process(), "rank 3 of 'm'"))


@pytest.mark.parametrize(
    ("asked", "why"),
    [
        ({"pipeline_parallel_size": 600}, r"layers, so 1 to \d+ work \(see --pipeline-parallel-size\)"),
        ({"enable_expert_parallel": True, "tensor_parallel_size": 2}, "this model has no experts"),
        ({"tensor_parallel_size": 2}, None),
    ],
)
def test_rank_0_looks_whether_so_many_can_hold_the_model(asked, why):
    failure = asyncio.run(RankActor(EngineConfig(model="skald", **asked), RankSetup()).check())
    assert failure is None if why is None else re.search(why, failure.why)


def test_whatever_goes_wrong_there_is_told_by_value(monkeypatch):
    """An exception would end the task that starts ranks again: the group would never be there again."""

    def unreadable(config):
        raise OSError("Input/output error: config.json")

    monkeypatch.setattr("kvasir.engine.load.check_ranks", unreadable)
    failure = asyncio.run(RankActor(EngineConfig(model="skald"), RankSetup()).check())
    assert "OSError: Input/output error: config.json" in failure.why
    assert failure.logged


@pytest.mark.skipif(sys.platform != "linux", reason="the node's own address elsewhere")
def test_rank_0_listens_on_the_interface_that_is_named(monkeypatch):
    actor = RankActor(EngineConfig(model="skald", tensor_parallel_size=2), RankSetup(host="192.0.2.1"))
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    address, _ = asyncio.run(actor.open())
    assert address.startswith("127.0.0.1:")
    actor._hub.close()
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "nosuch0")
    assert "there is no nosuch0 here" in asyncio.run(actor.open()).why


def test_nobody_waits_for_ranks_that_could_not_hold_the_model(monkeypatch, caplog):
    """They may need minutes to start."""
    told, followers = Failure("this model has 5 layers"), []

    class Follower:
        options = classmethod(lambda cls, **_: cls)
        remote = classmethod(lambda cls, *_: followers.append(1) or cls())
        run = SimpleNamespace(remote=lambda *_: pytest.fail("it was told to run"))

    def remote(answer):
        return SimpleNamespace(remote=lambda: asyncio.sleep(0, answer))

    monkeypatch.setattr(group.ray, "remote", lambda _: Follower)
    monkeypatch.setattr(group, "on_bundle", lambda _: {})
    monkeypatch.setattr(group, "rank_bundles", lambda config: range(config.ranks))
    monkeypatch.setattr(group, "placed", lambda _: asyncio.sleep(0))
    coordinator = SimpleNamespace(
        _name="m",
        _config=SimpleNamespace(ranks=3),
        _arguments=(),
        _options={},
        _followers={},
        _rank=SimpleNamespace(open=remote(("here:1", "token")), check=remote(told)),
        _started=lambda *_: asyncio.get_running_loop().create_future(),
    )
    assert asyncio.run(asyncio.wait_for(group.Group._start_followers(coordinator), 60)) is told
    assert len(followers) == 2
    gc.collect()
    assert not caplog.records


@pytest.mark.ray
def test_an_actor_for_which_ray_has_no_room(serve_on_ray, caplog):
    actor = ray.remote(FollowerActor).options(num_cpus=0, resources={"absent": 1})
    rank = actor.remote(EngineConfig(model="m"), RankSetup())
    with pytest.raises(
        UnstartedError, match=r"started the process of rank 1 of 'm' for \d+ s, and is waited for no longer"
    ):
        asyncio.run(started(rank.where.remote(), "rank 1 of 'm'", note_s=0.1, limit_s=0.5))
    assert notes(caplog)
    ray.kill(rank)


@pytest.mark.parametrize(("alone", "wanted"), [(None, "10.1.0.7"), ("127.0.0.1", "127.0.0.1")])
def test_blocks_are_offered_on_the_network_that_is_named(monkeypatch, alone, wanted):
    """GLOO_SOCKET_IFNAME: what other nodes' groups fetch goes by it, too. A Ray of our own keeps to this machine."""
    asked = []

    class Service:
        deliver = None

        def __init__(self, tracing):
            pass

        async def start(self, engine, host):
            return Endpoint(f"{host}:1", "life", "token")

    engine = SimpleNamespace(
        serve_blocks=lambda host: (asked.append(host), (f"{host}:2", "secret"))[1], start=lambda *, measure: None
    )
    monkeypatch.setattr(rank_actor, "GroupService", Service)
    monkeypatch.setattr(rank_actor, "named_address", lambda: "10.1.0.7")
    monkeypatch.setattr(ray.util, "get_node_ip_address", lambda: "10.0.0.7")
    actor = RankActor(EngineConfig(model="m"), RankSetup(lambda *_: engine, host=alone))
    endpoint = asyncio.run(actor.start())
    assert isinstance(endpoint, Endpoint), endpoint
    assert asked == [wanted]
    assert endpoint.address == f"{alone or '10.0.0.7'}:1"
    assert endpoint.kv_address == f"{wanted}:2"


def test_a_network_without_an_address_ends_the_start(monkeypatch):
    monkeypatch.setattr(socket, "if_nameindex", lambda: [(1, "ib0")])
    monkeypatch.setattr(interfaces, "_address", lambda _: None)
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "ib0")
    engine = SimpleNamespace(serve_blocks=lambda host: ("", ""), start=lambda *, measure: None)
    actor = RankActor(EngineConfig(model="m"), RankSetup(lambda *_: engine))
    failure = asyncio.run(actor.start())
    assert isinstance(failure, Failure)
    assert failure.why.startswith("GLOO_SOCKET_IFNAME: ib0 has no IPv4 address here")


def test_a_rank_that_an_exchange_holds_is_replaced():
    """gloo doesn't let go of a receive from a rank that was stopped: the engine can't say so itself then."""
    actor = RankActor(EngineConfig(model="stories"), RankSetup())
    actor._hub = SimpleNamespace(failure=RankError("rank 1 was stopped"))
    actor._engine = SimpleNamespace(failure=None, heartbeat=time.monotonic())
    actor._service = SimpleNamespace(failure=None)
    assert "rank 1 was stopped" in asyncio.run(asyncio.wait_for(actor.run(), 60)).why


def test_a_group_of_which_gateways_hear_nothing_any_more_is_replaced():
    """Whatever ended who reports of it."""
    actor = RankActor(EngineConfig(model="stories"), RankSetup())

    async def main():
        engine = SimpleNamespace(failure=None, heartbeat=time.monotonic(), listen=lambda _: None, stats=lambda: 1 / 0)
        actor._engine, actor._service = engine, GroupService(Tracing())
        await actor._service.start(engine, "127.0.0.1")
        try:
            return await asyncio.wait_for(actor.run(), 60)
        finally:
            await actor._service.stop()

    failure = asyncio.run(main())
    assert failure.logged
    assert failure.why.startswith("ZeroDivisionError: division by zero (at test_rank_start.py:")


def test_what_steers_nccl_reaches_every_rank(monkeypatch):
    """Ray's workers have the environment of their node, not that of `kvasir serve`; a node's own setting stays."""
    environ = {"NCCL_SOCKET_IFNAME": "eth1", "NCCL_DEBUG": "WARN", "GLOO_SOCKET_IFNAME": "eth1", "HOME": "/x"}
    network = application.network_variables(environ)
    for actor in (RankActor, FollowerActor):
        monkeypatch.setattr(os, "environ", {"NCCL_DEBUG": "INFO"})
        actor(EngineConfig(model="stories"), RankSetup(network=network))
        assert os.environ == {"NCCL_DEBUG": "INFO", "NCCL_SOCKET_IFNAME": "eth1", "GLOO_SOCKET_IFNAME": "eth1"}
