"""Labels, scores and ranks over gRPC: messages of inference.proto as the bodies that HTTP has, and answers as replies."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Union

from kvasir.cluster.desk import Desk
from kvasir.cluster.pooling_api import best_label, scores_of
from kvasir.cluster.pooling_schema import PairsAsk, parse_rerank, parse_score
from kvasir.cluster.vectors import PoolingCall, Vectors
from kvasir.engine.errors import ClientError
from kvasir.engine.passage import Passage
from kvasir.engine.request import PoolingParams
from kvasir.proto import inference_pb2 as pb

Pairs = Union[pb.ScoreRequest, pb.RerankRequest]


def call_of_classify(request: pb.ClassifyRequest, inputs: list[Any]) -> PoolingCall:
    """Raises ClientError."""
    return PoolingCall(
        model=request.model,
        inputs=inputs,
        params=PoolingParams(task="classify", normalize=_optional(request, "normalize")),
        operation="classify",
        param="inputs",
        truncate=_optional(request, "truncate_prompt_tokens"),
        priority=request.priority,
        cache_salt=request.cache_salt,
    )


def classify_reply(vectors: Vectors, events: Any, request_id: str) -> pb.ClassifyReply:
    """The whole answer."""
    labels = vectors.info.labels
    reply = pb.ClassifyReply(request_id=request_id, model=vectors.model.name, labels=labels)
    for event in events:
        reply.classifications.add(values=event.values, label=best_label(labels, event.values) or "")
    _count(reply.usage, vectors)
    return reply


def ask_of_pairs(request: Pairs, deadline_s: float | None) -> PairsAsk:
    """Raises ClientError."""
    body: dict[str, Any] = {name: getattr(request, name) for name in ("model", "priority", "cache_salt")}
    body["documents"] = list(request.documents)
    for name, field in (("use_activation", "normalize"), ("truncate_prompt_tokens", "truncate_prompt_tokens")):
        body[name] = _optional(request, field)
    if isinstance(request, pb.ScoreRequest):
        ask = parse_score({**body, "queries": list(request.queries)})
    else:
        ask = parse_rerank({**body, "query": request.query, "top_n": request.top_n})
    return dataclasses.replace(ask, shared={**ask.shared, "deadline_s": deadline_s})


async def score(
    desk: Desk, ask: PairsAsk, request_id: str, headers: Mapping[str, str]
) -> tuple[pb.ScoreReply, Vectors]:
    """Raises a KvasirError."""
    model, scores, vectors = await scores_of(desk, ask, request_id, headers)
    reply = pb.ScoreReply(request_id=request_id, model=model, scores=scores)
    _count(reply.usage, vectors)
    return reply, vectors


async def rerank(
    desk: Desk, ask: PairsAsk, request_id: str, headers: Mapping[str, str]
) -> tuple[pb.RerankReply, Vectors]:
    """Raises a KvasirError."""
    model, scores, vectors = await scores_of(desk, ask, request_id, headers)
    reply = pb.RerankReply(request_id=request_id, model=model)
    for index in ask.order(scores):
        reply.results.add(index=index, score=scores[index])
    _count(reply.usage, vectors)
    return reply, vectors


def inputs_of(messages: Any, given: Mapping[str, Any]) -> list[Any]:
    """Texts and token ids. given: fields of Passage."""
    found: list[Any] = []
    for message in messages:
        kind = message.WhichOneof("input")
        if kind is None:
            raise ClientError("every input must have text or token_ids", param="inputs")
        found.append(Passage(text=message.text, **given) if kind == "text" else list(message.token_ids.ids))
    return found


def _optional(message: Any, name: str) -> Any:
    return getattr(message, name) if message.HasField(name) else None


def _count(usage: pb.Usage, vectors: Vectors) -> None:
    usage.prompt_tokens, usage.cached_tokens = vectors.prompt_tokens, vectors.cached_tokens
    usage.truncated_tokens = vectors.truncated_tokens
