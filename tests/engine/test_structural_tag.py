"""Structural tags: grammars in them, and nothing in them is overlooked."""

from __future__ import annotations

import pytest
from llguidance import LLMatcher, LLTokenizer

from kvasir.engine.errors import ClientError, UnsupportedError
from kvasir.engine.grammar_text import grammar_text
from kvasir.engine.request import StructuredOutput

TAG = {"begin": "<a>", "content": {"type": "any_text"}, "end": "</a>"}


@pytest.mark.parametrize("grammar", ['root ::= "x" [0-9]+ "}"', 'start: "x" /[0-9]+/ "}"\n%ignore " "\n'])
def test_a_grammar_in_a_tag(grammar):
    """As xgrammar has it, and in Lark: what it ignores is ignored in it alone."""
    form = {"type": "tag", "begin": "<g> ", "content": {"type": "grammar", "grammar": grammar}, "end": "</g>"}
    text = grammar_text(StructuredOutput(structural_tag={"type": "structural_tag", "format": form}), {})
    tokenizer = LLTokenizer("byte")
    matcher = LLMatcher(tokenizer, LLMatcher.grammar_from_lark(text), log_level=0)
    assert not matcher.is_error(), matcher.get_error()
    for said, holds in (("<g> x12}</g>", True), ("<g> x}</g>", False), ("<g>x12}</g>", False), ("<g> x12</g>", False)):
        ids, one = list(said.encode()), matcher.deep_copy()
        assert (one.try_consume_tokens(ids) == len(ids) and one.is_accepting()) is holds, said


@pytest.mark.parametrize(
    ("form", "word"),
    [
        ({"type": "any_text", "excludes": ["<x>"]}, "excludes of any_text"),
        ({"type": "regex", "pattern": "a", "excludes": ["b"]}, "excludes of regex"),
        ({"type": "json_schema", "json_schema": {}, "style": "qwen_xml"}, "style of json_schema"),
        ({"type": "triggered_tags", "triggers": ["<a"], "tags": [TAG], "excludes": ["<b>"]}, "excludes of triggered"),
        ({"type": "triggered_tags", "triggers": ["<a"], "tags": [{**TAG, "x": 1}]}, "x of tag"),
        ({"type": "tags_with_separator", "tags": [{**TAG, "x": 1}], "separator": ","}, "x of tag"),
        ({**TAG, "type": "tag", "max": 3}, "max of tag"), ({**TAG, "type": "tag", "end": ["a", "b"]}, "end must be a text"),
    ],
)  # fmt: skip
def test_fields_that_would_change_something_are_refused_by_name(form, word):
    with pytest.raises(ClientError, match=word):
        grammar_text(StructuredOutput(structural_tag={"type": "structural_tag", "format": form}), {})


@pytest.mark.parametrize(
    ("spec", "word"),
    [
        ({"format": {"type": "any_text"}, "begin": "a"}, "begin of a structural tag"),
        ({"structures": [{"begin": "<a>", "end": "", "x": 1}], "triggers": ["<a"]}, "x of structures"),
    ],
)
def test_so_are_those_around_them(spec, word):
    with pytest.raises(UnsupportedError, match=word):
        grammar_text(StructuredOutput(structural_tag=spec), {})


def test_fields_that_say_nothing_pass():
    form = {"type": "sequence", "elements": [
        {"type": "any_text", "excludes": []}, {"type": "json_schema", "json_schema": {}, "style": "json"},
    ]}  # fmt: skip
    assert "%json" in grammar_text(StructuredOutput(structural_tag={"type": "structural_tag", "format": form}), {})


@pytest.mark.parametrize(
    ("option", "name"), [("temperature=0.5", "temperature"), ('stop="b"', "stop"), ('lazy, stop = "b"', "stop")]
)
def test_what_a_lark_rule_asks_of_a_sampler_is_refused(option, name):
    with pytest.raises(UnsupportedError, match=f"line 2: {name}"):
        grammar_text(StructuredOutput(grammar=f"start: x\nx[{option}]: /[a-z]+/"), {})
