"""Chats that were asked with `store`: /v1/chat/completions/{id} and what belongs to it."""

from __future__ import annotations

import re
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

from starlette.routing import Route

from kvasir.cluster.caller import Lookup
from kvasir.cluster.pages import Page
from kvasir.cluster.service_fields import check_metadata
from kvasir.cluster.store import Kind, Store, Stored
from kvasir.cluster.stored_routes import changed_route, found_route

Json = dict[str, Any]
_KIND: Kind = "chat.completion"
MAX_UPDATE_BYTES = 65536
_LABEL = re.compile(r"metadata\[(.+)\]")


class Chats:
    """Keeps chats, and gives them out again."""

    def __init__(self, store: Store, ttl_s: float) -> None:
        self._store = store
        self._ttl_s = ttl_s

    def keeping(
        self, whole: Callable[[], Json], principal: str, metadata: Json, messages: Sequence[Mapping[str, Any]]
    ) -> Callable[[], Awaitable[None]]:
        """What keeps an answer, called when it is complete."""

        async def keep() -> None:
            body = {**whole(), "metadata": metadata}
            private = {"messages": list(messages)}
            expires = time.time() + self._ttl_s
            stored = Stored(id=body["id"], kind=_KIND, principal=principal, expires=expires, body=body, private=private)
            await self._store.put(stored)

        return keep

    async def list(self, lookup: Lookup) -> Json:
        query = lookup.query
        page = Page.of(query, newest_first=False)
        match = {"model": query["model"]} if "model" in query else {}
        labels = {found[1]: value for name, value in query.items() if (found := _LABEL.fullmatch(name))}
        bodies = await page.of_store(self._store, _KIND, lookup.principal, match, labels)
        return page.json(bodies)

    async def get(self, lookup: Lookup) -> Json:
        return (await self._stored(lookup)).body

    async def update(self, lookup: Lookup, body: Json) -> Json:
        """Other metadata."""
        stored = await self._stored(lookup)
        check_metadata("metadata", metadata := body.get("metadata"))
        changed = await self._store.change(stored.id, lambda body: {**body, "metadata": metadata})
        return changed or stored.body

    async def delete(self, lookup: Lookup) -> Json:
        stored = await self._stored(lookup)
        await self._store.delete(stored.id, _KIND, stored.principal)
        return {"id": stored.id, "object": "chat.completion.deleted", "deleted": True}

    async def messages(self, lookup: Lookup) -> Json:
        """The messages that were sent."""
        stored = await self._stored(lookup)
        page = Page.of(lookup.query, newest_first=False)
        given = [
            {"content_parts": None, "name": None, "refusal": None, **message, "id": f"{stored.id}-{number}"}
            for number, message in enumerate(stored.private["messages"])
        ]
        return page.json(page.of_items(given))

    async def _stored(self, lookup: Lookup) -> Stored:
        return await self._store.get(lookup.id, _KIND, lookup.principal)


def stored_chat_routes(chats: Chats) -> list[Route]:
    """All routes but the one that makes chats."""
    one = "/v1/chat/completions/{id}"
    return [
        found_route("GET", "/v1/chat/completions", chats.list),
        found_route("GET", one, chats.get),
        changed_route(one, chats.update, MAX_UPDATE_BYTES),
        found_route("DELETE", one, chats.delete),
        found_route("GET", f"{one}/messages", chats.messages),
    ]
