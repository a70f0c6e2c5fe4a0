"""Reader of calls whose arguments are tags in tags: what stands in an argument is read by its schema's types."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kvasir.cluster.answer_parts import AnswerReader
from kvasir.cluster.tagged_readers import said
from kvasir.cluster.text_scanner import Steps
from kvasir.cluster.tool_readers import Read
from kvasir.cluster.tool_values import dumps, valued
from kvasir.engine.raw_values import kinds_of, opened, resolved

MAX_DEPTH = 32
"""Of tags in tags; deeper ones are text."""
ITEM = "item"
"""The name of a list's items."""


def nested(mark: str) -> Read:
    """`<tool_call> <invoke name="NAME"> <KEY>text</KEY> <KEY><item>...</item></KEY> </invoke> </tool_call>`, each tag behind
    `mark`."""
    opening, closing = f"{mark}<", f"{mark}</"
    call, last = f'{opening}invoke name="', f"{closing}tool_call>"

    def read(answer: AnswerReader, _: str) -> Steps[bool]:
        scanner, before = answer.scanner, answer.calls
        while True:
            text, found = yield from scanner.collect([call, last])
            if found != call:
                return said(answer, before, text)
            name, found = yield from scanner.collect(['">'])
            if found is None:
                return said(answer, before, f"{text}{call}{name}")
            answer.remark(text)
            yield from arguments(answer, name.strip())
            answer.over()

    def arguments(answer: AnswerReader, name: str) -> Steps[None]:
        scanner, root, written = answer.scanner, answer.schemas.get(name), "{"
        answer.call(name)
        while (yield from scanner.until([opening, closing], answer.beside)) == opening:
            key, found = yield from scanner.collect([">"])
            if found is None:
                answer.beside(f"{opening}{key}")
                break
            given, _ = yield from value(answer, _member(resolved(root, root), key, root), root, 1)
            answer.arguments(f"{written}{dumps(key)}: {dumps(given)}")
            written = ", "
        answer.arguments("{}" if written == "{" else "}")
        yield from scanner.until([">"])

    def value(answer: AnswerReader, schema: Any, root: Any, depth: int) -> Steps[tuple[Any, str]]:
        """Up to its closing tag, and over it; and as it is written, with that tag. Text beside tags makes a text of it all."""
        scanner = answer.scanner
        text, found = yield from scanner.collect([closing, opening] if depth < MAX_DEPTH else [closing])
        inner: list[tuple[str, Any]] = []
        written, beside = text, text
        while found == opening:
            key, end = yield from scanner.collect([">"])
            given, raw = yield from value(answer, _member(schema, key, root), root, depth + 1)
            inner.append((key, given))
            text, found = yield from scanner.collect([closing, opening])
            written += f"{opening}{key}{end or ''}{raw}{text}"
            beside += text
        name, end = yield from scanner.collect([">"])
        if not inner:
            given = _scalar(written, schema)
        else:
            given = written if beside.strip() else _whole(inner, schema)
        return given, f"{written}{found or ''}{name}{end or ''}"

    return read


def _member(schema: Any, key: str, root: Any) -> Any:
    """The schema of a member or an item, as far as it is said; of branches the one that has some."""
    if not isinstance(schema, Mapping):
        return None
    branches = [one for name in ("anyOf", "oneOf") if isinstance(schema.get(name), list) for one in schema[name]]
    for one in (one for one in [schema, *branches] if isinstance(one, Mapping)):
        properties, more = one.get("properties"), one.get("additionalProperties")
        if isinstance(properties, Mapping) and key in properties:
            return opened(properties[key], root)
        if key == ITEM and "array" in kinds_of(one):
            return opened(one.get("items"), root)
        if isinstance(more, Mapping):
            return opened(more, root)
    return None


def _whole(inner: list[tuple[str, Any]], schema: Any) -> Any:
    kinds = kinds_of(schema)
    listed = all(key == ITEM for key, _ in inner)
    if listed and ("array" in kinds or "object" not in kinds):
        return [value for _, value in inner]
    return dict(inner)


def _scalar(text: str, schema: Any) -> Any:
    kinds = kinds_of(schema)
    if not text.strip() and "string" not in kinds and kinds & {"array", "object"}:
        return [] if "array" in kinds else {}
    return valued(text, schema)
