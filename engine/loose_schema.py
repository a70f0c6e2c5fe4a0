"""A JSON Schema where nobody was promised that all of it holds: without the patterns that can't be enforced."""

from __future__ import annotations

import json
from functools import lru_cache
from typing import Any

from kvasir.engine.errors import ClientError
from kvasir.engine.schema import JSON_RULES, narrowed

KEPT = 1024
"""Schemas and patterns that are remembered: agents send the same tools with each turn."""
KEPT_CHARS = 16384
"""Longer ones aren't."""
MAX_PATTERNS = 200
"""That are tried one by one."""
_MAPS = frozenset({"properties", "$defs", "definitions", "dependentSchemas", "patternProperties"})
_VALUES = frozenset({"enum", "const", "default", "examples", "example", "required"})


def loosened(schema: dict[str, Any]) -> tuple[dict[str, Any], tuple[str, ...]]:
    """(the schema, what of it isn't enforced). What is no schema at all stays as it is: its compiler says why."""
    given = json.dumps(schema)
    text, told = (_loosened if len(given) <= KEPT_CHARS else _loosened.__wrapped__)(given)
    return (schema if text is None else json.loads(text)), told


def enforceable(pattern: str) -> bool:
    """Whether the grammar library knows all of a regular expression."""
    return (_enforceable if len(pattern) <= KEPT_CHARS else _enforceable.__wrapped__)(pattern)


@lru_cache(KEPT)
def _enforceable(pattern: str) -> bool:
    return _problems({"type": "string", "pattern": pattern})[0]


@lru_cache(KEPT)
def _loosened(text: str) -> tuple[str | None, tuple[str, ...]]:
    """As `loosened`; None: it stays as it is."""
    schema = json.loads(text)
    fits, told = _problems(schema)
    if fits:
        return None, told
    search = _Search()
    loose = search.without(schema)
    return json.dumps(loose), (*search.dropped, *(_problems(loose)[1] if search.dropped else ()))


def _problems(schema: dict[str, Any]) -> tuple[bool, tuple[str, ...]]:
    """(it compiles, the keywords that are skipped over)."""
    from llguidance import LLMatcher  # a gateway that sees no tools starts sooner without it

    from kvasir.engine.grammar import LIMITS

    text = f"start: %json {json.dumps({**narrowed(schema), 'x-guidance': JSON_RULES | {'lenient': True}})}\n"
    failed, said = LLMatcher.validate_grammar_with_warnings(LLMatcher.grammar_from_lark(text), limits=LIMITS)
    return not failed, () if failed else tuple(_told(one) for one in said)


def _told(warning: str) -> str:
    """The library's words, shorter."""
    kind, _, what = warning.partition(": ")
    if kind == "Unimplemented keys":
        return ", ".join(json.loads(what))
    return f"format {what!r:.60}" if kind == "Unknown format" else warning.partition(" ")[0]


class _Search:
    """For patterns that don't compile."""

    def __init__(self) -> None:
        self.dropped: list[str] = []
        self._tried = 0

    def without(self, schema: Any) -> Any:
        """`schema` without them."""
        if isinstance(schema, list):
            return [self.without(one) for one in schema]
        if not isinstance(schema, dict):
            return schema
        found = {}
        for key, value in schema.items():
            if self._drops(key, value):
                continue
            if key in _MAPS and isinstance(value, dict):
                found[key] = {name: self.without(one) for name, one in value.items()}
            else:
                found[key] = value if key in _VALUES else self.without(value)
        return found

    def _drops(self, key: str, value: Any) -> bool:
        if key not in ("pattern", "patternProperties"):
            return False
        self._tried += 1
        if self._tried > MAX_PATTERNS:
            text = f"a schema holds more than {MAX_PATTERNS} patterns, and one that can't be enforced"
            raise ClientError(f"{text}: leave it out", param="tools")
        if key == "pattern":
            drops = isinstance(value, str) and not enforceable(value)
        else:
            drops = not _problems({key: value})[0]
        if drops:
            self.dropped.append(f"pattern {value!r:.60}" if key == "pattern" else key)
        return drops
