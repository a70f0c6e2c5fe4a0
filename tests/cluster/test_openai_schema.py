"""Every field of OpenAI's specification is honoured, ignored aloud or refused by name; neutral values always pass."""

from __future__ import annotations

import json
import re

import pytest
import yaml

from kvasir.cluster.openai_fields import (
    CHAT_HONOURED,
    CHAT_IGNORED,
    CHAT_REFUSED,
    COMPLETION_HONOURED,
    COMPLETION_IGNORED,
    COMPLETION_REFUSED,
)
from kvasir.cluster.openai_schema import parse_chat, parse_completion
from kvasir.engine.errors import ClientError, UnsupportedError
from kvasir.engine.request import SamplingParams, StructuredOutput

CHAT = {"model": "m", "messages": [{"role": "user", "content": "Hi"}]}
COMPLETION = {"model": "m", "prompt": "Hi"}
CHAT_TABLES = (CHAT_HONOURED, CHAT_IGNORED, CHAT_REFUSED)
COMPLETION_TABLES = (COMPLETION_HONOURED, COMPLETION_IGNORED, COMPLETION_REFUSED)

VLLM = re.findall(
    r"\w+",
    """n temperature top_p top_k min_p frequency_penalty presence_penalty repetition_penalty stop seed max_tokens
min_tokens logprobs prompt_logprobs skip_special_tokens spaces_between_special_tokens ignore_eos stop_token_ids
logit_bias include_stop_str_in_output allowed_token_ids bad_words truncate_prompt_tokens truncation_side
return_token_ids priority cache_salt request_id echo add_special_tokens guided_json guided_regex guided_choice
guided_grammar structured_outputs structural_tag use_beam_search length_penalty prompt_embeds kv_transfer_params
vllm_xargs response_format logits_processors logprob_token_ids prompt_logprob_start flat_logprobs return_offsets
repetition_detection thinking_token_budget stream_interval skip_reading_prefix_cache session_id
return_tokens_as_token_ids return_token_offsets watermark watermarking""",
)
VLLM_CHAT = re.findall(
    r"\w+",
    """add_generation_prompt continue_final_message chat_template chat_template_kwargs documents mm_processor_kwargs
include_reasoning reasoning_effort tools tool_choice parallel_tool_calls media_io_kwargs""",
)


@pytest.fixture(scope="module")
def specified(data):
    """Schema's name -> its fields."""
    with open(data("api-openai/openapi.inference-only.yaml")) as file:
        schemas = yaml.load(file, getattr(yaml, "CSafeLoader", yaml.SafeLoader))["components"]["schemas"]

    def fields(schema):
        found = set(schema.get("properties", ()))
        for part in schema.get("allOf", ()):
            found |= fields(schemas[part["$ref"].rsplit("/", 1)[1]] if "$ref" in part else part)
        return found

    return lambda name: fields(schemas[name])


@pytest.mark.parametrize(
    ("schema", "tables"),
    [("CreateChatCompletionRequest", CHAT_TABLES), ("CreateCompletionRequest", COMPLETION_TABLES)],
)
def test_every_specified_field_is_in_one_table(specified, schema, tables):
    names = specified(schema)
    assert len(names) > 15
    counts = {name: sum(name in table for table in tables) for name in names}
    assert {name: count for name, count in counts.items() if count != 1} == {}


@pytest.mark.parametrize("tables", [CHAT_TABLES, COMPLETION_TABLES])
def test_vllms_fields_are_in_one_table_and_tables_dont_overlap(tables):
    names = {name for table in tables for name in table} | set(VLLM)
    if tables is CHAT_TABLES:
        names.update(VLLM_CHAT)
    assert {name for name in names if sum(name in table for table in tables) != 1} == set()


@pytest.mark.parametrize(
    ("parse", "body", "tables"), [(parse_chat, CHAT, CHAT_TABLES), (parse_completion, COMPLETION, COMPLETION_TABLES)]
)
def test_what_becomes_of_each_field(parse, body, tables):
    """Null and neutral values pass in silence; another value is refused by name, or named in a warning."""
    _, ignored, refused = tables
    for name, neutral in {**ignored, **refused}.items():
        for value in (None, *neutral):
            assert parse({**body, name: value}).warnings == (), name
    for name in ignored:
        if name != "parallel_tool_calls":  # all of its values are neutral
            assert parse({**body, name: "odd"}).warnings == (name,)
    for name in refused:
        with pytest.raises(UnsupportedError, match=name) as caught:
            parse({**body, name: "odd"})
        assert caught.value.param == name


def test_documented_examples(data):
    """Each example of the specification parses, or is refused for a field that it does name."""
    checked = 0
    for line in data("api-openai/examples.jsonl").read_text().splitlines():
        example = json.loads(line)
        parse = {"/chat/completions": parse_chat, "/completions": parse_completion}.get(example["path"])
        if parse is None or "-d '" not in example["curl"]:
            continue
        body = json.loads(example["curl"].split("-d '")[1].rsplit("'", 1)[0])
        if "functions" in body:
            with pytest.raises(UnsupportedError, match="functions"):
                parse(body)
        else:
            ask = parse(body)
            SamplingParams(**ask.call.sampling)
            assert ask.warnings == ()
            assert bool(ask.call.tools) == ("tools" in body)
        checked += 1
    assert checked >= 5


def test_defaults():
    chat, text = parse_chat(CHAT), parse_completion(COMPLETION)
    assert chat.call.sampling == text.call.sampling == {}
    assert (chat.call.max_tokens, text.call.max_tokens) == (None, 16)
    assert not chat.call.prompts[0].add_special_tokens
    assert text.call.prompts[0].add_special_tokens


def test_literal_extra_body_wins():
    ask = parse_completion({**COMPLETION, "top_k": 1, "extra_body": {"top_k": 5, "min_p": 0.5}})
    assert ask.call.sampling == {"top_k": 5, "min_p": 0.5}


@pytest.mark.parametrize("name", ["watermarking", "bad_words_ids", "suppress_tokens", "num_beams", "top_n_sigma"])
def test_what_others_shape_outputs_by_is_refused(name):
    """transformers', llama.cpp's and others' names."""
    with pytest.raises(UnsupportedError, match=f"{name} isn't supported"):
        parse_chat({**CHAT, name: [3]})


@pytest.mark.parametrize("enabled", [True, False])
def test_thoughts_are_switched_by_either_name(enabled):
    switch = {"type": "enabled" if enabled else "disabled"}
    ((one,), (other,)) = (
        parse_chat({**CHAT, **said}).call.prompts for said in ({"enable_thinking": enabled}, {"thinking": switch})
    )
    assert one.variables == other.variables
    assert other.variables["enable_thinking"] is enabled
    with pytest.raises(ClientError, match="thinking and enable_thinking differ"):
        parse_chat({**CHAT, "thinking": switch, "enable_thinking": not enabled})


@pytest.mark.parametrize("value", [True, {}, {"type": "auto"}, {"type": "enabled", "budget_tokens": 9}])
def test_another_switch_of_thoughts_is_refused(value):
    with pytest.raises(ClientError, match="thinking must be"):
        parse_chat({**CHAT, "thinking": value})


def test_a_budget_of_thoughts_without_a_limit():
    assert parse_chat({**CHAT, "thinking_token_budget": -1}).call.thinking_budget is None
    assert parse_chat({**CHAT, "thinking_token_budget": 0}).call.thinking_budget == 0


def test_max_completion_tokens_goes_before_max_tokens():
    assert parse_chat({**CHAT, "max_tokens": 5, "max_completion_tokens": 7}).call.sampling["max_tokens"] == 7


def test_echo_asks_for_the_prompts_scores():
    ask = parse_completion({**COMPLETION, "echo": True, "logprobs": 3})
    assert ask.call.sampling == {"logprobs": 3, "prompt_logprobs": 3}
    assert not ask.prompt_logprobs
    assert parse_completion({**COMPLETION, "echo": True, "max_tokens": 0}).call.sampling["max_tokens"] == 1
    with pytest.raises(ClientError):
        SamplingParams(**parse_completion({**COMPLETION, "max_tokens": 0}).call.sampling)


@pytest.mark.parametrize("name", ["guided_xml", "guided_", "guided_lark", "images"])
def test_a_constraint_that_nobody_knows_isn_t_ignored(name):
    for body in ({name: "x"}, {"extra_body": {name: "x"}}):
        with pytest.raises(UnsupportedError, match=name):
            parse_chat({"messages": [{"role": "user", "content": "Hi"}], **body})


@pytest.mark.parametrize(
    ("name", "value", "advice"),
    [
        ("images", ["x"], "leave it out or empty"),
        ("documents", ["x"], "leave it out or empty"),
        ("audio", {"voice": "a"}, "leave it out"),
        ("separate_reasoning", False, "leave it out, or send true"),
        ("modalities", ["audio"], 'leave it out, or send ["text"]'),
        ("functions", [{}], "leave it out or empty; use tools and tool_choice"),
    ],
)
def test_a_refusal_says_what_may_be_sent(name, value, advice):
    with pytest.raises(UnsupportedError) as caught:
        parse_chat({"messages": [{"role": "user", "content": "Hi"}], name: value})
    why = "it would change the answer, so it isn't ignored"
    assert caught.value.message == f"{name} isn't supported: {why}; got {value!r}; {advice}"


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"response_format": {"type": "text", "schema": {}}}, "response_format.schema isn't supported"),
        ({"response_format": {"type": "json_object", "bogus": 3}}, "response_format.bogus isn't supported"),
        ({"response_format": {"type": "json_schema", "schema": {}, "json_schema": {"schema": {}}}}, "once"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": {}, "bogus": 1}}},
            "response_format.json_schema.bogus isn't supported",
        ),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": {}, "strict": "no"}}},
            "strict must be true or false",
        ),
        ({"structured_outputs": {"json": False}}, "must be a JSON Schema that something satisfies"),
        ({"structured_outputs": {"json": {}, "whitespace_pattern": " "}}, "structured_outputs.whitespace_pattern"),
        ({"structured_outputs": {"json": {}, "disable_additional_properties": True}}, "disable_additional_properties"),
        ({"structured_outputs": {"json": {}, "disable_any_whitespace": "yes"}}, "disable_any_whitespace must be true"),
        ({"structured_outputs": {"disable_any_whitespace": True}}, "exactly one of"),
        ({"structured_outputs": {"regex": "a", "disable_any_whitespace": True}}, "a regex tells"),
        ({"tools": [{"type": "function", "function": {"name": "a", "strict": "no"}}]}, "strict must be true or false"),
        ({"tools": [{"type": "function", "name": "a"}]}, "tools[0].function must be an object with a name"),
    ],
)
def test_nothing_inside_of_a_field_is_overlooked(fields, text):
    with pytest.raises(ClientError) as refused:
        parse_chat({"messages": [{"role": "user", "content": "x"}], **fields})
    assert text in refused.value.message


@pytest.mark.parametrize(
    "fields",
    [
        {
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": "a", "description": None, "strict": True, "schema": {}},
            }
        },
        {"structured_outputs": {"json_object": False, "json": None, "disable_any_whitespace": False}},
        {"tools": [{"type": "function", "function": {"name": "a", "strict": None}}]},
    ],
)
def test_what_is_neutral_inside_of_a_field_passes(fields):
    parse_chat({"messages": [{"role": "user", "content": "x"}], **fields})


@pytest.mark.parametrize("kind", ["json_object", "json_schema"])
def test_a_schema_without_a_name_as_llama_cpp_takes_it(kind):
    asked = {"response_format": {"type": kind, "schema": {"type": "object"}}}
    found = parse_chat({"messages": [{"role": "user", "content": "x"}], **asked})
    assert found.call.sampling["structured_outputs"] == StructuredOutput(json='{"type": "object"}')


def test_whitespace_is_disabled():
    asked = {"json": {"type": "object"}, "disable_any_whitespace": True}
    found = parse_chat({"messages": [{"role": "user", "content": "x"}], "structured_outputs": asked})
    assert found.call.sampling["structured_outputs"] == StructuredOutput(
        json='{"type": "object"}', disable_any_whitespace=True
    )
