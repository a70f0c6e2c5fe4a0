"""Anthropic's messages and content blocks as the messages that chat templates know."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from kvasir.cluster.overlooked import overlooked, parts_of
from kvasir.engine.errors import ClientError, UnsupportedError

Json = dict[str, Any]
Block = Mapping[str, Any]

_ROLES = ("user", "assistant", "system")
_BLOCK = ("type", "text", "cache_control", "citations", "id", "name", "input", "tool_use_id", "content", "is_error",
          "thinking", "signature", "data")  # fmt: skip


def conversation(given: Any, system: Any) -> tuple[list[Json], bool]:
    """(messages, whether cache_control was met). Neighbours of one role are one turn, as Anthropic has it."""
    if not isinstance(given, list) or not given:
        raise ClientError("messages must be a list of at least one message", param="messages")
    out: list[Json] = []
    cached = False
    if system is not None and system != "" and system != []:
        blocks = _blocks(system, "system", "system")
        out.append({"role": "system", "content": text_of(blocks, "system")})
        cached = _cached(blocks)
    for number, message in enumerate(given):
        at = f"messages[{number}]"
        if not isinstance(message, dict) or message.get("role") not in _ROLES:
            raise ClientError(f"{at} must be an object with a role: {', '.join(_ROLES)}", param="messages")
        blocks = _blocks(message.get("content"), f"{at}.content", "messages")
        if not blocks:
            raise ClientError(f"{at}.content must hold at least one block", param="messages")
        cached = cached or _cached(blocks)
        for turn in _turns(message["role"], blocks, at):
            _append(out, turn)
    return out, cached


def unread(given: Sequence[Any], system: Any) -> tuple[str, ...]:
    """Fields of messages and blocks that mean nothing here; of a `conversation` that is fine."""
    blocks = parts_of(given, "content")
    return (
        *overlooked("messages[]", given, ("role", "content")),
        *overlooked("messages[].content[]", [*blocks, *parts_of(blocks, "content")], _BLOCK),
        *overlooked("system[]", system if isinstance(system, list) else (), _BLOCK),
    )


def text_of(content: Any, at: str) -> str:
    """Text of a content that is text alone: a string, or text blocks."""
    param = at.partition("[")[0].partition(".")[0]
    blocks = _blocks(content, at, param)
    for number, block in enumerate(blocks):
        if block["type"] != "text":
            _refuse(block, f"{at}[{number}]", param)
    return "".join(_string(block, "text", f"{at}[{i}]") for i, block in enumerate(blocks))


def _turns(role: str, blocks: Sequence[Block], at: str) -> list[Json]:
    """The messages that one message of Anthropic's becomes: results of tools are messages of their own."""
    if role == "assistant":
        return [_assistant(blocks, at)]
    turns: list[Json] = []
    for number, block in enumerate(blocks):
        place = f"{at}.content[{number}]"
        if block["type"] == "tool_result":
            turns.append(_result(block, place))
        elif block["type"] == "text":
            _append(turns, {"role": role, "content": _string(block, "text", place)}, between="")
        else:
            _refuse(block, place, "messages")
    return turns


def _assistant(blocks: Sequence[Block], at: str) -> Json:
    found: Json = {"role": "assistant", "content": ""}
    for number, block in enumerate(blocks):
        place = f"{at}.content[{number}]"
        if block["type"] == "text":
            found["content"] += _string(block, "text", place)
        elif block["type"] == "thinking":
            found["reasoning_content"] = found.get("reasoning_content", "") + _string(block, "thinking", place)
        elif block["type"] == "tool_use":
            found.setdefault("tool_calls", []).append(_use(block, place))
        elif block["type"] != "redacted_thinking":  # nobody but its writer can read it
            _refuse(block, place, "messages")
    return found


def _use(block: Block, at: str) -> Json:
    arguments = block.get("input", {})
    if not isinstance(arguments, dict):
        raise ClientError(f"{at}.input must be an object, got {arguments!r:.60}", param="messages")
    function = {"name": _string(block, "name", at), "arguments": arguments}
    return {"id": _string(block, "id", at), "type": "function", "function": function}


def _result(block: Block, at: str) -> Json:
    text = text_of(block.get("content") or "", f"{at}.content")
    if block.get("is_error"):
        text = f"Error: {text}"
    return {"role": "tool", "tool_call_id": _string(block, "tool_use_id", at), "content": text}


def _append(out: list[Json], turn: Json, between: str = "\n\n") -> None:
    """Put `turn` behind the others, or into the last one when both are plain text of one role."""
    plain = {"role", "content"}
    if out and turn["role"] != "tool" and out[-1]["role"] == turn["role"] and out[-1].keys() == turn.keys() == plain:
        out[-1]["content"] += between + turn["content"]
    else:
        out.append(turn)


def _blocks(content: Any, at: str, param: str) -> list[Json]:
    if isinstance(content, str):
        return [{"type": "text", "text": content}]
    if not isinstance(content, list) or not all(
        isinstance(b, dict) and isinstance(b.get("type"), str) for b in content
    ):
        raise ClientError(f"{at} must be a text or a list of blocks that have a type, got {content!r:.60}", param=param)
    return content


def _string(block: Block, name: str, at: str) -> str:
    value = block.get(name)
    if not isinstance(value, str):
        raise ClientError(f"{at}.{name} must be a string, got {value!r:.60}", param="messages")
    return value


def _cached(blocks: Sequence[Block]) -> bool:
    return any(block.get("cache_control") for block in blocks)


def _refuse(block: Block, at: str, param: str) -> None:
    kind = str(block["type"])[:60]
    raise UnsupportedError(f"{at}: blocks of type {kind!r} aren't read here; this server reads text only", param=param)
