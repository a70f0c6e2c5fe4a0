"""kvasir.v1's responses, conversations, decisions, files and batches over a real socket: what HTTP has, by the other door."""

from __future__ import annotations

import itertools
import json

import grpc
import httpx
import pytest
from google.protobuf.json_format import MessageToDict
from google.protobuf.struct_pb2 import Value
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase
from waiting import until

from kvasir.cluster import decisions_schema, responses_schema
from kvasir.cluster.config import GatewayConfig
from kvasir.cluster.grpc_json import as_message
from kvasir.engine.errors import OverloadedError
from kvasir.proto import files_pb2, files_pb2_grpc, inference_pb2, responses_pb2, responses_pb2_grpc
from kvasir.proto.inference_pb2_grpc import InferenceStub

TEXT = "Hello, wörld!"
HI = responses_pb2.Item(role="user", text="Hi")
ASK = responses_pb2.CreateResponseRequest(model="bytes", input_text="Hi")
WEATHER = inference_pb2.Tool(name="weather", description="Tells it.")
WEATHER.parameters.update({"type": "object", "properties": {"days": {"type": "integer", "maximum": 5}}})


class Stubs:
    def __init__(self, gateway, metadata=()):
        self.channel = grpc.insecure_channel(gateway.grpc_address)
        self.responses = responses_pb2_grpc.ResponsesStub(self.channel)
        self.conversations = responses_pb2_grpc.ConversationsStub(self.channel)
        self.decisions = responses_pb2_grpc.DecisionsStub(self.channel)
        self.files = files_pb2_grpc.FilesStub(self.channel)
        self.batches = files_pb2_grpc.BatchesStub(self.channel)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.channel.close()


@pytest.fixture
def stubs(gateway):
    with Stubs(gateway) as found:
        yield found


def named(object_id):
    return files_pb2.IdRequest(id=object_id)


def ask(**fields):
    return responses_pb2.CreateResponseRequest(**{"model": "bytes", "input_text": "Hi", **fields})


def whole(found):
    return list(found) if hasattr(found, "__next__") else found


def refused(call, *args, **options):
    """(status, kvasir-param, details) of a call."""
    with pytest.raises(grpc.RpcError) as caught:
        whole(call(*args, timeout=60, **options))
    error = caught.value
    return error.code(), dict(error.trailing_metadata() or ()).get("kvasir-param"), error.details()


def prompt_of(gateway):
    return bytes(token for token in gateway.group.requests[-1].prompt_token_ids if token < 256).decode()


# -- responses


def test_a_response_is_the_same_through_both_doors(gateway, stubs):
    given = ask(
        instructions="Be brief.", metadata={"a": "b"}, top_p=0.5, seed=7, max_output_tokens=20, return_timing=True
    )
    call = stubs.responses.Create.with_call(given, timeout=60, metadata=(("x-request-id", "mine"),))
    made, rpc = call
    assert dict(rpc.initial_metadata())["x-request-id"] == "mine"
    assert dict(rpc.trailing_metadata())["server-timing"].startswith("queue;dur=")
    assert made.output[0].content[0].text == TEXT
    assert (made.status, made.temperature, made.top_p, made.metadata["a"]) == ("completed", 0.25, 0.5, "b")
    assert (made.usage.output_tokens, made.usage.input_tokens_details.cached_tokens) == (15, 2)
    assert made.timing.group
    sampling = gateway.group.requests[-1].sampling
    assert (sampling.seed, sampling.max_tokens) == (7, 20)
    body = httpx.get(f"{gateway.url}/v1/responses/{made.id}").json()
    assert as_message(responses_pb2.Response, body) == made == stubs.responses.Get(named(made.id), timeout=60)
    then = stubs.responses.Create(ask(input_text="More", previous_response_id=made.id), timeout=60)
    assert prompt_of(gateway) == "Hi" + TEXT + "More"
    items = stubs.responses.ListInputItems(responses_pb2.ListItemsRequest(id=then.id, order="asc", limit=2), timeout=60)
    assert [item.content[0].text for item in items.data] == ["Hi", TEXT]
    assert items.has_more
    assert stubs.responses.Delete(named(made.id), timeout=60).deleted
    assert refused(stubs.responses.Get, named(made.id))[0] == grpc.StatusCode.NOT_FOUND
    assert refused(stubs.responses.Create, ask(previous_response_id=made.id))[:2] == (
        grpc.StatusCode.NOT_FOUND, "previous_response_id",
    )  # fmt: skip


def test_the_events_are_those_of_http(gateway, stubs):
    events = list(
        stubs.responses.CreateStream(ask(include=["message.output_text.logprobs"], top_logprobs=2), timeout=60)
    )
    body = {
        "model": "bytes",
        "input": "Hi",
        "stream": True,
        "include": ["message.output_text.logprobs"],
        "top_logprobs": 2,
    }
    reply = httpx.post(gateway.url + "/v1/responses", json=body)
    sent = [json.loads(frame.split("\ndata: ")[1]) for frame in reply.text.split("\n\n")[:-1]]
    kinds = [
        kind for kind, _ in itertools.groupby(event.type for event in events)
    ]  # how many deltas is a matter of time
    assert kinds == [kind for kind, _ in itertools.groupby(one["type"] for one in sent)]
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert "".join(event.delta for event in events) == TEXT
    for kind in kinds:
        event, one = next(one for one in events if one.type == kind), next(one for one in sent if one["type"] == kind)
        told = MessageToDict(event, preserving_proto_field_name=True)
        assert set(told) == {name for name, value in one.items() if value or name in told}
    scores = next(event for event in events if event.delta).logprobs
    assert (scores[0].token, list(scores[0].bytes), len(scores[0].top_logprobs)) == ("H", [72], 2)
    assert stubs.responses.Get(named(events[-1].response.id), timeout=60) == events[-1].response


def test_in_the_background(live_gateway):
    with live_gateway() as gateway, Stubs(gateway) as stubs:
        gateway.group.step_s = 0.02
        made = stubs.responses.Create(ask(background=True), timeout=60)
        assert (made.status, made.background) == ("queued", True)
        until(lambda: stubs.responses.Get(named(made.id), timeout=60).status == "completed")
        stream = stubs.responses.CreateStream(ask(background=True), timeout=60)
        seen = list(itertools.islice(stream, 6))
        stream.cancel()
        follow = responses_pb2.FollowResponseRequest(id=seen[0].response.id, starting_after=5)
        rest = list(stubs.responses.Follow(follow, timeout=60))
        assert [event.sequence_number for event in rest] == list(range(6, 6 + len(rest)))
        assert "".join(event.delta for event in (*seen, *rest)) == TEXT
        assert rest[-1].type == "response.completed"
        assert refused(stubs.responses.Follow, responses_pb2.FollowResponseRequest(id=made.id))[1] == "stream"
        gateway.group.step_s = 0.2
        made = stubs.responses.Create(ask(background=True), timeout=60)
        assert stubs.responses.Cancel(named(made.id), timeout=60).status == "cancelled"
        until(lambda: not gateway.group.running)
        foreground = stubs.responses.Create(ask(max_output_tokens=1), timeout=60)
        assert refused(stubs.responses.Cancel, named(foreground.id))[1] == "response_id"


def test_tools_thoughts_and_structure(thinker):
    thinker.group.script = lambda request, index: [
        *b'<think>Hm.</think><tool_call>{"name": "weather", "arguments": {"days": 2}}</tool_call>', 256,
    ]  # fmt: skip
    with Stubs(thinker) as stubs:
        given = {"tools": [WEATHER], "reasoning": responses_pb2.Reasoning(summary="auto"), "thinking_token_budget": 50}
        made, rpc = stubs.responses.Create.with_call(ask(**given), timeout=60)
        thoughts, call = made.output
        assert (thoughts.type, thoughts.summary[0].text) == ("reasoning", "Hm.")
        assert (call.type, call.name, json.loads(call.arguments)) == ("function_call", "weather", {"days": 2})
        assert "reasoning.summary" in dict(rpc.trailing_metadata())["x-kvasir-warning"]
        prompt = bytes(token for token in thinker.group.requests[-1].prompt_token_ids if token < 256)
        assert b'{"days": {"maximum": 5, "type": "integer"}}' in prompt  # sorted, and not 5.0
        ordered = inference_pb2.Tool(name="f", parameters_json='{"type":"object","properties":{"b":{},"a":{}}}')
        stubs.responses.Create(ask(tools=[ordered]), timeout=60)
        prompt = bytes(token for token in thinker.group.requests[-1].prompt_token_ids if token < 256)
        assert b'"parameters": {"type": "object", "properties": {"b": {}, "a": {}}}' in prompt
        result = responses_pb2.Item(type="function_call_output", call_id=call.call_id, output="rain")
        thinker.group.script = lambda request, index: [*b"Rain.", 256]
        then = stubs.responses.Create(
            responses_pb2.CreateResponseRequest(input=[result], previous_response_id=made.id, tools=[WEATHER]),
            timeout=60,
        )
        assert then.output[-1].content[0].text == "Rain."
        assert b"rain" in bytes(token for token in thinker.group.requests[-1].prompt_token_ids if token < 256)
        for choice in ({"tool_choice": "weather"}, {"allowed_tools": ["weather"], "tool_choice": "required"}):
            list(stubs.responses.CreateStream(ask(tools=[WEATHER], **choice), timeout=60))
            assert "weather" in thinker.group.requests[-1].sampling.structured_outputs.structural_tag
        form = responses_pb2.TextFormat(type="json_schema", schema='{"type": "object"}', name="n")
        stubs.responses.Create(ask(text=responses_pb2.ResponseText(format=form)), timeout=60)
        assert json.loads(thinker.group.requests[-1].sampling.structured_outputs.json) == {"type": "object"}


def test_count_and_compact(gateway, stubs, monkeypatch):
    assert stubs.responses.CountInput(ask(), timeout=60).input_tokens == 5
    monkeypatch.setattr(gateway.group, "script", lambda request, index: [*b" Ann wants tea. ", 256])
    small = stubs.responses.Compact(responses_pb2.CompactRequest(input=[HI]), timeout=60)
    assert small.usage.output_tokens > 0
    stubs.responses.Create(responses_pb2.CreateResponseRequest(input=[*small.output, HI]), timeout=60)
    assert prompt_of(gateway) == "Summary of the conversation so far:\nAnn wants tea.Hi"


def test_conversations(gateway, stubs):
    them = stubs.conversations
    made = them.Create(responses_pb2.CreateConversationRequest(items=[HI], metadata={"a": "b"}), timeout=60)
    assert them.Get(named(made.id), timeout=60) == made
    changed = them.Update(responses_pb2.UpdateConversationRequest(id=made.id, metadata={"c": "d"}), timeout=60)
    assert dict(changed.metadata) == {"c": "d"}
    assert not them.Update(responses_pb2.UpdateConversationRequest(id=made.id), timeout=60).metadata
    more = them.AddItems(responses_pb2.AddItemsRequest(id=made.id, items=[HI, HI]), timeout=60)
    assert len(more.data) == 2
    stubs.responses.Create(ask(conversation=made.id, input_text="Now"), timeout=60)
    assert prompt_of(gateway) == "HiHiHiNow"
    page = them.ListItems(responses_pb2.ListItemsRequest(id=made.id, order="asc", limit=4), timeout=60)
    assert [item.content[0].text for item in page.data] == ["Hi", "Hi", "Hi", "Now"]
    assert page.has_more
    one = responses_pb2.ItemRequest(id=made.id, item_id=page.data[3].id)
    assert them.GetItem(one, timeout=60) == page.data[3]
    assert them.DeleteItem(one, timeout=60).id == made.id
    assert refused(them.GetItem, one)[:2] == (grpc.StatusCode.NOT_FOUND, "item_id")
    assert httpx.get(f"{gateway.url}/v1/conversations/{made.id}/items").json()["data"][0]["role"] == "assistant"
    assert them.Delete(named(made.id), timeout=60).deleted
    assert refused(them.Get, named(made.id))[0] == grpc.StatusCode.NOT_FOUND


def test_results_in_parts_come_back_as_parts(gateway, stubs):
    call = {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"}
    result = {"type": "function_call_output", "call_id": "c", "output": [{"type": "input_text", "text": "a"}]}
    body = {"items": [call, result]}
    made = httpx.post(gateway.url + "/v1/conversations", json=body).json()
    last = stubs.conversations.ListItems(responses_pb2.ListItemsRequest(id=made["id"]), timeout=60).data[0]
    assert [part.text for part in last.output_parts] == ["a"]
    again = stubs.conversations.Create(responses_pb2.CreateConversationRequest(items=[last]), timeout=60)
    items = httpx.get(f"{gateway.url}/v1/conversations/{again.id}/items").json()["data"]
    assert items[0]["output"] == [{"type": "input_text", "text": "a"}]


# -- decisions


def test_decisions_are_those_of_http(gateway, stubs):
    def choices(*values):
        return [responses_pb2.Choice(value=value) for value in values]

    questions = [
        responses_pb2.Question(type="predicate", name="angry", instructions="Is she angry?"),
        responses_pb2.Question(
            type="choice", instructions="What?", choices=choices(Value(string_value="help"), Value(bool_value=True))
        ),
        responses_pb2.Question(
            type="score",
            instructions="How?",
            levels=[responses_pb2.Level(value=1, label="low"), responses_pb2.Level(value=5)],
        ),
    ]
    given = responses_pb2.DecideRequest(model="bytes", input_text="Ann", questions=questions, return_timing=True)
    told, rpc = stubs.decisions.Decide.with_call(given, timeout=60)
    body = {"model": "bytes", "input": "Ann", "questions": [
        {"type": "predicate", "name": "angry", "instructions": "Is she angry?"},
        {"type": "choice", "instructions": "What?", "choices": [{"value": "help"}, {"value": True}]},
        {"type": "score", "instructions": "How?", "levels": [{"value": 1, "label": "low"}, {"value": 5}]}]}  # fmt: skip
    answers = httpx.post(gateway.url + "/v1/decisions", json=body).json()["answers"]
    assert list(told.answers) == [as_message(responses_pb2.Decision, one) for one in answers]
    predicate, choice, score = told.answers
    assert (predicate.name, round(predicate.probability, 2)) == ("angry", 0.38)  # a token more costs half a nat
    assert {one.value.WhichOneof("kind") for one in choice.probabilities} == {"string_value", "bool_value"}
    assert score.probabilities[0].label == "low"
    assert "server-timing" in dict(rpc.trailing_metadata())
    assert told.timing.group


# -- files and batches


def test_files_and_batches(gateway, stubs, monkeypatch):
    monkeypatch.setattr("kvasir.cluster.batch_run.LOOK_S", 0.02)
    body = {"model": "bytes", "messages": [{"role": "user", "content": "Hi"}]}
    lines = [{"custom_id": str(n), "method": "POST", "url": "/v1/chat/completions", "body": body} for n in range(3)]
    data = "\n".join(map(json.dumps, lines)).encode()
    info = files_pb2.FileInfo(
        purpose="batch", filename="a.jsonl", expires_after=files_pb2.ExpiresAfter(anchor="created_at", seconds=3600)
    )
    parts = [files_pb2.UploadRequest(data=data[start : start + 50]) for start in range(0, len(data), 50)]
    file = stubs.files.Upload(iter([files_pb2.UploadRequest(info=info), *parts]), timeout=60)
    assert (file.bytes, file.filename, file.expires_at - file.created_at) == (len(data), "a.jsonl", 3600)
    assert httpx.get(f"{gateway.url}/v1/files/{file.id}/content").content == data
    batch = stubs.batches.Create(
        files_pb2.CreateBatchRequest(
            input_file_id=file.id, endpoint="/v1/chat/completions", completion_window="24h", metadata={"a": "b"}
        ),
        timeout=60,
    )
    assert (batch.status, batch.metadata["a"]) == ("validating", "b")
    until(lambda: stubs.batches.Get(named(batch.id), timeout=60).status == "completed")
    done = stubs.batches.Get(named(batch.id), timeout=60)
    assert (done.request_counts.total, done.request_counts.completed, done.usage.output_tokens) == (3, 3, 45)
    answers = b"".join(part.data for part in stubs.files.Content(named(done.output_file_id), timeout=60))
    assert {json.loads(one)["custom_id"] for one in answers.splitlines()} == {"0", "1", "2"}
    assert [one.id for one in stubs.batches.List(files_pb2.ListRequest(limit=1), timeout=60).data] == [batch.id]
    listed = stubs.files.List(files_pb2.ListFilesRequest(purpose="batch_output"), timeout=60).data
    assert [one.id for one in listed] == [done.output_file_id]
    assert refused(stubs.batches.Cancel, named(batch.id))[1] == "batch_id"
    assert stubs.files.Get(named(file.id), timeout=60) == file
    assert stubs.files.Delete(named(file.id), timeout=60).deleted
    assert refused(stubs.files.Content, named(file.id))[0] == grpc.StatusCode.NOT_FOUND


@pytest.mark.parametrize(("parts", "param"), [
    ([], "info"), ([{"data": b"a"}], "info"), ([{"info": {}}], "purpose"), ([{"info": {"purpose": "fine-tune"}}], "purpose"),
    ([{"info": {"purpose": "batch"}}] * 2, "data"), ([{"info": {"purpose": "batch"}}, {}], "data"),
    ([{"info": {"purpose": "batch", "expires_after": {"anchor": "created_at", "seconds": 5}}}], "expires_after"),
])  # fmt: skip
def test_uploads_that_are_refused(stubs, parts, param):
    before = stubs.files.List(files_pb2.ListFilesRequest(), timeout=60)
    sent = iter([files_pb2.UploadRequest(**part) for part in parts])
    assert refused(stubs.files.Upload, sent)[:2] == (grpc.StatusCode.INVALID_ARGUMENT, param)
    assert stubs.files.List(files_pb2.ListFilesRequest(), timeout=60) == before


def test_a_file_that_is_too_large(stubs, monkeypatch):
    before = stubs.files.List(files_pb2.ListFilesRequest(), timeout=60)
    monkeypatch.setattr("kvasir.cluster.files.MAX_FILE_BYTES", 100)
    info = files_pb2.UploadRequest(info=files_pb2.FileInfo(purpose="batch"))
    sent = iter([info, *[files_pb2.UploadRequest(data=b"a" * 60)] * 2])
    assert refused(stubs.files.Upload, sent)[0] == grpc.StatusCode.RESOURCE_EXHAUSTED
    assert stubs.files.List(files_pb2.ListFilesRequest(), timeout=60) == before


# -- refusals


def part(**fields):
    return responses_pb2.Item(role="user", content=[responses_pb2.ContentPart(**fields)])


@pytest.mark.parametrize(("fields", "param", "says"), [
    ({"input": [HI]}, "input", "send input or input_text, not both"),
    ({"input_text": None}, "input", "input must be"),
    ({"input_text": None, "input": [responses_pb2.Item(role="user", text="a", content=part().content)]}, "input", "not both"),
    ({"input_text": None, "input": [responses_pb2.Item(type="image")]}, "input", "'image'"),
    ({"input_text": None, "input": [part(type="input_image")]}, "input", "'input_image'"),
    ({"model": "other"}, "model", "'other'"),
    ({"temperature": -1}, "temperature", "temperature"),
    ({"max_output_tokens": 0}, "max_output_tokens", "from 1"),
    ({"max_output_tokens": 5000}, "max_output_tokens", "max_output_tokens is 5000, 5005 together; the context is 4096"),
    ({"background": True, "store": False}, "background", "store"),
    ({"conversation": "a", "previous_response_id": "b"}, "conversation", "exclude"),
    ({"conversation": "a"}, "conversation", "'a'"),
    ({"tool_choice": "required"}, "tool_choice", "needs tools"),
    ({"tools": [inference_pb2.Tool(name="f", parameters_json="{")]}, "tools", "parameters_json"),
    ({"tools": [inference_pb2.Tool(name="f", parameters_json="{}", parameters={})]}, "tools", "not both"),
    ({"tools": [WEATHER], "tool_choice": "other"}, "tool_choice", "'other'"),
    ({"tools": [WEATHER], "allowed_tools": ["other"]}, "tool_choice", "'other'"),
    ({"tools": [WEATHER], "allowed_tools": ["weather"], "tool_choice": "none"}, "tool_choice", "allowed_tools"),
    ({"text": responses_pb2.ResponseText(verbosity="low")}, "text", "verbosity"),
    ({"text": responses_pb2.ResponseText(format=responses_pb2.TextFormat(type="xml"))}, "text", "xml"),
    ({"text": responses_pb2.ResponseText(format=responses_pb2.TextFormat(type="json_schema"))}, "text", "no schema"),
    ({"text": responses_pb2.ResponseText(format=responses_pb2.TextFormat(type="json_schema", schema="{"))}, "text", "JSON"),
    ({"reasoning": responses_pb2.Reasoning(effort="most")}, "reasoning.effort", "most"),
    ({"top_logprobs": 2}, "top_logprobs", "include"),
    ({"truncation": "left"}, "truncation", "left"),
    ({"service_tier": "best"}, "service_tier", "best"),
    ({"metadata": {"a" * 65: "b"}}, "metadata", "64"),
])  # fmt: skip
@pytest.mark.parametrize("method", ["Create", "CreateStream"])
def test_what_is_wrong_is_refused_by_name(stubs, method, fields, param, says):
    status, named_, details = refused(getattr(stubs.responses, method), ask(**fields))
    assert status in (grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.NOT_FOUND)
    assert named_ == param
    assert says in details


@pytest.mark.parametrize(("question", "says"), [
    ({}, "type"), ({"type": "predicate"}, "instructions"), ({"type": "choice", "instructions": "a"}, "choices"),
    ({"type": "predicate", "instructions": "a", "levels": [responses_pb2.Level(value=1)]}, "levels"),
    ({"type": "choice", "instructions": "a", "choices": [responses_pb2.Choice()] * 2}, "value"),
])  # fmt: skip
def test_questions_that_are_refused(stubs, question, says):
    request = responses_pb2.DecideRequest(model="bytes", input_text="a", questions=[responses_pb2.Question(**question)])
    status, param, details = refused(stubs.decisions.Decide, request)
    assert (status, param) == (grpc.StatusCode.INVALID_ARGUMENT, "questions")
    assert says in details


def test_fields_of_a_newer_client_are_told(stubs):
    request = ask()
    request.MergeFromString(b"\xa0\x06\x01")  # field 100
    request.reasoning.MergeFromString(b"\xa0\x06\x01")
    _, rpc = stubs.responses.Create.with_call(request, timeout=60)
    assert dict(rpc.trailing_metadata())["x-kvasir-warning"] == "ignored: field 100, reasoning.field 100"
    call = stubs.responses.CreateStream(request, timeout=60)
    list(call)
    assert "reasoning.field 100" in dict(call.trailing_metadata())["x-kvasir-warning"]
    _, rpc = stubs.responses.Create.with_call(ask(), timeout=60, metadata=(("kvasir-resumable", "true"),))
    assert "kvasir-resumable" in dict(rpc.trailing_metadata())["x-kvasir-warning"]


def test_overload_failure_deadline_and_cancellation(live_gateway):
    with live_gateway() as gateway, Stubs(gateway) as stubs:
        gateway.group.refusal = OverloadedError("full", retry_after_s=3)
        assert refused(stubs.responses.Create, ask())[0] == grpc.StatusCode.RESOURCE_EXHAUSTED
        gateway.group.refusal = None
        gateway.group.dies_after = 3
        assert refused(stubs.responses.CreateStream, ask())[0] == grpc.StatusCode.UNAVAILABLE
        gateway.group.dies_after, gateway.group.step_s = None, 0.2
        call = stubs.responses.CreateStream(ask(), timeout=60)
        next(call)
        call.cancel()
        until(lambda: not gateway.group.running)
        assert stubs.responses.Create(ask(max_output_tokens=1), timeout=50).status == "incomplete"
        assert 49 < gateway.group.requests[-1].deadline_s < 50.1
        questions = [responses_pb2.Question(type="predicate", instructions="a")]
        stubs.decisions.Decide(responses_pb2.DecideRequest(questions=questions, input_text="a"), timeout=50)
        assert 45 < gateway.group.requests[-1].deadline_s < 50.1
        gateway.desk.draining = True
        assert refused(stubs.responses.Create, ask())[0] == grpc.StatusCode.UNAVAILABLE


def keep(seen):
    """Puts what it is called with there."""
    return lambda event: seen.append(event) or True


def test_a_stream_that_fails_says_so_in_its_last_event(live_gateway):
    with live_gateway() as gateway, Stubs(gateway) as stubs:
        gateway.group.dies_after = 3
        call, seen = stubs.responses.CreateStream(ask(), timeout=60), []
        with pytest.raises(grpc.RpcError):
            all(map(keep(seen), call))
        assert seen[-1].type == "response.failed"
        assert seen[-1].response.error.code == "server_error"


def test_a_stream_that_broke_goes_on(live_gateway):
    resumable = (("kvasir-resumable", "true"),)
    with live_gateway() as gateway, Stubs(gateway) as stubs:
        gateway.group.step_s = 0.02
        call = stubs.responses.CreateStream(ask(), timeout=60, metadata=resumable)
        stream_id = dict(call.initial_metadata())["kvasir-stream-id"]
        seen = list(itertools.islice(call, 6))
        call.cancel()
        rest = list(stubs.responses.Resume(inference_pb2.ResumeRequest(stream_id=stream_id, after=6), timeout=60))
        assert [event.sequence_number for event in rest] == list(range(6, 6 + len(rest)))
        assert "".join(event.delta for event in (*seen, *rest)) == TEXT
        assert stubs.responses.Get(named(rest[-1].response.id), timeout=60) == rest[-1].response  # kept all the same
        assert refused(InferenceStub(stubs.channel).Resume, inference_pb2.ResumeRequest(stream_id=stream_id))[0] == (
            grpc.StatusCode.INVALID_ARGUMENT
        )
        gateway.group.step_s = 0.2
        call = stubs.responses.CreateStream(ask(), timeout=60, metadata=resumable)
        stream_id = dict(call.initial_metadata())["kvasir-stream-id"]
        InferenceStub(stubs.channel).Cancel(inference_pb2.CancelRequest(stream_id=stream_id), timeout=60)
        until(lambda: not gateway.group.running)
        gateway.group.dies_after, gateway.group.step_s = 3, 0
        call, seen = stubs.responses.CreateStream(ask(), timeout=60, metadata=resumable), []
        with pytest.raises(grpc.RpcError):
            all(map(keep(seen), call))
        assert seen[-1].type == "response.failed"
        wrong = stubs.responses.CreateStream(
            ask(), timeout=60, metadata=(("kvasir-resumable", "x"), ("x-request-id", "mine"))
        )
        assert dict(wrong.initial_metadata())["x-request-id"] == "mine"
        assert refused(lambda **_: wrong)[1] == "kvasir-resumable"


# -- completeness


def test_every_field_of_http_is_there():
    """Or is said otherwise: by the method, metadata, or because it says nothing here."""
    otherwise = {"stream", "stream_options", "request_id", "max_tool_calls"}
    for honoured, message in (
        (responses_schema.HONOURED, responses_pb2.CreateResponseRequest),
        (responses_schema.COMPACTED, responses_pb2.CompactRequest),
        (decisions_schema.HONOURED, responses_pb2.DecideRequest),
        (decisions_schema._QUESTION, responses_pb2.Question),
    ):
        assert set(honoured) - set(message.DESCRIPTOR.fields_by_name) <= otherwise, message


def test_every_field_of_an_answer_is_there(gateway):
    echoed = {"object", "text", "tools", "tool_choice", "max_tool_calls"}
    body = httpx.post(gateway.url + "/v1/responses", json={"model": "bytes", "input": "Hi", "user": "me"}).json()
    assert set(body) - set(responses_pb2.Response.DESCRIPTOR.fields_by_name) == echoed
    item = body["output"][0]
    assert set(item) <= set(responses_pb2.Item.DESCRIPTOR.fields_by_name)
    assert set(item["content"][0]) - set(responses_pb2.ContentPart.DESCRIPTOR.fields_by_name) == {"annotations"}


# -- keys

OPEN = {
    "grpc.health.v1.Health": {"Check", "Watch"},
    "inference.GRPCInferenceService": {"ServerLive", "ServerReady", "ModelReady"},
}
"""What needs no key; nothing else may be added without a word here."""


def every_method(gateway, key):
    """(service, method) of all that the server has, as its reflection says."""

    class Channel:
        def stream_stream(self, *args, **options):
            call = channel.stream_stream(*args, **options)
            return lambda requests, **more: call(requests, metadata=key, **more)

    with grpc.insecure_channel(gateway.grpc_address) as channel:
        database = ProtoReflectionDescriptorDatabase(Channel())
        for service in database.get_services():
            file = database.FindFileContainingSymbol(service)
            (found,) = [one for one in file.service if f"{file.package}.{one.name}" == service]
            yield from ((service, method) for method in found.method)


def test_every_method_needs_a_key_but_an_explicit_list(live_gateway):
    key = (("authorization", "Bearer secret"),)
    with live_gateway(GatewayConfig(api_key=("secret", "other"))) as gateway:
        methods = list(every_method(gateway, key))
        ours = {service for service, _ in methods if service.startswith("kvasir.v1.")}
        assert {one.partition("v1.")[2] for one in ours} == {
            "Inference", "Responses", "Conversations", "Decisions", "Files", "Batches",
        }  # fmt: skip
        assert len(methods) > 45
        with grpc.insecure_channel(gateway.grpc_address) as channel:
            for service, method in methods:
                kind = f"{'stream' if method.client_streaming else 'unary'}_{'stream' if method.server_streaming else 'unary'}"
                call = getattr(channel, kind)(f"/{service}/{method.name}", _registered_method=False)
                for metadata in (
                    (),
                    (("authorization", "Bearer wrong"),),
                    (("authorization", "secret"),),
                    (("kvasir-principal", ""),),
                ):
                    status = first_status(call, method, metadata)
                    needs = method.name not in OPEN.get(service, ())
                    assert (status == grpc.StatusCode.UNAUTHENTICATED) == needs, (service, method.name, metadata)
                assert first_status(call, method, key) != grpc.StatusCode.UNAUTHENTICATED, (service, method.name)


def first_status(call, method, metadata):
    """Status of a call with an empty request, OK if it has an answer. (Reflection ends only when its client does.)"""
    sent = iter([b""]) if method.client_streaming else b""
    try:
        found = call(sent, metadata=metadata, timeout=60)
        if method.server_streaming:
            next(found, None)
            found.cancel()
    except grpc.RpcError as error:
        return error.code()
    return grpc.StatusCode.OK


def test_what_one_key_stored_no_other_finds(live_gateway):
    mine, theirs = ((("authorization", f"Bearer {key}"),) for key in ("one", "two"))
    with live_gateway(GatewayConfig(api_key=("one", "two"))) as gateway, Stubs(gateway) as stubs:
        made = stubs.responses.Create(ask(), timeout=60, metadata=mine)
        talk = stubs.conversations.Create(responses_pb2.CreateConversationRequest(), timeout=60, metadata=mine)
        info = iter([files_pb2.UploadRequest(info=files_pb2.FileInfo(purpose="batch"))])
        file = stubs.files.Upload(info, timeout=60, metadata=mine)
        for method, one in (
            (stubs.responses.Get, made), (stubs.responses.Delete, made), (stubs.responses.Cancel, made),
            (stubs.conversations.Get, talk), (stubs.conversations.Delete, talk),
            (stubs.files.Get, file), (stubs.files.Content, file), (stubs.files.Delete, file),
        ):  # fmt: skip
            assert refused(method, named(one.id), metadata=theirs)[0] == grpc.StatusCode.NOT_FOUND
        assert (
            refused(stubs.responses.Create, ask(previous_response_id=made.id), metadata=theirs)[1]
            == "previous_response_id"
        )
        batch = files_pb2.CreateBatchRequest(input_file_id=file.id, endpoint="/v1/responses", completion_window="24h")
        assert refused(stubs.batches.Create, batch, metadata=theirs)[0] == grpc.StatusCode.NOT_FOUND
        assert not stubs.files.List(files_pb2.ListFilesRequest(), timeout=60, metadata=theirs).data
        found = httpx.get(f"{gateway.url}/v1/responses/{made.id}", headers={"authorization": "Bearer one"})
        assert found.status_code == 200  # the same key is the same client by either door
