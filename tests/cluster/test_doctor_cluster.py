"""`kvasir doctor --cluster`: links between nodes, and whose fault it is when they fail."""

from __future__ import annotations

from itertools import combinations

import pytest
import ray
from ray.exceptions import RayActorError
from waiting import until

from kvasir.cluster import doctor_cluster
from kvasir.cluster.doctor_cluster import Probes, Speed, look, rounds

NAMES = ["10.0.0.1", "10.0.0.2", "10.0.0.3", "10.0.0.4", "10.0.0.5"]


class Fakes:
    """Probes of nodes of which some links are broken; a node that is `absent` starts none."""

    def __init__(self, broken, absent=()):
        self.broken, self.absent, self.rounds = broken, absent, []

    def start(self):
        return dict.fromkeys(self.absent, "no process started")

    def exchange(self, pairs):
        self.rounds.append(pairs)
        return {pair: "timed out" if self.broken(set(pair)) else Speed(50.0, 1e9) for pair in pairs}

    def close(self):
        self.rounds.append("closed")


def findings(probes, names=NAMES):
    found = list(doctor_cluster._links(probes, names))
    assert probes.rounds.pop() == "closed"
    return found


@pytest.mark.parametrize("count", range(2, 9))
def test_every_two_meet_once_and_nobody_waits_for_long(count):
    found = list(rounds(range(count)))
    assert len(found) == count - 1 + count % 2
    for pairs in found:
        ends = [end for pair in pairs for end in pair]
        assert len(ends) == len(set(ends))
    assert sorted(tuple(sorted(pair)) for pairs in found for pair in pairs) == list(combinations(range(count), 2))


@pytest.mark.parametrize(
    ("broken", "named"),
    [
        (lambda pair: 1 in pair, ["10.0.0.2: all of its"]),
        (lambda pair: pair & {1, 4}, ["10.0.0.2: all of its", "10.0.0.5: all of its"]),
        (lambda pair: pair in ({1, 2}, {1, 3}), ["10.0.0.2: 2 of its"]),
        (lambda pair: pair == {0, 1}, []),
        (lambda pair: True, []),  # that is nobody's own fault
        (lambda pair: False, []),
    ],
)
def test_whoever_is_to_blame_is_named(broken, named):
    found = findings(Fakes(broken))
    culprits = sorted(finding.text for finding in found if finding.about == "node")
    assert [text[: len(start)] for text, start in zip(culprits, named, strict=True)] == named
    assert all(finding.state == "wrong" for finding in found if finding.about == "node")
    assert sum(finding.about == "link" and finding.state != "note" for finding in found) <= 10


def test_a_node_that_no_link_reaches_isn_t_waited_for_again():
    probes = Fakes(lambda pair: 0 in pair)
    found = findings(probes, NAMES * 2)
    assert sum(0 in pair for pairs in probes.rounds for pair in pairs) == doctor_cluster.ENOUGH
    assert any(finding.state == "note" and finding.text.startswith("6 weren't tried") for finding in found)


def test_it_ends(monkeypatch):
    monkeypatch.setattr(doctor_cluster, "LIMIT_S", -1.0)
    (note,) = findings(Fakes(lambda pair: False))
    assert note.text.startswith("10 weren't tried")


def test_a_node_without_a_process_is_told_and_left_out():
    probes = Fakes(lambda pair: False, absent=[2])
    first, *links = findings(probes)
    assert (first.state, first.text) == ("wrong", "10.0.0.3: no process started")
    assert len(links) == 6
    assert not any(2 in pair for pairs in probes.rounds for pair in pairs)


def test_how_many_ranks_share_a_node():
    nodes = [{"CPU": 4.0}, {"CPU": 64.0, "GPU": 8.0}]
    assert doctor_cluster._room(nodes).text == "--tensor-parallel-size to 8 stays on one node (8 GPUs)"
    assert doctor_cluster._room(nodes[:1]).text == "--tensor-parallel-size to 4 stays on one node (4 CPUs)"


def test_no_cluster_is_a_finding():
    (found,) = look("127.0.0.1:1")
    assert (found.state, found.about) == ("wrong", "cluster")
    assert "no Ray cluster at 127.0.0.1:1" in found.text


@pytest.mark.parametrize(("free", "taken"), [([2.0], [0]), ([1.0], []), ([1.0, 0.0], [0]), ([1.0, 1.0], [0, 1])])
def test_a_node_alone_is_tried_by_two_of_its_gpus(monkeypatch, free, taken):
    asked = []
    nodes = [
        {"NodeID": n, "Alive": True, "NodeManagerAddress": str(n), "Resources": {"GPU": 2.0}} for n in range(len(free))
    ]
    monkeypatch.setattr(ray, "init", lambda *_, **__: None)
    monkeypatch.setattr(ray, "nodes", lambda: nodes)
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    there = {number: {"GPU": count} for number, count in enumerate(free)}
    monkeypatch.setattr(doctor_cluster, "available_resources_per_node", lambda: there)
    monkeypatch.setattr(doctor_cluster, "Probes", lambda *given: asked.append(given) or Fakes(lambda pair: False))
    found = list(look("auto"))
    ((ends, gpus),) = asked
    assert (ends, sorted(gpus)) == (list(range(len(free))) if len(free) > 1 else [0, 0], taken)
    busy = [finding.text for finding in found if finding.state == "note"]
    assert len(busy) == (len(taken) < len(free))


def is_dead(actor):
    """Ray kills it a little later than it is told to."""
    try:
        return ray.get(actor.load.remote())
    except RayActorError:
        return True


@pytest.mark.ray
def test_two_ranks_of_one_node(serve_on_ray):
    node = next(node["NodeID"] for node in ray.nodes() if node["Alive"])
    probes = Probes([node, node])
    assert not probes.start()
    ray.kill(victim := probes._probes[1])
    until(lambda: is_dead(victim))
    assert isinstance(probes.exchange([(0, 1)])[0, 1], str)
    found = probes.exchange([(0, 1)])[0, 1]  # both are processes anew
    probes.close()
    assert isinstance(found, Speed), found
    assert found.small_us > 0
    assert found.bytes_s > 1e6


@pytest.mark.ray
def test_a_rank_that_doesn_t_come_is_told(serve_on_ray):
    """One end alone."""
    probe = ray.remote(doctor_cluster.Probe).options(num_cpus=0).remote(1.0)
    assert ray.get(probe.load.remote()) is None
    host, port = ray.get(probe.meet.remote())
    answer = ray.get(probe.exchange.remote(0, host, port), timeout=60)
    assert isinstance(answer, str)
    ray.kill(probe)
