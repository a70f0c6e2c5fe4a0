"""Tools whose schemas hold what no grammar can enforce: the rest holds, and what doesn't is told or refused."""

from __future__ import annotations

import json
import threading

import grpc
import httpx
import pytest
from llguidance import LLMatcher, LLTokenizer

from kvasir.cluster.tool_formats import TOOL_FORMATS
from kvasir.cluster.tool_use import ToolUse, tool_use
from kvasir.engine.errors import ClientError, UnsupportedError
from kvasir.engine.loose_schema import MAX_PATTERNS, loosened
from kvasir.engine.request import StructuredOutput
from kvasir.engine.structural_tag import tag_grammar
from kvasir.proto import inference_pb2 as pb
from kvasir.proto.inference_pb2_grpc import InferenceStub

NODE = {"type": "object", "properties": {"next": {"$ref": "#/$defs/node"}}}
ODD = {
    "$defs": {"node": NODE},
    "type": "object",
    "properties": {
        "days": {"type": "integer"},
        "code": {"type": "string", "pattern": "(?=a)b"},
        "parts": {"type": "array", "items": {"type": "string"}, "uniqueItems": True},
        "phone": {"type": "string", "format": "phone"},
        "place": {"enum": [{"x": 1}]},
        "head": {"$ref": "#/$defs/node"},
        'a "name"': {"type": "string"},
        "either": {"anyOf": [{"type": "string"}, {}]},
    },
}
"""In each format some of it can't be enforced."""
NAMED_TOOL = {"type": "function", "function": {"name": "odd"}}
PING = {"properties": {"n": {"type": "integer"}}, "additionalProperties": False}


def tool(name, schema, **more):
    return {"type": "function", "function": {"name": name, "parameters": schema, **more}}


def compiled(wanted):
    grammar = LLMatcher.grammar_from_lark(tag_grammar(json.loads(wanted.structural_tag), {}))
    return LLMatcher(LLTokenizer("byte"), grammar, log_level=0)


def accepts(matcher, text):
    ids, matcher = list(text.encode()), matcher.deep_copy()
    return matcher.try_consume_tokens(ids) == len(ids)


@pytest.mark.parametrize("name", TOOL_FORMATS)
def test_the_others_are_held_and_what_isnt_is_told(name):
    form = TOOL_FORMATS[name]
    held = tool_use([tool("odd", ODD), tool("ping", PING)], "auto").held(form)
    assert held.form is form
    assert any("pattern '(?=a)b' in tool odd" in one for one in held.unheld)
    assert not any("ping" in one for one in held.unheld)
    matcher = compiled(held.grammar)
    assert not matcher.is_error(), matcher.get_error()
    if form.whole is None:
        assert accepts(matcher, "It rains.")
        begin = form.wrap[0] + form.call[0].replace("NAME", "ping").replace("{number}", "0")
        assert accepts(matcher, begin)
        if form.arguments is None:
            assert accepts(matcher, begin + '{"n": 5')
            assert not accepts(matcher, begin + '{"n": "')


def test_a_pattern_in_one_parameter_leaves_the_rest_held():
    form = TOOL_FORMATS["qwen3_coder"]
    schema = {"properties": {"days": {"type": "integer"}, "code": {"type": "string", "pattern": "a|^b$"}}}
    held = tool_use([tool("odd", schema)], "auto").held(form)
    assert held.unheld == ("pattern 'a|^b$' in tool odd (can't be enforced)",)
    matcher = compiled(held.grammar)
    text = "<tool_call>\n<function=odd>\n<parameter=days>\nN\n</parameter>\n<parameter=code>\nzz\n</parameter>\n</function>\n"
    assert accepts(matcher, text.replace("N", "5"))
    assert not accepts(matcher, text.replace("N", "five"))


def test_values_that_hold_themselves():
    """In braces of a kind of its own a value of any depth can't be told; a few levels can."""
    form = TOOL_FORMATS["gemma4"]
    held = tool_use([tool("odd", ODD)], "auto").held(form)
    matcher = compiled(held.grammar)
    begin = form.wrap[0] + form.call[0].replace("NAME", "odd")
    assert accepts(matcher, begin + "head:{next:{next:{}}}")
    assert any("holds itself" in one for one in held.unheld)


def test_strict_tools_and_forced_ones_are_refused_by_name():
    strict = [tool("odd", {"properties": {"code": {"type": "string", "pattern": "a|^b$"}}}, strict=True)]
    with pytest.raises(UnsupportedError, match=r"'odd' is strict.*pattern 'a\|\^b\$'"):
        tool_use(strict, "auto").held(TOOL_FORMATS["qwen3_coder"])
    for choice, given in (("required", {}), (NAMED_TOOL, {}), ("auto", {"strict": True})):
        for keyword, value in (("pattern", "(?=a)b"), ("not", {}), ("format", "phone")):
            tools = [tool("odd", {"properties": {"code": {"type": "string", keyword: value}}}, **given)]
            for form in ("hermes", "qwen3_coder", "gemma4"):
                with pytest.raises(UnsupportedError, match=f"tool 'odd'.*{keyword}") as caught:
                    tool_use(tools, choice).held(TOOL_FORMATS[form])
                assert caught.value.param == "tools"


def test_what_can_be_enforced_in_other_words_is():
    schema = {"properties": {"n": {"oneOf": [{"const": 1}, {"const": 2}]}}}
    for choice in ("required", "auto"):
        held = tool_use([tool("odd", schema)], choice).held(TOOL_FORMATS["hermes"])
        assert not held.unheld
        assert not compiled(held.grammar).is_error()


def test_patterns_that_cant_be_enforced_have_a_limit():
    schema = {"properties": {f"a{n}": {"type": "string", "pattern": f"(?=a)b{n}"} for n in range(MAX_PATTERNS + 1)}}
    with pytest.raises(ClientError, match=f"more than {MAX_PATTERNS} patterns"):
        tool_use([tool("odd", schema)], "auto").held(TOOL_FORMATS["hermes"])


def test_values_arent_patterns():
    schema = {"properties": {"pattern": {"enum": [{"pattern": "(?=a)"}]}, "b": {"type": "string", "pattern": "(?!a)"}}}
    loose, told = loosened(schema)
    assert loose["properties"] == {"pattern": {"enum": [{"pattern": "(?=a)"}]}, "b": {"type": "string"}}
    assert told == ("pattern '(?!a)'",)


# -- over the wire

UNIQUE = {"type": "object", "properties": {"a": {"uniqueItems": True}}}
ASK = {"messages": [{"role": "user", "content": "?"}], "tools": [tool("odd", UNIQUE)]}
FLAT = [{"type": "function", "name": "odd", "parameters": UNIQUE}]
NAMED = [{"name": "odd", "input_schema": UNIQUE}]
TOLD = "uniqueItems in tool odd (can't be enforced)"


def test_warned_and_built_once_off_the_loop(thinker, monkeypatch):
    built, build = [], ToolUse.held

    def held(self, *given):
        built.append(threading.current_thread().name)
        return build(self, *given)

    monkeypatch.setattr(ToolUse, "held", held)
    for choice, status in (("auto", 200), ("required", 400)):
        reply = httpx.post(thinker.url + "/v1/chat/completions", json=ASK | {"tool_choice": choice})
        assert reply.status_code == status
        assert (reply.headers.get("x-kvasir-warning") == "ignored: " + TOLD) == (choice == "auto")
        assert status == 200 or reply.json()["error"]["message"].startswith("tool 'odd' is forced")
    assert [name.startswith("tools") for name in built] == [True, True]
    assert isinstance(thinker.group.requests[-1].sampling.structured_outputs, StructuredOutput)


@pytest.mark.parametrize(
    ("path", "ask"),
    [
        ("/v1/responses", {"input": "?", "tools": FLAT}),
        ("/v1/responses", {"input": "?", "tools": FLAT, "background": True}),
        ("/v1/messages", {"max_tokens": 9, "messages": ASK["messages"], "tools": NAMED}),
        ("/api/chat", {**ASK, "stream": False}),
    ],
)
def test_told_in_every_dialect(thinker, path, ask):
    reply = httpx.post(thinker.url + path, json={"model": "bytes", **ask})
    assert (reply.status_code, TOLD in reply.headers.get("x-kvasir-warning", "")) == (200, True), reply.text


def test_told_over_grpc(thinker):
    ask = pb.ChatRequest(messages=[pb.Message(role="user", content="?")])
    ask.tools.add(name="odd").parameters.update({"properties": {"a": {"uniqueItems": True}}})
    with grpc.insecure_channel(thinker.grpc_address) as channel:
        call = InferenceStub(channel).Chat(ask)
        list(call)
    assert TOLD in dict(call.trailing_metadata())["x-kvasir-warning"]


@pytest.mark.parametrize(
    ("path", "ask", "name"),
    [
        ("/v1/chat/completions", {"tools": [tool("a", {})], "response_format": {"type": "json_object"}}, "response_format"),
        ("/v1/chat/completions", {"tools": [tool("a", {})], "guided_regex": "a"}, "guided_regex"),
        ("/api/chat", {"tools": [tool("a", {})], "format": "json", "stream": False}, "format"),
    ],
)  # fmt: skip
def test_what_holds_for_no_answer_is_told(thinker, path, ask, name):
    """A forced call leaves no answer that could be structured."""
    told = f"{name} (tool_choice makes every answer a call)"
    for choice in ("required", "none"):
        reply = httpx.post(
            thinker.url + path, json={"messages": ASK["messages"], "tool_choice": choice, **ask, "model": "bytes"}
        )
        assert (told in reply.headers.get("x-kvasir-warning", "")) is (choice == "required"), reply.text
