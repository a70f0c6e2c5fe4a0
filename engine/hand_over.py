"""Hand-over: hidden states from a CPU rank of one stage to its like in the next, through memory that both map.

gloo first asks the other end whether it receives, and has a thread in both processes that hands things on: four waits for a
core, while the cores compute. This is a copy on either side, and one is woken.
"""

from __future__ import annotations

import ctypes
import logging
import time
from typing import Any

from torch import Tensor

from kvasir.engine.agreement import agreed
from kvasir.engine.board import BUSY_S, SLOT_BYTES
from kvasir.engine.node_links import shared
from kvasir.kernels.native import library

MOST_BYTES = 8 * SLOT_BYTES
"""Half of what lies here at once: more goes over gloo, which both ends know by its size."""
NAP_S = 0.1
"""How often who waits looks whether it is late."""
TIMED_OUT, ABORTED = "timed out: another stage says nothing", "another stage is gone, or this rank gave up"
log = logging.getLogger(__name__)


class HandOver:
    """One end of it; the giving one makes the memory, in which its parts are messages that one rank reads. OSError where memory
    can't be shared. RuntimeError when the other end is late by `timeout_s`, or this one aborted."""

    def __init__(self, store: Any, timeout_s: float, *, gives: bool) -> None:
        compiled: Any = library()
        self._memory, self._kept = shared(store, 0 if gives else 1, compiled.board_bytes(1) if compiled else 0)
        if compiled is None:
            raise OSError("this needs compiled kernels")
        self._compiled, self._timeout_s, self._number, self._aborted = compiled, timeout_s, 0, False
        self._address = ctypes.addressof(ctypes.c_char.from_buffer(self._memory))
        self._reader = (ctypes.c_int64 * 1)(0)

    def takes(self, x: Tensor) -> bool:
        """Whether x goes this way."""
        return x.nbytes <= MOST_BYTES

    def give(self, x: Tensor) -> None:
        """A copy of x lies there as soon as the other end has taken enough of what came before."""
        for address, size in _parts(x):
            deadline = time.monotonic() + self._timeout_s
            self._number += 1
            while self._compiled.post(self._address, self._reader, 1, self._number, address, size):
                self._go_on(deadline)
                time.sleep(BUSY_S)

    def take(self, x: Tensor) -> None:
        """Fill x with what the other end gave."""
        for address, size in _parts(x):
            deadline = time.monotonic() + self._timeout_s
            self._number += 1
            while (got := self._compiled.take(self._address, 0, self._number, address, int(NAP_S * 1e9))) < 0:
                self._go_on(deadline)
            assert got == size, f"{size} bytes of hidden states were expected, {got} came"

    def abort(self) -> None:
        """Any thread: whoever waits at this end gets an error."""
        self._aborted = True
        self._compiled.nudge(self._address)

    def _go_on(self, deadline: float) -> None:
        if self._aborted:
            raise RuntimeError(ABORTED)
        if time.monotonic() > deadline:
            raise RuntimeError(TIMED_OUT)


def hand_over(store: Any, host: str, timeout_s: float, *, gives: bool) -> HandOver | None:
    """This end, if both can have one."""
    found, why = agreed(lambda: HandOver(store, timeout_s, gives=gives), store, 0 if gives else 1, 2, host, timeout_s)
    if found is None:
        log.info("hidden states go over gloo, not through shared memory: %s", why)
    return found


def _parts(x: Tensor) -> list[tuple[int, int]]:
    """(address, bytes) of each message."""
    begin, size = x.data_ptr(), x.nbytes
    return [(begin + at, min(SLOT_BYTES, size - at)) for at in range(0, size, SLOT_BYTES)]
