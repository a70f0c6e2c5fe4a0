"""Tiers: a rank's blocks below its cache: host memory, then a disk. Two threads of their own do all the work.

What a step saves is copied aside and written behind; what a fetch asks for is read and checked before any step needs it.
So no step ever waits for a tier, and a block that a tier hasn't got, or no longer, or wrongly, is computed.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from kvasir.engine.aside import Aside, room_for
from kvasir.engine.blocks import Changes, ContentId, Tier
from kvasir.engine.cache import KVCache
from kvasir.engine.disk import Disk
from kvasir.engine.host import Host
from kvasir.engine.step import Moves

STAGED_BYTES = 1 << 29
"""Host memory for blocks on their way up; as much again for those on their way down."""
SCAN_S = 2.0
"""A start waits no longer for the disk to say what it holds; what it says later is found later."""
FLUSH_S = 20.0
"""An end waits no longer for what is still to be written."""


class Tiers:
    """The rank's thread calls `apply` and `close`; `knows`, `forget` and `counts` any thread.

    on_fetched(ticket, count) is called in a thread of ours for every fetch that wasn't ended before.
    """

    def __init__(self, cache: KVCache, host: Host | None, disk: Disk | None) -> None:
        self._cache, self._host, self._disk = cache, host, disk
        self._tiers: list[Host | Disk] = [tier for tier in (host, disk) if tier is not None]
        self._shelves = [tier.shelf for tier in self._tiers]
        self._bytes = cache.bytes_per_block
        self._aside = Aside(cache.arena.device)
        self.on_fetched: Callable[[int, int], None] = lambda ticket, count: None
        self._behind: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._forgotten: set[ContentId] = set()
        """Of no use, but not dropped yet; each change is one that no other thread can see half of."""
        self._saving = 0
        """Bytes that are still to be written; changed under _changed, like all that follows."""
        self._changed = threading.Condition()
        self._asked: dict[int, Sequence[ContentId]] = {}
        self._staged: dict[int, Tensor] = {}
        self._closing = False
        self._scanned = threading.Event()
        self._threads = [
            threading.Thread(target=work, name=name, daemon=True)
            for work, name in ((self._write, "kvasir-write-behind"), (self._read, "kvasir-read-ahead"))
        ]
        for thread in self._threads:
            thread.start()

    @property
    def most_fetched(self) -> int:
        """Blocks that one fetch may bring."""
        return max(1, STAGED_BYTES // self._bytes)

    def wait_until_scanned(self) -> None:
        """Until what earlier processes left is known, or SCAN_S have passed."""
        self._scanned.wait(SCAN_S)

    def knows(self, content: ContentId) -> bool:
        """A tier holds the block, or did so a moment ago."""
        return content not in self._forgotten and any(content in shelf for shelf in self._shelves)

    def forget(self, contents: Iterable[ContentId]) -> None:
        """These blocks are of no use: unknown from now on, so that whoever computes them saves them again."""
        contents = tuple(contents)
        self._forgotten.update(contents)
        self._behind.put(partial(self._drop, contents))

    def listen(self) -> None:
        """Note what the tiers store and evict from now on, for `drain`."""
        for shelf in self._shelves:
            shelf.listen()

    def drain(self) -> Iterator[tuple[Tier, Changes]]:
        """(tier, what changed in it since the last time), of those where anything did."""
        named: tuple[tuple[Tier, Host | Disk | None], ...] = (("host", self._host), ("disk", self._disk))
        for name, tier in named:
            if tier is not None and (changes := tier.shelf.drain()):
                yield name, changes

    def counts(self) -> dict[str, int]:
        """What the tiers hold and have done, by the names of the scheduler's Stats."""
        found: dict[str, int] = {}
        for name, tier in (("host", self._host), ("disk", self._disk)):
            if tier is not None:
                found |= {f"{name}_bytes": tier.shelf.used, f"{name}_evicted": tier.shelf.evicted}
                found |= {f"{name}_stored": tier.stored, f"{name}_loaded": tier.loaded}
        return found | ({"disk_failed": self._disk.failed} if self._disk is not None else {})

    def apply(self, moves: Moves) -> None:
        """A step's part, behind what it saves. Only copies within memory are done at once."""
        for ticket in dict.fromkeys(ticket for ticket, _, _ in moves.loads):
            mine = [(number, block) for found, number, block in moves.loads if found == ticket]
            if ticket in self._staged:
                self._cache.put([block for _, block in mine], self._staged[ticket], [number for number, _ in mine])
        with self._changed:
            for ticket in moves.ended:
                self._asked.pop(ticket, None)
                self._staged.pop(ticket, None)
            self._asked |= moves.fetches
            self._changed.notify_all()
        for count, contents in moves.used:
            split = len(contents) - count
            self._behind.put(partial(self._use, contents[:split], again=False))
            self._behind.put(partial(self._use, contents[split:], again=True))

    def close(self) -> None:
        """Write what is left to be written, then end."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._behind.put(None)
        for thread in self._threads:
            thread.join(FLUSH_S)
        if self._disk is not None and not any(thread.is_alive() for thread in self._threads):
            self._disk.close()

    def save(self, saves: Sequence[tuple[int, ContentId]]) -> None:
        """Copy blocks aside; when those before them aren't written yet, some are left out."""
        if not saves:
            return
        with self._changed:
            room = max(0, STAGED_BYTES - self._saving) // self._bytes
            saves = saves[:room]
            self._saving += len(saves) * self._bytes
        if saves:
            held, arrived = self._aside.copy(self._cache.read([block for block, _ in saves]))
            self._behind.put(partial(self._keep, [content for _, content in saves], held, arrived))

    # -- the writing thread

    def _write(self) -> None:
        if self._disk is not None:
            self._disk.scan()
        self._scanned.set()
        while (work := self._behind.get()) is not None:
            work()

    def _keep(self, contents: Sequence[ContentId], held: Tensor, arrived: torch.cuda.Event | None) -> None:
        """held[n, bytes] uint8 in host memory, once it has arrived."""
        if arrived is not None:
            arrived.synchronize()
        for content, row in zip(contents, held, strict=True):
            for tier in self._tiers:
                tier.write(content, _view(row))
        with self._changed:
            self._saving -= held.numel()

    def _use(self, contents: Sequence[ContentId], *, again: bool) -> None:
        for tier in self._tiers:
            tier.use(contents, again=again)

    def _drop(self, contents: Iterable[ContentId]) -> None:
        for content in contents:
            for tier in self._tiers:
                tier.forget(content)
        self._forgotten.difference_update(contents)

    # -- any thread

    def read(self, content: ContentId, into: memoryview) -> bool:
        """For another group, from the uppermost tier that has the block. False: it isn't there."""
        return any(tier.read(content, into) for tier in self._tiers)

    # -- the reading thread

    def _read(self) -> None:
        while (found := self._next()) is not None:
            ticket, contents = found
            staged = room_for(len(contents), self._bytes, self._cache.arena.device)
            count = 0
            while count < len(contents) and ticket in self._asked and self._fetch(contents[count], staged[count]):
                count += 1
            with self._changed:
                if self._asked.pop(ticket, None) is not None:
                    self._staged[ticket] = staged
            self.on_fetched(ticket, count)

    def _next(self) -> tuple[int, Sequence[ContentId]] | None:
        """The oldest fetch, once there is room for what it brings; None: the end."""
        with self._changed:
            self._changed.wait_for(lambda: self._closing or (bool(self._asked) and self._has_room()))
            return None if self._closing else next(iter(self._asked.items()))

    def _has_room(self) -> bool:
        wanted = len(next(iter(self._asked.values()))) * self._bytes
        held = sum(staged.numel() for staged in self._staged.values())
        return not held or held + wanted <= STAGED_BYTES

    def _fetch(self, content: ContentId, into: Tensor) -> bool:
        """From the uppermost tier that has the block; host memory gets what comes from the disk."""
        data = _view(into)
        if self._host is not None and self._host.read(content, data):
            return True
        if self._disk is None or not self._disk.read(content, data):
            return False
        if self._host is not None:
            self._host.write(content, data)
        return True


def _view(row: Tensor) -> memoryview:
    array: Any = row.numpy()
    return memoryview(array)
