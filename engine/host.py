"""Host: a rank's blocks in host memory, in one arena."""

from __future__ import annotations

import threading
from collections.abc import Iterable

import torch

from kvasir.engine.blocks import ContentId
from kvasir.engine.shelf import Shelf


class Host:
    """As many blocks of `block_bytes` as fit into `capacity` bytes. Any thread. pinned: a GPU copies from here directly."""

    def __init__(self, block_bytes: int, capacity: int, *, pinned: bool = False) -> None:
        count = capacity // block_bytes
        self.shelf = Shelf(count * block_bytes)
        self.stored = self.loaded = 0
        self._arena = torch.empty(count, block_bytes, dtype=torch.uint8, pin_memory=pinned).numpy()
        self._rows: dict[ContentId, int] = {}
        self._free = list(range(count))
        self._lock = threading.Lock()

    def write(self, content: ContentId, data: memoryview) -> bool:
        """Keep a block, in place of what is known by its name; what is least worth keeping goes for it. False: it is larger
        than all there is."""
        with self._lock:
            if len(data) > self.shelf.capacity:
                return False
            if self.shelf.drop(content):
                self._release([content])
            self._release(self.shelf.put(content, len(data)))
            row = self._rows[content] = self._free.pop()
            self._arena[row] = memoryview(data)
            self.stored += 1
            return True

    def read(self, content: ContentId, into: memoryview) -> bool:
        """The block's bytes. False: it isn't here."""
        with self._lock:
            row = self._rows.get(content)
            if row is None:
                return False
            into[:] = memoryview(self._arena[row])
            self.loaded += 1
            return True

    def use(self, contents: Iterable[ContentId], *, again: bool) -> None:
        """They were used, the last one most recently."""
        with self._lock:
            self.shelf.use(contents, again=again)

    def forget(self, content: ContentId) -> None:
        """It is of no use."""
        with self._lock:
            if self.shelf.drop(content):
                self._release([content])

    def check(self) -> list[str]:
        """Violated invariants in words; empty when all is well."""
        wrong = [] if set(self._rows) == set(self.shelf) else ["the shelf and the rows hold different blocks"]
        if sorted([*self._rows.values(), *self._free]) != list(range(len(self._arena))):
            wrong.append("rows are lost, or held twice")
        return wrong + self.shelf.check()

    def _release(self, contents: Iterable[ContentId]) -> None:
        self._free += (self._rows.pop(content) for content in contents)
