"""`kvasir doctor --cluster`: whether every two nodes of a Ray cluster can hold ranks of one group, and how fast."""

from __future__ import annotations

import logging
import os
import socket
import statistics
import time
from collections import Counter
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import ray
from ray._private.state import available_resources_per_node  # the public one adds all nodes up
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from kvasir.cluster.application import network_variables
from kvasir.cluster.doctor import Finding
from kvasir.cluster.rank_actor import RankSetup

TIMEOUT_S = 15.0
"""For two ranks to meet."""
START_S = 60.0
"""For a node to start a process that has loaded torch."""
LIMIT_S = 300.0
"""For all links: each that is broken takes TIMEOUT_S."""
ENOUGH = 3
"""A node with so many broken links and no other isn't waited for again."""
SMALL, LARGE = (8, 2048), (4096, 2048)
"""Rows of bfloat16 that are summed: a decode's, and 16 MB."""
Pair = tuple[int, int]
K = TypeVar("K", bound=Hashable)


@dataclass(frozen=True)
class Speed:
    """Of sums between two nodes."""

    small_us: float
    bytes_s: float
    by: str = "gloo"


class Probe:
    """Runs on a node, as a rank would."""

    def __init__(self, timeout_s: float = TIMEOUT_S, network: Mapping[str, str] | None = None) -> None:
        RankSetup(network=network or {}).enter()
        self._timeout_s = timeout_s

    def load(self) -> str | None:
        """Its libraries: a link's time doesn't count them. What is wrong with its interfaces."""
        import kvasir.engine.mesh  # noqa: F401
        from kvasir.engine.errors import ConfigError
        from kvasir.engine.interfaces import named_address

        try:
            self._host: str = named_address() or ray.util.get_node_ip_address()  # type: ignore[no-untyped-call]
        except ConfigError as error:
            return error.message
        return None

    def meet(self) -> tuple[str, int]:
        """Where another rank can find this one."""
        from kvasir.engine.mesh import host_store

        self._store, port = host_store(self._host, 2, self._timeout_s)
        return self._host, port

    def exchange(self, rank: int, host: str, port: int, device: str = "cpu") -> Speed | str:
        """Sum with the other probe; what went wrong, if it did."""
        import torch

        from kvasir.engine.mesh import Place, join, reach_store

        kind = torch.device(device)
        try:
            store = self._store if rank == 0 else reach_store(host, port, 2, self._timeout_s)
            mesh = join(Place(2, 1, rank), store, kind, self._host, self._timeout_s, one_shot=device == "cpu")
            small, large = (torch.ones(shape, dtype=torch.bfloat16, device=kind) for shape in (SMALL, LARGE))
            took = [_timed(mesh, small) for _ in range(50)]
            whole = min(_timed(mesh, large) for _ in range(5))
            mesh.least(0)  # neither leaves before the other is done
            mesh.close()
        except (RuntimeError, OSError) as error:
            return " ".join(str(error).split())
        return Speed(statistics.median(took) * 1e6, large.nbytes / whole, "gloo" if device == "cpu" else "NCCL")


class Probes:
    """A process on each of the nodes, by number; one that an exchange holds is replaced. `gpus`: those with one that is free."""

    def __init__(self, nodes: Sequence[str], gpus: frozenset[str] = frozenset()) -> None:
        self._nodes, self._gpus = nodes, gpus
        self._network = network_variables(os.environ)
        self._probes = [self._probe(number) for number in range(len(nodes))]

    def start(self) -> dict[int, str]:
        """What is wrong with nodes that start none, by number."""
        return self._load(range(len(self._nodes)))

    def _load(self, numbers: Iterable[int]) -> dict[int, str]:
        loads = {number: self._probes[number].load.remote() for number in numbers}
        answers = _answers(loads, START_S, f"no process started in {START_S:.0f} s")
        return {number: answer for number, answer in answers.items() if isinstance(answer, str)}

    def exchange(self, pairs: Sequence[Pair]) -> dict[Pair, Speed | str]:
        """Between each two, at the same time; what went wrong, if it did."""
        met = _answers({pair: self._probes[pair[0]].meet.remote() for pair in pairs}, TIMEOUT_S, "it can't listen")
        calls = {}
        for pair, where in met.items():
            device = "cuda" if all(self._nodes[end] in self._gpus for end in pair) else "cpu"
            for rank, end in enumerate(pair if not isinstance(where, str) else ()):
                calls[pair, rank] = self._probes[end].exchange.remote(rank, *where, device)
        answers = _answers(calls, 4 * TIMEOUT_S, f"a sum hangs for {4 * TIMEOUT_S:.0f} s")
        found: dict[Pair, Speed | str] = {}
        for pair, where in met.items():
            both = [where] if isinstance(where, str) else [answers[pair, rank] for rank in (0, 1)]
            found[pair] = next((answer for answer in both if isinstance(answer, str)), both[0])
        held = [end for pair in pairs if isinstance(found[pair], str) for end in pair]
        for end in held:
            ray.kill(self._probes[end])
            self._probes[end] = self._probe(end)
        self._load(held)
        return found

    def close(self) -> None:
        for probe in self._probes:
            ray.kill(probe)

    def _probe(self, number: int) -> Any:
        actor: Any = ray.remote(Probe)
        there = NodeAffinitySchedulingStrategy(self._nodes[number], soft=False)
        gpus = int(self._nodes[number] in self._gpus)
        return actor.options(num_cpus=0, num_gpus=gpus, scheduling_strategy=there).remote(TIMEOUT_S, self._network)


def look(address: str) -> Iterator[Finding]:
    """Findings on the cluster at `address`; one for each pair of nodes."""
    try:
        _reach(address)
        ray.init(address, logging_level=logging.ERROR, log_to_driver=False)
    except (OSError, RayError, ValueError) as error:
        yield Finding("wrong", "cluster", f"no Ray cluster at {address}: {' '.join(str(error).split())[:200]}")
        return
    alive = {node["NodeID"]: node for node in ray.nodes() if node["Alive"]}  # type: ignore[no-untyped-call]
    names = {node: facts["NodeManagerAddress"] for node, facts in alive.items()}
    yield Finding("ok", "cluster", f"{len(names)} node(s): {', '.join(names.values())}")
    yield _room([facts["Resources"] for facts in alive.values()])
    free = available_resources_per_node()  # type: ignore[no-untyped-call]
    ends = [*names] if len(names) > 1 else [*names] * 2
    gpus = frozenset(node for node in alive if free.get(node, {}).get("GPU", 0.0) >= ends.count(node))
    if busy := [names[node] for node, facts in alive.items() if facts["Resources"].get("GPU") and node not in gpus]:
        yield Finding(
            "note", "link", f"{', '.join(busy)}: too few GPUs are free, so its links are tried by gloo, not NCCL"
        )
    yield from _links(Probes(ends, gpus), list(names.values()))
    ray.shutdown()


def _room(nodes: Sequence[Mapping[str, float]]) -> Finding:
    """How many ranks of a stage share a node."""
    kind = "GPU" if any(node.get("GPU") for node in nodes) else "CPU"
    most = int(max(node.get(kind, 0.0) for node in nodes))
    return Finding("ok", "cluster", f"--tensor-parallel-size to {most} stays on one node ({most} {kind}s)")


def _links(probes: Probes, names: Sequence[str]) -> Iterator[Finding]:
    """Of every two nodes; `names` has one for each, which is alone with itself if there is but one."""
    names = names if len(names) > 1 else [*names] * 2
    missing, begin = probes.start(), time.monotonic()
    for number, why in missing.items():
        yield Finding("wrong", "node", f"{names[number]}: {why}")
    good, bad = Counter[int](), Counter[int]()
    broken: list[Pair] = []
    left = 0
    for pairs in rounds([number for number in range(len(names)) if number not in missing]):
        tried = [pair for pair in pairs if not any(bad[end] >= ENOUGH and not good[end] for end in pair)]
        if time.monotonic() - begin > LIMIT_S:
            tried = []
        left += len(pairs) - len(tried)
        for pair, found in probes.exchange(tried).items():
            both = f"{names[pair[0]]} and {names[pair[1]]}"
            (bad if isinstance(found, str) else good).update(pair)
            if isinstance(found, str):
                broken.append(pair)
                yield Finding("wrong", "link", f"{both}: {found}")
                continue
            speed = f"{found.small_us:.0f} us for a decode's sum, {found.bytes_s / 1e9:.2f} GB/s for a large one"
            yield Finding("ok", "link", f"{both}: {speed} ({found.by})")
    probes.close()
    if left:
        why = f"of nodes of which {ENOUGH} links are broken and none works, or after {LIMIT_S:.0f} s"
        yield Finding("note", "link", f"{left} weren't tried: {why}")
    yield from _culprits(broken, good, names)


def rounds(ends: Sequence[int]) -> Iterator[list[Pair]]:
    """Every two once, each in at most one pair of a round, in as few rounds as can be: all but the first one move on by a place
    (the circle method of tournaments)."""
    ring: list[int | None] = [*ends, *[None] * (len(ends) % 2)]
    for _ in range(len(ring) - 1):
        half = len(ring) // 2
        faced = zip(ring[:half], reversed(ring[half:]), strict=True)
        yield [(one, other) for one, other in faced if one is not None and other is not None]
        ring.insert(1, ring.pop())


def _culprits(broken: Sequence[Pair], good: Mapping[int, int], names: Sequence[str]) -> Iterator[Finding]:
    """Nodes none of whose links works though others' do, and the one that all broken links have in common."""
    ends = Counter(end for pair in broken for end in pair)
    for end, count in ends.items():
        if count > 1 and (count == len(broken) or (not good.get(end) and any(good.values()))):
            whole = "all" if not good.get(end) else f"{count}"
            text = f"{names[end]}: {whole} of its links that were tried are broken: look at its firewall and network"
            yield Finding("wrong", "node", text)


def _answers(calls: Mapping[K, Any], limit_s: float, late: str) -> dict[K, Any]:
    """What each call gives; `late`, or the error's words, where it gives nothing."""
    done = set(ray.wait([*calls.values()], num_returns=len(calls), timeout=limit_s)[0] if calls else ())
    found: dict[K, Any] = {}
    for key, call in calls.items():
        try:
            found[key] = ray.get(call) if call in done else late
        except RayError as error:
            found[key] = " ".join(str(error).split())[:300]
    return found


def _reach(address: str) -> None:
    """OSError at once where nobody listens: Ray would try for minutes."""
    host, _, port = address.rpartition(":")
    if host and port.isdigit():
        socket.create_connection((host, int(port)), 3.0).close()


def _timed(mesh: Any, x: Any) -> float:
    import torch

    start = time.perf_counter()
    mesh.reduce(x)
    if x.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start
