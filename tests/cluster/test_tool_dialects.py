"""Calls of tools and thoughts, told in every dialect."""

from __future__ import annotations

import contextlib
import json

import anthropic
import grpc
import httpx
import ollama
import openai
import pytest
from google.protobuf.struct_pb2 import Struct
from tool_samples import END, OTHER, TOOL, WEATHER

from kvasir.cluster.responses_items import input_items, messages
from kvasir.proto import inference_pb2 as pb
from kvasir.proto.inference_pb2_grpc import InferenceStub

CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Bergen"}}\n</tool_call>'
SAID = f"<think>\nA city.\n</think>\n\nLet me see.\n{CALL}"


def says(gateway, text):
    gateway.group.script = lambda request, index: [*text.encode(), END]


@pytest.fixture
def closing():
    """`closing(client)`: closed after the test."""
    with contextlib.ExitStack() as stack:
        yield lambda client: stack.push(lambda *_: getattr(client, "close", client._client.close)()) and client


def sampling_of(gateway):
    return gateway.group.requests[-1].sampling


def test_openai(thinker, closing):
    says(thinker, SAID)
    client = closing(openai.OpenAI(base_url=thinker.url + "/v1", api_key="none"))
    ask = {"model": "bytes", "messages": [{"role": "user", "content": "Rain?"}], "tools": [TOOL]}
    (choice,) = client.chat.completions.create(**ask).choices
    message = choice.message
    assert (choice.finish_reason, message.content, message.reasoning_content) == (
        "tool_calls",
        "Let me see.\n",
        "A city.",
    )
    (call,) = message.tool_calls
    assert (call.type, call.function.name, json.loads(call.function.arguments)) == (
        "function",
        "get_weather",
        {"city": "Bergen"},
    )
    assert call.id.startswith("call_")
    with client.beta.chat.completions.stream(**ask) as stream:
        thoughts = "".join(
            event.chunk.choices[0].delta.model_extra.get("reasoning") or ""
            for event in stream
            if event.type == "chunk" and event.chunk.choices
        )
        final = stream.get_final_completion().choices[0]
    assert thoughts == "A city."
    assert (final.finish_reason, final.message.content) == ("tool_calls", "Let me see.\n")
    (streamed,) = final.message.tool_calls
    assert (streamed.function.name, streamed.function.arguments) == (call.function.name, call.function.arguments)
    tag = json.loads(sampling_of(thinker).structured_outputs.structural_tag)["format"]
    assert (tag["type"], tag["triggers"]) == ("triggered_tags", ["<tool_call>"])
    assert bytes(sampling_of(thinker).thoughts.end) == b"</think>"


def test_openai_with_logprobs_and_choices(thinker, closing):
    says(thinker, SAID)
    client = closing(openai.OpenAI(base_url=thinker.url + "/v1", api_key="none"))
    ask = {
        "model": "bytes",
        "messages": [{"role": "user", "content": "Rain?"}],
        "tools": [TOOL],
        "n": 2,
        "logprobs": True,
    }
    chunks = list(client.chat.completions.create(**ask, stream=True))
    for index in range(2):
        own = [c for chunk in chunks for c in chunk.choices if c.index == index]
        scored = [token.token for c in own if c.logprobs for token in c.logprobs.content]
        assert "".join(scored) == SAID + "<|end|>"
        assert "".join(c.delta.content or "" for c in own) == "Let me see.\n"
        assert own[-1].finish_reason == "tool_calls"
    assert (
        len({c.delta.tool_calls[0].id for chunk in chunks for c in chunk.choices if c.delta.tool_calls} - {None}) == 2
    )


def test_required_calls_and_thoughts_left_out(thinker):
    says(thinker, SAID)
    ask = {"messages": [{"role": "user", "content": "Rain?"}], "tools": [TOOL, OTHER], "include_reasoning": False}
    ask |= {"tool_choice": "required", "parallel_tool_calls": False, "thinking_token_budget": 7}
    message = httpx.post(thinker.url + "/v1/chat/completions", json=ask).json()["choices"][0]["message"]
    assert "reasoning" not in message
    form = json.loads(sampling_of(thinker).structured_outputs.structural_tag)["format"]
    assert (form["type"], form["stop_after_first"], len(form["tags"])) == ("tags_with_separator", True, 2)
    assert sampling_of(thinker).thoughts.budget == 7


def test_answers_without_tools_keep_what_looks_like_calls(thinker):
    says(thinker, SAID)
    ask = {"messages": [{"role": "user", "content": "Rain?"}]}
    message = httpx.post(thinker.url + "/v1/chat/completions", json=ask).json()["choices"][0]["message"]
    assert message["content"] == SAID.split("</think>")[1].lstrip()
    assert "tool_calls" not in message
    assert sampling_of(thinker).structured_outputs is None


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"thinking_token_budget": -2}, "thinking_token_budget"),
        ({"reasoning_effort": "a lot"}, "reasoning_effort"),
        ({"tools": [TOOL], "guided_regex": "a+"}, "tool_choice"),
        ({"tools": [TOOL], "tool_choice": "maybe"}, "tool_choice"),
        ({"tools": [{"type": "function", "function": {"name": "\n"}}]}, "tools"),
    ],
)
def test_refused(thinker, fields, param):
    ask = {"messages": [{"role": "user", "content": "Rain?"}], **fields}
    reply = httpx.post(thinker.url + "/v1/chat/completions", json=ask)
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, param)


def test_models_without_thoughts_cant_limit_them(gateway):
    ask = {"messages": [{"role": "user", "content": "Rain?"}], "thinking_token_budget": 5}
    reply = httpx.post(gateway.url + "/v1/chat/completions", json=ask)
    assert reply.status_code == 400
    assert "thoughts" in reply.json()["error"]["message"]
    assert reply.json()["error"]["param"] == "thinking_token_budget"


def test_anthropic(thinker, closing):
    says(thinker, SAID)
    client = closing(anthropic.Anthropic(base_url=thinker.url, api_key="none"))
    tools = [{"name": "get_weather", "input_schema": WEATHER}]
    ask = {"model": "bytes", "max_tokens": 500, "messages": [{"role": "user", "content": "Rain?"}], "tools": tools}
    ask["thinking"] = {"type": "enabled", "budget_tokens": 1024}
    message = client.messages.create(**ask)
    thought, text, use = message.content
    assert (message.stop_reason, thought.thinking, text.text) == ("tool_use", "A city.", "Let me see.\n")
    assert (use.name, use.input) == ("get_weather", {"city": "Bergen"})
    assert use.id.startswith("toolu_")
    assert sampling_of(thinker).thoughts.budget == 1024
    with client.messages.stream(**ask) as stream:
        streamed = stream.get_final_message()
    assert [block.type for block in streamed.content] == ["thinking", "text", "tool_use"]
    assert (streamed.stop_reason, streamed.content[2].input) == ("tool_use", {"city": "Bergen"})
    ask["thinking"] = {"type": "enabled", "budget_tokens": 1024, "display": "omitted"}
    with client.messages.stream(**ask) as stream:
        hidden = stream.get_final_message()
    for found in (client.messages.create(**ask), hidden):
        assert [block.type for block in found.content] == ["thinking", "text", "tool_use"]
        assert (found.content[0].thinking, bool(found.content[0].signature)) == ("", True)
    client.messages.create(**ask | {"tool_choice": {"type": "any", "disable_parallel_tool_use": True}})
    form = json.loads(sampling_of(thinker).structured_outputs.structural_tag)["format"]
    assert (form["type"], form["stop_after_first"]) == ("tags_with_separator", True)


def test_ollama(thinker, closing):
    says(thinker, SAID)
    client = closing(ollama.Client(host=thinker.url))
    ask = {"model": "bytes", "messages": [{"role": "user", "content": "Rain?"}], "tools": [TOOL], "think": True}
    message = client.chat(**ask).message
    assert (message.thinking, message.content) == ("A city.", "Let me see.\n")
    assert [(call.function.name, call.function.arguments) for call in message.tool_calls] == [
        ("get_weather", {"city": "Bergen"})
    ]
    parts = list(client.chat(**ask, stream=True))
    assert "".join(part.message.thinking or "" for part in parts) == "A city."
    assert "".join(part.message.content or "" for part in parts) == "Let me see.\n"
    assert [call.function.arguments for part in parts for call in part.message.tool_calls or ()] == [{"city": "Bergen"}]


def test_ollama_tells_what_the_model_can_do(thinker):
    shown = httpx.post(thinker.url + "/api/show", json={"model": "bytes"}).json()
    assert shown["capabilities"] == ["completion", "tools", "thinking"]


def test_ollama_shows_arguments_that_were_cut_short(thinker):
    says(thinker, SAID[:-20])
    reply = httpx.post(
        thinker.url + "/api/chat",
        json={"model": "bytes", "messages": [{"role": "user", "content": "?"}], "tools": [TOOL], "stream": False},
    ).json()
    assert reply["message"]["content"].startswith('Let me see.\n{"city"')
    assert "tool_calls" not in reply["message"]


def test_grpc(thinker):
    says(thinker, SAID)
    schema = Struct()
    schema.update(WEATHER)
    ask = pb.ChatRequest(messages=[pb.Message(role="user", content="Rain?")], tool_choice="get_weather")
    ask.tools.add(name="get_weather", parameters=schema)
    with grpc.insecure_channel(thinker.grpc_address) as channel:
        replies = list(InferenceStub(channel).Chat(ask))
    assert "".join(reply.reasoning for reply in replies) == "A city."
    assert "".join(reply.text for reply in replies) == "Let me see.\n"
    calls = [call for reply in replies for call in reply.tool_calls]
    assert [call.name for call in calls if call.name] == ["get_weather"]
    assert json.loads("".join(call.arguments for call in calls)) == {"city": "Bergen"}
    assert max(reply.finish_reason for reply in replies) == pb.FINISH_REASON_TOOL_CALLS
    assert replies[-1].usage.reasoning_tokens == len("A city.")
    form = json.loads(sampling_of(thinker).structured_outputs.structural_tag)["format"]
    assert form["stop_after_first"]


def test_responses(thinker, closing):
    says(thinker, SAID)
    client = closing(openai.OpenAI(base_url=thinker.url + "/v1", api_key="none"))
    tool = {"type": "function", "name": "get_weather", "parameters": WEATHER, "strict": True}
    ask = {"model": "bytes", "input": "Rain?", "tools": [tool], "reasoning": {"effort": "high"}}
    found = client.responses.create(**ask)
    thoughts, message, call = found.output
    assert (thoughts.type, thoughts.content[0].text) == ("reasoning", "A city.")
    assert (message.type, message.content[0].text) == ("message", "Let me see.\n")
    assert (call.type, call.name, json.loads(call.arguments)) == ("function_call", "get_weather", {"city": "Bergen"})
    assert found.usage.output_tokens_details.reasoning_tokens == len("A city.")
    tag = json.loads(sampling_of(thinker).structured_outputs.structural_tag)["format"]["tags"][0]
    assert not tag["content"]["lenient"]
    with client.responses.stream(**ask) as stream:
        kinds = [event.type for event in stream]
        streamed = stream.get_final_response()
    assert [item.type for item in streamed.output] == ["reasoning", "message", "function_call"]
    assert streamed.output[2].arguments == call.arguments
    assert kinds.count("response.output_item.added") == kinds.count("response.output_item.done") == 3
    assert "response.function_call_arguments.delta" in kinds
    assert "response.reasoning_text.delta" in kinds
    shown = {**ask, "reasoning": {"summary": "auto"}, "include": ["reasoning.encrypted_content"], "max_tool_calls": 3}
    with client.responses.stream(**shown) as stream:
        kinds = [event.type for event in stream]
        summarised = stream.get_final_response()
    thoughts = summarised.output[0]
    assert [one.text for one in thoughts.summary] == ["A city."]
    assert summarised.max_tool_calls == 3
    for kind in ("summary_part.added", "summary_text.delta", "summary_text.done", "summary_part.done"):
        assert f"response.reasoning_{kind}" in kinds
    assert "response.reasoning_text.delta" not in kinds
    kept = {"type": "reasoning", "id": "rs_1", "summary": [], "encrypted_content": thoughts.encrypted_content}
    assert messages(input_items([kept]), None) == [{"role": "assistant", "content": "", "reasoning_content": "A city."}]
    assert messages(input_items([{**kept, "encrypted_content": "gAAAA"}]), None) == []
    says(thinker, "</think>It rains.")
    result = {"type": "function_call_output", "call_id": call.call_id, "output": "rain"}
    again = client.responses.create(model="bytes", input=[result], previous_response_id=found.id, tools=[tool])
    assert again.output_text == "</think>It rains."
    prompt = bytes(i for i in thinker.group.requests[-1].prompt_token_ids if i < 256)
    assert b"rain" in prompt


XML_CALL = "<tool_call>\n<function=get_weather>\n<parameter=city>\nBergen\n</parameter>\n</function>\n</tool_call>"
CLAUDE_TOOLS = [{"name": "get_weather", "input_schema": WEATHER}]
RESPONSE_TOOLS = [{"type": "function", "name": "get_weather", "parameters": WEATHER, "strict": True}]
RAIN = [{"role": "user", "content": "Rain?"}]


@pytest.fixture(params=[CALL, XML_CALL], ids=["hermes", "qwen3_coder"])
def caller(request, thinker, live_gateway):
    """A gateway whose model calls, in a format whose arguments are written as they come, and in one that closes them."""
    if request.param == CALL:
        says(thinker, SAID)
        yield thinker
        return
    with live_gateway(tool_call_parser="qwen3_coder", reasoning_parser="think") as gateway:
        says(gateway, SAID.replace(CALL, XML_CALL))
        yield gateway


@pytest.mark.parametrize(("stop", "ends"), [("gen", "stop"), ("\n</tool_call>", "tool_calls"), ("Rain", "tool_calls")])
def test_openai_stop_strings_in_calls(caller, closing, stop, ends):
    """What a stop string cuts short is no finished call: stop says so, and one behind the call leaves it whole."""
    client = closing(openai.OpenAI(base_url=caller.url + "/v1", api_key="none"))
    ask = {"model": "bytes", "messages": RAIN, "tools": [TOOL], "stop": [stop]}
    (choice,) = client.chat.completions.create(**ask).choices
    assert (choice.finish_reason, len(choice.message.tool_calls)) == (ends, 1)
    chunks = [c.choices[0] for c in client.chat.completions.create(**ask, stream=True)]
    assert chunks[-1].finish_reason == ends
    assert chunks[-1].model_extra["stop_reason"] == (stop if stop != "Rain" else None)


@pytest.mark.parametrize(("stop", "ends"), [("gen", "stop_sequence"), ("\n</tool_call>", "tool_use")])
def test_anthropic_stop_sequences_in_calls(caller, closing, stop, ends):
    client = closing(anthropic.Anthropic(base_url=caller.url, api_key="none"))
    ask = {"model": "bytes", "max_tokens": 500, "messages": RAIN, "tools": CLAUDE_TOOLS, "stop_sequences": [stop]}
    message = client.messages.create(**ask)
    with client.messages.stream(**ask) as stream:
        streamed = stream.get_final_message()
    for found in (message, streamed):
        assert (found.stop_reason, found.stop_sequence, found.content[-1].type) == (ends, stop, "tool_use")


@pytest.mark.parametrize(("stop", "status"), [("gen", "incomplete"), ("\n</tool_call>", "completed")])
def test_responses_with_stop_strings_in_calls(caller, closing, stop, status):
    client = closing(openai.OpenAI(base_url=caller.url + "/v1", api_key="none"))
    ask = {"model": "bytes", "input": "Rain?", "tools": RESPONSE_TOOLS, "extra_body": {"stop": [stop]}}
    whole = client.responses.create(**ask)
    events = list(client.responses.create(**ask, stream=True))
    done = [event.item for event in events if event.type == "response.output_item.done"]
    assert events[-1].type == f"response.{status}"
    for found in (whole, events[-1].response):
        assert (found.status, found.incomplete_details, bool(found.completed_at)) == (
            status,
            None,
            status == "completed",
        )
        assert [item.status for item in found.output] == ["completed", "completed", status]
    assert [item.status for item in done] == ["completed", "completed", status]


@pytest.mark.parametrize(
    ("stop", "ends"), [("gen", pb.FINISH_REASON_STOP), ("\n</tool_call>", pb.FINISH_REASON_TOOL_CALLS)]
)
def test_grpc_stop_strings_in_calls(caller, stop, ends):
    ask = pb.ChatRequest(messages=[pb.Message(role="user", content="Rain?")], sampling=pb.Sampling(stop=[stop]))
    ask.tools.add(name="get_weather")
    with grpc.insecure_channel(caller.grpc_address) as channel:
        replies = list(InferenceStub(channel).Chat(ask))
    assert [(one.finish_reason, one.stop_string) for one in replies if one.finish_reason] == [(ends, stop)]


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize(("stop", "calls"), [("gen", 0), ("\n</tool_call>", 1)])
def test_ollama_stop_strings_in_calls(caller, closing, stop, calls, streamed):
    """A call that is cut short is shown as text, as far as it goes."""
    client = closing(ollama.Client(host=caller.url))
    found = client.chat(model="bytes", messages=RAIN, tools=[TOOL], options={"stop": [stop]}, stream=streamed)
    parts = [*found] if streamed else [found]
    assert sum(len(part.message.tool_calls or ()) for part in parts) == calls
    assert "".join(part.message.content or "" for part in parts).count('{"city"') == 1 - calls


BETWEEN = f"Before {CALL}\nAfter {CALL}{CALL}\n\nthe end \n"


@pytest.mark.parametrize(
    "text", [f"<think>\nHm.\n</think>\n\n{BETWEEN}", BETWEEN, "<think>Hm. \n</think> \n", " \n", CALL]
)
def test_anthropic_streams_what_it_says_whole(thinker, closing, text):
    says(thinker, text)
    client = closing(anthropic.Anthropic(base_url=thinker.url, api_key="none"))
    ask = {"model": "bytes", "max_tokens": 500, "messages": RAIN, "tools": CLAUDE_TOOLS}
    message = client.messages.create(**ask)
    with client.messages.stream(**ask) as stream:
        streamed = stream.get_final_message()
    shown, again = ([block.to_dict() | {"id": ""} for block in found.content] for found in (message, streamed))
    assert [{**block, "citations": None} for block in again] == [{**block, "citations": None} for block in shown]
    if BETWEEN in text:
        kinds = ["text", "tool_use", "text", "tool_use", "tool_use", "text"]
        assert [block.type for block in message.content if block.type != "thinking"] == kinds
        texts = [block.text.strip() for block in message.content if block.type == "text"]
        assert texts == ["Before", "After", "the end"]


def test_anthropic_signs_thoughts(thinker, closing):
    """Some clients drop thoughts that aren't signed; any signature comes back."""
    says(thinker, SAID)
    client = closing(anthropic.Anthropic(base_url=thinker.url, api_key="none"))
    ask = {"model": "bytes", "max_tokens": 500, "messages": RAIN, "tools": CLAUDE_TOOLS}
    thought, *_ = client.messages.create(**ask).content
    events = [event for event in client.messages.create(**ask, stream=True) if getattr(event, "index", None) == 0]
    assert [event.delta.type for event in events[1:-1]][-2:] == ["thinking_delta", "signature_delta"]
    assert events[-2].delta.signature == thought.signature != ""
    assert events[0].content_block.signature == ""
    for signature in (thought.signature, "another's"):
        said = [*RAIN, {"role": "assistant", "content": [thought.to_dict() | {"signature": signature}]}, *RAIN]
        assert client.messages.create(**ask | {"messages": said}).stop_reason == "tool_use"


@pytest.mark.parametrize("shown", [True, False])
def test_openai_counts_tokens_of_thoughts(thinker, closing, shown):
    """Those of all choices, whether they are shown or not; as responses do."""
    says(thinker, SAID)
    client = closing(openai.OpenAI(base_url=thinker.url + "/v1", api_key="none"))
    ask = {"model": "bytes", "messages": RAIN, "n": 2, "extra_body": {"include_reasoning": shown}}
    usage = client.chat.completions.create(**ask).usage
    assert usage.completion_tokens_details.reasoning_tokens == 2 * len("A city.")
    *_, last = client.chat.completions.create(**ask, stream=True, stream_options={"include_usage": True})
    assert last.usage == usage
    says(thinker, "No thought.")
    assert client.chat.completions.create(**ask).usage.completion_tokens_details.reasoning_tokens == 0


@pytest.mark.parametrize("streamed", [False, True])
def test_ollama_numbers_calls(thinker, closing, streamed):
    """What a client sends back of them, by hand or by its own, is taken."""
    says(thinker, f"{CALL}\n{CALL}")
    ask = {"model": "bytes", "messages": RAIN, "tools": [TOOL], "stream": streamed}
    lines = [json.loads(line) for line in httpx.post(thinker.url + "/api/chat", json=ask).text.splitlines()]
    calls = [call for line in lines for call in line["message"].get("tool_calls", ())]
    function = {"name": "get_weather", "arguments": {"city": "Bergen"}}
    assert [call["function"] for call in calls] == [{"index": 0, **function}, {"index": 1, **function}]
    assert {call["type"] for call in calls} == {"function"}
    assert len({call["id"] for call in calls}) == 2
    client = closing(ollama.Client(host=thinker.url))
    for said in (
        {"role": "assistant", "tool_calls": calls},
        client.chat(model="bytes", messages=RAIN, tools=[TOOL]).message,
    ):
        results = [{"role": "tool", "tool_name": "get_weather", "content": "rain"}] * 2
        answer = client.chat(model="bytes", messages=[*RAIN, said, *results], tools=[TOOL]).message
        assert [call.function.arguments for call in answer.tool_calls] == [{"city": "Bergen"}] * 2
