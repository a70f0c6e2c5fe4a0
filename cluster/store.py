"""Store: what outlives a request (responses, chats, files, batches) in one SQLite file that the gateways of a machine share.

An object belongs to one principal and dies at a time. Its parts (events of a stream, pieces of a file, answered lines of
a batch) are numbered. An object that is `open` is being worked on by the gateway that holds its lease; when that gateway
is gone another one claims it. One thread talks to SQLite, so that the event loop never waits for a disk.
"""

from __future__ import annotations

import asyncio
import logging
import sqlite3
import time
import uuid
import weakref
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, TypeVar

import orjson

from kvasir.cluster.state_file import MEMORY, default_path, opened
from kvasir.cluster.stored_items import items_of
from kvasir.engine.errors import ClientError, ConfigError, ServerError

log = logging.getLogger(__name__)
Json = dict[str, Any]
T = TypeVar("T")
Kind = Literal["response", "chat.completion", "conversation", "file", "batch"]

LEASE_S = 15.0
SWEEP_BYTES = 16 * 2**20
_COLUMNS = "id, kind, principal, created, expires, size, open, body, private"


class NotFoundError(ClientError):
    """Nothing of that id belongs to whoever asks."""

    code = "not_found"
    status = 404


class FullError(ClientError):
    """There is no room left for what is to be kept."""

    code = "storage_full"
    status = 413


@dataclass(frozen=True, kw_only=True, slots=True)
class Stored:
    """One object."""

    id: str
    kind: Kind
    principal: str
    created: float = field(default_factory=time.time)
    expires: float
    """Unix time, as `created`."""
    size: int = 0
    """Bytes, parts included."""
    open: bool = False
    """Somebody works on it."""
    body: Json
    """What its owner sees."""
    private: Json = field(default_factory=dict)
    """What we need besides."""


@dataclass(frozen=True, slots=True)
class Part:
    """A numbered piece of an object."""

    number: int
    data: bytes
    failed: bool = False


class Store:
    """Raises ConfigError when `path` can't be used. `max_bytes`: what is kept; beyond it the oldest answers go first."""

    def __init__(self, path: str, max_bytes: int) -> None:
        self.path = path
        self.max_bytes = max_bytes
        self.owner = uuid.uuid4().hex
        self._written = SWEEP_BYTES
        self._swept = 0.0
        self._db = opened(path)
        self._close = weakref.finalize(self, self._db.close)
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="store")

    @classmethod
    def open(cls, path: str | None, max_bytes: int, environ: Mapping[str, str]) -> Store:
        """At `path`. Nobody chose one: at the default, or in memory where that can't be written, such as in a container."""
        if path is not None:
            return cls(path, max_bytes)
        try:
            return cls(default_path(environ), max_bytes)
        except ConfigError as error:
            log.warning("%s: responses, files and batches are kept in memory, and end with this process", error.message)
            return cls(MEMORY, max_bytes)

    async def put(self, stored: Stored, parts: Sequence[Part] = ()) -> None:
        """Keep a new object; one that is `open` is leased to this process."""
        await self._run(self._put, stored, parts)

    async def get(self, object_id: str, kind: Kind, principal: str) -> Stored:
        """Raises NotFoundError: an object of somebody else's doesn't exist."""
        return await self._run(self._get, object_id, kind, principal)

    async def listed(
        self, kind: Kind, principal: str, after: str | None = None, limit: int = 20, *, newest_first: bool = True
    ) -> list[Stored]:
        """Up to `limit` objects behind the one named `after`."""
        return await self._run(self._list, kind, principal, after, limit, newest_first)

    async def change(
        self, object_id: str, change: Callable[[Json], Json | None], *, done: bool = False, ours: bool = False
    ) -> Json | None:
        """Replace the body by what `change` makes of it, unless that is None; `done`: nobody works on it any longer;
        `ours`: only what this process works on. Returns the body as it is then; None: the object is gone, or not ours. No
        other gateway writes meanwhile."""
        return await self._run(self._change, object_id, change, done, ours)

    async def note(self, object_id: str, private: Json) -> None:
        """Replace what we need besides, while this process works on it."""
        await self._run(self._note, object_id, private)

    async def finish(self, object_id: str, body: Json, parts: Sequence[Part] = ()) -> bool:
        """The last parts and the final body at once; False: it isn't open any more, or not ours, nothing is written."""
        return await self._run(self._finish, object_id, body, parts)

    async def settle(self, object_id: str, change: Callable[[Json], Json]) -> None:
        """Change the body, and drop the parts: nobody works on it any longer. Nothing happens where it isn't ours."""
        await self._run(self._settle, object_id, change)

    async def delete(self, object_id: str, kind: Kind, principal: str) -> None:
        """Raises NotFoundError."""
        await self._run(self._delete, object_id, kind, principal)

    async def abandon(self, object_id: str) -> None:
        """Remove what this process works on, and won't finish; nothing happens where it isn't ours."""
        await self._run(self._abandon, object_id)

    async def append(self, object_id: str, parts: Sequence[Part]) -> bool:
        """Add parts to an open object; False: it isn't open any more, or gone, or another process took it over."""
        return await self._run(self._append, object_id, parts)

    async def extend(self, object_id: str, data: Sequence[bytes]) -> None:
        """Add parts behind the last, whoever works on it; nothing happens where the object is gone."""
        await self._run(self._extend, object_id, data)

    async def drop(self, object_id: str, number: int) -> None:
        """Remove one part."""
        await self._run(self._drop, object_id, number)

    async def parts(self, object_id: str, after: int = -1, limit: int = 64) -> list[Part]:
        """Parts behind number `after`, in order."""
        return await self._run(self._parts, object_id, after, limit)

    async def follow(self, object_id: str, after: int) -> tuple[bool, list[Part]]:
        """(whether more may come, some parts behind number `after`)."""
        return await self._run(self._follow, object_id, after)

    async def numbers(self, object_id: str) -> dict[int, bool]:
        """Number of each part -> whether it is a failure."""
        return await self._run(self._numbers, object_id)

    async def counts(self, object_id: str) -> tuple[int, int]:
        """(parts that aren't failures, failures)."""
        return await self._run(self._counts, object_id)

    async def claim(self, kind: Kind, served: Collection[str], limit: int) -> list[Stored]:
        """Take over up to `limit` open objects whose gateway is gone, of those whose private `models` are all served."""
        return await self._run(self._claim, kind, served, limit)

    async def renew(self) -> set[str]:
        """Keep what this process works on, and tell what that is: others may have ended it."""
        return await self._run(self._renew)

    async def release(self, object_ids: Sequence[str]) -> None:
        """Let another gateway take them over at once."""
        await self._run(self._release, object_ids)

    async def room(self, size: int) -> None:
        """Raises FullError unless `size` more bytes of files may be kept."""
        await self._run(self._room, size)

    async def items(self, ids: Sequence[str], principal: str) -> dict[str, Json]:
        """Items of stored responses and conversations, by id: those that there are."""
        return await self._run(items_of, self._db, ids, principal)

    async def keep(self, object_ids: Sequence[str], until: float) -> None:
        """They expire no earlier than `until`."""
        await self._run(self._keep, object_ids, until)

    async def sweep(self) -> None:
        """Drop what has expired, and the oldest answers beyond the bound."""
        await self._run(self._sweep)

    def close(self) -> None:
        """Waits for what is being written."""
        self._thread.shutdown()
        self._close()

    async def _run(self, function: Callable[..., T], *args: Any) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, partial(self._guarded, function, *args))

    def _guarded(self, function: Callable[..., T], *args: Any) -> T:
        """In the thread, in one transaction."""
        try:
            self._db.execute("BEGIN IMMEDIATE")
            try:
                found = function(*args)
            except BaseException:
                self._db.execute("ROLLBACK")
                raise
            self._db.execute("COMMIT")
        except sqlite3.Error as error:
            raise ServerError(f"the state file {self.path} (--state-path) can't be used: {error}") from error
        if self._written >= SWEEP_BYTES or time.time() - self._swept > 60:
            self._written, self._swept = 0, time.time()
            self._tidy()
        return found

    def _tidy(self) -> None:
        """Now and then. It is nobody's request, so nobody's fails with it."""
        try:
            self._guarded(self._sweep)
        except ServerError as error:
            log.warning("%s", error.message)

    def _put(self, stored: Stored, parts: Sequence[Part]) -> None:
        body, private = orjson.dumps(stored.body), orjson.dumps(stored.private)
        size = len(body) + len(private)
        owner, lease = (self.owner, time.time() + LEASE_S) if stored.open else ("", 0.0)
        row = (stored.id, stored.kind, stored.principal, stored.created, stored.expires)
        names = "id, kind, principal, created, expires, size, open, owner, lease, body, private"
        sql = f"INSERT INTO object ({names}) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)"
        self._db.execute(sql, (*row, size, stored.open, owner, lease, body, private))
        self._written += size
        self._add(stored.id, parts)

    def _get(self, object_id: str, kind: Kind, principal: str) -> Stored:
        sql = f"SELECT {_COLUMNS} FROM object WHERE id = ? AND kind = ? AND principal = ? AND expires > ?"
        row = self._db.execute(sql, (object_id, kind, principal, time.time())).fetchone()
        if row is None:
            raise NotFoundError(f"there is no {kind} {object_id!r:.100}", param="id")
        return _stored(row)

    def _list(self, kind: Kind, principal: str, after: str | None, limit: int, newest_first: bool) -> list[Stored]:
        where, values = "kind = ? AND principal = ? AND expires > ?", [kind, principal, time.time()]
        if after is not None:
            sql = "SELECT number FROM object WHERE id = ? AND kind = ? AND principal = ?"
            start = self._db.execute(sql, (after, kind, principal)).fetchone()
            if start is None:
                raise NotFoundError(f"there is no {kind} {after!r:.100}", param="after")
            where, values = f"{where} AND number {'<' if newest_first else '>'} ?", [*values, *start]
        order = "DESC" if newest_first else "ASC"
        sql = f"SELECT {_COLUMNS} FROM object WHERE {where} ORDER BY number {order} LIMIT ?"
        return [_stored(row) for row in self._db.execute(sql, (*values, limit))]

    def _ours(self, object_id: str) -> bool:
        """Whoever was suspended for longer than a lease may go on with what another took over since."""
        sql = "SELECT 1 FROM object WHERE id = ? AND open AND owner = ?"
        return self._db.execute(sql, (object_id, self.owner)).fetchone() is not None

    def _change(self, object_id: str, change: Callable[[Json], Json | None], done: bool, ours: bool) -> Json | None:
        row = self._db.execute("SELECT body FROM object WHERE id = ?", (object_id,)).fetchone()
        if row is None or (ours and not self._ours(object_id)):
            return None
        before: Json = orjson.loads(row[0])
        after = change(before)
        if after is None:
            return before
        sql = "UPDATE object SET body = ?, open = open AND NOT ? WHERE id = ?"
        self._db.execute(sql, (orjson.dumps(after), done, object_id))
        return after

    def _note(self, object_id: str, private: Json) -> None:
        if self._ours(object_id):
            self._db.execute("UPDATE object SET private = ? WHERE id = ?", (orjson.dumps(private), object_id))

    def _finish(self, object_id: str, body: Json, parts: Sequence[Part]) -> bool:
        if not self._append(object_id, parts):
            return False
        dumped = orjson.dumps(body)
        sql = "UPDATE object SET body = ?, size = size + ?, open = 0 WHERE id = ?"
        self._db.execute(sql, (dumped, len(dumped), object_id))
        self._written += len(dumped)
        return True

    def _settle(self, object_id: str, change: Callable[[Json], Json]) -> None:
        if self._change(object_id, change, True, True) is None:
            return
        self._db.execute("DELETE FROM part WHERE id = ?", (object_id,))
        sql = "UPDATE object SET size = length(body) + length(private) WHERE id = ?"
        self._db.execute(sql, (object_id,))

    def _delete(self, object_id: str, kind: Kind, principal: str) -> None:
        self._get(object_id, kind, principal)
        self._db.execute("DELETE FROM object WHERE id = ?", (object_id,))

    def _abandon(self, object_id: str) -> None:
        if self._ours(object_id):
            self._db.execute("DELETE FROM object WHERE id = ?", (object_id,))

    def _append(self, object_id: str, parts: Sequence[Part]) -> bool:
        if not self._ours(object_id):
            return False
        self._add(object_id, parts)
        return True

    def _extend(self, object_id: str, data: Sequence[bytes]) -> None:
        if self._db.execute("SELECT 1 FROM object WHERE id = ?", (object_id,)).fetchone() is not None:
            sql = "SELECT coalesce(max(number) + 1, 0) FROM part WHERE id = ?"
            (first,) = self._db.execute(sql, (object_id,)).fetchone()
            self._add(object_id, [Part(first + i, one) for i, one in enumerate(data)])

    def _drop(self, object_id: str, number: int) -> None:
        self._db.execute("DELETE FROM part WHERE id = ? AND number = ?", (object_id, number))

    def _add(self, object_id: str, parts: Sequence[Part]) -> None:
        rows = [(object_id, part.number, part.failed, part.data) for part in parts]
        self._db.executemany("INSERT OR REPLACE INTO part VALUES (?, ?, ?, ?)", rows)
        size = sum(len(part.data) for part in parts)
        self._db.execute("UPDATE object SET size = size + ? WHERE id = ?", (size, object_id))
        self._written += size

    def _parts(self, object_id: str, after: int, limit: int) -> list[Part]:
        sql = "SELECT number, data, failed FROM part WHERE id = ? AND number > ? ORDER BY number LIMIT ?"
        return [Part(number, data, bool(f)) for number, data, f in self._db.execute(sql, (object_id, after, limit))]

    def _follow(self, object_id: str, after: int) -> tuple[bool, list[Part]]:
        found = self._db.execute("SELECT open FROM object WHERE id = ?", (object_id,)).fetchone()
        parts = self._parts(object_id, after, 256)
        return bool(found and found[0]) or len(parts) == 256, parts

    def _numbers(self, object_id: str) -> dict[int, bool]:
        rows = self._db.execute("SELECT number, failed FROM part WHERE id = ?", (object_id,))
        return {number: bool(failed) for number, failed in rows}

    def _counts(self, object_id: str) -> tuple[int, int]:
        rows = self._db.execute("SELECT failed, count(*) FROM part WHERE id = ? GROUP BY failed", (object_id,))
        found = dict(rows.fetchall())
        return found.get(0, 0), found.get(1, 0)

    def _claim(self, kind: Kind, served: Collection[str], limit: int) -> list[Stored]:
        sql = f"SELECT {_COLUMNS} FROM object WHERE kind = ? AND open AND lease < ? ORDER BY number"
        found: list[Stored] = []
        for row in self._db.execute(sql, (kind, time.time())).fetchall():
            stored = _stored(row)
            if len(found) < limit and set(stored.private["models"]) <= set(served):
                found.append(stored)
        leased = [(self.owner, time.time() + LEASE_S, stored.id) for stored in found]
        self._db.executemany("UPDATE object SET owner = ?, lease = ? WHERE id = ?", leased)
        return found

    def _renew(self) -> set[str]:
        mine = "open AND owner = ? AND lease > 0"
        self._db.execute(f"UPDATE object SET lease = ? WHERE {mine}", (time.time() + LEASE_S, self.owner))
        return {row[0] for row in self._db.execute(f"SELECT id FROM object WHERE {mine}", (self.owner,))}

    def _release(self, object_ids: Sequence[str]) -> None:
        sql = "UPDATE object SET lease = 0 WHERE owner = ? AND id = ?"
        self._db.executemany(sql, [(self.owner, object_id) for object_id in object_ids])

    def _room(self, size: int) -> None:
        sql = "SELECT coalesce(sum(size), 0) FROM object WHERE kind IN ('file', 'batch')"
        (used,) = self._db.execute(sql).fetchone()
        if used + size > self.max_bytes:
            text = f"{size} bytes don't fit: files take {used} of {self.max_bytes} bytes (--max-state-bytes)"
            raise FullError(f"{text}; delete some")

    def _keep(self, object_ids: Sequence[str], until: float) -> None:
        self._db.executemany(
            "UPDATE object SET expires = max(expires, ?) WHERE id = ?", [(until, i) for i in object_ids]
        )

    def _sweep(self) -> None:
        now = time.time()
        self._db.execute("DELETE FROM object WHERE expires <= ? AND (NOT open OR lease < ?)", (now, now))
        self._db.execute(
            "DELETE FROM object WHERE kind = 'file' AND open AND lease < ?", (now - LEASE_S,)
        )  # half written
        (used,) = self._db.execute("SELECT coalesce(sum(size), 0) FROM object").fetchone()
        answers = "SELECT id, size FROM object WHERE NOT open AND kind NOT IN ('file', 'batch') ORDER BY number"
        gone = _first(self._db.execute(answers), used - self.max_bytes)
        self._db.executemany("DELETE FROM object WHERE id = ?", gone)
        self._db.execute("PRAGMA incremental_vacuum").fetchall()


def _stored(row: Any) -> Stored:
    object_id, kind, principal, created, expires, size, open_, body, private = row
    facts = {"created": created, "expires": expires, "size": size, "open": bool(open_)}
    return Stored(
        id=object_id, kind=kind, principal=principal, body=orjson.loads(body), private=orjson.loads(private), **facts
    )


def _first(rows: Iterable[tuple[str, int]], excess: int) -> list[tuple[str]]:
    """Ids of the first of `rows`, (id, size), that together have `excess` bytes."""
    found: list[tuple[str]] = []
    for object_id, size in rows:
        if excess <= 0:
            break
        found.append((object_id,))
        excess -= size
    return found
