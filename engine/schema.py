"""What a JSON Schema goes through before the grammar library reads it: limits, and rules in words that it knows."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from kvasir.engine.errors import ClientError

if TYPE_CHECKING:  # only its stubs know it
    from llguidance._lib import JsonCompileOptions

PARAM = "structured_outputs"
COMPILE_LIMIT_S = 10.0
"""A grammar that takes longer is given up."""
JSON_RULES: JsonCompileOptions = {
    "lenient": False,
    "coerce_one_of": False,
    "whitespace_pattern": r"[\x20\x0A\x0D\x09]{1,32}",
}
"""Whatever a schema says about how it is read: no keyword is skipped over, and whitespace doesn't go on for ever."""
COMPACT_RULES: JsonCompileOptions = {"lenient": False, "coerce_one_of": False, "whitespace_flexible": False}
"""The same without any whitespace."""
MAX_DEPTH = 64
"""Of a schema's nesting."""
DAY = (
    r"((\d\d(0[48]|[2468][048]|[13579][26])|([02468][048]|[13579][26])00)-02-29"
    r"|\d{4}-(0[13-9]|1[0-2])-\d\d|\d{4}-02-([01]\d|2[0-8]))"
)
"""A date whose 29th of February is in a leap year; the library sees to everything else in it."""
TIME = r"(\d\d:\d\d:[0-5].*|23:59:60(\.\d+)?([Zz]|[+-]00:00))"
"""Leap seconds end a day of UTC, and are written in UTC only: in other zones each offset has a minute of its own."""
_BYTE = r"(25[0-5]|2[0-4]\d|1\d\d|[1-9]?\d)"
IPV4 = rf"{_BYTE}(\.{_BYTE}){{3}}"
_H16 = "[0-9a-fA-F]{1,4}"
_LS32 = f"({_H16}:{_H16}|{IPV4})"
IPV6 = "(" + "|".join([
    f"({_H16}:){{6}}{_LS32}",
    *(f"({_H16}(:{_H16}){{0,{before - 1}}})?::({_H16}:){{{5 - before}}}{_LS32}" for before in range(1, 6)),
    f"::({_H16}:){{5}}{_LS32}",
    f"({_H16}(:{_H16}){{0,5}})?::{_H16}",
    f"({_H16}(:{_H16}){{0,6}})?::",
]) + ")"  # fmt: skip
"""RFC 3986, 3.2.2: the last 32 bits may be an IPv4 address, `::` stands for zeros."""
_LABEL = "[a-zA-Z0-9]([a-zA-Z0-9-]{0,61}[a-zA-Z0-9])?"
_ATOM = "[a-zA-Z0-9!#$%&'*+/=?^_`{|}~-]+"
EMAIL = rf"({_ATOM}(\.{_ATOM})*|\"([ !#-\[\]-~]|\\[ -~])*\")@({_LABEL}(\.{_LABEL})*|\[({IPV4}|IPv6:{IPV6})\])"
"""RFC 5321, 4.1.2: a local part may stand between quotes, and an address in place of a domain. Lengths (4.5.3) aren't held."""
REWRITTEN = {"ipv6": f"^{IPV6}$", "email": f"^{EMAIL}$"}
"""Formats of which the library doesn't know all."""
HINTS = ("password", "binary", "path", "file-path", "directory-path")
"""Formats that say what a text is for (OpenAPI 3.1; Pydantic's SecretStr, bytes and Path): any text has them."""
OLD_DRAFTS = ("draft-04", "draft-06", "draft-07")
"""In which `$ref` stands for itself, whatever is beside it."""
NARROWED: dict[str, dict[str, Any]] = {
    "date": {"pattern": f"^{DAY}$"},
    "time": {"pattern": f"^{TIME}$"},
    "date-time": {"pattern": f"^{DAY}.{TIME}$"},
    "hostname": {"maxLength": 253},
}
"""What a string of a format must also fit (RFC 3339, 5.7; RFC 1123, 2.1)."""


def check_depth(value: Any, limit: int = MAX_DEPTH, what: str = "a schema", param: str = PARAM) -> None:
    """ClientError when it is nested deeper than `limit`."""
    level, depth = [value] if isinstance(value, (dict, list)) else [], 0
    while level:
        if depth > limit:
            raise ClientError(f"{what} is nested {limit} levels at most", param=param)
        inner = [child for one in level for child in _children(one)]
        level, depth = [child for child in inner if isinstance(child, (dict, list))], depth + 1


def narrowed(schema: Any) -> Any:
    """The schema with NARROWED's rules beside its formats, REWRITTEN's in place of them, without HINTS, and numbers one of which
    is to be chosen as anyOf. Of old drafts' references the reference alone.

    Values to choose from are no schemas, and stay.
    """
    draft = schema.get("$schema") if isinstance(schema, dict) else None
    return _narrowed(schema, isinstance(draft, str) and any(old in draft for old in OLD_DRAFTS))


def _narrowed(schema: Any, old: bool) -> Any:
    if isinstance(schema, list):
        return [_narrowed(one, old) for one in schema]
    if not isinstance(schema, dict):
        return schema
    if old and isinstance(schema.get("$ref"), str):
        schema = {
            key: value
            for key, value in schema.items()
            if key in ("$ref", "$schema", "$id", "id", "definitions", "$defs")
        }
    found = {key: value if key in ("enum", "const") else _narrowed(value, old) for key, value in schema.items()}
    if isinstance(pattern := schema.get("pattern"), str):
        found["pattern"] = with_feff(pattern)
    form, others = schema.get("format"), found.get("allOf", [])
    if not isinstance(others, list):
        return found
    more = [NARROWED[form]] if isinstance(form, str) and form in NARROWED else []
    if isinstance(form, str) and form in (*REWRITTEN, *HINTS):
        del found["format"]
    if isinstance(form, str) and form in REWRITTEN:
        more.append({"pattern": REWRITTEN[form]})
    if _numbers_apart(schema.get("oneOf")):
        more.append({"anyOf": found.pop("oneOf")})
    return found | {"allOf": [*others, *more]} if more else found


def with_feff(pattern: str) -> str:
    """White space of ECMA 262 holds U+FEFF too, which the library's doesn't. `\\S` among others in brackets still takes it."""
    if "\\s" not in pattern and "\\S" not in pattern:
        return pattern
    parts, inside = [], False
    for part in re.findall(r"\\.|.", pattern, re.DOTALL):
        inside = part == "[" or (inside and part != "]")
        if part == "\\s":
            parts.append(r"\s\uFEFF" if inside else r"[\s\uFEFF]")
        else:
            parts.append(r"[^\s\uFEFF]" if part == "\\S" and not inside else part)
    return "".join(parts)


def _numbers_apart(branches: Any) -> bool:
    """Has each branch values of its own? Then one fits at most. The library sees that by itself where they are texts."""
    if not isinstance(branches, list) or not all(
        isinstance(one, dict) and {"const", "enum"} & set(one) for one in branches
    ):
        return False
    lists = [[one["const"]] if "const" in one else one["enum"] for one in branches]
    if not all(isinstance(values, list) for values in lists):
        return False
    values = [value for each in lists for value in each]
    if all(isinstance(value, str) for value in values) or any(isinstance(value, (dict, list)) for value in values):
        return False
    return len({(isinstance(value, bool), value) for value in values}) == len(values)


def _children(value: Any) -> list[Any]:
    return list(value.values()) if isinstance(value, dict) else list(value)
