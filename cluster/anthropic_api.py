"""Anthropic's endpoints: /v1/messages and /v1/messages/count_tokens."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from kvasir.cluster.anthropic_reply import MessagesReply, failed
from kvasir.cluster.anthropic_schema import MessagesAsk, parse_count, parse_messages
from kvasir.cluster.context_edits import edited
from kvasir.cluster.desk import Desk
from kvasir.cluster.http_front import header_map, read_json, route_header, send_json, until_gone, warning_header
from kvasir.cluster.reply_stream import SSE, stream, whole
from kvasir.cluster.straight import Straight


class Messages:
    """POST /v1/messages."""

    def __init__(self, desk: Desk, max_body_bytes: int) -> None:
        self._desk = desk
        self._max_body_bytes = max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        ask = parse_messages(await read_json(scope, receive, self._max_body_bytes))
        await until_gone(
            receive, self._answer(ask, scope["state"]["request_id"], header_map(scope), Straight(scope, send))
        )

    async def _answer(self, ask: MessagesAsk, request_id: str, headers: Mapping[str, str], send: Straight) -> None:
        ask = await _edited(self._desk, ask)
        generation = await self._desk.begin(ask.call, request_id, headers)
        extra = [
            *warning_header((*ask.warnings, *_betas(headers), *generation.reading.warnings)),
            *route_header(generation.route),
        ]
        try:
            reply = MessagesReply(ask, generation, request_id)
            if ask.stream:
                await stream(generation, reply, send, [SSE, *extra], failed)
            else:
                await whole(generation, reply.whole, send, extra)
        finally:
            self._desk.end(generation)


class CountTokens:
    """POST /v1/messages/count_tokens."""

    def __init__(self, desk: Desk, max_body_bytes: int) -> None:
        self._desk = desk
        self._max_body_bytes = max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        ask = parse_count(await read_json(scope, receive, self._max_body_bytes))
        model, shorter = self._desk.model(ask.call.model), await _edited(self._desk, ask)
        count: dict[str, Any] = {"input_tokens": len(await model.encode(shorter.conversation))}
        if ask.edits is not None:
            count["context_management"] = {"original_input_tokens": len(await model.encode(ask.conversation))}
        await send_json(send, 200, count, warning_header(ask.warnings))


def anthropic_routes(desk: Desk, max_body_bytes: int) -> list[Route]:
    """All of Anthropic's routes."""
    return [
        Route("/v1/messages", Messages(desk, max_body_bytes), methods=["POST"]),
        Route("/v1/messages/count_tokens", CountTokens(desk, max_body_bytes), methods=["POST"]),
    ]


async def _edited(desk: Desk, ask: MessagesAsk) -> MessagesAsk:
    """`ask` with what the model is to read."""
    if ask.edits is None:
        return ask
    conversation, applied = await edited(desk.model(ask.call.model), ask.conversation, ask.edits)
    call = dataclasses.replace(ask.call, prompts=(conversation,))
    return dataclasses.replace(ask, call=call, conversation=conversation, applied=applied)


def _betas(headers: Mapping[str, str]) -> tuple[str, ...]:
    """The header turns nothing on here; what it announces is honoured or refused by the fields that use it."""
    return ("anthropic-beta",) if headers.get("anthropic-beta") else ()
