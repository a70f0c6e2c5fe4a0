"""Checks of fields that also say, as JSON Schema, what they let through: the OpenAPI document is made of that."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

Json = dict[str, Any]
Check = Callable[[str, Any], None]
"""Raises ClientError unless a field of that name may have that value."""


class Described:
    """A check and its description."""

    __slots__ = ("_check", "schema")

    def __init__(self, check: Check, schema: Json) -> None:
        self._check = check
        self.schema = schema

    def __call__(self, name: str, value: Any) -> None:
        self._check(name, value)


def described(**schema: Any) -> Callable[[Check], Check]:
    """Decorates a check with the JSON Schema of what it lets through."""
    return lambda check: Described(check, schema)


def schema_of(check: Check) -> Mapping[str, Any]:
    """What a check says of itself; nothing: any value may pass it."""
    return check.schema if isinstance(check, Described) else {}
