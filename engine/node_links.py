"""Node links: exchanges of a stage's CPU ranks that are all on one node, through memory that they share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from kvasir.engine.cores import usable_cores
from kvasir.engine.node_memory import NodeMemory, opened
from kvasir.kernels.node_sums import Meeting, meeting_bytes

CAPACITY = 4 << 20
"""Bytes of a rank's part; more goes in several turns."""
SPIN_S = 200e-6
"""A rank that has a core for itself waits awake for so long: to be woken takes about 50 us."""
NOWHERE = "0 0 0"


class NodeLinks:
    """The same operations as `Links`, for rank `own` of `size`, beside so many ranks in all on this node. OSError where they
    can't share memory."""

    def __init__(self, store: Any, own: int, size: int, timeout_s: float, local_ranks: int = 1) -> None:
        self.own, self.size = own, size
        memory, self._kept = shared(store, own, meeting_bytes(size, CAPACITY))
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


def shared(store: Any, own: int, size: int) -> tuple[Any, NodeMemory | None]:
    """(the stage's memory, what keeps it open for the others)"""
    if own:
        return opened(store.get("memory").decode(), size), None
    where = NOWHERE  # the others needn't wait
    try:
        made = NodeMemory(size)
        where = made.where
    finally:
        store.set("memory", where)
    return made.memory, made
