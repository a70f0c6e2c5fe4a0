"""Anthropic's endpoints over real sockets, by httpx and Anthropic's own client."""

from __future__ import annotations

import json

import anthropic
import httpx
import pytest
from fuzzing import examples
from hypothesis import given, settings
from hypothesis import strategies as st

TEXT = "Hello, wörld!"
MESSAGES = [{"role": "user", "content": "Hi"}]
BODY = {"model": "bytes", "max_tokens": 100, "messages": MESSAGES}
TOOL = {"name": "f", "input_schema": {"type": "object", "properties": {"x": {"type": "integer"}}}}


def send(gateway, path="", **fields):
    body = {name: value for name, value in (BODY | fields).items() if value is not ...}
    return httpx.post(gateway.url + "/v1/messages" + path, json=body, timeout=60)


def events(reply):
    """(event's name, data) of each."""
    parts = [part.split("\n") for part in reply.text.split("\n\n") if part]
    found = [(name.removeprefix("event: "), json.loads(data.removeprefix("data: "))) for name, data in parts]
    assert all(name == data["type"] for name, data in found)
    return found


def prompt_text(gateway):
    """The last prompt, special tokens as <NUMBER>."""
    ids = gateway.group.requests[-1].prompt_token_ids
    return b"".join(bytes([one]) if one < 256 else b"<%d>" % one for one in ids).decode()


@pytest.fixture
def client(gateway):
    with anthropic.Anthropic(base_url=gateway.url, api_key="any", max_retries=0) as client:
        yield client


def test_message(gateway):
    reply = send(gateway)
    assert reply.status_code == 200, reply.text
    body = reply.json()
    assert body["content"] == [{"type": "text", "text": TEXT, "citations": None}]
    assert (body["type"], body["role"], body["model"]) == ("message", "assistant", "bytes")
    assert (body["stop_reason"], body["stop_sequence"]) == ("end_turn", None)
    assert body["usage"] == {
        "input_tokens": 3, "cache_creation_input_tokens": 0, "cache_read_input_tokens": 2, "output_tokens": 15,
    }  # fmt: skip
    assert body["id"] == "msg_" + reply.headers["request-id"]
    assert prompt_text(gateway) == "<257>Hi<256><258>"


def test_stream(gateway):
    found = events(send(gateway, stream=True))
    names = [name for name, _ in found]
    assert names[:3] == ["message_start", "ping", "content_block_start"]
    assert names[-3:] == ["content_block_stop", "message_delta", "message_stop"]
    assert set(names[3:-3]) == {"content_block_delta"}
    deltas = [data["delta"] for name, data in found if name == "content_block_delta"]
    assert "".join(delta["text"] for delta in deltas) == TEXT
    assert found[0][1]["message"]["usage"]["output_tokens"] == 0
    assert found[-2][1]["delta"] == {"stop_reason": "end_turn", "stop_sequence": None}
    assert found[-2][1]["usage"]["output_tokens"] == 15


def test_sampling_and_stops(gateway):
    reply = send(gateway, temperature=0.5, top_p=0.9, top_k=5, stop_sequences=["wö", "?"]).json()
    sampling = gateway.group.requests[-1].sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.max_tokens) == (0.5, 0.9, 5, 100)
    assert (reply["content"][0]["text"], reply["stop_reason"], reply["stop_sequence"]) == (
        "Hello, ", "stop_sequence", "wö",
    )  # fmt: skip
    assert send(gateway, max_tokens=3).json()["stop_reason"] == "max_tokens"
    last = events(send(gateway, stream=True, stop_sequences=["wö"]))[-2][1]
    assert last["delta"] == {"stop_reason": "stop_sequence", "stop_sequence": "wö"}


def test_conversation(gateway):
    """Blocks, neighbours of one role, tool use and its results, and an answer that the model goes on with."""
    send(
        gateway,
        system=[{"type": "text", "text": "Be "}, {"type": "text", "text": "brief"}],
        messages=[
            {"role": "user", "content": "a"},
            {"role": "user", "content": [{"type": "text", "text": "b"}, {"type": "text", "text": "c"}]},
            {
                "role": "assistant",
                "content": [
                    {"type": "thinking", "thinking": "hm", "signature": ""},
                    {"type": "text", "text": "d"},
                    {"type": "tool_use", "id": "t1", "name": "f", "input": {"x": 1}},
                ],
            },
            {
                "role": "user",
                "content": [
                    {"type": "tool_result", "tool_use_id": "t1", "content": [{"type": "text", "text": "11"}]},
                    {"type": "tool_result", "tool_use_id": "t2", "is_error": True, "content": "no"},
                    {"type": "text", "text": "e"},
                ],
            },
            {"role": "assistant", "content": "f"},
        ],
    )
    expected = "<259>Be brief<256><257>a\n\nbc<256><258>d<256><260>11<256><260>Error: no<256><257>e<256><258>f"
    assert prompt_text(gateway) == expected


def test_warnings(gateway):
    system = [{"type": "text", "text": "x", "cache_control": {"type": "ephemeral"}}]
    reply = send(
        gateway, system=system, metadata={"user_id": "me"}, odd=1, service_tier="auto",
        output_config={"effort": "high"},
    )  # fmt: skip
    assert reply.status_code == 200
    warned = reply.headers["x-kvasir-warning"]
    assert all(word in warned for word in ("cache_control", "metadata.user_id", "odd", "effort"))
    assert "service_tier" not in warned


@pytest.mark.parametrize(
    ("fields", "word"),
    [
        ({"max_tokens": ...}, "max_tokens"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages[0]"),
        ({"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]}, "'image'"),
        ({"messages": [{"role": "user", "content": [{"type": "document", "source": {}}]}]}, "'document'"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages[0].content[0].text"),
        ({"system": 3}, "system"),
        ({"thinking": {"type": "enabled", "budget_tokens": 1024}}, "no thoughts"),
        ({"thinking": {"type": "enabled", "budget_tokens": 0}}, "budget_tokens"),
        ({"thinking": {"type": "maybe"}}, "thinking"),
        ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "web_search"),
        ({"tools": [{"name": "f"}]}, "input_schema"),
        ({"tool_choice": "auto"}, "tool_choice"),
        ({"tool_choice": {"type": "any"}}, "tool_choice"),
        ({"temperature": -1}, "temperature"),
        ({"container": "x"}, "container"),
        ({"mcp_servers": [{}]}, "mcp_servers"),
        ({"guided_json": {}}, "guided_json"),
        ({"seed": 1}, "seed"),
        ({"output_config": {"effort": "some"}}, "effort"),
        ({"output_format": {"type": "yaml"}}, "output format"),
    ],
)
def test_refusals(gateway, fields, word):
    reply = send(gateway, **fields)
    assert reply.status_code == 400
    body = reply.json()
    assert (body["type"], body["error"]["type"]) == ("error", "invalid_request_error")
    assert word in body["error"]["message"]
    assert body["request_id"] == reply.headers["request-id"]


def test_tools_are_shown_where_none_may_be_called(gateway):
    assert send(gateway, tools=[TOOL], tool_choice={"type": "none"}).status_code == 200
    assert '"parameters"' in prompt_text(gateway)


def test_schema(gateway):
    send(gateway, output_format={"type": "json_schema", "schema": {"type": "object"}})
    assert json.loads(gateway.group.requests[-1].sampling.structured_outputs.json) == {"type": "object"}


def test_count_tokens(gateway, client):
    whole = send(gateway).json()["usage"]
    assert client.messages.count_tokens(model="bytes", messages=MESSAGES).input_tokens == 5
    assert whole["input_tokens"] + whole["cache_read_input_tokens"] == 5
    assert client.messages.count_tokens(model="bytes", messages=MESSAGES, tools=[TOOL]).input_tokens > 50


def test_failure_in_a_stream(gateway):
    gateway.group.dies_after = 3
    try:
        name, data = events(send(gateway, stream=True))[-1]
    finally:
        gateway.group.dies_after = None
    assert (name, data["error"]) == ("error", {"type": "overloaded_error", "message": "the group died"})


def test_client(client):
    message = client.messages.create(**BODY)
    assert message.content[0].text == TEXT
    assert (message.stop_reason, message.usage.cache_read_input_tokens) == ("end_turn", 2)


def test_client_stream(client):
    with client.messages.stream(**BODY) as stream:
        assert "".join(stream.text_stream) == TEXT
        final = stream.get_final_message()
    assert (final.content[0].text, final.stop_reason, final.usage.output_tokens) == (TEXT, "end_turn", 15)


def test_client_models(client):
    assert [model.id for model in client.models.list()] == ["bytes", "alias/bytes"]
    assert client.models.retrieve("bytes").display_name == "bytes"
    with pytest.raises(anthropic.NotFoundError) as caught:
        client.models.retrieve("zz")
    assert (caught.value.body["type"], caught.value.body["error"]["type"]) == ("error", "not_found_error")
    assert "'zz'" in caught.value.body["error"]["message"]


@pytest.mark.parametrize(
    ("headers", "shape"),
    [
        ({"x-api-key": "k"}, "anthropic"), ({"anthropic-version": "2023-06-01"}, "anthropic"),
        ({"authorization": "Bearer k", "x-api-key": "k"}, "openai"), ({}, "openai"),
    ],
)  # fmt: skip
def test_models_in_the_clients_dialect(gateway, headers, shape):
    missing = httpx.get(f"{gateway.url}/v1/models/some/zz", headers=headers)
    assert (missing.status_code, "type" in missing.json()) == (404, shape == "anthropic")
    assert ("object" in httpx.get(f"{gateway.url}/v1/models", headers=headers).json()) is (shape == "openai")
    other = httpx.get(f"{gateway.url}/v1/batches/zz", headers=headers)
    assert (other.status_code, "type" in other.json()) == (404, False)


def test_client_errors(client):
    with pytest.raises(anthropic.NotFoundError, match="isn't served here") as caught:
        client.messages.create(**BODY | {"model": "other"})
    assert caught.value.request_id
    source = {"type": "url", "url": "http://localhost/x.png"}
    content = [{"type": "image", "source": source}]
    with pytest.raises(anthropic.BadRequestError, match="image"):
        client.messages.create(**BODY | {"messages": [{"role": "user", "content": content}]})


# ---- Anything at all ------------------------------------------------------------------------------------------------

_VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-3, 2**40)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)


def test_thoughts_that_are_left_to_a_model_without_any(gateway):
    assert send(gateway, thinking={"type": "adaptive"}).status_code == 200
    assert send(gateway, thinking={"type": "adaptive", "display": "all"}).status_code == 400


def test_nothing_of_tools_is_overlooked(gateway):
    tool = {"name": "look", "input_schema": {"type": "object"}}
    reply = send(
        gateway, tools=[tool | {"defer_loading": True, "zzz": 1, "cache_control": None}],
        tool_choice={"type": "none", "bogus": 1},
    )  # fmt: skip
    assert reply.status_code == 200, reply.text
    for name in ("tools[0].defer_loading", "tools[0].zzz", "tool_choice.bogus"):
        assert name in reply.headers["x-kvasir-warning"]
    for fields in (
        {"tools": [tool | {"strict": "false"}]},
        {"tools": [tool], "tool_choice": {"type": "auto", "disable_parallel_tool_use": "yes"}},
    ):
        reply = send(gateway, **fields)
        assert (reply.status_code, "must be true or false" in reply.text) == (400, True)


_BLOCK = st.fixed_dictionaries(
    {"type": st.sampled_from(["text", "thinking", "tool_use", "tool_result", "image"])},
    optional={
        name: st.text(max_size=5) | _VALUES
        for name in ("text", "thinking", "id", "name", "input", "tool_use_id", "content", "is_error", "cache_control")
    },
)
_MESSAGE = st.fixed_dictionaries(
    {"role": st.sampled_from(["user", "assistant", "system"]), "content": st.lists(_BLOCK, max_size=3) | _VALUES}
)
_NAMES = ["model", "max_tokens", "system", "tools", "tool_choice", "thinking", "stream", "stop_sequences", "metadata"]
_NAMES += ["temperature", "top_p", "top_k", "output_config", "output_format", "cache_control", "extra_body"]


@settings(max_examples=examples(50))
@given(
    path=st.sampled_from(["", "/count_tokens"]),
    fields=st.dictionaries(st.sampled_from(_NAMES), _VALUES, max_size=3),
    messages=st.lists(_MESSAGE, max_size=3),
)
def test_fuzz(gateway, path, fields, messages):
    reply = send(gateway, path, messages=messages, **fields)
    assert reply.status_code < 500, (fields, messages, reply.text)
    assert reply.status_code == 200 or reply.json()["type"] == "error"
