"""Loads: what waiting sequences get from the tiers below the cache, and what these tiers get from it. The scheduler's side.

Blocks that come become cached blocks like any other, found by the sequence that waited and by all others. Nothing depends
on their coming: what doesn't is computed.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from typing import Protocol

from kvasir.engine.blocks import ContentId
from kvasir.engine.pulls import GRACE_S, Pulls
from kvasir.engine.sequence import GONE, Sequence
from kvasir.engine.step import Lent, Moves, Pull
from kvasir.engine.tables import Tables

FETCH_S = 10.0
"""A sequence waits no longer for its blocks. While a fetch is overdue nothing is asked of the tiers but what is in memory."""
TRIES = 2
"""So often the tiers are asked for a sequence that gets no further, because others take its cached blocks meanwhile."""


class TierIndex(Protocol):
    """What rank 0 knows of its own tiers; the other ranks' hold about the same."""

    @property
    def most_fetched(self) -> int:
        """Blocks that one fetch may bring."""

    def knows(self, content: ContentId) -> bool: ...
    def has_at_hand(self, content: ContentId) -> bool: ...
    def forget(self, contents: Iterable[ContentId]) -> None: ...


@dataclass(slots=True)
class Fetch:
    """Blocks that the ranks are reading for a sequence."""

    sequence: Sequence
    contents: list[ContentId]
    deadline: float
    come: list[int] = field(default_factory=list)
    """How many each rank has, of those that have answered; of a pull, up to which block of the prompt."""
    pull: Pull | None = None
    """Set: they come from another group."""
    coming: bool = False
    """Its sequence begins before all is here."""
    began: float = field(default_factory=time.monotonic)
    expected_s: float = 0.0
    """What a pull and the step behind it are expected to take; 0: that isn't known."""


class Loads:
    """Without tiers every question has the neutral answer. Not thread-safe, like the scheduler."""

    def __init__(self, tables: Tables, tiers: TierIndex | None, ranks: int) -> None:
        self._tables, self._pool, self._tiers, self._ranks = tables, tables.pool, tiers, ranks
        if tiers is not None:
            tables.fresh = []
        self.loading: dict[int, Sequence] = {}
        """ticket -> sequence whose blocks are on their way; any thread may ask how many."""
        self._fetches: dict[int, Fetch] = {}
        self._tickets = itertools.count(1)
        self._overdue: set[int] = set()
        self._saves: list[tuple[int, ContentId]] = []
        self._loads: list[tuple[int, int, int]] = []
        self._ended: list[int] = []
        self._asked: list[tuple[int, list[ContentId]]] = []
        self._used: list[tuple[int, list[ContentId]]] = []
        self._pulls: list[Pull] = []
        self._pulled: list[tuple[int, ContentId]] = []
        self._late: list[tuple[int, ContentId]] = []
        self._begun: dict[int, Fetch] = {}
        """ticket -> fetch from a peer with which a step begins that isn't over."""
        self._landing: dict[int, tuple[Pull, list[int]]] = {}
        """ticket -> (fetch, blocks) of which a step that isn't over computes on the first layers."""
        self.peers: Pulls | None = None
        """Set when blocks are fetched from other groups, too."""

    def seek(self, sequence: Sequence, most: int, now: float) -> bool:
        """Whether it has to wait because the tiers, or else a peer, have more of its prefix, of at most `most` blocks, than
        the cache."""
        if sequence.ticket is not None:
            return False
        return self._seek_below(sequence, most, now) or self._seek_peer(sequence, most, now)

    def _seek_peer(self, sequence: Sequence, most: int, now: float) -> bool:
        if self.peers is None or sequence.peers_asked == len(sequence.request.peers):
            return False
        have = self._tables.reach(sequence, most, self._pool.knows)
        pull = self.peers.choose(next(self._tickets), sequence, have, most)
        if pull is None:
            return False
        sequence.sought, sequence.ticket = max(sequence.sought, have), pull.ticket
        expected_s = self.peers.expected_s(pull, sequence)
        self._fetches[pull.ticket] = Fetch(sequence, [], now + pull.limit_s + GRACE_S, pull=pull, expected_s=expected_s)
        self.loading[pull.ticket] = sequence
        self._pulls.append(pull)
        return True

    def _seek_below(self, sequence: Sequence, most: int, now: float) -> bool:
        tiers, tables = self._tiers, self._tables
        if tiers is None:
            return False
        have = tables.reach(sequence, most, self._pool.knows)
        further = have > sequence.sought
        if not further and sequence.tries == TRIES:
            return False
        want = tables.reach(sequence, min(most, have + self._most_numbers(tiers)), self._known)
        if want <= have:
            sequence.sought = max(sequence.sought, -1)
            return False
        sequence.sought = max(sequence.sought, have)
        sequence.tries = 1 if further else sequence.tries + 1
        lacking = [content for content in tables.keys(sequence, want) if not self._pool.knows(content)]
        ticket = sequence.ticket = next(self._tickets)
        self._fetches[ticket] = Fetch(sequence, lacking, now + FETCH_S)
        self.loading[ticket] = sequence
        self._asked.append((ticket, lacking))
        return True

    def fetched(self, ticket: int, count: int) -> Sequence | None:
        """A rank has so many of what was asked; the sequence, when it was the last rank. -ticket: it will have them in time."""
        fetch = self._fetches.get(abs(ticket))
        if fetch is None:
            self._overdue.discard(ticket)
            return None
        fetch.come.append(count)
        fetch.coming |= ticket < 0
        ticket = abs(ticket)
        if len(fetch.come) < self._ranks:
            return None
        if fetch.pull is not None and self.peers is not None:
            fetch.come = [self.peers.came(fetch.pull, fetch.come)]
        elif min(fetch.come) < len(fetch.contents) and self._tiers is not None:
            self._tiers.forget(fetch.contents[min(fetch.come) :])  # they will be computed, and written by all ranks
        return self.loading.pop(ticket)

    def overdue(self, now: float) -> list[Sequence]:
        """Those that have waited too long."""
        late = [ticket for ticket in self.loading if self._fetches[ticket].deadline <= now]
        for ticket in late:
            pull = self._fetches[ticket].pull
            if pull is None:
                self._overdue.add(ticket)
            elif self.peers is not None:
                self.peers.late(pull)
        return [self._end(self.loading[ticket]).sequence for ticket in late]

    def land(self, sequence: Sequence) -> bool:
        """What came for it goes into free blocks, where it is found like what was computed. False: nothing was asked."""
        if sequence.ticket is None:
            return False
        ticket, fetch = sequence.ticket, self._end(sequence)
        held: list[int] = []
        landed: list[int] = []
        cached = self._tables.keys(sequence, sequence.sought)  # must not make room for what follows it
        for content in cached:
            self._hold(self._pool.match([content]), held)
        for number, content in self._come(sequence, fetch):
            if self._pool.knows(content):
                self._hold(self._pool.match([content]), held)
            elif self._pool.num_free:
                held += self._pool.take(1)
                self._pool.commit(held[-1], content)
                self._loads.append((ticket, number, held[-1]))
                landed.append(held[-1])
                if fetch.pull is not None:
                    self._pulled.append((held[-1], content))
        self._pool.free(held)
        if fetch.pull is not None and landed:
            self._begun[ticket] = fetch
            if fetch.coming:
                self._landing[ticket] = fetch.pull, landed
        return True

    @property
    def landing(self) -> bool:
        """A step computes on blocks that may turn out not to be there: none that follows may be planned."""
        return bool(self._landing)

    def landed(self, moves: Moves | None, spoiled: Collection[int]) -> set[int]:
        """A step is over: the blocks whose layers didn't all come. They are found no more, and lent to nobody."""
        begun = {ticket for ticket, _, _ in moves.loads} if moves is not None and self._begun else set()
        landing = {ticket: self._landing.pop(ticket) for ticket in begun & self._landing.keys()}
        for ticket in begun & self._begun.keys():
            self._note_time(self._begun.pop(ticket), ticket in spoiled)
        wrong: set[int] = set()
        for ticket in spoiled:
            pull, blocks = landing[ticket]
            self._pool.withdraw(blocks)
            self._ended_badly(pull, len(blocks))
            wrong |= {*blocks}
        return wrong

    def _note_time(self, fetch: Fetch, spoiled: bool) -> None:
        pull, size = fetch.pull, self._pool.block_size
        whole = pull is not None and fetch.come[0] * size >= pull.end and not spoiled
        if pull is not None and self.peers is not None and whole and fetch.expected_s:
            self.peers.stepped(pull, fetch.expected_s, time.monotonic() - fetch.began)

    def _ended_badly(self, pull: Pull, blocks: int) -> None:
        if self.peers is not None:
            self.peers.late(pull)
            self.peers.loaded -= blocks
            self.peers.failed += blocks

    def _come(self, sequence: Sequence, fetch: Fetch) -> list[tuple[int, ContentId]]:
        """(number, content) of what came."""
        if fetch.pull is None or self.peers is None:
            return [*enumerate(fetch.contents[: min(fetch.come)])]
        first, end = (tokens // self._pool.block_size for tokens in (fetch.pull.first, fetch.pull.end))
        found = self._tables.numbered(sequence, first, fetch.come[0])
        self.peers.loaded += len(found)
        self.peers.failed += len(self._tables.numbered(sequence, first, end)) - len(found) if fetch.come[0] < end else 0
        return found

    def cancel(self, sequence: Sequence) -> bool:
        """It ended without a seat. True: its blocks were on their way."""
        loading = sequence.ticket in self.loading
        if sequence.ticket is not None:
            self._end(sequence)
        return loading

    def note_use(self, sequence: Sequence) -> None:
        """It ended: what it used stays longest in the tiers, and what they lost of that is written again."""
        if self._tiers is None or not self._pool.prefix_caching:
            return
        filled = self._tables.filled(sequence)
        again = sequence.cached // self._pool.block_size * len(sequence.blocks)
        self._saves += (place for place in filled[:again] if place[0] != GONE)
        if filled:
            self._used.append((min(again, len(filled)), [content for _, content in reversed(filled)]))

    def moves(self, lends: list[Lent]) -> Moves | None:
        """What the next step does with the tiers and with other groups; `lends` is what these get."""
        lists = self._saved(), self._loads, self._ended, self._asked, self._used, lends, self._pulls, [*self._landing]
        self._loads, self._ended, self._asked, self._used, self._pulls = [], [], [], [], []
        return Moves(*lists) if any(lists) else None

    def _saved(self) -> list[tuple[int, ContentId]]:
        """(block, content) of what the tiers get."""
        pulled, self._pulled = self._pulled, []
        if self._tiers is None:
            return []
        fresh, self._tables.fresh = self._tables.fresh or [], []
        # what came from a peer was written by the last step, and may have had to leave since
        fresh += (place for place in self._late if self._pool.match([place[1]]) == [place[0]])
        self._late = pulled
        saves = {content: block for block, content in [*fresh, *self._saves] if not self._below(content)}
        self._saves = []
        return [(block, content) for content, block in saves.items()]

    def _most_numbers(self, tiers: TierIndex) -> int:
        return max(1, tiers.most_fetched // len(self._tables.layout.groups))

    def _known(self, content: ContentId) -> bool:
        return self._pool.knows(content) or self._below(content)

    def _below(self, content: ContentId) -> bool:
        assert self._tiers is not None
        return self._tiers.has_at_hand(content) if self._overdue else self._tiers.knows(content)

    def _hold(self, blocks: list[int], held: list[int]) -> None:
        self._pool.hold(blocks)
        held += blocks

    def _end(self, sequence: Sequence) -> Fetch:
        assert sequence.ticket is not None
        fetch = self._fetches.pop(sequence.ticket)
        self.loading.pop(sequence.ticket, None)
        self._ended.append(sequence.ticket)
        sequence.ticket = None
        return fetch
