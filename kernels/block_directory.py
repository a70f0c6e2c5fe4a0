"""What `cluster.directory` keeps of who holds which blocks, by compiled code (block_directory.cpp). No torch."""

from __future__ import annotations

import ctypes
import secrets
from array import array
from ctypes import c_bool, c_char_p, c_int64, c_void_p, py_object
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

TIERS = 3
PORTION_TOKENS = 4096
"""Hashed and remembered together, at most 64 blocks of them."""
MEMORY = 8192
"""Portions that are remembered, 1 KB each."""
CALLS: dict[str, tuple[tuple[Any, ...], Any]] = {
    "directory_new": ((c_char_p, c_int64, c_int64), c_void_p),
    "directory_free": ((c_void_p,), None),
    "directory_store": (
        (c_void_p, c_int64, c_int64, c_void_p, c_int64, c_int64, c_bool, c_int64, c_void_p),
        c_int64,
    ),
    "directory_evict": ((c_void_p, c_int64, c_int64, c_void_p, c_int64), c_int64),
    "directory_condemn": ((c_void_p, c_int64, c_int64), None),
    "directory_sweep": ((c_void_p, c_int64, c_int64, c_int64), c_int64),
    "directory_held": ((c_void_p, c_int64, c_int64), c_int64),
    "directory_leaving": ((c_void_p, c_int64, c_int64), c_int64),
    "directory_size": ((c_void_p, c_int64), c_int64),
    "directory_prefixes": ((c_void_p, c_char_p, py_object, c_int64, c_int64, c_int64, c_void_p), c_bool),
}

Keys: TypeAlias = "array[int]"  # of type code Q


class Stored(NamedTuple):
    """What came of keys that a group stored."""

    done: int
    """So many were looked at."""
    added: int
    """Of these, what takes room."""
    lost: int
    """And what found none."""


class Holders:
    """Blocks are known by keys of 64 bits, groups and tiers by numbers. Not thread-safe."""

    def __init__(self, path: str) -> None:
        self._library: Any = ctypes.PyDLL(path)  # calls are short: giving up the interpreter meanwhile would cost more
        for name, (arguments, result) in CALLS.items():
            call = getattr(self._library, name)
            call.argtypes, call.restype = arguments, result
        self._found, self._found_at = np.empty((TIERS, 0), np.int64), 0
        """Where answers come, and its address, which numpy takes its time to tell."""
        self._came = (c_int64 * 2)()
        self._came_at = ctypes.addressof(self._came)
        count = PORTION_TOKENS + 3
        self._address = self._library.directory_new(secrets.token_bytes(8 * count), count, MEMORY)

    def __del__(self) -> None:
        if address := getattr(self, "_address", None):
            self._library.directory_free(address)

    def store(
        self, tier: int, group: int, keys: Keys, first: int, room: int, most: int, passing: bool = False
    ) -> Stored:
        """A group's keys from `first` on: as many as there is room, and (passing) over those for which there is none; no further
        once the work has come to `most` keys."""
        asked = (*_rest(keys, first, len(keys)), room, passing, most)
        done = self._library.directory_store(self._address, tier, group, *asked, self._came_at)
        return Stored(done, *self._came)

    def evict(self, tier: int, group: int, keys: Keys, first: int, most: int) -> int:
        """`most` keys from `first` on went from a group -> how many it held."""
        gone: int = self._library.directory_evict(self._address, tier, group, *_rest(keys, first, most))
        return gone

    def condemn(self, tier: int, group: int) -> None:
        """All that a group holds is leaving: it goes with `sweep`, unless it is stored again before."""
        self._library.directory_condemn(self._address, tier, group)

    def sweep(self, tier: int, group: int, most: int) -> int:
        """Up to `most` of what is leaving goes -> how many."""
        gone: int = self._library.directory_sweep(self._address, tier, group, most)
        return gone

    def held(self, tier: int, group: int) -> int:
        """Blocks that a group holds, without those that are leaving."""
        found: int = self._library.directory_held(self._address, tier, group)
        return found

    def leaving(self, tier: int, group: int) -> int:
        """Blocks of a group that are leaving."""
        found: int = self._library.directory_leaving(self._address, tier, group)
        return found

    def size(self, tier: int) -> int:
        """Blocks that somebody holds."""
        found: int = self._library.directory_size(self._address, tier)
        return found

    def prefixes(
        self, start: bytes, token_ids: list[int], count: int, block_size: int, groups: int
    ) -> NDArray[np.int64]:
        """[tier, group]: how many of the first `count` blocks of tokens, the first one behind `start`[16], it holds without a gap,
        in this tier and those before it. TypeError or OverflowError where a token that is looked at is none."""
        assert len(token_ids) >= count * block_size, "the blocks aren't full"
        if self._found.shape[1] != groups:
            self._found = np.empty((TIERS, groups), np.int64)
            self._found_at = self._found.ctypes.data
        asked = start, token_ids, count, block_size, groups, self._found_at
        if not self._library.directory_prefixes(self._address, *asked):
            raise OverflowError("a token id takes more than 32 bits")
        return self._found.copy()


def _rest(keys: Keys, first: int, most: int) -> tuple[int, int]:
    """(address, count) of those from `first` on."""
    at, count = keys.buffer_info()
    return at + 8 * first, min(most, count - first)
