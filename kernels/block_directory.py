"""What `cluster.directory` keeps of who holds which blocks, by compiled code (block_directory.cpp). No torch."""

from __future__ import annotations

import ctypes
import secrets
from array import array
from collections.abc import Iterable
from ctypes import c_bool, c_char_p, c_int64, c_void_p, py_object
from typing import Any

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
    "directory_change": ((c_void_p, c_int64, c_int64, c_void_p, c_int64, c_void_p, c_int64, c_int64), c_int64),
    "directory_replace": ((c_void_p, c_int64, c_int64, c_void_p, c_int64, c_int64), c_int64),
    "directory_size": ((c_void_p, c_int64), c_int64),
    "directory_prefixes": ((c_void_p, c_char_p, py_object, c_int64, c_int64, c_int64, c_void_p), c_bool),
}


class Holders:
    """Blocks are known by keys of 64 bits, groups and tiers by numbers. Not thread-safe."""

    def __init__(self, path: str) -> None:
        self._library: Any = ctypes.PyDLL(path)  # calls are short: giving up the interpreter meanwhile would cost more
        for name, (arguments, result) in CALLS.items():
            call = getattr(self._library, name)
            call.argtypes, call.restype = arguments, result
        self._found, self._found_at = np.empty((TIERS, 0), np.int64), 0
        """Where answers come, and its address, which numpy takes its time to tell."""
        count = PORTION_TOKENS + 3
        self._address = self._library.directory_new(secrets.token_bytes(8 * count), count, MEMORY)

    def __del__(self) -> None:
        if address := getattr(self, "_address", None):
            self._library.directory_free(address)

    def change(self, tier: int, group: int, stored: Iterable[int], evicted: Iterable[int], room: int) -> int:
        """What went from a group, and what it stored, at most `room` blocks -> the room that is left."""
        new, old = _keys(stored), _keys(evicted)
        lists = (*new.buffer_info(), *old.buffer_info())
        found: int = self._library.directory_change(self._address, tier, group, *lists, room)
        return found

    def replace(self, tier: int, group: int, keys: Iterable[int], room: int) -> int:
        """A group holds exactly these, but for those that find no room -> the room that is left."""
        all_of = _keys(keys)
        found: int = self._library.directory_replace(self._address, tier, group, *all_of.buffer_info(), room)
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


def _keys(keys: Iterable[int]) -> array[int]:
    return keys if isinstance(keys, array) else array("Q", keys)
