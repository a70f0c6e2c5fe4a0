"""Puller: a rank's end of fetching blocks from another group. Threads of its own do all the work.

What comes is checked and put where a step can take it; a fetch that its sequence doesn't wait for any more, or that takes
too long, ends with its connections.
"""

from __future__ import annotations

import contextlib
import logging
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import torch
from torch import Tensor

from kvasir.engine.aside import room_for
from kvasir.engine.channels import Wanted, channel_of, node, unix_name
from kvasir.engine.layout import LayerGroup
from kvasir.engine.parts import Form, Part, items, sources
from kvasir.engine.peer_wire import (
    Ask,
    Get,
    Offer,
    RefusedError,
    decode_offer,
    encode_ask,
    encode_get,
    greet,
    receive,
    send,
)
from kvasir.engine.prices import Prices
from kvasir.engine.recut import Filling
from kvasir.engine.step import Pull

logger = logging.getLogger(__name__)

MOST_PULLS = 4
"""At once; later ones wait."""
MARGIN = 2.0
MOST_SLABS = 8
"""Layers come in so many portions at most, where a step may begin on the first."""
STAGED_BYTES = 512 << 20
"""Host memory for blocks that came and aren't in the cache yet."""


@dataclass
class Running:
    """A pull, from when it was asked for until its sequence has what it brought."""

    pull: Pull
    until: float
    connections: set[socket.socket] = field(default_factory=set)
    ended: bool = False
    rows: Tensor | None = None
    gets: Sequence[_Get] = ()
    begun: bool = False
    """The sequence was told to begin on the first layers."""
    over: bool = False
    """Nothing more comes."""


class Puller:
    """The rank's thread calls `start`, `rows`, `wait` and `end`. on_fetched(ticket, blocks) is called in a thread of ours: up to
    which block of the prompt all is here, or its bitwise complement when the peer failed. Or, with -ticket, all is expected to
    be here before a step that begins now needs it."""

    def __init__(
        self,
        mark: bytes,
        form: Form,
        groups: Sequence[LayerGroup],
        everyone: Sequence[Part],
        rank: int,
        ways: Sequence[str],
        device: torch.device,
    ) -> None:
        self._mark, self._form, self._groups, self._rank = mark, form, tuple(groups), rank
        self._everyone, self._ways, self.device = tuple(everyone), tuple(ways), device
        self._depth = 1 + max(layer for group in groups for layer in group.layers)
        self.on_fetched: Callable[[int, int], None] = lambda ticket, blocks: None
        self.prices: Prices | None = None
        self._running: dict[int, Running] = {}
        self._changed = threading.Condition()
        self._threads = ThreadPoolExecutor(MOST_PULLS, "kvasir-pull")
        self._closing = False

    def start(self, pull: Pull) -> None:
        """Fetch; the sequence that waits is told by its ticket."""
        running = Running(pull, time.monotonic() + pull.limit_s)
        with self._changed:
            if not self._closing:
                self._running[pull.ticket] = running
                self._threads.submit(self._pull, running)

    def rows(self, ticket: int) -> Tensor | None:
        """What it brought: row (i - first) * groups + g is the prompt's block i of layer group g."""
        with self._changed:
            running = self._running.get(ticket)
            return running.rows if running is not None else None

    def is_coming(self, ticket: int) -> bool:
        """Its sequence began before all was here."""
        with self._changed:
            running = self._running.get(ticket)
            return running is not None and running.begun

    def wait(self, ticket: int, layer: int, seconds: float) -> bool:
        """Until all of that layer is in `rows`; False: it isn't, and won't be in that time."""
        with self._changed:
            running = self._running.get(ticket)
            if running is None:
                return False
            self._changed.wait_for(lambda: running.over or all(get.has(layer) for get in running.gets), seconds)
            return all(get.has(layer) for get in running.gets)

    def end(self, ticket: int) -> None:
        """Nobody waits for it any more."""
        with self._changed:
            running = self._running.pop(ticket, None)
            if running is not None:
                self._cut(running)
            self._changed.notify_all()

    def close(self) -> None:
        """End all."""
        with self._changed:
            self._closing = True
            for running in self._running.values():
                self._cut(running)
            self._running.clear()
            self._changed.notify_all()
        self._threads.shutdown()

    def _cut(self, running: Running) -> None:
        running.ended = True
        self._shut(running)

    def _shut(self, running: Running) -> None:
        for connection in running.connections:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    # -- our threads

    def _pull(self, running: Running) -> None:
        pull, began = running.pull, time.monotonic()
        blocks, error = 0, None
        late = threading.Timer(pull.limit_s, self._cut_late, [running])
        late.daemon = True
        try:
            late.start()
            if began >= running.until:
                raise RefusedError("others' fetches took all the time")  # no fault of the peer
            if not running.ended:
                blocks, error = self._fetch(running, began)
        except RefusedError as refusal:
            logger.info("no blocks come from %s: %s", pull.address, refusal)
        except Exception as failure:  # a peer may die, hang or lie: whatever comes of that, the sequence is told
            error = failure
        late.cancel()
        with self._changed:
            running.over = True
            self._changed.notify_all()
        if running.ended:
            return
        if error is not None:
            logger.warning("not all blocks came from %s, what is missing is computed: %r", pull.address, error)
        if not running.begun:
            self.on_fetched(pull.ticket, blocks if error is None else ~blocks)

    def _fetch(self, running: Running, began: float) -> tuple[int, Exception | None]:
        """(up to which block of the prompt all is here, why not to where it was offered)"""
        pull, size = running.pull, self._form.block_size
        ask = self._asked(pull)
        offer = self._ask(running, ask)
        self._check(offer, ask)
        first, stop = pull.first // size, offer.end // size
        starts = tuple(start // size for start in ask.starts(offer.end))
        rows = running.rows = self._room(running, (stop - first) * len(self._form.groups))
        filling = Filling(rows, self._form, first, starts)
        chosen = sources(self._form.part, self._rank, [form.part for form in offer.forms])
        gets = running.gets = [_Get(self, running, offer, filling, rank, part) for rank, part in chosen]
        slabs = len(offer.slabs)

        def progress() -> None:
            with self._changed:
                self._changed.notify_all()
                if running.begun or running.ended or min(get.slabs for get in gets) == slabs:
                    return
                took = time.monotonic() - min(get.arrived or began for get in gets)
                running.begun = begin = all(
                    is_in_time(get.slabs, get.wanted, took, pull.ahead_s * get.last / self._depth) for get in gets
                )
            if begin:
                self.on_fetched(-pull.ticket, stop)

        for get in gets:
            get.progress = progress
        for get in gets[1:]:
            get.start()
        gets[0].run()
        for get in gets[1:]:
            get.join()
        theirs = offer.forms[0].block_size
        until = min(get.blocks for get in gets)
        found = stop if until == offer.stop else min(stop, until * theirs // size)
        if found < stop and any(group.reach is not None for group in self._groups):
            found = 0  # what layers that see nearby tokens alone need behind fewer blocks wasn't fetched
        error = next((get.error for get in gets if get.error is not None), None)
        if error is None and self.prices is not None:
            now = time.monotonic()
            arrived = min(get.arrived or now for get in gets)
            self.prices.fetched(pull.address, offer.end - pull.first, arrived - began, now - arrived)
        return found, error

    def _cut_late(self, running: Running) -> None:
        """Its time is over: what has come is all."""
        with self._changed:
            self._shut(running)

    def _asked(self, pull: Pull) -> Ask:
        return Ask(
            fetch=pull.fetch,
            mark=self._mark,
            chain=pull.chain,
            tokens=pull.tokens,
            block_size=self._form.block_size,
            first=pull.first,
            end=pull.end,
            groups=self._groups,
            readers=self._everyone,
            ways=self._ways,
            slabs=MOST_SLABS if pull.ahead_s else 1,
            node=node(),
        )

    def _ask(self, running: Running, ask: Ask) -> Offer:
        with self.connected(running, running.pull.address) as connection:
            send(connection, *encode_ask(ask))
            said, _ = receive(connection, 0)
            return decode_offer(said)

    def _check(self, offer: Offer, ask: Ask) -> None:
        """ValueError when it isn't what a peer that has the same model can lend of what was asked for."""
        groups, height, size = offer.forms[0].groups, offer.forms[0].height, offer.forms[0].block_size
        if not ask.first < offer.end <= ask.end or offer.end % ask.block_size or offer.way not in ask.ways:
            raise ValueError("the peer offers what wasn't asked for")
        if len(offer.slabs) > ask.slabs:
            raise ValueError("the peer offers more portions than were asked for")
        if not all(form.is_like(self._form) for form in offer.forms):
            raise ValueError("the peer's slots are other ones")
        layers = sorted(layer for group in self._groups for layer in group.layers)
        heads = [max(part.heads.stop for part in parts) for parts in ([f.part for f in offer.forms], self._everyone)]
        if not all(groups) or sorted(layer for group in groups for layer in group) != layers or heads[0] != heads[1]:
            raise ValueError("the peer's layers and heads are other ones")
        if not max(len(places) for form in offer.forms for places in form.places) <= height <= len(layers):
            raise ValueError("the peer's blocks are no blocks of these layers")
        if offer.stop != -(-offer.end // size) or offer.stop * size * 4 > len(ask.tokens):
            raise ValueError("the peer's blocks don't end with what it offers")
        if offer.firsts != ask.firsts(offer.end, groups, size):
            raise ValueError("the peer's blocks don't begin where they are needed")

    def _room(self, running: Running, count: int) -> Tensor:
        """rows[count, block bytes], once enough of what came for others is in the cache."""
        wanted = count * self._form.block_bytes

        def fits() -> bool:
            held = sum(each.rows.numel() for each in self._running.values() if each.rows is not None)
            return running.ended or not held or held + wanted <= STAGED_BYTES

        with self._changed:
            if not self._changed.wait_for(fits, max(0.0, running.until - time.monotonic())):
                raise RefusedError("there was no room for them in time")
            return room_for(count, self._form.block_bytes, self.device)

    @contextlib.contextmanager
    def connected(self, running: Running, address: str, *, local: bool = False) -> Iterator[socket.socket]:
        """A greeted connection to a rank of the peer, that ends with the pull. local: by a Unix socket, if that is there."""
        left = running.until - time.monotonic()
        if left <= 0:
            raise TimeoutError("it took too long")
        with reached(address, left, local=local) as connection:
            with self._changed:
                if running.ended:
                    raise ConnectionAbortedError("nobody waits for it any more")
                running.connections.add(connection)
            try:
                greet(connection, running.pull.secret)
                yield connection
            finally:
                with self._changed:
                    running.connections.discard(connection)


class _Get(threading.Thread):
    """The pieces that one of the peer's ranks has."""

    def __init__(self, puller: Puller, running: Running, offer: Offer, filling: Filling, rank: int, part: Part) -> None:
        super().__init__(name="kvasir-pull-part", daemon=True)
        self._puller, self._running, self._filling = puller, running, filling
        self._offer, self._rank, self._part = offer, rank, part
        self.blocks = 0
        """Of the peer's size, up to which all came."""
        self.slabs = 0
        """Of layers, that came whole."""
        self.progress: Callable[[], None] = lambda: None
        self._forms = [offer.forms[rank].of_layers(*slab) for slab in offer.slabs]
        own = [[layer for group in form.places for layer in group if layer in part.layers] for form in self._forms]
        self.wanted, self.last = max((n, min(layers)) for n, layers in enumerate(own, 1) if layers)
        """Slabs up to the last that holds any of its layers, and the first layer there."""
        self.arrived: float | None = None
        self.error: Exception | None = None
        self._at = 0

    def has(self, layer: int) -> bool:
        """It came, or is none of these pieces."""
        if layer not in self._part.layers:
            return True
        return any(layer in places for form in self._forms[: self.slabs] for places in form.places)

    def _reach(self, number: int) -> None:
        """All items before this one are there."""
        self._at = number
        if number // self._each > self.slabs:
            self.slabs = number // self._each
            self.progress()

    def run(self) -> None:
        offer, listed = self._offer, items(self._offer.firsts, self._offer.stop)
        self._each = len(listed)
        whole = self._each * len(self._forms)

        def into(number: int, part: Part) -> Tensor | None:
            self.arrived = self.arrived or time.monotonic()
            self._reach(number)
            return self._filling.whole(self._forms[number // self._each], part, *listed[number % self._each])

        def take(number: int, part: Part, piece: Tensor) -> None:
            form, (block, group) = self._forms[number // self._each], listed[number % self._each]
            self._filling.put(form, part, block, group, piece.view(form.piece_shape(group, part)))

        groups = [group for _, group in listed] * len(self._forms)
        wanted = Wanted(self._forms, self._part, groups, take, into)
        address = self._running.pull.address if self._rank == 0 else offer.addresses[self._rank]
        local = offer.way == "shm"
        try:
            with self._puller.connected(self._running, address, local=local) as connection:
                way = "tcp" if local and connection.family != socket.AF_UNIX else offer.way
                send(connection, encode_get(Get(offer.lend, self._part, whole, way)))
                count = channel_of(way, self._puller.device, "").borrow(connection, wanted)
        except Exception as error:  # the thread's border: whoever waits for this is told
            self.error, count = error, self._at
        if count == whole:
            self.blocks, self.slabs = offer.stop, len(self._forms)
        else:  # without the last layers it is nothing
            self.blocks = listed[max(0, count - whole + self._each)][0]


def is_in_time(done: int, wanted: int, took_s: float, ahead_s: float) -> bool:
    """Whether a step that needs the last of the `wanted` slabs in `ahead_s` will find each of them, and those before it, when it
    comes to them. `done` of them came in `took_s`, the others come at the same rate, or at worst MARGIN times slower."""
    return done >= wanted or (done > 0 and MARGIN * (wanted - done) * took_s / done <= ahead_s)


def reached(address: str, timeout_s: float, *, local: bool) -> socket.socket:
    """A connection to HOST:PORT, or to where that rank listens for its own node."""
    if local:
        unix = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        unix.settimeout(timeout_s)
        try:
            unix.connect(unix_name(address))
            return unix
        except OSError:  # another container of the node
            unix.close()
    host, _, port = address.rpartition(":")
    connection = socket.create_connection((host.strip("[]"), int(port)), timeout_s)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return connection
