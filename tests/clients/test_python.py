"""Clients in Python: what they make of answers, streams, calls of tools, schemas, vectors and errors, and that leaving ends
the work."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import anthropic
import numpy as np
import ollama
import openai
import pydantic
import pytest
from langchain_core.tools import tool
from langchain_ollama import ChatOllama, OllamaEmbeddings
from langchain_openai import ChatOpenAI, OpenAIEmbeddings

pytestmark = [pytest.mark.ray, pytest.mark.timeout(600)]

SUM: Any = [{"role": "user", "content": "What is 47 + 38?"}]
WEATHER: Any = [{"role": "user", "content": "What is the weather in Bergen?"}]
CITY: Any = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
FUNCTION: Any = {"name": "get_weather", "description": "Get the weather of a city.", "parameters": CITY}
TOOL: Any = {"type": "function", "function": FUNCTION}
LONG = 1900


class Person(pydantic.BaseModel):
    """What answers are to look like."""

    model_config = pydantic.ConfigDict(extra="forbid")
    age: int
    married: bool


# -- openai


@pytest.fixture(scope="module")
def gpt(server):
    with openai.OpenAI(base_url=server.url + "/v1", api_key=server.key, max_retries=0, timeout=150) as client:
        yield client


def test_openai_chat_and_stream(gpt):
    whole = gpt.chat.completions.create(model="skald", messages=SUM, temperature=0)
    assert "85" in whole.choices[0].message.content
    with gpt.chat.completions.stream(model="skald", messages=SUM, temperature=0) as stream:
        kinds = {event.type for event in stream}
        final = stream.get_final_completion()
    assert {"chunk", "content.delta", "content.done"} <= kinds
    assert final.choices[0].message.content == whole.choices[0].message.content
    text = "".join(
        chunk.choices[0].text
        for chunk in gpt.completions.create(model="skald", prompt="Once", max_tokens=9, stream=True)
    )
    assert text


def test_openai_tools_and_schemas(gpt):
    (choice,) = gpt.chat.completions.create(model="skald", messages=WEATHER, tools=[TOOL], temperature=0).choices
    (call,) = choice.message.tool_calls
    assert json.loads(call.function.arguments) == {"city": "Bergen"}
    with gpt.chat.completions.stream(model="skald", messages=WEATHER, tools=[TOOL], temperature=0) as stream:
        (streamed,) = stream.get_final_completion().choices[0].message.tool_calls
    assert streamed.function.arguments == call.function.arguments
    told = [*WEATHER, choice.message, {"role": "tool", "tool_call_id": call.id, "content": "rain, 9 degrees"}]
    answer = gpt.chat.completions.create(model="skald", messages=told, tools=[TOOL], temperature=0).choices[0]
    assert "rain" in answer.message.content
    parsed = gpt.chat.completions.parse(model="skald", messages=SUM, response_format=Person, seed=3, max_tokens=100)
    assert isinstance(parsed.choices[0].message.parsed, Person)


def test_openai_responses(gpt):
    first = gpt.responses.create(model="skald", input="What is 47 + 38?", temperature=0)
    assert "85" in first.output_text
    with gpt.responses.stream(model="skald", input="What is 47 + 38?", temperature=0) as stream:
        for _ in stream:
            pass
        assert stream.get_final_response().output_text == first.output_text
    assert gpt.responses.retrieve(first.id).output_text == first.output_text
    parsed = gpt.responses.parse(model="skald", input="Who?", text_format=Person, extra_body={"seed": 3})
    assert isinstance(parsed.output_parsed, Person)
    gpt.responses.delete(first.id)
    with pytest.raises(openai.NotFoundError):
        gpt.responses.retrieve(first.id)


def test_openai_vectors_models_and_files(gpt):
    floats = gpt.embeddings.create(model="skald", input=["a ship", "a song"], encoding_format="float").data
    packed = gpt.embeddings.create(model="skald", input=["a ship", "a song"]).data
    assert np.allclose([one.embedding for one in floats], [one.embedding for one in packed], atol=1e-6)
    assert [model.id for model in gpt.models.list()] == ["skald"]
    line = {
        "custom_id": "a",
        "method": "POST",
        "url": "/v1/chat/completions",
        "body": {"model": "skald", "messages": SUM},
    }
    file = gpt.files.create(file=("in.jsonl", json.dumps(line).encode()), purpose="batch")
    assert json.loads(gpt.files.content(file.id).read()) == line
    assert gpt.files.delete(file.id).deleted


def test_openai_errors_have_types(server, gpt):
    with pytest.raises(openai.NotFoundError, match="there is: skald"):
        gpt.chat.completions.create(model="no", messages=SUM)
    with pytest.raises(openai.BadRequestError, match="temperature") as caught:
        gpt.chat.completions.create(model="skald", messages=SUM, temperature=-1)
    assert caught.value.param == "temperature"
    assert caught.value.request_id
    with pytest.raises(openai.BadRequestError, match="max-model-len"):
        gpt.completions.create(model="skald", prompt="to be " * 1500, max_tokens=1000)
    with (
        openai.OpenAI(base_url=server.url + "/v1", api_key="wrong", max_retries=0) as stranger,
        pytest.raises(openai.AuthenticationError),
    ):
        stranger.models.list()


def test_openai_cancels(server, gpt):
    def leave() -> None:
        body = {"ignore_eos": True}
        stream = gpt.completions.create(model="skald", prompt="Once", max_tokens=LONG, stream=True, extra_body=body)
        next(iter(stream))
        stream.close()

    server.cancelled(leave)


# -- anthropic


@pytest.fixture(scope="module")
def claude(server):
    with anthropic.Anthropic(base_url=server.url, api_key=server.key, max_retries=0, timeout=150) as client:
        yield client


def test_anthropic(server, claude):
    ask: Any = {"model": "skald", "max_tokens": 60, "extra_body": {"temperature": 0}}
    whole = claude.messages.create(messages=SUM, **ask)
    assert "85" in whole.content[0].text
    with claude.messages.stream(messages=SUM, **ask) as stream:
        assert "".join(stream.text_stream) == whole.content[0].text
    tools: Any = [{"name": "get_weather", "description": "Get the weather of a city.", "input_schema": CITY}]
    with claude.messages.stream(messages=WEATHER, tools=tools, **ask) as stream:
        message = stream.get_final_message()
    (block,) = message.content
    assert (block.type, block.name, block.input) == ("tool_use", "get_weather", {"city": "Bergen"})
    assert message.stop_reason == "tool_use"
    said: Any = {"type": "tool_result", "tool_use_id": block.id, "content": "rain, 9 degrees"}
    told: Any = [*WEATHER, {"role": "assistant", "content": message.content}, {"role": "user", "content": [said]}]
    assert "rain" in claude.messages.create(messages=told, tools=tools, **ask).content[0].text
    forced = claude.messages.create(messages=SUM, tools=tools, tool_choice={"type": "any"}, **ask)
    assert forced.content[-1].type == "tool_use"
    assert claude.messages.count_tokens(model="skald", messages=SUM).input_tokens > 5


def test_anthropic_errors_and_leaving(server, claude):
    with pytest.raises(anthropic.NotFoundError):
        claude.messages.create(model="no", max_tokens=5, messages=SUM)
    with pytest.raises(anthropic.BadRequestError, match="temperature"):
        claude.messages.create(model="skald", max_tokens=5, messages=SUM, extra_body={"temperature": -1})
    with (
        anthropic.Anthropic(base_url=server.url, api_key="wrong", max_retries=0) as stranger,
        pytest.raises(anthropic.AuthenticationError),
    ):
        stranger.messages.create(model="skald", max_tokens=5, messages=SUM)

    def leave() -> None:
        story: Any = [{"role": "user", "content": "Tell me a long story."}]
        schema = {"type": "array", "items": {"type": "integer"}, "minItems": 400}
        form = {"output_config": {"format": {"type": "json_schema", "schema": schema}}}
        with claude.messages.create(
            model="skald", max_tokens=LONG, messages=story, stream=True, extra_body=form
        ) as stream:
            for event in stream:
                if event.type == "content_block_delta":
                    return

    server.cancelled(leave)


# -- ollama


@pytest.fixture(scope="module")
def llama(server):
    with ollama.Client(server.url, headers={"Authorization": f"Bearer {server.key}"}) as client:
        yield client


def test_ollama(llama):
    whole = llama.chat("skald", SUM, options={"temperature": 0})
    assert "85" in whole.message.content
    assert "".join(
        part.message.content for part in llama.chat("skald", SUM, options={"temperature": 0}, stream=True)
    ) == (whole.message.content)
    called = llama.chat("skald", WEATHER, tools=[TOOL], options={"temperature": 0}).message.tool_calls
    assert [(one.function.name, one.function.arguments) for one in called] == [("get_weather", {"city": "Bergen"})]
    streamed = [*llama.chat("skald", WEATHER, tools=[TOOL], options={"temperature": 0}, stream=True)]
    assert [call for part in streamed for call in part.message.tool_calls or ()] == called
    told = [*WEATHER, {"role": "assistant", "tool_calls": called}, {"role": "tool", "content": "rain, 9 degrees"}]
    assert "rain" in llama.chat("skald", told, tools=[TOOL], options={"temperature": 0}).message.content
    reply = llama.chat("skald", SUM, format=Person.model_json_schema(), options={"seed": 3})
    Person.model_validate_json(reply.message.content)
    assert len(llama.embed("skald", ["a ship", "a song"]).embeddings) == 2
    assert llama.list().models[0].model == "skald:latest"


def test_ollama_errors_and_leaving(server, llama):
    with pytest.raises(ollama.ResponseError) as caught:
        llama.chat("no", SUM)
    assert caught.value.status_code == 404
    with pytest.raises(ollama.ResponseError, match="temperature"):
        llama.chat("skald", SUM, options={"temperature": -1})
    with pytest.raises(ollama.ResponseError, match="pulling"):
        llama.pull("skald")

    def leave() -> None:
        parts = llama.generate(
            "skald", "Once", raw=True, stream=True, options={"ignore_eos": True, "num_predict": LONG}
        )
        next(parts)
        parts.close()

    server.cancelled(leave)


# -- langchain


@tool
def get_weather(city: str) -> str:
    """Get the weather of a city."""
    return f"rain in {city}"


def of_openai(server):
    return ChatOpenAI(model="skald", base_url=server.url + "/v1", api_key=server.key, temperature=0, max_retries=0)


def of_ollama(server):
    headers = {"headers": {"Authorization": f"Bearer {server.key}"}}
    return ChatOllama(model="skald", base_url=server.url, temperature=0, client_kwargs=headers)


@pytest.mark.parametrize("make", [of_openai, of_ollama])
def test_langchain(server, make):
    model = make(server)
    whole = model.invoke("What is 47 + 38?")
    assert "85" in whole.content
    assert whole.usage_metadata["output_tokens"] > 0
    assert "".join(chunk.content for chunk in model.stream("What is 47 + 38?")) == whole.content
    armed = model.bind_tools([get_weather])
    (call,) = armed.invoke("What is the weather in Bergen?").tool_calls
    assert (call["name"], call["args"]) == ("get_weather", {"city": "Bergen"})
    total = None
    for chunk in armed.stream("What is the weather in Bergen?"):
        total = chunk if total is None else total + chunk
    assert [one["args"] for one in total.tool_calls] == [{"city": "Bergen"}]
    person = model.with_structured_output(Person, method="json_schema").invoke("Who?")
    assert isinstance(person, Person)
    close(model)


def test_langchain_errors_and_vectors(server):
    model = of_openai(server)
    with pytest.raises(openai.NotFoundError):
        model.bind(model="no").invoke("Hi")
    close(model)
    vectors = OpenAIEmbeddings(
        model="skald", base_url=server.url + "/v1", api_key=server.key, check_embedding_ctx_length=False
    )
    headers = {"headers": {"Authorization": f"Bearer {server.key}"}}
    others = OllamaEmbeddings(model="skald", base_url=server.url, client_kwargs=headers)
    ours, theirs = vectors.embed_query("a ship"), others.embed_query("a ship")
    assert np.allclose(ours, theirs, atol=1e-6)
    others._client.close()


def close(model):
    """Connections of Ollama's, which are left to the collector. (OpenAI's are shared by all.)"""
    if (client := getattr(model, "_client", None)) is not None:
        client.close()


# -- the others


def alone(script: str, *rest: str) -> str:
    """What one of the scripts beside this file prints. One that hangs says where, and ends before our patience does."""
    environment = {**os.environ, "LITELLM_LOCAL_MODEL_COST_MAP": "True", "LITELLM_LOG": "ERROR"}
    call = [sys.executable, str(Path(__file__).with_name(script)), *rest]
    run = subprocess.run(call, capture_output=True, text=True, env=environment, timeout=250)
    assert run.returncode == 0, f"{run.stdout[-1000:]}\n{run.stderr[-5000:]}"
    return run.stdout


def test_litellm(server):
    """In a process of its own, since importing it takes seconds; nothing but the server may be reached from there."""
    said = alone("use_litellm.py", server.url, server.key)
    assert json.loads(said.splitlines()[-1]) == {"tried": []}


def test_tritonclient(server):
    alone("use_triton.py", server.grpc, server.key)
