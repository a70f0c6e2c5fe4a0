"""Tools' schemas that are none, or stand for far more than they say: refused as the caller's fault, whatever the format."""

from __future__ import annotations

import contextlib
import json
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvasir.cluster.tool_formats import TOOL_FORMATS
from kvasir.cluster.tool_use import tool_use
from kvasir.engine import argument_schema
from kvasir.engine.argument_check import check_arguments
from kvasir.engine.argument_style import style_json
from kvasir.engine.argument_text import _anchored
from kvasir.engine.errors import ClientError
from kvasir.engine.grammar_text import grammar_text
from kvasir.engine.loose_schema import loosened
from kvasir.engine.structural_tag import tag_grammar

COUNTED = [name for name, form in TOOL_FORMATS.items() if form.arguments is not None and form.arguments.texts != "json"]
"""The others have one rule for each parameter, whatever is in it."""


def forced(schema):
    return tool_use([{"type": "function", "function": {"name": "f", "parameters": schema}}], "required")


def branching(style, properties, branches):
    """A short text that stands for much: so many properties of so many branches each."""
    each = [{"type": "string", "minLength": n} for n in range(branches)]
    many = {"$ref": "#/$defs/many"} if style.texts == "raw" else {"anyOf": each}
    named = {f"a{n}": many if style.texts == "raw" else json.loads(json.dumps(many)) for n in range(properties)}
    return {"$defs": {"many": {"anyOf": each}}, "properties": named}


@pytest.mark.parametrize("name", COUNTED)
def test_what_schemas_stand_for_has_a_limit(name, monkeypatch):
    monkeypatch.setattr(argument_schema, "MAX_STEPS", 500)
    style = TOOL_FORMATS[name].arguments
    schema = branching(style, 50, 20)
    with pytest.raises(ClientError, match=r"more than 500 rules"):
        check_arguments(schema, style, exact=False)
    with pytest.raises(ClientError, match=r"more than 500 rules"):
        forced(schema).held(TOOL_FORMATS[name])
    tag = {"type": "arguments", **style_json(style), "json_schema": schema, "lenient": True}
    with pytest.raises(ClientError, match=r"more than 500 rules"):
        tag_grammar({"format": tag}, {})


def test_letters_of_several_bytes_in_a_schema_at_fault():
    """The grammar library cuts what it says of it behind 100 bytes, wherever that is, and panics."""
    for length in range(70, 100):
        schema = {"minItems": {"a": "x" * length + "ñ"}}
        assert loosened(schema) == (schema, ())


def test_the_limit_is_fifty_thousand():
    style = TOOL_FORMATS["qwen3_coder"].arguments
    with pytest.raises(ClientError, match=r"more than 50000 rules"):
        check_arguments(branching(style, 500, 200), style, exact=False)


ODD = [
    {"properties": ["a"]},
    {"required": 5},
    {"properties": {"a": {"type": "array", "minItems": "x"}}},
    {"properties": {"a": {"type": "array", "items": {"type": "string"}, "maxItems": True}}},
    {"properties": {"a": {"type": "array", "items": {"$ref": "#/properties/a"}}}},
    {"properties": {"a": {"anyOf": [{"$ref": "#/properties/a"}, {"type": "string"}]}}},
    {"properties": {"a": {"type": "object", "properties": ["b"]}}},
    {"properties": {"a": {"type": "object", "properties": {"b": {}}, "required": 5}}},
    {"properties": {"a": {"type": "string", "format": ["date"]}}},
    {"properties": {"a": {"type": "string", "pattern": {}}}},
    {"properties": {"a": {"type": "string", "maxLength": -1}}},
    {"properties": {"a": {"anyOf": []}}},
    {"properties": {"a": {"enum": []}}},
    {"properties": {"a": {"enum": [10**400]}}},
    {"properties": {"a": 5}},
    {"properties": {"a": {"$ref": "#/properties/a"}}},
]


def compiled(use, form):
    """Its grammar, or an error that says whose fault it is."""
    with contextlib.suppress(ClientError):
        wanted = use.held(form).grammar
        if wanted is not None:
            grammar_text(wanted, {})


@pytest.mark.parametrize("name", TOOL_FORMATS)
def test_odd_schemas_are_the_callers_fault(name):
    form = TOOL_FORMATS[name]
    for schema in ODD:
        tools = [{"type": "function", "function": {"name": "f", "parameters": schema}}]
        for choice in ("auto", "required"):
            compiled(tool_use(tools, choice), form)
    if form.arguments is not None and form.arguments.texts != "json":
        for schema in ODD[:2]:
            for exact in (True, False):
                with pytest.raises(ClientError, match=r"properties must|required must"):
                    check_arguments(schema, form.arguments, exact=exact)


def test_schemas_have_a_depth():
    deep = {"type": "string"}
    for _ in range(400):
        deep = {"anyOf": [deep]}
    with pytest.raises(ClientError, match="nested 128 levels at most"):
        forced({"properties": {"a": deep}})


WORDS = st.sampled_from([
    "a", "b", "type", "properties", "required", "items", "anyOf", "oneOf", "enum", "const", "minItems", "maxItems", "minLength",
    "maxLength", "pattern", "format", "$ref", "#", "#/properties/a", "#/$defs/b", "$defs", "additionalProperties", "minimum",
    "string", "integer", "array", "object", "boolean", "null", "date", "^a$", "(",
])  # fmt: skip
JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | WORDS
    | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(WORDS, inner, max_size=4),
    max_leaves=20,
)
SCHEMA = st.recursive(
    JSON | st.builds(lambda name: {"$ref": name}, st.sampled_from(["#/properties/a", "#/properties/b", "#/properties/a/items"])),
    lambda inner: st.fixed_dictionaries(
        {"type": st.sampled_from(["string", "array", "object", "integer", ["string", "null"], "x"])},
        optional={"items": inner, "properties": st.dictionaries(WORDS, inner, max_size=2), "minItems": JSON, "required": JSON,
                  "maxLength": JSON, "pattern": JSON, "format": JSON},
    ) | st.fixed_dictionaries({"enum": JSON}) | st.fixed_dictionaries({"anyOf": st.lists(inner, max_size=3)}),
    max_leaves=8,
)  # fmt: skip


@given(
    st.dictionaries(st.sampled_from(["a", "b"]), SCHEMA, min_size=1),
    st.fixed_dictionaries({}, optional={"required": JSON, "additionalProperties": SCHEMA, "a": JSON}),
    st.booleans(),
)
@settings(max_examples=60)
def test_any_schema_gives_a_grammar_or_the_callers_fault(properties, more, strict):
    schema = {"properties": properties, **more, "type": "object"}
    tools = [{"type": "function", "function": {"name": "f", "parameters": schema, "strict": strict}}]
    for form in TOOL_FORMATS.values():
        for choice in ("auto", "required"):
            compiled(tool_use(tools, choice), form)
        if form.arguments is not None:
            with contextlib.suppress(ClientError):
                check_arguments(schema, form.arguments, exact=strict)


@given(st.text(alphabet="a^$[]\\", max_size=12))
def test_anchors_are_found_outside_of_classes(pattern):
    """In one pass, as the pattern says it that looks ahead from each of them."""
    assert _anchored(pattern) == (re.search(r"(?<!\\)[\^$](?![^\[]*\])", pattern) is not None)


def test_a_long_pattern_takes_no_longer_than_it_is():
    schema = {"properties": {"a": {"type": "string", "pattern": "[" + "^" * 1_000_000 + "]"}}}
    check_arguments(schema, TOOL_FORMATS["qwen3_coder"].arguments, exact=True)
