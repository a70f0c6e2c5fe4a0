"""Lane: one tier and the thread that writes to it, so that a tier that is slow, or hangs, keeps none waiting."""

from __future__ import annotations

import logging
import queue
import threading
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from kvasir.engine.blocks import ContentId
from kvasir.engine.disk import Disk
from kvasir.engine.host import Host

logger = logging.getLogger(__name__)

IDLE_S = 60.0
"""A disk that has had nothing to do for so long looks whether it may still hold what it holds."""
MOST_WAITING = 1000
"""Pieces of work; what comes beyond that, or beyond the bytes that may wait, isn't done: it costs speed, never an answer."""


class Lane:
    """What `tier` is to do, in order. Any thread."""

    def __init__(self, tier: Host | Disk) -> None:
        self.tier = tier
        self.waiting = 0
        """Bytes that are still to be written."""
        self._changing = threading.Lock()
        self._forgotten: set[ContentId] = set()
        """Of no use, but not dropped yet; each change is one that no other thread can see half of."""
        self._undropped: deque[Iterable[ContentId]] = deque()
        """Those of them that found too much waiting."""
        self._work: queue.SimpleQueue[Callable[[], object] | None] = queue.SimpleQueue()
        self._failed = False
        name = f"kvasir-write-behind-{type(tier).__name__.lower()}"
        self.thread = threading.Thread(target=self._run, name=name, daemon=True)
        self.thread.start()

    def put(self, work: Callable[[], object]) -> bool:
        """False: too much is waiting, it isn't done."""
        if self._work.qsize() >= MOST_WAITING:
            return False
        self._work.put(work)
        return True

    def end(self) -> None:
        """Of the thread, behind what is waiting."""
        self._work.put(None)

    def knows(self, content: ContentId) -> bool:
        """The tier holds the block, or did so a moment ago."""
        return content in self.tier.shelf and content not in self._forgotten

    def forget(self, contents: Iterable[ContentId]) -> None:
        """Unknown from now on."""
        self._forgotten.update(contents)
        if not self.put(partial(self._drop, contents)):
            self._undropped.append(contents)

    def room(self, count: int, size: int, most: int) -> int:
        """How many of `count` blocks of `size` bytes fit, where `most` bytes may wait; they count as waiting then."""
        with self._changing:
            count = min(count, max(0, most - self.waiting) // size)
            self.waiting += count * size
        return count

    def write(self, contents: Sequence[ContentId], held: Tensor, arrived: torch.cuda.Event | None) -> None:
        """held[n, bytes] uint8 in host memory, once it has arrived; `room` has been asked."""
        if not self.put(partial(self._write, contents, held, arrived)):
            self._wrote(held)

    # -- the thread

    def _run(self) -> None:
        while (work := self._next()) is not None:
            try:
                work()
                while self._undropped:
                    self._drop(self._undropped.popleft())
            except Exception:  # the thread's border: a piece of work is lost, the tier is not
                if not self._failed:
                    logger.exception("KV blocks can't be kept below the cache, they are computed instead; said once")
                self._failed = True

    def _next(self) -> Callable[[], object] | None:
        while True:
            try:
                return self._work.get(timeout=IDLE_S)
            except queue.Empty:
                if isinstance(self.tier, Disk):
                    return self.tier.fit

    def _write(self, contents: Sequence[ContentId], held: Tensor, arrived: torch.cuda.Event | None) -> None:
        try:
            if arrived is not None:
                arrived.synchronize()
            for content, row in zip(contents, held, strict=True):
                if content not in self.tier.shelf:
                    self.tier.write(content, view(row))
        finally:
            self._wrote(held)

    def _wrote(self, held: Tensor) -> None:
        with self._changing:
            self.waiting -= held.numel()

    def _drop(self, contents: Iterable[ContentId]) -> None:
        try:
            for content in contents:
                self.tier.forget(content)
        finally:
            self._forgotten.difference_update(contents)


def view(row: Tensor) -> memoryview:
    """A tensor's bytes."""
    array: Any = row.numpy()
    return memoryview(array)
