"""Files in the store: their objects, what is in them, and how one is written piece by piece."""

from __future__ import annotations

import codecs
import time
import uuid
from collections.abc import AsyncIterator
from typing import Any

from kvasir.cluster.batch_line import MAX_LINE_BYTES
from kvasir.cluster.store import NotFoundError, Part, Store, Stored

Json = dict[str, Any]
PIECE = 2**20


class FileWriter:
    """A new file, open until `done`; `drop` in any other case."""

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
        await self._store.finish(self.id, body)
        return body

    async def drop(self) -> None:
        if self._begun:
            await self._store.delete(self.id, "file", self._principal)

    async def _flush(self) -> None:
        if not self._begun:
            await self._begin()
        if self._buffer:
            await self._store.append(self.id, [Part(self._number, bytes(self._buffer))])
            self._number += 1
            self._buffer.clear()

    async def _begin(self) -> None:
        stored = Stored(
            id=self.id, kind="file", principal=self._principal, expires=time.time(), open=True, body=self._body,
            private={"models": []},
        )  # fmt: skip
        await self._store.put(stored)
        self._begun = True


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
