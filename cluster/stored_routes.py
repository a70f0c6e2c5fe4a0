"""HTTP routes of what is stored: each is a function from a `Lookup`, and perhaps a body, to an object."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
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
        lookup = lookup_of(request)
        return _json(await find(lookup), lookup)

    return Route(path, endpoint, methods=[method])


def changed_route(
    path: str,
    change: Callable[[Lookup, Json], Awaitable[Json]],
    max_body_bytes: int,
    overlooked: Callable[[Json], Sequence[str]] = lambda body: (),
) -> Route:
    """POST. overlooked: what of a body that was taken means nothing."""

    async def endpoint(request: Request) -> Response:
        body, lookup = await read_json(request.scope, request.receive, max_body_bytes), lookup_of(request)
        return _json(await change(lookup, body), lookup, overlooked(body))

    return Route(path, endpoint, methods=["POST"])


def lookup_of(request: Request) -> Lookup:
    """What a request of such a route asks for."""
    query = _Query(request.query_params)
    return Lookup(principal=request.scope["state"]["principal"], query=query, **request.path_params)


def unread(lookup: Lookup, others: Sequence[str] = ()) -> list[tuple[bytes, bytes]]:
    """Header that names what of its query meant nothing, and `others`; of a lookup that was done."""
    query = lookup.query
    return warning_header([*(query.unread if isinstance(query, _Query) else ()), *others])


class _Query(Mapping[str, str]):
    """A request's query, which knows what of it nobody looked for."""

    def __init__(self, given: Mapping[str, str]) -> None:
        self._given = given
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


def _json(value: Json, lookup: Lookup, others: Sequence[str] = ()) -> Response:
    headers = {name.decode(): text.decode() for name, text in unread(lookup, others)}
    return Response(orjson.dumps(value), headers=headers, media_type="application/json")
