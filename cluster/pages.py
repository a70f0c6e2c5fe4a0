"""Lists of OpenAI's API that come page by page, and answers that are one JSON object."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import orjson
from starlette.requests import Request
from starlette.responses import Response

from kvasir.cluster.store import Kind, Store
from kvasir.engine.errors import ClientError

Json = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Page:
    """Which part of a list is wanted."""

    limit: int
    after: str | None
    newest_first: bool

    @classmethod
    def of(cls, query: Mapping[str, str], *, limit: int = 20, most: int = 100, newest_first: bool = True) -> Page:
        """From a query. ClientError when it says something wrong."""
        given, order = query.get("limit", str(limit)), query.get("order", "desc" if newest_first else "asc")
        if not (given.isascii() and given.isdigit() and 1 <= int(given) <= most):
            raise ClientError(f"limit must be an integer from 1 to {most}, got {given!r:.60}", param="limit")
        if order not in ("asc", "desc"):
            raise ClientError(f"order must be asc or desc, got {order!r:.60}", param="order")
        return cls(int(given), query.get("after"), order == "desc")

    async def of_store(self, store: Store, kind: Kind, principal: str, match: Mapping[str, Any]) -> list[Json]:
        """Bodies whose fields are as in `match`: those of the page and, if there is one, the next."""
        found: list[Json] = []
        after, some = self.after, self.limit + 1
        while len(found) <= self.limit and some > self.limit:
            stored = await store.listed(kind, principal, after, self.limit + 1, newest_first=self.newest_first)
            found += [s.body for s in stored if match.items() <= s.body.items() and not (s.open and kind == "file")]
            some, after = len(stored), stored[-1].id if stored else None
        return found[: self.limit + 1]

    def json(self, data: Sequence[Json]) -> Response:
        """One page of `data`, which holds one more when there is a next one."""
        shown = data[: self.limit]
        ends = {"first_id": shown[0]["id"] if shown else None, "last_id": shown[-1]["id"] if shown else None}
        return json_response({"object": "list", "data": shown, **ends, "has_more": len(data) > self.limit})


def json_response(value: Any) -> Response:
    return Response(orjson.dumps(value), media_type="application/json")


def principal_of(request: Request) -> str:
    """Whose key it was sent with."""
    principal: str = request.scope["state"]["principal"]
    return principal
