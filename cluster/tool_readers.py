"""Readers of the ways in which models write calls of tools, over `Scanner`'s operations."""

from __future__ import annotations

import re
from collections.abc import Callable, Container, Sequence

from kvasir.cluster.answer_parts import AnswerReader
from kvasir.cluster.text_scanner import Steps, Take
from kvasir.cluster.tool_values import Literals, dumps

_NAMES = ("name", "tool_name", "function_name")
_ARGUMENTS = ("arguments", "parameters", "args")
_OPEN = {"function": "{", "tool_call": "{"}
"""Keys whose object holds name and arguments."""
_FENCE = "```"

Read = Callable[[AnswerReader, str], Steps[bool]]


# -- objects of name and arguments


def objects(*ends: str, bare: bool = False) -> Read:
    """`{"name": ..., "arguments": ...}`, one, several or a list of them, up to one of `ends`; without `ends` as long as they
    follow each other. bare: nothing announces them, so only tools that were offered count; the mark is their beginning."""

    def read(answer: AnswerReader, mark: str) -> Steps[bool]:
        scanner = answer.scanner
        if bare:
            scanner.skip(-len(mark))
        found = False
        while True:
            yield from scanner.space()
            if ends and (yield from scanner.literal(*ends)):
                return True
            char = yield from scanner.peek()
            if char and char in "[],;" and not (char == "]" and not ends):
                scanner.skip()
            elif char != "{":
                if char == "]":
                    scanner.skip()
                return found
            elif not (yield from _object(answer, bare)):
                return found
            else:
                found = True

    return read


def _object(answer: AnswerReader, known: bool) -> Steps[bool]:
    """One call; back to its beginning when it isn't one."""
    scanner = answer.scanner
    place = scanner.keep()
    if (yield from _members(answer, known)):
        scanner.drop()
        answer.over()
        return True
    scanner.rewind(place)
    return False


def _members(answer: AnswerReader, known: bool) -> Steps[bool]:
    scanner, name, held, said, depth = answer.scanner, None, "", False, 0
    while True:
        yield from scanner.space()
        char = yield from scanner.peek()
        if char in ("{", "}", ","):
            scanner.skip()
            depth += (char == "{") - (char == "}")
            if depth == 0:
                break
            continue
        key = (yield from scanner.string()) if char == '"' else None
        yield from scanner.space()
        if key is None or not (yield from scanner.literal(":")):
            return said
        yield from scanner.space()
        char = yield from scanner.peek()
        if key in (*_NAMES, "function") and char == '"':
            name = yield from scanner.string()
            if known and name not in answer.schemas:
                return False
        elif _OPEN.get(key) == char:
            continue
        elif key not in _ARGUMENTS:
            yield from scanner.value(_nowhere)
        elif name is not None and not said:
            if not (yield from _arguments(answer, name)):
                return False
            said = True
        else:
            parts: list[str] = []
            yield from scanner.value(answer.beside if said else parts.append)
            held = "".join(parts)
    if not said and name is not None:
        answer.call(name)
        answer.arguments(held if held.startswith("{") else "{}")
    return said or name is not None


def _arguments(answer: AnswerReader, name: str) -> Steps[bool]:
    """A call's arguments, which come next: an object, JSON text of one in a string, or nothing. False: none of these."""
    scanner = answer.scanner
    char = yield from scanner.peek()
    if char == '"':
        text = yield from scanner.string()
        if text is None or not text.lstrip().startswith("{"):
            return False
        answer.call(name)
        answer.arguments(text)
        return True
    if char != "{":
        parts: list[str] = []
        yield from scanner.value(parts.append)
        if "".join(parts) != "null":
            return False
        answer.call(name)
        answer.arguments("{}")
        return True
    place = scanner.keep()
    scanner.skip()
    yield from scanner.space()
    first = yield from scanner.peek()
    scanner.rewind(place)
    if first not in ('"', "}", ""):
        scanner.keep()  # whoever reads the call may have to give all of it back
        return False
    answer.call(name)
    yield from scanner.value(answer.arguments)
    return True


def _nowhere(_: str) -> None:
    """Nobody wants it."""


def keyed(end: str) -> Read:
    """`[{"NAME": {...}}, ...] end`."""

    def read(answer: AnswerReader, mark: str) -> Steps[bool]:
        scanner, before = answer.scanner, answer.calls
        while True:
            yield from scanner.space()
            if (yield from scanner.literal(end)):
                return True
            char = yield from scanner.peek()
            if char and char in "[,]}":
                scanner.skip()
                continue
            name, place = None, scanner.keep()
            if char == "{":
                scanner.skip()
                yield from scanner.space()
                name = (yield from scanner.string()) if (yield from scanner.peek()) == '"' else None
                yield from scanner.space()
            if name is None or not (yield from scanner.literal(":")):
                return _given_back(answer, before, place)
            yield from scanner.space()
            if not (yield from _arguments(answer, name)):
                return _given_back(answer, before, place)

    return read


def enclosed(begin: str, end: str, call: str, calls: Read) -> Read:
    """Calls behind `call`. `begin` and `end` say nothing around the text of the whole answer; elsewhere they are text."""

    def read(answer: AnswerReader, mark: str) -> Steps[bool]:
        scanner = answer.scanner
        if mark == call:
            return (yield from calls(answer, mark))
        if answer.said:
            return False
        scanner.drop()
        while (found := (yield from scanner.until([end, call], answer.content))) == end:
            place = scanner.keep()
            yield from scanner.space()
            last = (yield from scanner.literal(call)) or not (yield from scanner.peek())
            scanner.rewind(place)
            if last:
                return True
            answer.content(end)
        if found:
            scanner.skip(-len(found))
        return True

    return read


# -- a name, then the arguments' JSON


def named(item: str, separator: str, end: str, *ends: str, before: str = "") -> Read:
    """`item NAME separator JSON end`, several of them, up to one of `ends`. A type in place of the name ("function") has the
    name behind the separator, and the JSON in a code fence: DeepSeek V3 and R1. before: what stands between the call's id and
    the name."""

    def read(answer: AnswerReader, mark: str) -> Steps[bool]:
        scanner, begun, calls, beside = answer.scanner, mark == item, answer.calls, ""
        while True:
            yield from scanner.space()
            if not begun:
                found = yield from scanner.literal(item, *ends)
                if found != item:
                    return answer.calls > calls
            begun = False
            place = scanner.keep()
            name, mark_ = (yield from scanner.collect([separator])) if answer.patient else ("", None)
            if mark_ is None:
                return _given_back(answer, calls, place, item)
            unfinished, _, name = name.rpartition(item)
            name = name.rpartition(before)[2] if before else name
            if name.strip() == "function" and (yield from scanner.peek()) != "{":  # else a tool is called so
                name, _ = yield from scanner.collect(["\n"])
            yield from scanner.space()
            yield from scanner.literal(_FENCE + "json", _FENCE)
            yield from scanner.space()
            called = yield from _arguments(answer, _bare_name(name.strip(), answer.schemas))
            if not called:
                scanner.rewind(place)
                scanner.keep()
                beside += item
            text, mark_ = yield from scanner.collect([end, item, *ends])
            if called:
                beside += unfinished + text.strip().removesuffix(_FENCE)
            else:
                beside += text + (end if mark_ == end else "")
            if answer.calls > calls:
                answer.remark(beside)
                beside = ""
            elif not ends:
                return False
            if mark_ not in (end, None):
                scanner.skip(-len(mark_))

    return read


def _given_back(answer: AnswerReader, calls: int, place: int, item: str = "") -> bool:
    """A call that is none is text; whether there were others before it."""
    if answer.calls > calls:
        answer.scanner.rewind(place)
        answer.content(item)
    return answer.calls > calls


def _bare_name(name: str, tools: Container[str]) -> str:
    """Without what Kimi puts around it: functions.NAME:0. A tool may be called so itself."""
    bare = re.sub(r"^functions\.|:\d+$", "", name)
    return name if name in tools and bare not in tools else bare


def mistral(answer: AnswerReader, mark: str) -> Steps[bool]:
    """`[TOOL_CALLS] [{...}]`, or since 2025 `[TOOL_CALLS]NAME[ARGS]{...}`, with a [CALL_ID] or not."""
    scanner = answer.scanner
    yield from scanner.space()
    if (yield from scanner.peek()) in ("[", "{"):
        return (yield from objects()(answer, mark))
    name, found = yield from scanner.collect(["[ARGS]", "[CALL_ID]", "{"])
    if found == "[CALL_ID]":
        yield from scanner.until(["[ARGS]"])
    elif found == "{":
        scanner.skip(-1)
    elif found is None:
        return False
    yield from scanner.space()
    return (yield from _arguments(answer, name.strip()))


def function(answer: AnswerReader, mark: str) -> Steps[bool]:
    """`<function=NAME>{...}</function>`: Llama 3.1's own alternative, Functionary's."""
    name, found = yield from answer.scanner.collect([">"])
    if found is None:
        return False
    yield from answer.scanner.space()
    if not (yield from _arguments(answer, name)):
        return False
    text, mark_ = yield from answer.scanner.collect(["</function>", "<function="])
    answer.remark(text)
    if mark_ == "<function=":
        answer.scanner.skip(-len(mark_))
    return True


# -- calls as a programming language has them


def pythonic(*ends: str) -> Read:
    """`[f(a=1), g(b="x")]` up to one of `ends`; without them the whole answer from "[" on, of tools that were offered."""

    def read(answer: AnswerReader, mark: str) -> Steps[bool]:
        scanner, parts = answer.scanner, list[str]()
        if not ends:
            scanner.skip(-1)
            yield from scanner.value(parts.append)
        elif not (yield from _listed(answer, ends, parts.append)):
            parts.clear()
            yield from scanner.until(ends, parts.append)
        try:
            calls = Literals("".join(parts)).calls()
        except ValueError:
            return False
        if not calls or (not ends and not all(name in answer.schemas for name, _ in calls)):
            return False
        for name, arguments in calls:
            answer.call(name)
            answer.arguments(dumps(arguments))
        return True

    return read


def _listed(answer: AnswerReader, ends: Sequence[str], take: Take) -> Steps[bool]:
    """A list in brackets, up to one of `ends`, which its texts may hold; back to its beginning when it isn't that."""
    scanner = answer.scanner
    place = scanner.keep()
    yield from scanner.space()
    if (yield from scanner.peek()) == "[" and (yield from scanner.value(take)):
        yield from scanner.space()
        if (yield from scanner.literal(*ends)):
            return True
    scanner.rewind(place)
    scanner.keep()
    return False


def gemma(end: str, quote: str) -> Read:
    """`call:NAME{key:value}`, strings between `quote`s of their own."""

    def read(answer: AnswerReader, mark: str) -> Steps[bool]:
        if mark == end:  # one too many
            return True
        text, found = yield from answer.scanner.collect([end])
        head, brace, rest = text.strip().partition("{")
        try:
            arguments = Literals(brace + rest, (quote, "'")).mapping() if brace or found is None else {}
        except ValueError:
            return False
        name = head.partition(":")[2].strip() if head.startswith("call:") else ""
        if not name:
            return False
        answer.call(name)
        answer.arguments(dumps(arguments))
        return True

    return read


# -- none outside of channels


def never(_: AnswerReader, __: str) -> Steps[bool]:
    yield from ()
    return False
