"""What every HTTP route shares: keys, request ids, bodies, errors in each dialect's shape, clients that go away."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Coroutine, Iterable, Iterator, Mapping
from typing import Any
from urllib.parse import parse_qsl

import orjson
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from kvasir.cluster.auth import ApiKeys
from kvasir.cluster.call import ROUTE_HEADER, request_id_from
from kvasir.cluster.error_shapes import error_body
from kvasir.cluster.origins import Origins
from kvasir.engine.errors import ClientError, KvasirError, ServerError

OPEN_PATHS = frozenset({"/", "/-/healthz", "/health", "/health/ready", "/openapi.json", "/docs"})
"""Routes that need no key; every other does, those included that don't exist."""
_JSON = (b"content-type", b"application/json")
_MAX_WARNING = 400


class BodyTooLargeError(ClientError):
    """More than --max-body-bytes."""

    code = "request_too_large"
    status = 413


class MediaTypeError(ClientError):
    """Not JSON. Also keeps other sites' scripts out: browsers let them send plain text, but no JSON, without asking."""

    code = "unsupported_media_type"
    status = 415


class RouteError(ClientError):
    """No such route, or another method."""

    code = "unknown_url"

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


class ClientGoneError(Exception):
    """The client went away while it sent its request: nobody is there to be answered."""


class Query(Mapping[str, str]):
    """A request's query, which knows what of it nobody looked for. Of a name that is there twice the last counts."""

    def __init__(self, text: bytes) -> None:
        self._given = dict(parse_qsl(text.decode("latin-1"), keep_blank_values=True))
        self._read = set[str]()

    def __getitem__(self, name: str) -> str:
        self._read.add(name)
        return self._given[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._given)

    def __len__(self) -> int:
        return len(self._given)

    @property
    def unread(self) -> list[str]:
        return [name for name in self if name not in self._read]


class Front:
    """The middleware around all routes: request id in and out, API keys, and which pages may call where none is needed.
    A header names what no route read of the query."""

    def __init__(self, app: ASGIApp, keys: ApiKeys, origins: Origins, refused: Callable[[KvasirError], None]) -> None:
        self._app = app
        self._refused = refused
        self._keys = keys
        self._origins = origins

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = header_map(scope)
        state = scope.setdefault("state", {})
        state["request_id"], state["principal"], state["refused"] = None, "", self._refused
        state["query"] = query = Query(scope["query_string"])

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                found = state["request_id"] or request_id_from(None, "X-Request-ID")
                names = (b"x-request-id", b"request-id")  # ours and OpenAI's, Anthropic's
                more = warning_header(query.unread) if message["status"] < 400 else []
                message["headers"] = [*message["headers"], *((name, found.encode()) for name in names), *more]
            await send(message)

        try:
            state["request_id"] = request_id_from(headers.get("x-request-id"), "X-Request-ID")
            self._origins.check(scope["method"], headers)
            if scope["path"] not in OPEN_PATHS:
                state["principal"] = self._keys.check(headers.get("authorization"), headers.get("x-api-key"))
        except KvasirError as error:
            self._refused(error)
            await send_error(send_with_id, error, scope["path"], state["request_id"], headers)
            return
        with contextlib.suppress(ClientGoneError):
            await self._app(scope, receive, send_with_id)


def header_map(scope: Scope) -> dict[str, str]:
    """Lower-case name -> value."""
    return {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}


def request_id_of(scope: Scope, headers: Mapping[str, str], given: str | None) -> str:
    """The call's id: that of its headers, else the one which its body gives; the answer's headers tell it."""
    state = scope["state"]
    if given is not None and "x-request-id" not in headers:
        state["request_id"] = request_id_from(given, "request_id")
    found: str = state["request_id"]
    return found


async def read_json(scope: Scope, receive: Receive, max_bytes: int, *, any_type: bool = False) -> dict[str, Any]:
    """The body, a JSON object. What is too large isn't read to its end. `any_type`: whatever its Content-Type says, as
    curl -d sends it; not from a browser, which names the page's origin and may send that without asking."""
    headers = header_map(scope)
    if not any_type or "origin" in headers:
        _check_media_type(headers.get("content-type", ""))
    length = headers.get("content-length", "")
    if length.isdigit() and int(length) > max_bytes:
        raise _too_large(max_bytes)
    parts, size, more = [], 0, True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientGoneError
        parts.append(message.get("body", b""))
        size += len(parts[-1])
        more = message.get("more_body", False)
        if size > max_bytes:
            raise _too_large(max_bytes)
    return _object(b"".join(parts))


async def until_gone(receive: Receive, work: Coroutine[Any, Any, None]) -> None:
    """Do `work`; cancel it when the client disconnects."""
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_gone(receive))
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
    finally:
        if not task.done():
            task.cancel()
        gone.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task


async def send_json(send: Send, status: int, value: Any, headers: Iterable[tuple[bytes, bytes]] = ()) -> None:
    """A whole response."""
    await send_bytes(send, status, orjson.dumps(value), (_JSON, *headers))


async def send_bytes(send: Send, status: int, body: bytes, headers: Iterable[tuple[bytes, bytes]]) -> None:
    length = (b"content-length", str(len(body)).encode())
    await send({"type": "http.response.start", "status": status, "headers": [*headers, length]})
    await send({"type": "http.response.body", "body": body})


async def send_error(
    send: Send, error: KvasirError, path: str, request_id: str | None, given: Mapping[str, str]
) -> None:
    """A whole response in the client's dialect. given: the request's headers."""
    await send_json(send, error.status, error_body(error, path, request_id, given), _error_headers(error))


def warning_header(names: Iterable[str], truncated_tokens: int = 0) -> list[tuple[bytes, bytes]]:
    """Header that names fields which were ignored, and what was cut off the prompt. Names are the client's: nothing of them
    may end the header."""
    said = [f"{truncated_tokens} tokens of the prompt were cut off"] if truncated_tokens else []
    if listed := ", ".join(ascii(name)[1:-1] for name in names):
        cut = listed if len(listed) <= _MAX_WARNING else listed[:_MAX_WARNING] + "..."
        said.insert(0, f"ignored: {cut}")
    return [(b"x-kvasir-warning", "; ".join(said).encode("ascii"))] if said else []


def route_header(route: str | None) -> list[tuple[bytes, bytes]]:
    """Header with the router's reasons, for a request that asked."""
    return [] if route is None else [(ROUTE_HEADER.encode(), route.encode("ascii"))]


async def on_kvasir_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, KvasirError)
    request.scope["state"]["refused"](error)
    headers = {name.decode(): value.decode() for name, value in _error_headers(error)}
    body = error_body(error, request.scope["path"], request.scope["state"]["request_id"], request.headers)
    return Response(orjson.dumps(body), error.status, headers, "application/json")


async def on_http_error(request: Request, error: Exception) -> Response:
    """Routes that don't exist, other methods."""
    assert isinstance(error, HTTPException)
    path = request.scope["path"]
    text = f"there is no {path}" if error.status_code == 404 else f"{path} doesn't answer {request.method}"
    response = await on_kvasir_error(request, RouteError(text, error.status_code))
    response.headers.update(error.headers or {})
    return response


async def on_bug(request: Request, error: Exception) -> Response:
    """Anything else. It goes on to the server, which logs it; `Front` has been left already."""
    told = ServerError("internal error; the server's log says more")
    told.counted = True  # as a rule: few bugs show before there is a model
    response = await on_kvasir_error(request, told)
    for name in ("x-request-id", "request-id"):
        response.headers[name] = request.scope["state"]["request_id"]
    return response


HANDLERS: dict[type[Exception], Callable[[Request, Exception], Coroutine[Any, Any, Response]]] = {
    KvasirError: on_kvasir_error,
    HTTPException: on_http_error,
    Exception: on_bug,
}


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _check_media_type(given: str) -> None:
    kind = given.partition(";")[0].strip().lower()
    if kind != "application/json" and not kind.endswith("+json"):
        text = f"the body must be JSON: send the header Content-Type: application/json, got {given or 'none'!s:.60}"
        raise MediaTypeError(text)


def _too_large(max_bytes: int) -> BodyTooLargeError:
    return BodyTooLargeError(f"the body is larger than {max_bytes} bytes (--max-body-bytes)")


def _object(body: bytes) -> dict[str, Any]:
    try:
        value = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise ClientError(f"the body isn't valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise ClientError(f"the body must be a JSON object, got a {type(value).__name__}")
    return value


def _error_headers(error: KvasirError) -> list[tuple[bytes, bytes]]:
    headers = []
    if error.retry_after_s is not None:
        headers.append((b"retry-after", str(max(1, round(error.retry_after_s))).encode()))
    if error.status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    if error.status == 413:  # what is left of the body isn't read
        headers.append((b"connection", b"close"))
    return headers
