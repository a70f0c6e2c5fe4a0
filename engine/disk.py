"""Disk: a rank's blocks as files of a folder that nobody else uses at the time. Bytes only; nothing that is read can run.

A file is a header and the block's bytes. It appears under its name when it is complete, so a process may be killed at any
moment; what a crash of the machine, a bad disk or somebody's hand made of it, the checksum tells.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import shutil
import struct
import threading
import time
import zlib
from array import array
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from kvasir.engine.blocks import ContentId
from kvasir.engine.disk_folder import Claim, last_use
from kvasir.engine.shelf import Shelf

logger = logging.getLogger(__name__)

HEAD = struct.Struct("<8s16s24sI")
"""Magic, fingerprint, content (padded), CRC-32 of fingerprint, content and bytes."""
MAGIC = b"kvblock1"
DEFAULT_BYTES = 50 * 10**9
DEFAULT_SHARE = 0.1
"""Of what is free on the disk, up to DEFAULT_BYTES."""
UNFINISHED = ".part"
PAUSE_S = 30.0
"""After a failed write the disk is left alone for so long."""


class Disk:
    """Blocks of `block_bytes` in a claimed folder. One thread scans and writes, one reads, any asks `in`.

    capacity: bytes; None: DEFAULT_SHARE of what is free, up to DEFAULT_BYTES. `sharers`, ranks of this copy on this node, have
    equal parts of it, and so have all copies of the model that run.
    """

    def __init__(
        self, claim: Claim, fingerprint: bytes, block_bytes: int, capacity: int | None, sharers: int = 1
    ) -> None:
        self._claim, self._fingerprint, self.block_bytes = claim, fingerprint, block_bytes
        self._capacity, self._sharers = capacity, sharers
        self._lock = threading.Lock()
        self._limit = 0
        """Bytes that this rank may hold when no other copy runs."""
        self.shelf = Shelf(0)
        self.stored = self.loaded = self.failed = 0
        """Blocks written and read; those that could not be written, or were bad when they were read."""
        self._paused_until = 0.0

    @property
    def size(self) -> int:
        """Bytes of a block's file."""
        return HEAD.size + self.block_bytes

    def scan(self) -> None:
        """Find what earlier processes left, the least recently used first. What isn't complete goes."""
        times, found = array("q"), list[ContentId]()
        for entry in self._claim.files():
            with contextlib.suppress(OSError):
                status = entry.stat(follow_symlinks=False)
                if status.st_size == self.size and not entry.name.endswith(UNFINISHED):
                    found.append(bytes.fromhex(entry.name))
                    times.append(last_use(entry.path, status))
                else:
                    os.unlink(entry.path)
        self._limit = self._most(len(found) * self.size)
        self._claim.look()
        if self.size > self._limit // self._claim.running:
            small = "--kv-disk-size: no KV blocks are kept in %s: the part of a rank and copy is %d bytes of %s, a block takes %d"
            whole = self._capacity if self._capacity is not None else "10 % of what is free"
            logger.warning(small, self._claim.folder, self._limit // self._claim.running, whole, self.size)
        # Python's sort of a million holds all threads up for seconds
        order = np.argsort(np.array(times), kind="stable")
        with self._lock:
            self.shelf.capacity = self._limit // self._claim.running
            left = [gone for place in order for gone in self.shelf.put(found[place], self.size)]
        self._unlink(left)

    def _most(self, held: int) -> int:
        if self._capacity is not None:
            return self._capacity // self._sharers
        try:
            free = shutil.disk_usage(self._claim.folder).free
        except OSError:
            return 0
        return min(DEFAULT_BYTES, int((free + held * self._sharers) * DEFAULT_SHARE)) // self._sharers

    def write(self, content: ContentId, data: memoryview) -> bool:
        """Keep a block, in place of what is known by its name; what is least worth keeping goes for it. False: the disk
        didn't take it."""
        if self.size > self._limit:
            return False
        if time.monotonic() < self._paused_until:
            self.failed += 1
            return False
        try:
            if not self._make_room():
                return False
            self._store(content, data)
        except OSError as error:
            self._give_up(error)
            return False
        with self._lock:
            self.shelf.put(content, self.size)
        self.stored += 1
        return True

    def fit(self, spare: int = 0) -> None:
        """Give back what is more than this copy's part now, of which `spare` bytes are to be free."""
        self._claim.look()
        with self._lock:
            self.shelf.capacity = self._limit // self._claim.running
            left = self.shelf.shrink(max(0, self.shelf.capacity - spare))
        self._unlink(left)

    def _make_room(self) -> bool:
        """For one more block, of what is this copy's part now. False: that is too small."""
        self.fit(self.size)
        self._claim.make_room(self.shelf.capacity - self.shelf.used - self.size)
        return self.size <= self.shelf.capacity

    def _store(self, content: ContentId, data: memoryview) -> None:
        path = self._path(content)
        path.parent.mkdir(mode=0o700, exist_ok=True)
        head = HEAD.pack(MAGIC, self._fingerprint, content, self._checksum(content, data))
        unfinished = path.with_suffix(UNFINISHED)
        try:
            with open(unfinished, "wb", buffering=0, opener=_private) as file:
                file.write(head)
                if file.write(data) != len(data):
                    raise OSError(errno.ENOSPC, "the disk took a part of a block only")
            os.replace(unfinished, path)
        except OSError:
            with contextlib.suppress(OSError):
                unfinished.unlink()
            raise

    def _give_up(self, error: OSError) -> None:
        """A full disk gets a tenth of ours back; whatever is wrong with it, it is left alone for a while."""
        self.failed += 1
        self._paused_until = time.monotonic() + PAUSE_S
        logger.warning("KV blocks can't be kept in %s, for now they aren't: %s", self._claim.folder, error)
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            with self._lock:
                left = self.shelf.shrink(self.shelf.used * 9 // 10)
            self._unlink(left)

    def read(self, content: ContentId, into: memoryview) -> bool:
        """The block's bytes. False: it isn't there, or it is bad, and then it is forgotten."""
        if content not in self.shelf:
            return False
        head = bytearray(HEAD.size)
        try:
            with open(self._path(content), "rb", buffering=0) as file:
                whole = file.readinto(head) == HEAD.size and file.readinto(into) == len(into) and not file.read(1)
        except OSError as error:
            logger.warning("a KV block can't be read, it is computed instead: %s", error)
            whole = False
        if whole and bytes(head) == HEAD.pack(MAGIC, self._fingerprint, content, self._checksum(content, into)):
            self.loaded += 1
            return True
        self.failed += 1
        self.forget(content)
        return False

    def use(self, contents: Iterable[ContentId], *, again: bool) -> None:
        """They were used, the last one most recently; the next process will know, too. Others' parts grow meanwhile."""
        self.fit()
        with self._lock:
            self.shelf.use(contents, again=again)
        for content in contents:
            if content in self.shelf:
                with contextlib.suppress(OSError):
                    os.utime(self._path(content))

    def forget(self, content: ContentId) -> None:
        """It is of no use."""
        with self._lock:
            known = self.shelf.drop(content)
        if known:
            self._unlink([content])

    def close(self) -> None:
        """Another process may have the folder."""
        self._claim.close()

    def _unlink(self, contents: Iterable[ContentId]) -> None:
        for content in contents:
            with contextlib.suppress(OSError):
                self._path(content).unlink()

    def _path(self, content: ContentId) -> Path:
        name = content.hex()
        return self._claim.folder / name[:2] / name

    def _checksum(self, content: ContentId, data: memoryview) -> int:
        return zlib.crc32(data, zlib.crc32(self._fingerprint + content))


def _private(path: str, flags: int) -> int:
    """What people said to a model is in these files: nobody else reads them."""
    return os.open(path, flags, 0o600)
