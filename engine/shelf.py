"""Shelf: what one tier holds, in bytes, and what leaves first when it is full."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterable, Iterator

from kvasir.engine.blocks import Changes, ContentId

MOST_TURNS = 3
"""However often a block was used again, so often it is passed over before it leaves."""


class Shelf:
    """Blocks by content, up to `capacity` bytes. The least recently used leaves first; one that was used again gets a
    further turn for each time, up to MOST_TURNS. `in`, `listen` and `drain` may be called by any thread, the rest by one at a
    time."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.used = self.evicted = 0
        """Bytes held now, and blocks that had to leave so far."""
        self._held: OrderedDict[ContentId, tuple[int, int]] = OrderedDict()
        """content -> (bytes, turns left), the next to leave first"""
        self._changing = threading.Lock()
        self._changes: dict[ContentId, bool] | None = None
        """Changed with _held, under _changing; None: nobody listens."""

    def __len__(self) -> int:
        return len(self._held)

    def __contains__(self, content: ContentId) -> bool:
        return content in self._held

    def __iter__(self) -> Iterator[ContentId]:
        return iter(self._held)

    def put(self, content: ContentId, size: int) -> list[ContentId]:
        """Hold it as the most recent one -> what has to leave for it; itself, when it is larger than the shelf."""
        if size > self.capacity:
            return [content]
        self.drop(content)
        left = self.shrink(self.capacity - size)
        with self._changing:
            self._held[content] = size, 0
            self._note(content, True)
        self.used += size
        return left

    def shrink(self, size: int) -> list[ContentId]:
        """Let blocks leave until at most `size` bytes are held -> which."""
        left = []
        while self.used > size:
            with self._changing:
                content, (bytes_, turns) = self._held.popitem(last=False)
                if turns:
                    self._held[content] = bytes_, turns - 1
                    continue
                self._note(content, False)
            self.used -= bytes_
            left.append(content)
        self.evicted += len(left)
        return left

    def use(self, contents: Iterable[ContentId], *, again: bool = False) -> None:
        """They were used, the last one most recently; `again`: instead of being computed."""
        for content in contents:
            if content in self._held:
                size, turns = self._held[content]
                self._held[content] = size, min(MOST_TURNS, turns + again)
                self._held.move_to_end(content)

    def drop(self, content: ContentId) -> bool:
        """It is gone. False: it wasn't there."""
        with self._changing:
            size, _ = self._held.pop(content, (0, 0))
            if size:
                self._note(content, False)
        self.used -= size
        return size > 0

    def listen(self) -> None:
        """Note changes from now on, for `drain`; the first are all that is held."""
        with self._changing:
            self._changes = dict.fromkeys(self._held, True)

    def drain(self) -> Changes:
        """What changed since the last time; nothing when nobody listens."""
        if not self._changes:
            return {}
        with self._changing:
            changes, self._changes = self._changes, {}
        return changes

    def _note(self, content: ContentId, held: bool) -> None:
        if self._changes is not None:
            self._changes[content] = held

    def check(self) -> list[str]:
        """Violated invariants in words; empty when all is well."""
        total = sum(size for size, _ in self._held.values())
        wrong = [] if total == self.used else [f"{total} bytes are held, {self.used} counted"]
        return wrong if self.used <= self.capacity else [*wrong, f"{self.used} bytes in {self.capacity}"]
