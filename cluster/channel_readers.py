"""Readers of answers in channels: each part, whether thoughts, text or calls, stands between marks of its own."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

from kvasir.cluster.answer_parts import AnswerReader
from kvasir.cluster.text_scanner import Steps
from kvasir.cluster.tool_readers import Read, objects

Whole = Callable[[AnswerReader], Steps[None]]
Kind = Literal["reasoning", "content"]
_NONE: Mapping[str, str] = MappingProxyType({})
_START = "<|start|>"
_CHANNEL = "<|channel|>"
_ENDS = ("<|end|>", "<|call|>", "<|return|>", _START)
_HEAD = re.compile(
    r"(?:to=([^\s<]+)\s*)?(?:<\|channel\|>\s*(analysis|commentary|final))?(?:\s*to=([^\s<]+))?"
    r"(?:\s*<\|constrain\|>\s*\w+|\s+(?:json|code))?\s*"
)
_BREAKS = tuple(" \t\r\n<")
"""What no recipient's name holds."""


@dataclass(frozen=True, slots=True)
class Channel:
    """What stands in one."""

    kind: Kind
    ends: tuple[str, ...]
    calls: Read | None = None
    """Reads the calls in it; what isn't one is of `kind`."""
    head: str = ""
    """What stood before it and is text, too, when it holds no call after all."""


def channels(opened: Mapping[str, Channel], *, heads: Mapping[str, str] = _NONE, skipped: Sequence[str] = ()) -> Whole:
    """opened: by the mark that opens each. heads: marks that open messages -> the role behind them, which is no text. skipped:
    marks that say nothing."""

    def read(answer: AnswerReader) -> Steps[None]:
        scanner, marks = answer.scanner, [*opened, *heads, *skipped]
        while (mark := (yield from scanner.until(marks, answer.content))) is not None:
            if role := heads.get(mark):
                yield from _over(answer, role)
            if (channel := opened.get(mark)) is not None:
                yield from _channel(answer, channel)
                answer.gap()

    return read


def _over(answer: AnswerReader, role: str) -> Steps[None]:
    """A word, unless it goes on."""
    scanner = answer.scanner
    if (yield from scanner.literal(role)) and (yield from scanner.peek()).isalnum():
        answer.content(role)


def _channel(answer: AnswerReader, channel: Channel) -> Steps[str | None]:
    """What ended it: one of its `ends`, its calls (""), or the text's end."""
    scanner, take = answer.scanner, answer.reasoning if channel.kind == "reasoning" else answer.content
    if channel.calls is not None and answer.may_call and answer.patient:
        place, calls = scanner.keep(), answer.calls
        if (yield from channel.calls(answer, "")) or answer.calls > calls:
            scanner.drop()
            return ""
        scanner.rewind(place)
    take(channel.head)
    return (yield from scanner.until([*channel.ends], take))


def addressed(calls: Read, *ends: str) -> Whole:
    """Muse Glimmer: ` to=self<|message|>` thoughts, ` to=user<|message|>` text, ` to=NAME<|message|>` a call, up to one of
    `ends`; `<|start|>assistant` before each but the first. What has no such head is text."""

    def read(answer: AnswerReader) -> Steps[None]:
        scanner = answer.scanner
        end: str | None = ""
        while end is not None:
            if (to := (yield from _recipient(answer))) is None:
                answer.content((yield from scanner.literal(_START)))
                end = yield from scanner.until([*ends, _START], answer.content)
            else:
                plain = to in ("self", "user")
                calling, head = (None, "") if plain and to not in answer.schemas else (calls, f" to={to}<|message|>")
                kind: Kind = "reasoning" if to == "self" else "content"
                end = yield from _channel(answer, Channel(kind, (*ends, _START), calling, head))
                if end == "":
                    end = yield from scanner.until([*ends, _START], answer.content)
                answer.gap()
            if end == _START:
                scanner.skip(-len(_START))

    return read


def _recipient(answer: AnswerReader) -> Steps[str | None]:
    """Whom a message's head names, over that head; None, and nothing is read: there is none."""
    scanner = answer.scanner
    place = scanner.keep()
    yield from scanner.literal(f"{_START}assistant")
    if (yield from scanner.literal(" to=")):
        name, mark = yield from scanner.collect(["<|message|>", *_BREAKS])
        if name and mark == "<|message|>":
            scanner.drop()
            return name
    scanner.rewind(place)
    return None


def recipients(answer: AnswerReader) -> Steps[None]:
    """Functionary v3.2: `all` and a line break before text, a tool's name before the JSON of a call; `>>>` between them. Where
    there are no tools, all that follows is text."""
    scanner = answer.scanner
    mark = yield from scanner.literal(">>>")  # or the prompt ends with it
    while True:
        place = scanner.keep()
        name, found = yield from scanner.collect(["\n"])
        first = (yield from scanner.peek()) if found else ""
        if first == "{" and name in answer.schemas:
            answer.call(name)
            yield from scanner.value(answer.arguments)
            yield from scanner.space()
        elif found and name == "all":
            scanner.drop()
        else:
            scanner.rewind(place)
            answer.content(mark)
        marks = [">>>"] if answer.schemas and answer.patient else []
        mark = (yield from scanner.until(marks, answer.content)) or ""
        if not mark:
            return


def harmony(answer: AnswerReader) -> Steps[None]:
    """gpt-oss: messages in channels; `to=functions.NAME` is a call, where there are tools. What has no head of a message is text.
    https://github.com/openai/harmony"""
    scanner = answer.scanner
    end: str | None = ""
    while end is not None:
        if (head := (yield from _head(answer))) is None:
            answer.content((yield from scanner.literal(_START, _CHANNEL)))
            end = yield from scanner.until([*_ENDS, _CHANNEL], answer.content)
        else:
            take = answer.reasoning if head[2] == "analysis" else answer.content
            if recipient := head[1] or head[3]:
                answer.call(recipient.removeprefix("functions."))
                take = answer.arguments
                if (yield from scanner.peek()) == "{":  # its texts may hold marks
                    yield from scanner.value(take)
            end = yield from scanner.until(_ENDS, take)
        if end in (_START, _CHANNEL):
            scanner.skip(-len(end))


def _head(answer: AnswerReader) -> Steps[re.Match[str] | None]:
    """A message's head, over it; None, and nothing is read: there is none."""
    scanner = answer.scanner
    place = scanner.keep()
    yield from scanner.literal(f"{_START}assistant")
    yield from scanner.space()
    if found := (yield from scanner.literal(_CHANNEL, "to=")):
        others = [_CHANNEL] if found == _CHANNEL else []
        text, mark = yield from scanner.collect(["<|message|>", "\n", *others, *_ENDS])
        head = _HEAD.fullmatch(found + text) if mark == "<|message|>" else None
        if head and (answer.may_call or not (head[1] or head[3])):
            scanner.drop()
            return head
    scanner.rewind(place)
    return None


def cohere(answer: AnswerReader) -> Steps[None]:
    """Command R7B and later: thoughts, actions and the response, each between marks of its own."""
    scanner = answer.scanner
    begins = ("<|START_THINKING|>", "<|START_ACTION|>", "<|START_RESPONSE|>", "<|START_TEXT|>")
    while (mark := (yield from scanner.until(begins, answer.content))) is not None:
        kind = mark.removeprefix("<|START_")
        if kind == "ACTION|>":
            if not answer.may_call or not (yield from objects("<|END_ACTION|>")(answer, mark)):
                yield from scanner.until(["<|END_ACTION|>"], answer.content)
        else:
            take = answer.reasoning if kind == "THINKING|>" else answer.content
            yield from scanner.until([f"<|END_{kind}"], take)
            answer.gap()
