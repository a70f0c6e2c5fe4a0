"""BlockDirectory: which groups hold which blocks, as far as a gateway knows. `BlockFeed` keeps one group's part up to date.

A block is known by half of its content id, 64 bits: a false match costs one request some speed and changes no answer.
"""

from __future__ import annotations

import logging
from array import array
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import NamedTuple, Protocol

import numpy as np

from kvasir.cluster.block_journal import TIERS
from kvasir.cluster.block_tables import Key, Keys, Tables
from kvasir.cluster.standings import Ints
from kvasir.engine.block_ids import Holders, holders
from kvasir.engine.blocks import ContentId, Tier
from kvasir.proto import group_pb2 as pb

log = logging.getLogger(__name__)

MAX_HOLDINGS = 16_000_000
"""Blocks times groups that hold them, about 100 bytes each."""
DEVICES_ALONE = 16
"""Of so many one: what devices' blocks alone may take, so that they find room at once."""
SLICE = 1000
"""Keys that are looked at in one go: about a millisecond."""
ASK_AGAIN = 64
"""Messages after which a snapshot that didn't come is asked for once more."""


def keys_of(ids: bytes) -> Keys:
    """Keys of concatenated content ids."""
    return array("Q", ids)[::2]


def key_list(ids: Iterable[ContentId]) -> list[Key]:
    """Keys of content ids."""
    return keys_of(b"".join(ids)).tolist()


class Prompt(Protocol):
    """A prompt's blocks: keys in portions as they are asked for, and what they are hashed from."""

    start: ContentId
    token_ids: list[int]
    blocks: int
    block_size: int

    def __iter__(self) -> Iterator[Sequence[Key]]: ...


class _Change(NamedTuple):
    """What is still to be taken in of what a group said."""

    tier: int
    keys: Keys
    stored: bool
    """Else evicted."""
    first: int = 0
    """Those before are done with."""


class BlockDirectory:
    """Groups are numbered by `join`. Every lookup costs one access to a table a block, however many groups there are. The tables
    are Python's, or those of compiled code as soon as that is there.

    More than `max_holdings` don't fit. Then what others hold on disks goes for blocks on devices, then what they hold in host
    memory, and a group of which something is missing `lacks` it once there is room again.

    later(work): has it called soon; so much at a time is done that nobody waits long, and what a group said last may not be known
    yet. None: all is done at once.
    """

    def __init__(
        self, max_holdings: int = MAX_HOLDINGS, later: Callable[[Callable[[], None]], object] | None = None
    ) -> None:
        self._tables: Tables | Holders = Tables(len(TIERS))
        self._groups: set[int] = set()
        self._places = 0
        """Numbers that groups had so far."""
        self._room = self.max_holdings = max_holdings
        self.dropped = dict.fromkeys(TIERS, 0)
        """Blocks times groups for which there was no room."""
        self._lacking: set[int] = set()
        """Groups of which some of these are."""
        self._told_full = False
        self._later, self._is_due = later, False
        self._pending: dict[int, deque[_Change]] = {}
        """By group, what is to be taken in, in order."""
        self._leaving: dict[tuple[int, int], None] = {}
        """(tier, group) in whose tables something is leaving, in order."""

    @property
    def num_holdings(self) -> int:
        """Blocks times groups that hold them."""
        return self.max_holdings - self._room

    def sizes(self) -> dict[Tier, int]:
        """The same by tier, without what is leaving."""
        return {
            tier: sum(self._tables.held(number, group) for group in self._groups) for number, tier in enumerate(TIERS)
        }

    def join(self) -> int:
        """A number for a new group, the smallest free one."""
        taken = self._groups | {group for _, group in self._leaving}
        group = next(number for number in range(len(taken) + 1) if number not in taken)
        self._groups.add(group)
        self._places = max(self._places, group + 1)
        return group

    def leave(self, group: int) -> None:
        """The group holds nothing any more, and its number is free."""
        self.clear(group)
        self._groups.discard(group)
        self._lacking.discard(group)

    def clear(self, group: int) -> None:
        """The group holds nothing."""
        for tier in TIERS:
            self.replace(group, tier)

    def change(self, group: int, tier: Tier, stored: Iterable[Key], evicted: Iterable[Key]) -> None:
        """What the group stored in a tier, and what went from it."""
        self._adopt()
        number = TIERS.index(tier)
        self._put(group, _Change(number, _array(evicted), False), _Change(number, _array(stored), True))

    def replace(self, group: int, tier: Tier, *portions: Collection[Key]) -> None:
        """The group holds exactly these in a tier."""
        self._adopt()
        number = TIERS.index(tier)
        if (pending := self._pending.pop(group, None)) is not None:
            self._put(group, *(one for one in pending if one.tier != number))
        self._condemn(number, group)
        self._put(group, *(_Change(number, _array(keys), True) for keys in portions))

    def found(self, prompt: Prompt) -> Ints:
        """[tier, group]: how many of the prompt's first blocks the group holds without a gap, in this tier and those before."""
        self._adopt()
        if isinstance(self._tables, Holders):
            ask = prompt.start, prompt.token_ids, prompt.blocks, prompt.block_size
            return self._tables.prefixes(*ask, self._places)
        rows = [self._tables.prefixes(prompt, 1, self._places)]
        for number in range(1, len(TIERS)):
            known = self._tables.size(number)
            rows.append(self._tables.prefixes(prompt, number + 1, self._places) if known else rows[-1])
        return np.array(rows, np.int64)

    def has_tier(self, tier: Tier) -> bool:
        """Some group holds something there."""
        return self._tables.size(TIERS.index(tier)) > 0

    def lacks(self, group: int) -> bool:
        """Blocks of the group found no room, and some would now; said once."""
        if group not in self._lacking or self._room <= self.max_holdings // 8 or group in self._pending:
            return False
        self._lacking.discard(group)
        return True

    # -- what is taken in, little by little

    def _adopt(self) -> None:
        """Compiled code, once that is there."""
        if isinstance(self._tables, Tables) and (compiled := holders()) is not None:
            known = self._tables.take()
            self._tables, self._room, self._leaving = compiled, self.max_holdings, {}
            for tier, group, keys in known:
                before = self._pending.pop(group, deque())
                self._put(group, _Change(tier, _array(keys), True), *before)

    def _put(self, group: int, *changes: _Change) -> None:
        """At once, if there isn't much and nothing before."""
        pending = self._pending.setdefault(group, deque())
        idle = not pending
        pending.extend(one for one in changes if one.keys)
        if idle and sum(len(one.keys) for one in pending) <= SLICE:
            while pending:
                self._take(group, pending)
        if not pending:
            del self._pending[group]
        self._go_on()

    def _condemn(self, tier: int, group: int) -> None:
        self._tables.condemn(tier, group)
        if self._tables.leaving(tier, group):
            self._leaving[tier, group] = None

    def _go_on(self) -> None:
        """See that what is to be done is done."""
        if self._room > self.max_holdings // 8:
            self._told_full = False
        if self._later is None:
            while self._work():
                pass
        elif not self._is_due and (self._pending or self._leaving):
            self._is_due = True
            self._later(self._slice)

    def _slice(self) -> None:
        self._is_due = False
        self._work()
        self._go_on()

    def _work(self) -> bool:
        """A slice of it. False: there was nothing to be done."""
        for group, pending in self._pending.items():
            self._take(group, pending)
            if not pending:
                del self._pending[group]
            return True
        return self._sweep(SLICE)

    def _take(self, group: int, pending: deque[_Change]) -> None:
        """A slice of the first of what is pending, one key at least."""
        change = pending.popleft()
        if change.stored:
            first = change.first + self._store(group, change)
        else:
            self._room += self._tables.evict(change.tier, group, change.keys, change.first, SLICE)
            first = change.first + SLICE
        if first < len(change.keys):
            pending.appendleft(change._replace(first=first))

    def _store(self, group: int, change: _Change) -> int:
        """A slice; how many keys it was."""
        tier, keys, _, first = change
        spare = self.max_holdings // DEVICES_ALONE if tier else 0
        stored = self._tables.store(tier, group, keys, first, max(0, self._room - spare), SLICE)
        self._room -= stored.added
        if stored.done:
            return stored.done
        if self._make_room(tier):
            return 0
        lost = self._tables.store(tier, group, keys, first, 0, SLICE, passing=True)
        self._lose(tier, group, lost.lost)
        return lost.done

    def _make_room(self, tier: int) -> bool:
        if tier == 0 and not self._leaving:
            self._give_way()
        return self._sweep(SLICE)

    def _give_way(self) -> None:
        """Of the lowest tier in which something is known, the group with most of it."""
        for tier in range(len(TIERS) - 1, 0, -1):
            held = {group: self._tables.held(tier, group) for group in self._groups}
            group = max(held, key=held.__getitem__)
            if held[group]:
                self._condemn(tier, group)
                self._lose(tier, group, held[group])
                return

    def _sweep(self, most: int) -> bool:
        """So much of what is leaving goes. False: there was nothing."""
        for tier, group in self._leaving:
            self._room += self._tables.sweep(tier, group, most)
            if not self._tables.leaving(tier, group):
                del self._leaving[tier, group]
            return True
        return False

    def _lose(self, tier: int, group: int, count: int) -> None:
        """That is told once, and again when an eighth was free meanwhile."""
        if count:
            self.dropped[TIERS[tier]] += count
            self._lacking.add(group)
        if count and not self._told_full:
            self._told_full = True
            told = ", ".join(f"{size:,} in {name}" for name, size in self.sizes().items())
            log.warning(
                "%s blocks of groups are known (%s), no more fit: requests find less of what is cached",
                f"{self.num_holdings:,}",
                told,
            )


def _array(keys: Iterable[Key]) -> Keys:
    return keys if isinstance(keys, array) else array("Q", keys)


class _Part(NamedTuple):
    """Of a snapshot."""

    number: int
    parts: int
    tiers: Sequence[tuple[Tier, Keys]]


class BlockFeed:
    """One group's messages -> the directory. Lost, repeated and reordered ones are told by their numbers."""

    def __init__(self, directory: BlockDirectory, group: int) -> None:
        self._directory, self._group = directory, group
        self._incarnation = ""
        self._number: int | None = None
        """The last change that was taken in; None: a snapshot is needed."""
        self._last = 0
        self._parts: dict[int, _Part] = {}
        self._ignored = 0

    @property
    def in_step(self) -> bool:
        """Nothing is missing as far as one can tell."""
        return self._number is not None

    def begin(self, incarnation: str) -> None:
        """A connection to this life of the group; a snapshot is on its way."""
        if incarnation != self._incarnation:
            self._directory.clear(self._group)
            self._incarnation, self._last = incarnation, 0
        self._number, self._parts, self._ignored = None, {}, 0

    def take(self, message: pb.Blocks) -> bool:
        """Take a message in; True when a snapshot has to be asked for."""
        if message.incarnation != self._incarnation:
            return False
        if message.parts:
            self._take_part(message)
            return False
        if self._number is None:
            self._ignored += 1
            return self._ignored % ASK_AGAIN == 0
        if message.number == self._number + 1:
            self._number = self._last = message.number
            for blocks in message.tiers:
                self._directory.change(self._group, _tier(blocks), keys_of(blocks.stored), keys_of(blocks.evicted))
        elif message.number > self._number:
            self._number, self._parts, self._ignored = None, {}, 0
            return True
        return False

    def _take_part(self, message: pb.Blocks) -> None:
        """Snapshots count only when one is needed, and none that is older than what was known already."""
        if self._number is not None or message.number < self._last:
            return
        if any((one.number, one.parts) != (message.number, message.parts) for one in self._parts.values()):
            if message.number < max(one.number for one in self._parts.values()):
                return
            self._parts = {}
        tiers = [(_tier(blocks), keys_of(blocks.stored)) for blocks in message.tiers]
        self._parts[message.part] = _Part(message.number, message.parts, tiers)
        if len(self._parts) == message.parts:
            told = [one for part in self._parts.values() for one in part.tiers]
            for tier in TIERS:
                self._directory.replace(self._group, tier, *(keys for name, keys in told if name == tier))
            self._number = self._last = message.number
            self._parts = {}

    def lacks(self) -> bool:
        """A snapshot has to be asked for: some of the group's blocks found no room, and there is some now."""
        if self._number is None or not self._directory.lacks(self._group):
            return False
        self._number, self._parts, self._ignored = None, {}, 0
        return True


def _tier(blocks: pb.TierBlocks) -> Tier:
    return next(tier for tier in TIERS if tier == blocks.tier)
