"""Responses as they are made and kept, whichever door a request comes through."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from kvasir.cluster.background import Background
from kvasir.cluster.call import Conversation
from kvasir.cluster.caller import Answer, Caller, Lookup
from kvasir.cluster.desk import Desk
from kvasir.cluster.generation import Generation
from kvasir.cluster.pages import Page
from kvasir.cluster.responses_compact import compact
from kvasir.cluster.responses_fit import fitted
from kvasir.cluster.responses_history import add_to_conversation, history, resolved, said_before
from kvasir.cluster.responses_reply import ResponseReply
from kvasir.cluster.responses_schema import ResponseAsk
from kvasir.cluster.service_fields import in_session
from kvasir.cluster.store import Store, Stored
from kvasir.engine.errors import ClientError, OverloadedError

Json = dict[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class Begun:
    """A response that is being made."""

    ask: ResponseAsk
    reply: ResponseReply
    generation: Generation | None
    """None: it is made in the background."""
    stored: Stored
    """As it is at first."""
    store: Store
    warnings: tuple[str, ...]

    async def keep(self) -> None:
        """To be called when the answer is complete, before the client knows."""
        if self.reply.response["store"]:
            await self.store.put(dataclasses.replace(self.stored, body=self.reply.response))
        await add_to_conversation(self.store, self.ask, self.reply.response, self.stored.expires)

    async def whole(self) -> Answer:
        """The answer in one piece, kept."""
        if self.generation is None:
            return Answer(body=self.stored.body, warnings=self.warnings)
        async for _ in self.generation:
            pass
        body = self.reply.whole()
        await self.keep()
        return Answer(body=body, warnings=self.warnings, timing=self.generation.timing)


class Responses:
    """Makes responses, and gives them out again."""

    def __init__(self, desk: Desk, store: Store, background: Background, ttl_s: float) -> None:
        self.background = background
        self._desk = desk
        self._store = store
        self._ttl_s = ttl_s

    @asynccontextmanager
    async def begun(self, ask: ResponseAsk, caller: Caller) -> AsyncIterator[Begun]:
        """Begin to answer. Raises a KvasirError when that can't be done, or not now."""
        expires = time.time() + self._ttl_s
        ask = await resolved(self._store, ask, caller.principal)
        earlier = await said_before(self._store, ask, caller.principal, expires)
        ask = await fitted(self._desk, ask, earlier)
        model = self._desk.model(ask.call.model)
        reply = ResponseReply(ask, model)
        stored = _stored(ask, reply, caller.principal, expires, model.name)
        headers = in_session(caller.headers, ask.session)
        if ask.background:
            warnings = await self._later(ask, reply, stored, caller.request_id, headers)
            yield Begun(ask=ask, reply=reply, generation=None, stored=stored, store=self._store, warnings=warnings)
            return
        call = dataclasses.replace(ask.call, deadline_s=caller.deadline_s)
        generation = await self._desk.begin(call, caller.request_id, headers)
        try:
            reply.begin(generation)
            warnings = _warnings(ask, generation)
            yield Begun(
                ask=ask, reply=reply, generation=generation, stored=stored, store=self._store, warnings=warnings
            )
        finally:
            self._desk.end(generation)

    async def count_input(self, ask: ResponseAsk, principal: str) -> Answer:
        """How many tokens the model would read."""
        ask = await resolved(self._store, ask, principal)
        ask = await fitted(self._desk, ask, await said_before(self._store, ask, principal, 0.0))
        (conversation,) = ask.call.prompts
        assert isinstance(conversation, Conversation)
        count = len(await self._desk.model(ask.call.model).encode(conversation))
        return Answer(body={"object": "response.input_tokens", "input_tokens": count}, warnings=ask.warnings)

    async def compact(self, ask: ResponseAsk, caller: Caller) -> Answer:
        """A conversation in fewer items."""
        return await compact(self._desk, self._store, ask, caller)

    async def get(self, lookup: Lookup) -> Stored:
        return await self._store.get(lookup.id, "response", lookup.principal)

    async def streamed(self, lookup: Lookup) -> Stored:
        """One of which the events are kept. ClientError when it isn't."""
        stored = await self.get(lookup)
        if not stored.private["streamed"]:
            text = f"response {stored.id} can't be streamed: it wasn't created with background and stream"
            raise ClientError(text, param="stream")
        return stored

    async def delete(self, lookup: Lookup) -> Json:
        stored = await self.get(lookup)
        await self._store.delete(stored.id, "response", stored.principal)
        self.background.stop(stored.id)
        return {"id": stored.id, "object": "response", "deleted": True}

    async def cancel(self, lookup: Lookup) -> Json:
        """One that has ended stays as it is."""
        stored = await self.get(lookup)
        if not stored.body["background"]:
            text = "only responses that are made in the background can be cancelled; end the connection of others"
            raise ClientError(text, param="response_id")
        return await self.background.cancel(stored)

    async def input_items(self, lookup: Lookup) -> Json:
        """What the model read, earlier turns included."""
        stored = await self.get(lookup)
        page = Page.of(lookup.query)
        earlier = await history(self._store, stored.private["previous"], stored.principal, 0.0)
        return page.json(page.of_items([*earlier, *stored.private["items"]]))

    async def _later(
        self, ask: ResponseAsk, reply: ResponseReply, stored: Stored, request_id: str, headers: Mapping[str, str]
    ) -> tuple[str, ...]:
        """Have it made. What is wrong with it is said now, a full server is no reason to refuse. What is ignored."""
        self.background.check_room()
        generation: Generation | None = None
        with contextlib.suppress(OverloadedError):
            generation = await self._desk.begin(ask.call, request_id, headers)
        warnings = _warnings(ask, generation)
        await self.background.respond(ask, reply, stored, generation)
        return warnings


def _stored(ask: ResponseAsk, reply: ResponseReply, principal: str, expires: float, model: str) -> Stored:
    private: Json = {"items": ask.items, "previous": ask.previous, "streamed": ask.background and ask.stream}
    if ask.background:
        private |= {"ask": ask.body, "models": [model]}
    body = reply.response
    return Stored(
        id=body["id"], kind="response", principal=principal, expires=expires, open=ask.background, body=body,
        private=private,
    )  # fmt: skip


def _warnings(ask: ResponseAsk, generation: Generation | None) -> tuple[str, ...]:
    return (*ask.warnings, *(generation.reading.warnings if generation else ()))
