"""Tiers: a rank's blocks below its cache: host memory, then a disk. Each has a thread that writes and one that reads.

What a step saves is copied aside and written behind; what a fetch asks for is read and checked before any step needs it.
So no step ever waits for a tier, host memory never for the disk, and a block that a tier hasn't got, or no longer, or wrongly,
is computed.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial

from torch import Tensor

from kvasir.engine.aside import Aside, room_for
from kvasir.engine.blocks import Changes, ContentId, Tier
from kvasir.engine.cache import KVCache
from kvasir.engine.disk import Disk
from kvasir.engine.host import Host
from kvasir.engine.lane import Lane, view
from kvasir.engine.step import Moves

logger = logging.getLogger(__name__)

STAGED_BYTES = 1 << 29
"""Host memory for blocks on their way up; as much again for those on their way down. Every tier has an equal part."""
SCAN_S = 2.0
"""A start waits no longer for the disk to say what it holds; what it says later is found later."""
FLUSH_S = 20.0
"""An end waits no longer for what is still to be written."""


class Fetches:
    """Those that one thread answers in their order, changed under the tiers' lock."""

    def __init__(self) -> None:
        self.asked: dict[int, Sequence[ContentId]] = {}
        """ticket -> contents, of those that nobody reads yet."""
        self.reading: int | None = None
        """The ticket that is being read, None when nobody waits for it any more."""
        self.staged: dict[int, Tensor] = {}
        """ticket -> what came."""

    def room(self, size: int, most: int) -> bool:
        """Whether there is room for what the oldest brings, blocks of `size` bytes."""
        if not self.asked:
            return False
        wanted = len(next(iter(self.asked.values()))) * size
        held = sum(staged.numel() for staged in self.staged.values())
        return not held or held + wanted <= most


class Tiers:
    """The rank's thread calls `apply` and `close`; `knows`, `forget` and `counts` any thread.

    on_fetched(ticket, count) is called for every fetch, in a thread of ours or, of those that ended unread, in the rank's.
    """

    def __init__(self, cache: KVCache, host: Host | None, disk: Disk | None) -> None:
        self._cache, self._host, self._disk = cache, host, disk
        self._tiers: list[Host | Disk] = [tier for tier in (host, disk) if tier is not None]
        self._bytes = cache.bytes_per_block
        self._aside = Aside(cache.arena.device)
        self.on_fetched: Callable[[int, int], None] = lambda ticket, count: None
        self._changed = threading.Condition()
        """Fetches and _closing change under it."""
        self._closing = self._failed = False
        self._scanned = threading.Event()
        self._lanes = [Lane(tier) for tier in self._tiers]
        self._lanes[-1].put(self._scan)
        self._fetches = [Fetches() for _ in self._tiers]
        """Of the first tier what it has whole, of the last all else."""
        readers = [
            threading.Thread(target=self._read, args=(fetches,), name="kvasir-read-ahead", daemon=True)
            for fetches in self._fetches
        ]
        for thread in readers:
            thread.start()
        self._threads = [*readers, *(lane.thread for lane in self._lanes)]

    @property
    def _part(self) -> int:
        return STAGED_BYTES // len(self._tiers)

    @property
    def most_fetched(self) -> int:
        """Blocks that one fetch may bring."""
        return max(1, self._part // self._bytes)

    def wait_until_scanned(self) -> None:
        """Until what earlier processes left is known, or SCAN_S have passed."""
        self._scanned.wait(SCAN_S)

    def knows(self, content: ContentId) -> bool:
        """A tier holds the block, or did so a moment ago."""
        return any(lane.knows(content) for lane in self._lanes)

    def has_at_hand(self, content: ContentId) -> bool:
        """The same of host memory, which never keeps anyone waiting."""
        return self._host is not None and self._lanes[0].knows(content)

    def forget(self, contents: Iterable[ContentId]) -> None:
        """These blocks are of no use: unknown from now on, so that whoever computes them saves them again."""
        contents = tuple(contents)
        for lane in self._lanes:
            lane.forget(contents)

    def listen(self) -> None:
        """Note what the tiers store and evict from now on, for `drain`."""
        for tier in self._tiers:
            tier.shelf.listen()

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
        staged = {ticket: rows for fetches in self._fetches for ticket, rows in fetches.staged.copy().items()}
        for ticket in dict.fromkeys(ticket for ticket, _, _ in moves.loads):
            mine = [(number, block) for found, number, block in moves.loads if found == ticket]
            if ticket in staged:
                self._cache.put([block for _, block in mine], staged[ticket], [number for number, _ in mine])
        with self._changed:
            unread = [ticket for ticket in moves.ended if self._end(ticket)]
            for ticket, contents in moves.fetches:
                at_hand = all(map(self.has_at_hand, contents))
                self._fetches[0 if at_hand else -1].asked[ticket] = contents
            self._changed.notify_all()
        for ticket in unread:
            self.on_fetched(ticket, 0)
        for count, contents in moves.used:
            for lane in self._lanes:
                lane.put(partial(self._use, lane.tier, count, contents))

    def _end(self, ticket: int) -> bool:
        """Nobody waits for it any more. True: it hadn't been begun, and nobody will."""
        unread = False
        for fetches in self._fetches:
            unread |= fetches.asked.pop(ticket, None) is not None
            fetches.staged.pop(ticket, None)
            if fetches.reading == ticket:
                fetches.reading = None
        return unread

    def close(self) -> None:
        """Write what is left to be written, then end."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        for lane in self._lanes:
            lane.end()
        until = time.monotonic() + FLUSH_S
        for thread in self._threads:
            thread.join(max(0, until - time.monotonic()))
        if self._disk is not None and not any(thread.is_alive() for thread in self._threads):
            self._disk.close()

    def save(self, saves: Sequence[tuple[int, ContentId]]) -> None:
        """Copy blocks aside; a tier for which those before them still wait is left out of some."""
        rooms = [lane.room(len(saves), self._bytes, self._part) for lane in self._lanes]
        saves = saves[: max(rooms)]
        if not saves:
            return
        held, arrived = self._aside.copy(self._cache.read([block for block, _ in saves]))
        contents = [content for _, content in saves]
        for lane, room in zip(self._lanes, rooms, strict=True):
            if room:
                lane.write(contents[:room], held[:room], arrived)

    # -- the writing threads

    def _scan(self) -> None:
        try:
            if self._disk is not None:
                self._disk.scan()
        finally:
            self._scanned.set()

    def _use(self, tier: Host | Disk, count: int, contents: Sequence[ContentId]) -> None:
        split = len(contents) - count
        tier.use(contents[:split], again=False)
        tier.use(contents[split:], again=True)

    # -- any thread

    def read(self, content: ContentId, into: memoryview) -> bool:
        """For another group, from the uppermost tier that has the block. False: it isn't there."""
        return any(tier.read(content, into) for tier in self._tiers)

    # -- the reading threads

    def _read(self, fetches: Fetches) -> None:
        while (found := self._next(fetches)) is not None:
            ticket, contents = found
            last = self._fetches[-1]
            count, staged = 0, None
            try:
                staged = room_for(len(contents), self._bytes, self._cache.arena.device)
                disk = self._disk if fetches is last else None
                while (
                    count < len(contents)
                    and fetches.reading == ticket
                    and self._fetch(contents[count], staged[count], disk)
                ):
                    count += 1
            except Exception:  # the thread's border: what a fetch doesn't bring is computed
                if not self._failed:
                    logger.exception(
                        "KV blocks can't be read from below the cache, they are computed instead; said once"
                    )
                self._failed = True
            with self._changed:
                wanted, fetches.reading = fetches.reading == ticket, None
                left_memory = wanted and count < len(contents) and fetches is not last
                if left_memory:  # since it was asked: the disk may have it
                    last.asked[ticket] = contents
                    self._changed.notify_all()
                elif wanted and staged is not None:
                    fetches.staged[ticket] = staged
            if not left_memory:
                self.on_fetched(ticket, count)

    def _next(self, fetches: Fetches) -> tuple[int, Sequence[ContentId]] | None:
        """The oldest fetch, once there is room for what it brings; None: the end."""
        with self._changed:
            self._changed.wait_for(lambda: self._closing or fetches.room(self._bytes, self._part))
            if self._closing:
                return None
            fetches.reading = next(iter(fetches.asked))
            return fetches.reading, fetches.asked.pop(fetches.reading)

    def _fetch(self, content: ContentId, into: Tensor, disk: Disk | None) -> bool:
        """From the uppermost tier that has the block; host memory gets what comes from the disk."""
        data = view(into)
        if self._host is not None and self._host.read(content, data):
            return True
        if disk is None or not disk.read(content, data):
            return False
        if self._host is not None:
            self._host.write(content, data)
        return True
