"""Calls of tools and thoughts: read from text however it is cut, held to by grammars, told in every dialect."""

from __future__ import annotations

import contextlib
import itertools
import json
import random

import anthropic
import grpc
import httpx
import ollama
import openai
import pytest
from fuzzing import examples
from google.protobuf.struct_pb2 import Struct
from hypothesis import given, settings
from hypothesis import strategies as st
from llguidance import LLMatcher, LLTokenizer

from kvasir.cluster.answer_parts import AnswerReader, ReadAnswer
from kvasir.cluster.derived_format import derived_format
from kvasir.cluster.responses_items import input_items, messages
from kvasir.cluster.tool_formats import THOUGHT_FORMATS, TOOL_FORMATS, taught_thoughts, taught_tools
from kvasir.cluster.tool_use import tool_use
from kvasir.engine.chat_template import ChatTemplates
from kvasir.engine.errors import ClientError, UnsupportedError
from kvasir.engine.request import StructuredOutput
from kvasir.engine.structural_tag import tag_grammar
from kvasir.proto import inference_pb2 as pb
from kvasir.proto.inference_pb2_grpc import InferenceStub

END = 256
WEATHER = {
    "type": "object",
    "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
    "required": ["city"],
    "additionalProperties": False,
}
TOOL = {"type": "function", "function": {"name": "get_weather", "description": "Weather", "parameters": WEATHER}}
OTHER = {"type": "function", "function": {"name": "ping"}}
FORMATS = {  # of the fixtures: (tool format, thought format, what the row's text stands between)
    "cogito": ("deepseek_v3", "think", None), "deepseek3": ("deepseek_v31", None, None),
    "functiongemma": ("functiongemma", None, None), "gemma4": ("gemma4", "gemma4", "<|tool_call>{}<tool_call|>"),
    "glm46": ("glm45", None, "<tool_call>{}</tool_call>"), "lfm2": ("lfm2", "think", None),
    "nemotron3nano": ("qwen3_coder", "deepseek_r1", None), "olmo3": ("olmo3", None, None),
    "olmo3_think": ("olmo3", "deepseek_r1", None), "qwen3coder": ("qwen3_coder", None, None),
    "qwen3vl_nonthinking": ("json", None, None), "qwen3vl_thinking": ("json", None, None),
    "cohere": ("cohere", None, None), "deepseek": ("deepseek_v3", None, None), "edge_cases": ("json", None, None),
    "fallback": ("hermes", None, None), "json": ("json", None, None), "kimik2": ("kimi_k2", None, None),
    "llama": ("llama3_json", None, None), "minimax_m2": ("minimax_m2", None, None), "mistral": ("mistral", None, None),
    "mixed_edge_cases": ("json", None, None), "pythonic": ("pythonic", None, None), "qwen": ("hermes", None, None),
    "qwen_xml": ("qwen3_coder", None, None), "step3": ("step3", None, None),
}  # fmt: skip
DIFFER = {
    # nothing that was said is dropped: text behind calls, malformed calls
    "test_mixed_valid_and_invalid_content", "test_kimik2_complete_parsing", "test_mistral_real_world_output",
    "malformed_tool_call_missing_sep", "partial_think_tag_at_end_with_thinking", "consecutive_tool_calls",
    "test_cohere_unclosed_string_does_not_false_terminate", "unclosed gemma string before object close",
    "single quoted value with dangling gemma string delimiter",
    # all calls count, and JSON in a parameter without a schema is JSON
    "test_multiple_json_with_separator", "test_minimax_invalid_json_in_parameters",
    # marks of tools' results are special tokens, which never reach a reader
    "empty_tool_output", "streaming_tool_output", "tool_output_with_newlines", "same_chunk_without_trailing_content",
    "same_chunk_before_real_content", "split_across_chunks_before_real_content",
    # whether there are thoughts is the prompt's to say
    "no_thinking_simple", "thinking_disabled_with_split_tags", "split_tool_calls_begin_tag_conservative_parsing",
    # the inside of a call alone
    "valid_tool_call_standard_format", "tool_with_nested_objects", "python_style_with_brackets",
}  # fmt: skip
"""Rows of the fixtures that state their authors' choices, which aren't ours."""


class Everything(dict):
    """Schemas of whatever tool is asked for."""

    def __contains__(self, name):
        return True


def read(form, text, *, thoughts=None, begun=False, schemas=None, cuts=()):
    """The answer, fed in the pieces that `cuts` make."""
    reader = AnswerReader(TOOL_FORMATS.get(form), THOUGHT_FORMATS.get(thoughts), begun=begun, schemas=schemas)
    answer, edges = ReadAnswer(), [0, *sorted(cuts), len(text)]
    for start, end in itertools.pairwise(edges):
        answer.add(reader.feed(text[start:end]))
    answer.add(reader.finish())
    return answer


def calls_of(answer):
    return [(call.name, json.loads(call.arguments)) for call in answer.calls]


def test_fixtures(data):
    """398 texts that two other parsers were written for; whole, and one character at a time."""
    rows = [json.loads(line) for line in data("tools-parser-fixtures/share.jsonl").read_text().splitlines()]
    for row in rows:
        form, thoughts, around = FORMATS[row["format"]]
        raw, expected = row["raw"], row["expected"]
        if around and raw and ("call:" in raw[:6] or row["format"] == "glm46"):
            raw = around.replace("{}", raw, 1)
        if row["format"] == "deepseek3" and "sep｜>" in raw and "call▁begin" not in raw:
            raw = f"<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>{raw}<｜tool▁call▁end｜><｜tool▁calls▁end｜>"
        if row["format"] in ("deepseek3", "cogito") and "reasoning" in expected:
            thoughts = "deepseek_r1"
        options = {"thoughts": thoughts, "schemas": Everything(x=1)}
        answer = read(form, raw, **options)
        assert answer == read(form, raw, cuts=range(1, len(raw)), **options), row["id"]
        if row["id"] not in DIFFER:
            _compare(answer, expected, row["id"])
    assert len(rows) > 200


def _compare(answer, expected, name):
    if "content" in expected:
        assert answer.content == expected["content"], name
    if "reasoning" in expected:
        assert answer.reasoning == expected["reasoning"], name
    if "n_calls" in expected:
        assert len(answer.calls) == expected["n_calls"], name
    if "names" in expected:
        assert [call.name for call in answer.calls] == expected["names"], name
    if "calls" in expected:
        assert calls_of(answer) == [(call["name"], call["arguments"]) for call in expected["calls"]], name
    for given_ in expected.get("args", ()):
        value = json.loads(answer.calls[given_["call"]].arguments)
        for key in given_["path"]:
            value = value[key]
        assert value == given_["value"], name


def fragments():
    """What answers of all formats are made of, and what breaks them."""
    marks = {mark for form in TOOL_FORMATS.values() for mark in (*form.begins, *form.inner)}
    marks |= {mark for form in THOUGHT_FORMATS.values() for mark in (*form.begins, form.end)}
    parts = [
        *sorted(marks),
        '{"name": "get_weather", "arguments": {"city": "Bergen"}}',
        '{"name": "',
        "ping",
        '"',
        "\\",
        "}",
    ]
    parts += [
        "{",
        "[",
        "]",
        "(",
        ")",
        "=",
        ",",
        ":",
        ";",
        "\n",
        " ",
        "1",
        "é",
        "</function>",
        "<parameter=city>",
        "</parameter>",
    ]
    parts += [
        'get_weather(city="Oslo")',
        "call:ping{}",
        "to=functions.ping",
        "analysis",
        "<arg_key>",
        "```json",
        ">",
        "function",
    ]
    return st.lists(st.sampled_from(parts), max_size=14).map("".join)


@given(fragments(), st.sampled_from(sorted(TOOL_FORMATS)), st.sampled_from([None, *THOUGHT_FORMATS]), st.data())
@settings(max_examples=examples(150))
def test_what_is_read_doesnt_depend_on_cuts(text, form, thoughts, drawn):
    cuts = drawn.draw(st.sets(st.integers(0, len(text)), max_size=8))
    options = {
        "thoughts": thoughts,
        "begun": drawn.draw(st.booleans()),
        "schemas": {"get_weather": WEATHER, "ping": None},
    }
    whole = read(form, text, **options)
    assert whole == read(form, text, cuts=cuts, **options) == read(form, text, cuts=range(1, len(text)), **options)


@given(fragments(), st.sampled_from(sorted(TOOL_FORMATS)))
@settings(max_examples=examples(100))
def test_text_without_calls_stays_as_it_is(text, form):
    """Nothing is lost where nothing was understood."""
    answer = read(form, text, schemas={"get_weather": WEATHER})
    if (
        not answer.calls
        and TOOL_FORMATS[form].whole is None
        and form not in ("gemma4", "minimax_m2", "step3", "deepseek_v32")
    ):
        assert answer.content.replace(" ", "").replace("\n", "") in text.replace(" ", "").replace("\n", "")
        assert len(answer.content.split()) >= len(text.split()) - 8


SAMPLES = {
    "hermes": '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Bergen", "days": 2}}\n</tool_call>',
    "llama3_json": '{"name": "get_weather", "parameters": {"city": "Bergen", "days": 2}}',
    "mistral": '[TOOL_CALLS][{"name": "get_weather", "arguments": {"city": "Bergen", "days": 2}}]',
    "qwen3_coder": "<tool_call>\n<function=get_weather>\n<parameter=city>\nBergen\n</parameter>\n<parameter=days>\n2\n"
    "</parameter>\n</function>\n</tool_call>",
    "glm45": "<tool_call>get_weather\n<arg_key>city</arg_key>\n<arg_value>Bergen</arg_value>\n<arg_key>days</arg_key>\n"
    "<arg_value>2</arg_value>\n</tool_call>",
    "deepseek_v32": '<｜DSML｜function_calls>\n<｜DSML｜invoke name="get_weather">\n<｜DSML｜parameter name="city" string="true">'
    'Bergen</｜DSML｜parameter>\n<｜DSML｜parameter name="days" string="false">2</｜DSML｜parameter>\n</｜DSML｜invoke>\n'
    "</｜DSML｜function_calls>",
    "openai": "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>commentary to=functions.get_weather "
    '<|constrain|>json<|message|>{"city": "Bergen", "days": 2}<|call|>',
    "gemma4": '<|tool_call>call:get_weather{city:<|"|>Bergen<|"|>,days:2}<tool_call|>',
    "seed_oss": "<seed:tool_call>\n<function=get_weather>\n<parameter=city>Bergen</parameter>\n<parameter=days>2</parameter>\n"
    "</function>\n</seed:tool_call>",
    "functionary": '<function=get_weather>{"city": "Bergen", "days": 2}</function>',
    "phi4_mini_json": 'functools[{"name": "get_weather", "arguments": {"city": "Bergen", "days": 2}}]',
    "granite": '<|tool_call|>[{"name": "get_weather", "arguments": {"city": "Bergen", "days": 2}}]',
}


@pytest.mark.parametrize("form", SAMPLES)
def test_a_call_in_each_format(form):
    answer = read(form, SAMPLES[form], schemas={"get_weather": WEATHER})
    assert calls_of(answer) == [("get_weather", {"city": "Bergen", "days": 2})]
    assert not answer.content
    text = "Let me see. "
    if form != "openai":
        assert read(form, text + SAMPLES[form], schemas={"get_weather": WEATHER}).content == text


def test_values_are_typed_by_the_schema():
    """What looks like a number is text where the tool says so."""
    schema = {"properties": {"zip": {"type": "string"}, "on": {"type": "boolean"}, "tags": {"type": "array"}, "x": {}}}
    text = "<function=f>" + "".join(
        f"<parameter={key}>{value}</parameter>"
        for key, value in {"zip": "0150", "on": "True", "tags": '["a"]', "x": "1.5"}.items()
    )
    answer = read("qwen3_coder", f"<tool_call>{text}</function></tool_call>", schemas={"f": schema})
    assert calls_of(answer) == [("f", {"zip": "0150", "on": True, "tags": ["a"], "x": 1.5})]


def test_arguments_are_streamed_as_they_come():
    reader = AnswerReader(TOOL_FORMATS["hermes"], None)
    assert reader.feed('<tool_call>\n{"name": "write", "arguments": {"te')
    (part,) = reader.feed('xt": "once upon')
    assert (part.kind, part.text) == ("arguments", 'xt": "once upon')


def test_templates_teach_their_formats(data):
    known = {
        "Qwen3-Coder": ("qwen3_coder", None), "meta-llama-Llama-3.1-8B-Instruct": ("llama3_json", None),
        "mistralai-Mistral-Nemo-Instruct-2407": ("mistral", None), "moonshotai-Kimi-K2": ("kimi_k2", None),
        "deepseek-ai-DeepSeek-V3.1": ("deepseek_v31", "think"), "llama-cpp-deepseek-r1": ("deepseek_v3", "think"),
        "openai-gpt-oss-120b": ("openai", None), "MiniMax-M2": ("minimax_m2", "think"),
        "ByteDance-Seed-OSS": ("seed_oss", "seed_oss"), "Qwen-Qwen2.5-7B-Instruct": ("hermes", None),
        "Qwen-Qwen3-0.6B": ("hermes", "think"), "GLM-4.7-Flash": ("glm45", "think"),
        "CohereForAI-c4ai-command-r7b-12-2024-tool_use": ("cohere", "cohere"), "google-gemma-4-31B-it": ("gemma4", "gemma4"),
        "NVIDIA-Nemotron-Nano-v2": ("nemotron", "think"), "ibm-granite-granite-3.3-2B-Instruct": ("granite", "think"),
        "mistralai-Ministral-3-14B-Reasoning-2512": ("mistral", "mistral"), "LFM2.5-8B-A1B": ("lfm2", "think"),
        "deepseek-ai-DeepSeek-V3.2": ("deepseek_v32", "think"), "NousResearch-Hermes-3-Llama-3.1-8B-tool_use": ("hermes", None),
        "fireworks-ai-llama-3-firefunction-v2": ("phi4_mini_json", None), "meetkai-functionary-medium-v3.1": ("functionary", None),
        "google-gemma-2-2b-it": (None, None), "microsoft-Phi-3.5-mini-instruct": (None, None),
    }  # fmt: skip
    folder, found = data("chat-templates") / "llama.cpp", {}
    for name in known:
        if (folder / f"{name}.jinja").exists():
            sources = [(folder / f"{name}.jinja").read_text()]
            tools, thoughts = taught_tools(sources), taught_thoughts(sources)
            found[name] = tools and tools.name, thoughts and thoughts.name
    assert found == {name: known[name] for name in found}
    assert len(found) >= 20


def test_a_format_is_derived_from_a_template_of_an_unknown_family(data):
    """What a template shows of a call is what its reader understands."""
    derived = {}
    for file in sorted(data("chat-templates").rglob("*.jinja*")):
        templates = ChatTemplates({"default": file.read_text()}, {"bos_token": "<s>", "eos_token": "</s>"})
        form = derived_format(templates)
        if form is None or form.arguments is not None:  # those are test_derived_tags' business
            continue
        begin, end = form.call
        derived[file.name] = form
        text = f"Well. {begin.replace('NAME', 'get_weather')}" + '{"city": "Oslo", "days": 1}' + end
        reader = AnswerReader(form, None, schemas={"get_weather": WEATHER})
        answer = ReadAnswer()
        answer.add([*reader.feed(text), *reader.finish()])
        assert calls_of(answer) == [("get_weather", {"city": "Oslo", "days": 1})], file
        assert answer.content == "Well. ", file
    assert len(derived) > 25
    assert derived["Qwen-Qwen3-0.6B.jinja"].call == TOOL_FORMATS["hermes"].call
    assert derived["GigaChat3.1-10B-A1.8B.jinja"].begins == ("<|function_call|>",)


# -- what a request says


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
    tokenizer = LLTokenizer("byte")
    grammar = tag_grammar(json.loads(wanted.structural_tag), {})
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


# -- dialects


CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Bergen"}}\n</tool_call>'
SAID = f"<think>\nA city.\n</think>\n\nLet me see.\n{CALL}"


def says(gateway, text):
    gateway.group.script = lambda request, index: [*text.encode(), END]


@pytest.fixture
def closing():
    """`closing(client)`: closed after the test."""
    with contextlib.ExitStack() as stack:
        yield lambda client: stack.push(lambda *_: getattr(client, "close", client._client.close)()) and client


def sampling_of(gateway):
    return gateway.group.requests[-1].sampling


def test_openai(thinker, closing):
    says(thinker, SAID)
    client = closing(openai.OpenAI(base_url=thinker.url + "/v1", api_key="none"))
    ask = {"model": "bytes", "messages": [{"role": "user", "content": "Rain?"}], "tools": [TOOL]}
    (choice,) = client.chat.completions.create(**ask).choices
    message = choice.message
    assert (choice.finish_reason, message.content, message.reasoning_content) == (
        "tool_calls",
        "Let me see.\n",
        "A city.",
    )
    (call,) = message.tool_calls
    assert (call.type, call.function.name, json.loads(call.function.arguments)) == (
        "function",
        "get_weather",
        {"city": "Bergen"},
    )
    assert call.id.startswith("call_")
    with client.beta.chat.completions.stream(**ask) as stream:
        thoughts = "".join(
            event.chunk.choices[0].delta.model_extra.get("reasoning") or ""
            for event in stream
            if event.type == "chunk" and event.chunk.choices
        )
        final = stream.get_final_completion().choices[0]
    assert thoughts == "A city."
    assert (final.finish_reason, final.message.content) == ("tool_calls", "Let me see.\n")
    (streamed,) = final.message.tool_calls
    assert (streamed.function.name, streamed.function.arguments) == (call.function.name, call.function.arguments)
    tag = json.loads(sampling_of(thinker).structured_outputs.structural_tag)["format"]
    assert (tag["type"], tag["triggers"]) == ("triggered_tags", ["<tool_call>"])
    assert bytes(sampling_of(thinker).thoughts.end) == b"</think>"


def test_openai_with_logprobs_and_choices(thinker, closing):
    says(thinker, SAID)
    client = closing(openai.OpenAI(base_url=thinker.url + "/v1", api_key="none"))
    ask = {
        "model": "bytes",
        "messages": [{"role": "user", "content": "Rain?"}],
        "tools": [TOOL],
        "n": 2,
        "logprobs": True,
    }
    chunks = list(client.chat.completions.create(**ask, stream=True))
    for index in range(2):
        own = [c for chunk in chunks for c in chunk.choices if c.index == index]
        scored = [token.token for c in own if c.logprobs for token in c.logprobs.content]
        assert "".join(scored) == SAID + "<|end|>"
        assert "".join(c.delta.content or "" for c in own) == "Let me see.\n"
        assert own[-1].finish_reason == "tool_calls"
    assert (
        len({c.delta.tool_calls[0].id for chunk in chunks for c in chunk.choices if c.delta.tool_calls} - {None}) == 2
    )


def test_required_calls_and_thoughts_left_out(thinker):
    says(thinker, SAID)
    ask = {"messages": [{"role": "user", "content": "Rain?"}], "tools": [TOOL, OTHER], "include_reasoning": False}
    ask |= {"tool_choice": "required", "parallel_tool_calls": False, "thinking_token_budget": 7}
    message = httpx.post(thinker.url + "/v1/chat/completions", json=ask).json()["choices"][0]["message"]
    assert "reasoning" not in message
    form = json.loads(sampling_of(thinker).structured_outputs.structural_tag)["format"]
    assert (form["type"], form["stop_after_first"], len(form["tags"])) == ("tags_with_separator", True, 2)
    assert sampling_of(thinker).thoughts.budget == 7


def test_answers_without_tools_keep_what_looks_like_calls(thinker):
    says(thinker, SAID)
    ask = {"messages": [{"role": "user", "content": "Rain?"}]}
    message = httpx.post(thinker.url + "/v1/chat/completions", json=ask).json()["choices"][0]["message"]
    assert message["content"] == SAID.split("</think>")[1].lstrip()
    assert "tool_calls" not in message
    assert sampling_of(thinker).structured_outputs is None


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"thinking_token_budget": -1}, "thinking_token_budget"),
        ({"reasoning_effort": "a lot"}, "reasoning_effort"),
        ({"tools": [TOOL], "guided_regex": "a+"}, "tool_choice"),
        ({"tools": [TOOL], "tool_choice": "maybe"}, "tool_choice"),
        ({"tools": [{"type": "function", "function": {"name": "\n"}}]}, "tools"),
    ],
)
def test_refused(thinker, fields, param):
    ask = {"messages": [{"role": "user", "content": "Rain?"}], **fields}
    reply = httpx.post(thinker.url + "/v1/chat/completions", json=ask)
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, param)


def test_models_without_thoughts_cant_limit_them(gateway):
    ask = {"messages": [{"role": "user", "content": "Rain?"}], "thinking_token_budget": 5}
    reply = httpx.post(gateway.url + "/v1/chat/completions", json=ask)
    assert reply.status_code == 400
    assert "thoughts" in reply.json()["error"]["message"]


def test_anthropic(thinker, closing):
    says(thinker, SAID)
    client = closing(anthropic.Anthropic(base_url=thinker.url, api_key="none"))
    tools = [{"name": "get_weather", "input_schema": WEATHER}]
    ask = {"model": "bytes", "max_tokens": 500, "messages": [{"role": "user", "content": "Rain?"}], "tools": tools}
    ask["thinking"] = {"type": "enabled", "budget_tokens": 1024}
    message = client.messages.create(**ask)
    thought, text, use = message.content
    assert (message.stop_reason, thought.thinking, text.text) == ("tool_use", "A city.", "Let me see.\n")
    assert (use.name, use.input) == ("get_weather", {"city": "Bergen"})
    assert use.id.startswith("toolu_")
    assert sampling_of(thinker).thoughts.budget == 1024
    with client.messages.stream(**ask) as stream:
        streamed = stream.get_final_message()
    assert [block.type for block in streamed.content] == ["thinking", "text", "tool_use"]
    assert (streamed.stop_reason, streamed.content[2].input) == ("tool_use", {"city": "Bergen"})
    client.messages.create(**ask | {"tool_choice": {"type": "any", "disable_parallel_tool_use": True}})
    form = json.loads(sampling_of(thinker).structured_outputs.structural_tag)["format"]
    assert (form["type"], form["stop_after_first"]) == ("tags_with_separator", True)


def test_ollama(thinker, closing):
    says(thinker, SAID)
    client = closing(ollama.Client(host=thinker.url))
    ask = {"model": "bytes", "messages": [{"role": "user", "content": "Rain?"}], "tools": [TOOL], "think": True}
    message = client.chat(**ask).message
    assert (message.thinking, message.content) == ("A city.", "Let me see.\n")
    assert [(call.function.name, call.function.arguments) for call in message.tool_calls] == [
        ("get_weather", {"city": "Bergen"})
    ]
    parts = list(client.chat(**ask, stream=True))
    assert "".join(part.message.thinking or "" for part in parts) == "A city."
    assert "".join(part.message.content or "" for part in parts) == "Let me see.\n"
    assert [call.function.arguments for part in parts for call in part.message.tool_calls or ()] == [{"city": "Bergen"}]


def test_ollama_tells_what_the_model_can_do(thinker):
    shown = httpx.post(thinker.url + "/api/show", json={"model": "bytes"}).json()
    assert shown["capabilities"] == ["completion", "tools", "thinking"]


def test_ollama_shows_arguments_that_were_cut_short(thinker):
    says(thinker, SAID[:-20])
    reply = httpx.post(
        thinker.url + "/api/chat",
        json={"model": "bytes", "messages": [{"role": "user", "content": "?"}], "tools": [TOOL], "stream": False},
    ).json()
    assert reply["message"]["content"].startswith('Let me see.\n{"city"')
    assert "tool_calls" not in reply["message"]


def test_grpc(thinker):
    says(thinker, SAID)
    schema = Struct()
    schema.update(WEATHER)
    ask = pb.ChatRequest(messages=[pb.Message(role="user", content="Rain?")], tool_choice="get_weather")
    ask.tools.add(name="get_weather", parameters=schema)
    with grpc.insecure_channel(thinker.grpc_address) as channel:
        replies = list(InferenceStub(channel).Chat(ask))
    assert "".join(reply.reasoning for reply in replies) == "A city."
    assert "".join(reply.text for reply in replies) == "Let me see.\n"
    calls = [call for reply in replies for call in reply.tool_calls]
    assert [call.name for call in calls if call.name] == ["get_weather"]
    assert json.loads("".join(call.arguments for call in calls)) == {"city": "Bergen"}
    assert max(reply.finish_reason for reply in replies) == pb.FINISH_REASON_TOOL_CALLS
    form = json.loads(sampling_of(thinker).structured_outputs.structural_tag)["format"]
    assert form["stop_after_first"]


def test_responses(thinker, closing):
    says(thinker, SAID)
    client = closing(openai.OpenAI(base_url=thinker.url + "/v1", api_key="none"))
    tool = {"type": "function", "name": "get_weather", "parameters": WEATHER, "strict": True}
    ask = {"model": "bytes", "input": "Rain?", "tools": [tool], "reasoning": {"effort": "high"}}
    found = client.responses.create(**ask)
    thoughts, message, call = found.output
    assert (thoughts.type, thoughts.content[0].text) == ("reasoning", "A city.")
    assert (message.type, message.content[0].text) == ("message", "Let me see.\n")
    assert (call.type, call.name, json.loads(call.arguments)) == ("function_call", "get_weather", {"city": "Bergen"})
    assert found.usage.output_tokens_details.reasoning_tokens == len("A city.")
    tag = json.loads(sampling_of(thinker).structured_outputs.structural_tag)["format"]["tags"][0]
    assert not tag["content"]["lenient"]
    with client.responses.stream(**ask) as stream:
        kinds = [event.type for event in stream]
        streamed = stream.get_final_response()
    assert [item.type for item in streamed.output] == ["reasoning", "message", "function_call"]
    assert streamed.output[2].arguments == call.arguments
    assert kinds.count("response.output_item.added") == kinds.count("response.output_item.done") == 3
    assert "response.function_call_arguments.delta" in kinds
    assert "response.reasoning_text.delta" in kinds
    shown = {**ask, "reasoning": {"summary": "auto"}, "include": ["reasoning.encrypted_content"], "max_tool_calls": 3}
    with client.responses.stream(**shown) as stream:
        kinds = [event.type for event in stream]
        summarised = stream.get_final_response()
    thoughts = summarised.output[0]
    assert [one.text for one in thoughts.summary] == ["A city."]
    assert summarised.max_tool_calls == 3
    for kind in ("summary_part.added", "summary_text.delta", "summary_text.done", "summary_part.done"):
        assert f"response.reasoning_{kind}" in kinds
    assert "response.reasoning_text.delta" not in kinds
    kept = {"type": "reasoning", "id": "rs_1", "summary": [], "encrypted_content": thoughts.encrypted_content}
    assert messages(input_items([kept]), None) == [{"role": "assistant", "content": "", "reasoning_content": "A city."}]
    assert messages(input_items([{**kept, "encrypted_content": "gAAAA"}]), None) == []
    says(thinker, "</think>It rains.")
    result = {"type": "function_call_output", "call_id": call.call_id, "output": "rain"}
    again = client.responses.create(model="bytes", input=[result], previous_response_id=found.id, tools=[tool])
    assert again.output_text == "</think>It rains."
    prompt = bytes(i for i in thinker.group.requests[-1].prompt_token_ids if i < 256)
    assert b"rain" in prompt
