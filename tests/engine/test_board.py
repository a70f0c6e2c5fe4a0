"""The board: every reader gets every message in order, long ones another way, and a slow reader loses nothing."""

from __future__ import annotations

import fcntl
import json
import os
import random
import resource
import socket
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from waiting import until

from kvasir.engine import board
from kvasir.engine.board import SLOT_BYTES, Poster, Reader
from kvasir.engine.control import Hub
from kvasir.engine.frames import send
from kvasir.engine.spoke import Spoke
from kvasir.kernels import native

pytestmark = pytest.mark.skipif(native.library() is None, reason=f"no compiled kernels: {native.native().text}")
HOST = "127.0.0.1"


def messages(count: int) -> list[bytes]:
    rng = random.Random(0)
    return [rng.randbytes(rng.choice([0, 1, 30, 5000, SLOT_BYTES])) for _ in range(count)]


def test_every_reader_gets_every_message() -> None:
    """More than there are slots: who posts waits for the slowest."""
    poster, sent = Poster(3), messages(200)

    def read(rank: int) -> list[bytes]:
        reader, found = Reader(poster.where, rank, 3), []
        while len(found) < len(sent):
            there, message = reader.take(1.0)
            assert there == (message is not None)
            found += [message] if message is not None else []
        return found

    with ThreadPoolExecutor(2) as pool:
        jobs = [pool.submit(read, rank) for rank in (1, 2)]
        assert all(poster.post(message, [1, 2], lambda: True) for message in sent)
        assert all(job.result() == sent for job in jobs)


def test_nothing_is_there() -> None:
    poster = Poster(2)
    reader = Reader(poster.where, 1, 2)
    assert reader.take(0.001) == (False, None)
    assert not poster.post(bytes(SLOT_BYTES + 1), [1], lambda: True)
    assert reader.take(0.001) == (True, None), "it comes another way"


def test_who_waits_looks_up_when_something_comes_another_way() -> None:
    poster = Poster(2)
    reader = Reader(poster.where, 1, 2)
    with ThreadPoolExecutor(1) as pool:
        job = pool.submit(reader.take, 120.0)
        while not job.done():
            poster.nudge()
        assert job.result() == (False, None)
    assert poster.post(b"x", [1], lambda: True)
    assert reader.take(1.0) == (True, b"x")


def test_who_posts_gives_up_with_the_group() -> None:
    poster, looks = Poster(2), []

    def going() -> bool:
        looks.append(True)
        return len(looks) < 3

    for _ in range(17):
        poster.post(b"x", [1], going)
    assert len(looks) == 3


def greeted(hub: Hub, ranks: int) -> list[Spoke]:
    """Ranks that have loaded."""
    spokes = [Spoke(hub.address, hub.token, rank, os.getpid(), gone=lambda: None) for rank in range(1, ranks)]
    hub.meet(20)
    for rank, spoke in enumerate(spokes, 1):
        hub.welcome(rank, {"place": rank})
        _, content = spoke.receive()
        spoke.ready(json.loads(content)["board"], ranks)
    hub.all_ready()
    return spokes


@pytest.mark.parametrize("refused", [0, 1, 2])
def test_steps_come_in_order_by_either_way(refused: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Short and long ones, to ranks of which so many have no access to the board."""
    left = refused

    def limited(*given: Any) -> Reader:
        nonlocal left
        left -= 1
        if left >= 0:
            raise OSError("no memory")
        return Reader(*given)

    monkeypatch.setattr(board, "Reader", limited)
    hub = Hub(HOST, 3)
    spokes = greeted(hub, 3)
    assert [spoke._reader is None for spoke in spokes].count(True) == refused
    sent = [*messages(40), bytes(200_000), b"after", bytes(300_000), *messages(5)]
    with ThreadPoolExecutor(2) as pool:
        jobs = [pool.submit(lambda spoke=spoke: [spoke.receive() for _ in sent]) for spoke in spokes]
        for frame in sent:
            hub.step(frame)
        assert all(job.result() == [("step", frame) for frame in sent] for job in jobs)
    hub.close()
    for spoke in spokes:
        spoke.close()


@pytest.mark.parametrize("before", [0, 1])
def test_a_long_step_that_begins_while_one_looks_elsewhere(before: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Announced and sent behind a look at the board, and before the look at the connection; perhaps behind another frame."""
    hub = Hub(HOST, 2)
    (spoke,) = greeted(hub, 2)
    look, long = Spoke._is_readable, bytes(SLOT_BYTES + 1)

    def late(spoke: Spoke) -> bool:
        monkeypatch.setattr(Spoke, "_is_readable", look)
        for _ in range(before):
            send(next(iter(hub._peers.values())).connection, "serve", b"")
        hub.step(long)
        hub.step(b"after")
        return look(spoke)

    monkeypatch.setattr(Spoke, "_is_readable", late)
    with ThreadPoolExecutor(1) as pool:
        found = [pool.submit(spoke.receive).result(timeout=60) for _ in range(before + 2)]
    assert found == [("serve", b"")] * before + [("step", long), ("step", b"after")]
    hub.close()
    spoke.close()


def test_other_messages_come_while_there_are_steps() -> None:
    """The next step is posted before the last one ends: whoever looks elsewhere only when there is none never does."""
    hub = Hub(HOST, 2)
    (spoke,) = greeted(hub, 2)
    long = bytes(SLOT_BYTES + 1)
    for frame in (b"1", b"2"):
        hub.step(frame)
    hub.grammar(1, b"a")
    assert until(spoke._is_readable)
    assert [spoke.receive() for _ in range(2)] == [("grammar", b"a"), ("step", b"1")]
    for frame in (b"3", long, b"5"):
        hub.step(frame)
    hub.grammar(1, b"b")
    hub.step(b"6")
    assert until(spoke._is_readable)
    found = [spoke.receive() for _ in range(6)]
    assert [content for kind, content in found if kind == "step"] == [b"2", b"3", long, b"5", b"6"]
    assert found.index(("grammar", b"b")) < 5, "only what is in front of it in the connection is waited for"
    hub.close()
    spoke.close()


def test_nothing_is_lost_of_many_of_every_kind() -> None:
    """Each kind in its own order."""
    hub, rng = Hub(HOST, 2), random.Random(1)
    (spoke,) = greeted(hub, 2)
    sizes = [0, 1, 30, 5000, SLOT_BYTES, SLOT_BYTES + 1, 200_000]
    sent = [(rng.choice(["step", "step", "grammar"]), rng.randbytes(rng.choice(sizes))) for _ in range(300)]
    with ThreadPoolExecutor(1) as pool:
        job = pool.submit(lambda: [spoke.receive() for _ in sent])
        for kind, frame in sent:
            hub.step(frame) if kind == "step" else hub.grammar(1, frame)
        found = job.result()
    for kind in ("step", "grammar"):
        assert [each for each in found if each[0] == kind] == [each for each in sent if each[0] == kind]
    hub.close()
    spoke.close()


def test_what_was_said_before_the_end_is_done() -> None:
    hub = Hub(HOST, 2)
    (spoke,) = greeted(hub, 2)
    for frame in (b"1", b"2"):
        hub.step(frame)
    hub.close()
    assert until(spoke._is_readable)
    assert [spoke.receive() for _ in range(2)] == [("step", b"1"), ("step", b"2")]
    with pytest.raises(EOFError):
        spoke.receive()
    spoke.close()


def test_a_process_with_many_descriptors(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that loads hundreds of files has connections with numbers from 1024 on."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard <= 1200:
        pytest.skip("no process here may have so many")
    connect = socket.create_connection

    def far(*where: Any) -> socket.socket:
        with connect(*where) as near:
            return socket.socket(fileno=fcntl.fcntl(near, fcntl.F_DUPFD_CLOEXEC, 1100))

    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 1200), hard))
    monkeypatch.setattr(socket, "create_connection", far)
    hub = Hub(HOST, 2)
    (spoke,) = greeted(hub, 2)
    assert spoke._connection.fileno() >= 1100
    hub.step(b"short")
    assert spoke.receive() == ("step", b"short")
    hub.close()
    spoke.close()
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def ends(act: Callable[[Hub], object]) -> type[BaseException] | str:
    """What a rank that waits for a step gets when this happens."""
    hub = Hub(HOST, 2)
    (spoke,) = greeted(hub, 2)
    found: list[Any] = []

    def wait() -> None:
        try:
            found.append(spoke.receive()[0])
        except EOFError as error:
            found.append(type(error))

    thread = threading.Thread(target=wait)
    thread.start()
    act(hub)
    thread.join(60)
    hub.close()
    spoke.close()
    return found[0]  # type: ignore[no-any-return]


def test_other_messages_come_beside_it() -> None:
    assert ends(lambda hub: send(hub._peers[1].connection, "serve", b"{}")) == "serve"
    assert ends(Hub.close) is EOFError
