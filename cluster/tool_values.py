"""Arguments that aren't written as JSON: values of XML-like parameters, Python-like calls, Gemma's objects."""

from __future__ import annotations

import contextlib
import html
import json
import re
from collections.abc import Sequence
from typing import Any

from kvasir.engine.raw_values import WORDS, kinds_of, typed

MAX_DEPTH = 64
"""Of lists and objects in each other."""
_NUMBER = re.compile(r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?")
_BARE = re.compile(r"[^,:=\[\]{}()\s]+")
_NAME = re.compile(r"[^\s(]+")
_KEY = re.compile(r"""[^\s=:,(){}\[\]"']+""")
_LOW = re.compile(r"\\u([dD][c-fC-F][0-9a-fA-F]{2})")
_ESCAPES = {"n": "\n", "t": "\t", "r": "\r", "b": "\b", "f": "\f"}


def dumps(value: Any) -> str:
    """JSON as models write it; halves of a character that have lost the other stay escaped."""
    text = json.dumps(value, ensure_ascii=False)
    return text if _whole(text) else json.dumps(value)


def _whole(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def unescaped(text: str) -> str:
    """Without XML's entities."""
    return html.unescape(text)


def valued(text: str, schema: Any) -> Any:
    """`typed`; where a list or an object is wanted, Python's spelling of it counts too: some templates show no other."""
    value = typed(text, schema)
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{") and kinds_of(schema) & {"array", "object"}:
        with contextlib.suppress(ValueError):
            return Literals(value).value()
    return value


class Literals:
    """Reads values in Python's, JSON's or Gemma's spelling. ValueError when the text holds something else.

    `quotes`: what strings stand between; behind a backslash only the quotes " and ' are escaped.
    """

    def __init__(self, text: str, quotes: Sequence[str] = ('"', "'")) -> None:
        self._text, self._at, self._quotes, self._depth = text, 0, quotes, 0

    def value(self) -> Any:
        """A value and nothing behind it."""
        found = self._value()
        if self._more():
            raise ValueError(f"unexpected {self._text[self._at :]!r:.40}")
        return found

    def calls(self) -> list[tuple[str, dict[str, Any]]]:
        """`name(key=value, ...)`, several of them separated by commas or white space, in brackets or not."""
        found = []
        if self._next("["):
            closing = "]"
        else:
            closing = ""
        while not (closing and self._next(closing)) and self._more():
            name = self._matching(_NAME)
            self._expect("(")
            found.append((name, self._members(")", "=")))
            self._next(",") or self._next(";")
        if self._more():
            raise ValueError(f"unexpected {self._text[self._at :]!r:.40}")
        return found

    def mapping(self) -> dict[str, Any]:
        """`{key:value,...}` and nothing behind it."""
        self._expect("{")
        found = self._members("}", ":")
        if self._more():
            raise ValueError(f"unexpected {self._text[self._at :]!r:.40}")
        return found

    def _members(self, closing: str, between: str) -> dict[str, Any]:
        found: dict[str, Any] = {}
        while not self._next(closing):
            key = self._string() if self._quoted() else self._matching(_KEY)
            self._expect(between)
            found[key] = self._value()
            if not self._next(","):
                self._expect(closing)
                break
        return found

    def _value(self) -> Any:
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise ValueError(f"more than {MAX_DEPTH} levels")
        found = self._string() if self._quoted() else self._bare()
        self._depth -= 1
        return found

    def _bare(self) -> Any:
        if self._next("{"):
            return self._members("}", ":")
        for opening, closing in ("[]", "()"):
            if self._next(opening):
                return self._items(closing)
        if number := _NUMBER.match(self._text, self._at):
            after = self._text[number.end() : number.end() + 1]
            if not after or after in ",]}) \t\r\n":
                self._at = number.end()
                return json.loads(_plain(number[0]))
        word = self._matching(_BARE)
        return WORDS.get(word, word)

    def _items(self, closing: str) -> list[Any]:
        found = []
        while not self._next(closing):
            found.append(self._value())
            if not self._next(","):
                self._expect(closing)
                break
        return found

    def _string(self) -> str:
        quote = self._quoted()
        self._at += len(quote)
        parts: list[str] = []
        while not self._text.startswith(quote, self._at):
            char = self._text[self._at : self._at + 1]
            if not char:
                raise ValueError("a string isn't closed")
            if char == "\\" and len(quote) == 1:
                parts.append(self._escape())
            else:
                parts.append(char)
                self._at += 1
        self._at += len(quote)
        return "".join(parts)

    def _escape(self) -> str:
        char = self._text[self._at + 1 : self._at + 2]
        if char in ("u", "x"):
            digits = self._text[self._at + 2 : self._at + (6 if char == "u" else 4)]
            self._at += 2 + len(digits)
            return self._paired(int(digits, 16))
        self._at += 2
        return _ESCAPES.get(char, char)

    def _paired(self, code: int) -> str:
        """The character of a code, and of the one behind it where two are one character."""
        if 0xD800 <= code < 0xDC00 and (low := _LOW.match(self._text, self._at)):
            self._at = low.end()
            return chr(0x10000 + ((code - 0xD800) << 10) + int(low[1], 16) - 0xDC00)
        return chr(code)

    def _quoted(self) -> str:
        """The quote that comes next."""
        self._more()
        return next((quote for quote in self._quotes if self._text.startswith(quote, self._at)), "")

    def _more(self) -> bool:
        """Over white space: whether anything follows."""
        while self._at < len(self._text) and self._text[self._at].isspace():
            self._at += 1
        return self._at < len(self._text)

    def _next(self, mark: str) -> bool:
        """Over `mark`, if it comes next."""
        self._more()
        if not self._text.startswith(mark, self._at):
            return False
        self._at += len(mark)
        return True

    def _expect(self, mark: str) -> None:
        if not self._next(mark):
            raise ValueError(f"expected {mark!r}, found {self._text[self._at :]!r:.40}")

    def _matching(self, pattern: re.Pattern[str]) -> str:
        self._more()
        found = pattern.match(self._text, self._at)
        if not found:
            raise ValueError(f"unexpected {self._text[self._at :]!r:.40}")
        self._at = found.end()
        return found[0]


def _plain(number: str) -> str:
    """A number as JSON has it."""
    sign, digits = ("-" if number[0] == "-" else ""), number.lstrip("+-")
    digits = "0" + digits if digits[0] == "." else digits
    digits = re.sub(r"\.(?=$|[eE])", ".0", digits)
    return sign + (re.sub(r"^0+(?=\d)", "", digits))
