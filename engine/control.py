"""Control: what rank 0 and the other ranks of a group tell each other, over one TCP connection each; steps for ranks of rank
0's own node go through memory that they share (`board`), where that can be had.

Rank 0 listens (`Hub`), the others connect (`spoke`). A frame is its length (4 bytes), its kind (1 byte) and its content: JSON,
or a step or result in `codec`'s form. Nothing that arrives can run, and nothing is believed before the group's token was shown.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import math
import queue
import secrets
import selectors
import socket
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from kvasir.engine.board import Poster
from kvasir.engine.errors import ConfigError, ServerError
from kvasir.engine.frames import (
    BEAT_S,
    BOARD,
    FETCHED,
    HEAD,
    KINDS,
    SILENCE_S,
    Kind,
    decode_tickets,
    send,
    tune,
)
from kvasir.engine.processes import Exit, stopped
from kvasir.engine.stranger import HELLO_S, Stranger, StrangerError

MORE_STRANGERS = 32
"""So many connections may wait for their hello to be read besides the ranks'; one more, and the oldest is turned away."""
UNREACHABLE = (errno.ETIMEDOUT, errno.EHOSTUNREACH, errno.ENETUNREACH)
"""What a connection says whose messages nobody acknowledged for SILENCE_S: it may be sooner than the look at the clock."""
VERDICT_S = 0.5
"""When one rank dies the others' exchanges with it fail at the same moment: so long is waited for who it was."""
LOOK_S = BEAT_S / 2
"""How often rank 0 looks whether another is there."""
WAKING_S = 600.0
"""A rank that has connected has so long for loading its libraries: seconds, but from a slow disk on a busy machine minutes."""
LOADING_SILENCE_S = 60.0
"""Like SILENCE_S of a rank that loads: libraries, drivers too, may hold all its threads up meanwhile."""
BUSY = "its disk, its network or its cores are busy"
NOTE_S = 30.0
"""How often the log says whose loading is waited for."""
log = logging.getLogger(__name__)


class RankError(ServerError):
    """A rank of the group died, hung or could not start; the message is a block of text for its reader."""


@dataclass
class Peer:
    """What rank 0 knows of another rank."""

    rank: int
    host: str
    pid: int
    connection: socket.socket
    lock: threading.Lock = field(default_factory=threading.Lock)
    """Around each frame: steps and grammars come from different threads."""
    heard: float = field(default_factory=time.monotonic)
    awake: bool = False  # has loaded its libraries
    gathered: int = 0  # how often it has waited for the others
    ready: bool = False
    stopped_since: float | None = None
    buffer: bytearray = field(default_factory=bytearray)
    serves: str | None = None
    """Where it lends blocks to other groups; empty: it can't."""
    reads: bool = False  # steps from the board
    failed: bool = False  # and has said why, before its process ends
    exit: Exit | None = None
    """Of its process, if that is on this node and somebody else's to wait for."""

    def __str__(self) -> str:
        return f"rank {self.rank} (pid {self.pid} on {self.host})"


class Hub:
    """Rank 0's end. `failure` is set once, when the group can't go on.

    ended(rank): how the process of a rank that is gone ended, in words, or None when that isn't known yet. None: they aren't
    children of anybody here, and the system is asked.
    """

    def __init__(self, host: str, size: int, *, ended: Callable[[int], str | None] | None = None) -> None:
        self.host, self.size = host, size
        self.token = secrets.token_hex(32)
        self.on_failure: Callable[[], None] = lambda: None
        """Called once, in the hub's thread, when `failure` is set: it frees whoever waits for a rank that is gone."""
        self.overdue: Callable[[], str | None] = lambda: None
        """What hasn't come in its time, in words; asked every BEAT_S."""
        self.on_result: Callable[[bytes], None] = lambda frame: None
        """Called in the hub's thread with each step's result, in their order."""
        self.on_grammar: Callable[[bytes], None] = lambda frame: None
        """Called in the hub's thread with what a rank says of its grammars."""
        self.failure: RankError | ConfigError | None = None
        self._ended = ended
        self._listener = socket.create_server((host, 0), backlog=size)
        self._board: Poster | None = None
        self._peers: dict[int, Peer] = {}
        self._strangers: list[Stranger] = []
        self._changed = threading.Condition()
        self.fetched: queue.SimpleQueue[tuple[int, int]] = queue.SimpleQueue()
        self._spoiled: queue.SimpleQueue[Sequence[int] | None] = queue.SimpleQueue()
        self._selector = selectors.DefaultSelector()
        self._closing = False
        self._gathered = 0
        self._suspect: tuple[float, str] | None = None
        self._listener.setblocking(False)
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._thread = threading.Thread(target=self._watch, name="kvasir-control", daemon=True)
        self._thread.start()

    @property
    def address(self) -> str:
        """Where ranks connect: HOST:PORT."""
        return f"{self.host}:{self._listener.getsockname()[1]}"

    def meet(self, timeout_s: float) -> Mapping[int, str]:
        """Wait until every rank has connected -> its host, by rank. RankError says which are missing."""
        if not self._until(lambda: len(self._peers) == self.size - 1, timeout_s):
            missing = sorted(set(range(1, self.size)) - set(self._peers))
            names = ", ".join(map(str, missing))
            raise RankError(
                f"rank {names} of {self.size} didn't connect to {self.address} within {timeout_s:g} s"
                " (--collective-timeout): it didn't start, or its node can't reach this one"
            )
        return {0: self.host} | {rank: peer.host for rank, peer in self._peers.items()}

    def all_awake(self) -> None:
        """Wait until every rank has loaded its libraries. Before that nobody may wait for them in an exchange, whose limit
        counts; and they needn't say that they live."""
        self._all(lambda peer: peer.awake, "loading its libraries", WAKING_S)

    def assemble(self) -> None:
        """Wait until every rank has come to the same place in loading, which may take one of them minutes longer than another
        and has no limit while it says that it lives; then all go on."""
        self._gathered += 1
        self._all(lambda peer: peer.gathered >= self._gathered, "loading its share")
        for peer in self._peers.values():
            self._tell(peer, "go")

    def _all(self, done: Callable[[Peer], bool], doing: str, limit_s: float = math.inf) -> None:
        """Wait until it is so of every rank; every NOTE_S it is logged of which it isn't. RankError after `limit_s`."""
        begin = time.monotonic()
        while not self._until(
            lambda: all(map(done, self._peers.values())), min(NOTE_S, begin + limit_s - time.monotonic())
        ):
            late = time.monotonic() - begin
            names = ", ".join(str(peer) for _, peer in sorted(self._peers.items()) if not done(peer))
            if late >= limit_s:
                raise RankError(f"{names} has been {doing} for {late:.0f} s, and is waited for no longer: {BUSY}")
            log.warning("%s has been %s for %.0f s: %s", names, doing, late, BUSY)

    def check(self) -> None:
        """Raises the group's failure, if it has failed."""
        if self.failure is not None:
            raise self.failure

    def welcome(self, rank: int, said: Mapping[str, Any]) -> None:
        """Tell one rank its place, and where the board is."""
        peer = self._peers[rank]
        if peer.host == self.host and self._board is None:
            with contextlib.suppress(OSError):
                self._board = Poster(self.size)
        board = self._board.where if self._board is not None and peer.host == self.host else None
        self._tell(peer, "welcome", json.dumps({**said, "board": board}).encode())

    def all_ready(self) -> None:
        """Wait until every rank has loaded its share; from then on SILENCE_S of silence are death."""
        self._all(lambda peer: peer.ready, "loading its share")

    def serve(self, host: str, secret: str) -> list[str]:
        """Have every rank lend blocks to who knows `secret`, those of this node on `host` -> where, by rank. Before the first
        step."""
        for peer in self._peers.values():
            said = {"host": host if peer.host == self.host else None, "secret": secret}
            self._tell(peer, "serve", json.dumps(said).encode())
        self._until(lambda: all(peer.serves is not None for peer in self._peers.values()), None)
        return [self._peers[rank].serves or "" for rank in range(1, self.size)]

    def step(self, frame: bytes) -> None:
        """Send a step to every rank."""
        readers = [peer.rank for peer in self._peers.values() if peer.reads]
        board = self._board if readers else None
        posted = board is not None and board.post(frame, readers, lambda: self.failure is None)
        for peer in self._peers.values():
            if not (posted and peer.reads):
                self._tell(peer, "step", frame)

    def _tell(self, peer: Peer, kind: Kind, content: bytes = b"") -> None:
        try:
            with peer.lock:
                send(peer.connection, kind, content)
        except OSError as error:
            if error.errno in UNREACHABLE:
                self._silent(peer)
            raise self.verdict(f"{peer} can't be reached: {error}") from error

    def grammar(self, rank: int, frame: bytes) -> None:
        """Say to one rank which grammar it needs, or needs no more. One that is gone isn't told."""
        peer = self._peers[rank]
        with peer.lock, contextlib.suppress(OSError):
            send(peer.connection, "grammar", frame)
        if peer.reads and self._board is not None:
            self._board.nudge()

    def verdict(self, symptom: str) -> RankError | ConfigError:
        """What to raise after `symptom`, which may be but the echo of another rank's death."""
        with contextlib.suppress(RankError, ConfigError):
            self._until(lambda: False, 2 * VERDICT_S)
        if self.failure is None:
            self._fail(RankError(symptom))
        assert self.failure is not None
        return self.failure

    def spoil(self, tickets: Sequence[int]) -> None:
        """What rank 0 itself lacked in a step: see `spoiled`."""
        self._spoiled.put(tickets)

    def spoiled(self) -> set[int]:
        """Behind a step in which ranks may have waited for layers of a peer's blocks: the tickets of what didn't come in time, at
        any of them. RankError when the group failed."""
        found: set[int] = set()
        for _ in range(self.size):
            said = self._spoiled.get()
            if said is None or self.failure is not None:
                self._spoiled.put(None)
                raise self.failure or RankError("the group was shut down")
            found.update(said)
        return found

    def close(self) -> None:
        """End: the other ranks see it and exit."""
        self._closing = True
        with contextlib.suppress(OSError):  # wakes the thread
            socket.create_connection(self._listener.getsockname()[:2], 1).close()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    # -- the hub's thread

    def _watch(self) -> None:
        try:
            self._serve()
        except Exception as error:  # the thread's border: without it nobody would see a rank die
            log.exception("rank 0 can't hear the other ranks any more")
            self._fail(RankError(f"rank 0 can't hear the other ranks any more: {type(error).__name__}: {error}"))
        finally:
            for peer in self._peers.values():
                peer.connection.close()
                if peer.exit is not None:
                    peer.exit.close()
            for stranger in self._strangers:
                stranger.connection.close()
            self._selector.close()
            self._listener.close()
            self._spoiled.put(None)

    def _serve(self) -> None:
        looked = 0.0
        while not self._closing:
            asked = time.monotonic()
            for key, _ in self._selector.select(LOOK_S):
                if key.fileobj is self._listener:
                    self._accept()
                elif isinstance(key.data, Stranger):
                    self._greet(key.data)
                else:
                    self._read(key.data)
            if time.monotonic() - looked >= LOOK_S:  # not for each result: whoever waits for it wants to run now
                looked = time.monotonic()
                self._look(asked)
            if self._suspect is not None and time.monotonic() - self._suspect[0] > VERDICT_S:
                self._fail(RankError(self._suspect[1]))

    def _accept(self) -> None:
        try:
            connection, address = self._listener.accept()
        except OSError:  # it is gone already, or files have run out
            return
        connection.setblocking(False)
        stranger = Stranger(address[0], connection)
        self._strangers.append(stranger)
        self._selector.register(connection, selectors.EVENT_READ, stranger)
        if len(self._strangers) > self.size + MORE_STRANGERS:  # a rank says hello at once
            self._turn_away(self._strangers[0])

    def _greet(self, stranger: Stranger) -> None:
        if stranger not in self._strangers:  # turned away since its words came
            return
        try:
            if (said := stranger.hello(self.token)) is None:
                return
            known = self._peers.get(said.rank)
            if said.stopped and known is not None and known.pid == said.pid:
                self._turn_away(stranger)
                self._fail(RankError(f"{known} was stopped (SIGSTOP)"))
                return
            if said.stopped or not 0 < said.rank < self.size or known is not None:
                raise StrangerError(f"there is no rank {said.rank}, or it is here")
        except StrangerError:
            self._turn_away(stranger)
            return
        self._strangers.remove(stranger)
        tune(stranger.connection)
        peer = Peer(said.rank, stranger.host, said.pid, stranger.connection)
        if self._ended is None and peer.host == self.host:
            peer.exit = Exit(peer.pid)
        self._selector.modify(stranger.connection, selectors.EVENT_READ, peer)
        with self._changed:
            self._peers[peer.rank] = peer
            self._changed.notify_all()

    def _turn_away(self, stranger: Stranger) -> None:
        self._strangers.remove(stranger)
        self._selector.unregister(stranger.connection)
        stranger.connection.close()

    def _read(self, peer: Peer) -> None:
        try:
            data = peer.connection.recv(1 << 20, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return
        except OSError as error:
            if error.errno in UNREACHABLE:
                self._silent(peer)
            else:
                self._lost(peer, str(error))
            return
        if not data:
            self._lost(peer, "its connection was closed")
            return
        peer.heard = time.monotonic()
        peer.buffer += data
        while len(peer.buffer) >= HEAD.size:
            size, kind = HEAD.unpack_from(peer.buffer)
            if len(peer.buffer) < HEAD.size + size:
                break
            content = bytes(peer.buffer[HEAD.size : HEAD.size + size])
            del peer.buffer[: HEAD.size + size]
            self._take(peer, KINDS[kind], content)

    def _take(self, peer: Peer, kind: Kind, content: bytes) -> None:
        if kind == "result":
            self.on_result(content)
        elif kind == "fetched":
            ticket, count = FETCHED.unpack(content)
            self.fetched.put((ticket, count))
        elif kind == "spoiled":
            self._spoiled.put(decode_tickets(content))
        elif kind == "grammar":
            self.on_grammar(content)
        elif kind == "serving":
            with self._changed:
                peer.serves = content.decode()
                self._changed.notify_all()
        elif kind == "awake":
            with self._changed:
                peer.awake = True
                self._changed.notify_all()
        elif kind == "here":
            with self._changed:
                peer.gathered += 1
                self._changed.notify_all()
        elif kind == "ready":
            with self._changed:
                peer.ready, peer.reads = True, content == BOARD
                self._changed.notify_all()
        elif kind == "failed":
            said, peer.failed = json.loads(content), True
            if said.get("final"):
                self._fail(ConfigError(said["why"], param=said.get("param")))
            elif self._suspect is None:  # it may only have felt the death of another
                self._suspect = time.monotonic(), f"{peer} failed: {said['why']}"

    def _lost(self, peer: Peer, how: str) -> None:
        self._selector.unregister(peer.connection)
        if self._closing:
            return
        if self._suspect is not None and peer.failed:
            self._fail(RankError(self._suspect[1]))
            return
        ask: Callable[[], str | None] | None = None
        if self._ended is not None:
            ask = partial(self._ended, peer.rank)
        elif peer.exit is not None and peer.exit.known:
            ask = peer.exit.text
        ended, deadline = None, time.monotonic() + VERDICT_S  # its parent reaps it a little later
        while ask is not None and (ended := ask()) is None and time.monotonic() < deadline:
            time.sleep(0.01)
        self._fail(RankError(f"{peer} died: {ended or how}"))

    def _silent(self, peer: Peer, limit_s: float = SILENCE_S) -> None:
        self._fail(RankError(f"{peer} has said nothing for {limit_s:.0f} s: it hangs, or its node is gone"))

    def _look(self, asked: float) -> None:
        """Whether a rank stands still, or lets the others wait; or a stranger its hello. All that had come when `asked` is read:
        this process's own loading may hold this thread up."""
        now = time.monotonic()
        for stranger in [each for each in self._strangers if now - each.since > HELLO_S]:
            self._turn_away(stranger)
        if (late := self.overdue()) is not None:
            self._fail(RankError(late))
        for peer in self._peers.values():
            limit_s = SILENCE_S if peer.ready else LOADING_SILENCE_S
            if peer.awake and asked - peer.heard > limit_s:
                self._silent(peer, limit_s)
            if peer.host == self.host and stopped(peer.pid):
                peer.stopped_since = peer.stopped_since or now
                if now - peer.stopped_since >= BEAT_S:
                    self._fail(RankError(f"{peer} was stopped (SIGSTOP)"))
            else:
                peer.stopped_since = None

    def _fail(self, error: RankError | ConfigError) -> None:
        if self.failure is not None or self._closing:
            return
        with self._changed:
            self.failure = error
            self._changed.notify_all()
        self._spoiled.put(None)
        self.on_failure()

    def _until(self, condition: Callable[[], bool], timeout_s: float | None) -> bool:
        """Wait for `condition`, whose change is notified. Raises the group's failure."""
        with self._changed:
            met = self._changed.wait_for(lambda: self.failure is not None or condition(), timeout_s)
        if self.failure is not None:
            raise self.failure
        return met
