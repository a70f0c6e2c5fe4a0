"""Calls of tools and thoughts: read from text however it is cut."""

from __future__ import annotations

import json

import pytest
from fuzzing import examples
from hypothesis import given, settings
from hypothesis import strategies as st
from tool_samples import SAMPLES, WEATHER, read

from kvasir.cluster.answer_parts import AnswerReader, ReadAnswer
from kvasir.cluster.derived_format import derived_format
from kvasir.cluster.tool_formats import THOUGHT_FORMATS, TOOL_FORMATS, taught_thoughts, taught_tools
from kvasir.engine.chat_template import ChatTemplates

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


@pytest.mark.parametrize("form", SAMPLES)
def test_a_call_in_each_format(form):
    answer = read(form, SAMPLES[form], schemas={"get_weather": WEATHER})
    assert calls_of(answer) == [("get_weather", {"city": "Bergen", "days": 2})]
    assert not answer.content
    text = "Let me see. "
    if form != "openai":
        assert read(form, text + SAMPLES[form], schemas={"get_weather": WEATHER}).content == text


@pytest.mark.parametrize("form", SAMPLES)
def test_a_call_that_is_cut_short_is_known(form):
    """Wherever the text ends: a call that isn't said to be cut is the whole one, and cuts are said to be ones."""
    text, whole = SAMPLES[form], {"city": "Bergen", "days": 2}
    for end in range(len(text)):
        answer = read(form, text[:end], schemas={"get_weather": WEATHER})
        given = [json.JSONDecoder().raw_decode(call.arguments)[0] for call in answer.calls if not answer.cut]
        assert given in ([], [whole]), text[:end]
        assert read(form, text[:end], schemas={"get_weather": WEATHER}, cuts=range(1, end)) == answer
    called = read(form, text[: text.index("Bergen") + 3], schemas={"get_weather": WEATHER})
    assert called.cut == bool(called.calls)
    assert not read(form, text, schemas={"get_weather": WEATHER}).cut


def test_a_call_that_lacks_nothing_but_its_end_is_whole():
    """Also where the reader knows it only by the text's end."""
    answer = read("gemma4", SAMPLES["gemma4"].removesuffix("<tool_call|>"), schemas={"get_weather": WEATHER})
    assert (calls_of(answer), answer.cut) == ([("get_weather", {"city": "Bergen", "days": 2})], False)


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
