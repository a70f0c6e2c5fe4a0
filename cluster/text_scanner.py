"""Scanner: reads a text that arrives in parts. Readers are generators: they `yield` where they need more of it.

What a reader makes of a text doesn't depend on how the text was cut.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable, Collection, Generator, Sequence
from typing import TypeVar

T = TypeVar("T")
Steps = Generator[None, None, T]
Take = Callable[[str], None]
Find = Callable[[str, int], "re.Match[str] | None"]

_SPACE = " \t\r\n"
_OUTSIDE = re.compile(r'["{}\[\]]')
_INSIDE = re.compile(r'["\\]')
_SCALAR = re.compile(r"[\s,;}\]]")


@functools.lru_cache(maxsize=4096)
def _finders(marks: tuple[str, ...]) -> tuple[Find, Find]:
    """(finds any character with which a mark begins, finds the first mark, the longest of those there). A search for all of
    them at once ends where one is; for each alone it would read on to the text's end."""
    if not marks:
        return _never, _never
    firsts = "".join(sorted({mark[:1] for mark in marks}))
    longest_first = sorted(marks, key=len, reverse=True)
    return re.compile(f"[{re.escape(firsts)}]").search, re.compile("|".join(map(re.escape, longest_first))).search


def _never(text: str, at: int) -> None:
    """Nothing is found."""


class Scanner:
    """The text so far, and how much of it has been read."""

    def __init__(self) -> None:
        self._text = ""
        self._at = 0
        self._ended = False
        self._kept = False
        self.returned = 0
        """Characters that were read and given back, so far."""

    def feed(self, text: str) -> None:
        """More text is here."""
        kept, self._text = self._text, ""
        if not self._kept:
            kept, self._at = kept[self._at :], 0
        kept += text  # nobody else has it: what is there isn't copied
        self._text = kept

    def end(self) -> None:
        """No more will come."""
        self._ended = True

    def keep(self) -> int:
        """From here on what is read can be given back: the place for `rewind`, or `drop` when that isn't needed any more."""
        self._kept = True
        return self._at

    def rewind(self, place: int) -> None:
        """Read again from `place`."""
        self.returned += self._at - place
        self._at, self._kept = place, False

    def drop(self) -> None:
        """What was read stays read."""
        self._kept = False

    def peek(self) -> Steps[str]:
        """The next character; empty at the end."""
        while self._at >= len(self._text) and not self._ended:
            yield
        return self._text[self._at : self._at + 1]

    def skip(self, count: int = 1) -> None:
        """Over characters that `peek` or `literal` has shown."""
        self._at += count

    def space(self) -> Steps[None]:
        """Over white space."""
        while (char := (yield from self.peek())) and char in _SPACE:
            self._at += 1

    def literal(self, *options: str) -> Steps[str]:
        """Over the longest of `options` that comes next; empty when none does."""
        while True:
            rest = self._text[self._at : self._at + max(map(len, options), default=0)]
            open_ = [one for one in options if len(one) > len(rest) and one.startswith(rest)]
            if not open_ or self._ended:
                found = max((one for one in options if rest.startswith(one)), key=len, default="")
                self._at += len(found)
                return found
            yield

    def until(self, marks: Sequence[str], take: Take | None = None) -> Steps[str | None]:
        """Over the first of `marks`, that is returned; None when the text ends without. What stands before it goes to `take`
        as soon as it can't be a part of a mark."""
        longest, firsts = max(map(len, marks), default=0), {mark[:1] for mark in marks}
        maybe, find = _finders(tuple(marks))
        while True:
            if maybe(self._text, self._at) is None and not self._ended:  # as with most tokens
                self._give(len(self._text), take)
                yield
                continue
            found = find(self._text, self._at)
            at, mark = (found.start(), found[0]) if found else (-1, "")
            held = self._held(marks, longest, firsts)
            if mark and (self._ended or held > at):
                self._give(at, take)
                self._at += len(mark)
                return mark
            if self._ended:
                self._give(len(self._text), take)
                return None
            self._give(min(held, at) if mark else held, take)
            yield

    def collect(self, marks: Sequence[str]) -> Steps[tuple[str, str | None]]:
        """(what stands before the first of `marks`, that mark)."""
        parts: list[str] = []
        mark = yield from self.until(marks, parts.append)
        return "".join(parts), mark

    def string(self) -> Steps[str | None]:
        """A JSON string, whose quote is next; None when it isn't one."""
        parts: list[str] = []
        yield from self.value(parts.append)
        try:
            found = json.loads("".join(parts), strict=False)
        except ValueError:
            return None
        return found.encode("utf-16", "surrogatepass").decode("utf-16", "replace") if isinstance(found, str) else None

    def value(self, take: Take) -> Steps[bool]:
        """A JSON value, as it is written, to `take`. True when it was closed."""
        depth, quoted = 0, False
        first = yield from self.peek()
        if first not in ("{", "[", '"'):
            return (yield from self._scalar(take))
        while True:
            pattern = _INSIDE if quoted else _OUTSIDE
            found = pattern.search(self._text, self._at)
            if found is None:
                self._give(len(self._text), take)
            elif found[0] == "\\":
                self._give(found.start(), take)
                while len(self._text) < self._at + 2 and not self._ended:
                    yield
                self._give(min(len(self._text), self._at + 2), take)
                continue
            else:
                self._give(found.end(), take)
                quoted = not quoted if found[0] == '"' else quoted
                depth += (found[0] in "{[") - (found[0] in "}]")
                if depth <= 0 and not quoted:
                    return True
                continue
            if self._ended:
                return False
            yield

    def _scalar(self, take: Take) -> Steps[bool]:
        """A number, true, false, null, or whatever stands there instead."""
        seen = 0
        while (found := _SCALAR.search(self._text, self._at + seen)) is None and not self._ended:
            seen = len(self._text) - self._at
            yield
        self._give(found.start() if found else len(self._text), take)
        return True

    def _give(self, end: int, take: Take | None) -> None:
        if end > self._at and take is not None:
            take(self._text[self._at : end])
        self._at = max(self._at, end)

    def _held(self, marks: Sequence[str], longest: int, firsts: Collection[str]) -> int:
        """Where the text's end may be the beginning of a (longer) mark; `firsts`: what marks begin with."""
        for at in range(max(self._at, len(self._text) - longest + 1), len(self._text)):
            if self._text[at] in firsts:
                rest = self._text[at:]
                if any(len(rest) < len(one) and one.startswith(rest) for one in marks):
                    return at
        return len(self._text)
