"""A JSON Schema where nobody was promised that all of it holds: without the patterns that can't be enforced."""

from __future__ import annotations

import json
from functools import lru_cache
from typing import Any

from kvasir.engine.argument_schema import Steps
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


def loosened(schema: dict[str, Any], steps: Steps | None = None) -> tuple[dict[str, Any], tuple[str, ...]]:
    """(the schema, what of it isn't enforced). What is no schema at all stays as it is: its compiler says why. `steps` limit how
    long it is looked at."""
    fits, told = _problems(schema)
    if fits:
        return schema, told
    search = _Search(steps or Steps())
    loose = search.without(schema)
    return loose, (*search.dropped, *(_problems(loose)[1] if search.dropped else ()))


def enforceable(pattern: str) -> bool:
    """Whether the grammar library knows all of a regular expression."""
    return _problems({"type": "string", "pattern": pattern})[0]


def _problems(schema: dict[str, Any]) -> tuple[bool, tuple[str, ...]]:
    """(it compiles, the keywords that are skipped over)."""
    text = json.dumps(schema)
    return (_found if len(text) <= KEPT_CHARS else _found.__wrapped__)(text)


@lru_cache(KEPT)
def _found(text: str) -> tuple[bool, tuple[str, ...]]:
    from llguidance import LLMatcher  # a gateway that sees no tools starts sooner without it

    from kvasir.engine.grammar import LIMITS

    rules = json.dumps({**narrowed(json.loads(text)), "x-guidance": JSON_RULES | {"lenient": True}})
    grammar = LLMatcher.grammar_from_lark(f"start: %json {rules}\n")
    try:
        failed, said = LLMatcher.validate_grammar_with_warnings(grammar, limits=LIMITS)
    except BaseException as error:  # it panics where it cuts its own message within a letter
        if type(error).__name__ != "PanicException":
            raise
        return False, ()
    return not failed, () if failed else tuple(_told(one) for one in said)


def _told(warning: str) -> str:
    """The library's words, shorter."""
    kind, _, what = warning.partition(": ")
    if kind == "Unimplemented keys":
        return ", ".join(json.loads(what))
    return f"format {what!r:.60}" if kind == "Unknown format" else warning.partition(" ")[0]


class _Search:
    """For patterns that don't compile."""

    def __init__(self, steps: Steps) -> None:
        self.dropped: list[str] = []
        self._tried, self._steps = 0, steps

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
        self._steps.check_time()
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
