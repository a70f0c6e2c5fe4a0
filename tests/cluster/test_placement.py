"""Bundles of groups, and which rank gets which: a stage's ranks share a node where one has room for them."""

from __future__ import annotations

import logging

import pytest
import ray

from kvasir.cluster import placement
from kvasir.cluster.placement import bundles, by_stage, note_split, shares
from kvasir.engine.config import EngineConfig

GPUS_8 = {"CPU": 64.0, "GPU": 8.0}


@pytest.fixture
def cluster(monkeypatch):
    """`cluster(nodes, free)`: their resources; all free by default."""

    def has(nodes, free=None):
        alive = [{"NodeID": str(number), "Alive": True, "Resources": node} for number, node in enumerate(nodes)]
        there = {str(number): node for number, node in enumerate(nodes if free is None else free)}
        monkeypatch.setattr(ray, "is_initialized", lambda: True)
        monkeypatch.setattr(ray, "nodes", lambda: alive)
        monkeypatch.setattr(placement, "available_resources_per_node", lambda: there)

    return has


def asked(tp, pp=1, copies=1, **more):
    config = EngineConfig(tensor_parallel_size=tp, pipeline_parallel_size=pp, data_parallel_size=copies, **more)
    return config, 1.0


def gpus(*free):
    return [{"CPU": 64.0, "GPU": float(count)} for count in free]


@pytest.mark.parametrize(
    ("groups", "free", "found"),
    [
        ([asked(8, 2)], (8, 8), [8]),
        ([asked(4, 2)], (6, 6), [4]),  # a bundle a rank might be placed 6 and 2
        ([asked(8)], (6, 6), [4]),
        ([asked(6)], (5, 1), [1]),
        ([asked(4, 2, copies=2)], (8, 8), [4]),
        ([asked(4), asked(4), asked(8)], (8, 8), [4, 4, 8]),
        ([asked(2), asked(8)], (8, 7), [2, 8]),  # the fuller node takes the smaller one
        ([asked(8)], (0, 0), [8]),  # somebody else has them now
        ([asked(8, 4)], (8, 8), [8]),  # two nodes are still to come
        ([asked(16)], (8, 8), [8]),
        ([asked(2), asked(1)], (4, 4), [2, 1]),
        ([asked(4, distributed_executor_backend="mp")], (4, 4), [4]),
    ],
)
def test_a_stage_shares_a_bundle_where_a_node_has_room(cluster, groups, free, found):
    cluster([GPUS_8] * len(free), gpus(*free))
    assert shares(groups) == found
    for (config, each), share in zip(groups, found, strict=True):
        assert sum(bundle["GPU"] for bundle in bundles(config, each, share)) == config.ranks


def test_nobody_knows_yet_how_large_nodes_will_be(cluster):
    cluster([{"CPU": 2.0}])
    assert shares([asked(8, 2)]) == [1]
    assert bundles(*asked(8, 2)) == [{"CPU": 1.0, "GPU": 1.0}] * 16


@pytest.mark.parametrize(
    ("nodes", "size", "order"),
    [
        ("aabb", 2, [0, 1, 2, 3]),
        ("abab", 2, [0, 2, 1, 3]),
        ("abbb", 2, [0, 3, 1, 2]),  # rank 0 is beside the coordinator; the other stage is whole
        ("aaabbbbc", 4, [0, 1, 2, 7, 3, 4, 5, 6]),
        ("aaaaabbb", 4, [0, 1, 2, 3, 4, 5, 6, 7]),
        ("ba", 1, [0, 1]),
    ],
)
def test_stages_are_whole_where_they_can_be(nodes, size, order):
    assert by_stage(nodes, size) == order


def test_a_stage_that_is_split_is_told(caplog):
    with caplog.at_level(logging.WARNING):
        note_split("m", "aabbbc", 2)
    (record,) = caplog.records
    assert record.getMessage().startswith("stage 2 of 'm' (ranks 4 to 5) is on 2 nodes, so its sums cross the network")
