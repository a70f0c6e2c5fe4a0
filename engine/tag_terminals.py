"""Formats of structural tags that are regular, as one terminal of a Lark grammar each.

The library reads terminals greedily, each as far as it goes: free text, or a pattern that what stands behind it fits too, would
never come to its end if it were a terminal of its own.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from kvasir.engine.argument_text import slashed
from kvasir.engine.errors import ClientError

PARAM = "structured_outputs"
ANY = "/(?s:.*)/"
_MORE = "/(?s:.+)/"
_TIMES, _MOST_STATES = re.compile(r"(\d{1,9})\}"), 200
"""The greatest counts of a pattern's repetitions; their product, times the text behind them, that is surely compiled."""
_REPEATED = {"optional": "?", "star": "*", "plus": "+"}
REPEATS = (*_REPEATED, "repeat")
"""Formats that are another one, several times."""
_FIRST = {
    "object": "{",
    "array": r"\[",
    "string": '"',
    "number": r"\-0-9",
    "integer": r"\-0-9",
    "boolean": "tf",
    "null": "n",
}
"""The characters with which the types of JSON begin, as a regex has them in [...]."""
TRIGGERED = ("triggered_tags", "token_triggered_tags", "dispatch", "token_dispatch")
"""Those of free text that goes on behind what begins in it."""


def text_of(form: Any, key: str) -> str:
    """A text in a format."""
    value = form.get(key, "") if isinstance(form, dict) else None
    if not isinstance(value, str):
        raise ClientError(f"structural tag: {key} must be a text, got {value!r:.60}", param=PARAM)
    return value


def list_of(form: Any, key: str) -> list[Any]:
    """A list in a format, which isn't empty."""
    value = form.get(key)
    if not isinstance(value, list) or not value:
        raise ClientError(f"structural tag: {key} must be a list that isn't empty, got {value!r:.60}", param=PARAM)
    return value


def texts_of(form: Any, key: str) -> tuple[str, ...]:
    """A list of texts in a format, or none."""
    value = form.get(key) or []
    if not isinstance(value, list) or not all(isinstance(one, str) and one for one in value):
        raise ClientError(f"structural tag: {key} must be a list of texts, got {value!r:.60}", param=PARAM)
    return tuple(value)


def times_of(form: Any) -> str:
    """How often something is repeated, as Lark has it."""
    if (mark := _REPEATED.get(form["type"])) is not None:
        return mark
    least, most = form.get("min"), form.get("max")
    if type(least) is not int or type(most) is not int or least < 0 or (most != -1 and most < max(least, 1)):
        text = "min and max of repeat are integers from 0 on, the greater one last; max -1: any number"
        raise ClientError(f"structural tag: {text}; got {least!r:.20} and {most!r:.20}", param=PARAM)
    return f"{{{least},{'' if most == -1 else most}}}"


class Terminals:
    """ends_of(form): the texts that end a tag. special(text): a special token is named in it. check(form): its fields.
    name(body): the name of a new terminal."""

    def __init__(
        self,
        ends_of: Callable[[Any], tuple[str, ...]],
        special: Callable[[str], bool],
        check: Callable[[Any], str],
        name: Callable[[str], str],
    ) -> None:
        self._ends_of, self._special, self._check, self._name = ends_of, special, check, name
        self._named: dict[str, str] = {}
        self._known: dict[tuple[int, str], tuple[Any, str | None]] = {}
        """Of formats by their identity, which they keep here, and by what ends them."""

    def either(self, ends: Sequence[str]) -> str | None:
        """A terminal of one of these texts; "" for none, None where one of them holds special tokens."""
        if any(map(self._special, ends)):
            return None
        return self._once(" | ".join(map(json.dumps, ends))) if ends else ""

    def text(self, excludes: Sequence[str] = ()) -> str:
        """Any text that holds none of these."""
        if not excludes:
            return ANY
        held = " | ".join(map(json.dumps, excludes))
        return self._once(f"{ANY} & ~({ANY} ({held}) {ANY})")

    def up_to(self, ends: str, excludes: Sequence[str] = ()) -> str:
        """The same up to the first text of the terminal `ends`, and that."""
        return self._once(f"({self.text(excludes)} {ends}) & ~({ANY} {ends} {_MORE})")

    def until(self, form: Any, end: str, first: str) -> str | None:
        """A format that doesn't go on behind `end` with one of the characters `first`; None: it isn't regular, there are none, or
        it is so long that the library's fuel wouldn't last."""
        body = self.of(form)
        if not first or body is None:
            return None
        if len(end) * math.prod(max(int(times), 1) for times in _TIMES.findall(body)) > _MOST_STATES:
            return None
        return self._once(f"({body}) & ~({ANY} {json.dumps(end)} /[{first}]/ {ANY})")

    def of(self, form: Any, ends: str = "") -> str | None:
        """What a format is and the terminal `ends` behind it, in a terminal; None: it isn't regular."""
        key = (id(form), ends)
        if key not in self._known:
            self._known[key] = form, self._of(form, ends)
        return self._known[key][1]

    def _of(self, form: Any, ends: str) -> str | None:
        kind = self._check(form)
        if kind == "any_text":
            excludes = texts_of(form, "excludes")
            return self.up_to(ends, excludes) if ends else self.text(excludes)
        if kind in ("sequence", "or"):
            return self._several(form, ends)
        if kind == "tag":
            return self._tag(form, ends)
        if kind == "optional" and ends:
            one = self.of(form.get("content"), ends)
            return one and f"({one} | {ends})"
        if kind in REPEATS:
            one = self.of(form.get("content"))
            if one is None or (ends and is_open(form, self._ends_of)):
                return None
            return f"({one}){times_of(form)} {ends}"
        if kind == "regex":
            pattern = slashed(text_of(form, "pattern"))
            return f"/{pattern}/ {ends}" if pattern else f'"" {ends}'
        value = text_of(form, "value") if kind == "const_string" else None
        return None if value is None or self._special(value) else f"{json.dumps(value)} {ends}"

    def _several(self, form: Any, ends: str) -> str | None:
        elements, last = list_of(form, "elements"), form["type"] == "or"
        parts = [self.of(one, ends if last else "") for one in elements[:-1]]
        parts.append(self.of(elements[-1], ends))
        if None in parts:
            return None
        return f"({(' | ' if last else ' ').join(map(str, parts))})"

    def _tag(self, form: Any, ends: str) -> str | None:
        begin, own = form.get("begin"), self.either([end for end in self._ends_of(form) if end])
        if not isinstance(begin, str) or self._special(begin) or own is None or "content" not in form:
            return None
        content = self.of(form["content"], own or ends)
        return None if content is None else f"{json.dumps(begin)} {content} {ends if own else ''}"

    def _once(self, body: str) -> str:
        if body not in self._named:
            self._named[body] = self._name(body)
        return self._named[body]


def is_open(form: Any, ends_of: Callable[[Any], tuple[str, ...]]) -> bool:
    """It ends in free text, where nothing but what stands behind it tells where that ends."""
    kind = form.get("type") if isinstance(form, Mapping) else None
    if kind == "tag":
        return not any(ends_of(form)) and is_open(form.get("content"), ends_of)
    if kind in ("sequence", "or"):
        elements = list_of(form, "elements")
        return any(is_open(one, ends_of) for one in (elements[-1:] if kind == "sequence" else elements))
    if kind in REPEATS:
        return is_open(form.get("content"), ends_of)
    return kind == "any_text" or kind in TRIGGERED


def is_closed(form: Any, ends_of: Callable[[Any], tuple[str, ...]]) -> bool:
    """It ends with a tag's end: what it holds could go on behind that, as `.*` does, and isn't meant to."""
    kind = form.get("type")
    if kind == "sequence":
        return is_closed(form["elements"][-1], ends_of)
    return kind == "tag" and (any(ends_of(form)) or is_closed(form.get("content"), ends_of))


def is_several(form: Any, ends_of: Callable[[Any], tuple[str, ...]]) -> bool:
    """A choice or a repetition of formats that are closed: in one terminal they would go on behind their ends."""
    kind = form.get("type")
    if kind == "tag" and not any(ends_of(form)):
        return is_several(form["content"], ends_of)
    if kind != "or" and kind not in REPEATS:
        return False
    held = list_of(form, "elements") if kind == "or" else [form.get("content")]
    tags = [one for one in held if isinstance(one, Mapping) and one.get("type") != "const_string"]
    return bool(tags) and all(is_closed(one, ends_of) or is_several(one, ends_of) for one in tags)


def first_of(schema: Any) -> str:
    """The characters with which a value of a JSON Schema may begin, as a regex has them in [...]."""
    found = schema if isinstance(schema, Mapping) else {}
    kinds = found.get("type")
    known = [_FIRST.get(str(kind)) for kind in (kinds if isinstance(kinds, list) else [kinds])]
    return "".join(_FIRST.values() if None in known else map(str, known))
