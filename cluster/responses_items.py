"""Items of the Responses API, what was said and done so far, as the messages that chat templates know."""

from __future__ import annotations

import uuid
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from kvasir.cluster.carried import carried
from kvasir.cluster.custom_tools import called_function
from kvasir.cluster.overlooked import overlooked, parts_of
from kvasir.engine.errors import ClientError, UnsupportedError

Json = dict[str, Any]
Item = Mapping[str, Any]

REFERENCE = "item_reference"
"""Type of an item that stands for a stored one."""
_ROLES = ("user", "assistant", "system", "developer")
_ITEM = ("type", "id", "status", "phase", "role", "content", "call_id", "name", "arguments", "input", "output",
         "summary", "encrypted_content")  # fmt: skip
_PART = ("type", "text", "refusal", "annotations", "logprobs")
_TEXTS = {"input_text": "text", "output_text": "text", "text": "text", "refusal": "refusal"}
"""Type of a content part -> the field that holds its text."""


def input_items(given: Any, param: str = "input") -> list[Json]:
    """`input` of a body as items, each with an id. ClientError or UnsupportedError when one can't be read."""
    if isinstance(given, str):
        given = [{"role": "user", "content": given}]
    if not isinstance(given, list) or not given or not all(isinstance(item, dict) for item in given):
        raise ClientError(f"{param} must be a text or a list of items, not empty; got {given!r:.60}", param=param)
    items = [_item(item, f"{param}[{number}]") for number, item in enumerate(given)]
    if twice := [one for one, count in Counter(item["id"] for item in items).items() if count > 1]:
        raise ClientError(f"{param} holds two items whose id is {twice[0]!r:.100}; send each once", param=param)
    messages(items, None, unread=(REFERENCE,))
    return items


def unread(given: Any, param: str = "input") -> tuple[str, ...]:
    """Fields of `input` that mean nothing here; of one that `input_items` takes."""
    items = given if isinstance(given, list) else []
    parts = parts_of(items, "content", "output", "summary")
    return (*overlooked(f"{param}[]", items, _ITEM), *overlooked(f"{param}[].content[]", parts, _PART))


def messages(items: Sequence[Item], instructions: str | None, *, unread: Collection[str] = ()) -> list[Json]:
    """The conversation: instructions first; what one turn of the model brought is one message. `unread`: types that are
    left out."""
    out: list[Json] = [{"role": "system", "content": instructions}] if instructions else []
    for number, item in enumerate(items):
        kind, at = item["type"], f"input[{number}]"
        if kind in unread:
            continue
        if kind not in _READERS:
            known = ", ".join(_READERS)
            raise UnsupportedError(f"{at}: items of type {kind!r:.60} aren't read here; known: {known}", param="input")
        _READERS[kind](out, item, at)
    return out


def _item(given: Json, at: str) -> Json:
    """With type and id, and the content of a message as parts."""
    said = {name: value for name, value in given.items() if value is not None}
    item = {"type": "message" if "role" in said else REFERENCE if [*said] == ["id"] else None, **said}
    kind = _string(item, "type", at)
    for name in ("id", "status", "phase"):
        if name in item or (name == "id" and kind == REFERENCE):
            _string(item, name, at)
    item.setdefault("id", f"{_PREFIXES.get(kind, 'item')}_{uuid.uuid4().hex}")
    if kind == "message":
        part = {"type": "output_text" if item.get("role") == "assistant" else "input_text"}
        if isinstance(item.get("content"), str):
            item["content"] = [{**part, "text": item["content"], **_extra(part)}]
        item.setdefault("status", "completed")
    return item


def _extra(part: Json) -> Json:
    """What an output's text has besides."""
    return {"annotations": []} if part["type"] == "output_text" else {}


def _message(out: list[Json], item: Item, at: str) -> None:
    role = item.get("role")
    if role not in _ROLES:
        raise ClientError(f"{at}.role must be {', '.join(_ROLES)}; got {role!r:.60}", param="input")
    text = _text(item.get("content"), f"{at}.content")
    role = "system" if role == "developer" else role
    before = out[-1] if out else None
    if before and before["role"] == role == "system":  # most templates know one system message
        before["content"] += "\n\n" + text
    elif before and before["role"] == role == "assistant" and not before.get("content"):
        before["content"] = text
    else:
        out.append({"role": role, "content": text})


def _call(out: list[Json], item: Item, at: str) -> None:
    """A call of a tool belongs to the message before it, if the model wrote that."""
    call_id, function = _string(item, "call_id", at), {name: _string(item, name, at) for name in ("name", "arguments")}
    call = {"id": call_id, "type": "function", "function": function}
    _turn(out).setdefault("tool_calls", []).append(call)


def _result(out: list[Json], item: Item, at: str) -> None:
    text = _text(item.get("output"), f"{at}.output")
    out.append({"role": "tool", "tool_call_id": _string(item, "call_id", at), "content": text})


def _reasoning(out: list[Json], item: Item, at: str) -> None:
    """Thoughts belong to the message behind them. Those that only their writer can read are left out."""
    parts = item.get("content") or item.get("summary") or []
    kept = item.get("encrypted_content")
    if not parts and isinstance(kept, str) and (said := carried(kept)):
        parts = [{"text": said}]
    if not isinstance(parts, list) or not all(isinstance(part, dict) for part in parts):
        raise ClientError(f"{at}.content must be a list of parts, got {parts!r:.60}", param="input")
    text = "".join(_string(part, "text", at) for part in parts)
    if text:
        out.append({"role": "assistant", "content": "", "reasoning_content": text})


def _custom_call(out: list[Json], item: Item, at: str) -> None:
    """A call whose input is a text."""
    function = called_function(_string(item, "name", at), _string(item, "input", at))
    call = {"id": _string(item, "call_id", at), "type": "function", "function": function}
    _turn(out).setdefault("tool_calls", []).append(call)


def _compaction(out: list[Json], item: Item, at: str) -> None:
    """The summary in place of what was said before it."""
    said = carried(_string(item, "encrypted_content", at))
    if said is None:
        raise UnsupportedError(f"{at}.encrypted_content wasn't written by this server", param="input")
    text = [{"type": "text", "text": f"Summary of the conversation so far:\n{said}"}]
    _message(out, {"role": "system", "content": text}, at)


def _turn(out: list[Json]) -> Json:
    """The model's message that is being written."""
    if not out or out[-1]["role"] != "assistant":
        out.append({"role": "assistant", "content": ""})
    return out[-1]


def _text(content: Any, at: str) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, list) or not all(isinstance(part, dict) for part in content):
        raise ClientError(f"{at} must be a text or a list of parts, got {content!r:.60}", param="input")
    text = ""
    for number, part in enumerate(content):
        kind = part.get("type")
        if not isinstance(kind, str) or kind not in _TEXTS:
            why = "this server reads text only"
            raise UnsupportedError(f"{at}[{number}]: parts of type {kind!r:.60} aren't read here; {why}", param="input")
        text += _string(part, _TEXTS[kind], f"{at}[{number}]")
    return text


def _string(item: Item, name: str, at: str) -> str:
    value = item.get(name)
    if not isinstance(value, str):
        raise ClientError(f"{at}.{name} must be a string, got {value!r:.60}", param="input")
    return value


_PREFIXES = {
    "message": "msg",
    "function_call": "fc",
    "function_call_output": "fco",
    "custom_tool_call": "ctc",
    "custom_tool_call_output": "ctco",
    "reasoning": "rs",
    "compaction": "cmp",
}
_READERS: dict[str, Callable[[list[Json], Item, str], None]] = {
    "message": _message,
    "function_call": _call,
    "function_call_output": _result,
    "reasoning": _reasoning,
    "custom_tool_call": _custom_call,
    "custom_tool_call_output": _result,
    "compaction": _compaction,
}
"""Type of an item -> what it adds to the conversation."""
READ = frozenset(_READERS)
"""Types of items that are read."""
