"""Lends: which blocks other groups get, and when they are copied aside for them. The scheduler's side.

What is lent is held by reference count until it is copied aside, a portion with each step, so no step waits for a peer;
and when our own sequences lack blocks, lending ends.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

from kvasir.engine.blocks import ContentId
from kvasir.engine.parts import Form, items, readers
from kvasir.engine.peer_wire import Ask, Offer, RefusedError
from kvasir.engine.sequence import GONE
from kvasir.engine.step import Lent
from kvasir.engine.tables import Tables

MOST_LENDS = 8
"""At once; who asks for one more is told no."""
PORTION_BYTES = 32 << 20
"""Copied aside by one step, in each rank: 10 ms of a CPU."""
MOST_BYTES = 512 << 20
"""Of one lend, in each rank."""
LEAST_SLAB = 1 << 20
"""Bytes of some layers of all blocks that are worth sending before the others."""
LEAST_PIECE = 64 << 10
"""Bytes of a block that are worth a message of their own."""
LAYERED = ("tcp", "shm")
"""Ways by which blocks go in slabs of layers."""
LENT_SHARE = 0.25
"""Of the cache's blocks, at most, are held for others."""


class LendIndex(Protocol):
    """What rank 0 knows of its own lends; the other ranks' get on about as fast."""

    @property
    def room(self) -> int:
        """Bytes that may be copied aside now."""

    def open(self, lend: int, readers: int, way: str) -> None: ...
    def is_live(self, lend: int) -> bool: ...
    def end(self, lend: int) -> None: ...


@dataclass(frozen=True)
class Terms:
    """What is told to who asks."""

    mark: bytes
    forms: Sequence[Form]
    addresses: Sequence[str]
    node: str
    ways: Sequence[str]
    """The fastest first."""


@dataclass(slots=True)
class Lend:
    """Blocks on their way to one group: (block or GONE, content), each as often as there are slabs of layers; those from
    `next` on aren't copied yet."""

    way: str
    readers: list[int]
    places: list[tuple[int, ContentId]]
    slabs: Sequence[tuple[int, int]]
    next: int = 0

    @property
    def over(self) -> bool:
        """All is copied."""
        return self.next == len(self.places) * len(self.slabs)

    @property
    def held(self) -> list[tuple[int, ContentId]]:
        """What it still needs: blocks are, until their last slab is copied."""
        return self.places[max(0, self.next - len(self.places) * (len(self.slabs) - 1)) :]


class Lends:
    """Not thread-safe, like the scheduler. below(content): a tier holds the block."""

    def __init__(self, tables: Tables, below: Callable[[ContentId], bool]) -> None:
        self._tables, self._pool, self._below = tables, tables.pool, below
        self._terms: Terms | None = None
        self._index: LendIndex | None = None
        self._open: dict[int, Lend] = {}
        self._offers: dict[str, Offer] = {}
        self.closing = False

    def begin(self, terms: Terms, index: LendIndex) -> None:
        """From now on blocks are lent."""
        self._terms, self._index = terms, index

    @property
    def active(self) -> bool:
        """Something is to be copied aside, perhaps when there is room again."""
        return bool(self._open)

    def lend(self, ask: Ask, ids: Sequence[ContentId]) -> Offer:
        """What of `ask` is held here, from its first token on. ids: of the prompt's blocks, by our block size. RefusedError."""
        terms, index = self._terms, self._index
        if terms is None or index is None or self.closing:
            raise RefusedError("it doesn't lend blocks now")
        if ask.mark != terms.mark:
            raise RefusedError("it serves another model, in another type, or by another version")
        self._offers = {fetch: offer for fetch, offer in self._offers.items() if index.is_live(offer.lend)}
        if (known := self._offers.get(ask.fetch)) is not None:
            return known
        if len(self._offers) >= MOST_LENDS:
            raise RefusedError("busy: it lends to others")
        form = terms.forms[0]
        try:
            wanted = readers([each.part for each in terms.forms], ask.readers)
        except ValueError as error:
            raise RefusedError(str(error)) from error
        alike = bool(terms.node) and ask.node == terms.node
        way = next((way for way in terms.ways if way in ask.ways and (alike or way != "shm")), None)
        if way is None:
            raise RefusedError(f"it sends by {', '.join(terms.ways)} (--kv-transfer)")
        firsts, stop, end = self._cover(ask, ids, form)
        places = [self._place(ids[i], group) for i, group in items(firsts, stop)]
        slabs = _slabs(form, places, ask.slabs if way in LAYERED else 1)
        number = secrets.randbits(62)
        offer = Offer(number, end, firsts, stop, tuple(terms.forms), tuple(terms.addresses), way, slabs)
        self._offers[ask.fetch] = offer
        self._open[number] = Lend(way, wanted, places, slabs)
        self._pool.hold(block for block, _ in places if block != GONE)
        index.open(number, wanted[0], way)
        return offer

    def moves(self) -> list[Lent]:
        """What the next step copies aside."""
        if not self._open or self._index is None or self._terms is None:
            return []
        found: list[Lent] = []
        form = self._terms.forms[0]
        room = min(max(PORTION_BYTES, form.block_bytes), self._index.room)
        for number, lend in [*self._open.items()]:
            if not self._index.is_live(number):
                self._close(number)
                continue
            while not lend.over and (lent := self._portion(number, lend, room)) is not None:
                found.append(lent)
                room -= len(lent.places) * form.of_layers(*lent.layers).block_bytes
            if lend.over:
                del self._open[number]
        return found

    def _portion(self, number: int, lend: Lend, room: int) -> Lent | None:
        """The next one, of one slab and at most `room` bytes; None: not even one item."""
        assert self._terms is not None
        slab, at = divmod(lend.next, len(lend.places))
        layers = lend.slabs[slab]
        part = lend.places[at : at + room // self._terms.forms[0].of_layers(*layers).block_bytes]
        if not part:
            return None
        first, lend.next = lend.next, lend.next + len(part)
        if slab == len(lend.slabs) - 1:
            self._free(part)
        return Lent(number, tuple(lend.readers), lend.way, first, part, layers)

    def give_up(self) -> bool:
        """Our own sequences want blocks: False when none is held for others."""
        held = [number for number, lend in self._open.items() if not lend.over]
        for number in held:
            self._close(number)
        return bool(held)

    def _close(self, number: int) -> None:
        lend = self._open.pop(number)
        self._free(lend.held)
        if self._index is not None:
            self._index.end(number)

    def _free(self, places: Sequence[tuple[int, ContentId]]) -> None:
        self._pool.free([block for block, _ in places if block != GONE])

    def _place(self, content: ContentId, group: int) -> tuple[int, ContentId]:
        key = self._tables.name(content, group)
        return next(iter(self._pool.match([key])), GONE), key

    def _cover(self, ask: Ask, ids: Sequence[ContentId], form: Form) -> tuple[tuple[int, ...], int, int]:
        """(first block of each of our groups, the block behind the last one, tokens): the longest part of what is asked of
        which we have all that the asker's rows behind it see."""
        size, held = self._tables.pool.block_size, sum(len(lend.held) for lend in self._open.values())
        spare = int(self._pool.num_blocks * LENT_SHARE) - held
        most = min(MOST_BYTES // form.block_bytes, spare) // len(form.groups) * size
        end = min(ask.end, len(ids) * size, ask.first + most) // ask.block_size * ask.block_size
        while end > ask.first:
            firsts = ask.firsts(end, form.groups, size)
            stop = -(-end // size)
            lacking = next((i for i, group in items(firsts, stop) if not self._known(ids[i], group)), None)
            if lacking is None:
                return firsts, stop, end
            end = lacking * size // ask.block_size * ask.block_size
        raise RefusedError("it has no more of the prompt")

    def _known(self, content: ContentId, group: int) -> bool:
        key = self._tables.name(content, group)
        return self._pool.knows(key) or self._below(key)


def _slabs(form: Form, places: Sequence[tuple[int, ContentId]], most: int) -> tuple[tuple[int, int], ...]:
    """Even slabs, at most `most`. What a lower tier holds is read as a whole."""
    count = min(most, form.height, len(places) * form.block_bytes // LEAST_SLAB, form.block_bytes // LEAST_PIECE)
    if count < 2 or any(block == GONE for block, _ in places):
        count = 1
    edges = [form.height * n // count for n in range(count + 1)]
    return tuple(pairwise(edges))
