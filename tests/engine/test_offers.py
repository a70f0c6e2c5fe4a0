"""Whatever a peer offers, and sends, a fetch ends: with blocks that are right, or with none."""

from __future__ import annotations

import contextlib
import json
import queue
import socket
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from fuzzing import examples
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from kvasir.engine.blocks import token_bytes
from kvasir.engine.channels import FRAME, crc, send_all, view
from kvasir.engine.layout import LayerGroup
from kvasir.engine.parts import Form, Part, items
from kvasir.engine.peer_wire import Offer, decode_get, encode_offer, exactly, is_greeted, receive, send
from kvasir.engine.puller import Puller
from kvasir.engine.step import Pull

LAYERS, HEADS, SLOT, TOKENS, FIRST, END = 4, 2, 4, 120, 16, 96
GROUPS = (LayerGroup((0, 2)), LayerGroup((1, 3), window=40))
WHOLE = Part(range(LAYERS), range(HEADS))
FORM = Form(WHOLE, tuple(group.layers for group in GROUPS), 2, 2, 8, SLOT)


def said(block: int, layers: list[int], heads: range, block_size: int) -> Tensor:
    """[layers, kinds, heads, head bytes] as every peer has them."""
    slots = torch.arange(block * block_size, (block + 1) * block_size).view(1, 1, 1, -1, 1)
    here = torch.tensor(layers).view(-1, 1, 1, 1, 1) * 50 + torch.tensor([*heads]).view(1, 1, -1, 1, 1) * 11
    found = slots + here + torch.arange(2).view(1, -1, 1, 1, 1) * 5 + torch.arange(SLOT)
    return (found % 251).to(torch.uint8).flatten(3)


def honest(block_size: int, groups: tuple[tuple[int, ...], ...], parts: list[Part], slabs: int) -> dict[str, Any]:
    """What a group that is cut like this offers of tokens FIRST to END."""
    seen = {0: FIRST, 2: FIRST, 1: 56, 3: 56}  # a row at 95 sees 40 tokens, the first of them in the block from 56 on
    firsts = tuple(min(seen[layer] for layer in group) // block_size for group in groups)
    height = max(map(len, groups))
    forms = tuple(Form(part, groups, height, 2, block_size, SLOT) for part in parts)
    edges = ((0, height),) if slabs == 1 else tuple((n, n + 1) for n in range(height))
    addresses = ("",) * len(parts)
    return encode_offer(Offer(5, END, firsts, -(-END // block_size), forms, addresses, "tcp", edges))["offer"]


SPLIT = [Part(range(2), range(HEADS)), Part(range(2, 4), range(1)), Part(range(2, 4), range(1, 2))]
OFFERS = [
    honest(size, groups, parts, slabs)
    for size, groups, parts, slabs in [
        (8, FORM.groups, [WHOLE], 1),
        (8, FORM.groups, [WHOLE], 2),
        (40, ((0, 1, 2, 3),), [WHOLE], 1),
        (4, ((3,), (0,), (1,), (2,)), SPLIT, 1),
        (16, ((0, 2), (1, 3)), SPLIT, 2),
    ]
]


class Peer:
    """Answers with what it's told, and sends what it thinks that is."""

    def __init__(self, offer: Any) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self._offer = offer
        self.gets = 0
        """How often pieces were asked for."""
        if isinstance(offer, dict) and isinstance(offer.get("addresses"), list):
            offer["addresses"] = [address or self.address for address in offer["addresses"]]
        self._thread = threading.Thread(target=self._accept)
        self._thread.start()

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        self._listener.close()

    def _accept(self) -> None:
        threads = []
        with contextlib.suppress(OSError):
            while True:
                threads.append(threading.Thread(target=self._converse, args=[self._listener.accept()[0]]))
                threads[-1].start()
        for thread in threads:
            thread.join()

    def _converse(self, connection: socket.socket) -> None:
        with connection, contextlib.suppress(Exception):  # what can't be sent isn't
            assert is_greeted(connection, "secret")
            message, _ = receive(connection)
            if "ask" in message:
                send(connection, {"offer": self._offer})
            elif "get" in message:
                self.gets += 1
                get = decode_get(message["get"])
                for number, piece in enumerate(self._pieces(get.part, get.count)):
                    if piece.numel():
                        row = view(piece.flatten())
                        send_all(connection, [memoryview(FRAME.pack(number, len(row), crc([row]))), row])
                with contextlib.suppress(EOFError):
                    exactly(connection, 1)

    def _pieces(self, part: Part, count: int) -> Iterator[Tensor]:
        groups, size = self._offer["groups"], self._offer["block_size"]
        listed = items(self._offer["firsts"], self._offer["stop"]) if self._offer["stop"] < 1000 else []
        assert count == len(listed) * len(self._offer["slabs"])
        here = [layer for each in self._offer["parts"] for layer in range(*each[:2])]
        for first, stop in self._offer["slabs"]:
            for block, group in listed:
                # places are counted among the layers of the rank that is asked: of all its kin the one that has these
                kin = next(p for p in self._offer["parts"] if p[0] <= part.layers[0] < p[1])
                placed = [layer for layer in groups[group] if layer in range(*kin[:2]) and layer in here]
                yield said(block, [n for n in placed[first:stop] if n in part.layers], part.heads, size)


def fetched(offer: Any, address: str = "") -> tuple[Tensor | None, int]:
    """(the rows, if the sequence is told that all of them came; None: it is told that none did, how often pieces were asked for)"""
    puller = Puller(b"mark", FORM, GROUPS, [WHOLE], 0, ("tcp",), torch.device("cpu"))
    told: queue.SimpleQueue[tuple[int, int]] = queue.SimpleQueue()
    puller.on_fetched = lambda *said: told.put(said)
    peer = Peer(offer)
    tokens = token_bytes([1] * TOKENS)
    puller.start(Pull(7, address or peer.address, "secret", "f", b"chain", tokens, FIRST, END, 60.0, 1e-9))
    try:
        ticket, blocks = told.get(timeout=30)
        if ticket < 0:  # it begins on the first layers
            all_here = all(puller.wait(7, layer, 30.0) for layer in range(LAYERS))
            return puller.rows(7) if all_here else None, peer.gets
        assert blocks in (END // 8, -1)
        return puller.rows(7) if blocks > 0 else None, peer.gets
    finally:
        puller.close()
        peer.close()


def check(rows: Tensor) -> None:
    """Each row that a step may read holds what every peer would have sent."""
    for block in range(FIRST // 8, END // 8):
        for number, (group, start) in enumerate(zip(GROUPS, (2, 7), strict=True)):
            if block >= start:
                row = FORM.view(rows[(block - FIRST // 8) * len(GROUPS) + number])
                assert torch.equal(row, said(block, [*group.layers], range(HEADS), 8))


@pytest.mark.parametrize("offer", OFFERS)
def test_what_is_offered_by_the_rules_comes(offer: Any) -> None:
    rows, _ = fetched(copied(offer))
    assert rows is not None
    check(rows)


def copied(offer: Any) -> Any:
    return json.loads(json.dumps(offer))


def changed(offer: Any, **values: Any) -> Any:
    return {**copied(OFFERS[offer]), **values}


ODD = st.sampled_from(
    [None, -1, 0, 1, 2, 3, 5, 64, 1 << 20, 1 << 39, 1.5, "", "tcp", "127.0.0.1:99999999999999999999", [], {}, True]
)


@st.composite
def bent(draw: st.DrawFn) -> Any:
    """An offer in which something is exchanged, left out or said twice, once or a few times."""
    offer = copied(draw(st.sampled_from(OFFERS)))
    for _ in range(draw(st.integers(1, 3))):
        key = draw(st.sampled_from(sorted(offer)))
        place: Any = offer
        while isinstance(place[key], list) and place[key] and draw(st.booleans()):
            place, key = place[key], draw(st.integers(0, len(place[key]) - 1))
        how = draw(st.integers(0, 3))
        if how == 0 and isinstance(place, list):
            place.insert(key, copied(place[key]))
        elif how == 1 and isinstance(place, list):
            del place[key]
        elif how == 2 and type(place[key]) is int:
            place[key] += draw(st.integers(-2, 2))
        else:
            place[key] = draw(ODD)
    return offer


@given(offer=bent())
@example(offer=changed(0, slabs=[[], [0, 2]]))
@example(offer=changed(0, slabs=[]))
@example(offer=changed(0, firsts=[3, 7]))  # too late: a block that is needed wouldn't come
@example(offer=changed(0, firsts=[2, 12]))
@example(offer=changed(0, groups=[[0, 2], [1, 1]]))
@example(offer=changed(0, groups=[[0, 1, 2, 3], []]))
@example(offer=changed(0, height=1, slabs=[[0, 1]]))
@example(offer=changed(0, parts=[[0, 3, 0, 2], [1, 2, 0, 2]], addresses=["", ""]))  # the sum is right
@example(offer=changed(3, addresses=[f"127.0.0.1:{1 << 70}"] * 3))
@settings(max_examples=examples(60))
def test_what_is_not_by_the_rules_ends_at_once(offer: Any) -> None:
    rows, _ = fetched(offer)
    if rows is not None:
        check(rows)


@pytest.mark.parametrize(
    "offer",
    [
        changed(0, stop=13),
        changed(0, stop=1 << 39),
        changed(2, block_size=1 << 39, stop=1, firsts=[0]),
        changed(0, height=1 << 39, slabs=[[0, 1 << 39]]),
        changed(0, parts=[[0, 4, 0, 1 << 16]]),
    ],
)
def test_what_would_take_more_memory_is_not_asked_for(offer: Any) -> None:
    assert fetched(offer) == (None, 0)


def test_an_address_that_is_none() -> None:
    assert fetched(copied(OFFERS[0]), f"127.0.0.1:{1 << 70}") == (None, 0)
