"""Which layers share a block: layers that see equally far form groups of equal size, each with a block table of its own.

One pool of equal blocks serves all groups, so what one sequence's sliding layers give back another's full layers can
take: the idea of vLLM's hybrid cache manager. A block holds P slots in as many layers as a group has.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from kvasir.engine.spec import Spec

TABLE_COST = 0.02
"""A further table costs each step's bookkeeping about what this share of the cache is worth."""


@dataclass(frozen=True)
class LayerGroup:
    """Layers whose keys and values lie in the same blocks."""

    layers: tuple[int, ...]
    window: int | None = None
    chunk: int | None = None

    def first_seen(self, position: int) -> int:
        """The first position that a row at `position` sees in these layers."""
        near = 0 if self.window is None else max(0, position - self.window + 1)
        return near if self.chunk is None else max(near, position // self.chunk * self.chunk)

    @property
    def reach(self) -> int | None:
        """Most positions that a row sees; None: all."""
        return self.window or self.chunk


@dataclass(frozen=True)
class Layout:
    """The groups of a model. A block has room for `height` layers of each stage."""

    groups: tuple[LayerGroup, ...]
    height: int

    def peak(self, tokens: int, block_size: int, budget: int) -> int:
        """Most blocks that a sequence of so many tokens holds at once, when a step computes at most `budget` of them."""
        whole = -(-tokens // block_size)
        return sum(min(whole, self._held(group, block_size, budget)) for group in self.groups)

    @staticmethod
    def _held(group: LayerGroup, block_size: int, budget: int) -> int:
        # what the step's first row and the row before it see, and the step's own rows; both ends may be inside a block
        return 1 << 62 if group.reach is None else -(-(group.reach + budget) // block_size) + 1


@dataclass(frozen=True)
class Room:
    """What sequences take of the cache."""

    layout: Layout
    block_size: int
    budget: int
    """Rows of a step."""

    def blocks(self, tokens: int) -> int:
        """Most blocks that a sequence of so many tokens holds at once."""
        return self.layout.peak(tokens, self.block_size, self.budget)

    def longest(self, blocks: int, limit: int) -> int:
        """Most tokens, up to `limit`, of a sequence that has so many blocks for itself."""
        low, high = 0, -(-limit // self.block_size)
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if self.blocks(middle * self.block_size) <= blocks else (low, middle - 1)
        return min(limit, low * self.block_size)


def layout(spec: Spec, max_len: int, stages: Sequence[range] = ()) -> Layout:
    """The groups of a model that is served up to `max_len` tokens; a window that long is none. Each group has about as
    many layers in every stage, so that no stage's part of a block lies empty."""
    kinds: dict[tuple[int | None, int | None], list[int]] = {}
    for number, layer in enumerate(spec.layers):
        near = [
            None if size is None or size >= max_len or not spec.causal else size for size in (layer.window, layer.chunk)
        ]
        kinds.setdefault((near[0], near[1]), []).append(number)
    parts = stages or [range(len(spec.layers))]
    staged = {kind: [[n for n in layers if n in part] for part in parts] for kind, layers in kinds.items()}
    height = _height([max(map(len, by_stage)) for by_stage in staged.values()])
    groups = [
        LayerGroup(part, window, chunk)
        for (window, chunk), by_stage in sorted(staged.items(), key=lambda kind: kind[0] != (None, None))
        for part in _parts(by_stage, height)
    ]
    return Layout(tuple(groups), height)


def _height(counts: Sequence[int]) -> int:
    """Layers per block that waste least: places that stay empty, and tables."""

    def waste(height: int) -> float:
        tables = sum(-(-count // height) for count in counts)
        return (tables * height - sum(counts)) / sum(counts) + TABLE_COST * tables

    return min(range(max(counts), 0, -1), key=waste)


def _parts(by_stage: Sequence[Sequence[int]], height: int) -> list[tuple[int, ...]]:
    """As few parts of at most `height` layers of each stage as there can be, of nearly equal length."""
    count = max(-(-len(layers) // height) for layers in by_stage)
    runs = [[len(layers) * i // count for i in range(count + 1)] for layers in by_stage]
    cut = [[layers[a:b] for a, b in pairwise(run)] for layers, run in zip(by_stage, runs, strict=True)]
    return [tuple(layer for stage in cut for layer in stage[i]) for i in range(count)]
