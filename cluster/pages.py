"""Lists of OpenAI's API that come page by page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

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
        if not (given.isascii() and given.isdigit() and len(given) < 10 and 1 <= int(given) <= most):
            raise ClientError(f"limit must be an integer from 1 to {most}, got {given!r:.60}", param="limit")
        if order not in ("asc", "desc"):
            raise ClientError(f"order must be asc or desc, got {order!r:.60}", param="order")
        return cls(int(given), query.get("after"), order == "desc")

    def of_items(self, items: Sequence[Json]) -> list[Json]:
        """Of a whole list, oldest first: those of the page and, if there is one, the next. Of several with one id one is
        shown, for who asks for what is behind it would be sent in circles. ClientError when there is no item `after`."""
        each = {item["id"]: item for item in (reversed(items) if self.newest_first else items)}
        ids, ordered = [*each], [*each.values()]
        if self.after is not None and self.after not in ids:
            raise ClientError(f"there is no item {self.after!r:.100}", param="after")
        start = 0 if self.after is None else ids.index(self.after) + 1
        return ordered[start : start + self.limit + 1]

    async def of_store(
        self, store: Store, kind: Kind, principal: str, match: Mapping[str, Any], labels: Mapping[str, str] = {}
    ) -> list[Json]:
        """The same of what is stored; only bodies whose fields are as in `match`, and their metadata as in `labels`."""
        found: list[Json] = []
        after, some = self.after, self.limit + 1
        while len(found) <= self.limit and some > self.limit:
            stored = await store.listed(kind, principal, after, self.limit + 1, newest_first=self.newest_first)
            found += [
                one.body for one in stored if not (one.open and kind == "file") and _fits(one.body, match, labels)
            ]
            some, after = len(stored), stored[-1].id if stored else None
        return found[: self.limit + 1]

    def json(self, data: Sequence[Json]) -> Json:
        """One page of `data`, which holds one more when there is a next one."""
        shown = data[: self.limit]
        ends = {"first_id": shown[0]["id"] if shown else "", "last_id": shown[-1]["id"] if shown else ""}
        return {"object": "list", "data": shown, **ends, "has_more": len(data) > self.limit}


def _fits(body: Json, match: Mapping[str, Any], labels: Mapping[str, str]) -> bool:
    return (
        all(body.get(name) == value for name, value in match.items())
        and labels.items() <= (body.get("metadata") or {}).items()
    )
