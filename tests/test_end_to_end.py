"""`kvasir serve` as its users meet it: a process, real sockets, real Ray, real clients."""

from __future__ import annotations

import concurrent.futures
import contextlib
import json
import random
import re
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import httpx
import jsonschema
import openai
import pytest
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.message_factory import GetMessageClass
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase
from kvasir_server import LIMIT_S, ROOM, Server, start
from waiting import until

pytestmark = [pytest.mark.ray, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def skald(tmp_path_factory: pytest.TempPathFactory, collector: Any) -> Iterator[Server]:
    endpoint = {"OTEL_EXPORTER_OTLP_ENDPOINT": collector.endpoint}
    server = start(tmp_path_factory.mktemp("skald"), env=endpoint)
    yield server
    assert server.stop() == 0, "".join(server.log)


@pytest.fixture(scope="module")
def stories(tmp_path_factory: pytest.TempPathFactory, data: Callable[[str], Path]) -> Iterator[Server]:
    folder = data("model-stories260k/hf")
    flags = ("--model", str(folder), "--served-model-name", "stories", "--max-num-batched-tokens", "16")
    patient = ("--max-stream-buffer", "1000000")  # a client that is held up reads slowly
    server = start(tmp_path_factory.mktemp("stories"), *flags, *patient, *ROOM)
    yield server
    assert server.stop() == 0, "".join(server.log)


@pytest.fixture(scope="module")
def greedy(data: Callable[[str], Path]) -> dict[str, list[int]]:
    """{"prompt_ids": [...], "greedy_ids": [...]}; greedy_ids repeats the prompt."""
    found: dict[str, list[int]] = json.loads(data("model-stories260k/greedy_256.json").read_text())
    return found


class Reflected:
    """A gRPC client that knows nothing but an address: messages and methods come from reflection."""

    def __init__(self, address: str) -> None:
        self.channel = grpc.insecure_channel(address)
        self.pool = DescriptorPool(ProtoReflectionDescriptorDatabase(self.channel))
        self.service = self.pool.FindServiceByName("kvasir.v1.Inference")

    def __enter__(self) -> Reflected:
        return self

    def __exit__(self, *_: object) -> None:
        self.channel.close()

    def call(self, method: str, body: dict[str, Any]) -> Any:
        from google.protobuf.json_format import ParseDict

        found = self.service.methods_by_name[method]
        request = ParseDict(body, GetMessageClass(found.input_type)())
        make = self.channel.unary_stream if found.server_streaming else self.channel.unary_unary
        reply = GetMessageClass(found.output_type)
        rpc = make(
            f"/kvasir.v1.Inference/{method}",
            type(request).SerializeToString,
            reply.FromString,
            _registered_method=False,
        )
        return rpc(request, timeout=LIMIT_S)


def chat(server: Server, text: str, **fields: Any) -> Any:
    """The whole response, or the list of all chunks."""
    with server.client() as client:
        found = client.chat.completions.create(model="skald", messages=[{"role": "user", "content": text}], **fields)
        return list(found) if fields.get("stream") else found


def test_curl(skald: Server) -> None:
    body = {"model": "skald", "messages": [{"role": "user", "content": "What is 47 + 38?"}], "temperature": 0}
    run = subprocess.run(
        ["curl", "-sS", skald.url + "/v1/chat/completions", "-H", "Content-Type: application/json", "-d", json.dumps(body)],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert "85" in json.loads(run.stdout)["choices"][0]["message"]["content"]


def test_openai_client(skald: Server) -> None:
    whole = chat(skald, "Who are you?", temperature=0, max_tokens=40)
    text = whole.choices[0].message.content
    assert whole.choices[0].finish_reason in ("stop", "length")
    assert "skald" in text.lower() or "kvasir" in text.lower()
    usage = {"include_usage": True}
    chunks = chat(skald, "Who are you?", temperature=0, max_tokens=40, stream=True, stream_options=usage)
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == text
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens


def test_openai_sampling(skald: Server) -> None:
    two = chat(
        skald, "Tell me about Kvasir.", n=2, temperature=1.0, seed=5, max_tokens=30, logprobs=True, top_logprobs=3
    )
    again = chat(skald, "Tell me about Kvasir.", n=2, temperature=1.0, seed=5, max_tokens=30)
    assert [c.message.content for c in two.choices] == [c.message.content for c in again.choices]
    assert len(two.choices) == 2
    scored = two.choices[0].logprobs.content
    assert len(scored[0].top_logprobs) == 3
    assert all(token.logprob <= 0 for token in scored)
    whole = chat(skald, "Who are you?", temperature=0).choices[0].message.content
    stop = whole.split()[2]
    cut = chat(skald, "Who are you?", temperature=0, stop=[stop]).choices[0]
    assert cut.message.content == whole[: whole.index(stop)]
    assert cut.finish_reason == "stop"


SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}


def test_structured_output(skald: Server) -> None:
    wanted = {"type": "json_schema", "json_schema": {"name": "person", "schema": SCHEMA, "strict": True}}
    fields = {"temperature": 1, "seed": 7, "max_tokens": 100, "response_format": wanted}
    whole = chat(skald, "Who are you?", **fields)
    jsonschema.validate(json.loads(whole.choices[0].message.content), SCHEMA)
    assert whole.choices[0].finish_reason == "stop"
    chunks = chat(skald, "Who are you?", stream=True, **fields)
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == whole.choices[0].message.content
    two = chat(skald, "Yes?", n=2, temperature=1, extra_body={"guided_choice": ["yes", "no"]})
    assert {choice.message.content for choice in two.choices} <= {"yes", "no"}
    number = chat(skald, "A number", temperature=1, extra_body={"guided_regex": "[0-9]{3}"})
    assert re.fullmatch("[0-9]{3}", number.choices[0].message.content)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("body", "says"),
    [
        ({"guided_json": {"type": "array", "uniqueItems": True}}, "uniqueItems"),
        ({"guided_regex": "(a"}, "unclosed group"),
        ({"guided_grammar": "root ::= missing"}, "missing"),
        ({"guided_regex": "a", "guided_choice": ["b"]}, "ask for different structured outputs"),
    ],
)
def test_what_can_t_be_enforced_is_refused(skald: Server, stream: bool, body: Any, says: str) -> None:
    with pytest.raises(openai.BadRequestError, match=says):
        chat(skald, "Hi", stream=stream, extra_body=body)


WEATHER: Any = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Get the weather of a city.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}


def test_a_tool_is_called_and_its_result_told(skald: Server) -> None:
    messages: list[Any] = [{"role": "user", "content": "What is the weather in Bergen?"}]
    with skald.client() as client:
        ask: Any = {"model": "skald", "messages": messages, "tools": [WEATHER], "temperature": 0}
        (choice,) = client.chat.completions.create(**ask).choices
        (call,) = choice.message.tool_calls or []
        assert choice.finish_reason == "tool_calls"
        assert call.type == "function"
        assert (call.function.name, json.loads(call.function.arguments)) == ("get_weather", {"city": "Bergen"})
        chunks = [
            chunk.choices[0].delta for chunk in client.chat.completions.create(**ask, stream=True) if chunk.choices
        ]
        told = [delta.tool_calls[0].function for delta in chunks if delta.tool_calls]
        assert "".join(part.arguments or "" for part in told if part) == call.function.arguments
        messages += [choice.message, {"role": "tool", "tool_call_id": call.id, "content": "rain, 9 degrees"}]
        answer = client.chat.completions.create(**ask).choices[0]
        assert answer.finish_reason == "stop"
        assert "rain" in (answer.message.content or "")


def test_forced_calls_fit_their_schemas(skald: Server) -> None:
    """Whatever is drawn at a high temperature."""
    schema = {
        "type": "object",
        "properties": {"level": {"enum": ["low", "high"]}, "count": {"type": "integer", "minimum": 1, "maximum": 99}},
        "required": ["level", "count"],
        "additionalProperties": False,
    }
    tool = {"type": "function", "function": {"name": "set_level", "strict": True, "parameters": schema}}
    with skald.client() as client:
        ask: Any = {"model": "skald", "messages": [{"role": "user", "content": "Hi"}], "tools": [tool, WEATHER], "n": 8}
        named = {"type": "function", "function": {"name": "set_level"}}
        for choice in client.chat.completions.create(**ask, temperature=2, tool_choice=named).choices:
            (call,) = choice.message.tool_calls or []
            assert call.type == "function"
            jsonschema.validate(json.loads(call.function.arguments), schema)
        for choice in client.chat.completions.create(
            **ask, temperature=1.2, tool_choice="required", max_tokens=400
        ).choices:
            assert choice.finish_reason == "length" or choice.message.tool_calls


def test_a_heavy_grammar_costs_its_sender_alone(skald: Server) -> None:
    heavy = {"guided_regex": "((a|b|c){1,200}x(d|e){1,200}){1,200}"}
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        slow = [pool.submit(chat, skald, "Hi", max_tokens=5, extra_body=heavy) for _ in range(3)]
        assert chat(skald, "Who are you?", temperature=0, max_tokens=40).choices[0].message.content
        for future in slow:
            with contextlib.suppress(openai.BadRequestError):
                assert set(future.result().choices[0].message.content) <= set("abcdex")


def test_structured_output_over_grpc(skald: Server) -> None:
    with Reflected(skald.grpc_address) as client:
        body = {"text": "Yes or no?", "sampling": {"structured_outputs": {"choice": ["yes", "no"]}}}
        replies = list(client.call("Generate", {"model": "skald", **body}))
        assert "".join(reply.text for reply in replies) in ("yes", "no")


def test_grpc_by_reflection(skald: Server) -> None:
    with Reflected(skald.grpc_address) as client:
        models = client.call("ListModels", {})
        assert "skald" in str(models)
        replies = list(
            client.call(
                "Chat",
                {
                    "model": "skald",
                    "messages": [{"role": "user", "content": "Who are you?"}],
                    "sampling": {"temperature": 0, "max_tokens": 40},
                },
            )
        )
    text = "".join(reply.text for reply in replies if reply.text)
    assert text == chat(skald, "Who are you?", temperature=0, max_tokens=40).choices[0].message.content


def test_a_chat_is_one_trace(skald: Server, collector: Any) -> None:
    trace_id = "0af7651916cd43dd8448eb211c80319c"
    parent = {"traceparent": f"00-{trace_id}-b7ad6b7169203331-01"}
    usage = chat(skald, "What is 47 + 38?", temperature=0, extra_headers=parent).usage
    spans = collector.trace(trace_id, {"chat skald", "admit", "route", "queue", "prefill", "decode"})
    root = spans["chat skald"]
    assert root.parent_span_id.hex() == "b7ad6b7169203331"
    assert {span.parent_span_id for name, span in spans.items() if name != "chat skald"} == {root.span_id}
    counts = collector.attributes(root)
    assert counts["gen_ai.usage.input_tokens"] == usage.prompt_tokens
    assert counts["gen_ai.usage.output_tokens"] == usage.completion_tokens
    times = [spans[name].start_time_unix_nano for name in ("queue", "prefill", "decode")]
    assert times == sorted(times)


def http_greedy(server: Server, ids: dict[str, list[int]], **fields: Any) -> list[int]:
    body = {"model": "stories", "prompt": ids["prompt_ids"], "max_tokens": len(ids["greedy_ids"]) - 1, "temperature": 0}
    body |= {"return_token_ids": True, "ignore_eos": True} | fields
    reply = httpx.post(server.url + "/v1/completions", json=body, timeout=120)
    assert reply.status_code == 200, reply.text
    return list(reply.json()["choices"][0]["token_ids"])


def test_documented_text_alone_and_hot(stories: Server, greedy: dict[str, list[int]]) -> None:
    expected = greedy["greedy_ids"][1:]
    assert http_greedy(stories, greedy) == expected  # cold
    assert http_greedy(stories, greedy) == expected  # hot: block of the prompt and more are cached
    half = {"prompt_ids": greedy["greedy_ids"][:100], "greedy_ids": greedy["greedy_ids"][99:]}
    before = stories.metric("vllm:prefix_cache_hits_total")
    assert http_greedy(stories, half) == expected[99:]
    until(lambda: stories.metric("vllm:prefix_cache_hits_total") > before)  # metrics lag a little behind


def test_documented_text_over_grpc(stories: Server, greedy: dict[str, list[int]]) -> None:
    sampling = {"temperature": 0, "max_tokens": len(greedy["greedy_ids"]) - 1, "ignore_eos": True}
    with Reflected(stories.grpc_address) as client:
        body = {"model": "stories", "prompt_token_ids": {"ids": greedy["prompt_ids"]}, "sampling": sampling}
        replies = list(client.call("Generate", body))
    ids = [token for reply in replies for token in reply.token_ids]
    assert ids == greedy["greedy_ids"][1:]


def test_documented_text_among_32_others(stories: Server, greedy: dict[str, list[int]]) -> None:
    others = [
        {"model": "stories", "prompt": f"Once upon a time, number {i}", "max_tokens": 60, "seed": i} for i in range(32)
    ]
    with concurrent.futures.ThreadPoolExecutor(33) as pool:
        running = [pool.submit(httpx.post, stories.url + "/v1/completions", json=body, timeout=120) for body in others]
        assert http_greedy(stories, greedy) == greedy["greedy_ids"][1:]
        assert all(future.result().status_code == 200 for future in running)


def one_request(server: Server, number: int) -> str:
    """One of 200: a third goes away at some moment, two are malformed. Returns what became of it."""
    draw = random.Random(number)
    body: dict[str, Any] = {"model": "stories", "prompt": "word " * draw.randint(1, 100), "stream": True}
    body |= {
        "max_tokens": draw.randint(1, 100),
        "ignore_eos": True,
        "seed": number,
        "stream_options": {"include_usage": True},
    }
    if number in (50, 150):
        body["temperature"] = "hot"
    patience = draw.uniform(0.0, 1.5) if number % 3 == 0 else 1e9
    started, tokens = time.monotonic(), 0
    with httpx.stream("POST", server.url + "/v1/completions", json=body, timeout=180) as reply:
        if reply.status_code != 200:
            return str(reply.status_code)
        for line in reply.iter_lines():
            if time.monotonic() - started > patience:
                return "cancelled"
            if line.startswith("data: {") and (usage := json.loads(line[6:]).get("usage")):
                tokens = usage["completion_tokens"]
    assert tokens == body["max_tokens"]
    return "complete"


def test_200_at_once(stories: Server) -> None:
    with concurrent.futures.ThreadPoolExecutor(200) as pool:
        ends = list(pool.map(lambda number: one_request(stories, number), range(200)))
    assert [ends[50], ends[150]] == ["400", "400"]
    assert all(end in ("complete", "cancelled") for i, end in enumerate(ends) if i not in (50, 150))
    assert all(end == "complete" for i, end in enumerate(ends) if i % 3 and i not in (50, 150))
    for name in ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc"):
        until(lambda name=name: stories.metric(f"vllm:{name}") == 0)


def test_client_that_goes_away_frees_its_blocks(stories: Server) -> None:
    body = {"model": "stories", "prompt": "Once", "max_tokens": 5000, "ignore_eos": True, "stream": True, "n": 64}
    before = stories.metric("vllm:generation_tokens_total")
    with httpx.stream("POST", stories.url + "/v1/completions", json=body, timeout=60) as reply:
        lines = reply.iter_lines()  # kept: the connection is closed when nobody holds it
        next(lines)
        until(lambda: stories.metric("vllm:kv_cache_usage_perc"))
    until(lambda: not stories.metric("vllm:kv_cache_usage_perc"))
    assert stories.metric("vllm:generation_tokens_total") - before < 64 * 5000, "it went on to the end"
