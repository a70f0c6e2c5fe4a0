"""Readers of calls that have a tag for each argument, over `Scanner`'s operations."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

from kvasir.cluster.answer_parts import AnswerReader
from kvasir.cluster.text_scanner import Steps
from kvasir.cluster.tool_readers import Read
from kvasir.cluster.tool_values import dumps, valued
from kvasir.engine.raw_values import kinds_of, typed


def tagged(
    call: tuple[str, str, str],
    parameter: tuple[str, str, str],
    *ends: str,
    decode: Callable[[str], str] = str,
    noise: str = "",
) -> Read:
    """call, parameter: what stands before the name, behind it, and at the end. Values are typed by the tool's schema. noise: a
    pattern of what may stand between calls and says nothing."""

    def read(answer: AnswerReader, mark: str) -> Steps[bool]:
        scanner, begun, before = answer.scanner, mark == call[0], answer.calls
        while True:
            text = ""
            if not begun:
                text, found = yield from scanner.collect([call[0], *ends])
                if found != call[0]:
                    return said(answer, before, text, noise)
            begun = False
            name, found = yield from scanner.collect([call[1]])
            if found is None:
                return said(answer, before, f"{text}{call[0]}{name}", noise)
            answer.remark(re.sub(noise, "", text))
            yield from _parameters(answer, name.strip(), call[2], parameter, decode)
            answer.over()
            if not ends:
                return True

    return read


def said(answer: AnswerReader, before: int, text: str, noise: str = "") -> bool:
    """Whether there were calls: `text` stands behind the last, then."""
    if answer.calls > before:
        answer.remark(re.sub(noise, "", text))
    return answer.calls > before


def _parameters(
    answer: AnswerReader, name: str, end: str, form: tuple[str, str, str], decode: Callable[[str], str]
) -> Steps[None]:
    scanner, schemas, written = answer.scanner, answer.properties(name), "{"
    answer.call(name)
    while (yield from scanner.until([form[0], end], answer.beside)) == form[0]:
        head, closed = yield from scanner.collect([form[1]])
        key, _, rest = head.partition('"') if form[0].endswith('"') else (head, "", "")
        if closed is None:
            answer.beside(rest)
        schema = {"type": "string"} if 'string="true"' in rest else schemas.get(key.strip())
        text, mark, whole = yield from argument(answer, schema, form[2], end)
        value = typed(text, _untold(rest)) if whole else valued(unwrapped(decode(text)), _untold(rest, schema))
        answer.arguments(f"{written}{dumps(key.strip())}: {dumps(value)}")
        written = ", "
        if mark != form[2]:
            break
    answer.arguments("{}" if written == "{" else "}")


def _untold(rest: str, schema: Any = None) -> Any:
    """The schema that a value's text is read by; one that says itself that it is no text needs none."""
    return None if 'string="false"' in rest else schema


def argument(answer: AnswerReader, schema: Any, *marks: str) -> Steps[tuple[str, str | None, bool]]:
    """(a value's text, the mark behind it, whether it is a JSON value): such a value may hold the marks."""
    scanner, kinds = answer.scanner, kinds_of(schema)
    if kinds and ("string" not in kinds or kinds & {"object", "array"}) and answer.patient:
        place, parts = scanner.keep(), list[str]()
        yield from scanner.space()
        if (yield from scanner.peek()) in ("{", "[", '"') and (yield from scanner.value(parts.append)):
            yield from scanner.space()
            mark = yield from scanner.literal(*marks)
            if mark and _is_json(text := "".join(parts)):
                scanner.drop()
                return text, mark, True
        scanner.rewind(place)
    text, found = yield from scanner.collect(marks)
    return text, found, False


def _is_json(text: str) -> bool:
    """An object or a list: a text in quotes may mean the quotes."""
    try:
        return isinstance(json.loads(text), (dict, list))
    except (ValueError, RecursionError):
        return False


def unwrapped(text: str) -> str:
    """Without the line breaks around it that belong to the tags."""
    text = text[1:] if text.startswith("\n") else text
    return text[:-1] if text.endswith("\n") else text


def glm(answer: AnswerReader, mark: str) -> Steps[bool]:
    """`<tool_call>NAME <arg_key>K</arg_key><arg_value>V</arg_value> </tool_call>`."""
    scanner, written = answer.scanner, "{"
    name, found = yield from scanner.collect(["<arg_key>", "</tool_call>"])
    if found is None or not name.strip():
        return False
    name = name.strip()
    schemas = answer.properties(name)
    answer.call(name)
    while found == "<arg_key>":
        key, _ = yield from scanner.collect(["</arg_key>"])
        yield from scanner.space()
        opened = yield from scanner.literal("<arg_value>")
        schema = schemas.get(key.strip())
        value, found, _ = yield from argument(
            answer, schema, "</arg_value>", "<arg_key>", "</tool_call>"
        )  # if not closed
        text = value if opened else value.strip()
        answer.arguments(f"{written}{dumps(key.strip())}: {dumps(valued(text, schema))}")
        written = ", "
        if found == "</arg_value>":
            found = yield from scanner.until(["<arg_key>", "</tool_call>"], answer.beside)
    answer.arguments("{}" if written == "{" else "}")
    answer.over()
    return True
