"""Whose folder is whose: ROOT/FINGERPRINT/COPY/RANK, locked while a process uses it.

FINGERPRINT stands for everything that must be equal for blocks to be exchanged, COPY tells groups that serve the same
model on one node apart. Folders of other fingerprints, models that aren't served any more, are what goes first.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

LOCK = "lock"
MOST_COPIES = 1024
LINGER_S = 2.0
"""So long a rank that was killed may take to let go of its folder."""


class Claim:
    """A folder that is this process's until `close`, or until the process ends however it ends."""

    def __init__(self, root: Path, fingerprint: str, copy: int, rank: int, lock: int) -> None:
        self.copy, self._lock = copy, lock
        self.folder = root / fingerprint / str(copy) / str(rank)
        self._place = root, fingerprint, rank
        self._others: list[Abandoned] = []

    def files(self) -> list[os.DirEntry[str]]:
        """What lies in the folder's parts; nothing, where that can't be read."""
        with contextlib.suppress(OSError):
            return [*_files(self.folder)]
        return []

    def find_abandoned(self) -> None:
        """What models that aren't served any more left: one rank of a group cares for it."""
        root, fingerprint, rank = self._place
        with contextlib.suppress(OSError):
            self._others = _abandoned(root, fingerprint) if rank == 0 else []

    def make_room(self, free: int) -> None:
        """Remove of that what takes more than `free` bytes."""
        while self._others and sum(other.size for other in self._others) > free:
            self._others.pop(0).remove()

    def close(self) -> None:
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1


def claim(root: Path, fingerprint: str, rank: int, copy: int | None = None) -> Claim | None:
    """The folder of this rank, of this copy or else the first that is free; None: somebody has it. Raises OSError."""
    for number in range(MOST_COPIES) if copy is None else (copy,):
        folder = root / fingerprint / str(number) / str(rank)
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        lock = _locked(folder)
        until = time.monotonic() + (0 if copy is None else LINGER_S)
        while lock is None and time.monotonic() < until:
            time.sleep(0.05)
            lock = _locked(folder)
        if lock is not None:
            os.utime(folder / LOCK)
            return Claim(root, fingerprint, number, rank, lock)
    return None


@dataclass(frozen=True)
class Abandoned:
    """What a model that isn't served now left behind."""

    used: float
    folder: Path
    size: int

    def remove(self) -> None:
        """Unless somebody uses it again."""
        with contextlib.ExitStack() as stack:
            for lock in sorted(self.folder.glob(f"*/*/{LOCK}")):
                held = _locked(lock.parent)
                if held is None:
                    return
                stack.callback(os.close, held)
            shutil.rmtree(self.folder, ignore_errors=True)


def _abandoned(root: Path, own: str) -> list[Abandoned]:
    """The longest unused first."""
    found = []
    for folder in root.iterdir():
        locks = [*folder.glob(f"*/*/{LOCK}")] if folder.name != own else []
        if locks and not any(map(_is_locked, locks)):
            size = sum(entry.stat(follow_symlinks=False).st_size for lock in locks for entry in _files(lock.parent))
            found.append(Abandoned(max(lock.stat().st_mtime for lock in locks), folder, size))
    return sorted(found, key=lambda other: other.used)


def _files(folder: Path) -> Iterator[os.DirEntry[str]]:
    for part in os.scandir(folder):
        if part.is_dir(follow_symlinks=False):
            yield from os.scandir(part.path)


def _locked(folder: Path) -> int | None:
    """A descriptor that holds the folder's lock; None: another one does."""
    lock = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        return None
    return lock


def _is_locked(lock: Path) -> bool:
    held = _locked(lock.parent)
    if held is not None:
        os.close(held)
    return held is None
