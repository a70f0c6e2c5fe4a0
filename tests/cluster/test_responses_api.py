"""/v1/responses over real sockets, by httpx and OpenAI's own client."""

from __future__ import annotations

import itertools
import json
import time
from dataclasses import replace

import httpx
import openai
import pydantic
import pytest
import yaml
from jsonschema import Draft202012Validator as Validator
from openai.types.responses import Response, ResponseStreamEvent
from waiting import until

from kvasir.cluster import responses_schema
from kvasir.cluster.carried import carry
from kvasir.cluster.config import GatewayConfig
from kvasir.cluster.store import Store
from kvasir.engine.errors import ConfigError, OverloadedError

TEXT = "Hello, wörld!"
EVENT = pydantic.TypeAdapter(ResponseStreamEvent)


@pytest.fixture
def client(gateway):
    with openai.OpenAI(base_url=gateway.url + "/v1", api_key="any", max_retries=0) as client:
        yield client


def post(gateway, **body):
    return httpx.post(gateway.url + "/v1/responses", json={"model": "bytes", "input": "Hi"} | body, timeout=60)


def events(text):
    """The JSON of each event, whose name is its type and whose numbers follow each other."""
    found = []
    for frame in filter(None, text.split("\n\n")):
        head, data = frame.split("\n")
        value = json.loads(data.removeprefix("data: "))
        assert head == f"event: {value['type']}"
        EVENT.validate_python(value, strict=False)
        found.append(value)
    first = found[0]["sequence_number"]
    assert [one["sequence_number"] for one in found] == list(range(first, first + len(found)))
    return found


def prompt_of(gateway):
    return bytes(t for t in gateway.group.requests[-1].prompt_token_ids if t < 256)


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


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"input": []}, "input"),
        ({"input": None}, "input"),
        ({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]}, "input"),
        ({"input": [{"type": "item_reference", "id": "msg_1"}]}, "input"),
        ({"input": [{"role": "robot", "content": "x"}]}, "input"),
        ({"tools": [{"type": "web_search"}]}, "tools"),
        ({"tools": [{"type": "function", "name": ""}]}, "tools"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"reasoning": {"effort": "often"}}, "reasoning.effort"),
        ({"reasoning": {"mood": "low"}}, "reasoning"),
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
    assert post(gateway, input="x" * 5000, truncation="auto").status_code == 400


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


def test_background(gateway, client):
    found = client.responses.create(model="bytes", input="Hi", background=True)
    assert found.status == "queued"
    until(lambda: client.responses.retrieve(found.id).status == "completed")
    assert client.responses.retrieve(found.id).output_text == TEXT
    assert client.responses.cancel(found.id).status == "completed"
    reply = httpx.get(f"{gateway.url}/v1/responses/{found.id}?stream=true")
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, "stream")
    once = client.responses.create(model="bytes", input="Hi")
    with pytest.raises(openai.BadRequestError, match="background"):
        client.responses.cancel(once.id)


def test_background_stream_goes_on_elsewhere(gateway, client):
    gateway.group.step_s = 0.03
    try:
        seen = []
        with client.responses.create(model="bytes", input="Hi", background=True, stream=True) as stream:
            for event in stream:
                seen.append(event)
                if event.type == "response.output_text.delta":
                    break
        response_id = seen[0].response.id
        rest = list(client.responses.retrieve(response_id, stream=True, starting_after=seen[-1].sequence_number))
    finally:
        gateway.group.step_s = 0.0
    assert [one.sequence_number for one in (*seen, *rest)] == list(range(len(seen) + len(rest)))
    assert [one.type for one in seen[:3]] == ["response.created", "response.queued", "response.in_progress"]
    assert "".join(one.delta for one in (*seen, *rest) if one.type == "response.output_text.delta") == TEXT
    assert rest[-1].type == "response.completed"
    assert rest[-1].response.to_dict() == client.responses.retrieve(response_id).to_dict()
    again = httpx.get(f"{gateway.url}/v1/responses/{response_id}?stream=true").text
    assert len(events(again)) == len(seen) + len(rest)
    for query in ("stream=1", "stream=true&starting_after=x"):
        assert httpx.get(f"{gateway.url}/v1/responses/{response_id}?{query}").status_code == 400


@pytest.mark.parametrize("end", ["cancel", "delete"])
def test_background_is_ended(gateway, client, end):
    gateway.group.step_s = 0.1
    try:
        found = client.responses.create(model="bytes", input="Hi", background=True)
        until(lambda: gateway.group.running)
        with pytest.raises(openai.BadRequestError, match="wait"):
            client.responses.create(model="bytes", input="x", previous_response_id=found.id)
        getattr(client.responses, end)(found.id)
        until(lambda: not gateway.group.running)
    finally:
        gateway.group.step_s = 0.0
    if end == "cancel":
        assert client.responses.retrieve(found.id).status == "cancelled"
    else:
        with pytest.raises(openai.NotFoundError):
            client.responses.retrieve(found.id)


def test_background_waits_for_room(live_gateway, monkeypatch):
    monkeypatch.setattr("kvasir.cluster.background.RETRY_S", 0.05)
    with live_gateway() as gateway:
        gateway.group.refusal = OverloadedError("the queue is full")
        found = post(gateway, background=True).json()
        time.sleep(0.2)
        place = f"{gateway.url}/v1/responses/{found['id']}"
        assert httpx.get(place).json()["status"] == "queued"
        gateway.group.refusal = None
        until(lambda: httpx.get(place).json()["status"] == "completed")


def test_background_fails(gateway, client):
    """What can be known at once is said at once; a failure later is the response's."""
    assert post(gateway, background=True, input="x" * 5000).status_code == 400
    gateway.group.dies_after = 2
    try:
        found = client.responses.create(model="bytes", input="Hi", background=True, stream=True)
        last = list(found)[-1]
    finally:
        gateway.group.dies_after = None
    assert (last.type, last.response.error.code) == ("response.failed", "server_error")
    assert client.responses.retrieve(last.response.id).status == "failed"


def test_stream_that_fails(gateway):
    gateway.group.dies_after = 2
    try:
        last = events(post(gateway, stream=True).text)[-1]
    finally:
        gateway.group.dies_after = None
    assert last["type"] == "response.failed"


def test_another_key_sees_nothing(live_gateway, tmp_path):
    config = GatewayConfig(api_key=("one", "two"), state_path=str(tmp_path / "deep" / "state.db"))
    with live_gateway(config) as gateway:
        mine, theirs = (
            openai.OpenAI(base_url=gateway.url + "/v1", api_key=key, max_retries=0) for key in ("one", "two")
        )
        with mine, theirs:
            found = mine.responses.create(model="bytes", input="secret")
            calls = [
                lambda c: c.responses.retrieve(found.id),
                lambda c: c.responses.input_items.list(found.id).data,
                lambda c: c.responses.create(model="bytes", input="x", previous_response_id=found.id),
                lambda c: c.responses.cancel(found.id),
                lambda c: c.responses.delete(found.id),
            ]
            for call in calls:
                with pytest.raises(openai.NotFoundError):
                    call(theirs)
            assert mine.responses.retrieve(found.id).output_text == TEXT
    state = (tmp_path / "deep" / "state.db").read_bytes()
    assert b"secret" in state
    assert (tmp_path / "deep" / "state.db").stat().st_mode & 0o777 == 0o600


def test_gateways_share_a_file(live_gateway, tmp_path, monkeypatch):
    """One continues, cancels and takes over what another began."""
    monkeypatch.setattr("kvasir.cluster.background.WATCH_S", 0.1)
    config = GatewayConfig(state_path=str(tmp_path / "state.db"))
    with live_gateway(config) as one:
        with live_gateway(config) as other:
            first = post(one).json()
            assert post(other, previous_response_id=first["id"]).status_code == 200
            one.group.step_s = 0.2
            running = post(one, background=True).json()
            until(lambda: one.group.running)
            assert httpx.post(f"{other.url}/v1/responses/{running['id']}/cancel").json()["status"] == "cancelled"
            until(lambda: not one.group.running)
            other.group.step_s = 5
            left = post(other, background=True).json()
            streamed = httpx.stream("POST", other.url + "/v1/responses", json={
                "model": "bytes", "input": "Hi", "background": True, "stream": True})  # fmt: skip
            with streamed as reply:
                begun = json.loads(next(line for line in reply.iter_lines() if line.startswith("data"))[6:])["response"]
        one.group.step_s = 0.0
        until(lambda: httpx.get(f"{one.url}/v1/responses/{left['id']}").json()["status"] == "completed")
        ended = httpx.get(f"{one.url}/v1/responses/{begun['id']}?stream=true").text
        assert events(ended)[-1]["type"] == "response.failed"


def test_state_that_cannot_be_used(live_gateway, tmp_path, monkeypatch, caplog):
    (tmp_path / "file").write_text("this is no database, and long enough to be seen to be none" * 20)
    with pytest.raises(ConfigError, match="--state-path"):
        Store.open(str(tmp_path / "file"), 2**20, {})
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "file"))
    gateway = live_gateway()
    gateway.config = replace(gateway.config, state_path=None)
    with gateway:
        found = post(gateway).json()
        assert httpx.get(f"{gateway.url}/v1/responses/{found['id']}").status_code == 200
    assert "in memory" in caplog.text


def test_time_to_live(live_gateway):
    with live_gateway(GatewayConfig(state_path=":memory:", response_ttl_s=1.0)) as gateway:
        found = post(gateway).json()
        place = f"{gateway.url}/v1/responses/{found['id']}"
        assert httpx.get(place).status_code == 200
        until(lambda: httpx.get(place).status_code == 404)


# -- compaction


def compacted(gateway, **body):
    return httpx.post(gateway.url + "/v1/responses/compact", json={"model": "bytes"} | body, timeout=60)


def test_the_next_turn_reads_the_summary(gateway, monkeypatch):
    monkeypatch.setattr(gateway.group, "script", lambda request, index: [*b" Ann wants tea. ", 256])
    said = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "I am Ann. Tea, please."}]
    small = compacted(gateway, input=said).json()
    assert prompt_of(gateway).decode().endswith("Write nothing but the summary.")
    post(gateway, input=[*small["output"], {"role": "user", "content": "What do I want?"}])
    summary = "Be brief.\n\nSummary of the conversation so far:\nAnn wants tea."
    assert prompt_of(gateway).decode() == f"{summary}What do I want?"


@pytest.mark.parametrize(
    ("answer", "why"), [([*b"  ", 256], "wrote no summary"), (b"Ann wants", "had no end after 1024 tokens")]
)
def test_a_summary_that_says_nothing_is_an_error(gateway, monkeypatch, answer, why):
    monkeypatch.setattr(gateway.group, "script", lambda request, index: answer)
    answered = compacted(gateway, input="Tea, please.")
    assert answered.status_code == 500
    assert why in answered.json()["error"]["message"]


def test_a_summary_is_written_without_thoughts(gateway, monkeypatch):
    model, rendered = type(gateway.model), []
    render = model._render

    def seen(self, conversation):
        rendered.append(conversation)
        return render(self, conversation)

    monkeypatch.setattr(model, "_render", seen)
    assert compacted(gateway, input="Tea").status_code == 200
    assert rendered
    assert all(one.variables["enable_thinking"] is False for one in rendered)


def test_a_compaction_has_its_id_and_takes_what_says_nothing(gateway):
    neutral = {
        "stream": False,
        "store": False,
        "background": False,
        "tools": [],
        "include": [],
        "metadata": {},
        "unknown": 1,
    }
    neutral |= {
        "tool_choice": "auto",
        "truncation": "disabled",
        "parallel_tool_calls": True,
        "text": {},
        "reasoning": {},
    }
    reply = compacted(gateway, input="Tea", request_id="mine", **neutral)
    assert (reply.status_code, reply.headers["x-request-id"]) == (200, "mine"), reply.text
    assert gateway.group.requests[-1].request_id.startswith("mine")
    assert reply.headers["x-kvasir-warning"] == "ignored: unknown"


@pytest.mark.parametrize(
    "fields", [{"stream": True}, {"tools": [{"type": "function", "name": "f"}]}, {"temperature": 1}]
)
def test_a_compaction_refuses_what_it_doesnt_read(gateway, fields):
    reply = compacted(gateway, input="Tea", **fields)
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, *fields)


@pytest.mark.parametrize("field", ["id", "status", "phase"])
def test_facts_of_items_are_texts(gateway, field):
    answer = post(gateway, input=[{"role": "user", "content": "Hi", field: 5}])
    assert answer.status_code == 400
    assert f"input[0].{field} must be a string" in answer.json()["error"]["message"]
