"""Arrivals: a step that computes on the first layers of blocks while the others still come from another group.

Before a layer is read it is waited for, a bounded time for all layers of a step together. Of what didn't come in time, or came
wrongly, the step's result means nothing: it says so, and the scheduler computes it again. Each rank of several waits for its own
layers and heads alone; what one of them lacked is computed again by all.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

from kvasir.engine.cache import KVCache
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

    def __init__(self, cache: KVCache, puller: Puller, layers: Sequence[int]) -> None:
        self._cache, self._puller, self._layers = cache, puller, layers
        self._landings: list[Landing] = []
        self._left_s = 0.0

    def expect(self) -> None:
        """The step that is about to be computed may begin before all of its layers are here, or at another rank: every rank
        computes it in the same way."""
        self._left_s = LATE_S
        self._cache.awaited = self.need

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
            began = time.monotonic()
            landing.spoiled = not self._puller.wait(landing.ticket, layer, self._left_s)
            self._left_s = max(0.0, self._left_s - (time.monotonic() - began))
            own = [(row, block) for row, block in landing.places if row % groups == self._cache.group_of[layer]]
            if own and not landing.spoiled:
                rows, blocks = zip(*own, strict=True)
                self._cache.put_layer(layer, blocks, landing.rows, rows)
            landing.done.add(layer)

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
