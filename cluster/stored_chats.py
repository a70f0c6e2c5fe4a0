"""Chats that were asked with `store`: /v1/chat/completions/{id} and what belongs to it."""

from __future__ import annotations

import re
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from kvasir.cluster.http_front import read_json
from kvasir.cluster.pages import Page, json_response, principal_of
from kvasir.cluster.service_fields import check_metadata
from kvasir.cluster.store import Kind, Store, Stored

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

    async def list(self, request: Request) -> Response:
        query = request.query_params
        page = Page.of(query, newest_first=False)
        match = {"model": query["model"]} if "model" in query else {}
        labels = {found[1]: value for name, value in query.items() if (found := _LABEL.fullmatch(name))}
        bodies = await page.of_store(self._store, _KIND, principal_of(request), match, labels)
        return page.json(bodies)

    async def get(self, request: Request) -> Response:
        return json_response((await self._stored(request)).body)

    async def update(self, request: Request) -> Response:
        """POST: other metadata."""
        stored = await self._stored(request)
        body = await read_json(request.scope, request.receive, MAX_UPDATE_BYTES)
        check_metadata("metadata", metadata := body.get("metadata"))
        changed = await self._store.change(stored.id, lambda body: {**body, "metadata": metadata})
        return json_response(changed or stored.body)

    async def delete(self, request: Request) -> Response:
        stored = await self._stored(request)
        await self._store.delete(stored.id, _KIND, stored.principal)
        return json_response({"id": stored.id, "object": "chat.completion.deleted", "deleted": True})

    async def messages(self, request: Request) -> Response:
        """GET: the messages that were sent."""
        stored = await self._stored(request)
        page = Page.of(request.query_params, newest_first=False)
        given = [
            {"content_parts": None, "name": None, "refusal": None, **message, "id": f"{stored.id}-{number}"}
            for number, message in enumerate(stored.private["messages"])
        ]
        return page.json(page.of_items(given))

    async def _stored(self, request: Request) -> Stored:
        return await self._store.get(request.path_params["id"], _KIND, principal_of(request))


def stored_chat_routes(chats: Chats) -> list[Route]:
    """All routes but the one that makes chats."""
    one = "/v1/chat/completions/{id}"
    return [
        Route("/v1/chat/completions", chats.list, methods=["GET"]),
        Route(one, chats.get, methods=["GET"]),
        Route(one, chats.update, methods=["POST"]),
        Route(one, chats.delete, methods=["DELETE"]),
        Route(f"{one}/messages", chats.messages, methods=["GET"]),
    ]
