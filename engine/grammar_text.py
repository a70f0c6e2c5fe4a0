"""A `StructuredOutput` as the text that llguidance compiles. ClientError and UnsupportedError say what can't be."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from llguidance import LLMatcher

from kvasir.engine.errors import ClientError
from kvasir.engine.request import StructuredOutput
from kvasir.engine.schema import COMPACT_RULES, JSON_RULES, MAX_DEPTH, check_depth, narrowed
from kvasir.engine.structural_tag import context_free, tag_grammar

MAX_BYTES = 1 << 20
"""Of a schema, regex, grammar or all choices."""


def grammar_text(wanted: StructuredOutput, special: Mapping[str, int]) -> str:
    """`special`: added tokens by their text, which structural tags may name."""
    check_size(wanted)
    rules = COMPACT_RULES if wanted.disable_any_whitespace else JSON_RULES
    if wanted.json is not None:
        return LLMatcher.grammar_from_json_schema(json.dumps(narrowed(parse_schema(wanted.json))), overrides=rules)
    if wanted.json_object:
        return LLMatcher.grammar_from_json_schema('{"type": "object"}', overrides=rules)
    if wanted.regex is not None:
        return LLMatcher.grammar_from_regex(wanted.regex)
    if wanted.choice:
        return LLMatcher.grammar_from_lark("start: " + " | ".join(quoted(text) for text in wanted.choice))
    if wanted.structural_tag is not None:
        spec = _parsed(wanted.structural_tag, "structural_tag")
        check_depth(spec, 2 * MAX_DEPTH, "a structural tag")
        return tag_grammar(spec, special, rules)
    return LLMatcher.grammar_from_lark(context_free(wanted.grammar or ""))


def parse_schema(text: str) -> dict[str, Any]:
    """A JSON Schema that isn't false; `true` is `{}`."""
    schema = _parsed(text, "json")
    if schema is True:
        return {}
    if not isinstance(schema, dict):
        raise ClientError(f"a JSON Schema is an object or true, got {text!r:.60}", param="structured_outputs")
    if "x-guidance" in schema:
        raise ClientError("x-guidance isn't a keyword of JSON Schema", param="structured_outputs")
    check_depth(schema)
    return schema


def check_size(wanted: StructuredOutput) -> None:
    """ClientError when it is longer than MAX_BYTES."""
    texts = (wanted.json, wanted.regex, wanted.grammar, wanted.structural_tag, *wanted.choice)
    size = sum(len(text.encode(errors="replace")) for text in texts if text)
    if size > MAX_BYTES:
        raise ClientError(f"structured output takes {MAX_BYTES} bytes at most, got {size}", param="structured_outputs")


def quoted(text: str) -> str:
    """A literal of Lark's."""
    return json.dumps(text)


def _parsed(text: str, kind: str) -> Any:
    try:
        return json.loads(text, parse_float=_number, parse_constant=_number)
    except (ValueError, RecursionError) as error:
        raise ClientError(f"structured output: {kind} isn't JSON: {error}", param="structured_outputs") from error


def _number(text: str) -> float | int:
    """2.0 is 2 in JSON Schema, and the library takes no other for a count; above 2^53 floats aren't exact."""
    value = float(text)
    if not math.isfinite(value):  # json reads NaN, Infinity and what is too large for a float
        raise ValueError(f"{text:.30} is no number")
    return int(value) if value.is_integer() and abs(value) < 2**53 else value
