"""What Ray hasn't placed is said: which bundles, what nodes have, which flag asks for less."""

from __future__ import annotations

import asyncio
import math
from types import SimpleNamespace

import pytest
import ray

from kvasir.cluster import app, gateway_replica, unplaced
from kvasir.cluster.rank_start import UnstartedError
from kvasir.cluster.unplaced import Node, lacking, no_gateway
from kvasir.engine.errors import UnavailableError

NAME = "SERVE_REPLICA::kvasir#Group-m#x1"


@pytest.fixture
def cluster(monkeypatch):
    """`cluster(nodes, groups)`: [(total, free)] and what Ray's table says of placement groups."""

    def has(nodes, *groups):
        alive = [
            {"NodeID": str(at), "Alive": True, "NodeManagerAddress": f"10.0.0.{at}", "Resources": total}
            for at, (total, _) in enumerate(nodes)
        ]
        dead = {"NodeID": "gone", "Alive": False, "NodeManagerAddress": "10.0.1.1", "Resources": {"CPU": 99.0}}
        monkeypatch.setattr(ray, "nodes", lambda: [*alive, dead])
        free = {str(at): free for at, (_, free) in enumerate(nodes)}
        monkeypatch.setattr(unplaced, "available_resources_per_node", lambda: free)
        table = {str(at): group for at, group in enumerate(groups)}
        monkeypatch.setattr(ray.util, "placement_group_table", lambda one=None: table if one is None else table[one])

    return has


def gpus(count):
    return {"CPU": float(count), "GPU": float(count)}


def group(*bundles, state="PENDING", name=NAME, where=()):
    return {
        "name": name, "state": state, "bundles": dict(enumerate(bundles)), "bundles_to_node_id": dict(enumerate(where)),
    }  # fmt: skip


def nodes(*counts):
    """(has, free), of CPUs and of GPUs, but that a gateway may have a part of a CPU"""
    return [
        Node(f"10.0.0.{at}", gpus(has), gpus(free) | {"GPU": float(math.ceil(free))})
        for at, (has, free) in enumerate(counts)
    ]


@pytest.mark.parametrize(
    ("wanted", "there", "says"),
    [
        (
            (8, 8),
            [(8, 8), (8, 0)],
            "10.0.0.1 has 0 of 8 CPU and 0 of 8 GPU free. Nodes are large enough, and what else",
        ),
        ((8, 8), [(8, 8), (4, 4), (4, 4)], "room for bundles of 4 CPU and 4 GPU"),  # smaller nodes have joined since
        ((8,), [(4, 4)], "Add nodes; or lower --tensor-parallel-size, or spread a group over more stages"),
        ((6,), [(5, 5), (1, 1)], "room for bundles of 1 CPU and 1 GPU"),
        ((1, 1), [], "there is no node. Add nodes"),
        (
            (8,),
            [(8, 7.9), (4, 4)],
            "What is missing is the 0.1 CPU that a gateway has of a node: start it with a CPU more",
        ),
        ((8, 8), [(8, 8), (8, 7.9)], "What is missing is the 0.1 CPU that a gateway has of a node"),
        ((8, 8), [(8, 7.9), (8, 7.9)], "Nodes are large enough, and what else runs there"),  # a gateway is at one
    ],
)
def test_what_is_missing_is_said(wanted, there, says):
    text = lacking([gpus(count) for count in wanted], nodes(*there))
    assert text is not None
    assert text.startswith(f"Ray has no place for {len(wanted)} bundle")
    assert f"of {wanted[0]} CPU and {wanted[0]} GPU, each of which has to be on one node" in text
    assert says in text


def test_what_has_room_is_only_on_its_way():
    assert lacking([gpus(4), gpus(4)], nodes((8, 8))) is None
    assert lacking([], nodes((8, 8))) is None


def test_many_nodes_are_counted():
    assert "10.0.0.7 has 0 of 4 CPU and 0 of 4 GPU, and so on for 12 more free" in str(
        lacking([gpus(4)], nodes(*[(4, 0)] * 20))
    )


def test_a_gateway_needs_a_bit_of_a_cpu():
    assert no_gateway(nodes((4, 0), (4, 0.1))) is None
    text = no_gateway(nodes((4, 0), (4, 0.05)))
    assert text is not None
    assert text.startswith(
        "Gateway: no node has 0.1 CPU left for it: 10.0.0.0 has 0 of 4 CPU, 10.0.0.1 has 0.05 of 4 CPU free"
    )


def test_groups_of_this_application_alone_are_told(cluster):
    other = group(gpus(9), name="SERVE_REPLICA::other#Group-m#x1")
    done = group(gpus(9), state="CREATED")
    cluster([(gpus(4), gpus(4))], group(gpus(8)), other, done)
    (text,) = unplaced.unplaced("kvasir")
    assert text.startswith("Group-m: Ray has no place for 1 bundle of 8 CPU and 8 GPU")
    assert unplaced.unplaced("kvasir", "Group-m") == [text]
    assert unplaced.unplaced("kvasir", "Group-n") == []


def test_a_deployment_whose_name_begins_with_another_s_is_another(cluster):
    name = "SERVE_REPLICA::kvasir#Group-m-70b#"
    cluster([(gpus(4), gpus(4))], group(gpus(8), name=name + "x1"), group(gpus(8), name=name + "x2"))
    assert unplaced.unplaced("kvasir", "Group-m") == []
    (text,) = unplaced.unplaced("kvasir", "Group-m-70b")
    assert text.startswith("Group-m-70b: ")


def test_of_a_group_that_lost_a_node_what_was_there_is_told(cluster):
    cluster(
        [(gpus(4), gpus(0)), (gpus(2), gpus(2))], group(gpus(4), gpus(4), state="RESCHEDULING", where=("0", "gone"))
    )
    assert "no place for 1 bundle of 4 CPU and 4 GPU" in unplaced.unplaced("kvasir")[0]


def test_kvasir_serve_says_so_while_it_waits(cluster, monkeypatch, caplog):
    cluster([(gpus(4), gpus(0))], group(gpus(8)))
    states = iter(["DEPLOYING"] * 2)
    gateway = SimpleNamespace(message="1 replicas that have taken more than 30s to be scheduled.")

    def status():
        one = SimpleNamespace(status=next(states, "DEPLOY_FAILED"), message="", deployments={"Gateway": gateway})
        return SimpleNamespace(applications={"kvasir": one})

    monkeypatch.setattr(ray.serve, "status", status)
    monkeypatch.setattr(app, "NOTE_S", 0.0)
    with pytest.raises(app.StartError):
        app.wait_until_ready("kvasir")
    said = [record.getMessage() for record in caplog.records]
    assert any(text.startswith("Group-m: Ray has no place for 1 bundle of 8 CPU") for text in said)
    assert any(text.startswith("Gateway: no node has 0.1 CPU left") for text in said)


def test_a_gateway_says_so_to_who_asks_for_the_model(cluster, monkeypatch):
    """Who deployed it with `serve deploy` sees no log of `kvasir serve`."""
    cluster([(gpus(4), gpus(4))], group(gpus(8)))

    class Unanswered:
        app_name, deployment_name = "kvasir", "Group-m"

        def broadcast(self, method):
            return self

        async def results_async(self, **_):
            raise TimeoutError

    with pytest.raises(UnavailableError, match="Group-m: Ray has no place for 1 bundle of 8 CPU and 8 GPU") as told:
        asyncio.run(gateway_replica.Finder([Unanswered()]).endpoints())
    assert "node 1 has 4 of 4 CPU" in told.value.message, "no address of ours"
    monkeypatch.setattr(ray, "nodes", lambda: 1 / 0)  # whoever follows the model ends with any other error
    with pytest.raises(UnavailableError, match="its group doesn't answer: TimeoutError"):
        asyncio.run(gateway_replica.Finder([Unanswered()]).endpoints())


def test_bundles_of_a_lost_node_are_waited_for(cluster, monkeypatch, caplog):
    lost = group(gpus(4), state="RESCHEDULING", where=("gone",))
    cluster([(gpus(2), gpus(2))], lost)
    table = ray.util.placement_group_table
    states = iter(["RESCHEDULING"] * 3)
    monkeypatch.setattr(ray.util, "get_current_placement_group", lambda: "0")
    monkeypatch.setattr(ray.util, "placement_group_table", lambda one: table(one) | {"state": next(states, "CREATED")})
    asyncio.run(unplaced.placed("m", look_s=0.001, note_s=0.0))
    assert len(caplog.records) == 3
    said = caplog.records[0].getMessage()
    assert said.startswith("Ray hasn't placed the ranks of 'm' again for ")
    assert "no place for 1 bundle of 4 CPU and 4 GPU" in said
    monkeypatch.setattr(ray.util, "placement_group_table", table)
    with pytest.raises(
        UnstartedError, match="is waited for no longer: Ray has no place for 1 bundle of 4 CPU and 4 GPU"
    ):
        asyncio.run(unplaced.placed("m", look_s=0.001, limit_s=0.01))


def test_a_placement_group_that_is_gone_is_told(monkeypatch):
    monkeypatch.setattr(ray.util, "get_current_placement_group", lambda: "0")
    monkeypatch.setattr(ray.util, "placement_group_table", lambda one: {})
    with pytest.raises(UnstartedError, match="the placement group of 'm' is gone"):
        asyncio.run(unplaced.placed("m", look_s=0.001))
