"""Ollama's endpoints that compute something: /api/generate, /api/chat, /api/embed and /api/embeddings."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import orjson
from starlette.types import Receive, Scope, Send

from kvasir.cluster.call import Call, Conversation, Prompt, Text
from kvasir.cluster.desk import Desk
from kvasir.cluster.error_shapes import ollama_error
from kvasir.cluster.http_front import (
    header_map,
    read_json,
    route_header,
    send_bytes,
    send_json,
    until_gone,
    warning_header,
)
from kvasir.cluster.ollama_fields import CLIENT_NAMES, defaults
from kvasir.cluster.ollama_reply import Kind, OllamaReply, loaded
from kvasir.cluster.ollama_schema import (
    Body,
    OllamaAsk,
    OllamaEmbedAsk,
    parse_chat,
    parse_embed,
    parse_embeddings,
    parse_generate,
)
from kvasir.cluster.reply_stream import NDJSON, stream, whole
from kvasir.cluster.served_model import ServedModel
from kvasir.cluster.straight import Straight
from kvasir.cluster.vectors import PoolingCall
from kvasir.engine.errors import KvasirError
from kvasir.engine.info import ModelInfo
from kvasir.engine.passage import Passage, as_float32
from kvasir.engine.request import PoolingParams

LATEST = ":latest"
_JSON = (b"content-type", b"application/json")
_PLAIN_TEMPLATE = "{% for message in messages %}{{ message.content }}{% if not loop.last %}\n\n{% endif %}{% endfor %}"
"""For models without a template, as Ollama has it."""


class OllamaGeneration:
    """POST /api/generate or /api/chat."""

    def __init__(self, kind: Kind, desk: Desk, max_body_bytes: int) -> None:
        self._kind: Kind = kind
        self._parse: Callable[[Body], OllamaAsk] = parse_generate if kind == "generate" else parse_chat
        self._desk = desk
        self._max_body_bytes = max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        started = time.monotonic()
        ask = self._parse(await read_json(scope, receive, self._max_body_bytes, any_type=True))
        model = find_model(self._desk, ask.model)
        if ask.prompt is None:
            self._desk.info(model)
            await send_json(send, 200, loaded(self._kind, ask, model.name), warning_header(ask.warnings))
            return
        headers = header_map(scope)
        way = Straight(scope, send)
        await until_gone(receive, self._answer(ask, model, scope["state"]["request_id"], headers, way, started))

    async def _answer(
        self,
        ask: OllamaAsk,
        model: ServedModel,
        request_id: str,
        headers: Mapping[str, str],
        send: Straight,
        started: float,
    ) -> None:
        sampling = {**defaults(ask.sampling), **model.sampling_defaults, **ask.sampling}
        prompt = await _prompt(ask, model)
        call = Call(
            model=model.name,
            prompts=(prompt,),
            sampling=sampling,
            known_as=CLIENT_NAMES,
            context=ask.num_ctx,
            cache_salt=ask.cache_salt,
            tools=ask.tools,
            thinks=ask.thinks,
        )
        generation = await self._desk.begin(call, request_id, headers)
        warnings = (*ask.warnings, *_beyond(ask.num_ctx, generation.info), *generation.reading.warnings)
        extra = [
            *warning_header(warnings, generation.truncated_tokens),
            *route_header(generation.route),
        ]
        try:
            reply = OllamaReply(self._kind, ask, generation, started)
            if ask.stream:
                await stream(generation, reply, send, [NDJSON, *extra], _failed)
            else:
                await whole(generation, reply.whole, send, extra)
        finally:
            self._desk.end(generation)


class OllamaEmbedding:
    """POST /api/embed, or its predecessor /api/embeddings (one text, not normalised by us)."""

    def __init__(self, desk: Desk, max_body_bytes: int, *, legacy: bool) -> None:
        self._desk = desk
        self._max_body_bytes = max_body_bytes
        self._legacy = legacy
        self._parse: Callable[[Body], OllamaEmbedAsk] = parse_embeddings if legacy else parse_embed

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        started = time.monotonic()
        ask = self._parse(await read_json(scope, receive, self._max_body_bytes, any_type=True))
        model = find_model(self._desk, ask.model)
        headers = header_map(scope)
        await until_gone(receive, self._answer(ask, model, scope["state"]["request_id"], headers, send, started))

    async def _answer(
        self,
        ask: OllamaEmbedAsk,
        model: ServedModel,
        request_id: str,
        headers: Mapping[str, str],
        send: Send,
        started: float,
    ) -> None:
        found, tokens = [], 0
        timing: tuple[tuple[bytes, bytes], ...] = ()
        cut = 0
        told: dict[str, Any] = {}
        info = self._desk.info(model)
        if ask.texts:
            call = PoolingCall(
                model=model.name,
                inputs=[Passage(text=text) for text in ask.texts],
                params=PoolingParams(dimensions=ask.dimensions, normalize=None if self._legacy else True),
                operation="embeddings",
                param="prompt" if self._legacy else "input",
                cache_salt=ask.cache_salt,
                truncate=min(ask.num_ctx or info.max_model_len, info.max_model_len) if ask.truncate else None,
            )
            vectors, events = await self._desk.pool(call, request_id, headers)
            found, tokens = [as_float32(event.values) for event in events], vectors.prompt_tokens
            cut = vectors.truncated_tokens
            timing = (vectors.timing.header(),)
            told = {"timing": vectors.timing.json()} if ask.return_timing else {}
        body: dict[str, Any] = {"embedding": found[0] if found else []}
        if not self._legacy:
            spent = {"total_duration": round((time.monotonic() - started) * 1e9), "load_duration": 0}
            body = {"model": ask.model or model.name, "embeddings": found, **spent, "prompt_eval_count": tokens}
        dumped = orjson.dumps({**body, **told}, option=orjson.OPT_SERIALIZE_NUMPY)
        await send_bytes(
            send, 200, dumped, (_JSON, *timing, *warning_header((*ask.warnings, *_beyond(ask.num_ctx, info)), cut))
        )


def find_model(desk: Desk, name: str) -> ServedModel:
    """The model of that name, with or without :latest."""
    known = [each for model in desk.models for each in model.names]
    other = name[: -len(LATEST)] if name.endswith(LATEST) else name + LATEST
    return desk.model(other if name not in known and other in known else name)


def _beyond(num_ctx: int | None, info: ModelInfo) -> tuple[str, ...]:
    """Warns who wants a larger context than there is."""
    if num_ctx is None or num_ctx <= info.max_model_len:
        return ()
    return (f"options.num_ctx {num_ctx} (the model has {info.max_model_len} tokens, see --max-model-len)",)


async def _prompt(ask: OllamaAsk, model: ServedModel) -> Prompt:
    """What the model reads."""
    prompt = ask.prompt
    assert prompt is not None
    if isinstance(prompt, Conversation) and prompt.chat_template is None and not _has_template(model):
        prompt = dataclasses.replace(prompt, chat_template=_PLAIN_TEMPLATE, add_special_tokens=True)
    return await _behind(ask.context, prompt, model) if ask.context else prompt


async def _behind(context: Sequence[int], prompt: Text | Conversation, model: ServedModel) -> list[int]:
    """`context` and the prompt behind it, whose own beginning of sequence is left out."""
    ids = await model.encode(prompt)
    bos = model.need_tokenizer("context").bos_token_id
    return [*context, *(ids[1:] if ids and ids[0] == bos else ids)]


def _has_template(model: ServedModel) -> bool:
    return model.tokenizer is None or "default" in model.tokenizer.templates.sources


def _failed(error: KvasirError) -> bytes:
    return orjson.dumps(ollama_error(error), option=orjson.OPT_APPEND_NEWLINE)
