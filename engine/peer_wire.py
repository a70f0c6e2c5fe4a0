"""What groups say to each other about blocks. A message is two lengths, a JSON object and bytes; nothing in it can run.

A connection begins with MAGIC and the token; who doesn't know it is told nothing. Then comes one message: an `Ask` (rank 0
answers with an `Offer` or a refusal), or a `Get` (any rank answers with pieces, see `channels`).
"""

from __future__ import annotations

import hashlib
import hmac
import json
import socket
import struct
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from kvasir.engine.layout import LayerGroup
from kvasir.engine.parts import Form, Part

MAGIC = b"kvpeer1\n"
LENGTHS = struct.Struct("<II")
MAX_SAID = 1 << 20
MAX_BYTES = 1 << 26
"""Of an Ask: 16 million tokens."""
MAX_NUMBER = 1 << 40
HELLO_S = 5.0
"""So long a connection may take to say what it wants."""


class RefusedError(Exception):
    """The peer doesn't lend, and says why."""


@dataclass(frozen=True)
class Ask:
    """Which blocks a group wants. Content ids depend on the block size: `chain` and tokens say them all."""

    fetch: str
    """The same from each rank of the asking group: they share one lend."""
    mark: bytes
    """Of everything that blocks depend on besides tokens: must be the peer's own."""
    chain: bytes
    """What stands before the first block (`blocks.chain_start`)."""
    tokens: bytes
    """Of the prompt from its start, as they are hashed."""
    block_size: int
    first: int
    """Tokens that the asking group has already."""
    end: int
    """It wants them up to here."""
    groups: tuple[LayerGroup, ...]
    readers: tuple[Part, ...]
    """What each of its ranks keeps."""
    ways: tuple[str, ...]
    """By which it can take them."""
    slabs: int = 1
    """Into so many slabs of layers the blocks may be cut, the first layers first; 1: they come one by one, as wholes."""
    node: str = ""
    """Where it runs (`channels.node`)."""

    def starts(self, end: int) -> list[int]:
        """Tokens from which on each of its groups needs blocks, to go on behind `end` tokens."""
        near = [group.first_seen(end - 1) // self.block_size * self.block_size for group in self.groups]
        return [max(self.first, start) for start in near]

    def firsts(self, end: int, groups: Sequence[Sequence[int]], size: int) -> tuple[int, ...]:
        """The first block, of `size` tokens, of each of the peer's groups of layers: the earliest that a layer in it needs."""
        start_of = {
            layer: start for group, start in zip(self.groups, self.starts(end), strict=True) for layer in group.layers
        }
        return tuple(min(start_of.get(layer, self.first) for layer in layers) // size for layers in groups)


@dataclass(frozen=True)
class Offer:
    """What is lent."""

    lend: int
    end: int
    """Tokens up to which the prompt is covered; a whole number of the asker's blocks."""
    firsts: tuple[int, ...]
    """The first block of each of the peer's layer groups."""
    stop: int
    forms: tuple[Form, ...]
    """Of each rank."""
    addresses: tuple[str, ...]
    way: str
    slabs: tuple[tuple[int, int], ...]
    """Places of the layers in a block, first and behind the last, of what comes one after the other."""


@dataclass(frozen=True)
class Get:
    """The pieces of a lend that one rank wants of another."""

    lend: int
    part: Part
    count: int
    """Items of the lend."""
    way: str


def send(connection: socket.socket, said: Any, data: bytes | memoryview = b"") -> None:
    """One message."""
    text = json.dumps(said, separators=(",", ":")).encode()
    connection.sendall(LENGTHS.pack(len(text), len(data)) + text)
    if data:
        connection.sendall(data)


def receive(connection: socket.socket, most: int = MAX_BYTES) -> tuple[dict[str, Any], bytes]:
    """The next message. ValueError when it isn't one, EOFError at the end."""
    size, more = LENGTHS.unpack(exactly(connection, LENGTHS.size))
    if size > MAX_SAID or more > most:
        raise ValueError(f"a message of {size} and {more} bytes isn't ours")
    try:
        said = json.loads(exactly(connection, size))
    except RecursionError as error:
        raise ValueError("too deep") from error
    if not isinstance(said, dict):
        raise ValueError("no object")
    return said, bytes(exactly(connection, more))


def greet(connection: socket.socket, secret: str) -> None:
    """Show that we belong here."""
    connection.sendall(MAGIC + _token(secret))


def is_greeted(connection: socket.socket, secret: str) -> bool:
    """Whether who connected knows the secret, and says so within HELLO_S in all."""
    said, wanted, until = b"", len(MAGIC) + 32, time.monotonic() + HELLO_S
    while len(said) < wanted:
        connection.settimeout(max(0.001, until - time.monotonic()))
        got = connection.recv(wanted - len(said))
        if not got:
            raise EOFError("the connection was closed")
        said += got
    return hmac.compare_digest(said, MAGIC + _token(secret))


def exactly(connection: socket.socket, count: int) -> bytearray:
    """So many bytes. EOFError when there are fewer."""
    data = bytearray(count)
    fill(connection, memoryview(data))
    return data


def fill(connection: socket.socket, view: memoryview) -> None:
    """Receive straight into `view`."""
    while view:
        got = connection.recv_into(view)
        if not got:
            raise EOFError("the connection was closed")
        view = view[got:]


def encode_ask(ask: Ask) -> tuple[dict[str, Any], bytes]:
    """As `send` takes it."""
    said = {
        "fetch": ask.fetch,
        "mark": ask.mark.hex(),
        "chain": ask.chain.hex(),
        "block_size": ask.block_size,
        "first": ask.first,
        "end": ask.end,
        "groups": [[list(group.layers), group.window, group.chunk] for group in ask.groups],
        "readers": [_part(part) for part in ask.readers],
        "ways": ask.ways,
        "slabs": ask.slabs,
        "node": ask.node,
    }
    return {"ask": said}, ask.tokens


def decode_ask(said: Any, tokens: bytes) -> Ask:
    """ValueError when it isn't one."""
    read = _Reader(said)
    groups = tuple(_group(group) for group in read.list("groups", 256))
    ask = Ask(
        fetch=read.text("fetch"),
        mark=read.hex("mark"),
        chain=read.hex("chain"),
        tokens=tokens,
        block_size=read.number("block_size", 1),
        first=read.number("first"),
        end=read.number("end", 1),
        groups=groups,
        readers=tuple(_parted(part) for part in read.list("readers", 4096)),
        ways=tuple(map(str, read.list("ways", 16))),
        slabs=read.number("slabs", 1),
        node=read.text("node"),
    )
    if len(tokens) % 4 or ask.end > len(tokens) // 4 or ask.first % ask.block_size or ask.first >= ask.end:
        raise ValueError("tokens and range don't fit together")
    return ask


def encode_offer(offer: Offer) -> dict[str, Any]:
    """As `send` takes it."""
    form = offer.forms[0]
    return {
        "offer": {
            "lend": offer.lend,
            "end": offer.end,
            "firsts": offer.firsts,
            "stop": offer.stop,
            "addresses": offer.addresses,
            "way": offer.way,
            "slabs": offer.slabs,
            "parts": [_part(each.part) for each in offer.forms],
            "groups": form.groups,
            "height": form.height,
            "kinds": form.kinds,
            "block_size": form.block_size,
            "slot_bytes": form.slot_bytes,
            "scale_bytes": form.scale_bytes,
        }
    }


def decode_offer(said: Any) -> Offer:
    """RefusedError with the peer's words when it is a refusal, ValueError when it is neither."""
    if isinstance(said, dict) and isinstance(why := said.get("refused"), str):
        raise RefusedError(why[:300])
    read = _Reader(said.get("offer") if isinstance(said, dict) else None)
    groups = tuple(tuple(_numbers(group, 65536)) for group in read.list("groups", 256))
    shape = (read.number("height", 1), read.number("kinds", 1), read.number("block_size", 1))
    sizes = read.number("slot_bytes", 1), read.number("scale_bytes")
    found = tuple(_parted(part) for part in read.list("parts", 4096))
    addresses = tuple(str(address) for address in read.list("addresses", 4096))
    firsts = tuple(_numbers(read.list("firsts", 256), 256))
    if not found or len(addresses) != len(found) or len(firsts) != len(groups):
        raise ValueError("an offer's lists don't fit together")
    forms = tuple(Form(part, groups, *shape, *sizes) for part in found)
    lend, end, stop = read.number("lend", most=1 << 63), read.number("end"), read.number("stop")
    slabs = tuple(_slab(slab) for slab in read.list("slabs", 65536))
    if not slabs or [0, *(stop for _, stop in slabs)] != [*(first for first, _ in slabs), shape[0]]:
        raise ValueError("slabs don't hold all layers, one behind the other")
    return Offer(lend, end, firsts, stop, forms, addresses, read.text("way"), slabs)


def encode_get(get: Get) -> dict[str, Any]:
    """As `send` takes it."""
    return {"get": {"lend": get.lend, "part": _part(get.part), "count": get.count, "way": get.way}}


def decode_get(said: Any) -> Get:
    """ValueError when it isn't one."""
    read = _Reader(said)
    (part,) = [_parted(part) for part in [read.list("part", 4)]]
    return Get(read.number("lend", most=1 << 63), part, read.number("count", 1), read.text("way"))


class _Reader:
    """Values of a JSON object that somebody else wrote."""

    def __init__(self, said: Any) -> None:
        if not isinstance(said, dict):
            raise ValueError("no object")
        self._said = said

    def text(self, name: str) -> str:
        value = self._said.get(name)
        if not isinstance(value, str) or len(value) > 300:
            raise ValueError(f"{name} is no text")
        return value

    def hex(self, name: str) -> bytes:
        return bytes.fromhex(self.text(name))

    def number(self, name: str, least: int = 0, most: int = MAX_NUMBER) -> int:
        value = self._said.get(name)
        if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
            raise ValueError(f"{name} is no number from {least} to {most}")
        return value

    def list(self, name: str, most: int) -> list[Any]:
        value = self._said.get(name)
        if not isinstance(value, list) or len(value) > most:
            raise ValueError(f"{name} is no list")
        return value


def _numbers(value: Any, most: int) -> list[int]:
    if not isinstance(value, list) or len(value) > most:
        raise ValueError("no list")
    if not all(isinstance(n, int) and not isinstance(n, bool) and 0 <= n < MAX_NUMBER for n in value):
        raise ValueError("no numbers")
    return value


def _slab(said: Any) -> tuple[int, int]:
    first, stop = [*_numbers(said, 2), 0, 0][:2]
    if first >= stop:
        raise ValueError("a slab without layers")
    return first, stop


def _part(part: Part) -> Sequence[int]:
    return part.layers.start, part.layers.stop, part.heads.start, part.heads.stop


def _parted(said: Any) -> Part:
    first, last, low, high = [*_numbers(said, 4), *[0] * 4][:4]
    if not (first < last <= 65536 and low < high <= 65536):
        raise ValueError("no layers and heads")
    return Part(range(first, last), range(low, high))


def _group(said: Any) -> LayerGroup:
    if not isinstance(said, list) or len(said) != 3:
        raise ValueError("no layer group")
    window, chunk = (None if value is None else _numbers([value], 1)[0] or 1 for value in said[1:])
    return LayerGroup(tuple(_numbers(said[0], 65536)), window, chunk)


def _token(secret: str) -> bytes:
    return hashlib.sha256(b"kvasir blocks " + secret.encode()).digest()
