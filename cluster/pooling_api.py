"""/v1/embeddings, /classify, /rerank and /score: each answer comes in one piece."""

from __future__ import annotations

import base64
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

import orjson
from starlette.types import Receive, Scope, Send

from kvasir.cluster.desk import Desk
from kvasir.cluster.http_front import header_map, read_json, request_id_of, send_bytes, until_gone, warning_header
from kvasir.cluster.pooling_schema import (
    Body,
    InputsAsk,
    PairsAsk,
    parse_classify,
    parse_embeddings,
    parse_rerank,
    parse_score,
)
from kvasir.cluster.vectors import PoolingCall, Vectors
from kvasir.engine.errors import ClientError
from kvasir.engine.passage import Passage, as_float32, role_passage, similarity
from kvasir.engine.request import PoolingParams

Ask = Any
"""InputsAsk or PairsAsk: what `parse` gives, `answer` takes."""
Answered = tuple[dict[str, Any], Vectors]
"""The body of an answer, and what it was made of."""
Answer = Callable[[Desk, Ask, str, Mapping[str, str]], Awaitable[Answered]]
_JSON = (b"content-type", b"application/json")


class PoolingEndpoint:
    """A POST route, an ASGI application by itself."""

    def __init__(self, desk: Desk, parse: Callable[[Body], Ask], answer: Answer, max_body_bytes: int) -> None:
        self._desk, self._parse, self._answer = desk, parse, answer
        self._max_body_bytes = max_body_bytes

    @classmethod
    def routes(cls, desk: Desk, max_body_bytes: int) -> dict[str, PoolingEndpoint]:
        """Path -> endpoint."""
        return {path: cls(desk, parse, answer, max_body_bytes) for path, (parse, answer) in ROUTES.items()}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        ask = self._parse(await read_json(scope, receive, self._max_body_bytes))
        headers = header_map(scope)
        request_id = request_id_of(scope, headers, ask.request_id)
        await until_gone(receive, self._reply(ask, request_id, headers, send))

    async def _reply(self, ask: Ask, request_id: str, headers: Mapping[str, str], send: Send) -> None:
        body, vectors = await self._answer(self._desk, ask, request_id, headers)
        dumped = orjson.dumps(body, option=orjson.OPT_SERIALIZE_NUMPY)
        await send_bytes(
            send, 200, dumped, (_JSON, vectors.timing.header(), *warning_header(ask.warnings, vectors.truncated_tokens))
        )


async def _embeddings(desk: Desk, ask: InputsAsk, request_id: str, headers: Mapping[str, str]) -> Answered:
    vectors, events = await desk.pool(ask.call, request_id, headers)
    data = [
        {"object": "embedding", "index": i, "embedding": _written(event.values, ask.base64)}
        for i, event in enumerate(events)
    ]
    return _listing("embd", request_id, vectors.model.name, data, vectors.prompt_tokens), vectors


async def _classify(desk: Desk, ask: InputsAsk, request_id: str, headers: Mapping[str, str]) -> Answered:
    vectors, events = await desk.pool(ask.call, request_id, headers)
    labels = vectors.info.labels
    data = [
        {"index": i, "label": best_label(labels, event.values), "probs": event.values, "num_classes": len(event.values)}
        for i, event in enumerate(events)
    ]
    return _listing("classify", request_id, vectors.model.name, data, vectors.prompt_tokens), vectors


async def _rerank(desk: Desk, ask: PairsAsk, request_id: str, headers: Mapping[str, str]) -> Answered:
    model, scores, vectors = await scores_of(desk, ask, request_id, headers)
    results: list[dict[str, Any]] = [{"index": i, "relevance_score": scores[i]} for i in ask.order(scores)]
    if ask.return_documents:
        for result in results:
            result["document"] = {"text": ask.documents[result["index"]]}
    return {
        "id": f"rerank-{request_id}",
        "model": model,
        "usage": _usage(vectors.prompt_tokens),
        "results": results,
    }, vectors


async def _score(desk: Desk, ask: PairsAsk, request_id: str, headers: Mapping[str, str]) -> Answered:
    model, scores, vectors = await scores_of(desk, ask, request_id, headers)
    data = [{"object": "score", "index": i, "score": score} for i, score in enumerate(scores)]
    return _listing("score", request_id, model, data, vectors.prompt_tokens), vectors


async def scores_of(
    desk: Desk, ask: PairsAsk, request_id: str, headers: Mapping[str, str]
) -> tuple[str, list[float], Vectors]:
    """(model, a score for each pair, what was read): by a cross-encoder that reads both texts, or by their vectors."""
    model = desk.model(ask.model)
    tasks = desk.info(model).tasks
    call = {"model": ask.model, "operation": ask.operation, "param": ask.param, **ask.shared}
    if "score" in tasks or "embed" not in tasks:
        pairs = [Passage(text=a, pair=b) for a, b in zip(ask.queries, ask.documents, strict=True)]
        read, events = await desk.pool(PoolingCall(inputs=pairs, params=ask.params, **call), request_id, headers)
        return model.name, [event.values[0] for event in events], read
    if ask.params.normalize is not None:
        text = f"use_activation is for models with labels; {model.name!r} compares vectors"
        raise ClientError(text, param="use_activation")
    queries = [role_passage(text, "query", model.rules) for text in ask.queries]
    documents = [role_passage(text, "document", model.rules) for text in ask.documents]
    distinct = list(dict.fromkeys([*queries, *documents]))
    read, events = await desk.pool(PoolingCall(inputs=distinct, params=PoolingParams(), **call), request_id, headers)
    found = {passage: event.values for passage, event in zip(distinct, events, strict=True)}
    kind = model.rules.similarity
    scores = [similarity(found[a], found[b], kind) for a, b in zip(queries, documents, strict=True)]
    return model.name, scores, read


def _listing(prefix: str, request_id: str, model: str, data: list[dict[str, Any]], tokens: int) -> dict[str, Any]:
    """OpenAI's list, with vLLM's additions."""
    facts = {"id": f"{prefix}-{request_id}", "object": "list", "created": int(time.time()), "model": model}
    return {**facts, "data": data, "usage": _usage(tokens)}


def _usage(tokens: int) -> dict[str, Any]:
    return {"prompt_tokens": tokens, "total_tokens": tokens, "completion_tokens": 0, "prompt_tokens_details": None}


def _written(values: Sequence[float], as_base64: bool) -> Any:
    """As numbers, or as the bytes of their float32."""
    vector = as_float32(values)
    return base64.b64encode(vector.tobytes()).decode() if as_base64 else vector


def best_label(labels: Sequence[str], values: Sequence[float]) -> str | None:
    """The likeliest label's name; a single one has no rival."""
    if len(labels) != len(values):
        return None
    return labels[max(range(len(values)), key=values.__getitem__)]


def _timed(answer: Answer) -> Answer:
    """The same, with where the time went if that was asked for."""

    async def answered(desk: Desk, ask: Ask, request_id: str, headers: Mapping[str, str]) -> Answered:
        body, vectors = await answer(desk, ask, request_id, headers)
        return ({**body, "timing": vectors.timing.json()} if ask.return_timing else body), vectors

    return answered


ROUTES: dict[str, tuple[Callable[[Body], Ask], Answer]] = {
    "/v1/embeddings": (parse_embeddings, _timed(_embeddings)),
    **dict.fromkeys(("/rerank", "/v1/rerank", "/v2/rerank"), (parse_rerank, _timed(_rerank))),
    **dict.fromkeys(("/score", "/v1/score"), (parse_score, _timed(_score))),
    **dict.fromkeys(("/classify", "/v1/classify"), (parse_classify, _timed(_classify))),
}
"""Path -> how its body is read, and how it is answered."""
