"""Files in the store: their objects, what is in them, and how one is written piece by piece."""

from __future__ import annotations

import codecs
import time
import uuid
from collections.abc import AsyncIterator
from typing import Any

from kvasir.cluster.batch_line import MAX_LINE_BYTES
from kvasir.cluster.caller import Lookup
from kvasir.cluster.pages import Page
from kvasir.cluster.store import LEASE_S, NotFoundError, Part, Store, Stored
from kvasir.engine.errors import ClientError, UnavailableError, UnsupportedError

Json = dict[str, Any]
PIECE = 2**20
MAX_FILE_BYTES = 200 * 2**20
"""OpenAI's limit for the file of a batch."""
MAX_FILENAME = 255
SHORTEST_S, LONGEST_S = 3600, 30 * 86400
"""Of a lifetime that a sender chooses."""


class FileTooLargeError(ClientError):
    """More than MAX_FILE_BYTES."""

    code = "request_too_large"
    status = 413


class FileWriter:
    """A new file, open until `done`; `drop` in any other case. UnavailableError when what there is of it was dropped by another
    gateway, which took this one for dead."""

    def __init__(self, store: Store, principal: str, purpose: str, filename: str) -> None:
        self.id = f"file-{uuid.uuid4().hex}"
        self._store = store
        self._buffer = bytearray()
        self._number = 0
        self.size = 0
        """Bytes so far."""
        self._principal = principal
        self._body: Json = {
            "id": self.id,
            "object": "file",
            "bytes": 0,
            "created_at": int(time.time()),
            "expires_at": None,
            "filename": filename,
            "purpose": purpose,
            "status": "processed",
        }
        self._begun = False

    async def write(self, data: bytes) -> None:
        self._buffer += data
        self.size += len(data)
        if len(self._buffer) >= PIECE:
            await self._flush()

    async def done(self, live_s: float) -> Json:
        """The file's object. `live_s`: how long it shall live from its creation on."""
        await self._flush()
        body = {**self._body, "bytes": self.size, "expires_at": self._body["created_at"] + int(live_s)}
        await self._store.keep([self.id], time.time() + live_s)
        _check(await self._store.finish(self.id, body))
        return body

    async def drop(self) -> None:
        if self._begun:
            await self._store.abandon(self.id)

    async def _flush(self) -> None:
        if not self._begun:
            await self._begin()
        if self._buffer:
            _check(await self._store.append(self.id, [Part(self._number, bytes(self._buffer))]))
            self._number += 1
            self._buffer.clear()

    async def _begin(self) -> None:
        stored = Stored(
            id=self.id, kind="file", principal=self._principal, expires=time.time(), open=True, body=self._body,
            private={"models": []},
        )  # fmt: skip
        await self._store.put(stored)
        self._begun = True


def _check(ours: bool) -> None:
    """Whether a file is still being written, as the store says."""
    if not ours:
        text = f"this gateway was held up for longer than {LEASE_S:g} s, and what had come of the file was dropped; send it again"
        raise UnavailableError(text)


class NewFile:
    """A file on its way in: `done`, or `drop`."""

    def __init__(self, store: Store, principal: str, filename: str) -> None:
        self._writer = FileWriter(store, principal, "batch", (filename or "upload.jsonl")[:MAX_FILENAME])

    async def write(self, data: bytes) -> None:
        if self._writer.size + len(data) > MAX_FILE_BYTES:
            raise FileTooLargeError(f"the file is larger than {MAX_FILE_BYTES} bytes")
        await self._writer.write(data)

    async def done(self, purpose: str | None, seconds: int | None, ttl_s: float) -> Json:
        """The file's object. seconds: how long its sender wants it to live."""
        check_purpose(purpose)
        return await self._writer.done(seconds or ttl_s)

    async def drop(self) -> None:
        await self._writer.drop()


def check_purpose(purpose: str | None) -> None:
    """Files are for batches here."""
    if not purpose:
        raise ClientError("purpose is missing", param="purpose")
    if purpose != "batch":
        raise UnsupportedError(f"purpose must be batch, got {purpose!r:.60}", param="purpose")


def expires_after(anchor: object, seconds: object) -> int | None:
    """Seconds that a file shall live, as expires_after says; None: it says nothing."""
    if anchor is None and seconds is None:
        return None
    if anchor != "created_at":
        raise ClientError(f"expires_after.anchor must be created_at, got {anchor!r:.60}", param="expires_after")
    if isinstance(seconds, str) and seconds.isascii() and seconds.isdigit() and len(seconds) < 10:
        seconds = int(seconds)
    if type(seconds) is not int or not SHORTEST_S <= seconds <= LONGEST_S:
        text = f"expires_after.seconds must be an integer from {SHORTEST_S} to {LONGEST_S}, got {seconds!r:.60}"
        raise ClientError(text, param="expires_after")
    return seconds


class Files:
    """What is stored of files."""

    def __init__(self, store: Store) -> None:
        self.store = store

    async def list(self, lookup: Lookup) -> Json:
        page = Page.of(lookup.query, limit=10_000, most=10_000)
        purpose = lookup.query.get("purpose")
        found = await page.of_store(self.store, "file", lookup.principal, {"purpose": purpose} if purpose else {})
        return page.json(found)

    async def get(self, lookup: Lookup) -> Json:
        return (await find_file(self.store, lookup.id, lookup.principal)).body

    async def delete(self, lookup: Lookup) -> Json:
        stored = await find_file(self.store, lookup.id, lookup.principal)
        await self.store.delete(stored.id, "file", stored.principal)
        return {"id": stored.id, "object": "file", "deleted": True}


async def find_file(store: Store, file_id: str, principal: str) -> Stored:
    """Raises NotFoundError; one that is still being written isn't there yet."""
    stored = await store.get(file_id, "file", principal)
    if stored.open:
        raise NotFoundError(f"there is no file {file_id!r:.100}", param="id")
    return stored


async def pieces(store: Store, file_id: str) -> AsyncIterator[bytes]:
    """What is in a file."""
    number = -1
    while found := await store.parts(file_id, number, 4):
        for part in found:
            yield part.data
        number = found[-1].number


async def lines(store: Store, file_id: str) -> AsyncIterator[tuple[int, bytes | None]]:
    """(number from 1, line) of those that aren't blank; None for one that is longer than MAX_LINE_BYTES."""
    number, rest, long = 0, b"", False
    async for piece in pieces(store, file_id):
        *whole, rest = (rest + piece).split(b"\n")
        for line in whole:
            number += 1
            if long or len(line) > MAX_LINE_BYTES:
                yield number, None
            elif text := line.removeprefix(codecs.BOM_UTF8 if number == 1 else b"").strip():
                yield number, text
            long = False
        if len(rest) > MAX_LINE_BYTES:
            rest, long = b"", True
    if long:
        yield number + 1, None
    elif text := rest.removeprefix(codecs.BOM_UTF8 if number == 0 else b"").strip():
        yield number + 1, text
