"""`kvasir doctor --cluster`: whether every two nodes of a Ray cluster can hold ranks of one group, and how fast."""

from __future__ import annotations

import logging
import socket
import statistics
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from kvasir.cluster.doctor import Finding

TIMEOUT_S = 15.0
SMALL, LARGE = (8, 2048), (4096, 2048)
"""Rows of bfloat16 that are summed: a decode's, and 16 MB."""


@dataclass(frozen=True)
class Speed:
    """Of sums between two nodes."""

    small_us: float
    bytes_s: float


class Probe:
    """Runs on a node, as a rank would."""

    def __init__(self, timeout_s: float = TIMEOUT_S) -> None:
        self._timeout_s = timeout_s
        self._host: str = ray.util.get_node_ip_address()  # type: ignore[no-untyped-call]

    def meet(self) -> tuple[str, int]:
        """Where another rank can find this one."""
        from kvasir.engine.mesh import host_store

        self._store, port = host_store(self._host, 2, self._timeout_s)
        return self._host, port

    def exchange(self, rank: int, host: str, port: int) -> Speed | str:
        """Sum with the other probe; what went wrong, if it did."""
        import torch

        from kvasir.engine.mesh import Place, join, reach_store

        try:
            store = self._store if rank == 0 else reach_store(host, port, 2, self._timeout_s)
            mesh = join(Place(2, 1, rank), store, torch.device("cpu"), self._host, self._timeout_s)
            small, large = (torch.ones(shape, dtype=torch.bfloat16) for shape in (SMALL, LARGE))
            took = [_timed(mesh, small) for _ in range(50)]
            whole = min(_timed(mesh, large) for _ in range(5))
            mesh.least(0)  # neither leaves before the other is done
            mesh.close()
        except (RuntimeError, OSError) as error:
            return " ".join(str(error).split())
        return Speed(statistics.median(took) * 1e6, large.nbytes / whole)


def look(address: str) -> Iterator[Finding]:
    """Findings on the cluster at `address`; one for each pair of nodes."""
    try:
        _reach(address)
        ray.init(address, logging_level=logging.ERROR, log_to_driver=False)
    except (OSError, RayError, ValueError) as error:
        yield Finding("wrong", "cluster", f"no Ray cluster at {address}: {' '.join(str(error).split())[:200]}")
        return
    nodes = {node["NodeID"]: node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"]}  # type: ignore[no-untyped-call]
    yield Finding("ok", "cluster", f"{len(nodes)} node(s): {', '.join(nodes.values())}")
    failed: Counter[str] = Counter()
    pairs = list(combinations(nodes, 2)) or [(node, node) for node in nodes]
    for first, second in pairs:
        names = f"{nodes[first]} and {nodes[second]}"
        found = _pair(first, second)
        if isinstance(found, Speed):
            speed = f"{found.small_us:.0f} us for a decode's sum, {found.bytes_s / 1e9:.2f} GB/s for a large one"
            yield Finding("ok", "link", f"{names}: {speed}")
        else:
            failed.update((first, second))
            yield Finding("wrong", "link", f"{names}: {found}")
    yield from _culprit(failed, nodes)
    ray.shutdown()


def _reach(address: str) -> None:
    """OSError at once where nobody listens: Ray would try for minutes."""
    host, _, port = address.rpartition(":")
    if host and port.isdigit():
        socket.create_connection((host, int(port)), 3.0).close()


def _pair(first: str, second: str) -> Speed | str:
    actor: Any = ray.remote(Probe)
    probes = [actor.options(num_cpus=0, **_on(node)).remote() for node in (first, second)]
    try:
        host, port = ray.get(probes[0].meet.remote(), timeout=2 * TIMEOUT_S)
        calls = [probe.exchange.remote(rank, host, port) for rank, probe in enumerate(probes)]
        answers: list[Speed | str] = ray.get(calls, timeout=4 * TIMEOUT_S)
    except (RayError, TimeoutError) as error:
        return " ".join(str(error).split())[:300]
    finally:
        for probe in probes:
            ray.kill(probe)
    return next((answer for answer in answers if isinstance(answer, str)), answers[0])


def _culprit(failed: Counter[str], nodes: Mapping[str, str]) -> Iterator[Finding]:
    """The node that all broken links have in common, where there is one."""
    if not failed or len(nodes) < 3:
        return
    (worst, count), *others = failed.most_common()
    if count > 1 and all(other < count for _, other in others):
        text = f"{nodes[worst]} is an end of all {count} links that failed: look at its firewall and network"
        yield Finding("wrong", "node", text)


def _on(node: str) -> dict[str, Any]:
    return {"scheduling_strategy": NodeAffinitySchedulingStrategy(node, soft=False)}


def _timed(mesh: Any, x: Any) -> float:
    start = time.perf_counter()
    mesh.reduce(x)
    return time.perf_counter() - start
