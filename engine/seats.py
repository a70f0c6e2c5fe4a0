"""Seats: who has a place in the ranks' batch state and blocks, who waits for one, and what the ranks must hear of it."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable
from collections.abc import Sequence as Seq

from kvasir.engine.blocks import BlockPool
from kvasir.engine.lends import Lends
from kvasir.engine.loads import Loads
from kvasir.engine.sequence import Order, Sequence
from kvasir.engine.step import NewSequence
from kvasir.engine.tables import Grown, Tables, all_blocks

Changes = tuple[list[int], list[NewSequence], list[tuple[int, int, Seq[int]]], list[tuple[int, int]]]
"""A step's `freed`, `new`, `blocks` and `copies`."""


class Seats:
    """Both lists are sorted by order: the most important comes first. Not thread-safe, like the scheduler."""

    def __init__(self, pool: BlockPool, tables: Tables, loads: Loads, lends: Lends, max_num_seqs: int) -> None:
        self.pool, self.tables, self._loads, self.lends = pool, tables, loads, lends
        self.waiting: list[tuple[Order, Sequence]] = []
        self.running: list[tuple[Order, Sequence]] = []
        self.free = list(range(max_num_seqs - 1, -1, -1))
        self.preemptions = 0
        self.stalled: Order | None = None
        """Who lacks blocks that it gets once a result is known: nobody less important goes ahead of it in this step."""
        self._freed: list[int] = []
        self._new: list[NewSequence] = []
        self._grown: list[tuple[int, int, Seq[int]]] = []
        self._copies: list[tuple[int, int]] = []

    def queue(self, sequence: Sequence) -> None:
        """It waits."""
        insort(self.waiting, (sequence.order, sequence))

    def copy(self, pairs: Iterable[tuple[int, int]]) -> None:
        """Blocks (source, target) that the next step copies."""
        self._copies += pairs

    @property
    def left(self) -> bool:
        """Some sequence gave up its seat, and the ranks don't know it."""
        return bool(self._freed)

    def changes(self) -> Changes:
        """What the ranks haven't been told yet; they are now."""
        found = self._freed, self._new, self._grown, self._copies
        self._freed, self._new, self._grown, self._copies = [], [], [], []
        return found

    def seat(self, sequence: Sequence, grown: Grown) -> None:
        """The ranks learn of the sequence with the next step."""
        seat = sequence.seat = self.free.pop()
        request = sequence.request
        if sequence.prompt_scores is not None:
            sequence.prompt_scores = [None] * (sequence.computed + 1)
        stops = tuple(sequence.stop_token_ids)
        self._new.append(
            NewSequence(
                seat,
                list(sequence.tokens),
                sequence.prompt_len,
                request.sampling,
                sequence.seed,
                stops,
                request.adapter,
                request.pooling,
                request.token_type_ids,
                sequence.stretched,
            )
        )
        self._grown += ((seat, group, blocks) for group, blocks in grown)
        insort(self.running, (sequence.order, sequence))

    def grow(self, sequence: Sequence, tokens: int, step: int) -> bool:
        """Slots for its first `tokens` tokens; when free blocks are too few, the least important sequence that `step`, which
        is being planned, doesn't compute gives up its own, at last this one itself. False: it has none, or has to wait for
        a result."""
        if sequence.seat is None or (self.stalled is not None and self.stalled < sequence.order):
            return False
        lacking = self.tables.lacking(sequence, tokens)
        while lacking > self.pool.num_free:
            if self.lends.give_up():
                continue
            victim = next(other for _, other in reversed(self.running) if other.step < step)
            if victim.flying:
                self.stalled = sequence.order
                return False
            self.preempt(victim)
            if victim is sequence:
                return False
        if lacking:
            self._grown += ((sequence.seat, group, blocks) for group, blocks in self.tables.grow(sequence, tokens))
        return True

    def preempt(self, sequence: Sequence) -> None:
        """Back to waiting, with its output: it will be recomputed, or found in the cache."""
        self.again(sequence)
        sequence.preemptions += 1
        self.preemptions += 1

    def again(self, sequence: Sequence) -> None:
        """Back to waiting: all of it is to be computed once more."""
        self.leave(sequence)
        sequence.computed, sequence.expected, sequence.sought = 0, 0, -2
        if sequence.prompt_scores is not None:
            sequence.prompt_scores = [None]
        if sequence.offers is None:
            self.queue(sequence)

    def leave(self, sequence: Sequence) -> None:
        """Give back seat and blocks, and withdraw what the ranks haven't been told yet."""
        seat = sequence.seat
        assert seat is not None
        assert not sequence.flying, "it is being computed"
        if sequence.ended:
            self._loads.note_use(sequence)
        known = len(self._new)
        self._new = [new for new in self._new if new.seat != seat]
        if len(self._new) == known:
            self._freed.append(seat)
        self._grown = [grown for grown in self._grown if grown[0] != seat]
        if self._copies:
            own = all_blocks(sequence)
            self._copies = [pair for pair in self._copies if pair[1] not in own]
        self.free.append(seat)
        sequence.seat = None
        self.tables.release(sequence)
        remove(self.running, sequence)


def remove(entries: list[tuple[Order, Sequence]], sequence: Sequence) -> None:
    """Out of a list that is sorted by order."""
    place = bisect_left(entries, (sequence.order,))
    assert entries[place][1] is sequence
    del entries[place]
