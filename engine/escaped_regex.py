"""Regular expressions (of Rust's kind) for texts in a JSON string, cut where a character stands as an escape.

Lexers look one byte ahead, and all escapes begin with the same one. So no lexeme may hold an escape among other things: an
expression becomes the escapes in it, with plain expressions of what may stand before, between and behind them (after Glushkov,
"The abstract theory of automata", 1961).
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

MAX_ESCAPES = 64
"""Places of escapes in one expression."""
MAX_SIZE = 1 << 20
"""Of what stands between them, in characters; a place counts as PLACE_SIZE."""
PLACE_SIZE = 1024
ESCAPED = {chr(code): json.dumps(chr(code))[1:-1] for code in (*range(32), *b'"\\')}
"""Characters that can't stand in a JSON string, as they are written there."""
_PLAIN = r'[^"\\\x00-\x1F]'
_HEX = "[0-9a-fA-F]"
_RUN = re.compile(rf"{_PLAIN}+|.", re.DOTALL)
_ANY = "(?s:.)"
_PART = re.compile(
    rf"""\((?:\?[a-zA-Z-]*[:)]|\?P?<[^>]*>)?
    |\\(?:[pP](?:\{{[^}}]*\}}|.)|[xuU]\{{{_HEX}+\}}|x{_HEX}{{2}}|u{_HEX}{{4}}|U{_HEX}{{8}}|.) | .""",
    re.VERBOSE | re.DOTALL,
)
_GROUP = re.compile(r"\((?:\?(?P<flags>[a-zA-Z-]*)(?::|(?P<only>\)))|\?P?<[^>]*>)?")
_EDGES = ("^", "$", r"\A", r"\z")
"""Those of the whole text, as the library takes no others: they say nothing."""
_COUNT = re.compile(r"([*+?]|\{\d*,?\d*\})\??")
_COUNTS: dict[str, tuple[int, int | None]] = {"*": (0, None), "+": (1, None), "?": (0, 1)}
_places = itertools.count()
_Plain = str | None
"""An expression that can be put beside others; None: nothing fits it."""


class BarredError(Exception):
    """What an expression holds that can't be written so."""


@dataclass(frozen=True)
class Cut:
    """An expression, cut at the escapes in it."""

    plain: _Plain = None
    """Texts without any."""
    escapes: dict[int, str] = field(default_factory=dict)
    """Place -> those that may stand there."""
    begins: dict[int, str] = field(default_factory=dict)
    """Place of the first one -> what stands before it."""
    ends: dict[int, str] = field(default_factory=dict)
    """Place of the last one -> what stands behind it."""
    between: dict[tuple[int, int], str] = field(default_factory=dict)
    """Places of two that follow each other -> what stands between them."""

    def __post_init__(self) -> None:
        _check_size(len(self.plain or "") + PLACE_SIZE * len(self.escapes))

    def then(self, other: Cut) -> Cut:
        """One behind the other."""
        return Cut(
            _joined(self.plain, other.plain),
            self.escapes | other.escapes,
            self.begins | _each(other.begins, self.plain, ""),
            _each(self.ends, "", other.plain) | other.ends,
            self.between | other.between | _pairs(self.ends, "", other.begins),
        )

    def or_(self, other: Cut) -> Cut:
        """Either."""
        return Cut(
            _either(self.plain, other.plain),
            self.escapes | other.escapes,
            self.begins | other.begins,
            self.ends | other.ends,
            self.between | other.between,
        )

    def many(self, least: int = 0) -> Cut:
        """Any number of times: from none on, or from one."""
        gap = f"(?:{self.plain})*" if self.plain else ""
        between = dict(self.between)
        for pair, text in _pairs(self.ends, gap, self.begins).items():
            between[pair] = text if pair not in between else f"(?:{between[pair]}|{text})"
        plain = _joined(self.plain, gap) if least else gap
        return Cut(plain, self.escapes, _each(self.begins, gap, ""), _each(self.ends, "", gap), between)

    def repeated(self, least: int, most: int | None) -> Cut:
        """So many times."""
        if most is None and least < 2:
            return self.many(least)
        if not self.escapes and self.plain is not None:
            return Cut(f"(?:{self.plain}){{{least},{'' if most is None else most}}}")
        found = self.many() if most is None else Cut("")
        for number in reversed(range(least if most is None else most)):
            one = self.again()
            found = (one if number < least else one.or_(Cut(""))).then(found)
            if len(found.escapes) > MAX_ESCAPES:
                raise BarredError(f"more than {MAX_ESCAPES} times what JSON escapes")
        return found

    def again(self) -> Cut:
        """The same, where it stands once more: by places of its own."""
        new = {place: next(_places) for place in self.escapes}

        def moved(texts: Mapping[int, str]) -> dict[int, str]:
            return {new[place]: text for place, text in texts.items()}

        between = {(new[one], new[other]): text for (one, other), text in self.between.items()}
        return Cut(self.plain, moved(self.escapes), moved(self.begins), moved(self.ends), between)


def cut_text(text: str, *, folded: bool = False) -> Cut:
    """Of one text; folded: in either case."""
    found = Cut("")
    for run in _RUN.findall(text):
        if run in ESCAPED:
            found = found.then(_atom(run, folded))
        else:
            spelt = "".join(rf"\x{{{ord(char):x}}}" for char in run)
            found = found.then(Cut(f"(?i:{spelt})" if folded else spelt))
    return found


def cut_range(first: str, last: str) -> Cut:
    """Of one character."""
    return _atom(rf"[\x{{{ord(first):x}}}-\x{{{ord(last):x}}}]", False)


def cut_regex(regex: str, flags: str) -> Cut:
    """BarredError tells what of it can't be."""
    if "x" in flags:
        raise BarredError("the flag x")
    return _Reader(regex).either("i" in flags, "s" in flags)


class _Reader:
    """Of an expression that the library has read without complaint."""

    def __init__(self, regex: str) -> None:
        self._regex, self._at = regex, 0

    def either(self, folded: bool, lines: bool) -> Cut:
        """Up to the group's end. lines: a dot takes line breaks, too."""
        found, one = Cut(), Cut("")
        while self._at < len(self._regex) and self._regex[self._at] != ")":
            part = self._next()
            if part == "|":
                found, one = found.or_(one), Cut("")
            elif (group := _GROUP.fullmatch(part)) is not None:
                on, _, off = (group["flags"] or "").partition("-")
                if "x" in on or "u" in off:
                    raise BarredError(part)
                inner = "i" in on or (folded and "i" not in off), "s" in on or (lines and "s" not in off)
                if group["only"]:
                    folded, lines = inner
                else:
                    one = one.then(self._times(self._inside(*inner)))
            elif part not in _EDGES:
                one = one.then(self._times(_atom(_ANY if part == "." and lines else part, folded)))
        return found.or_(one)

    def _inside(self, folded: bool, lines: bool) -> Cut:
        found = self.either(folded, lines)
        self._at += 1
        return found

    def _next(self) -> str:
        begin = self._at
        if self._regex[begin] == "[":
            self._at = _class_end(self._regex, begin)
        else:
            found = _PART.match(self._regex, begin)
            assert found is not None, "it matches anything"
            self._at = found.end()
        return self._regex[begin : self._at]

    def _times(self, one: Cut) -> Cut:
        """What stands behind it says how often it comes."""
        while (found := _COUNT.match(self._regex, self._at)) is not None:
            self._at = found.end()
            one = one.repeated(*bounds(found[1]))
        return one


def bounds(count: str) -> tuple[int, int | None]:
    """Of *, +, ? or {least,most}."""
    if count in _COUNTS:
        return _COUNTS[count]
    least, to, most = count.strip("{}").partition(",")
    return int(least or 0), int(most) if most else None if to else int(least)


def _class_end(regex: str, at: int) -> int:
    """Of a [...] that begins there."""
    depth = 0
    while at < len(regex):
        if regex[at] == "\\":
            at += 1
        elif regex[at] == "[":
            depth += 1
            at += regex.startswith("^", at + 1)
            at += regex.startswith("]", at + 1)
        elif regex[at] == "]":
            depth -= 1
            if not depth:
                return at + 1
        at += 1
    return at


def _atom(atom: str, folded: bool) -> Cut:
    """What stands for one character."""
    escaped, others = _members(atom)
    plain = atom
    if escaped:  # a class doesn't take a dot for any character
        plain = _PLAIN if atom in (".", _ANY) else f"[{atom}&&{_PLAIN}]"
    plain = f"(?i:{plain})" if folded else plain
    if not escaped:
        return Cut(plain)
    place = next(_places)
    written = "|".join(ESCAPED[one].replace("\\", r"\\") for one in escaped)
    return Cut(plain if others else None, {place: written}, {place: ""}, {place: ""})


@lru_cache(1024)
def _members(atom: str) -> tuple[str, bool]:
    """(those that are escaped of the characters that it stands for, whether it stands for others)."""
    if len(atom) == 1 and atom != ".":
        return (atom, False) if atom in ESCAPED else ("", True)
    from llguidance import LLMatcher  # a gateway that sees no tools starts sooner without it

    matcher = LLMatcher(_bytes(), LLMatcher.grammar_from_lark(f"start: /{atom}/"), log_level=0)
    if matcher.is_error():
        raise BarredError(atom)
    mask = matcher.compute_bitmask()
    begins = {chr(byte) for byte in range(256) if mask[byte // 8] >> byte % 8 & 1}
    return "".join(sorted(begins & ESCAPED.keys())), bool(begins - ESCAPED.keys())


@lru_cache(1)
def _bytes() -> Any:
    from llguidance import LLTokenizer

    return LLTokenizer("byte")


def _check_size(size: int) -> None:
    if size > MAX_SIZE:
        raise BarredError("so much of what JSON escapes")


def _joined(one: _Plain, other: _Plain) -> _Plain:
    return None if one is None or other is None else one + other


def _either(one: _Plain, other: _Plain) -> _Plain:
    if one is None or one == other:
        return other
    return one if other is None else f"(?:{one}|{other})"


def _each(texts: Mapping[int, str], before: _Plain, behind: _Plain) -> dict[int, str]:
    """With something around them, if there is such a thing."""
    if before is None or behind is None:
        return {}
    _check_size(len(texts) * len(before + behind) + sum(map(len, texts.values())))
    return {place: before + text + behind for place, text in texts.items()}


def _pairs(ends: Mapping[int, str], gap: str, begins: Mapping[int, str]) -> dict[tuple[int, int], str]:
    before, behind = (sum(map(len, texts.values())) for texts in (ends, begins))
    _check_size(len(begins) * before + len(ends) * behind + len(ends) * len(begins) * (len(gap) + 64))
    return {(one, other): end + gap + begin for one, end in ends.items() for other, begin in begins.items()}
