"""What a request may say of tools, and the grammars that hold answers to their calls."""

from __future__ import annotations

import json
import random

import pytest
from llguidance import LLMatcher, LLTokenizer
from tool_samples import OTHER, SAMPLES, TOOL, read

from kvasir.cluster.tool_formats import TOOL_FORMATS
from kvasir.cluster.tool_use import tool_use
from kvasir.engine.errors import ClientError, UnsupportedError
from kvasir.engine.grammar_text import grammar_text
from kvasir.engine.request import StructuredOutput
from kvasir.engine.structural_tag import tag_grammar


@pytest.mark.parametrize(
    ("tools", "choice", "param", "word"),
    [
        ([{"type": "web_search"}], None, "tools", "function"),
        ([{"type": "function"}], None, "tools", "function"),
        ([{"type": "function", "function": {"name": ""}}], None, "tools", "name"),
        ([{"type": "function", "function": {"name": 'a"b'}}], None, "tools", "name"),
        ([{"type": "function", "function": {"name": "a", "parameters": []}}], None, "tools", "JSON Schema"),
        ([{"type": "function", "function": {"name": "a", "parameters": {"type": "array"}}}], None, "tools", "object"),
        ([TOOL, TOOL], None, "tools", "twice"),
        ([TOOL], "sometimes", "tool_choice", "auto"),
        ([TOOL], {"type": "function", "function": {"name": "other"}}, "tool_choice", "isn't in tools"),
        ([TOOL], {"type": "function"}, "tool_choice", "name"),
        ([], "required", "tool_choice", "needs tools"),
        ([OTHER] * 513, None, "tools", "512"),
        ([OTHER], {"type": "allowed_tools", "tools": [{"name": "ping"}] * 2}, "tool_choice", "'ping' twice"),
        ([OTHER], {"type": "allowed_tools", "tools": [{"name": "ping"}] * 10**6}, "tool_choice", "512"),
    ],
)
def test_what_a_request_may_not_say(tools, choice, param, word):
    with pytest.raises(ClientError, match=word) as caught:
        tool_use(tools, choice)
    assert caught.value.param == param


def grammar_of(use, form):
    return use.held(TOOL_FORMATS.get(form)).grammar


def accepts(wanted, text):
    """The grammar takes the whole text, byte by byte."""
    return accepts_in(tag_grammar(json.loads(wanted.structural_tag), {}), text)


def accepts_in(grammar, text):
    tokenizer = LLTokenizer("byte")
    matcher = LLMatcher(tokenizer, LLMatcher.grammar_from_lark(grammar), log_level=0)
    assert not matcher.is_error(), matcher.get_error()
    ids = tokenizer.tokenize_str(text)
    return matcher.try_consume_tokens(ids) == len(ids) and matcher.is_accepting()


HARD = {
    "type": "function",
    "function": {"name": "hard", "parameters": {"properties": {"a": {"allOf": [{"type": "string"}]}}}},
}
ENFORCED = [name for name, form in TOOL_FORMATS.items() if form.arguments is None]
"""Those with JSON in them; others: test_tool_arguments.py."""


@pytest.mark.parametrize("form", ENFORCED)
def test_what_a_grammar_lets_through_is_read_as_a_call(form):
    """Forced, the model writes what its own format's reader understands, and nothing else."""
    known = TOOL_FORMATS[form]
    use = tool_use([TOOL, OTHER], "required")
    begin, end = known.call
    before, between, behind = known.wrap
    begin = begin.replace("{number}", "3").replace("{id}", "x-1")
    one = begin.replace("NAME", "get_weather") + '{"city": "Oslo", "days": 3}' + end
    two = begin.replace("NAME", "ping") + "{}" + end
    wrong = begin.replace("NAME", "get_weather") + '{"city": 5}' + end
    wanted = grammar_of(use, form)
    for text, expected in ((one, 1), (one + between + two, 2)):
        assert accepts(wanted, before + text + behind)
        answer = read(form, before + text + behind, schemas=use.schemas)
        assert [call.name for call in answer.calls] == ["get_weather", "ping"][:expected]
        assert json.loads(answer.calls[0].arguments) == {"city": "Oslo", "days": 3}
    assert not accepts(wanted, before + wrong + behind)
    assert not accepts(wanted, "Hello")
    single = grammar_of(tool_use([TOOL, OTHER], "required", parallel=False), form)
    assert accepts(single, before + one + behind)
    assert not accepts(single, before + one + between + two + behind)
    named = grammar_of(tool_use([TOOL, OTHER], {"type": "function", "function": {"name": "ping"}}), form)
    assert accepts(named, before + two + behind)
    assert not accepts(named, before + one + behind)


@pytest.mark.parametrize("form", [name for name in ENFORCED if TOOL_FORMATS[name].whole is None])
def test_a_free_choice_holds_calls_alone(form):
    known = TOOL_FORMATS[form]
    wanted = tool_use([TOOL], "auto").held(known).grammar
    begin, end = known.call
    begin, (before, _, behind) = begin.replace("{number}", "3"), known.wrap
    good = before + begin.replace("NAME", "get_weather") + '{"city": "Oslo"}' + end + behind
    bad = before + begin.replace("NAME", "get_weather") + '{"days": "x"}' + end + behind
    assert accepts(wanted, "It rains.")
    assert accepts(wanted, "Let me see. " + good)
    assert not accepts(wanted, "Let me see. " + bad)


def test_an_answer_beside_tools_may_have_a_schema():
    wanted = StructuredOutput(json='{"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}')
    held = tool_use([TOOL], "auto").held(TOOL_FORMATS["hermes"], instead=wanted).grammar
    assert accepts(held, '{"a": 1}')
    assert accepts(held, SAMPLES["hermes"])
    assert not accepts(held, "Hello")
    assert not accepts(held, '{"a": "b"}')
    tagged = tool_use([TOOL], "auto").held(TOOL_FORMATS["qwen3_coder"], instead=wanted).grammar
    assert accepts(tagged, '{"a": 1}')
    assert accepts(tagged, SAMPLES["qwen3_coder"])
    assert not accepts(tagged, "Hello")


def test_calls_beside_an_answer_without_whitespace_have_none_either():
    wanted = StructuredOutput(json='{"type": "object"}', disable_any_whitespace=True)
    held = tool_use([TOOL], "auto").held(TOOL_FORMATS["hermes"], instead=wanted).grammar
    grammar = grammar_text(held, {})
    call = '<tool_call>\n{"name": "get_weather", "arguments": %s}\n</tool_call>'
    for text, holds in (
        ('{"a":1}', True), ('{"a": 1}', False),
        (call % '{"city":"O s","days":2}', True), (call % '{"city": "Oslo"}', False),
    ):  # fmt: skip
        assert accepts_in(grammar, text) is holds, text


def test_an_answer_that_begins_as_a_call_needs_whitespace():
    wanted = StructuredOutput(json='{"type": "object"}', disable_any_whitespace=True)
    with pytest.raises(UnsupportedError, match=r"whitespace.*llama3_json"):
        tool_use([TOOL], "auto").held(TOOL_FORMATS["llama3_json"], instead=wanted)


def test_strict_tools_are_enforced_or_refused():
    """What a format with a tag for each argument can't hold is written as JSON where it must be held."""
    strict = {"type": "function", "function": {**HARD["function"], "strict": True}}
    with pytest.raises(UnsupportedError, match=r"'hard' is strict.*allOf"):
        tool_use([strict], "auto").held(TOOL_FORMATS["qwen3_coder"])
    assert tool_use([strict], "required").held(TOOL_FORMATS["qwen3_coder"]).form.name == "json"
    forced = tool_use([HARD], "required").held(TOOL_FORMATS["qwen3_coder"]).grammar
    assert accepts(forced, '[{"name": "hard", "arguments": {"a": "Oslo"}}]')


def test_allowed_tools_narrow_the_choice():
    choice = {
        "type": "allowed_tools",
        "allowed_tools": {"mode": "required", "tools": [{"type": "function", "name": "ping"}]},
    }
    use = tool_use([TOOL, OTHER], choice)
    assert (use.names, use.required, use.parallel) == (("ping",), True, True)


def test_bfcl_tools_have_grammars(data):
    """Functions of the Berkeley leaderboard, forced: each schema holds, or is refused by name."""
    seen, enforced = 0, 0
    tokenizer = LLTokenizer("byte")
    for file in sorted(data("tools-bfcl/questions").glob("*.json*")):
        for line in random.Random(0).sample(file.read_text().splitlines(), 30):
            functions = json.loads(line).get("function") or []
            functions = functions if isinstance(functions, list) else [functions]
            tools = [{"type": "function", "function": {**f, "parameters": plain(f["parameters"])}} for f in functions]
            if not tools or len({f["name"] for f in functions}) != len(functions):
                continue
            wanted = tool_use(tools, "required").held(TOOL_FORMATS["hermes"]).grammar
            grammar = LLMatcher.grammar_from_lark(tag_grammar(json.loads(wanted.structural_tag), {}))
            matcher = LLMatcher(tokenizer, grammar, log_level=0)
            seen += 1
            enforced += not matcher.is_error()
    assert seen > 60
    assert enforced == seen


def plain(schema):
    """BFCL writes Python's types."""
    if isinstance(schema, list):
        return [plain(one) for one in schema]
    if not isinstance(schema, dict):
        return schema
    names = {"dict": "object", "float": "number", "tuple": "array", "any": "string"}
    kinds = {key: plain(value) for key, value in schema.items()}
    if isinstance(kinds.get("type"), str):
        kinds["type"] = names.get(kinds["type"].lower(), kinds["type"].lower())
    if kinds.get("type") not in ("object", "array", "string", "integer", "number", "boolean", "null", None):
        kinds.pop("type")
    return {key: value for key, value in kinds.items() if key not in ("default", "format", "optional")}
