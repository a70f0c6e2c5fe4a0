"""Chats that were asked with `store`: /v1/chat/completions/{id} and what belongs to it."""

from __future__ import annotations

import json
import re
import time
import uuid
from collections.abc import Awaitable, Callable
from typing import Any, Protocol

from starlette.routing import Route

from kvasir.cluster.caller import Lookup
from kvasir.cluster.openai_schema import Ask
from kvasir.cluster.pages import Page
from kvasir.cluster.store import Kind, Store, Stored
from kvasir.cluster.stored_fields import new_metadata
from kvasir.cluster.stored_routes import changed_route, found_route

Json = dict[str, Any]
_KIND: Kind = "chat.completion"
MAX_UPDATE_BYTES = 65536
_LABEL = re.compile(r"metadata\[(.*)\]", re.DOTALL)


class Whole(Protocol):
    """Writes an answer."""

    def whole(self) -> Json:
        """In one piece, with its id."""


class Chats:
    """Keeps chats, and gives them out again."""

    def __init__(self, store: Store, ttl_s: float) -> None:
        self._store = store
        self._ttl_s = ttl_s

    def keeping(self, ask: Ask, reply: Whole, principal: str) -> Callable[[], Awaitable[str]]:
        """What keeps an answer if that was asked for, to be called when it is complete: gives its id, or nothing."""
        if not ask.store:
            return nothing_kept

        async def keep() -> str:
            body = {**reply.whole(), "metadata": dict(ask.metadata)}
            name, expires, private = body["id"], time.time() + self._ttl_s, {"messages": ask.messages}
            await self._store.put(
                Stored(id=name, kind=_KIND, principal=principal, expires=expires, body=body, private=private)
            )
            return str(name)

        return keep

    async def list(self, lookup: Lookup) -> Json:
        query = lookup.query
        page = Page.of(query, newest_first=False)
        match = {"model": query["model"]} if "model" in query else {}
        labels = {found[1]: query[name] for name in query if (found := _LABEL.fullmatch(name))}
        bodies = await page.of_store(self._store, _KIND, lookup.principal, match, labels)
        return page.json(bodies)

    async def get(self, lookup: Lookup) -> Json:
        return (await self._stored(lookup)).body

    async def update(self, lookup: Lookup, body: Json) -> Json:
        """Other metadata."""
        stored = await self._stored(lookup)
        metadata = new_metadata(body, "a stored chat")
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
            {"content_parts": None, "name": None, "refusal": None, **_in_one(message), "id": f"{stored.id}-{number}"}
            for number, message in enumerate(stored.private["messages"])
        ]
        return page.json(page.of_items(given))

    async def _stored(self, lookup: Lookup) -> Stored:
        return await self._store.get(lookup.id, _KIND, lookup.principal)


def new_answer_id(ask: Ask, request_id: str) -> str:
    """Clients may choose their request's id, and use it twice: what is stored has one of its own."""
    return uuid.uuid4().hex if ask.store else request_id


async def nothing_kept() -> str:
    """Nothing is kept."""
    return ""


def _in_one(message: Json) -> Json:
    """A message whose content was sent in parts: they stand beside the text. Arguments of calls are texts, however they came."""
    if isinstance(calls := message.get("tool_calls"), list):
        message = {**message, "tool_calls": [_said(call) for call in calls]}
    parts = message.get("content")
    if not isinstance(parts, list):
        return message
    text = "".join(part.get("text") or "" for part in parts if isinstance(part, dict))
    return {**message, "content": text, "content_parts": parts}


def _said(call: Any) -> Any:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or isinstance(function.get("arguments"), str | None):
        return call
    arguments = json.dumps(function["arguments"], ensure_ascii=False)
    return {**call, "function": {**function, "arguments": arguments}}


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
