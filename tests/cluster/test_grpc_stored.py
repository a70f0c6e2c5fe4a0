"""kvasir.v1's responses, conversations, decisions, files and batches over a real socket: what HTTP has, by the other door."""

from __future__ import annotations

import functools
import itertools
import json
import threading

import grpc
import httpx
import pytest
from google.protobuf.json_format import MessageToDict
from google.protobuf.struct_pb2 import Value
from grpc_stubs import HI, TEXT, WEATHER, Stubs, ask, named, prompt_of, refused
from waiting import until

from kvasir.cluster import files
from kvasir.cluster.grpc_json import as_message
from kvasir.engine.errors import OverloadedError
from kvasir.proto import files_pb2, inference_pb2, responses_pb2
from kvasir.proto.inference_pb2_grpc import InferenceStub


@pytest.fixture
def stubs(gateway):
    with Stubs(gateway) as found:
        yield found


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


# -- what goes wrong


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


def until_it_fails(group, call):
    """What a client gets of a stream whose group dies after a token. What comes while it doesn't wait for more, and before it
    knows of the end, gRPC's client drops."""
    group.dies_after, group.step_s, seen = 1, 0.5, []
    with pytest.raises(grpc.RpcError):  # noqa: PT012
        for event in call():
            seen.append(event)  # noqa: PERF402
    return seen


def test_a_stream_that_fails_says_so_in_its_last_event(live_gateway):
    with live_gateway() as gateway, Stubs(gateway) as stubs:
        seen = until_it_fails(gateway.group, lambda: stubs.responses.CreateStream(ask(), timeout=60))
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
        ask_again = functools.partial(stubs.responses.CreateStream, ask(), timeout=60, metadata=resumable)
        seen = until_it_fails(gateway.group, ask_again)
        assert seen[-1].type == "response.failed"
        wrong = stubs.responses.CreateStream(
            ask(), timeout=60, metadata=(("kvasir-resumable", "x"), ("x-request-id", "mine"))
        )
        assert dict(wrong.initial_metadata())["x-request-id"] == "mine"
        assert refused(lambda **_: wrong)[1] == "kvasir-resumable"


def test_uploads_that_are_cancelled_are_not_kept(gateway, stubs, monkeypatch):
    """Their messages may end as those of a whole one do, before it is told that they were cancelled."""
    count, done, dropped = 20, [], []
    real_drop, real_write = files.NewFile.drop, files.NewFile.write

    async def drop(self):
        await real_drop(self)
        dropped.append(self)

    async def keep(self, *_):
        done.append(self)
        return {}

    async def write(self, data):
        await real_write(self, data)
        came.release()

    monkeypatch.setattr(files.NewFile, "done", keep)
    monkeypatch.setattr(files.NewFile, "drop", drop)
    monkeypatch.setattr(files.NewFile, "write", write)
    came, over = threading.Semaphore(0), threading.Event()

    def half():
        yield files_pb2.UploadRequest(info=files_pb2.FileInfo(purpose="batch", filename="a.jsonl"))
        yield files_pb2.UploadRequest(data=b"{")
        over.wait(60)

    calls = [stubs.files.Upload.future(half(), timeout=60) for _ in range(count)]
    assert all(came.acquire(timeout=60) for _ in calls)
    for call in calls:
        call.cancel()
    until(lambda: len(dropped) + len(done) == count)
    over.set()
    assert not done
