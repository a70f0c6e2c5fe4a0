"""What stands inside of messages and is read by nobody is named in a warning; a constraint is refused, whatever its name."""

from __future__ import annotations

import pytest

from kvasir.cluster import (
    anthropic_schema,
    decisions_schema,
    ollama_schema,
    openai_schema,
    pooling_schema,
    responses_schema,
)
from kvasir.engine.errors import ClientError

USER = {"role": "user", "content": "Hi"}
QUESTIONS = [{"type": "predicate", "instructions": "Is it?"}]
PARSERS = {
    "chat": lambda fields: openai_schema.parse_chat({"messages": [USER], **fields}),
    "text": lambda fields: openai_schema.parse_completion({"prompt": "Hi", **fields}),
    "responses": lambda fields: responses_schema.parse_response({"input": "Hi", **fields}),
    "anthropic": lambda fields: anthropic_schema.parse_messages({"max_tokens": 9, "messages": [USER], **fields}),
    "count": lambda fields: anthropic_schema.parse_count({"messages": [USER], **fields}),
    "ollama": lambda fields: ollama_schema.parse_chat({"messages": [USER], **fields}),
    "options": lambda fields: ollama_schema.parse_chat({"messages": [USER], "options": fields}),
    "decisions": lambda fields: decisions_schema.parse_decisions({"input": "Hi", "questions": QUESTIONS, **fields}),
    "embeddings": lambda fields: pooling_schema.parse_embeddings({"input": "Hi", **fields}),
}


def part(kind, **fields):
    return [{"role": "user", "content": [{"type": kind, "text": "Hi", **fields}]}]


RESULTS = [
    USER,
    {"role": "assistant", "content": [{"type": "tool_use", "id": "t", "name": "f", "input": {"odd": 1}}]},
    {
        "role": "user",
        "content": [{"type": "tool_result", "tool_use_id": "t", "content": [{"type": "text", "text": "x", "odd": 1}]}],
    },
]


FUNCTION = {"name": "f", "parameters": {"type": "object"}}
TOOLS = {"tools": [{"type": "function", "function": FUNCTION}]}
FLAT = {"tools": [{"type": "function", **FUNCTION}]}
FORCED = {"type": "function", "function": {"name": "f"}}
AMONG = {"type": "allowed_tools", "mode": "auto", "tools": [{"type": "function", "name": "f"}]}


def allowed(**tool):
    return {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": [tool]}}


@pytest.mark.parametrize(
    ("dialect", "fields", "said"),
    [
        ("chat", {"messages": [{**USER, "odd": 1}, {**USER, "odd": 2}]}, "messages[].odd (but by chat templates"),
        ("chat", {"messages": part("text", odd=1)}, "messages[].content[].odd"),
        ("responses", {"input": [{**USER, "odd": 1}]}, "input[].odd"),
        ("responses", {"input": part("input_text", odd=1)}, "input[].content[].odd"),
        ("anthropic", {"messages": [{**USER, "odd": 1}]}, "messages[].odd"),
        ("anthropic", {"messages": part("text", odd=1)}, "messages[].content[].odd"),
        ("anthropic", {"messages": RESULTS}, "messages[].content[].odd"),
        ("count", {"messages": [{**USER, "odd": 1}]}, "messages[].odd"),
        ("anthropic", {"system": [{"type": "text", "text": "x", "odd": 1}]}, "system[].odd"),
        ("ollama", {"messages": [{**USER, "odd": 1}]}, "messages[].odd"),
        ("decisions", {"input": [{**USER, "odd": 1}]}, "input[].odd"),
        ("chat", {**TOOLS, "tool_choice": {**FORCED, "odd": 1}}, "tool_choice.odd"),
        ("chat", {**TOOLS, "tool_choice": {**FORCED, "name": "g"}}, "tool_choice.name"),
        ("chat", {**TOOLS, "tool_choice": {"function": {"name": "f", "odd": 1}}}, "tool_choice.function.odd"),
        ("chat", {**TOOLS, "tool_choice": allowed(**FORCED, odd=1)}, "tool_choice.allowed_tools.tools[].odd"),
        ("chat", {**TOOLS, "tool_choice": {**allowed(**FORCED), "odd": 1}}, "tool_choice.odd"),
        ("responses", {**FLAT, "tool_choice": {"type": "function", "name": "f", "odd": 1}}, "tool_choice.odd"),
        ("responses", {**FLAT, "tool_choice": AMONG | {"odd": 1}}, "tool_choice.odd"),
        ("responses", {**FLAT, "tool_choice": AMONG | {"tools": [{"name": "f", "odd": 1}]}}, "tool_choice.tools[].odd"),
        ("ollama", {**TOOLS, "tool_choice": {**FORCED, "odd": 1}}, "tool_choice.odd"),
    ],
)
def test_what_nobody_reads_is_told_once(dialect, fields, said):
    (warning,) = PARSERS[dialect](fields).warnings
    assert warning.startswith(said)


@pytest.mark.parametrize(
    ("dialect", "fields"),
    [
        ("chat", {"messages": [{**USER, "odd": None, "annotations": [], "refusal": None, "name": "me"}]}),
        ("chat", {"messages": [USER, {"role": "assistant", "content": "x", "reasoning": "y", "tool_calls": []}]}),
        ("responses", {"input": [{**USER, "id": "msg_1", "status": "completed", "phase": "final_answer"}]}),
        ("anthropic", {"messages": part("text", citations=None)}),
        ("ollama", {"messages": [{**USER, "images": None, "tool_calls": [], "thinking": ""}]}),
        ("chat", {**TOOLS, "tool_choice": FORCED}),
        ("chat", {**TOOLS, "tool_choice": allowed(**FORCED)}),
        ("responses", {**FLAT, "tool_choice": {"type": "function", "name": "f"}}),
        ("responses", {**FLAT, "tool_choice": AMONG}),
    ],
)
def test_what_says_nothing_or_is_known_is_not(dialect, fields):
    assert PARSERS[dialect](fields).warnings == ()


@pytest.mark.parametrize("inner", ["x", 1, [], {"tools": "x"}])
def test_allowed_tools_that_can_t_be_read_are_refused(inner):
    with pytest.raises(ClientError, match="tool_choice must be"):
        PARSERS["chat"]({**TOOLS, "tool_choice": {"type": "allowed_tools", "allowed_tools": inner}})


CONSTRAINTS = (
    *("guided_form", "structured_output", "json_mode", "jsonSchema", "response_schema", "output_schema", "schema"),
    *("response_mime_type", "ebnf_grammar", "regex_pattern", "constraints", "stop_words", "banned_tokens"),
    *("max_length", "min_length", "max_new_text_tokens"),
)


@pytest.mark.parametrize("name", CONSTRAINTS)
@pytest.mark.parametrize("dialect", PARSERS)
def test_a_constraint_that_nobody_knows_is_refused_by_name(dialect, name):
    with pytest.raises(ClientError, match="isn't supported") as caught:
        PARSERS[dialect]({name: "x"})
    assert caught.value.param == name


def test_a_name_without_end_is_cut_where_it_is_refused():
    with pytest.raises(ClientError) as caught:
        PARSERS["chat"]({"grammar" + "x" * 10_000: "x"})
    assert (len(caught.value.param), len(caught.value.message) < 300) == (60, True)


@pytest.mark.parametrize("name", ["frobnicate", "$schema", "schema_version", "stopwatch", "maximum", "max_retries"])
@pytest.mark.parametrize("dialect", PARSERS)
def test_another_field_that_nobody_knows_is_named_in_a_warning(dialect, name):
    assert [text for text in PARSERS[dialect]({name: "x"}).warnings if name in text]


@pytest.mark.parametrize("value", [None, False, "", [], {}])
def test_a_constraint_that_says_nothing_is_no_reason_to_refuse(value):
    PARSERS["chat"]({"json_mode": value, "response_schema": value})


def test_a_constraint_of_the_answer_is_ignored_where_tokens_are_counted():
    """Clients send the body that they are about to ask with."""
    limits = {"max_tokens": 5, "stop_token_ids": [1], "response_format": {"type": "json_object"}}
    assert openai_schema.parse_tokenize({"messages": [USER], **limits})[-1] == tuple(limits)
    limits = {"max_tokens": 5, "stop_sequences": ["x"]}
    assert PARSERS["count"](limits).warnings == tuple(limits)
