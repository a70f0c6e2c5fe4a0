"""/v1/files: what batches read and write."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from kvasir.cluster.background import Background
from kvasir.cluster.files import Files, NewFile, expires_after, find_file, pieces
from kvasir.cluster.http_front import ClientGoneError, header_map, send_json, warning_header
from kvasir.cluster.multipart import Data, Field, Multipart
from kvasir.cluster.store import Store
from kvasir.cluster.stored_routes import found_route, lookup_of
from kvasir.engine.errors import ClientError

Json = dict[str, Any]

MAX_FIELD_BYTES = 4096
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
        self._file: NewFile | None = None

    async def take(self, events: list[Field | Data]) -> None:
        for event in events:
            if isinstance(event, Field):
                self._begin(event)
            elif self._name == "file":
                assert self._file is not None
                await self._file.write(event.data)
            else:
                value = self._fields[self._name]
                value += event.data
                if len(value) > MAX_FIELD_BYTES:
                    raise ClientError(f"{self._name:.60} is longer than {MAX_FIELD_BYTES} bytes", param=self._name[:60])

    async def done(self, ttl_s: float) -> Json:
        """The file's object, once all fields are there."""
        if self._file is None:
            raise ClientError("file is missing", param="file")
        seconds = expires_after(self._field("expires_after[anchor]"), self._field("expires_after[seconds]"))
        return await self._file.done(self._field("purpose"), seconds, ttl_s)

    async def drop(self) -> None:
        if self._file is not None:
            await self._file.drop()

    def _begin(self, field: Field) -> None:
        self._name = field.name
        if field.name == "file":
            if self._file is not None:
                raise ClientError("send one file", param="file")
            self._file = NewFile(self._store, self._principal, field.filename or "")
            return
        if field.name in self._fields:
            raise ClientError(f"{field.name:.60} is there twice", param=field.name[:60])
        if field.name not in _KNOWN:
            self.warnings.append(field.name[:60])
        if len(self._fields) > len(_KNOWN) + 16:
            raise ClientError("the form has too many fields")
        self._fields[field.name] = bytearray()

    def _field(self, name: str) -> str | None:
        value = self._fields.get(name)
        return None if value is None else value.decode("utf-8", "replace")


class Content:
    """GET /v1/files/{id}/content."""

    def __init__(self, store: Store) -> None:
        self._store = store

    async def get(self, request: Request) -> Response:
        lookup = lookup_of(request)
        stored = await find_file(self._store, lookup.id, lookup.principal)
        headers = {"content-length": str(stored.body["bytes"])}
        return StreamingResponse(pieces(self._store, stored.id), 200, headers, "application/octet-stream")


def files_routes(files: Files, background: Background, ttl_s: float) -> list[Route]:
    """All routes of files."""
    one = "/v1/files/{id}"
    return [
        Route("/v1/files", Upload(files.store, background, ttl_s), methods=["POST"]),
        found_route("GET", "/v1/files", files.list),
        found_route("GET", one, files.get),
        Route(f"{one}/content", Content(files.store).get, methods=["GET"]),
        found_route("DELETE", one, files.delete),
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
