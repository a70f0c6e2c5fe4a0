"""BlockDirectory: which groups hold which blocks, as far as a gateway knows. `BlockFeed` keeps one group's part up to date.

A block is known by half of its content id, 64 bits: a false match costs one request some speed and changes no answer.
"""

from __future__ import annotations

import logging
from array import array
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import Protocol

import numpy as np

from kvasir.cluster.block_journal import TIERS
from kvasir.cluster.standings import Ints
from kvasir.engine.block_ids import Holders, holders
from kvasir.engine.blocks import ContentId, Tier
from kvasir.proto import group_pb2 as pb

log = logging.getLogger(__name__)

Key = int
"""The first half of a content id."""
MAX_HOLDINGS = 16_000_000
"""Blocks times groups that hold them, about 100 bytes each; beyond it further blocks stay unknown."""
ASK_AGAIN = 64
"""Messages after which a snapshot that didn't come is asked for once more."""


def keys_of(ids: bytes) -> array[Key]:
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


class BlockDirectory:
    """Groups are numbered by `join`. Every lookup costs one access to a table a block, however many groups there are. The tables
    are Python's dictionaries, or those of compiled code from the first question on for which that is there.
    """

    def __init__(self, max_holdings: int = MAX_HOLDINGS) -> None:
        self._masks: dict[Tier, dict[Key, int]] = {tier: {} for tier in TIERS}
        """Bit g: group g holds the block in this tier."""
        self._held: dict[int, dict[Tier, set[Key]]] = {}
        self._compiled: Holders | None = None
        """What the two above hold, once it is there."""
        self._sizes = dict.fromkeys(TIERS, 0)
        """Blocks times groups that hold them, by tier."""
        self._places = 0
        """Numbers that groups had so far."""
        self._room = max_holdings
        self._max = max_holdings
        self._told_full = False

    @property
    def num_holdings(self) -> int:
        """Blocks times groups that hold them."""
        return self._max - self._room

    def join(self) -> int:
        """A number for a new group, the smallest free one."""
        group = next(number for number in range(len(self._held) + 1) if number not in self._held)
        self._held[group] = {tier: set() for tier in TIERS}
        self._places = max(self._places, group + 1)
        return group

    def leave(self, group: int) -> None:
        """The group holds nothing any more, and its number is free."""
        self.clear(group)
        del self._held[group]

    def clear(self, group: int) -> None:
        """The group holds nothing."""
        for tier in TIERS:
            self.replace(group, tier, ())

    def change(self, group: int, tier: Tier, stored: Iterable[Key], evicted: Iterable[Key]) -> None:
        """What the group stored in a tier, and what went from it."""
        before = self._room
        if self._compiled is not None:
            self._room = self._compiled.change(TIERS.index(tier), group, stored, evicted, before)
        else:
            self._change(group, tier, stored, evicted)
        self._sizes[tier] += before - self._room
        self._tell_full()

    def _tell_full(self) -> None:
        """Once, and again when an eighth was free meanwhile."""
        if self._room > self._max // 8:
            self._told_full = False
        elif self._room <= 0 and not self._told_full:
            self._told_full = True
            told = ", ".join(f"{size:,} in {tier}" for tier, size in self._sizes.items())
            log.warning(
                "%s blocks of groups are known (%s), no more fit: requests find less of what is cached",
                f"{self._max:,}",
                told,
            )

    def _change(self, group: int, tier: Tier, stored: Iterable[Key], evicted: Iterable[Key]) -> None:
        held, masks, bit, room = self._held[group][tier], self._masks[tier], 1 << group, self._room
        for key in evicted:
            if key in held:
                held.discard(key)
                room += 1
                _drop(masks, key, bit)
        for key in stored:
            if key not in held and room > 0:
                held.add(key)
                room -= 1
                masks[key] = masks.get(key, 0) | bit
        self._room = room

    def replace(self, group: int, tier: Tier, keys: Collection[Key]) -> None:
        """The group holds exactly these in a tier."""
        if self._compiled is None:
            held, wanted = self._held[group][tier], set(keys)
            self.change(group, tier, wanted - held, held - wanted)
            return
        before = self._room
        self._room = self._compiled.replace(TIERS.index(tier), group, keys, before)
        self._sizes[tier] += before - self._room
        self._tell_full()

    def found(self, prompt: Prompt) -> Ints:
        """[tier, group]: how many of the prompt's first blocks the group holds without a gap, in this tier and those before."""
        if self._compiled is None and (compiled := holders()) is not None:
            self._adopt(compiled)
        if self._compiled is not None:
            ask = prompt.start, prompt.token_ids, prompt.blocks, prompt.block_size
            return self._compiled.prefixes(*ask, self._places)
        rows = [self.prefixes(prompt)]
        for tier in TIERS[1:]:
            rows.append(self.prefixes(prompt, tier) if self.has_tier(tier) else rows[-1])
        return np.array(rows, np.int64)

    def _adopt(self, compiled: Holders) -> None:
        for group, tiers in self._held.items():
            for number, tier in enumerate(TIERS):
                compiled.change(number, group, tiers[tier], (), len(tiers[tier]))
        self._held = {group: {tier: set() for tier in TIERS} for group in self._held}
        self._masks = {tier: {} for tier in TIERS}
        self._compiled = compiled

    def prefixes(self, portions: Iterable[Sequence[Key]], worst: Tier = "device") -> list[int]:
        """`found` in Python, by group in tiers up to `worst`. Asks for portions only as long as somebody has all before.

        Who holds a block of a portion is taken to hold those of it that come before: pools evict tails before heads, and to
        look at all of 500 blocks takes 130 us (the dictionaries don't fit into a processor's cache).
        """
        look, found = self._holders(worst), [0] * self._places
        alive, count = -1, 0
        for portion in portions:
            if not count:
                alive = look(portion[0], 0)
            gone = alive & ~look(portion[-1], 0)
            alive ^= gone
            while gone:
                place, lost = _first_loss(look, portion, gone)
                _note(found, lost, count + place)
                gone ^= lost
            if not alive:
                return found
            count += len(portion)
        if count:
            _note(found, alive, count)
        return found

    def _holders(self, worst: Tier) -> Callable[[Key, int], int]:
        """(key, 0) -> bits of the groups that hold it in tiers up to `worst`."""
        first, *others = [self._masks[tier] for tier in TIERS[: TIERS.index(worst) + 1]]
        look: Callable[[Key, int], int] = first.get
        for table in others:
            if table:
                look = _either(look, table.get)
        return look

    def has_tier(self, tier: Tier) -> bool:
        """Some group holds something there."""
        return self._sizes[tier] > 0


_BITS = [tuple(bit for bit in range(8) if byte >> bit & 1) for byte in range(256)]
"""Of each byte: the bits that are set. Groups are mostly lost many at a time, where a common beginning ends."""


def _drop(masks: dict[Key, int], key: Key, bit: int) -> None:
    mask = masks.get(key, 0) & ~bit
    if mask:
        masks[key] = mask
    else:
        masks.pop(key, None)


def _either(one: Callable[[Key, int], int], other: Callable[[Key, int], int]) -> Callable[[Key, int], int]:
    return lambda key, default: one(key, default) | other(key, default)


def _first_loss(look: Callable[[Key, int], int], portion: Sequence[Key], gone: int) -> tuple[int, int]:
    """(place of the first block that not all of `gone` hold, those that don't); none of them holds the last one."""
    low, high, lost = 0, len(portion) - 1, gone
    while low < high:
        middle = (low + high) // 2
        if now := gone & ~look(portion[middle], 0):
            high, lost = middle, now
        else:
            low = middle + 1
    return low, lost


def _note(found: list[int], mask: int, count: int) -> None:
    if mask & (mask - 1) == 0:
        found[mask.bit_length() - 1] = count
    elif count:
        for start, byte in enumerate(mask.to_bytes(-(-mask.bit_length() // 8), "little")):
            for bit in _BITS[byte]:
                found[8 * start + bit] = count


class BlockFeed:
    """One group's messages -> the directory. Lost, repeated and reordered ones are told by their numbers."""

    def __init__(self, directory: BlockDirectory, group: int) -> None:
        self._directory, self._group = directory, group
        self._incarnation = ""
        self._number: int | None = None
        """The last change that was taken in; None: a snapshot is needed."""
        self._last = 0
        self._parts: dict[int, pb.Blocks] = {}
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
        self._parts[message.part] = message
        if len(self._parts) == message.parts:
            self._replace(self._parts.values())
            self._number = self._last = message.number
            self._parts = {}

    def _replace(self, parts: Collection[pb.Blocks]) -> None:
        for tier in TIERS:
            told = [blocks.stored for part in parts for blocks in part.tiers if blocks.tier == tier]
            self._directory.replace(self._group, tier, keys_of(b"".join(told)))


def _tier(blocks: pb.TierBlocks) -> Tier:
    return next(tier for tier in TIERS if tier == blocks.tier)
