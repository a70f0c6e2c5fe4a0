"""Custom tools: a text goes to the model's function with one argument, and comes back as it is."""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import re
from types import SimpleNamespace

import grpc
import httpx
import openai
import pytest
from fuzzing import examples
from grammar_walk import PLAIN, Bytes, accepts, matcher_of, walk
from grammar_walk import read as read_whole
from grpc_stubs import Stubs, ask, named, prompt_of, refused, whole
from hypothesis import given, settings
from hypothesis import strategies as st
from llguidance import LLMatcher
from responses_calls import events
from tool_samples import END, TOOL

from kvasir.cluster.custom_tools import CustomInput, custom_grammars, shown_tools
from kvasir.cluster.grpc_schema import ask_of_chat
from kvasir.cluster.openai_messages import template_messages
from kvasir.cluster.responses_items import input_items, messages
from kvasir.cluster.tool_formats import TOOL_FORMATS
from kvasir.cluster.tool_use import tool_use
from kvasir.engine import argument_schema, lark_text
from kvasir.engine.argument_schema import SlowSchemaError
from kvasir.engine.errors import UnsupportedError
from kvasir.engine.structural_tag import tag_grammar
from kvasir.proto import chats_pb2, inference_pb2, responses_pb2

CODE = 'print("hi")\n\\ 😀'
XML = f"<tool_call>\n<function=run>\n<parameter=input>\n{CODE}\n</parameter>\n</function>\n</tool_call>"
JSON = f"<tool_call>\n{json.dumps({'name': 'run', 'arguments': {'input': CODE}})}\n</tool_call>"
OTHER = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Bergen"}}\n</tool_call>'
FLAT = {"type": "custom", "name": "run", "description": "Runs code."}
CHAT = {"type": "custom", "custom": {"name": "run", "description": "Runs code."}}


def read(pieces):
    reader = CustomInput()
    return "".join(map(reader.feed, pieces)) + reader.finish()


@given(st.text(st.characters(), max_size=12) | st.text('\\u8dD0e"x{\ud83d\ude00', max_size=12), st.booleans())
@settings(max_examples=examples(200))
def test_the_input_is_read_however_it_is_cut(text, escaped):
    written = json.dumps({"input": text}) if escaped else '{"input":"' + text.replace('"', '\\"')
    if escaped:
        assert read([written]) == re.sub("[\ud800-\udfff]", "\ufffd", json.loads(written)["input"])
    assert read(written) == read([written])


def test_the_input_comes_as_it_is_written():
    reader = CustomInput()
    assert [*map(reader.feed, ('{"inp', 'ut": "a', "b\\", "n", '" }'))] == ["", "a", "b", "\n", ""]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ('{"x": 1, "input": "a"}', "a"), ('{"code": "a"}', '{"code": "a"}'), ('{"inp', ""), ("", ""),
        ('{"input": "a\\', "a"), ('{"input": "a\\ud83d', "a"), ('{"input": "a", "x": "b"}', "a"),
    ],
)  # fmt: skip
def test_other_arguments(arguments, said):
    assert read(arguments) == read([arguments]) == said


@pytest.fixture(params=[JSON, XML], ids=["hermes", "qwen3_coder"])
def runner(request, thinker, live_gateway):
    """A gateway whose model says something and calls the tool."""
    with contextlib.ExitStack() as stack:
        gateway = thinker
        if request.param == XML:
            gateway = stack.enter_context(live_gateway(tool_call_parser="qwen3_coder", reasoning_parser="think"))
        gateway.group.script = lambda *_: [*f"Well.\n{request.param}".encode(), END]
        yield gateway


def test_responses(runner):
    with openai.OpenAI(base_url=runner.url + "/v1", api_key="none", max_retries=0) as client:
        ask = {"model": "bytes", "input": "Go.", "tools": [FLAT], "tool_choice": "auto"}
        found = client.responses.create(**ask)
        said, call = found.output
        assert (said.type, call.type, call.name, call.input) == ("message", "custom_tool_call", "run", CODE)
        assert found.to_dict()["tools"] == [FLAT]
        sent = events(httpx.post(runner.url + "/v1/responses", json={**ask, "stream": True}, timeout=60).text)
        deltas = [one["delta"] for one in sent if one["type"] == "response.custom_tool_call_input.delta"]
        assert "".join(deltas) == CODE
        (done,) = (one for one in sent if one["type"] == "response.custom_tool_call_input.done")
        assert (done["input"], done["item_id"]) == (CODE, sent[-1]["response"]["output"][1]["id"])
        result = {"type": "custom_tool_call_output", "call_id": call.call_id, "output": "done"}
        client.responses.create(model="bytes", input=[result], previous_response_id=found.id, tools=[FLAT])
        prompt = bytes(i for i in runner.group.requests[-1].prompt_token_ids if i < 256)
        assert b"done" in prompt


def test_chats(runner):
    ask = {"model": "bytes", "messages": [{"role": "user", "content": "Go."}], "tools": [CHAT]}
    url = runner.url + "/v1/chat/completions"
    choice = httpx.post(url, json=ask, timeout=60).json()["choices"][0]
    (call,) = choice["message"]["tool_calls"]
    assert call == {"id": call["id"], "type": "custom", "custom": {"name": "run", "input": CODE}}
    assert choice["finish_reason"] == "tool_calls"
    lines = httpx.post(url, json={**ask, "stream": True}, timeout=60).text.split("\n\n")
    chunks = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
    calls = [one for chunk in chunks for one in chunk["choices"][0]["delta"].get("tool_calls", ())]
    assert calls[0] == {"index": 0, "id": calls[0]["id"], "type": "custom", "custom": {"name": "run", "input": ""}}
    assert "".join(one["custom"]["input"] for one in calls) == CODE
    with openai.OpenAI(base_url=runner.url + "/v1", api_key="none", max_retries=0) as client:
        message = client.chat.completions.create(**ask).choices[0].message
        assert message.tool_calls[0].custom.input == CODE


def test_other_arguments_and_text_behind_them(thinker):
    """They are the call's, not an item behind the text."""
    call = '<tool_call>\n{"name": "run", "arguments": {"code": "a"}}\n</tool_call>'
    thinker.group.script = lambda *_: [*f"{call}\nDone.".encode(), END]
    ask = {"model": "bytes", "input": "Go.", "tools": [FLAT]}
    output = httpx.post(thinker.url + "/v1/responses", json=ask, timeout=60).json()["output"]
    assert [item["type"] for item in output] == ["custom_tool_call", "message"]
    assert output[0]["input"] == '{"code": "a"}'


RUN = inference_pb2.Tool(type="custom", name="run", description="Runs code.")


def test_responses_over_grpc(runner):
    with Stubs(runner) as stubs:
        made = stubs.responses.Create(ask(tools=[RUN], tool_choice="run"), timeout=60)
        said, call = made.output
        assert (said.type, call.type, call.name, call.input) == ("message", "custom_tool_call", "run", CODE)
        sent = list(stubs.responses.CreateStream(ask(tools=[RUN]), timeout=60))
        deltas = [one.delta for one in sent if one.type == "response.custom_tool_call_input.delta"]
        (done,) = (one for one in sent if one.type == "response.custom_tool_call_input.done")
        assert "".join(deltas) == done.input == CODE
        assert done.item_id == sent[-1].response.output[1].id
        result = responses_pb2.Item(type="custom_tool_call_output", call_id=call.call_id, output="done")
        then = responses_pb2.CreateResponseRequest(input=[result], previous_response_id=made.id, tools=[RUN])
        stubs.responses.Create(then, timeout=60)
        assert "done" in prompt_of(runner)


def test_chats_over_grpc(runner):
    said = [inference_pb2.Message(role="user", content="Go.")]
    with Stubs(runner) as stubs:
        request = inference_pb2.ChatRequest(messages=said, tools=[RUN], tool_choice="run", store=True)
        replies = list(stubs.inference.Chat(request, timeout=60))
        parts = [call for reply in replies for call in reply.tool_calls]
        assert (parts[0].name, bool(parts[0].id), {call.HasField("input") for call in parts}) == ("run", True, {True})
        assert ("".join(call.input for call in parts), "".join(call.arguments for call in parts)) == (CODE, "")
        (choice,) = stubs.chats.Get(named(replies[-1].stored_id), timeout=60).choices
        (kept,) = choice.message.tool_calls
        assert (kept.custom.name, kept.custom.input, kept.HasField("function")) == ("run", CODE, False)
        call = inference_pb2.ToolCall(id="c", name="run", input="1 + 1")
        said.append(inference_pb2.Message(role="assistant", tool_calls=[call]))
        said.append(inference_pb2.Message(role="tool", tool_call_id="c", content="2"))
        request = inference_pb2.ChatRequest(messages=said, tools=[RUN], store=True)
        last = list(stubs.inference.Chat(request, timeout=60))[-1]
        (shown,) = ask_of_chat(request).call.prompts[0].messages[1]["tool_calls"]
        assert shown["function"] == {"name": "run", "arguments": {"input": "1 + 1"}}
        messages = stubs.chats.ListMessages(chats_pb2.ListChatMessagesRequest(id=last.stored_id), timeout=60).data
        assert messages[1].tool_calls[0].custom == chats_pb2.CalledTool(name="run", input="1 + 1")
        asked = inference_pb2.TokenizeRequest(messages=said, tools=[RUN])
        assert stubs.inference.Tokenize(asked, timeout=60).token_ids == runner.group.requests[-1].prompt_token_ids


@pytest.mark.parametrize(
    ("fields", "word"),
    [
        ({"type": "custom", "format": {"type": "grammar", "syntax": "gbnf", "definition": "root ::= [a]"}}, "'gbnf'"),
        ({"type": "custom", "format": {"type": "xml"}}, "format"),
        ({"type": "custom", "strict": True}, "strict"),
        ({"type": "custom", "parameters_json": "{}"}, "parameters"),
        ({"format": {"type": "text"}}, "format of a function"),
        ({"type": "web_search"}, "'web_search'"),
    ],
)
def test_refused_over_grpc(thinker, fields, word):
    tool = inference_pb2.Tool(name="run", **fields)
    said = [inference_pb2.Message(role="user", content="Go.")]
    with Stubs(thinker) as stubs:
        for call, request in (
            (stubs.responses.Create, ask(tools=[tool])),
            (stubs.inference.Chat, inference_pb2.ChatRequest(messages=said, tools=[tool])),
            (stubs.inference.Tokenize, inference_pb2.TokenizeRequest(messages=said, tools=[tool])),
        ):
            status, param, details = refused(call, request)
            assert status == grpc.StatusCode.INVALID_ARGUMENT
            assert (param, word in details) == ("tools", True)


@pytest.mark.parametrize(
    ("syntax", "definition", "part"),
    [("regex", "[0-9]+", "^(?:[0-9]+)$"), ("lark", 'start: "\\"" /[0-9]/', "start: json-0 /[0-9]/")],
)
def test_a_grammar_over_grpc(thinker, syntax, definition, part):
    form = inference_pb2.ToolFormat(type="grammar", syntax=syntax, definition=definition)
    tool = inference_pb2.Tool(type="custom", name="run", format=form)
    said = [inference_pb2.Message(role="user", content="Go.")]
    with Stubs(thinker) as stubs:
        for call, request in (
            (stubs.responses.Create, ask(tools=[tool], tool_choice="run")),
            (stubs.inference.Chat, inference_pb2.ChatRequest(messages=said, tools=[tool], tool_choice="run")),
        ):
            whole(call(request, timeout=60))
            tag = json.loads(thinker.group.requests[-1].sampling.structured_outputs.structural_tag)
            assert part in json.dumps(tag)


def test_beside_functions(thinker):
    thinker.group.script = lambda *_: [*f"{OTHER}\n{JSON}\n{OTHER}".encode(), END]
    for stream in (False, True):
        ask = {
            "model": "bytes",
            "messages": [{"role": "user", "content": "Go."}],
            "tools": [TOOL, CHAT],
            "stream": stream,
        }
        reply = httpx.post(thinker.url + "/v1/chat/completions", json=ask, timeout=60)
        assert ("custom" in reply.text, "function" in reply.text) == (True, True)
        if not stream:
            calls = reply.json()["choices"][0]["message"]["tool_calls"]
            assert [call["type"] for call in calls] == ["function", "custom", "function"]
            assert calls[1]["custom"]["input"] == CODE


@pytest.mark.parametrize(
    "choice",
    [
        {"type": "custom", "name": "run"},
        {"type": "allowed_tools", "mode": "required", "tools": [{"type": "custom", "name": "run"}]},
    ],
)
def test_a_forced_one(thinker, choice):
    form = {"type": "grammar", "syntax": "regex", "definition": "[0-9]+"}
    ask = {"model": "bytes", "input": "Go.", "tools": [{**FLAT, "format": form}], "tool_choice": choice}
    assert httpx.post(thinker.url + "/v1/responses", json=ask, timeout=60).status_code == 200
    tag = json.loads(thinker.group.requests[-1].sampling.structured_outputs.structural_tag)["format"]
    (content,) = (one["content"] for one in tag["tags"])
    assert not content["lenient"]


@pytest.mark.parametrize(
    ("pattern", "text", "holds"),
    [
        ("[0-9]{3}", "123", True), ("[0-9]{3}", "1234", False), ("a|b", "b", True), ("a|b", "ab", False),
        ("^a$|^b$", "a", True), ("^a$", "^a$", False), ('a\n"', 'a\n"', True), ("a+", "", False),
    ],
)  # fmt: skip
def test_a_regular_expression_is_of_the_whole_input(pattern, text, holds):
    form = {"type": "grammar", "grammar": {"syntax": "regex", "definition": pattern}}
    tools = shown_tools([{"type": "custom", "custom": {"name": "run", "format": form}}])
    matcher = matcher_of(tool_use(tools, "required", custom={"run": ""}), TOOL_FORMATS["hermes"])
    call = json.dumps({"name": "run", "arguments": {"input": text}})
    assert accepts(matcher, f"<tool_call>\n{call}\n</tool_call>") is holds


LARK = r"""start: e
e: e "+" e | "(" e ")" | S  // x"}
S: /"[^"a-z0-9]{0,3}"/ | "\n"
%ignore / +/
"""


def in_lark(definition):
    form = {"type": "grammar", "grammar": {"syntax": "lark", "definition": definition}}
    return [{"type": "custom", "custom": {"name": "run", "format": form}}]


@pytest.mark.parametrize("name", TOOL_FORMATS)
def test_a_lark_grammar_is_of_the_input(name):
    """Whatever surrounds it: what a model of random weights writes there, read back, is what the grammar describes."""
    tools, form = in_lark(LARK), TOOL_FORMATS[name]
    use = tool_use(shown_tools(tools), "required", custom=custom_grammars(tools))
    vocabulary, held = Bytes(form.inner), use.held(form).form
    matcher = matcher_of(use, form, vocabulary)
    grammar = LLMatcher(PLAIN.compiled, LLMatcher.grammar_from_lark(LARK), log_level=0)
    written = (walk(matcher, held, seed, vocabulary) for seed in range(100))
    said = [*itertools.islice(filter(None, written), 2)]
    assert len(said) == 2
    for text in said:
        answer = read_whole(held, text, use.schemas)
        assert answer.calls
        for call in answer.calls:
            said = read([call.arguments])
            assert accepts(grammar, said.rstrip(" ")), said  # what is ignored may stand at the end, too


@pytest.mark.parametrize("name", TOOL_FORMATS)
def test_a_lark_grammar_where_the_model_may_call(name):
    """Enforced, or refused by name: where texts stand without quotes."""
    tools, form = in_lark(LARK), TOOL_FORMATS[name]
    use = tool_use(shown_tools(tools), "auto", custom=custom_grammars(tools))
    if form.arguments is None or form.arguments.texts == "json":
        assert "%lark" in tag_grammar(json.loads(use.held(form).grammar.structural_tag), {})
        return
    with pytest.raises(UnsupportedError, match=f"'run'.*{name}.*quotes"):
        use.held(form)


@pytest.mark.parametrize("name", ["hermes", "openai", "mistral", "llama3_json"])
def test_what_a_lark_grammar_takes(name):
    tools, form = in_lark(LARK), TOOL_FORMATS[name]
    matcher = matcher_of(
        tool_use(shown_tools(tools), "required", custom=custom_grammars(tools)), form, Bytes(form.inner)
    )
    begin, end = form.call
    before, _, behind = form.wrap
    for text, holds in (('("é" + "")+"-"', True), ('("é"', False), ('"a"', False), ('"', False), ("", False)):
        call = begin.replace("NAME", "run") + json.dumps({"input": text}, ensure_ascii=False) + end
        assert accepts(matcher, before + call + behind, Bytes(form.inner)) is holds, text


@pytest.mark.parametrize(
    ("tool", "word"),
    [
        ({"format": {"type": "grammar", "syntax": "gbnf", "definition": "root ::= [a]"}}, "'gbnf'"),
        (
            {"format": {"type": "grammar", "syntax": "lark", "definition": "start: a\na: b"}},
            "'run'.*line 2, column 4.*\"b\"",
        ),
        ({"format": {"type": "grammar", "syntax": "lark", "definition": "start: <think>"}}, "'run'.*line 1: <think>"),
        ({"format": {"type": "grammar", "syntax": "regex", "definition": "a", "flags": "i"}}, "flags"),
        ({"format": {"type": "grammar", "syntax": "regex", "definition": "(?=a)b"}}, "the format of tool 'run'"),
        ({"format": {"type": "grammar", "syntax": "regex"}}, "definition"),
        ({"format": {"type": "xml"}}, "format"),
        ({"format": "text"}, "format"),
        ({"name": 1}, "name"),
        ({"name": ""}, "name"),
        ({"defer_loading": True}, "defer_loading"),
    ],
)
def test_refused_by_name(thinker, tool, word):
    for path, body in (
        ("responses", {"input": "Go.", "tools": [{**FLAT, **tool}]}),
        ("chat/completions", {"messages": [{"role": "user", "content": "Go."}],
                              "tools": [{"type": "custom", "custom": {**CHAT["custom"], **tool}}]}),
    ):  # fmt: skip
        reply = httpx.post(f"{thinker.url}/v1/{path}", json={"model": "bytes", **body}, timeout=60)
        error = reply.json()["error"]
        assert (reply.status_code, error["param"]) == (400, "tools")
        assert re.search(word, error["message"])


def test_what_templates_are_shown():
    form = {"type": "grammar", "grammar": {"syntax": "regex", "definition": "a+"}}
    tools = [TOOL, {"type": "custom", "custom": {"name": "run", "format": form}}]
    plain, custom = shown_tools(tools)
    assert (plain, custom_grammars(tools)) == (TOOL, {"run": ""})
    assert custom["function"]["strict"]
    assert custom["function"]["parameters"]["properties"]["input"]["pattern"] == "^(?:a+)$"
    function = {"name": "run", "arguments": {"input": CODE}}
    item = {"type": "custom_tool_call", "call_id": "c", "name": "run", "input": CODE}
    (said,) = messages(input_items([item]), None)
    assert said["tool_calls"] == [{"id": "c", "type": "function", "function": function}]
    call = {"id": "c", "type": "custom", "custom": {"name": "run", "input": CODE}}
    (same,) = template_messages([{"role": "assistant", "tool_calls": [call]}])
    assert same["tool_calls"] == said["tool_calls"]


def test_grammars_beyond_those_that_are_remembered_are_held_to_the_time_limit_too(monkeypatch):
    """By a clock on which each look takes a second."""
    ticks = itertools.count()
    monkeypatch.setattr(argument_schema, "time", SimpleNamespace(monotonic=lambda: float(next(ticks))))
    grammars = {name: f'start: "never {name} before\\n"' for name in "abc"}
    tools = [{"type": "function", "function": {"name": name}} for name in grammars]
    use = tool_use(tools, "required", True, grammars)

    def held(kept, limit_s):
        monkeypatch.setattr(lark_text, "KEPT", kept)
        lark_text._kept.clear()
        begin = next(ticks)
        use.held(None, limit_s=limit_s)
        return next(ticks) - begin

    taken = held(len(tools), math.inf)
    held(len(tools), taken)
    with pytest.raises(SlowSchemaError):
        held(1, taken)
