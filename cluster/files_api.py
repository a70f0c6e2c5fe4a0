"""/v1/files: what batches read and write."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from kvasir.cluster.background import Background
from kvasir.cluster.files import FileWriter, find_file, pieces
from kvasir.cluster.http_front import BodyTooLargeError, ClientGoneError, header_map, send_json, warning_header
from kvasir.cluster.multipart import Data, Field, Multipart
from kvasir.cluster.pages import Page, json_response, principal_of
from kvasir.cluster.store import Store
from kvasir.engine.errors import ClientError, UnsupportedError

Json = dict[str, Any]

MAX_FILE_BYTES = 200 * 2**20
"""OpenAI's limit for the file of a batch."""
MAX_FIELD_BYTES = 4096
MAX_FILENAME = 255
SHORTEST_S, LONGEST_S = 3600, 30 * 86400
"""Of a lifetime that a sender chooses."""
_KNOWN = ("purpose", "expires_after[anchor]", "expires_after[seconds]")


class Upload:
    """POST /v1/files."""

    def __init__(self, store: Store, background: Background, ttl_s: float) -> None:
        self._store = store
        self._background = background
        self._ttl_s = ttl_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = header_map(scope)
        form = Multipart(headers.get("content-type", ""))
        length = headers.get("content-length", "")
        await self._store.room(int(length) if length.isdigit() else 0)
        self._background.start()  # keeps our lease on a file that comes slowly
        upload = _Upload(self._store, scope["state"]["principal"])
        try:
            async for data in _pieces(receive):
                await upload.take(form.feed(data))
            if not form.complete:
                raise ClientError("the body ends before its last boundary")
            body = await upload.done(self._ttl_s)
        except BaseException:
            await upload.drop()
            raise
        await send_json(send, 200, body, warning_header(upload.warnings))


class _Upload:
    """A form on its way in."""

    def __init__(self, store: Store, principal: str) -> None:
        self.warnings: list[str] = []
        self._store = store
        self._principal = principal
        self._fields: dict[str, bytearray] = {}
        self._name = ""
        self._file: FileWriter | None = None

    async def take(self, events: list[Field | Data]) -> None:
        for event in events:
            if isinstance(event, Field):
                self._begin(event)
            elif self._name == "file":
                await self._write(event.data)
            else:
                value = self._fields[self._name]
                value += event.data
                if len(value) > MAX_FIELD_BYTES:
                    raise ClientError(f"{self._name:.60} is longer than {MAX_FIELD_BYTES} bytes", param=self._name[:60])

    async def done(self, ttl_s: float) -> Json:
        """The file's object, once all fields are there."""
        purpose = self._field("purpose")
        if self._file is None or purpose is None:
            missing = "file" if self._file is None else "purpose"
            raise ClientError(f"{missing} is missing", param=missing)
        if purpose != "batch":
            raise UnsupportedError(f"purpose must be batch, got {purpose!r:.60}", param="purpose")
        seconds = expires_after(self._field("expires_after[anchor]"), self._field("expires_after[seconds]"))
        return await self._file.done(seconds or ttl_s)

    async def drop(self) -> None:
        if self._file is not None:
            await self._file.drop()

    def _begin(self, field: Field) -> None:
        self._name = field.name
        if field.name == "file":
            if self._file is not None:
                raise ClientError("send one file", param="file")
            name = (field.filename or "upload.jsonl")[:MAX_FILENAME]
            self._file = FileWriter(self._store, self._principal, "batch", name)
            return
        if field.name not in _KNOWN:
            self.warnings.append(field.name[:60])
        if len(self._fields) > len(_KNOWN) + 16:
            raise ClientError("the form has too many fields")
        self._fields[field.name] = bytearray()

    async def _write(self, data: bytes) -> None:
        assert self._file is not None
        if self._file.size + len(data) > MAX_FILE_BYTES:
            raise BodyTooLargeError(f"the file is larger than {MAX_FILE_BYTES} bytes")
        await self._file.write(data)

    def _field(self, name: str) -> str | None:
        value = self._fields.get(name)
        return None if value is None else value.decode("utf-8", "replace")


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
        self._store = store

    async def list(self, request: Request) -> Response:
        page = Page.of(request.query_params, limit=10_000, most=10_000)
        purpose = request.query_params.get("purpose")
        found = await page.of_store(self._store, "file", principal_of(request), {"purpose": purpose} if purpose else {})
        return page.json(found)

    async def get(self, request: Request) -> Response:
        stored = await find_file(self._store, request.path_params["id"], principal_of(request))
        return json_response(stored.body)

    async def content(self, request: Request) -> Response:
        stored = await find_file(self._store, request.path_params["id"], principal_of(request))
        headers = {"content-length": str(stored.body["bytes"])}
        return StreamingResponse(pieces(self._store, stored.id), 200, headers, "application/octet-stream")

    async def delete(self, request: Request) -> Response:
        stored = await find_file(self._store, request.path_params["id"], principal_of(request))
        await self._store.delete(stored.id, "file", stored.principal)
        return json_response({"id": stored.id, "object": "file", "deleted": True})


def files_routes(store: Store, background: Background, ttl_s: float) -> list[Route]:
    """All routes of files."""
    files, one = Files(store), "/v1/files/{id}"
    return [
        Route("/v1/files", Upload(store, background, ttl_s), methods=["POST"]),
        Route("/v1/files", files.list, methods=["GET"]),
        Route(one, files.get, methods=["GET"]),
        Route(f"{one}/content", files.content, methods=["GET"]),
        Route(one, files.delete, methods=["DELETE"]),
    ]


async def _pieces(receive: Receive) -> AsyncIterator[bytes]:
    """The body as it comes."""
    more = True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientGoneError
        yield message.get("body", b"")
        more = message.get("more_body", False)
