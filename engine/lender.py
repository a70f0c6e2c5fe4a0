"""Lender: a rank's end of lending. It listens, copies aside what a step says, and sends it to who knows the secret.

A connection has a thread of its own, of which there are few; none waits for a reader longer than SLOW_S, and nothing is
kept longer than LEND_S.
"""

from __future__ import annotations

import contextlib
import logging
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import torch

from kvasir.engine.aside import Aside
from kvasir.engine.blocks import ContentId, content_ids
from kvasir.engine.cache import KVCache
from kvasir.engine.channels import SLOW_S, Portion, channel_of, new_rows, node, unix_name, view
from kvasir.engine.parts import Form, group_of
from kvasir.engine.peer_wire import (
    HELLO_S,
    Ask,
    Get,
    Offer,
    RefusedError,
    decode_ask,
    decode_get,
    encode_offer,
    is_greeted,
    receive,
    send,
)
from kvasir.engine.sequence import GONE
from kvasir.engine.step import Lent

logger = logging.getLogger(__name__)

MOST_CONNECTIONS = 64
MOST_READING = 8
"""Connections that read from the tiers at a time; what others ask for of it is not there then."""
LENT_BYTES = 256 << 20
"""Copied aside and not yet read, in each rank; a lend that is larger goes on as it is read."""
BEGIN_S = 5.0
"""What nobody begins to read in this time is lent no longer."""
LEND_S = 30.0
"""Nothing is lent longer."""
SWEEP_S = 1.0
ASK_S = 10.0
"""The engine answers between two steps; a peer waits no longer than this."""
DONE = 1 << 62
OnAsk = Callable[[Ask, Sequence[ContentId]], "Future[Offer]"]
"""(what is asked, ids of the prompt's blocks): answers with `RefusedError` or an offer."""


@dataclass(slots=True)
class Lend:
    """What is copied aside for `readers` connections, of which each has its own place in it."""

    readers: int
    until: float
    way: str
    portions: list[Portion | None] = field(default_factory=list)
    """None: everyone has read it."""
    places: list[int] = field(default_factory=list)
    """How many portions each reader that came has read."""
    filling: threading.Lock = field(default_factory=threading.Lock)
    """Of its readers one completes a portion for all."""


class Lender:
    """The rank's thread calls `take`, any thread the rest. read_below(content, into): from the tiers below the cache."""

    def __init__(
        self,
        cache: KVCache,
        form: Form,
        rank: int,
        read_below: Callable[[ContentId, memoryview], bool],
    ) -> None:
        self._cache, self._form, self._rank, self._read_below = cache, form, rank, read_below
        self.served = 0
        """Items sent."""
        self._lends: dict[int, Lend] = {}
        self._changed = threading.Condition()
        """Guards all of _lends, and _bytes."""
        self._bytes = 0
        self._on_ask: OnAsk | None = None
        self._secret = ""
        self._host = ""
        self._listeners: list[socket.socket] = []
        self._connections: set[socket.socket] = set()
        self._threads: list[threading.Thread] = []
        self._closing = False
        self._reading = threading.BoundedSemaphore(MOST_READING)
        self._aside = Aside(cache.arena.device)

    def listen(self, host: str, secret: str, on_ask: OnAsk | None = None) -> str:
        """Serve on a free port of `host` -> HOST:PORT. on_ask: this is rank 0."""
        self._secret, self._host, self._on_ask = secret, host, on_ask
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        listener = socket.create_server((host, 0), family=family, backlog=MOST_CONNECTIONS)
        address = f"{host}:{listener.getsockname()[1]}"
        self._listeners = [listener]
        if node():
            local = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            local.bind(unix_name(address))
            local.listen(MOST_CONNECTIONS)
            self._listeners.append(local)
        for listener in self._listeners:
            self._start(self._accept, listener)
        return address

    # -- what rank 0 knows of its lends

    @property
    def room(self) -> int:
        """Bytes that may be copied aside now."""
        with self._changed:
            return max(0, LENT_BYTES - self._bytes)

    def open(self, lend: int, readers: int, way: str) -> None:
        """A lend begins."""
        with self._changed:
            self._open(lend, readers, way)

    def is_live(self, lend: int) -> bool:
        """Somebody may still read of it."""
        with self._changed:
            self._expire()
            return lend in self._lends

    def end(self, lend: int) -> None:
        """Nothing more of it comes."""
        with self._changed:
            self._drop(lend)

    # -- the rank's thread

    @torch.inference_mode()
    def take(self, lents: Sequence[Lent]) -> None:
        """Copy aside what a step lends."""
        for lent in lents:
            readers, form = lent.readers[self._rank], self._form.of_layers(*lent.layers)
            with self._changed:
                self._expire()
                if lent.first == 0 and readers:
                    self._open(lent.lend, readers, lent.way)
                lend = self._lends.get(lent.lend)
                full = self._bytes + len(lent.places) * form.block_bytes > 2 * LENT_BYTES
                if lend is None or full:  # readers here are slower than rank 0's
                    self._drop(lent.lend)
                    continue
            portion = self._copied(lent, form)
            with self._changed:
                if lent.lend in self._lends:
                    lend.portions.append(portion)
                    self._bytes += len(portion.groups) * form.block_bytes
                    self._changed.notify_all()

    def _copied(self, lent: Lent, form: Form) -> Portion:
        """By a GPU behind the step's own work; on a CPU at once, into the memory from which it is sent."""
        here = [(place, block) for place, (block, _) in enumerate(lent.places) if block != GONE]
        below = [(place, content) for place, (block, content) in enumerate(lent.places) if block == GONE]
        blocks, groups = [block for _, block in here], [group_of(content) for _, content in lent.places]
        on_gpu = self._cache.arena.is_cuda
        if not on_gpu and not below:
            rows, memory = new_rows(len(blocks), form.block_bytes, shared=lent.way == "shm")
            self._cache.read_into(blocks, rows, lent.layers)
            return Portion(lent.first, rows, groups, form, memory)
        held, arrived = self._cache.read(blocks, lent.layers), None
        if on_gpu and lent.way not in ("nccl", "nixl"):
            held, arrived = self._aside.copy(held)
        places = [place for place, _ in here] if below or lent.way == "shm" else None
        return Portion(lent.first, held, groups, form, None, below, arrived, places)

    def close(self) -> None:
        """Cut everyone off."""
        with self._changed:
            self._closing = True
            for lend in [*self._lends]:
                self._drop(lend)
            self._changed.notify_all()
            connections = [*self._connections]
        for listener in self._listeners:
            with contextlib.suppress(OSError):
                listener.shutdown(socket.SHUT_RDWR)
            listener.close()
        for connection in connections:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join(SLOW_S)

    # -- lends; _changed is held

    def _open(self, lend: int, readers: int, way: str) -> None:
        self._lends.setdefault(lend, Lend(readers, time.monotonic() + BEGIN_S, way))

    def _expire(self) -> None:
        now = time.monotonic()
        for number in [number for number, lend in self._lends.items() if lend.until <= now]:
            self._drop(number)

    def _drop(self, number: int) -> None:
        lend = self._lends.pop(number, None)
        for portion in lend.portions if lend is not None else ():
            self._release(portion)
        self._changed.notify_all()

    def _release(self, portion: Portion | None) -> None:
        if portion is not None:
            self._bytes -= len(portion.groups) * portion.form.block_bytes

    # -- threads of connections

    def _start(self, work: Callable[[socket.socket], None], given: socket.socket) -> None:
        thread = threading.Thread(target=work, args=(given,), name="kvasir-lend", daemon=True)
        self._threads = [known for known in self._threads if known.is_alive()] + [thread]
        thread.start()

    def _accept(self, listener: socket.socket) -> None:
        listener.settimeout(SWEEP_S)
        while not self._closing:
            try:
                connection, _ = listener.accept()
            except TimeoutError:
                with self._changed:
                    self._expire()
                continue
            except OSError:
                if not self._closing:
                    time.sleep(0.1)  # out of descriptors, perhaps
                continue
            with self._changed:
                welcome = not self._closing and len(self._connections) < MOST_CONNECTIONS
                if welcome:
                    self._connections.add(connection)
            if welcome:
                self._start(self._converse, connection)
            else:
                connection.close()

    def _converse(self, connection: socket.socket) -> None:
        try:
            if is_greeted(connection, self._secret):
                connection.settimeout(HELLO_S)
                said, data = receive(connection)
                connection.settimeout(SLOW_S)
                if connection.family != socket.AF_UNIX:
                    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                if "ask" in said:
                    self._answer(connection, decode_ask(said["ask"], data))
                else:
                    self._give(connection, decode_get(said.get("get")))
        except (OSError, ValueError, EOFError, RuntimeError) as error:
            logger.debug("a peer's connection ended: %s", error)
        finally:
            with self._changed:
                self._connections.discard(connection)
            connection.close()

    def _answer(self, connection: socket.socket, ask: Ask) -> None:
        try:
            if self._on_ask is None:
                raise RefusedError("another rank answers that")
            size = self._form.block_size
            ids = content_ids(ask.chain, ask.tokens[: 4 * (ask.end + size)], size)
            said: Any = encode_offer(self._on_ask(ask, ids).result(ASK_S))
        except RefusedError as error:
            said = {"refused": str(error)}
        except TimeoutError:
            said = {"refused": "busy: a step takes long"}
        send(connection, said)

    def _give(self, connection: socket.socket, get: Get) -> None:
        """Send what is asked for; whatever happens, this reader is done then."""
        with self._changed:
            self._changed.wait_for(lambda: self._closing or get.lend in self._lends, SLOW_S)
            lend = self._lends.get(get.lend)
            if lend is None or len(lend.places) == lend.readers:
                raise ValueError("nothing is lent by this number")
            reader = len(lend.places)
            if not reader:
                lend.until = time.monotonic() + LEND_S
            lend.places.append(-1)
        part = get.part.within(self._form.part)
        try:
            channel = channel_of(get.way, self._cache.arena.device, self._host)
            self.served += channel.lend(connection, self._portions(get, lend, reader), part)
        finally:
            with self._changed:
                lend.places[reader] = DONE
                self._forget_read(get.lend, lend)

    def _portions(self, get: Get, lend: Lend, reader: int) -> Iterator[Portion]:
        """Those of a lend, as they come, until all items are there or it ends."""
        count = 0
        while count < get.count:
            portion = self._next(get.lend, lend, reader)
            self._fill(portion, lend)
            count += len(portion.groups)
            yield portion

    def _next(self, number: int, lend: Lend, reader: int) -> Portion:
        """The next portion for a reader, who has done with the last one."""
        with self._changed:
            place = lend.places[reader] = lend.places[reader] + 1
            self._forget_read(number, lend)
            left = max(0.0, lend.until - time.monotonic())
            self._changed.wait_for(lambda: number not in self._lends or len(lend.portions) > place, left)
            portion = lend.portions[place] if number in self._lends and len(lend.portions) > place else None
        if portion is None:
            raise ValueError("the lend ended")
        return portion

    def _fill(self, portion: Portion, lend: Lend) -> None:
        """Wait for what a GPU copies, and read what isn't in the cache from the tiers, once for all readers."""
        with lend.filling:
            if portion.good >= 0:
                return
            if portion.arrived is not None:
                portion.arrived.synchronize()
            if portion.places is not None:
                count, shared = len(portion.groups), lend.way == "shm"
                rows, portion.memory = new_rows(count, portion.form.block_bytes, shared=shared)
                rows[torch.tensor(portion.places, dtype=torch.long)] = portion.rows.cpu()
                portion.rows = rows
            portion.good = self._read(portion) if portion.below else len(portion.groups)

    def _read(self, portion: Portion) -> int:
        """From the tiers what isn't in the cache -> how many rows are there. A disk that hangs keeps few waiting."""
        if not self._reading.acquire(timeout=SLOW_S):
            return portion.below[0][0]
        try:
            for place, content in portion.below:
                if not self._read_below(content, view(portion.rows[place])):
                    return place
            return len(portion.groups)
        finally:
            self._reading.release()

    def _forget_read(self, number: int, lend: Lend) -> None:
        """Portions that every reader has read go, and with the last reader the lend."""
        if len(lend.places) < lend.readers:
            return
        least = max(0, min(lend.places))
        for place, portion in enumerate(lend.portions[:least]):
            self._release(portion)
            lend.portions[place] = None
        if least == DONE and self._lends.get(number) is lend:
            self._drop(number)
