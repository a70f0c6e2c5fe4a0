"""One line of a batch: how it is read, answered and written, for `kvasir batch` and for /v1/batches."""

from __future__ import annotations

import dataclasses
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import orjson

from kvasir.cluster.call import Call
from kvasir.cluster.desk import Desk
from kvasir.cluster.error_shapes import openai_error
from kvasir.cluster.generation import Generation
from kvasir.cluster.openai_reply import ChatReply, CompletionReply
from kvasir.cluster.openai_schema import Ask, parse_chat, parse_completion
from kvasir.cluster.pooling_api import ROUTES
from kvasir.cluster.responses_reply import ResponseReply
from kvasir.cluster.responses_schema import ResponseAsk, parse_response
from kvasir.engine.errors import ClientError, KvasirError

Json = dict[str, Any]

CHAT, COMPLETION, RESPONSE = "/v1/chat/completions", "/v1/completions", "/v1/responses"
URLS = (CHAT, COMPLETION, RESPONSE, *ROUTES)
"""What a line may ask."""
ROLE = "assistant"
MAX_LINE_BYTES = 32 * 2**20


@dataclass(frozen=True, slots=True)
class Line:
    """A line understood: what to ask, and the fields by which its answer is recognised."""

    number: int
    url: str
    body: Json
    label: Json
    simple: bool = False


async def answer(desk: Desk, url: str, body: Json, headers: Mapping[str, str] = {}) -> Json:
    """As the HTTP endpoint of that name answers a call with these headers; nothing is stored."""
    if url in ROUTES:
        parse, pool = ROUTES[url]
        inputs = parse(body)
        pooled, _ = await pool(desk, inputs, uuid.uuid4().hex, headers)
        return _warned(pooled, inputs.warnings)
    if body.get("stream"):
        raise ClientError("stream must be false in a batch", param="stream")
    warnings, call, reply = (_response if url == RESPONSE else _completion)(desk, url, body)
    generation = await desk.begin(call, uuid.uuid4().hex, headers)
    try:
        whole = reply(generation)
        async for _ in generation:
            pass
        cut = generation.truncated_tokens
        return _warned(
            whole(),
            (*warnings, *generation.reading.warnings, *([f"{cut} tokens of the prompt were cut off"] if cut else [])),
        )
    finally:
        desk.end(generation)


Whole = Callable[[], Json]
_Asked = tuple[tuple[str, ...], Call, Callable[[Generation], Whole]]
"""(fields that were ignored, the call, what makes the answer of its generation)"""


def _completion(desk: Desk, url: str, body: Json) -> _Asked:
    ask: Ask = (parse_chat if url == CHAT else parse_completion)(body)
    make = ChatReply if url == CHAT else CompletionReply

    def reply(generation: Generation) -> Whole:
        whole: Whole = make(ask, generation, uuid.uuid4().hex, ROLE).whole
        return whole

    warned = ("store",) if ask.store else ()
    return (*ask.warnings, *warned), ask.call, reply


def _response(desk: Desk, url: str, body: Json) -> _Asked:
    ask = _alone(parse_response(body))

    def reply(generation: Generation) -> Whole:
        written = ResponseReply(ask, generation.model)
        written.begin(generation)
        return written.whole

    return ask.warnings, ask.call, reply


def _alone(ask: ResponseAsk) -> ResponseAsk:
    """A response that leaves nothing behind. ClientError when it needs something of another one, or time."""
    for name, value in (("previous_response_id", ask.previous), ("conversation", ask.conversation)):
        if value is not None:
            raise ClientError(f"{name} can't be used in a batch", param=name)
    if ask.truncates:
        raise ClientError("truncation must be disabled in a batch", param="truncation")
    if ask.background:
        raise ClientError("background must be false in a batch", param="background")
    echo, warned = {**ask.echo, "store": False}, ("store",) if ask.body.get("store") else ()
    return dataclasses.replace(ask.with_items(ask.items), echo=echo, store=False, warnings=(*ask.warnings, *warned))


def _warned(body: Json, warnings: tuple[str, ...]) -> Json:
    return body | {"warnings": list(warnings)} if warnings else body


def line_object(raw: bytes | None) -> Json:
    """The JSON object that a line is; None is one longer than MAX_LINE_BYTES."""
    if raw is None:
        raise ClientError(f"the line is longer than {MAX_LINE_BYTES} bytes")
    try:
        value = orjson.loads(raw)
    except ValueError as error:
        raise ClientError(f"the line isn't valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise ClientError(f"the line must be a JSON object, got a {type(value).__name__}")
    return value


def line_label(value: Json) -> Json:
    """The field by which the sender knows the line: custom_id, or a simple line's id."""
    name = next((name for name in ("custom_id", "id") if value.get(name) is not None), None)
    if name is None:
        return {}
    if isinstance(value[name], bool) or not isinstance(value[name], (str, int)):
        raise ClientError(f"{name} must be a string or an integer, got {value[name]!r:.60}", param=name)
    return {name: value[name]}


def openai_line(value: Json, number: int, label: Json) -> Line:
    """A line as OpenAI's batches have it."""
    if "custom_id" not in label:
        raise ClientError("custom_id is missing", param="custom_id")
    if value.get("method", "POST") != "POST":
        raise ClientError(f"method must be POST, got {value['method']!r:.60}", param="method")
    if value.get("url") not in URLS:
        raise ClientError(f"url must be one of {', '.join(URLS)}; got {value.get('url')!r:.60}", param="url")
    if not isinstance(value.get("body"), dict):
        raise ClientError("body must be an object", param="body")
    return Line(number, value["url"], value["body"], label)


def openai_entry(label: Json, body: Json | None, failure: KvasirError | None) -> Json:
    """A line of OpenAI's output file."""
    status, content = (200, body) if failure is None else (failure.status, openai_error(failure))
    response = {"status_code": status, "request_id": body.get("id") if body else None, "body": content}
    error = error_json(failure) if failure else None
    return {"id": f"batch_req_{uuid.uuid4().hex}", **label, "response": response, "error": error}


def error_json(error: KvasirError) -> Json:
    return {"code": error.code, "message": error.message, "param": error.param}


def dumped(entry: Json) -> bytes:
    """One line of a file."""
    return orjson.dumps(entry, option=orjson.OPT_SERIALIZE_NUMPY) + b"\n"
