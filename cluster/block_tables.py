"""Tables: what `cluster.directory` keeps of who holds which blocks, in Python, for where there is no compiler.

As `kernels.block_directory.Holders`, but for the lookup: that one takes who holds the last of a portion's blocks to hold those
before it, too.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple, TypeAlias

from kvasir.engine.block_ids import Stored

Key = int
"""The first half of a content id."""
Keys: TypeAlias = "array[int]"
"""Of type code Q."""


class _Part(NamedTuple):
    """What a group holds in a tier, and what is leaving."""

    own: set[Key]
    leaving: list[set[Key]]
    """Each what it held when it was condemned: to make one of them would hold up a gateway's loop."""


class Tables:
    """Blocks are known by keys of 64 bits, groups and tiers by numbers."""

    def __init__(self, tiers: int) -> None:
        self._masks: list[dict[Key, int]] = [{} for _ in range(tiers)]
        """Bit g: group g holds the block in this tier."""
        self._parts: dict[tuple[int, int], _Part] = {}

    def _part(self, tier: int, group: int) -> _Part:
        return self._parts.setdefault((tier, group), _Part(set(), []))

    def store(
        self, tier: int, group: int, keys: Keys, first: int, room: int, most: int, passing: bool = False
    ) -> Stored:
        """As `Holders`."""
        (own, leaving), masks, bit = self._part(tier, group), self._masks[tier], 1 << group
        done = added = lost = 0
        for done, key in enumerate(keys[first : first + most], 1):
            if leaving and _taken_back(leaving, key):
                own.add(key)
            elif key not in own and added < room:
                own.add(key)
                added += 1
                masks[key] = masks.get(key, 0) | bit
            elif key not in own and not passing:
                return Stored(done - 1, added, lost)
            elif key not in own:
                lost += 1
        return Stored(done, added, lost)

    def evict(self, tier: int, group: int, keys: Keys, first: int, most: int) -> int:
        """As `Holders`."""
        own = self._part(tier, group).own
        gone = own.intersection(keys[first : first + most])
        own -= gone
        self._drop(tier, group, gone)
        return len(gone)

    def condemn(self, tier: int, group: int) -> None:
        """As `Holders`."""
        own, leaving = self._part(tier, group)
        self._parts[tier, group] = _Part(set(), [one for one in (*leaving, own) if one])

    def sweep(self, tier: int, group: int, most: int) -> int:
        """As `Holders`."""
        leaving, gone = self._part(tier, group).leaving, list[Key]()
        while leaving and len(gone) < most:
            gone += [leaving[-1].pop() for _ in range(min(most - len(gone), len(leaving[-1])))]
            if not leaving[-1]:
                leaving.pop()
        self._drop(tier, group, gone)
        return len(gone)

    def held(self, tier: int, group: int) -> int:
        """As `Holders`."""
        return len(self._part(tier, group).own)

    def leaving(self, tier: int, group: int) -> int:
        """As `Holders`."""
        return sum(map(len, self._part(tier, group).leaving))

    def size(self, tier: int) -> int:
        """As `Holders`."""
        return len(self._masks[tier])

    def take(self) -> Iterator[tuple[int, int, set[Key]]]:
        """(tier, group, what it holds), and nobody holds anything any more."""
        parts, self._parts = self._parts, {}
        self._masks = [{} for _ in self._masks]
        return ((tier, group, own) for (tier, group), (own, _) in parts.items() if own)

    def prefixes(self, portions: Iterable[Sequence[Key]], tiers: int, groups: int) -> list[int]:
        """By group: how many blocks it holds without a gap in the first `tiers`. Asks for portions only as long as somebody has all
        before.

        Who holds a block of a portion is taken to hold those of it that come before: pools evict tails before heads, and to
        look at all of 500 blocks takes 130 us (the dictionaries don't fit into a processor's cache).
        """
        look, found = self._holders(tiers), [0] * groups
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

    def _holders(self, tiers: int) -> Callable[[Key, int], int]:
        """(key, 0) -> bits of the groups that hold it in the first `tiers`."""
        first, *others = self._masks[:tiers]
        look: Callable[[Key, int], int] = first.get
        for table in others:
            if table:
                look = _either(look, table.get)
        return look

    def _drop(self, tier: int, group: int, keys: Iterable[Key]) -> None:
        masks, bit = self._masks[tier], 1 << group
        for key in keys:
            if mask := masks[key] & ~bit:
                masks[key] = mask
            else:
                del masks[key]


def _taken_back(leaving: Iterable[set[Key]], key: Key) -> bool:
    """It was leaving, and isn't any more."""
    for one in leaving:
        if key in one:
            one.discard(key)
            return True
    return False


_BITS = [tuple(bit for bit in range(8) if byte >> bit & 1) for byte in range(256)]
"""Of each byte: the bits that are set. Groups are mostly lost many at a time, where a common beginning ends."""


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
