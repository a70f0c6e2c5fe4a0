"""Parts: which keys and values a rank keeps, how its blocks lie in memory, and who reads what of whom. No torch.

A piece is what a rank holds of one block for one layer group, or what a reader wants of that.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import combinations
from typing import TYPE_CHECKING

from kvasir.engine.blocks import ID_BYTES, ContentId

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Part:
    """What a rank keeps of a model's keys and values, or what of that is meant."""

    layers: range
    heads: range

    def within(self, other: Part) -> Part:
        """What both have."""
        return Part(_both(self.layers, other.layers), _both(self.heads, other.heads))

    def __bool__(self) -> bool:
        return bool(self.layers) and bool(self.heads)


@dataclass(frozen=True)
class Form:
    """How a rank's block lies in memory: [height, kinds, heads, head bytes], of which each group uses some layers; P slots of a
    head, and in 8 bits their scales behind them."""

    part: Part
    groups: tuple[tuple[int, ...], ...]
    """Layers of each layer group, in all ranks."""
    height: int
    kinds: int
    """2: keys and values; 1: the keys serve as both."""
    block_size: int
    slot_bytes: int
    scale_bytes: int = 0
    """Of a slot's scale, if it has one."""

    @property
    def head_bytes(self) -> int:
        slots = self.block_size * self.slot_bytes
        return slots if not self.scale_bytes else -(-slots // 4) * 4 + self.block_size * self.scale_bytes

    @property
    def block_bytes(self) -> int:
        return self.height * self.kinds * len(self.part.heads) * self.head_bytes

    def is_like(self, other: Form) -> bool:
        """Slots are the same in both."""
        return (self.kinds, self.slot_bytes, self.scale_bytes) == (other.kinds, other.slot_bytes, other.scale_bytes)

    @cached_property
    def places(self) -> tuple[tuple[int, ...], ...]:
        """The group's layers that are here, in the order of their places."""
        return tuple(tuple(layer for layer in group if layer in self.part.layers) for group in self.groups)

    def of_layers(self, first: int, stop: int) -> Form:
        """The same of these places alone: what a group lies in that keeps no other layers."""
        groups = tuple(layers[first:stop] for layers in self.places)
        return replace(self, groups=groups, height=stop - first)

    def view(self, row: Tensor) -> Tensor:
        """row[block_bytes] by its dimensions."""
        return row.view(self.height, self.kinds, len(self.part.heads), self.head_bytes)

    def piece_shape(self, group: int, part: Part) -> tuple[int, ...]:
        """[layers, kinds, heads, head bytes] of what `part` names in a block of this group."""
        layers = sum(layer in part.layers for layer in self.places[group])
        return layers, self.kinds, len(part.heads), self.head_bytes

    def slots(self, heads: Tensor) -> list[Tensor]:
        """heads[..., head bytes] by slots: [..., P, slot bytes], and of their scales [..., P, scale bytes]."""
        size, count = self.block_size * self.slot_bytes, self.block_size
        shape = *heads.shape[:-1], count
        found = [heads[..., :size].view(*shape, self.slot_bytes)]
        if self.scale_bytes:
            found.append(heads[..., -count * self.scale_bytes :].view(*shape, self.scale_bytes))
        return found

    def piece(self, row: Tensor, group: int, part: Part) -> list[Tensor]:
        """The same in `row`, in pieces that lie together; all of it is one."""
        block, heads = self.view(row), self.part.heads
        inner = slice(part.heads.start - heads.start, part.heads.stop - heads.start)
        places = [place for place, layer in enumerate(self.places[group]) if layer in part.layers]
        if part.heads == heads:
            return [row] if len(places) == self.height else [block[place].view(-1) for place in places]
        return [block[place, kind, inner].view(-1) for place in places for kind in range(self.kinds)]


def sources(mine: Part, number: int, theirs: Sequence[Part]) -> list[tuple[int, Part]]:
    """(their rank, what to read there) for reader `number`, who keeps `mine`. Where several have the same, readers are
    dealt out among them. ValueError when they don't have all of it."""
    same: dict[tuple[range, range], list[int]] = {}
    for rank, part in enumerate(theirs):
        same.setdefault((part.layers, part.heads), []).append(rank)
    found = [
        (ranks[number % len(ranks)], common) for ranks in same.values() if (common := theirs[ranks[0]].within(mine))
    ]
    total = sum(len(part.layers) * len(part.heads) for _, part in found)
    twice = any(one.within(other) for (_, one), (_, other) in combinations(found, 2))
    if total != len(mine.layers) * len(mine.heads) or twice:
        raise ValueError("the peer's ranks don't hold this rank's layers and heads, each once")
    return found


def readers(own: Sequence[Part], theirs: Sequence[Part]) -> list[int]:
    """How many of `theirs` will read of each of our ranks."""
    counts = [0] * len(own)
    for number, part in enumerate(theirs):
        for rank, _ in sources(part, number, own):
            counts[rank] += 1
    return counts


def items(firsts: Sequence[int], stop: int) -> list[tuple[int, int]]:
    """(block, group) of what is lent, in order: each group's blocks from its first one on."""
    return [(i, g) for i in range(min(firsts), stop) for g, first in enumerate(firsts) if i >= first]


def group_of(content: ContentId) -> int:
    """The layer group that a block's name belongs to."""
    return content[ID_BYTES] if len(content) > ID_BYTES else 0


def _both(one: range, other: range) -> range:
    start = max(one.start, other.start)
    return range(start, max(start, min(one.stop, other.stop)))
