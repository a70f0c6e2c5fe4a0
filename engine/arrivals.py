"""Arrivals: a step that computes on the first layers of blocks while the others still come from another group.

Before a layer is read it is waited for, a bounded time for all layers of a step together, at all ranks. Of what didn't come in
time, or came wrongly, the step's result means nothing: it says so, and the scheduler computes it again. Each rank of several
waits for its own layers and heads alone; what one of them lacked is computed again by all.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

from kvasir.engine.cache import KVCache
from kvasir.engine.mesh import Mesh
from kvasir.engine.puller import Puller

LATE_S = 0.25
"""A step waits no longer in all, however many fetches it waits for: others stream in it."""


@dataclass(slots=True)
class Landing:
    """A fetch whose blocks have their places."""

    ticket: int
    rows: Tensor
    places: Sequence[tuple[int, int]]
    """(row, block)"""
    done: set[int] = field(default_factory=set)
    """Layers that are in the cache."""
    spoiled: bool = False


class Arrivals:
    """Belongs to the rank's thread. layers: those of this rank."""

    def __init__(self, cache: KVCache, puller: Puller, layers: Sequence[int], mesh: Mesh) -> None:
        self._cache, self._puller, self._layers, self._mesh = cache, puller, layers, mesh
        self._landings: list[Landing] = []
        self._steps = 0
        """That began so: as many at every rank."""

    def expect(self) -> None:
        """The step that is about to be computed may begin before all of its layers are here, or at another rank: every rank
        computes it in the same way."""
        self._steps += 1
        self._cache.awaited = self.need
        if self._mesh.place.rank == 0:  # which is at most so many steps ahead of the others
            self._mesh.forget(f"late {self._steps - self._mesh.place.pp - 1}")

    def begin(self, ticket: int, rows: Tensor, places: Sequence[tuple[int, int]]) -> None:
        """It begins with these blocks, of which layers are still to come."""
        self._landings.append(Landing(ticket, rows, places))

    @property
    def tickets(self) -> set[int]:
        """Those that aren't settled."""
        return {landing.ticket for landing in self._landings}

    def need(self, layer: int) -> None:
        """Wait for this layer of all blocks, and put it into the cache."""
        groups = len(self._cache.layout.groups)
        for landing in self._landings:
            if landing.spoiled or layer in landing.done:
                continue
            landing.spoiled = not self._comes(landing.ticket, layer)
            own = [(row, block) for row, block in landing.places if row % groups == self._cache.group_of[layer]]
            if own and not landing.spoiled:
                rows, blocks = zip(*own, strict=True)
                self._cache.put_layer(layer, blocks, landing.rows, rows)
            landing.done.add(layer)

    def _comes(self, ticket: int, layer: int) -> bool:
        """In what all ranks' waiting has left of this step's time. What several waited at once counts once."""
        if self._puller.wait(ticket, layer, 0.0):
            return True
        name, began = f"late {self._steps}", time.monotonic()
        before = self._mesh.tally(name)
        came = self._puller.wait(ticket, layer, max(0.0, LATE_S - before / 1e6))
        waited = before + int(1e6 * (time.monotonic() - began))
        self._mesh.tally(name, max(0, waited - self._mesh.tally(name)))
        return came

    def settle(self) -> list[int]:
        """The step is computed: the tickets of what didn't come here."""
        if self._cache.awaited is None:
            return []
        for layer in self._layers:
            self.need(layer)
        found, self._landings, self._cache.awaited = self._landings, [], None
        for landing in found:
            self._puller.end(landing.ticket)
        return [landing.ticket for landing in found if landing.spoiled]
