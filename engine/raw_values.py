"""Values that are written as bare text, as formats with a tag for each argument do: what such a text means, by its schema."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

WORDS = {"true": True, "True": True, "false": False, "False": False, "null": None, "None": None}
"""JSON's and Python's."""
_KIND_OF_WORD = {True: "boolean", False: "boolean", None: "null"}
_MAX_REFERENCES = 32
MAX_BRANCHES = 256


def resolved(schema: Any, root: Any) -> Any:
    """What `schema` refers to, if it is but a reference into `root`."""
    for _ in range(_MAX_REFERENCES):
        if not isinstance(schema, Mapping) or not isinstance(name := schema.get("$ref"), str) or name[:2] != "#/":
            return schema
        found: Any = root
        for part in name[2:].split("/"):
            found = found.get(part.replace("~1", "/").replace("~0", "~")) if isinstance(found, Mapping) else None
        schema = found
    return schema


def opened(schema: Any, root: Any) -> Any:
    """The same, the branches of anyOf and oneOf too, however deep they are in such: up to MAX_BRANCHES."""
    return _opened(schema, root, [MAX_BRANCHES])


def _opened(schema: Any, root: Any, left: list[int]) -> Any:
    found = resolved(schema, root)
    if not isinstance(found, Mapping):
        return found
    lists = {}
    for name in ("anyOf", "oneOf"):
        if isinstance(branches := found.get(name), list) and left[0] >= len(branches):
            left[0] -= len(branches)
            lists[name] = [_opened(one, root, left) for one in branches]
    return {**found, **lists} if lists else found


def kinds_of(schema: Any) -> set[str]:
    """Types of JSON that a schema says it takes, as far as it says them; none: it doesn't."""
    if not isinstance(schema, Mapping):
        return set()
    kind = schema.get("type")
    found = {one for one in (kind if isinstance(kind, list) else [kind]) if isinstance(one, str)}
    for name in ("anyOf", "oneOf"):
        if isinstance(schema.get(name), list):
            found |= set().union(*map(kinds_of, schema[name]))
    values = schema["enum"] if isinstance(schema.get("enum"), list) else [schema["const"]] if "const" in schema else []
    if values and not found and all(isinstance(one, str) for one in values):
        return {"string"}
    return found


def typed(text: str, schema: Any) -> Any:
    """The value that a parameter's text means; without a schema, what it looks like."""
    kinds = kinds_of(schema)
    if kinds == {"string"}:
        return text
    stripped = text.strip()
    if stripped in WORDS:
        value = WORDS[stripped]
        return value if "string" not in kinds or _KIND_OF_WORD[value] in kinds else text
    try:
        value = json.loads(stripped)
    except (ValueError, RecursionError):
        return text
    if isinstance(value, str):
        return text
    written = "object" if isinstance(value, dict) else "array" if isinstance(value, list) else ""
    return value if "string" not in kinds or written in kinds else text
