"""OpenAI's endpoints, and vLLM's /tokenize and /detokenize. Those that POST are ASGI applications by themselves."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import orjson
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from kvasir.cluster.anthropic_reply import model_card
from kvasir.cluster.desk import Desk
from kvasir.cluster.error_shapes import of_anthropic, openai_error
from kvasir.cluster.generation import Generation
from kvasir.cluster.http_front import (
    header_map,
    read_json,
    request_id_of,
    route_header,
    send_json,
    until_gone,
    warning_header,
)
from kvasir.cluster.openai_reply import ChatReply, CompletionReply, Reply
from kvasir.cluster.openai_schema import Ask, parse_chat, parse_completion, parse_detokenize, parse_tokenize
from kvasir.cluster.reply_stream import SSE, stream, whole
from kvasir.cluster.service_fields import in_session
from kvasir.cluster.stored_chats import Chats, new_answer_id
from kvasir.cluster.straight import Straight
from kvasir.engine.errors import KvasirError

Body = Mapping[str, Any]
MakeReply = Callable[[Ask, Generation, str, str], Reply]


class Completions:
    """POST /v1/chat/completions or /v1/completions."""

    def __init__(
        self,
        desk: Desk,
        parse: Callable[[Body], Ask],
        make_reply: MakeReply,
        *,
        max_body_bytes: int,
        role: str,
        chats: Chats | None = None,
    ) -> None:
        self._desk = desk
        self._parse = parse
        self._make_reply = make_reply
        self._max_body_bytes = max_body_bytes
        self._role = role
        self._chats = chats

    @classmethod
    def chat(cls, desk: Desk, max_body_bytes: int, role: str, chats: Chats) -> Completions:
        return cls(desk, parse_chat, ChatReply, max_body_bytes=max_body_bytes, role=role, chats=chats)

    @classmethod
    def text(cls, desk: Desk, max_body_bytes: int, role: str) -> Completions:
        return cls(desk, parse_completion, CompletionReply, max_body_bytes=max_body_bytes, role=role)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        ask = self._parse(await read_json(scope, receive, self._max_body_bytes))
        headers = header_map(scope)
        request_id_of(scope, headers, ask.request_id)
        await until_gone(receive, self._answer(ask, scope["state"], headers, Straight(scope, send)))

    async def _answer(self, ask: Ask, state: Mapping[str, Any], headers: Mapping[str, str], send: Straight) -> None:
        generation = await self._desk.begin(ask.call, state["request_id"], in_session(headers, ask.session))
        try:
            reply = self._make_reply(ask, generation, new_answer_id(ask, state["request_id"]), self._role)
            keep = self._chats.keeping(ask, reply, state["principal"]) if self._chats else None
            extra = [
                *warning_header((*ask.warnings, *generation.reading.warnings), generation.truncated_tokens),
                *route_header(generation.route),
            ]
            if ask.stream:
                await stream(generation, reply, send, [SSE, *extra], _failed, keep)
            else:
                await whole(generation, reply.whole, send, extra, keep)
        finally:
            self._desk.end(generation)


class Tokenize:
    """POST /tokenize: text or conversation -> ids."""

    def __init__(self, desk: Desk, max_body_bytes: int) -> None:
        self._desk = desk
        self._max_body_bytes = max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        body = await read_json(scope, receive, self._max_body_bytes)
        name, prompt, strings, warnings = parse_tokenize(body)
        model = self._desk.model(name)
        ids = await model.encode(prompt)
        limit = self._desk.info(model).max_model_len
        answer: dict[str, Any] = {"count": len(ids), "max_model_len": limit, "tokens": ids, "token_strs": None}
        if strings:
            tokenizer = model.need_tokenizer("return_token_strs")
            answer["token_strs"] = [tokenizer.token_text(token) for token in ids]
        await send_json(send, 200, answer, warning_header(warnings))


class Detokenize:
    """POST /detokenize: ids -> text."""

    def __init__(self, desk: Desk, max_body_bytes: int) -> None:
        self._desk = desk
        self._max_body_bytes = max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        body = await read_json(scope, receive, self._max_body_bytes)
        name, ids, skip, warnings = parse_detokenize(body)
        text = await self._desk.detokenize(self._desk.model(name), ids, skip_special_tokens=skip)
        await send_json(send, 200, {"prompt": text}, warning_header(warnings))


class Models:
    """GET /v1/models and /v1/models/{name}; a name may hold slashes. In Anthropic's shape for Anthropic's clients."""

    def __init__(self, desk: Desk, created: int) -> None:
        self._desk = desk
        self._created = created

    async def list(self, request: Request) -> Response:
        names = [name for model in self._desk.models for name in model.names]
        if of_anthropic(request.headers):
            cards = [model_card(name, self._created) for name in names]
            page = {"data": cards, "has_more": False, "first_id": names[0], "last_id": names[-1]}
            return _json(page)
        return _json({"object": "list", "data": [self._card(name) for name in names]})

    async def get(self, request: Request) -> Response:
        name = request.path_params["name"]
        self._desk.model(name)
        card = model_card(name, self._created) if of_anthropic(request.headers) else self._card(name)
        return _json(card)

    def _card(self, name: str) -> dict[str, Any]:
        model = self._desk.model(name)
        root = {"root": model.name, "parent": None, "max_model_len": self._max_model_len(model.name)}
        return {"id": name, "object": "model", "created": self._created, "owned_by": "kvasir", **root}

    def _max_model_len(self, name: str) -> int | None:
        infos = {info.name: info for info in self._desk.directory.models()}
        return infos[name].max_model_len if name in infos else None


def _failed(error: KvasirError) -> bytes:
    return b"data: " + orjson.dumps(openai_error(error)) + b"\n\n"


def _json(value: Any) -> Response:
    return Response(orjson.dumps(value), media_type="application/json")
