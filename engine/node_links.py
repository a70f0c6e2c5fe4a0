"""Node links: exchanges of a stage's CPU ranks that are all on one node, through memory that they share.

The memory has no name that could be left behind: rank 0 of the stage makes it, the others open its descriptor, and the system
frees it with the last of them.
"""

from __future__ import annotations

import mmap
import os
import secrets
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from kvasir.engine.channels import Memory, node
from kvasir.engine.cores import usable_cores
from kvasir.kernels.native import library
from kvasir.kernels.node_sums import Meeting, meeting_bytes

CAPACITY = 4 << 20
"""Bytes of a rank's part; more goes in several turns."""
SPIN_S = 200e-6
"""A rank that has a core for itself waits awake for so long: to be woken takes about 50 us."""
NAME_BYTES = 16


class NodeLinks:
    """The same operations as `Links`, for rank `own` of `size`, beside so many ranks in all on this node. OSError where they
    can't share memory."""

    def __init__(self, store: Any, own: int, size: int, timeout_s: float, local_ranks: int = 1) -> None:
        self.own, self.size = own, size
        memory, self._kept = _shared(store, own, meeting_bytes(size, CAPACITY))
        spin_s = SPIN_S if max(size, local_ranks) <= usable_cores() else 0.0
        self.meeting = Meeting(memory, own, size, CAPACITY, spin_s=spin_s, timeout_s=timeout_s)

    def takes(self, x: Tensor) -> bool:
        """It is always faster than gloo."""
        return True

    def sum(self, x: Tensor) -> Tensor:
        return self.meeting.sum(x)

    def scatter_sum(self, x: Tensor) -> Tensor:
        return self.meeting.scatter_sum(x)

    def gather_rows(self, x: Tensor) -> Tensor:
        return self.meeting.gather(x).flatten(0, 1)

    def gather(self, x: Tensor) -> Sequence[Tensor]:
        """Every rank's x, by rank, on rank 0; nothing on the others."""
        found = self.meeting.gather(x, wanted=self.own == 0)
        return [] if self.own else found.unbind()

    def abort(self) -> None:
        self.meeting.abort()

    def close(self) -> None:
        """The memory is freed with the last one who holds it."""


def _shared(store: Any, own: int, size: int) -> tuple[Any, Memory | None]:
    """(the stage's memory: zeros behind its name, what keeps its descriptor open for the others)"""
    if own == 0:
        return _made(store, size)
    pid, fd, name = store.get("memory").decode().split()
    with open(f"/proc/{pid}/fd/{fd}", "r+b", buffering=0) as file:
        if os.fstat(file.fileno()).st_size < size:
            raise OSError("what rank 0 of the stage shares isn't to be had here")
        memory = mmap.mmap(file.fileno(), size)
    if memory[:NAME_BYTES].hex() != name:
        raise OSError("what rank 0 of the stage shares isn't to be had here")
    return memory, None


def _made(store: Any, size: int) -> tuple[Any, Memory]:
    where = "0 0 0"  # nowhere: the others needn't wait
    try:
        if not node() or library() is None:
            raise OSError("this needs Linux and compiled kernels")
        kept = Memory(size)
        memory = mmap.mmap(kept.fd, size)
        memory[:NAME_BYTES] = secrets.token_bytes(NAME_BYTES)
        where = f"{os.getpid()} {kept.fd} {memory[:NAME_BYTES].hex()}"
        return memory, kept
    finally:
        store.set("memory", where)
