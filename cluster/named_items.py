"""Items that a request names by their ids alone, found in what is stored."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from kvasir.cluster.responses_items import REFERENCE
from kvasir.cluster.store import NotFoundError, Store

Json = dict[str, Any]


async def named_items(store: Store, items: Sequence[Json], principal: str, field: str = "input") -> list[Json]:
    """`items`, with stored ones in place of references. Raises NotFoundError, which names the `field` they came in."""
    ids = [item["id"] for item in items if item["type"] == REFERENCE]
    found = await store.items(ids, principal) if ids else {}
    for number, item in enumerate(items):
        if item["type"] == REFERENCE and item["id"] not in found:
            why = "nothing with it was stored, or that was deleted or has expired"
            raise NotFoundError(f"{field}[{number}]: Item with id {item['id']!r:.100} not found: {why}", param=field)
    return [found[item["id"]] if item["type"] == REFERENCE else item for item in items]
