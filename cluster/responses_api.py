"""/v1/responses and what is stored of it."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from kvasir.cluster.background import Background
from kvasir.cluster.call import Conversation
from kvasir.cluster.config import GatewayConfig
from kvasir.cluster.desk import Desk
from kvasir.cluster.generation import Generation
from kvasir.cluster.http_front import header_map, read_json, request_id_of, send_json, until_gone, warning_header
from kvasir.cluster.pages import Page, json_response, principal_of
from kvasir.cluster.reply_stream import SSE, UNBUFFERED, stream
from kvasir.cluster.responses_compact import Compact
from kvasir.cluster.responses_fit import fitted
from kvasir.cluster.responses_history import add_to_conversation, history, said_before
from kvasir.cluster.responses_reply import ResponseReply
from kvasir.cluster.responses_schema import ResponseAsk, parse_input_tokens, parse_response
from kvasir.cluster.service_fields import in_session
from kvasir.cluster.store import Store, Stored
from kvasir.engine.errors import ClientError, OverloadedError

Json = dict[str, Any]
Headers = Sequence[tuple[bytes, bytes]]


class CreateResponse:
    """POST /v1/responses."""

    def __init__(self, desk: Desk, store: Store, background: Background, *, ttl_s: float, max_body_bytes: int) -> None:
        self._desk = desk
        self._store = store
        self._background = background
        self._ttl_s = ttl_s
        self._max_body_bytes = max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        ask = parse_response(await read_json(scope, receive, self._max_body_bytes))
        headers = header_map(scope)
        request_id = request_id_of(scope, headers, ask.request_id)
        work = self._answer(ask, scope["state"]["principal"], request_id, headers, send)
        await until_gone(receive, work)

    async def _answer(
        self, ask: ResponseAsk, principal: str, request_id: str, headers: Mapping[str, str], send: Send
    ) -> None:
        expires = time.time() + self._ttl_s
        headers = in_session(headers, ask.session)
        ask = await fitted(self._desk, ask, await said_before(self._store, ask, principal, expires))
        reply = ResponseReply(ask, self._desk.model(ask.call.model))
        stored = _stored(ask, reply, principal, expires, self._desk.model(ask.call.model).name)
        if ask.background:
            await self._later(ask, reply, stored, (request_id, headers), send)
            return
        generation = await self._desk.begin(ask.call, request_id, headers)
        warnings = _warnings(ask, generation)
        keep = self._keeping(ask, reply, stored)
        try:
            reply.begin(generation)
            if ask.stream:
                await stream(generation, reply, send, [SSE, *warnings], reply.failure, keep)
                return
            async for _ in generation:
                pass
            whole = reply.whole()
            await keep()
            await send_json(send, 200, whole, [*warnings, generation.timing.header()])
        finally:
            self._desk.end(generation)

    def _keeping(self, ask: ResponseAsk, reply: ResponseReply, stored: Stored) -> Callable[[], Awaitable[None]]:
        """Called when the answer is complete, before the client knows."""

        async def keep() -> None:
            if reply.response["store"]:
                await self._store.put(dataclasses.replace(stored, body=reply.response))
            await add_to_conversation(self._store, ask, reply.response, stored.expires)

        return keep

    async def _later(
        self,
        ask: ResponseAsk,
        reply: ResponseReply,
        stored: Stored,
        caller: tuple[str, Mapping[str, str]],
        send: Send,
    ) -> None:
        """Answer at once that it will be done. What is wrong with it is said now, a full server is no reason to refuse."""
        self._background.check_room()
        generation: Generation | None = None
        with contextlib.suppress(OverloadedError):
            generation = await self._desk.begin(ask.call, *caller)
        warnings = _warnings(ask, generation)
        await self._background.respond(ask, reply, stored, generation)
        if ask.stream:
            await _follow(self._background, stored.id, -1, send, warnings)
        else:
            await send_json(send, 200, stored.body, warnings)


class CountInput:
    """POST /v1/responses/input_tokens."""

    def __init__(self, desk: Desk, store: Store, max_body_bytes: int) -> None:
        self._desk = desk
        self._store = store
        self._max_body_bytes = max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        ask = parse_input_tokens(await read_json(scope, receive, self._max_body_bytes))
        earlier = await said_before(self._store, ask, scope["state"]["principal"], 0.0)
        ask = await fitted(self._desk, ask, earlier)
        (conversation,) = ask.call.prompts
        assert isinstance(conversation, Conversation)
        count = len(await self._desk.model(ask.call.model).encode(conversation))
        answer = {"object": "response.input_tokens", "input_tokens": count}
        await send_json(send, 200, answer, warning_header(ask.warnings))


class Responses:
    """What is stored of responses, for those who asked for them."""

    def __init__(self, store: Store, background: Background) -> None:
        self._store = store
        self._background = background

    async def get(self, scope: Scope, receive: Receive, send: Send) -> None:
        """GET: the response, or with ?stream=true the events of one that was made in the background."""
        request = Request(scope)
        stored = await self._stored(request)
        if not _flag(request.query_params, "stream"):
            await send_json(send, 200, stored.body)
            return
        if not stored.private["streamed"]:
            text = f"response {stored.id} can't be streamed: it wasn't created with background and stream"
            raise ClientError(text, param="stream")
        after = _number(request.query_params, "starting_after", -1)
        await until_gone(receive, _follow(self._background, stored.id, after, send, ()))

    async def delete(self, request: Request) -> Response:
        stored = await self._stored(request)
        await self._store.delete(stored.id, "response", stored.principal)
        self._background.stop(stored.id)
        return json_response({"id": stored.id, "object": "response", "deleted": True})

    async def cancel(self, request: Request) -> Response:
        """POST: one that has ended stays as it is."""
        stored = await self._stored(request)
        if not stored.body["background"]:
            text = "only responses that are made in the background can be cancelled; end the connection of others"
            raise ClientError(text, param="response_id")
        return json_response(await self._background.cancel(stored))

    async def input_items(self, request: Request) -> Response:
        """GET: what the model read, earlier turns included."""
        stored = await self._stored(request)
        page = Page.of(request.query_params)
        earlier = await history(self._store, stored.private["previous"], stored.principal, 0.0)
        return page.json(page.of_items([*earlier, *stored.private["items"]]))

    async def _stored(self, request: Request) -> Stored:
        return await self._store.get(request.path_params["id"], "response", principal_of(request))


async def _follow(background: Background, response_id: str, after: int, send: Send, headers: Headers) -> None:
    """Send the events behind number `after`, those too that are still to come."""
    await send({"type": "http.response.start", "status": 200, "headers": [SSE, *headers, *UNBUFFERED]})
    async for parts in background.follow(response_id, after):
        body = b"".join(part.data for part in parts)
        await send({"type": "http.response.body", "body": body, "more_body": True})
    await send({"type": "http.response.body", "body": b""})


def responses_routes(desk: Desk, store: Store, background: Background, config: GatewayConfig) -> list[Route]:
    """All routes of responses."""
    create = CreateResponse(desk, store, background, ttl_s=config.response_ttl_s, max_body_bytes=config.max_body_bytes)
    stored, all_ = Responses(store, background), "/v1/responses"
    one = f"{all_}/{{id}}"
    return [
        Route(all_, create, methods=["POST"]),
        Route(f"{all_}/input_tokens", CountInput(desk, store, config.max_body_bytes), methods=["POST"]),
        Route(f"{all_}/compact", Compact(desk, store, config.max_body_bytes), methods=["POST"]),
        Route(one, Streamed(stored.get), methods=["GET"]),
        Route(one, stored.delete, methods=["DELETE"]),
        Route(f"{one}/cancel", stored.cancel, methods=["POST"]),
        Route(f"{one}/input_items", stored.input_items, methods=["GET"]),
    ]


class Streamed:
    """An endpoint that writes its answer itself. (Starlette calls functions with a request.)"""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._app(scope, receive, send)


def _stored(ask: ResponseAsk, reply: ResponseReply, principal: str, expires: float, model: str) -> Stored:
    private: Json = {"items": ask.items, "previous": ask.previous, "streamed": ask.background and ask.stream}
    if ask.background:
        private |= {"ask": ask.body, "models": [model]}
    body = reply.response
    return Stored(
        id=body["id"], kind="response", principal=principal, expires=expires, open=ask.background, body=body,
        private=private,
    )  # fmt: skip


def _warnings(ask: ResponseAsk, generation: Generation | None) -> Headers:
    return warning_header((*ask.warnings, *(generation.reading.warnings if generation else ())))


def _flag(query: Mapping[str, str], name: str) -> bool:
    given = query.get(name, "false")
    if given not in ("true", "false"):
        raise ClientError(f"{name} must be true or false, got {given!r:.60}", param=name)
    return given == "true"


def _number(query: Mapping[str, str], name: str, default: int) -> int:
    given = query.get(name)
    if given is None:
        return default
    if not (given.isascii() and given.isdigit() and len(given) < 10):
        raise ClientError(f"{name} must be the number of an event, got {given!r:.60}", param=name)
    return int(given)
