"""HTTP routes of what is stored: each is a function from a `Lookup`, and perhaps a body, to an object."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import orjson
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from kvasir.cluster.caller import Lookup
from kvasir.cluster.http_front import read_json, warning_header

Json = dict[str, Any]


def found_route(method: str, path: str, find: Callable[[Lookup], Awaitable[Json]]) -> Route:
    """One that reads no body."""

    async def endpoint(request: Request) -> Response:
        return _json(await find(lookup_of(request)))

    return Route(path, endpoint, methods=[method])


def changed_route(
    path: str,
    change: Callable[[Lookup, Json], Awaitable[Json]],
    max_body_bytes: int,
    overlooked: Callable[[Json], Sequence[str]] = lambda body: (),
) -> Route:
    """POST. overlooked: what of a body that was taken means nothing."""

    async def endpoint(request: Request) -> Response:
        body = await read_json(request.scope, request.receive, max_body_bytes)
        return _json(await change(lookup_of(request), body), overlooked(body))

    return Route(path, endpoint, methods=["POST"])


def lookup_of(request: Request) -> Lookup:
    """What a request of such a route asks for."""
    state = request.scope["state"]
    return Lookup(principal=state["principal"], query=state["query"], **request.path_params)


def _json(value: Json, overlooked: Sequence[str] = ()) -> Response:
    headers = {name.decode(): text.decode() for name, text in warning_header(overlooked)}
    return Response(orjson.dumps(value), headers=headers, media_type="application/json")
