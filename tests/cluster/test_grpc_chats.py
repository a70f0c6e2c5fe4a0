"""Chats that are stored, the prompt repeated and tiers, by gRPC's door: what HTTP has."""

from __future__ import annotations

import grpc
import httpx
import pytest
from fake_gateway import LiveGateway, write_byte_model
from grpc_stubs import TEXT, Stubs, named, refused

from kvasir.cluster.grpc_json import as_message
from kvasir.proto import chats_pb2, inference_pb2

SAID = [inference_pb2.Message(role="system", content="Be."), inference_pb2.Message(role="user", content="Hi")]


@pytest.fixture
def stubs(gateway):
    with Stubs(gateway) as found:
        yield found


def chat(stubs, **fields):
    """(text, the last reply)"""
    request = inference_pb2.ChatRequest(**{"model": "bytes", "messages": SAID, **fields})
    replies = list(stubs.inference.Chat(request, timeout=60))
    return "".join(reply.text for reply in replies), replies[-1]


def test_a_chat_that_one_door_stored_the_other_gives_out(gateway, stubs):
    sampling = inference_pb2.Sampling(n=2, logprobs=1, prompt_logprobs=0)
    _, last = chat(
        stubs, store=True, metadata={"a": "1"}, sampling=sampling, service_tier="flex", return_timing=True,
        return_prompt_token_ids=True,
    )  # fmt: skip
    assert gateway.group.requests[-1].priority == 100
    kept = stubs.chats.Get(named(last.stored_id), timeout=60)
    body = httpx.get(f"{gateway.url}/v1/chat/completions/{last.stored_id}").json()
    assert kept == as_message(chats_pb2.StoredChat, body)
    assert [choice.message.content for choice in kept.choices] == [TEXT, TEXT]
    assert (kept.metadata["a"], kept.service_tier, kept.usage.completion_tokens) == ("1", "flex", 30)
    assert kept.choices[1].logprobs.content[0].token == "H"
    assert (len(kept.prompt_token_ids), len(kept.prompt_logprobs)) == (10, 10)
    assert kept.timing.group
    shown = {*body} - {*chats_pb2.StoredChat.DESCRIPTOR.fields_by_name}
    assert shown == {"object", "system_fingerprint"}
    messages = stubs.chats.ListMessages(chats_pb2.ListChatMessagesRequest(id=kept.id), timeout=60)
    assert [(one.role, one.content) for one in messages.data] == [("system", "Be."), ("user", "Hi")]
    again = chats_pb2.ListChatMessagesRequest(id=kept.id, after=messages.data[0].id, limit=1)
    assert list(stubs.chats.ListMessages(again, timeout=60).data) == [messages.data[1]]


def test_arguments_that_http_took_as_an_object_are_text(gateway, stubs):
    called = {"id": "a", "type": "function", "function": {"name": "f", "arguments": {"ø": 1}}}
    said = [{"role": "user", "content": "x"}, {"role": "assistant", "content": None, "tool_calls": [called]}]
    body = {"model": "bytes", "messages": [*said, {"role": "user", "content": "y"}], "store": True}
    stored = httpx.post(gateway.url + "/v1/chat/completions", json=body).json()["id"]
    messages = stubs.chats.ListMessages(chats_pb2.ListChatMessagesRequest(id=stored), timeout=60).data
    assert messages[1].tool_calls[0].function.arguments == '{"ø": 1}'
    body["messages"][0]["name"] = 3
    answer = httpx.post(gateway.url + "/v1/chat/completions", json=body)
    assert (answer.status_code, "messages[0].name must be a text" in answer.text) == (400, True)


@pytest.mark.parametrize("label", ["a\nb", ""])
def test_no_label_is_ignored(stubs, label):
    chat(stubs, store=True, metadata={"a": "1"})
    assert not stubs.chats.List(chats_pb2.ListChatsRequest(metadata={label: "1"}), timeout=60).data


@pytest.mark.parametrize("stream", [False, True])
def test_a_prompt_is_not_repeated_without_a_tokenizer(tmp_path, stream):
    """Nothing is computed for it."""
    write_byte_model(tmp_path)
    with LiveGateway(tmp_path, skip_tokenizer_init=True) as gateway, Stubs(gateway) as stubs:
        body = {"model": "bytes", "prompt": [72, 73], "echo": True, "stream": stream}
        answer = httpx.post(gateway.url + "/v1/completions", json=body)
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "echo")
        asked = inference_pb2.GenerateRequest(model="bytes", echo=True, prompt_token_ids={"ids": [72, 73]})
        with pytest.raises(grpc.RpcError, match="tokenizer"):
            list(stubs.inference.Generate(asked, timeout=60))
        assert not gateway.group.requests


def test_changed_listed_and_dropped(gateway, stubs):
    ids = [chat(stubs, store=True, metadata={"of": "these", "n": str(i % 2)})[1].stored_id for i in range(3)]
    sent = {"role": "user", "content": [{"type": "text", "text": "H"}, {"type": "text", "text": "i"}]}
    body = {"model": "bytes", "messages": [sent], "store": True, "metadata": {"of": "these"}}
    ids.append(httpx.post(gateway.url + "/v1/chat/completions", json=body).json()["id"])
    listed = stubs.chats.List(chats_pb2.ListChatsRequest(limit=2, metadata={"of": "these"}), timeout=60)
    assert ([one.id for one in listed.data], listed.has_more) == (ids[:2], True)
    newest = chats_pb2.ListChatsRequest(order="desc", after=ids[3], model="bytes", metadata={"n": "0", "of": "these"})
    assert [one.id for one in stubs.chats.List(newest, timeout=60).data] == [ids[2], ids[0]]
    parts = stubs.chats.ListMessages(chats_pb2.ListChatMessagesRequest(id=ids[3]), timeout=60).data[0]
    assert (parts.content, [part.text for part in parts.content_parts]) == ("Hi", ["H", "i"])
    changed = stubs.chats.Update(chats_pb2.UpdateChatRequest(id=ids[0], metadata={"b": "2"}), timeout=60)
    assert (dict(changed.metadata), changed.id) == ({"b": "2"}, ids[0])
    assert stubs.chats.Delete(named(ids[0]), timeout=60).deleted
    assert refused(stubs.chats.Get, named(ids[0]))[0] == grpc.StatusCode.NOT_FOUND
    wrong = chats_pb2.ListChatsRequest(limit=0)
    assert refused(stubs.chats.List, wrong)[:2] == (grpc.StatusCode.INVALID_ARGUMENT, "limit")


def test_calls_keep_their_ids(thinker):
    thinker.group.script = lambda request, index: [
        *b'<think>Hm.</think><tool_call>{"name": "weather", "arguments": {"days": 2}}</tool_call>', 256,
    ]  # fmt: skip
    tool = inference_pb2.Tool(name="weather")
    with Stubs(thinker) as stubs:
        request = inference_pb2.ChatRequest(messages=SAID, tools=[tool], store=True)
        replies = list(stubs.inference.Chat(request, timeout=60))
        (called,) = [call.id for reply in replies for call in reply.tool_calls if call.id]
        (choice,) = stubs.chats.Get(named(replies[-1].stored_id), timeout=60).choices
        assert (choice.finish_reason, choice.message.reasoning_content) == ("tool_calls", "Hm.")
        assert [(call.id, call.function.name) for call in choice.message.tool_calls] == [(called, "weather")]


def test_what_is_not_stored_has_no_id(stubs):
    request = inference_pb2.ChatRequest(model="bytes", messages=SAID, metadata={"a": "1"})
    call = stubs.inference.Chat(request, timeout=60)
    assert not list(call)[-1].stored_id
    assert dict(call.trailing_metadata())["x-kvasir-warning"] == "ignored: metadata"


def test_the_prompt_comes_first(gateway, stubs):
    def generate(**fields):
        request = inference_pb2.GenerateRequest(**{"model": "bytes", "text": "Say: ", "echo": True, **fields})
        return list(stubs.inference.Generate(request, timeout=60))

    replies = generate(sampling=inference_pb2.Sampling(n=2))
    for index in range(2):
        assert "".join(reply.text for reply in replies if reply.index == index) == "Say: " + TEXT
    replies = generate(sampling=inference_pb2.Sampling(max_tokens=0, prompt_logprobs=0))
    assert "".join(reply.text for reply in replies) == "Say: "
    assert [token for reply in replies for token in reply.token_ids] == []
    assert sum(len(reply.prompt_logprobs) for reply in replies) == 5
    assert (replies[-1].usage.completion_tokens, replies[0].finish_reason) == (0, inference_pb2.FINISH_REASON_LENGTH)
    request = inference_pb2.GenerateRequest(text="a", suffix="b", echo=True)
    assert refused(stubs.inference.Generate, request)[1] == "echo"
    begun = [*SAID, inference_pb2.Message(role="assistant", content="Well. ")]
    on = {"add_generation_prompt": False, "continue_final_message": True, "echo": True}
    assert chat(stubs, messages=begun, **on)[0] == "Well. " + TEXT
    assert chat(stubs, echo=True)[0] == TEXT
    request = inference_pb2.ChatRequest(messages=SAID, service_tier="gold")
    assert refused(stubs.inference.Chat, request)[1] == "service_tier"
