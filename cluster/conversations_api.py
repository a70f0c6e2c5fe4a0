"""/v1/conversations: items that responses read and add to, without naming the response before."""

from __future__ import annotations

import time
import uuid
from collections.abc import Mapping, Sequence
from typing import Any

import orjson
from starlette.routing import Route

from kvasir.cluster.caller import Lookup
from kvasir.cluster.named_items import named_items
from kvasir.cluster.openai_fields import CHAT_HONOURED, Check
from kvasir.cluster.pages import Page
from kvasir.cluster.responses_items import input_items, unread
from kvasir.cluster.service_fields import check_metadata, check_nesting
from kvasir.cluster.store import Kind, NotFoundError, Part, Store, Stored
from kvasir.cluster.stored_fields import new_metadata, stored_fields
from kvasir.cluster.stored_routes import changed_route, found_route

Json = dict[str, Any]
_KIND: Kind = "conversation"
_ITEMS = CHAT_HONOURED["messages"]
_CREATE: dict[str, Check] = {"items": _ITEMS, "metadata": check_metadata}


class Conversations:
    """What is stored of conversations. One lives as long after its last change as a response."""

    def __init__(self, store: Store, ttl_s: float) -> None:
        self._store = store
        self._ttl_s = ttl_s

    async def create(self, lookup: Lookup, body: Json) -> Json:
        fields = _fields(body, _CREATE)
        given = input_items(fields["items"], "items") if fields.get("items") else []
        items = await named_items(self._store, given, lookup.principal, "items")
        now, name = int(time.time()), f"conv_{uuid.uuid4().hex}"
        made = {"id": name, "object": "conversation", "created_at": now, "metadata": fields.get("metadata", {})}
        stored = Stored(id=name, kind=_KIND, principal=lookup.principal, expires=now + self._ttl_s, body=made)
        await self._store.put(stored, [Part(number, orjson.dumps(item)) for number, item in enumerate(items)])
        return made

    async def get(self, lookup: Lookup) -> Json:
        return (await self._stored(lookup)).body

    async def update(self, lookup: Lookup, body: Json) -> Json:
        """Other metadata."""
        stored = await self._stored(lookup)
        metadata = new_metadata(body, "a conversation")
        changed = await self._store.change(stored.id, lambda body: {**body, "metadata": metadata})
        return changed or stored.body

    async def delete(self, lookup: Lookup) -> Json:
        stored = await self._stored(lookup)
        await self._store.delete(stored.id, _KIND, stored.principal)
        return {"id": stored.id, "object": "conversation.deleted", "deleted": True}

    async def add(self, lookup: Lookup, body: Json) -> Json:
        """More items."""
        stored = await self._stored(lookup)
        fields = _fields(body, {"items": _ITEMS})
        items = await named_items(self._store, input_items(fields.get("items"), "items"), lookup.principal, "items")
        await add_items(self._store, stored.id, items, time.time() + self._ttl_s)
        return Page(len(items), None, newest_first=False).json(items)

    async def items(self, lookup: Lookup) -> Json:
        stored = await self._stored(lookup)
        page = Page.of(lookup.query)
        return page.json(page.of_items([item for _, item in await numbered_items(self._store, stored.id)]))

    async def item(self, lookup: Lookup) -> Json:
        return (await self._item(lookup))[2]

    async def delete_item(self, lookup: Lookup) -> Json:
        """The conversation without it."""
        stored, number, _ = await self._item(lookup)
        await self._store.drop(stored.id, number)
        return stored.body

    async def _stored(self, lookup: Lookup) -> Stored:
        return await self._store.get(lookup.id, _KIND, lookup.principal)

    async def _item(self, lookup: Lookup) -> tuple[Stored, int, Json]:
        stored, wanted = await self._stored(lookup), lookup.item
        for number, item in await numbered_items(self._store, stored.id):
            if item["id"] == wanted:
                return stored, number, item
        raise NotFoundError(f"there is no item {wanted!r:.100}", param="item_id")


def conversation_routes(them: Conversations, max_body_bytes: int) -> list[Route]:
    """All routes of conversations."""
    all_ = "/v1/conversations"
    one = f"{all_}/{{id}}"
    return [
        changed_route(all_, them.create, max_body_bytes, _overlooked),
        found_route("GET", one, them.get),
        changed_route(one, them.update, max_body_bytes),
        found_route("DELETE", one, them.delete),
        changed_route(f"{one}/items", them.add, max_body_bytes, _overlooked),
        found_route("GET", f"{one}/items", them.items),
        found_route("GET", f"{one}/items/{{item}}", them.item),
        found_route("DELETE", f"{one}/items/{{item}}", them.delete_item),
    ]


def _fields(body: Json, honoured: Mapping[str, Check]) -> Json:
    fields = stored_fields(body, honoured, "a conversation")
    check_nesting(fields)
    return fields


def _overlooked(body: Json) -> tuple[str, ...]:
    return unread(body.get("items"), "items")


async def numbered_items(store: Store, conversation_id: str) -> list[tuple[int, Json]]:
    """All items, oldest first, each with the number of its part."""
    found: list[tuple[int, Json]] = []
    while parts := await store.parts(conversation_id, found[-1][0] if found else -1, 256):
        found += [(part.number, orjson.loads(part.data)) for part in parts]
    return found


async def conversation_items(store: Store, conversation_id: str, principal: str, expires: float) -> list[Json]:
    """What was said in a conversation so far. Raises NotFoundError."""
    try:
        stored = await store.get(conversation_id, _KIND, principal)
    except NotFoundError as error:
        raise NotFoundError(error.message, param="conversation") from error
    await store.keep([stored.id], expires)
    return [item for _, item in await numbered_items(store, stored.id)]


async def add_items(store: Store, conversation_id: str, items: Sequence[Json], expires: float) -> None:
    """At the end; a conversation that was deleted meanwhile stays deleted."""
    await store.extend(conversation_id, [orjson.dumps(item) for item in items])
    await store.keep([conversation_id], expires)
