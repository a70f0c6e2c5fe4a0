"""Board: how rank 0 tells the ranks of its own node a step, through memory that they share (board_cpu.cpp).

A connection takes a system call for each rank; here the message is written once, and one call wakes all who sleep.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable, Sequence
from typing import Any

from kvasir.engine.node_memory import NodeMemory, opened
from kvasir.kernels.native import library

SLOT_BYTES = 65536 - 64
"""Longer messages are announced here and come another way."""
BUSY_S = 0.0005
"""How often it is looked whether a slow reader has made room."""


class Poster:
    """The one who writes; ranks 0 to `ranks` - 1 may read. OSError where memory can't be shared."""

    def __init__(self, ranks: int) -> None:
        compiled: Any = library()
        self._shared = NodeMemory(compiled.board_bytes(ranks) if compiled else 0)
        self._compiled, self._number = compiled, 0
        self._address = ctypes.addressof(ctypes.c_char.from_buffer(self._shared.memory))
        self.where = self._shared.where

    def post(self, message: bytes, readers: Sequence[int], going: Callable[[], bool]) -> bool:
        """For these ranks. False: it is too long, and has to follow another way. Waits for room while `going`."""
        self._number += 1
        ranks = (ctypes.c_int64 * len(readers))(*readers)
        while self._compiled.post(self._address, ranks, len(ranks), self._number, message, len(message)) and going():
            time.sleep(BUSY_S)
        return len(message) <= SLOT_BYTES

    def nudge(self) -> None:
        """Who waits for a message stops waiting: something came another way."""
        self._compiled.nudge(self._address)


class Reader:
    """What this rank reads of the board at `where`. OSError where that isn't to be had."""

    def __init__(self, where: str, rank: int, ranks: int) -> None:
        compiled: Any = library()
        if compiled is None:
            raise OSError("this needs compiled kernels")
        self._memory = opened(where, compiled.board_bytes(ranks))
        self._address = ctypes.addressof(ctypes.c_char.from_buffer(self._memory))
        self._compiled, self._rank, self._number = compiled, rank, 1
        self._into = ctypes.create_string_buffer(SLOT_BYTES)

    def take(self, nap_s: float) -> tuple[bool, bytes | None]:
        """(there is a next message, itself unless it is too long and comes another way); waits so long for it."""
        size = self._compiled.take(self._address, self._rank, self._number, self._into, int(nap_s * 1e9))
        if size < 0:
            return False, None
        self._number += 1
        return True, ctypes.string_at(self._into, size) if size <= SLOT_BYTES else None
