"""Channels: the ways by which pieces of blocks go from one rank to another of another group.

All start on the connection on which the reader asked (`peer_wire.Get`), and end with it. Every piece has a checksum. `tcp`
sends pieces out of the memory where they lie and receives them where they are wanted; `shm`, on one node, hands over the
memory itself; `gloo` and `nccl` send tensors by torch.distributed; `nixl` reads the lender's memory (`nixl_channel`).
"""

from __future__ import annotations

import json
import math
import mmap
import os
import socket
import struct
import sys
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from kvasir.engine.blocks import ContentId
from kvasir.engine.parts import Form, Part
from kvasir.engine.peer_wire import LENGTHS, MAX_SAID, exactly, fill, receive, send

FRAME = struct.Struct("<III")
"""Number of the item, bytes, CRC-32; 0 bytes: it isn't there any more, and nothing follows."""
SLOW_S = 5.0
"""Who takes, or gives, nothing for so long is cut off."""
TOGETHER = 256 << 10
"""Bytes that go out in one call to the system."""
IOVECS = 512
"""Pieces of memory in one call to the system, which takes 1024."""


class BadPieceError(Exception):
    """What came isn't what was sent."""


class Memory:
    """Memory that another process may map: by its descriptor, which is closed with the last use of this."""

    def __init__(self, size: int) -> None:
        self.fd = os.memfd_create("kvasir-kv")
        os.ftruncate(self.fd, size)

    def __del__(self) -> None:
        os.close(self.fd)


@dataclass
class Portion:
    """Items of a lend, that lie in memory behind each other: rows[n, block bytes] uint8, from item `first` on."""

    first: int
    rows: Tensor
    groups: Sequence[int]
    """The layer group of each item."""
    form: Form
    """Of the rows: they may hold some layers alone."""
    memory: Memory | None = None
    """Where the rows lie, if another process may have that."""
    below: Sequence[tuple[int, ContentId]] = ()
    """Rows that are still to be read from the tiers."""
    arrived: torch.cuda.Event | None = None
    """The rows are there when a GPU has copied them."""
    places: Sequence[int] | None = None
    """Set: `rows` hold only these yet."""
    good: int = -1
    """So many rows are there; -1: not known yet."""
    sums: dict[int, int] = field(default_factory=dict)

    def pieces(self, place: int, part: Part) -> list[memoryview]:
        """What `part` names of a row, in pieces that lie together; none where it has nothing."""
        return [view(piece) for piece in self.form.piece(self.rows[place], self.groups[place], part)]


@dataclass(frozen=True)
class Wanted:
    """What a reader wants of each item: `part` of it. take(number, part, piece) gets what came; into(number, part) says where it
    may lie at once. groups: of each item; forms: of the slabs of layers that they come in, each as many items."""

    forms: Sequence[Form]
    part: Part
    groups: Sequence[int]
    take: Callable[[int, Part, Tensor], None]
    into: Callable[[int, Part], Tensor | None]

    def form(self, number: int) -> Form:
        """Of the item."""
        return self.forms[number * len(self.forms) // len(self.groups)]

    def size(self, number: int) -> int:
        """Bytes of the item's piece; 0: this rank has none."""
        slab, group = number * len(self.forms) // len(self.groups), self.groups[number]
        return self._sizes[slab][group]

    @cached_property
    def _sizes(self) -> list[list[int]]:
        return [
            [math.prod(form.piece_shape(group, self.part)) for group in range(len(form.groups))] for form in self.forms
        ]


class Channel(Protocol):
    """One way. `lend` ends early when a portion does; `borrow` returns how many items came, all of them good."""

    def lend(self, connection: socket.socket, portions: Iterator[Portion], part: Part) -> int: ...
    def borrow(self, connection: socket.socket, wanted: Wanted) -> int: ...


class Tcp:
    """Frames on the connection itself."""

    def lend(self, connection: socket.socket, portions: Iterator[Portion], part: Part) -> int:
        count = 0
        for portion in portions:
            together, held = list[memoryview](), 0
            for place, group in enumerate(portion.groups):
                number, size = portion.first + place, math.prod(portion.form.piece_shape(group, part))
                if not size:
                    continue
                if place >= portion.good:
                    send_all(connection, [*together, memoryview(FRAME.pack(number, 0, 0))])
                    return count
                pieces = portion.pieces(place, part)
                together += [memoryview(FRAME.pack(number, size, crc(pieces))), *pieces]
                held, count = held + size, count + 1
                if held >= TOGETHER:
                    send_all(connection, together)
                    together, held = [], 0
            send_all(connection, together)
        return count

    def borrow(self, connection: socket.socket, wanted: Wanted) -> int:
        for number in range(len(wanted.groups)):
            if not (size := wanted.size(number)):
                continue
            found, length, checksum = FRAME.unpack(exactly(connection, FRAME.size))
            if (found, length) == (number, 0):
                return number
            if (found, length) != (number, size):
                raise BadPieceError(f"item {found} of {length} bytes came instead of {number} of {size}")
            target = wanted.into(number, wanted.part)
            piece = torch.empty(size, dtype=torch.uint8) if target is None else target
            fill(connection, view(piece))
            if crc([view(piece)]) != checksum:
                raise BadPieceError(f"the checksum of item {number} is wrong")
            if target is None:
                wanted.take(number, wanted.part, piece)
        return len(wanted.groups)


class Shm:
    """The portions' own memory, by its descriptor, over a Unix socket. The reader says when it has read one."""

    def lend(self, connection: socket.socket, portions: Iterator[Portion], part: Part) -> int:
        count = 0
        for portion in portions:
            assert portion.memory is not None, "portions for another node can't be mapped"
            for place in range(portion.good):
                portion.sums.setdefault(place, crc([view(portion.rows[place])]))
            said = {
                "first": portion.first,
                "count": len(portion.groups),
                "sums": [portion.sums[n] for n in range(portion.good)],
            }
            text = json.dumps(said).encode()
            socket.send_fds(connection, [LENGTHS.pack(len(text), 0)], [portion.memory.fd])
            connection.sendall(text)
            exactly(connection, 1)
            count += portion.good
            if portion.good < len(portion.groups):
                break
        return count

    def borrow(self, connection: socket.socket, wanted: Wanted) -> int:
        done = 0
        while done < len(wanted.groups):
            lengths, fds, _, _ = socket.recv_fds(connection, LENGTHS.size, 1)
            try:
                if not lengths:
                    raise EOFError("the connection was closed")
                length, _ = LENGTHS.unpack(lengths + exactly(connection, LENGTHS.size - len(lengths)))
                if length > MAX_SAID or len(fds) != 1:
                    raise BadPieceError("a portion came without its memory")
                said = json.loads(exactly(connection, length))
                first, count, sums = said["first"], said["count"], said["sums"]
                if first != done or not 0 <= len(sums) <= count <= len(wanted.groups) - first:
                    raise BadPieceError(f"items {first} to {first + count} came instead of {done}")
                if sums:
                    self._read(fds[0], wanted, first, sums)
            finally:
                for fd in fds:
                    os.close(fd)
            connection.sendall(b"1")
            done += len(sums)
            if len(sums) < count:
                break
        return done

    @staticmethod
    def _read(fd: int, wanted: Wanted, first: int, sums: Sequence[int]) -> None:
        size = wanted.form(first).block_bytes
        if os.fstat(fd).st_size < len(sums) * size:
            raise BadPieceError("a portion's memory is too small")
        memory = mmap.mmap(fd, len(sums) * size, mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_WRITE)
        rows = torch.frombuffer(memory, dtype=torch.uint8).view(len(sums), size)  # torch takes none that is read-only
        for place, checksum in enumerate(sums):
            take_row(wanted, first + place, rows[place], checksum)


class Distributed:
    """Whole rows by torch.distributed's send and receive, between two ranks that meet for this: gloo's on a CPU, NCCL's on a
    GPU, and nothing else differs."""

    def __init__(self, device: torch.device, host: str, timeout_s: float) -> None:
        self._device, self._host, self._timeout_s = device, host, timeout_s

    def lend(self, connection: socket.socket, portions: Iterator[Portion], part: Part) -> int:
        from kvasir.engine.mesh import host_store, process_group

        store, port = host_store(self._host, 2, self._timeout_s)
        send(connection, {"store": [self._host, port]})
        group = process_group(store, 0, 2, self._device, self._host, self._timeout_s)
        count = 0
        try:
            for portion in portions:
                rows = portion.rows[: portion.good].to(self._device)
                send(connection, {"count": len(portion.groups), "sums": total(rows)})
                if len(rows):
                    group.send([rows], 1, 0).wait()
                count += portion.good
                if portion.good < len(portion.groups):
                    break
            exactly(connection, 1)
        finally:
            group.abort()
        return count

    def borrow(self, connection: socket.socket, wanted: Wanted) -> int:
        from kvasir.engine.mesh import process_group, reach_store

        said, _ = receive(connection, 0)
        host, port = said["store"]
        store = reach_store(str(host), int(port), 2, self._timeout_s)
        group = process_group(store, 1, 2, self._device, connection.getsockname()[0], self._timeout_s)
        done = 0
        try:
            while done < len(wanted.groups):
                said, _ = receive(connection, 0)
                sums, count = said["sums"], said["count"]
                if not 0 <= len(sums) <= count <= len(wanted.groups) - done:
                    raise BadPieceError(f"{count} items came where {len(wanted.groups) - done} are left")
                rows = torch.empty(len(sums), wanted.form(done).block_bytes, dtype=torch.uint8, device=self._device)
                if len(rows):
                    group.recv([rows], 0, 0).wait()
                if total(rows) != sums:
                    raise BadPieceError(f"the checksum of an item from {done} on is wrong")
                for place, row in enumerate(rows.cpu()):
                    take_row(wanted, done + place, row, None)
                done += len(sums)
                if len(sums) < count:
                    break
            connection.sendall(b"1")
        finally:
            group.abort()
        return done


def take_row(wanted: Wanted, number: int, row: Tensor, checksum: int | None) -> None:
    """A whole row[block bytes] of the other rank. BadPieceError when its checksum is wrong."""
    if not wanted.size(number):
        return
    if checksum is not None and crc([view(row)]) != checksum:
        raise BadPieceError(f"the checksum of item {number} is wrong")
    pieces = wanted.form(number).piece(row, wanted.groups[number], wanted.part)
    piece = pieces[0] if len(pieces) == 1 else torch.cat(pieces)
    target = wanted.into(number, wanted.part)
    if target is None:
        wanted.take(number, wanted.part, piece)
    else:
        target.copy_(piece)


def channel_of(way: str, device: torch.device, host: str) -> Channel:
    """ValueError when there is no such way."""
    if way == "tcp":
        return Tcp()
    if way == "shm":
        return Shm()
    if way in ("gloo", "nccl"):
        return Distributed(device if way == "nccl" else torch.device("cpu"), host, SLOW_S)
    if way == "nixl":
        from kvasir.engine.nixl_channel import Nixl

        return Nixl(device)
    raise ValueError(f"there is no way {way!r:.40}")


def new_rows(count: int, size: int, *, shared: bool) -> tuple[Tensor, Memory | None]:
    """(rows[count, size] uint8 in host memory, that memory if another process shall have it)"""
    if not shared:
        return torch.empty(count, size, dtype=torch.uint8), None
    memory = Memory(count * size)
    mapped = mmap.mmap(memory.fd, count * size)
    return torch.frombuffer(mapped, dtype=torch.uint8).view(count, size), memory


@cache
def node() -> str:
    """Tells this machine from others, where processes can share memory; empty: they can't here."""
    path = Path("/proc/sys/kernel/random/boot_id")
    known = sys.platform == "linux" and hasattr(os, "memfd_create") and path.exists()
    return path.read_text().strip() if known else ""


def unix_name(address: str) -> str:
    """Where a rank that listens at `address` does so for its own node (an abstract Unix socket)."""
    return f"\0kvasir-kv-{address}"


def view(row: Tensor) -> memoryview:
    """The bytes of row[n] uint8, in host memory."""
    array: Any = row.numpy()
    return memoryview(array)


def crc(pieces: Sequence[memoryview]) -> int:
    """CRC-32 of the pieces behind each other."""
    found = 0
    for piece in pieces:
        found = zlib.crc32(piece, found)
    return found


def total(rows: Tensor) -> list[int]:
    """A sum per row[n, bytes], wherever the rows are."""
    words = rows.view(torch.int32) if rows.shape[1] % 4 == 0 else rows
    found: list[int] = words.sum(dim=1, dtype=torch.int64).tolist()
    return found


def send_all(connection: socket.socket, pieces: list[memoryview]) -> None:
    """All pieces, straight from where they lie."""
    while pieces:
        sent = connection.sendmsg(pieces[:IOVECS])
        while pieces and sent >= len(pieces[0]):
            sent -= len(pieces.pop(0))
        if sent:
            pieces[0] = pieces[0][sent:]
