"""Formats with a tag for each argument, derived from what a chat template shows of calls: `<parameter=NAME>value</parameter>`,
`<arg_key>NAME</arg_key><arg_value>value</arg_value>`, and whatever else is built like these."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from kvasir.cluster.answer_parts import AnswerReader, ToolFormat
from kvasir.cluster.styled_readers import CDATA, CDATA_END, styled
from kvasir.engine.argument_style import ArgumentStyle

NAMES = ("probe_function", "probe_other")
_KEYS, _TEXTS = ("probe_alpha", "probe_beta"), ("probe one", "probe two")
_NUMBER, _MARKUP = 7101, "one<two&three"
_TAGS = re.compile(r"<[^<>]*>")
_MESSAGE_END = re.compile(r"(?<=>)\s*<[|｜][^<>]*>\s*$")
"""A special token behind a call's own marks."""

Call = tuple[str, Mapping[str, Any]]
Show = Callable[[Sequence[Call]], str]
"""Calls -> what the template makes of them; empty where it refuses."""


def tag_format(show: Show) -> ToolFormat | None:
    """None: arguments have no tags of their own, or such that calls can't be told by them."""
    texts = dict(zip(_KEYS, _TEXTS, strict=True))
    shown = show([(NAMES[0], texts)])
    if (found := _places(shown)) is None:
        return None
    name, (key, value), (key2, value2) = found
    between, inside = shown[key + len(_KEYS[0]) : value], shown[value + len(_TEXTS[0]) : key2]
    first, tail = shown[name + len(NAMES[0]) : key], shown[value2 + len(_TEXTS[1]) :]
    opening = _shared_end(first, inside)
    opening = opening[opening.rfind("<") :] if "<" in opening else ""
    closing = _shared_begin(inside[: len(inside) - len(opening)], tail)
    if not opening or between != shown[key2 + len(_KEYS[1]) : value2] or ">" not in closing:
        return None
    if inside[len(closing) : -len(opening)].strip():
        return None
    style = _style(show, opening, between, closing)
    if style.key_json is not None and "\n" in style.key[1]:
        return None
    behind = first[: -len(opening)].rstrip()
    calls = _Around(show, shown[:name], closing, _MESSAGE_END.sub("", tail[len(closing) :].strip()))
    form = calls.format(behind, style) if calls.closers else None
    return form if form is not None and _reads(form, show, texts) else None


def _places(shown: str) -> tuple[int, tuple[int, int], tuple[int, int]] | None:
    """Where the function's name stands, and the arguments' names and values."""
    found, at = [], 0
    for key, text in zip(_KEYS, _TEXTS, strict=True):
        name = shown.find(key, at)
        at = shown.find(text, name + len(key))
        if name < 0 or at < 0:
            return None
        found.append((name, at))
    function = shown.rfind(NAMES[0], 0, found[0][0])
    return (function, found[0], found[1]) if function >= 0 else None


def _style(show: Show, opening: str, between: str, closing: str) -> ArgumentStyle:
    number = _between(show([(NAMES[0], {_KEYS[0]: _NUMBER})]), _KEYS[0], str(_NUMBER))
    number = between if number is None else number
    quoted = between == number + '"' and closing.startswith('"')
    if quoted:
        between, closing = number, closing[1:]
    markup = show([(NAMES[0], {_KEYS[0]: _MARKUP})])
    edge = "\n" if between.endswith("\n") or closing.startswith("\n") else ""
    return ArgumentStyle(
        key=(opening, between.rstrip()),
        key_json=number.rstrip() if number != between else None,
        end=closing.strip(),
        texts="json" if quoted else "raw",
        marks=(CDATA,) if f"{CDATA}{_MARKUP}{CDATA_END}" in markup else (),
        edge=edge,
        gap="\n",
        escapes=_MARKUP not in markup and "one&lt;two&amp;three" in markup,
    )


class _Around:
    """What stands around one call, and around all of them. `before`, `behind`: of a call that is alone. `closing`: what
    stands behind its last argument's value."""

    def __init__(self, show: Show, before: str, closing: str, behind: str) -> None:
        before = before[_outermost(before) :]
        self.head, self.tail, self.wrap = before, behind, ("", "\n", "")
        arguments = dict(zip(_KEYS, _TEXTS, strict=True))
        two = show([(name, arguments) for name in NAMES])
        middle = _between(two, _TEXTS[1] + closing, NAMES[1]) or ""
        if middle.startswith(behind) and middle.endswith(before):
            self.wrap = ("", middle[len(behind) : len(middle) - len(before)], "")
        elif middle:
            shared = _shared_end(before, middle)
            self.head = shared[shared.find("<") :] if "<" in shared else before
            self.tail = middle[: len(middle) - len(self.head)]
            self.wrap = (before[: len(before) - len(self.head)], "", behind[len(self.tail) :].strip())
        self.closers = _TAGS.findall(self.tail + self.wrap[2])

    def format(self, behind: str, style: ArgumentStyle) -> ToolFormat:
        """behind: what stands behind a function's name."""
        whole = self.wrap[0] + self.head
        begin = whole[: whole.find(">") + 1] if ">" in whole else whole.rstrip()
        head = self.head[self.head.rfind("<") :]
        end, last = self.closers[0], self.closers[-1]
        first = whole[len(begin) : len(whole) - len(head)].strip()
        between = self.tail.partition(end)[2] + self.wrap[1] + self.head.removesuffix(head)
        noise = "|".join(re.escape(text) for text in (between.strip(), first) if text)
        style = replace(style, marks=(style.end, end, *style.marks))
        return ToolFormat(
            name="derived",
            begins=(begin,),
            read=styled((head, behind, end), style, last if last != end else None, noise),
            inner=tuple({mark for mark in (*_TAGS.findall(whole), *self.closers, *style.key, style.end) if mark}),
            call=(self.head + "NAME" + behind, self.tail),
            wrap=self.wrap,
            arguments=style,
        )


def _reads(form: ToolFormat, show: Show, texts: Mapping[str, Any]) -> bool:
    """What the template shows is understood."""
    two: list[Call] = [(name, texts) for name in NAMES]
    calls: list[list[Call]] = [
        [(NAMES[0], texts)],
        [(NAMES[0], {**texts, _KEYS[0]: _NUMBER})],
        *([two] if show(two) else []),
    ]
    return all(understood(form, show(one), one) for one in calls)


def understood(form: ToolFormat, shown: str, calls: Sequence[Call]) -> bool:
    """Whether these calls are what is read in it."""
    reader = AnswerReader(form, None, schemas={name: {"type": "object"} for name, _ in calls})
    found: list[list[str]] = []
    for part in [*reader.feed(shown), *reader.finish()]:
        if part.kind == "call":
            found.append([part.text, ""])
        elif part.kind == "arguments":
            found[part.call][1] += part.text
    try:
        return [(name, json.loads(text)) for name, text in found] == [(name, dict(given)) for name, given in calls]
    except ValueError:
        return False


def _outermost(before: str) -> int:
    """Where the tags begin that a call opens: those of other kinds (`<|message|>`) begin a message, and precede them."""
    found = re.search(r"(?:<[^<>|]*>\s*)*<[^<>|]*>?$", before)
    return found.start() if found else before.rfind("<")


def _between(text: str, one: str, other: str) -> str | None:
    """What stands between the two."""
    begin = text.find(one)
    end = text.find(other, begin + len(one))
    return text[begin + len(one) : end] if 0 <= begin <= end else None


def _shared_begin(one: str, other: str) -> str:
    count = next(
        (n for n, pair in enumerate(zip(one, other, strict=False)) if pair[0] != pair[1]), min(len(one), len(other))
    )
    return one[:count]


def _shared_end(one: str, other: str) -> str:
    return _shared_begin(one[::-1], other[::-1])[::-1]
