"""Readers of calls whose arguments are written in an `ArgumentStyle`: what its grammar lets through is read as it was meant."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Sequence
from typing import Any

from kvasir.cluster.answer_parts import AnswerReader
from kvasir.cluster.tagged_readers import argument, said, unwrapped
from kvasir.cluster.text_scanner import Steps
from kvasir.cluster.tool_readers import Read
from kvasir.cluster.tool_values import dumps, unescaped, valued
from kvasir.engine.argument_style import ArgumentStyle
from kvasir.engine.raw_values import typed

CDATA, CDATA_END = "<![CDATA[", "]]>"
_ANY_BUT_TEXT = {"type": ["object", "array", "number", "boolean", "null"]}


def styled(call: tuple[str, str, str], style: ArgumentStyle, last: str | None, noise: str = "") -> Read:
    """call: what stands before a function's name, behind it, and at the call's end. last: at the end of all, if another. noise:
    a pattern of what may stand between all these and says nothing."""

    def read(answer: AnswerReader, mark: str) -> Steps[bool]:
        scanner, begun, before = answer.scanner, mark == call[0], answer.calls
        while True:
            text = ""
            if not begun:
                text, found = yield from scanner.collect([call[0], *([last] if last else [])])
                if found != call[0]:
                    return said(answer, before, text, noise)
            begun = False
            name, found = yield from scanner.collect([call[1]] if call[1] else [style.key[0], call[2]])
            if found is None:
                return said(answer, before, f"{text}{call[0]}{name}", noise)
            answer.remark(re.sub(noise, "", text))
            answer.call(name := _known(name.strip(), answer.schemas))
            inside = found if not call[1] else (yield from _inside(answer, [style.key[0], call[2]], noise))
            yield from _arguments(answer, name, inside, call[2], style)
            answer.over()
            if last is None:
                return True

    return read


def _inside(answer: AnswerReader, marks: Sequence[str], noise: str) -> Steps[str | None]:
    """Over the first of `marks`, behind a function's name."""
    text, mark = yield from answer.scanner.collect(marks)
    answer.beside(re.sub(noise, "", text))
    return mark


def _arguments(answer: AnswerReader, name: str, mark: str | None, end: str, style: ArgumentStyle) -> Steps[None]:
    """`mark`: what was found behind the function's name, the first argument's beginning or the call's end."""
    scanner, schemas, written = answer.scanner, answer.properties(name), "{"
    while mark == style.key[0]:
        key, behind = yield from _key(answer, style)
        schema = schemas.get(key := _known(key, schemas))
        if style.key_json is not None:
            schema = {"type": "string"} if behind == style.key[1] else _ANY_BUT_TEXT
        if style.texts == "json":
            value, mark = yield from _json(answer, style.end, end)
        elif CDATA in style.marks and (yield from _begins(answer, CDATA)):
            value, _ = yield from scanner.collect([CDATA_END])
            mark = yield from scanner.until([style.end, end], answer.beside)
        else:
            text, mark, whole = yield from argument(answer, schema, style.end, end)
            value = typed(text, None) if whole else _plain(text, schema, style)
        answer.arguments(f"{written}{dumps(key)}: {dumps(value)}")
        written = ", "
        if mark == style.end:
            mark = yield from scanner.until([style.key[0], end], answer.beside)
    answer.arguments("{}" if written == "{" else "}")


def _known(name: str, names: Collection[str]) -> str:
    """Without XML's entities, unless it is known with them."""
    return name if name in names or "&" not in name else unescaped(name)


def _begins(answer: AnswerReader, mark: str) -> Steps[bool]:
    """It comes next, perhaps behind white space."""
    scanner = answer.scanner
    place = scanner.keep()
    yield from scanner.space()
    found = yield from scanner.literal(mark)
    scanner.drop() if found else scanner.rewind(place)
    return bool(found)


def _key(answer: AnswerReader, style: ArgumentStyle) -> Steps[tuple[str, str | None]]:
    """(an argument's name, what stands behind it). Line breaks in there may be missing."""
    scanner, (first, *rest) = answer.scanner, style.key[1].split("\n")
    if style.key_json is not None and "KIND" in style.key_json:
        before, _, end = style.key_json.partition("KIND")
        key, _ = yield from scanner.collect([before])
        kind, _ = yield from scanner.collect([end])
        return key.strip(), f"{before}{kind}{end}"
    if style.key_json is not None:
        key, behind = yield from scanner.collect([style.key[1], style.key_json])
        return key.strip(), behind
    key, behind = yield from scanner.collect([first])
    for part in rest:
        yield from scanner.space()
        yield from scanner.literal(part)
    return key.strip(), behind


def _json(answer: AnswerReader, *marks: str) -> Steps[tuple[Any, str | None]]:
    """(a value of JSON, the mark behind it); where it is none, its text."""
    scanner, parts = answer.scanner, list[str]()
    place = scanner.keep()
    yield from scanner.space()
    begins = answer.patient and (yield from scanner.peek()) in ("{", "[", '"')
    if begins and (yield from scanner.value(parts.append)):
        yield from scanner.space()
        if (mark := (yield from scanner.literal(*marks))) and (value := _parsed("".join(parts))) is not None:
            scanner.drop()
            return value, mark
    scanner.rewind(place)
    text, found = yield from scanner.collect(marks)
    value = _parsed(text)
    return (typed(text, None) if value is None else value), found


def _parsed(text: str) -> Any:
    """None: it isn't JSON, or is null."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _plain(text: str, schema: Any, style: ArgumentStyle) -> Any:
    text = unescaped(text) if style.escapes else text
    return valued(unwrapped(text) if style.edge else text, schema)
