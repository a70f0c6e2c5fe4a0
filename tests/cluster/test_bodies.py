"""Bodies of every dialect, made of any values: each is understood, or refused as the client's mistake."""

from __future__ import annotations

import pytest
from fuzzing import examples
from hypothesis import example, given, settings
from hypothesis import strategies as st

from kvasir.cluster import (
    anthropic_schema,
    ollama_fields,
    ollama_schema,
    openai_fields,
    openai_schema,
    pooling_schema,
    responses_schema,
)
from kvasir.cluster.tool_formats import TOOL_FORMATS
from kvasir.engine.errors import ClientError
from kvasir.engine.request import SamplingParams

SCALARS = st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=8)
WORDS = [
    "user", "assistant", "system", "tool", "auto", "none", "required", "any", "function", "text", "json_schema", "json_object",
    "input_text", "type", "role", "content", "name", "parameters", "tool_use", "tool_result", "thinking", "enabled", "image_url",
    "schema", "strict", "base64", "high", "message", "function_call", "call_id", "allowed_tools", "tools", "mode", "{}", "[]", "-1",
]  # fmt: skip
KEYS = st.sampled_from(WORDS) | st.text(max_size=5)
VALUES = st.recursive(
    SCALARS | st.sampled_from(WORDS),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(KEYS, inner, max_size=4),
    max_leaves=12,
)
TOOL = {
    "type": "function",
    "function": {"name": "f", "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}}},
}
LIKELY = {
    "messages": [{"role": "user", "content": "Hi"}],
    "prompt": "Hi",
    "input": "Hi",
    "query": "Hi",
    "max_tokens": 5,
    "tools": [TOOL],
    "tool_choice": "auto",
    "stream": True,
}
"""Values with which a body goes on to be read."""


def table(*found):
    return sorted({name for names in found for name in names})


CHAT = table(openai_fields.CHAT_HONOURED, openai_fields.CHAT_IGNORED, openai_fields.CHAT_REFUSED)
COMPLETION = table(
    openai_fields.COMPLETION_HONOURED, openai_fields.COMPLETION_IGNORED, openai_fields.COMPLETION_REFUSED
)
DIALECTS = {
    "chat": (openai_schema.parse_chat, CHAT),
    "completion": (openai_schema.parse_completion, COMPLETION),
    "tokenize": (openai_schema.parse_tokenize, table(openai_fields.TOKENIZE_HONOURED)),
    "detokenize": (openai_schema.parse_detokenize, table(openai_fields.DETOKENIZE_HONOURED)),
    "responses": (responses_schema.parse_response, table(responses_schema.HONOURED, responses_schema.REFUSED)),
    "anthropic": (anthropic_schema.parse_messages, table(anthropic_schema._MESSAGES, anthropic_schema._REFUSED)),
    "count": (anthropic_schema.parse_count, table(anthropic_schema._COUNTED)),
    "ollama chat": (ollama_schema.parse_chat, table(ollama_fields.CHAT, ollama_fields.IGNORED)),
    "ollama generate": (ollama_schema.parse_generate, table(ollama_fields.GENERATE, ollama_fields.IGNORED)),
    "ollama embed": (ollama_schema.parse_embed, table(ollama_fields.EMBED)),
    "embeddings": (pooling_schema.parse_embeddings, ["model", "input", "dimensions", "encoding_format", "truncate_prompt_tokens"]),
    "rerank": (pooling_schema.parse_rerank, ["model", "query", "documents", "top_n", "return_documents", "truncate_prompt_tokens"]),
    "score": (pooling_schema.parse_score, ["model", "text_1", "text_2", "queries", "documents"]),
}  # fmt: skip
OPTIONS = table(ollama_fields.OPTIONS, ollama_fields.OPTIONS_IGNORED, ollama_fields.OPTIONS_REFUSED)


@st.composite
def bodies(draw, names):
    likely = {name: LIKELY[name] for name in names if name in LIKELY and draw(st.integers(0, 9)) < 8}
    return {**likely, **draw(st.dictionaries(st.sampled_from(names) | KEYS, VALUES, max_size=4))}


def understood(parse, body):
    """What is made of it, to where a group would take it."""
    try:
        ask = parse(body)
        call = getattr(ask, "call", None)
        sampling = dict(getattr(call or ask, "sampling", {}))
        if sampling:
            SamplingParams(**sampling)
        if (use := getattr(call, "tools", None)) is not None:
            for form in (None, TOOL_FORMATS["hermes"], TOOL_FORMATS["qwen3_coder"]):
                use.held(form)
    except ClientError as error:
        if not 0 < len(error.message) < 2000:
            raise AssertionError("a refusal that nobody can read") from error
        return None
    return ask


@pytest.mark.parametrize("dialect", DIALECTS)
def test_any_body_is_read_or_refused(dialect):
    parse, names = DIALECTS[dialect]

    @settings(max_examples=examples(40))
    @given(bodies(names))
    @example({name: LIKELY[name] for name in names if name in LIKELY})
    @example({})
    def check(body):
        understood(parse, body)

    check()


@settings(max_examples=examples(40))
@given(st.dictionaries(st.sampled_from(OPTIONS) | KEYS, VALUES, max_size=4))
def test_any_options_of_ollama_are_read_or_refused(options):
    understood(ollama_schema.parse_generate, {"prompt": "Hi", "options": options})


@settings(max_examples=examples(40))
@given(
    st.lists(st.dictionaries(KEYS, VALUES, max_size=4), min_size=1, max_size=3),
    st.sampled_from(["chat", "responses", "anthropic"]),
)
def test_any_messages_are_read_or_refused(messages, dialect):
    field = "input" if dialect == "responses" else "messages"
    understood(
        DIALECTS[dialect][0], {field: messages, "max_tokens": 3} if dialect == "anthropic" else {field: messages}
    )


@settings(max_examples=examples(40))
@given(VALUES, VALUES)
def test_any_tools_are_read_or_refused(parameters, choice):
    """With a schema and a choice of any form."""
    tool = {"type": "function", "function": {"name": "f", "parameters": parameters}}
    understood(openai_schema.parse_chat, {"messages": LIKELY["messages"], "tools": [tool], "tool_choice": choice})


def test_likely_bodies_are_understood():
    """Else all of this would test refusals alone."""
    for dialect in ("chat", "completion", "ollama chat", "anthropic"):
        parse, names = DIALECTS[dialect]
        others = {"completion": openai_fields.OF_CHATS, "anthropic": ("tool_choice",)}.get(dialect, ())
        body = {name: LIKELY[name] for name in names if name in LIKELY and name not in others}
        body |= {"tools": [{"name": "f", "input_schema": {}}]} if dialect == "anthropic" else {}
        assert understood(parse, body) is not None, dialect
