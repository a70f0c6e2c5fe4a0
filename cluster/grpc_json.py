"""Messages as the JSON that HTTP's bodies are, and answers back: what is computed is written once, for both doors.

Fields have the names of HTTP's bodies. What JSON has in several shapes has a field for each here; see `request_body`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

import orjson
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.json_format import ParseDict, ParseError
from google.protobuf.message import Message

from kvasir.engine.errors import ClientError, ServerError

Json = dict[str, Any]
M = TypeVar("M", bound=Message)

_FREE = {"google.protobuf.Struct", "google.protobuf.Value", "google.protobuf.ListValue"}


def as_json(message: Message) -> Json:
    """The fields that are set."""
    return {field.name: _field(field, value) for field, value in message.ListFields()}


def request_body(message: Message) -> Json:
    """The body that HTTP would have been sent."""
    return _as_body(as_json(message))


def as_message(kind: type[M], body: Mapping[str, Any]) -> M:
    """An answer's body; what the message has no field for is left out. ServerError when a field can't hold what it has."""
    try:
        found: M = ParseDict(_as_answer(body), kind(), ignore_unknown_fields=True)
    except ParseError as error:
        raise ServerError(f"gRPC can't say this answer, HTTP can: {error}") from error
    return found


def tool_choice(message: Any) -> Any:
    """In OpenAI's shape: a word, a tool by its name, or tools among which the model chooses."""
    choice = message.tool_choice if message.HasField("tool_choice") else None
    if allowed := list(message.allowed_tools):
        if choice not in (None, "auto", "required"):
            text = f'allowed_tools needs tool_choice to be "auto" or "required", got {choice!r:.60}'
            raise ClientError(text, param="tool_choice")
        return {"type": "allowed_tools", "mode": choice or "auto", "tools": [{"name": name} for name in allowed]}
    named = choice in {tool.name for tool in message.tools} and choice not in ("auto", "none", "required")
    return {"type": "function", "name": choice} if named else choice


def function(tool: Json) -> Json:
    """A tool's function, with its parameters as JSON has them."""
    found = dict(tool)
    if "parameters_json" in found:
        if "parameters" in found:
            raise ClientError("tools: send parameters or parameters_json, not both", param="tools")
        found["parameters"] = parsed(found.pop("parameters_json"), "tools: parameters_json", "tools")
    return found


def parsed(text: str, what: str, param: str) -> Any:
    """ClientError unless it is JSON."""
    try:
        return orjson.loads(text)
    except orjson.JSONDecodeError as error:
        raise ClientError(f"{what} must be a JSON Schema, as JSON text: {error}", param=param) from error


def _field(field: FieldDescriptor, value: Any) -> Any:
    if field.message_type is None:
        return list(value) if field.is_repeated else value
    if field.message_type.GetOptions().map_entry:
        return dict(value)
    return [_message(one) for one in value] if field.is_repeated else _message(value)


def _message(message: Any) -> Any:
    return plain(message) if message.DESCRIPTOR.full_name in _FREE else as_json(message)


def plain(value: Any) -> Any:
    """What a Struct, a Value or a ListValue holds. Whole numbers are integers: JSON Schemas want that. Names are
    sorted: they come in any order, and a prompt that is made of them must be the same each time to be found in the cache."""
    name = value.DESCRIPTOR.name
    if name == "Struct":
        return {key: plain(one) for key, one in sorted(value.fields.items())}
    if name == "ListValue":
        return [plain(one) for one in value.values]
    kind = value.WhichOneof("kind")
    if kind in (None, "null_value"):
        return None
    found = getattr(value, kind)
    if kind == "number_value":
        return int(found) if found.is_integer() else found
    return plain(found) if kind in ("struct_value", "list_value") else found


def _as_body(given: Json) -> Json:
    """Fields that stand for one of JSON's shapes in its place."""
    body = dict(given)
    _either(body, "input", "input_text", "input")
    for name in ("input", "items"):
        if isinstance(body.get(name), list):
            body[name] = [_item(item, f"{name}[{number}]") for number, item in enumerate(body[name])]
    if "tools" in body:
        body["tools"] = [{"type": "function", **function(tool)} for tool in body["tools"]]
    return body


def _item(given: Json, at: str) -> Json:
    item = dict(given)
    _either(item, "content", "text", f"{at}.content")
    _either(item, "output", "output_parts", f"{at}.output")
    return item


def _either(body: Json, name: str, other: str, at: str) -> None:
    """Move what is in `other` to `name`."""
    if other in body:
        if name in body:
            raise ClientError(f"{at}: send {name} or {other}, not both", param=at.partition("[")[0])
        body[name] = body.pop(other)


def _as_answer(value: Any) -> Any:
    """The other way round: the results of functions that are in parts."""
    if isinstance(value, list):
        return [_as_answer(one) for one in value]
    if not isinstance(value, Mapping):
        return value
    found = {name: _as_answer(one) for name, one in value.items()}
    if "call_id" in found and isinstance(found.get("output"), list):
        found["output_parts"] = found.pop("output")
    return found
