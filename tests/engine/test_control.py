"""The control channel between ranks: who may join it, what it waits for and how long, and what it tells of those that fail."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import random
import re
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from waiting import until

from kvasir.engine import control
from kvasir.engine.control import Hub, RankError
from kvasir.engine.frames import HEAD, KINDS, Kind, encode_tickets, send
from kvasir.engine.spoke import Spoke


def hello(said: bytes) -> bytes:
    return HEAD.pack(len(said), KINDS.index("hello")) + said


def connected(hub: Hub) -> socket.socket:
    host, _, port = hub.address.rpartition(":")
    return socket.create_connection((host, int(port)), 30)


def test_a_rank_that_doesnt_come_is_named() -> None:
    hub = Hub("127.0.0.1", 3)
    try:
        spoke = Spoke(hub.address, hub.token, 2, os.getpid(), gone=lambda: None)
        with pytest.raises(RankError, match=r"rank 1 of 3 didn't connect to 127.0.0.1:.* within 0.3 s"):
            hub.meet(0.3)
    finally:
        hub.close()
    spoke.close()


@pytest.mark.parametrize(
    ("wait", "say", "doing"),
    [
        (Hub.all_awake, "awake", "loading its libraries"),
        (Hub.assemble, "here", "loading its share"),
        (Hub.all_ready, "ready", "loading its share"),
    ],
)
def test_a_rank_that_loads_for_long_is_named_and_waited_for(
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    wait: Callable[[Hub], None],
    say: Kind,
    doing: str,
) -> None:
    """No exchange begins before, whose limit would count meanwhile."""
    monkeypatch.setattr(control, "NOTE_S", 0.05)
    hub = Hub("127.0.0.1", 3)
    spokes = [Spoke(hub.address, hub.token, rank, os.getpid(), gone=lambda: None) for rank in (1, 2)]
    try:
        hub.meet(20)
        spokes[0].send(say)
        with ThreadPoolExecutor(1) as pool:
            waiting = pool.submit(wait, hub)
            named = re.compile(rf"rank 2 \(pid \d+ on 127.0.0.1\) has been {doing} for \d+ s: its disk, its network or")
            assert until(lambda: any(named.match(record.getMessage()) for record in caplog.records))
            assert not waiting.done()
            spokes[1].send(say)
            waiting.result(20)
    finally:
        hub.close()
        for spoke in spokes:
            spoke.close()


def test_libraries_arent_waited_for_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(control, "WAKING_S", 0.0)
    hub = Hub("127.0.0.1", 2)
    spoke = Spoke(hub.address, hub.token, 1, os.getpid(), gone=lambda: None)
    try:
        hub.meet(20)
        with pytest.raises(
            RankError, match=r"^rank 1 \(pid \d+ on 127.0.0.1\) has been loading its libraries for 0 s, and"
        ):
            hub.all_awake()
    finally:
        hub.close()
        spoke.close()


def test_ranks_go_on_together() -> None:
    hub = Hub("127.0.0.1", 3)
    spokes = [Spoke(hub.address, hub.token, rank, os.getpid(), gone=lambda: None) for rank in (1, 2)]
    order: list[str] = []

    def come(assemble: Callable[[], None]) -> None:
        for turn in range(3):
            time.sleep(random.random() / 50)
            order.append(f"here {turn}")
            assemble()
            order.append(f"on {turn}")

    try:
        hub.meet(20)
        with ThreadPoolExecutor(3) as pool:
            list(pool.map(come, (hub.assemble, *(spoke.assemble for spoke in spokes))))
        for turn in range(3):
            last_here = max(at for at, what in enumerate(order) if what == f"here {turn}")
            assert last_here < order.index(f"on {turn}")
    finally:
        hub.close()
        for spoke in spokes:
            spoke.close()


def test_a_rank_that_falls_silent_while_it_loads_is_given_up() -> None:
    """It froze on a node whose system goes on: its connection stands."""
    hub = Hub("127.0.0.1", 3)
    spoke = Spoke(hub.address, hub.token, 1, os.getpid(), gone=lambda: None)
    try:
        spoke.send("awake")
        with connected(hub) as connection:
            connection.sendall(hello(json.dumps({"token": hub.token, "rank": 2, "pid": os.getpid()}).encode()))
            hub.meet(20)
            hub._peers[2].heard -= 2 * control.LOADING_SILENCE_S
            time.sleep(4 * control.LOOK_S)
            assert hub.failure is None  # its libraries may hold up whatever it would say
            send(connection, "awake", b"")
            hub.all_awake()
            hub._peers[2].heard -= 2 * control.SILENCE_S
            time.sleep(4 * control.LOOK_S)
            assert hub.failure is None
            hub._peers[2].heard -= control.LOADING_SILENCE_S
            with pytest.raises(RankError, match=r"^rank 2 .* has said nothing for 60 s: it hangs, or its node is gone"):
                hub.all_ready()
    finally:
        hub.close()
        spoke.close()


STRANGE = [
    b"",
    b"GET / HTTP/1.1\r\n\r\n",
    b"\xff" * 64,
    HEAD.pack(2, KINDS.index("step")) + b"{}",
    *map(
        hello,
        (b"", b"[]", b'"x"', b"7", b"{}", b"[" * 500, b"\xff", b'{"token": "no", "r": 1}', b'{"token": "\\ud800"}'),
    ),
    hello(b"[" * 4000),
]


@pytest.mark.parametrize("said", STRANGE)
def test_strangers_are_turned_away(said: bytes) -> None:
    hub = Hub("127.0.0.1", 2)
    try:
        with connected(hub) as connection, contextlib.suppress(OSError):  # it may already be closed
            connection.sendall(said)
            connection.shutdown(socket.SHUT_WR)
            assert connection.recv(1) == b""
        spoke = Spoke(hub.address, hub.token, 1, os.getpid(), gone=lambda: None)
        assert hub.meet(30) == {0: "127.0.0.1", 1: "127.0.0.1"}
    finally:
        hub.close()
    spoke.close()


@pytest.mark.parametrize("change", [{"rank": 0}, {"rank": 2}, {"rank": "1"}, {"pid": None}, {}])
def test_who_knows_the_token_and_is_no_rank_is_turned_away(change: dict[str, Any]) -> None:
    hub = Hub("127.0.0.1", 2)
    spoke = Spoke(hub.address, hub.token, 1, os.getpid(), gone=lambda: None)
    try:
        hub.meet(30)
        with connected(hub) as connection:
            connection.sendall(hello(json.dumps({"token": hub.token, "rank": 1, "pid": 1, **change}).encode()))
            assert connection.recv(1) == b""
        assert hub.failure is None
    finally:
        hub.close()
        spoke.close()


def test_strangers_that_dawdle_delay_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    """One is silent, one says its hello byte by byte: results are heard beside them, and their time is limited as a whole."""
    monkeypatch.setattr(control, "HELLO_S", float("inf"))
    hub = Hub("127.0.0.1", 2)
    heard = threading.Event()
    hub.on_result = lambda frame: heard.set()
    spoke = Spoke(hub.address, hub.token, 1, os.getpid(), gone=lambda: None)
    try:
        with connected(hub) as silent, connected(hub) as slow:
            for byte in hello(b"{" + b" " * 8)[:-1]:
                slow.sendall(bytes([byte]))
                heard.clear()
                spoke.send("result", b"x")
                assert heard.wait(60)
            assert until(lambda: len(hub._strangers) == 2)
            monkeypatch.setattr(control, "HELLO_S", 0.1)
            assert (silent.recv(1), slow.recv(1)) == (b"", b"")
        assert hub.failure is None
    finally:
        hub.close()
        spoke.close()


def test_a_crowd_of_strangers_keeps_no_rank_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """The oldest are turned away."""
    monkeypatch.setattr(control, "HELLO_S", float("inf"))
    monkeypatch.setattr(control, "MORE_STRANGERS", 1)
    hub = Hub("127.0.0.1", 2)
    with contextlib.ExitStack() as stack:
        stack.callback(hub.close)
        crowd = [stack.enter_context(connected(hub)) for _ in range(6)]
        assert [connection.recv(1) for connection in crowd[:3]] == [b""] * 3
        spoke = Spoke(hub.address, hub.token, 1, os.getpid(), gone=lambda: None)
        stack.callback(spoke.close)
        hub.meet(30)
        assert len(hub._strangers) <= 3


def test_whatever_stops_the_control_thread_is_the_end_of_the_group() -> None:
    """Nobody would see a rank die any more, or hear a result."""
    hub = Hub("127.0.0.1", 2)
    spoke = Spoke(hub.address, hub.token, 1, os.getpid(), gone=lambda: None)
    try:
        hub.meet(30)
        spoke.send("fetched", b"?")
        assert until(lambda: hub.failure is not None)
        assert "can't hear the other ranks any more: error: unpack requires" in str(hub.failure)
    finally:
        hub.close()
        spoke.close()


@pytest.mark.parametrize("order", [(1, 2), (2, 1)])
def test_ranks_that_fail_together_say_why(order: tuple[int, int]) -> None:
    """Both explain themselves and end; whichever connection closes first, the cause is what one of them said."""
    hub = Hub("127.0.0.1", 3)
    try:
        spokes = {rank: Spoke(hub.address, hub.token, rank, os.getpid(), gone=lambda: None) for rank in (1, 2)}
        hub.meet(20)
        for rank in (1, 2):
            spokes[rank].send("failed", json.dumps({"why": f"ValueError: {rank}", "final": False}).encode())
            limit = time.monotonic() + 60
            while not hub._peers[rank].failed and time.monotonic() < limit:
                time.sleep(0.001)
        for rank in order:
            spokes[rank].close()
        assert "rank 1 " in str(hub.verdict(""))
        assert "failed: ValueError: 1" in str(hub.failure)
    finally:
        hub.close()


def test_a_fetch_that_two_ranks_lacked_is_told_once() -> None:
    hub = Hub("127.0.0.1", 2)
    spoke = Spoke(hub.address, hub.token, 1, os.getpid(), gone=lambda: None)
    try:
        hub.meet(20)
        hub.spoil([7, 8])
        spoke.send("spoiled", encode_tickets([8, 9]))
        assert sorted(hub.spoiled()) == [7, 8, 9]
    finally:
        hub.close()
        spoke.close()


class Unacknowledged:
    """A connection of which the system says that nobody has acknowledged anything for long."""

    def __init__(self, connection: socket.socket, number: int) -> None:
        self._connection, self._number = connection, number

    def recv(self, *_: int) -> bytes:
        raise OSError(self._number, os.strerror(self._number))

    sendall = recv

    def __getattr__(self, name: str) -> Any:
        return getattr(self._connection, name)


@pytest.mark.parametrize("number", [errno.ETIMEDOUT, errno.EHOSTUNREACH])
@pytest.mark.parametrize("sending", [False, True])
def test_a_node_that_is_gone_is_told_in_the_same_words_by_whoever_sees_it_first(number: int, sending: bool) -> None:
    """The system's limit of time and the look at the clock are both at 10 s."""
    hub = Hub("127.0.0.1", 2)
    spoke = Spoke(hub.address, hub.token, 1, os.getpid(), gone=lambda: None)
    try:
        hub.meet(20)
        peer = hub._peers[1]
        peer.connection = Unacknowledged(peer.connection, number)  # type: ignore[assignment]
        if sending:
            with pytest.raises(RankError, match="has said nothing for 10 s: it hangs, or its node is gone"):
                hub.step(b"")
        else:
            spoke.send("beat")
        assert until(lambda: hub.failure is not None)
        assert "its node is gone" in str(hub.failure)
    finally:
        hub.close()
        spoke.close()


def test_what_any_rank_lacked_counts() -> None:
    hub = Hub("127.0.0.1", 3)
    spokes = [Spoke(hub.address, hub.token, rank, os.getpid(), gone=lambda: None) for rank in (1, 2)]
    try:
        hub.meet(30)
        for own, said in (((), ((), (7, 2**40))), ((3,), ((), ()))):
            hub.spoil(own)
            for spoke, tickets in zip(spokes, said, strict=True):
                spoke.send("spoiled", encode_tickets(tickets))
            assert sorted(hub.spoiled()) == sorted([*own, *said[0], *said[1]])
        hub.spoil(())
        spokes[0].send("spoiled", encode_tickets(()))
        spokes[1].close()
        for _ in range(2):
            with pytest.raises(RankError, match="rank 2"):
                hub.spoiled()
    finally:
        spokes[0].close()
        hub.close()
