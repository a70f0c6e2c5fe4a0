"""Frames: what the ranks of a group tell each other over a connection. Each is its length (4 bytes), its kind (1 byte) and its
content: JSON, or a step or result in `codec`'s form. Nothing that arrives can run."""

from __future__ import annotations

import socket
import struct
from collections.abc import Sequence
from typing import Literal, get_args

Kind = Literal[
    "hello",
    "awake",
    "welcome",
    "ready",
    "step",
    "result",
    "failed",
    "beat",
    "fetched",
    "serve",
    "serving",
    "grammar",
    "spoiled",
    "here",
    "go",
]
KINDS: tuple[Kind, ...] = get_args(Kind)
HEAD = struct.Struct("<IB")
FETCHED = struct.Struct("<qi")
"""Ticket and count: a rank has read so many of the blocks that a step's fetch asked for."""
MAX_FRAME = 1 << 30
BOARD = b"board"
"""What a rank that is ready says when it reads steps from the board."""
BEAT_S = 0.25
"""How often a rank says that it lives."""
SILENCE_S = 10.0
"""A rank that says nothing for this long is lost: its node or its network is gone."""


def receive(connection: socket.socket, limit: int = MAX_FRAME) -> tuple[Kind, bytes]:
    """One frame. EOFError at the connection's end, ValueError when it is no frame of ours."""
    size, kind = HEAD.unpack(_exactly(connection, HEAD.size))
    if size > limit or kind >= len(KINDS):
        raise ValueError(f"a frame of kind {kind} and {size} bytes isn't ours")
    return KINDS[kind], _exactly(connection, size)


def _exactly(connection: socket.socket, count: int) -> bytes:
    data = bytearray(count)
    view = memoryview(data)
    while view:
        try:
            got = connection.recv_into(view)
        except (ConnectionError, TimeoutError) as error:
            raise EOFError(str(error)) from error
        if not got:
            raise EOFError("the connection was closed")
        view = view[got:]
    return bytes(data)


def send(connection: socket.socket, kind: Kind, content: bytes) -> None:
    """One frame."""
    connection.sendall(HEAD.pack(len(content), KINDS.index(kind)) + content)


def encode_tickets(tickets: Sequence[int]) -> bytes:
    """Of fetches, for a frame of its own."""
    return struct.pack(f"<{len(tickets)}q", *tickets)


def decode_tickets(content: bytes) -> Sequence[int]:
    """The same on rank 0."""
    return struct.unpack(f"<{len(content) // 8}q", content)


def tune(connection: socket.socket) -> None:
    """Small frames go out at once, and a node that vanished is noticed."""
    connection.settimeout(None)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    silence = int(SILENCE_S * 1000)  # what was sent has to arrive by then: a kernel tries for 15 minutes
    for name, value in (("TCP_KEEPIDLE", 5), ("TCP_KEEPINTVL", 2), ("TCP_KEEPCNT", 3), ("TCP_USER_TIMEOUT", silence)):
        if hasattr(socket, name):
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
