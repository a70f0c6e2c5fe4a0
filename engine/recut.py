"""Recut: the same keys and values, cut by ranks, layers and tokens in one group as they aren't in another.

Every rank of a group keeps some heads of some layers, in blocks of so many tokens. What one group holds, another with
other ranks or other blocks can take.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from torch import Tensor

from kvasir.engine.parts import Form, Part


@dataclass(frozen=True)
class Filling:
    """Rows that a fetch fills: row (i - first) * groups + g is what this rank keeps of its block i for group g."""

    rows: Tensor
    """[blocks * groups, block bytes] uint8"""
    form: Form
    first: int
    starts: tuple[int, ...]
    """The first block of each group that is wanted."""
    spans: dict[tuple[tuple[int, ...], int, Part, int], slice | None] = field(default_factory=dict)
    """Where pieces lie in a row, of those that were asked for."""

    def row(self, block: int, group: int) -> Tensor | None:
        """None: it isn't wanted."""
        number = (block - self.first) * len(self.form.groups) + group
        wanted = self.starts[group] <= block and 0 <= number < len(self.rows)
        return self.rows[number] if wanted else None

    def whole(self, theirs: Form, part: Part, block: int, group: int) -> Tensor | None:
        """What such a piece is of a row, byte by byte; None: it has to be cut."""
        key = theirs.places[group], theirs.block_size, part, group
        if key not in self.spans:
            self.spans[key] = self._span(*key)
        span = self.spans[key]
        row = self.row(block, group) if span is not None else None
        return None if row is None or span is None else row[span]

    def _span(self, theirs: tuple[int, ...], block_size: int, part: Part, group: int) -> slice | None:
        mine = self.form
        alike = block_size == mine.block_size and part.heads == mine.part.heads
        layers = tuple(layer for layer in theirs if layer in part.layers)
        if not alike or group >= len(mine.groups) or not layers or layers[0] not in mine.places[group]:
            return None
        first, size = mine.places[group].index(layers[0]), mine.block_bytes // mine.height
        same = mine.places[group][first : first + len(layers)] == layers
        return slice(first * size, (first + len(layers)) * size) if same else None

    def put(self, theirs: Form, part: Part, block: int, group: int, piece: Tensor) -> None:
        """piece[layers, kinds, heads, head bytes] of their block."""
        mine = self.form
        layers = [layer for layer in theirs.places[group] if layer in part.layers]
        heads = slice(part.heads.start - mine.part.heads.start, part.heads.stop - mine.part.heads.start)
        for own in range(len(mine.groups)):
            pairs = [(mine.places[own].index(layer), n) for n, layer in enumerate(layers) if layer in mine.places[own]]
            for number, here, there in _overlaps(block, theirs.block_size, mine.block_size) if pairs else ():
                row = self.row(number, own)
                if row is not None:
                    to, of = (list(side) for side in zip(*pairs, strict=True))
                    cut = zip(mine.slots(mine.view(row)[:, :, heads]), theirs.slots(piece), strict=True)
                    for target, source in cut:
                        target[:, :, :, here][to] = source[of][:, :, :, there]


def _overlaps(block: int, theirs: int, mine: int) -> Iterator[tuple[int, slice, slice]]:
    """(our block, its slots, the slots of their `block` that are the same tokens)"""
    start, stop = block * theirs, (block + 1) * theirs
    for number in range(start // mine, -(-stop // mine)):
        low, high = max(start, number * mine), min(stop, (number + 1) * mine)
        yield number, slice(low - number * mine, high - number * mine), slice(low - start, high - start)
