"""JSON without whitespace between its marks: `disable_any_whitespace`."""

from __future__ import annotations

import json

import pytest
from llguidance import LLMatcher, LLTokenizer

from kvasir.engine import LLM, SamplingParams
from kvasir.engine.errors import ClientError
from kvasir.engine.grammar_text import grammar_text
from kvasir.engine.request import StructuredOutput

BYTES = LLTokenizer("byte")
SCHEMA = json.dumps({"type": "object", "properties": {"a": {"type": "array"}, "b": {"type": "string"}}})
TAG = {"type": "sequence", "elements": [{"type": "const_string", "value": "{ "}, {"type": "json_gap"},
                                        {"type": "json_schema", "json_schema": {"type": "object"}}]}  # fmt: skip


def accepts(wanted, text):
    matcher = LLMatcher(BYTES, _grammar(wanted), log_level=0)
    assert not matcher.is_error(), matcher.get_error()
    ids = list(text.encode())
    return matcher.try_consume_tokens(ids) == len(ids) and matcher.is_accepting()


def _grammar(wanted):
    text = grammar_text(wanted, {})
    return LLMatcher.grammar_from_lark(text) if wanted.structural_tag else text


@pytest.mark.parametrize(
    ("kind", "value", "before"),
    [
        ("json", SCHEMA, ""), ("json", "true", ""), ("json_object", True, ""),
        ("structural_tag", json.dumps({"type": "structural_tag", "format": TAG}), "{ "),
    ],
)  # fmt: skip
def test_no_whitespace(kind, value, before):
    loose, compact = (StructuredOutput(**{kind: value}, disable_any_whitespace=compact) for compact in (False, True))
    for text in ('{"a":[1,{"x":"c d"}],"b":"e, f: g"}', "{}", '{"a":[]}'):
        assert accepts(loose, before + text)
        assert accepts(compact, before + text)
    for text in ('{ "a":[]}', '{"a": []}', '{"a":[1, 2]}', '{"a":[] ,"b":""}', "{}\n", " {}"):
        assert not accepts(compact, before + text), text
    assert accepts(loose, before + '{ "a": [1, 2]}')


def test_a_model_writes_none():
    schema = {"properties": {"a": {"enum": [1, 2]}, "b": {"enum": ["x y", " "]}}, "required": ["a", "b"]}
    wanted = StructuredOutput(
        json=schema | {"type": "object", "additionalProperties": False}, disable_any_whitespace=True
    )
    with LLM("skald") as llm:
        sampling = SamplingParams(structured_outputs=wanted, max_tokens=60, seed=1, n=8)
        ended = [
            one.text
            for one in llm.generate(["Hello"], sampling, use_tqdm=False)[0].outputs
            if one.finish_reason == "stop"
        ]
    assert ended
    assert all(text == json.dumps(json.loads(text), separators=(",", ":")) for text in ended)


@pytest.mark.parametrize(("kind", "value"), [("regex", "a"), ("choice", ["a"]), ("grammar", 'start: "a"')])
def test_other_kinds_tell_it_themselves(kind, value):
    with pytest.raises(ClientError, match=f"disable_any_whitespace is of json.*{kind}"):
        StructuredOutput(**{kind: value}, disable_any_whitespace=True)
