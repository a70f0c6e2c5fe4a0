"""What a JSON Schema goes through before the grammar library reads it: limits, and rules in words that it knows."""

from __future__ import annotations

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
MAX_DEPTH = 64
"""Of a schema's nesting."""
DAY = (
    r"((\d\d(0[48]|[2468][048]|[13579][26])|([02468][048]|[13579][26])00)-02-29"
    r"|\d{4}-(0[13-9]|1[0-2])-\d\d|\d{4}-02-([01]\d|2[0-8]))"
)
"""A date whose 29th of February is in a leap year; the library sees to everything else in it."""
TIME = r"(\d\d:\d\d:[0-5].*|23:59:60(\.\d+)?([Zz]|[+-]00:00))"
"""Leap seconds end a day of UTC, and are written in UTC only: in other zones each offset has a minute of its own."""
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
    """The schema with NARROWED's rules beside its formats, and numbers one of which is to be chosen as anyOf.

    Values to choose from are no schemas, and stay.
    """
    if isinstance(schema, list):
        return [narrowed(one) for one in schema]
    if not isinstance(schema, dict):
        return schema
    found = {key: value if key in ("enum", "const") else narrowed(value) for key, value in schema.items()}
    form, others = schema.get("format"), found.get("allOf", [])
    if not isinstance(others, list):
        return found
    more = [NARROWED[form]] if isinstance(form, str) and form in NARROWED else []
    if _numbers_apart(schema.get("oneOf")):
        more.append({"anyOf": found.pop("oneOf")})
    return found | {"allOf": [*others, *more]} if more else found


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
