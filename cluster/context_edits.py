"""Anthropic's context_management: what of a long conversation the model doesn't read again, by the client's rules."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kvasir.cluster.call import Conversation
from kvasir.cluster.served_model import ServedModel
from kvasir.engine.errors import ClientError, UnsupportedError

Json = dict[str, Any]
Messages = Sequence[Mapping[str, Any]]

FIELD = "context_management"
THOUGHTS, TOOL_USES = "clear_thinking_20251015", "clear_tool_uses_20250919"
CLEARED = "[This result was cleared to make room.]"
"""In place of a tool's result."""
_ALL = 2**31 - 1
KNOWN = {
    THOUGHTS: ("type", "keep"),
    TOOL_USES: ("type", "keep", "trigger", "clear_at_least", "clear_tool_inputs", "exclude_tools"),
}
"""Kind of edit -> its fields."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Edit:
    """One rule."""

    kind: str
    keep: int
    """So many of the last turns with thoughts, or uses of tools."""
    trigger: tuple[str, int] = ("input_tokens", 0)
    """Applied where there are more of these."""
    at_least: int = 1
    """And so many tokens become free."""
    inputs: frozenset[str] | None = frozenset()
    """Tools with which goes what they were called with, too; None: all."""
    excluded: frozenset[str] = frozenset()
    """Tools whose uses stay."""


def edits_of(given: Any) -> tuple[Edit, ...]:
    """ClientError or UnsupportedError names what is wrong."""
    edits = given.get("edits", []) if isinstance(given, Mapping) and not {*given} - {"edits"} else None
    if not isinstance(edits, list):
        raise ClientError(f"{FIELD} must be an object with a list of edits, got {given!r:.80}", param=FIELD)
    return tuple(_edit(one, f"{FIELD}.edits[{number}]") for number, one in enumerate(edits))


async def edited(
    model: ServedModel, conversation: Conversation, edits: Sequence[Edit]
) -> tuple[Conversation, list[Json]]:
    """(what the model reads, which edits were applied)."""
    applied: list[Json] = []
    for edit in edits:
        clear, counted = (
            (_without_thoughts, "cleared_thinking_turns")
            if edit.kind == THOUGHTS
            else (_without_results, "cleared_tool_uses")
        )
        messages, count = clear(conversation.messages, edit)
        if not count:
            continue
        before, shorter = len(await model.encode(conversation)), dataclasses.replace(conversation, messages=messages)
        what, most = edit.trigger
        if (before if what == "input_tokens" else len(_results(conversation.messages))) <= most:
            continue
        freed = before - len(await model.encode(shorter))
        if freed >= edit.at_least:
            conversation = shorter
            applied.append({"type": edit.kind, counted: count, "cleared_input_tokens": freed})
    return conversation, applied


def _without_thoughts(messages: Messages, edit: Edit) -> tuple[Messages, int]:
    """(messages, how many turns lost their thoughts)."""
    turns = [number for number, message in enumerate(messages) if message.get("reasoning_content")]
    gone = {*turns[: max(0, len(turns) - edit.keep)]}
    left = [
        {name: value for name, value in message.items() if number not in gone or name != "reasoning_content"}
        for number, message in enumerate(messages)
    ]
    return left, len(gone)


def _without_results(messages: Messages, edit: Edit) -> tuple[Messages, int]:
    """(messages, how many uses of tools were cleared)."""
    results = _results(messages)
    old = [one for one in results[: max(0, len(results) - edit.keep)] if one[1] not in edit.excluded]
    places, calls = {place for place, _, _ in old}, {call for _, _, call in old}

    def shorter(number: int, message: Mapping[str, Any]) -> Mapping[str, Any]:
        if number in places:
            return {**message, "content": CLEARED}
        if message.get("tool_calls"):
            return {**message, "tool_calls": [emptied(call) for call in message["tool_calls"]]}
        return message

    def emptied(call: Mapping[str, Any]) -> Mapping[str, Any]:
        name = call["function"]["name"]
        goes = call["id"] in calls and (edit.inputs is None or name in edit.inputs)
        return {**call, "function": {"name": name, "arguments": {}}} if goes else call

    return [shorter(number, message) for number, message in enumerate(messages)], len(places)


def _results(messages: Messages) -> list[tuple[int, str, str]]:
    """(number of its message, tool, id of its call) of each result of a tool."""
    names = {call["id"]: call["function"]["name"] for one in messages for call in one.get("tool_calls", ())}
    return [
        (number, names.get(one["tool_call_id"], ""), one["tool_call_id"])
        for number, one in enumerate(messages)
        if one["role"] == "tool"
    ]


def _edit(given: Any, at: str) -> Edit:
    kind = given.get("type") if isinstance(given, Mapping) else None
    if not isinstance(kind, str):
        raise ClientError(f"{at} must be an object with a type, got {given!r:.80}", param=FIELD)
    if kind not in KNOWN:
        raise UnsupportedError(f"{at}: {kind!r:.60} isn't supported; known: {', '.join(KNOWN)}", param=FIELD)
    if other := [name for name in given if name not in KNOWN[kind]]:
        raise UnsupportedError(f"{at}.{other[0]:.60} isn't supported", param=FIELD)
    if kind == THOUGHTS:
        if (keep := given.get("keep")) in ("all", {"type": "all"}):
            return Edit(kind=kind, keep=_ALL)
        return Edit(kind=kind, keep=_count(keep, ("thinking_turns",), 1, f"{at}.keep", least=1)[1])
    inputs = given.get("clear_tool_inputs") or []
    return Edit(
        kind=kind,
        keep=_count(given.get("keep"), ("tool_uses",), 3, f"{at}.keep")[1],
        trigger=_count(given.get("trigger"), ("input_tokens", "tool_uses"), 100_000, f"{at}.trigger"),
        at_least=max(1, _count(given.get("clear_at_least"), ("input_tokens",), 0, f"{at}.clear_at_least")[1]),
        inputs=None if inputs is True else _names(inputs, f"{at}.clear_tool_inputs"),
        excluded=_names(given.get("exclude_tools") or [], f"{at}.exclude_tools"),
    )


def _count(given: Any, kinds: Sequence[str], default: int, at: str, *, least: int = 0) -> tuple[str, int]:
    """{"type": one of `kinds`, "value": number}."""
    if given is None:
        return kinds[0], default
    kind, value = (given.get("type"), given.get("value")) if isinstance(given, Mapping) else (None, None)
    if not isinstance(kind, str) or kind not in kinds or type(value) is not int or value < least:
        text = f"{at} must have a type, {' or '.join(kinds)}, and a value of at least {least}"
        raise ClientError(f"{text}; got {given!r:.80}", param=FIELD)
    return kind, value


def _names(given: Any, at: str) -> frozenset[str]:
    if not isinstance(given, list) or not all(isinstance(name, str) for name in given):
        raise ClientError(f"{at} must be a list of names of tools, got {given!r:.80}", param=FIELD)
    return frozenset(given)
