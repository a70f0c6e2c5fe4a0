"""Links: a TCP connection between every two ranks of a stage that isn't all on one node, for CPU tensors.

A sum of 8 x 2048 bfloat16 over two ranks of one machine takes gloo 260 us (three threads hand it on in each process) and
the same bytes over a connection of our own 50 us; a step of a small model makes dozens. gloo keeps what is large and goes
to many. GPUs don't come here: NCCL does all of theirs.
"""

from __future__ import annotations

import hashlib
import hmac
import socket
import struct
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

CHUNK = 1 << 16
"""What every system's socket buffers hold: a rank sends so much before it reads, so no two wait for each other."""

ONE_SHOT_BYTES = 1 << 18
"""Up to here 3 ranks or more send their whole tensors to each other; beyond, gloo's ring sends fewer bytes."""


class Links:
    """Connections of rank `own` of `size`, who all know `secret`. RuntimeError when another rank is gone or silent for
    `timeout_s`."""

    def __init__(self, store: Any, own: int, size: int, host: str, timeout_s: float, secret: str) -> None:
        token = hashlib.sha256(secret.encode()).digest()
        self.own, self.size = own, size
        self._peers: dict[int, socket.socket] = {}
        with socket.create_server((host, 0), backlog=size) as listener:
            listener.settimeout(timeout_s)
            self._host = host
            store.set(f"link {own}", f"{host}:{listener.getsockname()[1]}")
            for rank in range(own):  # higher ranks connect to lower ones
                where, _, port = store.get(f"link {rank}").decode().rpartition(":")
                self._peers[rank] = connection = _connected(where, int(port), timeout_s, f"rank {own} to rank {rank}")
                connection.sendall(token + bytes([own]))
            while len(self._peers) < size - 1:
                self._accept(listener, token)
        for connection in self._peers.values():
            _tune(connection, timeout_s)

    def takes(self, x: Tensor) -> bool:
        """Whether `sum` is faster than gloo's."""
        return self.size == 2 or x.nbytes <= ONE_SHOT_BYTES

    def sum(self, x: Tensor) -> Tensor:
        """The sum of every rank's x; all have the same shape and dtype, and get the same bits."""
        parts = [x if rank == self.own else torch.empty_like(x) for rank in range(self.size)]
        self._exchange([x] * self.size, parts)
        return _total(parts)

    def scatter_sum(self, x: Tensor) -> Tensor:
        """x[size * R, M] -> [R, M]: this rank's rows of the sum."""
        sent = x.chunk(self.size)
        parts = [part if rank == self.own else torch.empty_like(part) for rank, part in enumerate(sent)]
        self._exchange(sent, parts)
        return _total(parts)

    def gather_rows(self, x: Tensor) -> Tensor:
        """x[R, M] -> [size * R, M]: every rank's rows, by rank."""
        whole = x.new_empty(len(x) * self.size, *x.shape[1:])
        parts = whole.chunk(self.size)
        parts[self.own].copy_(x)
        self._exchange([x] * self.size, parts)
        return whole

    def _exchange(self, sent: Sequence[Tensor], received: Sequence[Tensor]) -> None:
        """sent[r] goes to rank r, whose tensor of the same size comes into received[r]."""
        views = [(connection, _bytes(sent[rank]), _bytes(received[rank])) for rank, connection in self._peers.items()]
        for start in range(0, sent[0].nbytes, CHUNK):
            part = slice(start, start + CHUNK)
            try:
                for connection, own, _ in views:
                    connection.sendall(own[part])
                for connection, _, view in views:
                    _read(connection, view[part])
            except OSError as error:
                raise RuntimeError(_why(error)) from error

    def gather(self, x: Tensor) -> Sequence[Tensor]:
        """Every rank's x, by rank, on rank 0; nothing on the others. All have the same shape and dtype."""
        try:
            if self.own:
                self._peers[0].sendall(_bytes(x))
                return []
            found = [x, *(torch.empty_like(x) for _ in range(1, self.size))]
            for rank, connection in self._peers.items():
                _read(connection, _bytes(found[rank]))
        except OSError as error:
            raise RuntimeError(_why(error)) from error
        return found

    def abort(self) -> None:
        """Any thread: whoever waits here gets an error."""
        for connection in self._peers.values():
            try:
                connection.shutdown(socket.SHUT_RDWR)
            except OSError:  # the other end was faster
                continue

    def close(self) -> None:
        """Nobody uses it any longer."""
        for connection in self._peers.values():
            connection.close()

    def _accept(self, listener: socket.socket, token: bytes) -> None:
        try:
            connection, _ = listener.accept()
        except TimeoutError as error:
            missing = ", ".join(str(rank) for rank in range(self.own + 1, self.size) if rank not in self._peers)
            raise RuntimeError(
                f"rank {missing} of the stage didn't connect to rank {self.own} on {self._host}"
            ) from error
        connection.settimeout(5.0)
        hello = bytearray(len(token) + 1)
        try:
            _read(connection, memoryview(hello))
        except OSError:
            connection.close()
            return
        if hmac.compare_digest(bytes(hello[:-1]), token) and hello[-1] not in self._peers:
            self._peers[hello[-1]] = connection
        else:
            connection.close()


def _total(parts: Sequence[Tensor]) -> Tensor:
    """In the order of the ranks: the same bits everywhere."""
    total = parts[0] + parts[1]
    for part in parts[2:]:
        total += part
    return total


def _connected(host: str, port: int, timeout_s: float, which: str) -> socket.socket:
    try:
        return socket.create_connection((host, port), timeout_s)
    except OSError as error:
        raise RuntimeError(f"no connection from {which} of the stage at {host}:{port}: {error}") from error


def _bytes(x: Tensor) -> memoryview:
    return memoryview(x.view(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]


def _read(connection: socket.socket, view: memoryview) -> None:
    while view:
        got = connection.recv_into(view)
        if not got:
            raise ConnectionResetError("the connection was closed")
        view = view[got:]


def _tune(connection: socket.socket, timeout_s: float) -> None:
    """The system's own time limit: Python's would cost a further call per exchange."""
    connection.settimeout(None)
    limit = struct.pack("ll", int(timeout_s), int(timeout_s % 1 * 1e6))
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, limit)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, limit)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


def _why(error: OSError) -> str:
    if isinstance(error, BlockingIOError):
        return "timed out: another rank of the stage says nothing"
    return f"another rank of the stage is gone: {error}"
