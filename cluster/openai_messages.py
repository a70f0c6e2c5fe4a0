"""OpenAI's messages as the messages that chat templates know: its older forms, and names that others gave."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from kvasir.cluster.custom_tools import shown_call
from kvasir.cluster.overlooked import overlooked, parts_of
from kvasir.engine.errors import ClientError

Json = dict[str, Any]
_READ = ("role", "content", "name", "tool_calls", "tool_call_id", "function_call", "refusal",
         "reasoning", "reasoning_content", "thinking")  # fmt: skip


def template_messages(given: Sequence[Mapping[str, Any]]) -> list[Json]:
    """The same conversation. A function's call and its result become a tool's, paired by an id."""
    ids: dict[Any, str] = {}
    return [_message(dict(message), number, ids) for number, message in enumerate(given)]


def unread(given: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
    """Fields of messages that only a chat template may read, and those of their parts, which none does."""
    beside = overlooked("messages[]", given, _READ)
    named = tuple(f"{name} (but by chat templates that know it)" for name in beside)
    parts = [part for part in parts_of(given, "content") if isinstance(part, dict) and part.get("type") == "text"]
    return (*named, *overlooked("messages[].content[]", parts, ("type", "text")))


def _message(message: Json, number: int, ids: dict[Any, str]) -> Json:
    """ids: function's name -> id of its last call."""
    at, role = f"messages[{number}]", message.get("role")
    if not isinstance(name := message.get("name"), str | None):
        raise ClientError(f"{at}.name must be a text, got {name!r:.60}", param="messages")
    if message.get("reasoning") and "reasoning_content" not in message:
        message["reasoning_content"] = message["reasoning"]
    own_id = f"call{number:05}"  # nine letters and digits: some templates take no other
    if role == "assistant":
        if isinstance(calls := message.get("tool_calls"), list):
            message["tool_calls"] = [shown_call(call, f"{at}.tool_calls[{i}]") for i, call in enumerate(calls)]
        if (call := message.pop("function_call", None)) is not None:
            if not isinstance(call, dict) or not isinstance(call.get("name"), str):
                text = f"{at}.function_call must be an object with a name, got {call!r:.60}"
                raise ClientError(text, param="messages")
            ids[call["name"]] = own_id
            message["tool_calls"] = [{"id": own_id, "type": "function", "function": call}]
        if (refusal := message.get("refusal")) is not None:
            message["content"] = _with_refusal(message.get("content"), refusal, at)
    elif role == "function":
        message |= {"role": "tool", "tool_call_id": ids.get(name, own_id)}
    return message


def _with_refusal(content: Any, refusal: Any, at: str) -> Any:
    if not isinstance(refusal, str):
        raise ClientError(f"{at}.refusal must be a text, got {refusal!r:.60}", param="messages")
    if not content:
        return refusal
    return [*(content if isinstance(content, list) else [content]), {"type": "refusal", "refusal": refusal}]
