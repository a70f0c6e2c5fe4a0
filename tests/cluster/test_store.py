"""The store by itself: what is kept, for whom, how long, and who works on it."""

from __future__ import annotations

import asyncio
import sqlite3
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from kvasir.cluster import state_file
from kvasir.cluster import store as store_module
from kvasir.cluster.files import PIECE, FileWriter
from kvasir.cluster.store import FullError, NotFoundError, Part, Store, Stored
from kvasir.engine.errors import ConfigError, ServerError, UnavailableError


def thing(name: str, **fields: Any) -> Stored:
    given: dict[str, Any] = {"kind": "response", "principal": "me", "expires": time.time() + 60, "body": {"id": name}}
    return Stored(id=name, **{**given, "private": {"models": ["m"]}, **fields})


@pytest.fixture
def made(tmp_path: Path) -> Any:
    """Stores of one file, closed at the end."""
    stores: list[Store] = []

    def make(max_bytes: int = 2**30) -> Store:
        stores.append(Store(str(tmp_path / "state.db"), max_bytes))
        return stores[-1]

    yield make
    for one in stores:
        one.close()


Made = Callable[..., Store]


@pytest.fixture
def pass_leases(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Makes the stores' clock show that all leases are over."""
    ahead = 0.0

    def pass_() -> None:
        nonlocal ahead
        ahead += 1.5 * store_module.LEASE_S

    monkeypatch.setattr(store_module, "time", SimpleNamespace(time=lambda: time.time() + ahead))
    return pass_


def test_belongs_to_one(made: Made) -> None:
    async def run() -> None:
        store = made()
        await store.put(thing("a"))
        assert (await store.get("a", "response", "me")).body == {"id": "a"}
        for kind, principal in (("response", "you"), ("file", "me")):
            with pytest.raises(NotFoundError):
                await store.get("a", kind, principal)  # type: ignore[arg-type]
            with pytest.raises(NotFoundError):
                await store.delete("a", kind, principal)  # type: ignore[arg-type]
        await store.delete("a", "response", "me")
        assert await store.change("a", lambda body: body) is None

    asyncio.run(run())


def test_files_are_prepared_by_one_after_the_other(tmp_path: Path) -> None:
    """SQLite tells the second one that turns on write-ahead logging at once that the file is locked."""
    path = tmp_path / "state.db"
    other = threading.Thread(target=lambda: state_file.opened(str(path)).close())
    with state_file._alone(tmp_path):
        other.start()
        other.join(0.2)
        assert other.is_alive()
        assert not path.exists()
    other.join()
    assert path.exists()


def test_parts_die_with_their_object(made: Made, tmp_path: Path) -> None:
    async def run() -> None:
        store = made()
        await store.put(thing("a", open=True), [Part(0, b"x")])
        assert await store.append("a", [Part(1, b"yy", True)])
        assert await store.follow("a", -1) == (True, [Part(0, b"x"), Part(1, b"yy", True)])
        assert await store.numbers("a") == {0: False, 1: True}
        assert await store.counts("a") == (1, 1)
        assert await store.finish("a", {"done": 1}, [Part(2, b"z")])
        assert not await store.append("a", [Part(3, b"late")])
        assert not await store.finish("a", {"done": 2})
        assert await store.follow("a", 1) == (False, [Part(2, b"z")])
        await store.delete("a", "response", "me")
        assert await store.parts("a") == []

    asyncio.run(run())


def test_leases(made: Made, pass_leases: Callable[[], None]) -> None:
    """What is worked on has one owner; another takes over when that one is silent, or lets go."""

    async def run() -> None:
        one, other = made(), made()
        for name in ("a", "b", "c"):
            await one.put(thing(name, open=True))
        await one.put(thing("else", open=True, private={"models": ["n"]}))
        assert await other.claim("response", {"m"}, 9) == []
        await one.release(["a"])
        assert [found.id for found in await other.claim("response", {"m"}, 9)] == ["a"]
        assert await one.renew() == {"b", "c", "else"}
        pass_leases()
        assert [found.id for found in await other.claim("response", {"m"}, 1)] == ["a"]
        assert [found.id for found in await other.claim("response", {"m"}, 9)] == ["b", "c"]
        assert await one.renew() == {"else"}

    asyncio.run(run())


def test_what_another_took_over_is_left_to_it(made: Made) -> None:
    """Whoever was suspended for longer than a lease goes on before it notices."""

    async def run() -> None:
        one, other = made(), made()
        await one.put(thing("a", open=True), [Part(0, b"x")])
        await one.release(["a"])
        await other.claim("response", {"m"}, 9)
        assert not await one.append("a", [Part(0, b"late")])
        assert not await one.finish("a", {"id": "late"})
        assert await one.change("a", lambda body: {"id": "late"}, done=True, ours=True) is None
        await one.settle("a", lambda body: {"id": "late"})
        await one.note("a", {"models": ["late"]})
        found = await one.get("a", "response", "me")
        assert (found.open, found.body, found.private) == (True, {"id": "a"}, {"models": ["m"]})
        assert await one.parts("a") == [Part(0, b"x")]
        assert await other.append("a", [Part(1, b"y")])
        assert await one.change("a", lambda body: {"id": "b"}) == {"id": "b"}, "anybody may cancel"
        assert await other.finish("a", {"id": "c"})

    asyncio.run(run())


@pytest.mark.parametrize("end", [lambda file: file.write(b"x" * PIECE), lambda file: file.done(60)])
def test_a_file_that_was_taken_for_left_is_no_file(made: Made, end: Any) -> None:
    """Its gateway was suspended, and another one dropped what had come: who sent it is told, and has no id of nothing."""

    async def run() -> None:
        one, other = made(), made()
        file = FileWriter(one, "me", "batch", "f")
        await file.write(b"x" * PIECE)
        await one.release([file.id])
        await other.sweep()
        with pytest.raises(UnavailableError, match="what had come of the file was dropped; send it again"):
            await end(file)
        await file.drop()
        assert await one.listed("file", "me") == []

    asyncio.run(run())


def test_a_file_that_is_dropped_is_gone(made: Made) -> None:
    """Nobody is told that there is no such file, who sent one that is too large, say."""

    async def run() -> None:
        store = made()
        file = FileWriter(store, "me", "batch", "f")
        await file.write(b"x" * (PIECE + 1))
        await file.drop()
        await store.room(2**30)
        assert not await store.append(file.id, [])

    asyncio.run(run())


def test_expired(made: Made) -> None:
    async def run() -> None:
        store = made()
        await store.put(thing("old", expires=time.time() - 1))
        await store.put(thing("busy", expires=time.time() - 1, open=True))
        await store.put(thing("new"))
        with pytest.raises(NotFoundError):
            await store.get("old", "response", "me")
        await store.sweep()
        await store.keep(["old", "busy"], time.time() + 9)
        assert [found.id for found in await store.listed("response", "me")] == ["new", "busy"]

    asyncio.run(run())


def test_the_oldest_answers_make_room(made: Made) -> None:
    async def run() -> None:
        store = made(max_bytes=10_000)
        await store.put(thing("file", kind="file", body={"x": "x" * 4000}))
        for name in "abcdef":
            await store.put(thing(name, body={"x": "x" * 1800}))
        await store.sweep()
        assert [found.id for found in await store.listed("response", "me", newest_first=False)] == ["d", "e", "f"]
        await store.room(5900)
        with pytest.raises(FullError, match="--max-state-bytes"):
            await store.room(6100)

    asyncio.run(run())


def test_half_written_files_are_swept(made: Made, pass_leases: Callable[[], None]) -> None:
    async def run() -> None:
        store = made()
        await store.put(thing("half", kind="file", open=True))
        for _ in range(2):  # its lease, and as long again
            pass_leases()
        await store.sweep()
        assert await store.counts("half") == (0, 0)
        assert await store.listed("file", "me") == []

    asyncio.run(run())


def test_two_write_at_once(made: Made) -> None:
    """Changes of two processes follow each other: none is lost."""

    async def run() -> None:
        stores = [made(), made()]
        await stores[0].put(thing("a", body={"n": 0}))
        for _ in range(10):
            await asyncio.gather(
                *(one.change("a", lambda body: {"n": body["n"] + 1}) for one in stores for _ in range(5))
            )
        assert (await stores[0].get("a", "response", "me")).body == {"n": 100}

    asyncio.run(run())


def test_a_change_that_fails_changes_nothing(made: Made) -> None:
    def wrong(body: Any) -> Any:
        raise ValueError

    async def run() -> None:
        store = made()
        await store.put(thing("a"))
        with pytest.raises(ValueError):
            await store.change("a", wrong)
        with pytest.raises(ServerError, match="--state-path"):
            await store.put(thing("a"))
        assert (await store.get("a", "response", "me")).body == {"id": "a"}

    asyncio.run(run())


def test_state_of_another_version(tmp_path: Path) -> None:
    path = tmp_path / "state.db"
    db = sqlite3.connect(path)
    db.execute("PRAGMA user_version = 99")
    db.close()
    with pytest.raises(ConfigError, match="version 99"):
        Store(str(path), 2**20)
