"""/v1/responses over real sockets, by httpx and OpenAI's own client."""

from __future__ import annotations

import asyncio
import itertools
import json

import httpx
import openai
import pytest
import yaml
from jsonschema import Draft202012Validator as Validator
from openai.types.responses import Response
from responses_calls import TEXT, events, post, prompt_of
from waiting import until

from kvasir.cluster import responses_schema
from kvasir.cluster.batch_line import answer
from kvasir.cluster.carried import carry
from kvasir.engine.errors import ClientError
from kvasir.engine.tokenizer import Tokenizer


def test_whole(gateway, client):
    found = client.responses.create(model="bytes", input="Hi", metadata={"a": "b"}, user="me", top_p=0.5)
    assert found.output_text == TEXT
    assert (found.status, found.object, found.model, found.error) == ("completed", "response", "bytes", None)
    assert (found.temperature, found.top_p, found.metadata, found.user) == (0.25, 0.5, {"a": "b"}, "me")
    assert found.usage.model_dump(exclude_none=True) == {
        "input_tokens": 5, "input_tokens_details": {"cached_tokens": 2, "cache_write_tokens": 0},
        "output_tokens": 15, "output_tokens_details": {"reasoning_tokens": 0}, "total_tokens": 20,
    }  # fmt: skip
    Response.model_validate(found.to_dict(), strict=False)
    assert client.responses.retrieve(found.id).to_dict() == found.to_dict()


def test_stream(gateway, client):
    reply = post(gateway, stream=True)
    assert reply.headers["content-type"] == "text/event-stream; charset=utf-8"
    found = events(reply.text)
    kinds = [kind for kind, _ in itertools.groupby(one["type"] for one in found)]
    assert kinds == [
        "response.created", "response.in_progress", "response.output_item.added", "response.content_part.added",
        "response.output_text.delta", "response.output_text.done", "response.content_part.done",
        "response.output_item.done", "response.completed",
    ]  # fmt: skip
    assert "".join(one["delta"] for one in found if one["type"] == "response.output_text.delta") == TEXT
    last = found[-1]["response"]
    assert last == client.responses.retrieve(last["id"]).to_dict()
    assert {one["item_id"] for one in found if "item_id" in one} == {last["output"][0]["id"]}


def test_stream_of_the_client(client):
    with client.responses.stream(model="bytes", input="Hi", temperature=0) as stream:
        assert "".join(one.delta for one in stream if one.type == "response.output_text.delta") == TEXT
        assert stream.get_final_response().output_text == TEXT


def test_incomplete(gateway):
    whole = post(gateway, max_output_tokens=3).json()
    assert (whole["status"], whole["incomplete_details"]) == ("incomplete", {"reason": "max_output_tokens"})
    assert whole["output"][0]["status"] == "incomplete"
    assert events(post(gateway, max_output_tokens=3, stream=True).text)[-1]["type"] == "response.incomplete"


def test_conversation(gateway, client):
    """Instructions are this response's own; what was said before is rendered again."""
    first = client.responses.create(model="bytes", input="one", instructions="Be brief.")
    assert prompt_of(gateway) == b"Be brief.one"
    second = client.responses.create(
        model="bytes", previous_response_id=first.id, input=[{"role": "developer", "content": "now"}]
    )
    assert prompt_of(gateway) == b"one" + TEXT.encode() + b"now"
    third = client.responses.create(model="bytes", previous_response_id=second.id, input="three", instructions="Shout.")
    said = TEXT.encode()
    assert prompt_of(gateway) == b"Shout.one" + said + b"now" + said + b"three"
    items = client.responses.input_items.list(third.id, order="asc").data
    assert [item.role for item in items] == ["user", "assistant", "developer", "assistant", "user"]
    newest = client.responses.input_items.list(third.id, limit=2)
    assert [item.id for item in newest] == [item.id for item in reversed(items)]
    client.responses.delete(first.id)
    with pytest.raises(openai.NotFoundError, match="deleted"):
        client.responses.create(model="bytes", previous_response_id=third.id, input="four")


def test_items(gateway):
    items = [
        {"role": "system", "content": [{"type": "input_text", "text": "A"}]},
        {"type": "message", "role": "user", "content": "B"},
        {"type": "reasoning", "id": "rs_1", "summary": [{"type": "summary_text", "text": "hm"}]},
        {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "c", "output": "C"},
        {"type": "message", "role": "assistant", "id": "msg_1", "status": "completed",
         "content": [{"type": "output_text", "text": "D", "annotations": []}]},
        {"role": "user", "content": "E"},
    ]  # fmt: skip
    assert post(gateway, input=items).status_code == 200
    assert prompt_of(gateway) == b"ABCDE"


def test_pages_come_to_an_end_where_two_turns_have_items_of_one_id(client):
    first, second = ([{"id": name, "role": "user", "content": "x"} for name in names] for names in ("ab", "ca"))
    made = client.responses.create(model="bytes", input=first)
    made = client.responses.create(model="bytes", input=second, previous_response_id=made.id)
    for order in ("asc", "desc"):
        pages = client.responses.input_items.list(made.id, order=order, limit=1)
        found = [item.id for item in itertools.islice(pages, 9)]
        assert sorted(found, key=len)[:3] == (["a", "b", "c"] if order == "asc" else ["a", "c", "b"])
        assert len(found) == 4


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("responses", '{"model": "bytes", "input": [{"role": "user", "content": "x", "more": DEEP}]}', "input"),
        ("responses", '{"model": "bytes", "input": "x", "chat_template_kwargs": {"more": DEEP}}', "chat_template_kwargs"),
        ("conversations", '{"items": [{"role": "user", "content": "x", "more": DEEP}]}', "items"),
        ("chat/completions",
         '{"model": "bytes", "store": true, "messages": [{"role": "user", "content": "x", "more": DEEP}]}', "messages"),
    ],
)  # fmt: skip
def test_what_is_nested_too_deep_to_be_kept(gateway, path, body, param):
    for levels, status in ((190, 200), (300, 400)):
        content = body.replace("DEEP", '{"a": ' * levels + "1" + "}" * levels)
        headers = {"Content-Type": "application/json"}
        reply = httpx.post(f"{gateway.url}/v1/{path}", content=content, headers=headers, timeout=60)
        assert reply.status_code == status, reply.text
    assert reply.json()["error"]["param"] == param


def test_a_batch_names_the_field_that_the_client_sent(gateway, monkeypatch):
    def refuse(*_, **__):
        raise ClientError("messages[1].content must be a text", param="messages")

    monkeypatch.setattr(Tokenizer, "render_chat", refuse)
    with pytest.raises(ClientError) as caught:
        asyncio.run(answer(gateway.desk, "/v1/responses", {"model": "bytes", "input": "Hi"}))
    assert (caught.value.param, caught.value.message) == ("input", "input.content must be a text")


def test_what_says_nothing_of_reasoning_is_no_constraint(gateway):
    given = {"effort": None, "summary": None, "context": "auto", "mode": "standard"}
    for reasoning in (given, dict.fromkeys(given)):
        reply = httpx.post(gateway.url + "/v1/responses", json={"model": "bytes", "input": "x", "reasoning": reasoning})
        assert reply.status_code == 200, reply.text


def test_what_says_nothing_of_a_function(gateway):
    given = {"type": "function", "name": "f", "defer_loading": False, "allowed_callers": ["direct"], "mood": None}
    for tool in (given, {"type": "function", "name": "f", **dict.fromkeys(("defer_loading", "allowed_callers"))}):
        reply = httpx.post(gateway.url + "/v1/responses", json={"model": "bytes", "input": "x", "tools": [tool]})
        assert reply.status_code == 200, reply.text


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"input": []}, "input"),
        ({"input": None}, "input"),
        ({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]}, "input"),
        ({"input": [{"type": "item_reference"}]}, "input"),
        ({"input": [{"id": "msg_a", "role": "user", "content": "x"}] * 2}, "input"),
        ({"input": [{"role": "robot", "content": "x"}]}, "input"),
        ({"tools": [{"type": "web_search"}]}, "tools"),
        ({"tools": [{"type": "function", "name": ""}]}, "tools"),
        ({"tools": [{"type": "function", "name": "f", "defer_loading": True}]}, "tools"),
        ({"tools": [{"type": "function", "name": "f", "allowed_callers": ["programmatic"]}]}, "tools"),
        ({"tools": [{"type": "function", "name": "f", "mood": 1}]}, "tools"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"reasoning": {"effort": "often"}}, "reasoning.effort"),
        ({"reasoning": {"mood": "low"}}, "reasoning"),
        ({"reasoning": {"mode": "pro"}}, "reasoning"),
        ({"reasoning": {"context": "all_turns"}}, "reasoning"),
        ({"conversation": "conv_none"}, "conversation"),
        ({"conversation": 1}, "conversation"),
        ({"conversation": "conv_1", "previous_response_id": "resp_1"}, "conversation"),
        ({"prompt": {"id": "p"}}, "prompt"),
        ({"truncation": "some"}, "truncation"),
        ({"background": True, "store": False}, "background"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"text": {"verbosity": "low"}}, "text"),
        ({"text": {"format": {"type": "xml"}}}, "text"),
        ({"text": {"format": {"type": "json_schema", "name": "x"}}}, "text"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"metadata": {"a": 1}}, "metadata"),
        ({"service_tier": "gold"}, "service_tier"),
        ({"stream_options": {}}, "stream_options"),
        ({"reasoning": {"summary": ""}}, "reasoning.summary"),
        ({"reasoning": {"summary": False}}, "reasoning.summary"),
        ({"reasoning": {"summary": "auto", "generate_summary": 0}}, "reasoning.generate_summary"),
        ({"include": "reasoning.encrypted_content"}, "include"),
        ({"include": ""}, "include"),
        ({"include": False}, "include"),
        ({"include": [1]}, "include"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"temperature": -1}, "temperature"),
        ({"previous_response_id": "resp_none"}, "previous_response_id"),
    ],
)
def test_refusals(gateway, fields, param):
    reply = post(gateway, **fields)
    assert reply.status_code in (400, 404)
    assert reply.json()["error"]["param"] == param


@pytest.mark.parametrize("background", [True, False])
@pytest.mark.parametrize(("name", "value"), [("temperature", "hot"), ("top_p", {}), ("max_output_tokens", -1)])
def test_what_sampling_cannot_be_is_refused_at_once(gateway, background, name, value):
    reply = post(gateway, input="Hi", background=background, **{name: value})
    assert reply.status_code == 400
    assert reply.json()["error"]["param"] == name


def test_structured_output(gateway):
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    form = {"type": "json_schema", "name": "x", "schema": schema, "strict": True}
    found = post(gateway, text={"format": form}).json()
    assert json.loads(gateway.group.requests[-1].sampling.structured_outputs.json) == schema
    assert found["text"]["format"] == {**form, "description": None}


def test_logprobs(gateway):
    include = {"include": ["message.output_text.logprobs"], "top_logprobs": 2}
    (part,) = post(gateway, **include).json()["output"][0]["content"]
    assert part["logprobs"][0]["token"] == "H"
    assert [top["token"] for top in part["logprobs"][0]["top_logprobs"]] == ["H", "A"]
    streamed = events(post(gateway, stream=True, **include).text)
    scored = [score for one in streamed if one["type"].endswith("text.delta") for score in one["logprobs"]]
    assert scored == part["logprobs"]


def test_truncation(gateway):
    """The fewest oldest items go; what the system said stays, a result without its call doesn't."""
    items = [
        {"role": "system", "content": "S" * 10},
        {"role": "user", "content": "a" * 2000},
        {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "c", "output": "b" * 1700},
        {"role": "user", "content": "c" * 1500},
        {"role": "user", "content": "d" * 1000},
    ]
    assert post(gateway, input=items).json()["error"]["code"] == "context_length_exceeded"
    reply = post(gateway, input=items, truncation="auto")
    assert prompt_of(gateway) == b"S" * 10 + b"c" * 1500 + b"d" * 1000
    assert reply.headers["x-kvasir-warning"] == "ignored: input: 3 items that don't fit into the context"
    assert reply.json()["truncation"] == "auto"
    assert post(gateway, input=items, truncation="auto", max_output_tokens=2500).status_code == 200
    assert prompt_of(gateway) == b"S" * 10 + b"d" * 1000
    error = post(gateway, input="x" * 5000, truncation="auto").json()["error"]  # there is nothing to leave out
    assert (error["code"], error["param"]) == ("context_length_exceeded", "input")
    assert "5003 tokens" in error["message"]


CALLED = {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"}
RESULT = {"type": "function_call_output", "call_id": "c", "output": "b" * 1000}


def test_truncation_keeps_what_was_compacted(gateway):
    """It stands for everything before it: were it the first to go, nothing of that would be left."""
    summary = {"type": "compaction", "encrypted_content": carry("Ann wants tea.")}
    items = [summary, {"role": "user", "content": "a" * 3000}, {"role": "user", "content": "b" * 2000}]
    reply = post(gateway, input=items, truncation="auto")
    assert prompt_of(gateway) == b"Summary of the conversation so far:\nAnn wants tea." + b"b" * 2000
    assert reply.headers["x-kvasir-warning"] == "ignored: input: 1 items that don't fit into the context"


@pytest.mark.parametrize("kind", ["function", "custom_tool"])
def test_truncation_drops_results_with_their_calls(gateway, kind):
    call, result = {**CALLED, "type": f"{kind}_call"}, {**RESULT, "type": f"{kind}_call_output"}
    if kind == "custom_tool":
        call["input"] = call.pop("arguments")
    items = [call, {"role": "user", "content": "a" * 2000}, result, {"role": "user", "content": "d" * 2500}]
    assert post(gateway, input=items, truncation="auto").status_code == 200
    assert prompt_of(gateway) == b"d" * 2500


def test_truncation_keeps_the_call_whose_result_comes_last(gateway):
    reply = post(gateway, input=[CALLED, {"role": "user", "content": "a" * 3500}, RESULT], truncation="auto")
    assert reply.status_code == 200
    assert prompt_of(gateway).endswith(b"b" * 1000)


def test_input_tokens(gateway, client):
    first = client.responses.create(model="bytes", input="Hi")
    assert client.responses.input_tokens.count(model="bytes", input="Hi").input_tokens == first.usage.input_tokens
    second = client.responses.input_tokens.count(model="bytes", input="Hi", previous_response_id=first.id)
    assert second.input_tokens == client.responses.create(
        model="bytes", input="Hi", previous_response_id=first.id
    ).usage.input_tokens  # fmt: skip


def test_a_bug_ends_its_response(gateway, client, monkeypatch, caplog):
    monkeypatch.setattr("kvasir.cluster.responses_reply.usage_json", lambda *_: 1 // 0)
    found = client.responses.create(model="bytes", input="Hi", background=True)
    until(lambda: client.responses.retrieve(found.id).status == "failed")
    assert "ZeroDivisionError" in caplog.text


def test_sessions(gateway, monkeypatch):
    """What clients say belongs together reaches the router as it reads it of headers."""
    seen = []
    begin = gateway.desk.begin

    async def watched(call, request_id, headers):
        seen.append(headers.get("x-session-id"))
        return await begin(call, request_id, headers)

    monkeypatch.setattr(gateway.desk, "begin", watched)
    assert "x-kvasir-warning" not in post(gateway, prompt_cache_key="a").headers
    chat = {"model": "bytes", "messages": [{"role": "user", "content": "Hi"}], "prompt_cache_key": "b"}
    for more, headers in (({}, {}), ({"session_id": "c"}, {}), ({}, {"X-Session-ID": "d"})):
        httpx.post(gateway.url + "/v1/chat/completions", json=chat | more, headers=headers)
    assert seen == ["a", "b", "c", "d"]


def test_every_specified_field_is_in_one_table(data):
    with open(data("api-openai/openapi.inference-only.yaml")) as file:
        schemas = yaml.load(file, getattr(yaml, "CSafeLoader", yaml.SafeLoader))["components"]["schemas"]

    def fields(schema):
        parts = [
            schemas[part["$ref"].rsplit("/", 1)[1]] if "$ref" in part else part for part in schema.get("allOf", ())
        ]
        return set(schema.get("properties", ())).union(*map(fields, parts))

    names = fields(schemas["CreateResponse"])
    assert len(names) > 25
    tables = (responses_schema.HONOURED, responses_schema.IGNORED, responses_schema.REFUSED)
    assert {name for name in names if sum(name in table for table in tables) != 1} == set()


def test_answers_are_as_specified(gateway, data):
    """Null is written for fields that aren't set, as OpenAI does, though its schemas say that `user` and `usage` are left out."""
    with open(data("api-openai/openapi.inference-only.yaml")) as file:
        loaded = yaml.load(file, getattr(yaml, "CSafeLoader", yaml.SafeLoader))["components"]
    components = _json_schema(loaded)

    def check(name, value):
        schema = {"components": components, "$ref": f"#/components/schemas/{name}"}
        found = [(list(error.path), error.message[:200]) for error in Validator(schema).iter_errors(value)]
        assert found == [], value

    fields = {"user": "me", "metadata": {"a": "b"}, "text": {"format": {"type": "json_object"}}}
    check("Response", post(gateway, **fields).json())
    kinds = set()
    for event in events(post(gateway, stream=True, max_output_tokens=2, **fields).text):
        if event["type"] not in kinds:
            kinds.add(event["type"])
            if "response" in event and event["response"]["usage"] is None:
                del event["response"]["usage"]
            check("ResponseStreamEvent", event)
    assert len(kinds) == 9


def _json_schema(schema):
    """OpenAPI's schema as JSON Schema has it."""
    if isinstance(schema, list):
        return [_json_schema(one) for one in schema]
    if not isinstance(schema, dict):
        return schema
    found = {name: _json_schema(one) for name, one in schema.items() if name not in ("discriminator", "nullable")}
    return {"anyOf": [found, {"type": "null"}]} if schema.get("nullable") is True else found


def test_documented_examples(gateway, data):
    """Each is answered, or refused for a field that it names."""
    checked = answered = 0
    for line in data("api-openai/examples.jsonl").read_text().splitlines():
        example = json.loads(line)
        if not example["path"].startswith("/responses") or "-d '" not in example["curl"]:
            continue
        body = json.loads(example["curl"].split("-d '")[1].rsplit("'", 1)[0]) | {"model": "bytes"}
        reply = httpx.post(f"{gateway.url}/v1{example['path']}", json=body)
        checked += 1
        if reply.status_code == 200:
            answered += 1
            if body.get("stream"):
                events(reply.text)
        else:
            error = reply.json()["error"]
            assert (reply.status_code, error["code"]) == (400, "unsupported_parameter")
            assert error["param"] in body
    assert (checked, answered) == (9, 5)


def test_nothing_is_kept_unless_wanted(gateway, client):
    found = client.responses.create(model="bytes", input="Hi", store=False)
    assert found.store is False
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(found.id)


def test_priority_and_warnings(gateway):
    reply = post(gateway, service_tier="flex", max_tool_calls=3, include=["file_search_call.results"], nonsense=1)
    assert gateway.group.requests[-1].priority == 100
    assert reply.json()["service_tier"] == "flex"
    assert reply.headers["x-kvasir-warning"] == "ignored: nonsense, include: file_search_call.results"
