"""Texts that a schema describes, as regular expressions of the whole text."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import Any

from kvasir.engine.argument_schema import bounds_of
from kvasir.engine.errors import ClientError, UnsupportedError
from kvasir.engine.loose_schema import enforceable
from kvasir.engine.raw_values import WORDS

ANY = r"(.|\n)"
_BARE, _SLASHED = re.compile(r"\\.|/|\n", re.DOTALL), {"/": r"\/", "\n": r"\n", "\\\n": r"\n"}
_ATOM, _LABEL = r"[a-zA-Z0-9_+-]+", r"[a-zA-Z0-9]([a-zA-Z0-9-]{0,61}[a-zA-Z0-9])?"
_DATE, _HOUR = r"\d{4}-(0[1-9]|1[0-2])-(0[1-9]|1\d|2[0-8])", r"([01]\d|2[0-3]):[0-5]\d"
_TIME = rf"{_HOUR}:[0-5]\d(\.\d+)?(Z|[+-]{_HOUR})"
_BYTE = r"(25[0-5]|2[0-4]\d|1\d\d|[1-9]?\d)"
_FORMATS = {
    "date": _DATE,
    "time": _TIME,
    "date-time": f"{_DATE}T{_TIME}",
    "email": rf"{_ATOM}(\.{_ATOM})*@{_LABEL}(\.{_LABEL})+",
    "hostname": rf"{_LABEL}(\.{_LABEL}){{0,3}}",
    "ipv4": rf"{_BYTE}(\.{_BYTE}){{3}}",
    "uuid": r"[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}",
    "uri": r"[a-z][a-z0-9+.-]*://[a-zA-Z0-9.-]+(:\d{1,5})?(/[a-zA-Z0-9._~/-]*)?(\?[a-zA-Z0-9._~=&/-]*)?",
}
"""Texts that are surely of a format (RFC 3339, 5321, 1123, 3986, 9562)."""


def refused(what: str) -> UnsupportedError:
    """A schema that can't be held to."""
    return UnsupportedError(f"{what} can't be enforced in this model's format of calls", param="tools")


def held(schema: Mapping[str, Any], skip: Callable[[str], None]) -> list[str]:
    """What a text must fit. `skip` is told what can't be enforced."""
    found = []
    least, most = bounds_of(schema, "minLength", "maxLength")
    if least or most is not None:
        found.append(f"{ANY}{{{least},{'' if most is None else most}}}")
    pattern, form = schema.get("pattern"), schema.get("format")
    if not all(one is None or isinstance(one, str) for one in (pattern, form)):
        raise ClientError("pattern and format are texts", param="tools")
    if pattern is not None:
        if (whole := _searched(pattern)) is None:
            skip(f"pattern {pattern!r:.60}")
        else:
            found.append(whole)
    if form in _FORMATS:
        found.append(_FORMATS[form])
    elif form is not None:
        skip(f"format {form!r:.60}")
    return found


def other_readings(kinds: set[str]) -> list[str]:
    """Texts that are read as something else where it may be that too."""
    found = [word for word, value in WORDS.items() if ("null" if value is None else "boolean") in kinds]
    found += [rf"\{{{ANY}*"] if "object" in kinds else []
    found += [rf"\[{ANY}*"] if "array" in kinds else []
    return found


def _searched(pattern: str) -> str | None:
    """A pattern of JSON Schema, which may stand anywhere in the text, as one of the whole text; None: it can't be."""
    inner = pattern.removeprefix("^")
    ends = inner.endswith("$") and not inner.endswith("\\$")
    body = inner.removesuffix("$") if ends else inner
    if _anchored(body) or ("|" in body and (inner != pattern or ends)) or not enforceable(body):
        return None
    return ("" if inner != pattern else f"{ANY}*") + f"({body})" + ("" if ends else f"{ANY}*")


def _anchored(pattern: str) -> bool:
    """Has it ^ or $ outside of [...]? (In one pass: patterns are long at will.)"""
    parts = re.split(r"(?=[\[\]])", pattern)
    return any(
        not behind.startswith("]") and re.search(r"(?<!\\)[\^$]", part) for part, behind in pairwise([*parts, ""])
    )


def plain(text: str) -> str:
    """A pattern of just this text."""
    return re.sub(r"([\\.+*?()|\[\]{}^$#&~-])", r"\\\1", text)


def slashed(pattern: str) -> str:
    """As Lark writes regular expressions."""
    return _BARE.sub(lambda found: _SLASHED.get(found[0], found[0]), pattern)
