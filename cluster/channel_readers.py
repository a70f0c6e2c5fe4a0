"""Readers of answers in channels: each part, whether thoughts, text or calls, stands between marks of its own."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from kvasir.cluster.answer_parts import AnswerReader
from kvasir.cluster.text_scanner import Steps
from kvasir.cluster.tool_readers import Read

Whole = Callable[[AnswerReader], Steps[None]]
_TO = re.compile(r"to=([^\s<]+)")


@dataclass(frozen=True, slots=True)
class Channel:
    """What stands in one."""

    kind: Literal["reasoning", "content"]
    ends: tuple[str, ...]
    calls: Read | None = None
    """Reads the calls in it; what isn't one is of `kind`."""


def channels(opened: Mapping[str, Channel], *, heads: Sequence[str] = (), skipped: Sequence[str] = ()) -> Whole:
    """opened: by the mark that opens each. heads: marks behind which what precedes the next channel is no text. skipped: marks
    that say nothing."""

    def read(answer: AnswerReader) -> Steps[None]:
        scanner, marks = answer.scanner, [*opened, *heads, *skipped]
        while (mark := (yield from scanner.until(marks, answer.content))) is not None:
            if mark in heads and (mark := (yield from scanner.until(marks))) is None:
                return
            if (channel := opened.get(mark)) is not None:
                yield from _channel(answer, mark, channel)
                answer.gap()

    return read


def _channel(answer: AnswerReader, mark: str, channel: Channel) -> Steps[None]:
    scanner, take = answer.scanner, answer.reasoning if channel.kind == "reasoning" else answer.content
    if channel.calls is not None:
        place, calls = scanner.keep(), answer.calls
        if (yield from channel.calls(answer, mark)) or answer.calls > calls:
            scanner.drop()
            return
        scanner.rewind(place)
    yield from scanner.until([*channel.ends], take)


def addressed(calls: Read, ends: Sequence[str]) -> Whole:
    """Muse Glimmer: ` to=self<|message|>` thoughts, ` to=user<|message|>` text, ` to=NAME<|message|>` a call."""

    def read(answer: AnswerReader) -> Steps[None]:
        scanner = answer.scanner
        while True:
            head, mark = yield from scanner.collect(["<|message|>"])
            if mark is None:
                answer.content("" if _TO.search(head) or "<|start|>" in head else head)
                return
            to = _TO.search(head)
            kind: Literal["reasoning", "content"] = "reasoning" if to and to[1] == "self" else "content"
            called = calls if to and to[1] not in ("self", "user") else None
            before = answer.calls
            yield from _channel(answer, "", Channel(kind, (*ends,), called))
            if answer.calls > before:
                yield from scanner.until([*ends])
            answer.gap()

    return read


def recipients(answer: AnswerReader) -> Steps[None]:
    """Functionary v3.2: `all` and a line break before text, a function's name before the JSON of a call; `>>>` between them."""
    scanner = answer.scanner
    mark = yield from scanner.literal(">>>")  # or the prompt ends with it
    while True:
        place = scanner.keep()
        name, found = yield from scanner.collect(["\n"])
        first = (yield from scanner.peek()) if found else ""
        if first == "{" and name and (not answer.schemas or name in answer.schemas):
            answer.call(name)
            yield from scanner.value(answer.arguments)
            yield from scanner.space()
        elif found and name == "all":
            scanner.drop()
        else:
            scanner.rewind(place)
            answer.content(mark)
        mark = (yield from scanner.until([">>>"], answer.content)) or ""
        if not mark:
            return
