"""What a group waits for that Ray hasn't placed: Ray itself says no more than that it is pending, for ever if need be.

How many ranks share a bundle is settled when serving starts (`placement.shares`), by the nodes that are there then.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray._private.state import available_resources_per_node  # the public one adds all nodes up

from kvasir.cluster.placement import Resources, holds
from kvasir.cluster.rank_start import LIMIT_S, NOTE_S, UnstartedError

log = logging.getLogger(__name__)
LOOK_S = 0.25
GATEWAY_CPUS = 0.1
"""Of a gateway that any node may have. Not 0: it mustn't land on a head node that takes no work."""
MOST_NODES = 8
"""So many are named."""
STEPS = (
    "lower --tensor-parallel-size, or spread a group over more stages (--pipeline-parallel-size); fewer copies"
    " (--data-parallel-size) ask for less"
)


@dataclass(frozen=True)
class Node:
    """A living one: what it has, and what of that is free."""

    name: str
    total: Resources
    free: Resources


def living(*, named: bool = True) -> list[Node]:
    """The cluster's nodes. Not named: numbered, for clients are told no address of ours."""
    free = available_resources_per_node()  # type: ignore[no-untyped-call]
    nodes = [node for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]
    names = [node["NodeManagerAddress"] if named else f"node {number}" for number, node in enumerate(nodes, 1)]
    return [
        Node(name, node["Resources"], free.get(node["NodeID"], {})) for name, node in zip(names, nodes, strict=True)
    ]


def unplaced(app: str, deployment: str = "", *, named: bool = True) -> list[str]:
    """Of the groups of a Serve application (or of one deployment of it) whose bundles have no place: what is missing. named: as
    for `living`."""
    begin = f"SERVE_REPLICA::{app}#" + (f"{deployment}#" if deployment else "")
    table = ray.util.placement_group_table().values()
    waiting = [one for one in table if one["state"] in ("PENDING", "RESCHEDULING") and one["name"].startswith(begin)]
    texts = ((group["name"].split("#")[1], _lacking(group, named=named)) for group in waiting)
    return [*dict.fromkeys(f"{name}: {text}" for name, text in texts if text)]  # copies wait for the same


async def placed(name: str, *, look_s: float = LOOK_S, note_s: float = NOTE_S, limit_s: float = LIMIT_S) -> None:
    """Wait until Ray has placed all bundles of the group again, of which a node that is gone had some; every `note_s` the log says
    what is missing. UnstartedError after `limit_s`."""
    group = ray.util.get_current_placement_group()
    begin = noted = time.monotonic()
    while group is not None and (now := ray.util.placement_group_table(group)).get("state") != "CREATED":
        if not now:
            raise UnstartedError(f"the placement group of {name!r} is gone: its replica is being ended")
        await asyncio.sleep(look_s)
        late = time.monotonic() - begin
        text = f"Ray hasn't placed the ranks of {name!r} again for {late:.0f} s"
        if late > limit_s:
            raise UnstartedError(f"{text}, and is waited for no longer: {_lacking(now, named=False) or 'it has room'}")
        if time.monotonic() - noted > note_s:
            noted = time.monotonic()
            log.warning("%s: %s", text, _lacking(now) or "it has room, `ray status` knows more")


def _lacking(group: Mapping[str, Any], *, named: bool = True) -> str | None:
    """Of what a placement group's table says is on no living node."""
    alive = {node["NodeID"] for node in ray.nodes() if node["Alive"]}  # type: ignore[no-untyped-call]
    where = group["bundles_to_node_id"]
    missing = [bundle for index, bundle in group["bundles"].items() if where.get(index) not in alive]
    return lacking(missing, living(named=named))


def lacking(bundles: Sequence[Resources], nodes: Sequence[Node]) -> str | None:
    """Why these equal bundles can't be placed; None: they can, or there are none."""
    if not bundles:
        return None
    wanted, bundle = len(bundles), bundles[0]
    if sum(holds(node.free, bundle) for node in nodes) >= wanted:
        return None
    asked = f"Ray has no place for {wanted} bundle{'s' * (wanted > 1)} of {_said(bundle)}, each of which has to be on one node"
    there = _listed(nodes, [*bundle])
    if _without_gateway(bundle, nodes) >= wanted:
        gateway = f"What is missing is the {GATEWAY_CPUS:g} CPU that a gateway has of a node"
        return f"{asked}: {there}. {gateway}: start it with a CPU more (`ray start --num-cpus`), add nodes; or {STEPS}"
    if sum(holds(node.total, bundle) for node in nodes) >= wanted:
        return f"{asked}: {there}. Nodes are large enough, and what else runs there has what is missing: end it, or add nodes"
    smaller = _smaller(bundles, nodes)
    if smaller is not None:
        again = f"serve again, for nodes that are here now have room for bundles of {_said(smaller)}, and what is in one is settled"
        return f"{asked}: {there}. Add nodes that are large enough; or {again} when serving starts; or {STEPS}"
    return f"{asked}: {there}. Add nodes; or {STEPS}"


def no_gateway(nodes: Sequence[Node]) -> str | None:
    """Why a gateway that any node may have finds no place."""
    if any(node.free.get("CPU", 0.0) >= GATEWAY_CPUS - 1e-6 for node in nodes):
        return None
    return (
        f"Gateway: no node has {GATEWAY_CPUS:g} CPU left for it: {_listed(nodes, ['CPU'])}. Add a node, or lower"
        " --tensor-parallel-size, --pipeline-parallel-size or --data-parallel-size: each rank asks for a CPU"
    )


def _without_gateway(bundle: Resources, nodes: Sequence[Node]) -> int:
    """How many such bundles there is room for where a gateway is: at the one node at which it takes most."""
    more = [{**node.free, "CPU": node.free.get("CPU", 0.0) + GATEWAY_CPUS} for node in nodes]
    gains = [holds(free, bundle) - holds(node.free, bundle) for node, free in zip(nodes, more, strict=True)]
    return sum(holds(node.free, bundle) for node in nodes) + max(gains, default=0)


def _smaller(bundles: Sequence[Resources], nodes: Sequence[Node]) -> Resources | None:
    """The largest part of the bundles, one rank at least, in which all that they ask for would fit."""
    ranks = round(bundles[0].get("CPU", 1.0))
    for size in range(ranks - 1, 0, -1):
        part = {kind: count * size / ranks for kind, count in bundles[0].items()}
        if ranks % size == 0 and sum(holds(node.total, part) for node in nodes) >= len(bundles) * ranks // size:
            return part
    return None


def _said(resources: Resources) -> str:
    return " and ".join(f"{count:g} {kind}" for kind, count in resources.items())


def _listed(nodes: Sequence[Node], kinds: Sequence[str]) -> str:
    """Of each node what is free of what it has."""
    said = [
        f"{node.name} has "
        + " and ".join(f"{node.free.get(kind, 0.0):g} of {node.total.get(kind, 0.0):g} {kind}" for kind in kinds)
        for node in nodes[:MOST_NODES]
    ]
    more = [f"and so on for {len(nodes) - MOST_NODES} more"] if len(nodes) > MOST_NODES else []
    return ", ".join([*said, *more]) + " free" if said else "there is no node"
