"""Bodies of /v1/embeddings, /classify, /rerank and /score: OpenAI's, Jina's, Cohere's and vLLM's fields. As in
`openai_schema`, each field is honoured, ignored with a warning, or refused by name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from kvasir.cluster.openai_fields import Check, Neutral, boolean, integer_from, later, string
from kvasir.cluster.openai_schema import sort_fields
from kvasir.cluster.vectors import PoolingCall
from kvasir.engine.errors import ClientError, UnsupportedError
from kvasir.engine.passage import Passage
from kvasir.engine.request import PoolingParams

Body = Mapping[str, Any]

_COMMON: dict[str, Check] = {
    "model": string,
    "truncate_prompt_tokens": integer_from(-1, 2**31 - 1),
    "priority": integer_from(-(2**31), 2**31 - 1),
    "cache_salt": string,
    "request_id": string,
    "use_activation": boolean,
    "return_timing": boolean,
}
_IGNORED: Neutral = {"user": ()}
_REFUSED: Neutral = {
    "messages": (),
    "chat_template": (),
    "chat_template_kwargs": ({},),
    "add_generation_prompt": (False,),
    "mm_processor_kwargs": ({},),
    "truncation_side": ("right",),
    "embed_dtype": ("float32",),
    "endianness": ("native", "little"),
    "output_dimension": (),
    "embedding_type": ("float",),
    "embedding_types": (["float"],),
    "late_chunking": (False,),
    "task": (),
    "instruction": (),
    "input_type": (),
}
EMBEDDINGS = _COMMON | {
    "input": later,
    "encoding_format": later,
    "dimensions": integer_from(1, 2**31 - 1),
    "normalize": boolean,
    "add_special_tokens": boolean,
    "prompt_name": string,
}
CLASSIFY = _COMMON | {"input": later, "add_special_tokens": boolean}
RERANK = _COMMON | {
    "query": string,
    "documents": later,
    "top_n": integer_from(0, 2**31 - 1),
    "return_documents": boolean,
}
_RERANK_REFUSED = _REFUSED | {"max_tokens_per_doc": (), "max_chunks_per_doc": (), "rank_fields": (["text"],)}
SIDES = (("text_1", "text_2"), ("queries", "documents"), ("queries", "items"), ("data_1", "data_2"))
"""What /score calls its two lists."""
SCORE = _COMMON | {name: later for pair in SIDES for name in pair}


@dataclass(frozen=True, kw_only=True, slots=True)
class InputsAsk:
    """A body of /v1/embeddings or /classify understood."""

    call: PoolingCall
    base64: bool = False
    request_id: str | None = None
    return_timing: bool = False
    """Where the time went is told in the answer."""
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class PairsAsk:
    """A body of /rerank or /score understood: documents[i] is compared with queries[i]."""

    model: str
    queries: Sequence[str]
    documents: Sequence[str]
    params: PoolingParams
    operation: Literal["rerank", "score"]
    param: str
    shared: Mapping[str, Any]
    """Fields of `PoolingCall` by their names."""
    top_n: int = 0
    """0: all."""
    return_documents: bool = True
    request_id: str | None = None
    return_timing: bool = False
    """Where the time went is told in the answer."""
    warnings: tuple[str, ...] = ()

    def order(self, scores: Sequence[float]) -> list[int]:
        """Documents that are asked for, best first; equals as they were sent."""
        return sorted(range(len(scores)), key=lambda index: -scores[index])[: self.top_n or None]


def parse_embeddings(body: Body) -> InputsAsk:
    """Body of POST /v1/embeddings. Raises ClientError or UnsupportedError naming the field."""
    fields, warnings = sort_fields(body, EMBEDDINGS, _IGNORED, _REFUSED)
    encoding = fields.get("encoding_format", "float")
    if encoding not in ("float", "base64"):
        raise ClientError(f"encoding_format must be float or base64, got {encoding!r:.60}", param="encoding_format")
    normalize = fields.get("normalize", fields.get("use_activation"))
    params = PoolingParams(dimensions=fields.get("dimensions"), normalize=normalize)
    call = PoolingCall(inputs=_inputs(fields), params=params, operation="embeddings", **_shared(fields))
    return InputsAsk(call=call, base64=encoding == "base64", **_told(fields, warnings))


def parse_classify(body: Body) -> InputsAsk:
    """Body of POST /classify."""
    fields, warnings = sort_fields(body, CLASSIFY, _IGNORED, _REFUSED)
    params = PoolingParams(task="classify", normalize=fields.get("use_activation"))
    call = PoolingCall(inputs=_inputs(fields), params=params, operation="classify", **_shared(fields))
    return InputsAsk(call=call, **_told(fields, warnings))


def parse_rerank(body: Body) -> PairsAsk:
    """Body of POST /rerank, in Jina's and Cohere's shape."""
    fields, warnings = sort_fields(body, RERANK, _IGNORED, _RERANK_REFUSED)
    if "query" not in fields:
        raise ClientError("query must be a text", param="query")
    documents = [_document(item) for item in _list("documents", fields.get("documents"))]
    return PairsAsk(
        queries=[fields["query"]] * len(documents),
        documents=documents,
        top_n=fields.get("top_n", 0),
        return_documents=fields.get("return_documents", True),
        **_pairs(fields, warnings, "rerank", "documents"),
    )


def parse_score(body: Body) -> PairsAsk:
    """Body of POST /score: one text with many, or as many with as many."""
    fields, warnings = sort_fields(body, SCORE, _IGNORED, _REFUSED)
    given = [pair for pair in SIDES if pair[0] in fields and pair[1] in fields]
    if len(given) != 1 or len([name for name in fields if any(name in pair for pair in SIDES)]) != 2:
        names = "; ".join(" and ".join(pair) for pair in SIDES)
        raise ClientError(f"send two lists of texts under one pair of these names: {names}", param=SIDES[0][0])
    left, right = (_texts(name, fields[name]) for name in given[0])
    if len(left) == 1:
        left *= len(right)
    if len(left) != len(right):
        text = f"{given[0][0]} holds {len(left)} texts and {given[0][1]} {len(right)}; send as many, or one and many"
        raise ClientError(text, param=given[0][0])
    return PairsAsk(queries=left, documents=right, **_pairs(fields, warnings, "score", given[0][1]))


def _shared(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of `PoolingCall` that all bodies have."""
    given = {name: fields[name] for name in ("priority", "cache_salt") if name in fields}
    return {"model": fields.get("model", ""), "truncate": fields.get("truncate_prompt_tokens"), **given}


def _pairs(
    fields: Mapping[str, Any], warnings: tuple[str, ...], operation: Literal["rerank", "score"], param: str
) -> dict[str, Any]:
    """Fields of `PairsAsk` that both bodies have."""
    shared = _shared(fields)
    return {
        "model": shared.pop("model"),
        "params": PoolingParams(task="score", normalize=fields.get("use_activation")),
        "operation": operation,
        "param": param,
        "shared": shared,
        **_told(fields, warnings),
    }


def _told(fields: Mapping[str, Any], warnings: tuple[str, ...]) -> dict[str, Any]:
    """Fields of the asks that say what is told beside the answer."""
    timed = fields.get("return_timing", False)
    return {"request_id": fields.get("request_id"), "return_timing": timed, "warnings": warnings}


def _inputs(fields: Mapping[str, Any]) -> list[Passage | Sequence[int]]:
    """A text, a list of texts, a list of token ids or a list of lists of token ids."""
    given: Any = fields.get("input")
    options = {"add_special_tokens": fields.get("add_special_tokens", True), "prompt_name": fields.get("prompt_name")}
    if isinstance(given, str):
        return [Passage(text=given, **options)]
    kinds = set(map(type, given)) if isinstance(given, list) else set()
    if kinds == {int}:
        return [given]
    if kinds == {str}:
        return [Passage(text=text, **options) for text in given]
    if kinds == {list} and all(set(map(type, ids)) == {int} for ids in given):
        return list(given)
    wanted = "a text, a list of texts, a list of token ids or a list of lists of token ids, none of them empty"
    raise ClientError(f"input must be {wanted}; got {given!r:.60}", param="input")


def _document(item: Any) -> str:
    text = item.get("text") if isinstance(item, dict) else item
    if not isinstance(text, str):
        raise ClientError(f'documents must be texts or objects with a "text", got {item!r:.60}', param="documents")
    if isinstance(item, dict) and (more := [name for name in item if name not in ("text", "id")]):
        raise UnsupportedError(f"documents: only texts are ranked, got an object with {more[0]!r}", param="documents")
    return text


def _texts(name: str, given: Any) -> list[str]:
    texts = [given] if isinstance(given, str) else _list(name, given)
    if not all(isinstance(text, str) for text in texts):
        raise ClientError(f"{name} must be a text or a list of texts, got {given!r:.60}", param=name)
    return texts


def _list(name: str, given: Any) -> list[Any]:
    if not isinstance(given, list) or not given:
        raise ClientError(f"{name} must be a list of at least one text, got {given!r:.60}", param=name)
    return given
