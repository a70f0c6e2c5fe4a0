"""`kvasir doctor --cluster`: links between nodes, and whose fault it is when they fail."""

from __future__ import annotations

from collections import Counter

import pytest
import ray

from kvasir.cluster import doctor_cluster
from kvasir.cluster.doctor_cluster import Speed, look

NODES = {"a": "10.0.0.1", "b": "10.0.0.2", "c": "10.0.0.3"}


def test_the_end_that_all_broken_links_share_is_named():
    (found,) = doctor_cluster._culprit(Counter(a=1, b=2, c=1), NODES)
    assert (found.state, found.about) == ("wrong", "node")
    assert found.text.startswith("10.0.0.2 is an end of all 2 links")
    assert list(doctor_cluster._culprit(Counter(a=2, b=2, c=2), NODES)) == []
    assert list(doctor_cluster._culprit(Counter(), NODES)) == []


def test_no_cluster_is_a_finding():
    (found,) = look("127.0.0.1:1")
    assert (found.state, found.about) == ("wrong", "cluster")
    assert "no Ray cluster at 127.0.0.1:1" in found.text


@pytest.mark.ray
def test_two_ranks_of_one_node(serve_on_ray):
    node = next(node["NodeID"] for node in ray.nodes() if node["Alive"])
    found = doctor_cluster._pair(node, node)
    assert isinstance(found, Speed), found
    assert found.small_us > 0
    assert found.bytes_s > 1e6


@pytest.mark.ray
def test_a_rank_that_doesn_t_come_is_told(serve_on_ray):
    """One end alone."""
    probe = ray.remote(doctor_cluster.Probe).options(num_cpus=0).remote(1.0)
    host, port = ray.get(probe.meet.remote())
    answer = ray.get(probe.exchange.remote(0, host, port), timeout=60)
    assert isinstance(answer, str)
    ray.kill(probe)
