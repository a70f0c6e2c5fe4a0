"""Placement: the bundles that a group asks of the cluster, and which of them each rank gets.

The ranks of a stage add up twice in every layer, stages hand on once: where nodes have room for a stage it is one bundle, which
Ray keeps on one node.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import ray
from ray._private.state import available_resources_per_node  # the public one adds all nodes up
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from kvasir.engine.config import EngineConfig

log = logging.getLogger(__name__)
Resources = Mapping[str, float]


def spread(config: EngineConfig) -> bool:
    """Whether each rank is an actor of its own; else those besides rank 0 are processes of its node."""
    return config.ranks > 1 and config.distributed_executor_backend in ("auto", "ray")


def bundles(config: EngineConfig, gpus: float, share: int = 1) -> list[dict[str, float]]:
    """What a group asks of the cluster: a bundle per `share` ranks, or one where all ranks are on a node."""
    size = share if spread(config) else config.ranks
    return [_times(_unit(gpus), size)] * (config.ranks // size)


def shares(asked: Sequence[tuple[EngineConfig, float]]) -> list[int]:
    """How many ranks share a bundle, by group: a stage, or the largest part of it that nodes have room for. `asked`: with the GPUs
    of a rank. What is free now counts; where all can't be placed in that, what the nodes have, and some may be yet to come."""
    if not ray.is_initialized():
        return [1] * len(asked)
    nodes = {node["NodeID"]: node["Resources"] for node in ray.nodes() if node["Alive"]}  # type: ignore[no-untyped-call]
    free = available_resources_per_node()  # type: ignore[no-untyped-call]
    there = [free[node] for node in nodes if node in free], list(nodes.values())
    for found in (_fit(asked, there[0]), _fit(asked, there[1])):
        if found is not None:
            return found
    return [_largest(config, gpus, there[1], 1) or 1 for config, gpus in asked]


def _fit(asked: Iterable[tuple[EngineConfig, float]], nodes: Iterable[Resources]) -> list[int] | None:
    """One group after the other; None: they have no room."""
    free = [dict(node) for node in nodes]
    found = []
    for config, gpus in asked:
        copies = config.data_parallel_size
        share = _largest(config, gpus, free, copies * config.ranks)
        if share is None:
            return None
        found.append(share)
        for bundle in bundles(config, gpus, share) * copies:
            node = min((node for node in free if holds(node, bundle)), key=lambda node: holds(node, bundle))
            for kind, count in bundle.items():
                node[kind] -= count
    return found


def _largest(config: EngineConfig, gpus: float, nodes: Sequence[Resources], ranks: int) -> int | None:
    """Of the parts of a stage of which the nodes hold so many that they make up `ranks`, or all of a group in one."""
    stage = config.tensor_parallel_size
    parts = [size for size in range(stage, 0, -1) if stage % size == 0] if spread(config) else [config.ranks]
    for size in parts:
        if size * sum(holds(node, _times(_unit(gpus), size)) for node in nodes) >= ranks:
            return size
    return None


def _unit(gpus: float) -> dict[str, float]:
    return {"CPU": 1.0, "GPU": gpus} if gpus else {"CPU": 1.0}


def _times(unit: Resources, count: int) -> dict[str, float]:
    return {kind: size * count for kind, size in unit.items()}


def holds(node: Resources, bundle: Resources) -> int:
    """How many such bundles it has room for."""
    return min(int(node.get(kind, 0.0) / size + 1e-6) for kind, size in bundle.items())


def on_bundle(index: int) -> dict[str, Any]:
    """Options of an actor in this bundle of the replica's placement group."""
    group = ray.util.get_current_placement_group()
    if group is None:
        return {}
    return {"scheduling_strategy": PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=index)}


def rank_bundles(config: EngineConfig) -> list[int]:
    """Each rank's bundle, rank 0's being bundle 0, on whose node the coordinator is."""
    group = ray.util.get_current_placement_group()
    if group is None:
        return [0] * config.ranks
    nodes = ray.util.placement_group_table(group)["bundles_to_node_id"]
    share = config.ranks // len(nodes)
    order = by_stage([nodes[index] for index in range(len(nodes))], config.tensor_parallel_size // share)
    return [bundle for bundle in order for _ in range(share)]


def by_stage(nodes: Sequence[str], size: int) -> list[int]:
    """Bundles in the order of the ranks, bundle 0 first: as many stages of `size` bundles as can be are on one node, and in the
    rest each node's bundles are neighbours. `nodes`: by bundle."""
    whole: list[int] = []
    rest: list[int] = []
    for node in dict.fromkeys(nodes):
        there = [bundle for bundle, where in enumerate(nodes) if where == node]
        cut = len(there) // size * size
        whole += there[:cut]
        rest += there[cut:]
    return whole + rest if 0 in whole else rest + whole


def note_split(name: str, nodes: Sequence[str], size: int) -> None:
    """A line in the log for each stage of `size` ranks that isn't on one node; `nodes` by rank."""
    for first in range(0, len(nodes), size):
        if (count := len(set(nodes[first : first + size]))) > 1:
            log.warning(
                "stage %d of %r (ranks %d to %d) is on %d nodes, so its sums cross the network twice in every layer. It is kept"
                " on one where one has room for %d ranks; a lower --tensor-parallel-size with more stages"
                " (--pipeline-parallel-size) asks for less of it",
                first // size, name, first, first + size - 1, count, size,
            )  # fmt: skip
