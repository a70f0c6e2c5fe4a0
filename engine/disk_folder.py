"""Whose folder is whose: ROOT/FINGERPRINT/COPY/RANK, locked while a process uses it.

FINGERPRINT stands for everything that must be equal for blocks to be exchanged, COPY tells groups that serve the same
model on one node apart. What copies left that don't run any more goes first. ROOT may be anybody's folder: nothing in it
is touched that hasn't got one of our names, below folders that have.
"""

from __future__ import annotations

import contextlib
import fcntl
import math
import os
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

LOCK = "lock"
FINGERPRINT = re.compile("[0-9a-f]{32}")
NUMBER = re.compile("0|[1-9][0-9]{0,5}")
"""Of a copy or a rank."""
PART = re.compile("[0-9a-f]{2}")
BLOCK = re.compile(r"([0-9a-f]{2}){16,24}(\.part)?")
"""A block's file, or one that isn't complete; its first digits are its folder's name. Groups of layers add to a content id."""
MOST_COPIES = 1024
LINGER_S = 2.0
"""So long a rank that was killed may take to let go of its folder."""
PROBE_S = 0.02
"""Who looks whether a folder is locked has locked it for a moment."""
LOOK_S = 60.0
"""What a copy knows of others is no older."""
RESTART_S = 600.0
"""So long the folder of a copy that doesn't run is kept for it where its model is served: it may be starting again."""


class Claim:
    """A folder that is this process's until `close`, or until the process ends however it ends."""

    def __init__(self, root: Path, fingerprint: str, copy: int, rank: int, lock: int) -> None:
        self.copy, self._lock = copy, lock
        self.folder = root / fingerprint / str(copy) / str(rank)
        self.running = 1
        """Copies of this model that use ROOT now, this one too."""
        self._place = root, fingerprint, rank
        self._looked = -math.inf
        self._idle: dict[Path, Idle] = {}
        self._others: list[Idle] = []

    def files(self) -> Iterator[os.DirEntry[str]]:
        """Blocks and unfinished ones in the folder, of which any may be removed; none, where it can't be read."""
        for part in _folders(self.folder, PART):
            with contextlib.suppress(OSError):
                yield from [*_blocks(part)]

    def look(self) -> None:
        """Which copies run, and what those left that don't: for that one rank of a group cares."""
        now = time.monotonic()
        if now < self._looked + LOOK_S:
            return
        self._looked = now
        root, fingerprint, rank = self._place
        idle: dict[Path, Idle] = {}
        self._others = []
        for model in _folders(root, FINGERPRINT) if rank == 0 else [root / fingerprint]:
            copies = [(copy, _runs(copy)) for copy in _folders(model, NUMBER) if _ranks(copy)]
            running = sum(runs for _, runs in copies)
            if model.name == fingerprint:
                self.running = max(1, running)
            for copy in [copy for copy, runs in copies if not runs and rank == 0]:
                with contextlib.suppress(OSError):
                    idle[copy] = self._idle.get(copy) or _measured(copy)
                    if not running or now - idle[copy].since >= RESTART_S:
                        self._others.append(idle[copy])
        self._idle = idle
        self._others.sort(key=lambda other: other.used)

    def make_room(self, free: int) -> None:
        """Remove of what others left, the longest unused first, what takes more than `free` bytes. Raises OSError."""
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
        until = time.monotonic() + (PROBE_S if copy is None else LINGER_S)
        while (lock := _taken(folder)) is None and time.monotonic() < until:
            time.sleep(0.01)
        if lock is not None:
            os.utime(folder / LOCK)
            with contextlib.suppress(OSError):  # not everywhere are there permissions
                os.chmod(folder, 0o700)  # a copy of it or a hand may have opened it: what people said is in these files
            return Claim(root, fingerprint, number, rank, lock)
    return None


@dataclass(frozen=True)
class Idle:
    """What a copy that doesn't run left behind."""

    folder: Path
    used: int
    """ns, of the wall clock."""
    size: int
    since: float = field(default_factory=time.monotonic)
    """When it was first seen not to run."""

    def remove(self) -> None:
        """Our files, and the folders that are empty then; nothing, when somebody uses it again. Raises OSError."""
        ranks = _ranks(self.folder)
        with contextlib.ExitStack() as stack:
            for rank in ranks:
                held = _locked(rank)
                if held is None:
                    return
                stack.callback(os.close, held)
            for rank in ranks:
                for entry in _files(rank):
                    os.unlink(entry.path)
                for part in _folders(rank, PART):
                    _remove_empty(part)
                os.unlink(rank / LOCK)
                _remove_empty(rank)
            _remove_empty(self.folder)
            _remove_empty(self.folder.parent)


def _measured(copy: Path) -> Idle:
    ranks = _ranks(copy)
    size = sum(entry.stat(follow_symlinks=False).st_size for rank in ranks for entry in _files(rank))
    used = max(last_use(rank / LOCK, (rank / LOCK).stat()) for rank in ranks)
    return Idle(copy, used, size)


def last_use(path: str | Path, status: os.stat_result) -> int:
    """Of our file, in ns. What a clock that was ahead dated later than now is dated anew for whoever looks next: it would be
    the last to leave for as long as the clock was ahead."""
    if status.st_mtime_ns > time.time_ns():
        with contextlib.suppress(OSError):
            os.utime(path)
    return status.st_mtime_ns


def _folders(folder: Path, name: re.Pattern[str]) -> list[Path]:
    """Those in it with such a name; none, where that can't be read."""
    with contextlib.suppress(OSError), os.scandir(folder) as entries:
        found = [entry for entry in entries if name.fullmatch(entry.name) and entry.is_dir(follow_symlinks=False)]
        return sorted(folder / entry.name for entry in found)
    return []


def _ranks(copy: Path) -> list[Path]:
    return [rank for rank in _folders(copy, NUMBER) if os.path.isfile(rank / LOCK)]


def _runs(copy: Path) -> bool:
    """A rank of it does; or it is somebody's whose folders we can't have."""
    try:
        locks = [_locked(rank) for rank in _ranks(copy)]
    except OSError:
        return True
    for lock in locks:
        if lock is not None:
            os.close(lock)
    return None in locks


def _files(folder: Path) -> Iterator[os.DirEntry[str]]:
    """Blocks and unfinished ones in a rank's folder."""
    for part in _folders(folder, PART):
        yield from _blocks(part)


def _blocks(part: Path) -> Iterator[os.DirEntry[str]]:
    with os.scandir(part) as entries:
        for entry in entries:
            ours = BLOCK.fullmatch(entry.name) and entry.name.startswith(part.name)
            if ours and entry.is_file(follow_symlinks=False):
                yield entry


def _taken(folder: Path) -> int | None:
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    with contextlib.suppress(FileNotFoundError):  # somebody removed it, as one that isn't used
        return _locked(folder, os.O_CREAT)
    return None


def _locked(folder: Path, flags: int = 0) -> int | None:
    """A descriptor that holds the folder's lock; None: another one does. Raises OSError."""
    lock = os.open(folder / LOCK, os.O_RDWR | os.O_NOFOLLOW | flags, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.fstat(lock).st_nlink:
            return lock
    except BlockingIOError:
        pass
    except OSError:
        os.close(lock)
        raise
    os.close(lock)  # another one has it, or has removed it
    return None


def _remove_empty(folder: Path) -> None:
    with contextlib.suppress(OSError):
        folder.rmdir()
