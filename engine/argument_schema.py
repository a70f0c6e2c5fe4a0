"""What a tool's schema says, keyword by keyword. ClientError where it is no JSON Schema, or stands for too much."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from typing import Any

from kvasir.engine.errors import ClientError
from kvasir.engine.raw_values import kinds_of

MAX_ARGUMENTS = 512
MAX_STEPS = 50_000
"""Rules, and schemas looked at, for all tools of a call: references let a short schema stand for a very long one."""
Json = Mapping[str, Any]
NOTES = frozenset({
    "title", "description", "default", "examples", "example", "deprecated", "readOnly", "writeOnly", "$comment", "$defs",
    "definitions", "$schema", "$id", "optional", "nullable", "strict",
})  # fmt: skip
"""Keywords that hold a value to nothing. Then those of each type."""
OBJECT = frozenset({"type", "properties", "required", "additionalProperties"})
TEXT = frozenset({"type", "minLength", "maxLength", "pattern", "format"})
NUMBER = frozenset({"type", "minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"})
ARRAY = frozenset({"type", "items", "minItems", "maxItems"})


class SlowSchemaError(ClientError):
    """Tools' schemas take too long to be looked at."""


class Steps:
    """Counts what a grammar of arguments takes, and the time since it was made."""

    def __init__(self, limit_s: float = math.inf) -> None:
        self._count, self._limit_s = 0, limit_s
        self._until = time.monotonic() + limit_s

    def again(self) -> Steps:
        """From the first step, with the time that is left."""
        other = Steps(self._limit_s)
        other._until = self._until
        return other

    def check_time(self) -> None:
        """SlowSchemaError beyond the limit: to be asked before what takes milliseconds."""
        if time.monotonic() > self._until:
            text = f"the tools' schemas take more than {self._limit_s:g} s: make them smaller, or send fewer tools"
            raise SlowSchemaError(text, param="tools")

    def add(self, count: int = 1) -> None:
        """ClientError beyond MAX_STEPS, or beyond the time."""
        self.check_time()
        self._count += count
        if self._count > MAX_STEPS:
            text = f"the tools' schemas take more than {MAX_STEPS} rules, with all that their $refs stand for"
            raise ClientError(f"{text}: make them smaller, or send fewer tools", param="tools")


def members_of(schema: Json) -> tuple[dict[str, Any], set[str]]:
    """(properties, the names of those that are required)."""
    properties, required = schema.get("properties") or {}, schema.get("required") or ()
    if not isinstance(properties, Mapping):
        raise ClientError(f"properties must be an object, got {properties!r:.60}", param="tools")
    if not isinstance(required, (list, tuple)):
        raise ClientError(f"required must be a list of names, got {required!r:.60}", param="tools")
    names = [name for name in required if isinstance(name, str)]
    found = {**properties, **{name: {} for name in names if name not in properties}}
    if len(found) > MAX_ARGUMENTS:
        raise ClientError(f"a tool takes {MAX_ARGUMENTS} parameters at most", param="tools")
    return found, set(names)


def bounds_of(schema: Json, least: str, most: str) -> tuple[int, int | None]:
    """What two keywords count to; None: there is no upper bound."""
    low, high = (_count(schema.get(name)) for name in (least, most))
    low = 0 if low is None else low
    if type(low) is not int or low < 0 or not (high is None or (type(high) is int and high >= low)):
        raise ClientError(f"{least} and {most} are integers from 0 on, the greater one last", param="tools")
    return low, high


def _count(given: Any) -> Any:
    """2.0 is 2."""
    return int(given) if isinstance(given, float) and given.is_integer() else given


def values_of(schema: Json) -> list[Any] | None:
    """Of enum or const; None: it has neither."""
    if "enum" not in schema:
        return [schema["const"]] if "const" in schema else None
    values = schema["enum"]
    if not isinstance(values, list) or not values:
        raise ClientError(f"enum must be a list that isn't empty, got {values!r:.60}", param="tools")
    return values


def branches_of(schema: Json) -> tuple[str, list[Any]] | None:
    """(anyOf or oneOf, its branches); None: it has neither."""
    for name in ("anyOf", "oneOf"):
        if name in schema:
            if not isinstance(schema[name], list) or not schema[name]:
                raise ClientError(f"{name} must be a list that isn't empty, got {schema[name]!r:.60}", param="tools")
            return name, schema[name]
    return None


def apart(branches: Sequence[Json]) -> bool:
    """No two of them take the same type."""
    kinds = [{"number" if kind == "integer" else kind for kind in kinds_of(one)} for one in branches]
    return all(kinds) and sum(map(len, kinds)) == len(set().union(*kinds))


def kinds_of_value(value: Any) -> set[str]:
    """Types that a value is of."""
    if isinstance(value, bool):
        return {"boolean"}
    if isinstance(value, (int, float)):
        return {"number", "integer"} if isinstance(value, int) or value.is_integer() else {"number"}
    names = {str: "string", type(None): "null", list: "array"}
    return {names.get(type(value), "object")}


def same(one: Any, other: Any) -> bool:
    """As JSON, where true isn't 1."""
    return bool(one == other) and isinstance(one, bool) == isinstance(other, bool)
