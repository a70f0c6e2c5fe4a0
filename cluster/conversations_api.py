"""/v1/conversations: items that responses read and add to, without naming the response before."""

from __future__ import annotations

import time
import uuid
from collections.abc import Mapping, Sequence
from typing import Any

import orjson
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from kvasir.cluster.http_front import read_json
from kvasir.cluster.openai_fields import CHAT_HONOURED, Check
from kvasir.cluster.openai_schema import sort_fields
from kvasir.cluster.pages import Page, json_response, principal_of
from kvasir.cluster.responses_items import input_items
from kvasir.cluster.service_fields import check_metadata
from kvasir.cluster.store import Kind, NotFoundError, Part, Store, Stored
from kvasir.engine.errors import ClientError

Json = dict[str, Any]
_KIND: Kind = "conversation"
_ITEMS = CHAT_HONOURED["messages"]
_CREATE: dict[str, Check] = {"items": _ITEMS, "metadata": check_metadata}


class Conversations:
    """What is stored of conversations. One lives as long after its last change as a response."""

    def __init__(self, store: Store, ttl_s: float, max_body_bytes: int) -> None:
        self._store = store
        self._ttl_s = ttl_s
        self._max_body_bytes = max_body_bytes

    async def create(self, request: Request) -> Response:
        fields = await self._fields(request, _CREATE)
        items = input_items(fields["items"], "items") if fields.get("items") else []
        now, name = int(time.time()), f"conv_{uuid.uuid4().hex}"
        body = {"id": name, "object": "conversation", "created_at": now, "metadata": fields.get("metadata", {})}
        expires, principal = now + self._ttl_s, principal_of(request)
        stored = Stored(id=name, kind=_KIND, principal=principal, expires=expires, body=body)
        await self._store.put(stored, [Part(number, orjson.dumps(item)) for number, item in enumerate(items)])
        return json_response(body)

    async def get(self, request: Request) -> Response:
        return json_response((await self._stored(request)).body)

    async def update(self, request: Request) -> Response:
        """POST: other metadata."""
        stored = await self._stored(request)
        fields = await self._fields(request, {"metadata": check_metadata})
        if "metadata" not in fields:
            raise ClientError("metadata is missing", param="metadata")
        changed = await self._store.change(stored.id, lambda body: {**body, "metadata": fields["metadata"]})
        return json_response(changed or stored.body)

    async def delete(self, request: Request) -> Response:
        stored = await self._stored(request)
        await self._store.delete(stored.id, _KIND, stored.principal)
        return json_response({"id": stored.id, "object": "conversation.deleted", "deleted": True})

    async def add(self, request: Request) -> Response:
        """POST .../items."""
        stored = await self._stored(request)
        fields = await self._fields(request, {"items": _ITEMS})
        items = input_items(fields.get("items"), "items")
        await add_items(self._store, stored.id, items, time.time() + self._ttl_s)
        return Page(len(items), None, newest_first=False).json(items)

    async def items(self, request: Request) -> Response:
        stored = await self._stored(request)
        page = Page.of(request.query_params)
        return page.json(page.of_items([item for _, item in await numbered_items(self._store, stored.id)]))

    async def item(self, request: Request) -> Response:
        return json_response((await self._item(request))[2])

    async def delete_item(self, request: Request) -> Response:
        """DELETE: the conversation without it."""
        stored, number, _ = await self._item(request)
        await self._store.drop(stored.id, number)
        return json_response(stored.body)

    async def _fields(self, request: Request, honoured: Mapping[str, Check]) -> Json:
        body = await read_json(request.scope, request.receive, self._max_body_bytes)
        fields, unknown = sort_fields(body, honoured, {}, {})
        if unknown:
            raise ClientError(f"{unknown[0]:.60} is no field of a conversation", param=unknown[0][:60])
        return fields

    async def _stored(self, request: Request) -> Stored:
        return await self._store.get(request.path_params["id"], _KIND, principal_of(request))

    async def _item(self, request: Request) -> tuple[Stored, int, Json]:
        stored, wanted = await self._stored(request), request.path_params["item"]
        for number, item in await numbered_items(self._store, stored.id):
            if item["id"] == wanted:
                return stored, number, item
        raise NotFoundError(f"there is no item {wanted!r:.100}", param="item_id")


def conversation_routes(store: Store, ttl_s: float, max_body_bytes: int) -> list[Route]:
    """All routes of conversations."""
    them, all_ = Conversations(store, ttl_s, max_body_bytes), "/v1/conversations"
    one = f"{all_}/{{id}}"
    return [
        Route(all_, them.create, methods=["POST"]),
        Route(one, them.get, methods=["GET"]),
        Route(one, them.update, methods=["POST"]),
        Route(one, them.delete, methods=["DELETE"]),
        Route(f"{one}/items", them.add, methods=["POST"]),
        Route(f"{one}/items", them.items, methods=["GET"]),
        Route(f"{one}/items/{{item}}", them.item, methods=["GET"]),
        Route(f"{one}/items/{{item}}", them.delete_item, methods=["DELETE"]),
    ]


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
