"""/v1/responses over a real engine and real sockets, by OpenAI's own client."""

from __future__ import annotations

import asyncio
import json
import math
import threading
import time

import httpx
import jsonschema
import openai
import pydantic
import pytest
import uvicorn
from openai.types.responses import ResponseStreamEvent

from kvasir.cluster.carried import carried
from kvasir.cluster.config import GatewayConfig
from kvasir.cluster.gateway import close_app, create_app
from kvasir.cluster.local_desk import local_desk
from kvasir.cluster.sockets import bound_socket
from kvasir.engine import EngineConfig

SUM = "What is 47 + 38?"
EVENT = pydantic.TypeAdapter(ResponseStreamEvent)


class Server:
    """The gateway's HTTP server over skald, in a thread with a loop of its own."""

    def __init__(self, state_path):
        self._config = GatewayConfig(state_path=state_path)
        sock = bound_socket("127.0.0.1", 0, shared=False)
        self.url = f"http://127.0.0.1:{sock.getsockname()[1]}"
        self._ready, self._stop = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=asyncio.run, args=(self._serve(sock),), daemon=True)

    def __enter__(self):
        self._thread.start()
        while not self._ready.wait(0.2):
            assert self._thread.is_alive(), "the server didn't start: its thread's error says why"
        return self

    def __exit__(self, *_):
        self._stop.set()
        self._thread.join(60)

    async def _serve(self, sock):
        async with local_desk(EngineConfig(served_model_name=("skald",), max_num_seqs=4), {}) as desk:
            app = create_app(desk, self._config)
            server = uvicorn.Server(uvicorn.Config(app, log_config=None, access_log=False, lifespan="off"))
            with sock:
                serving = asyncio.ensure_future(server._serve([sock]))
                self._ready.set()
                while not self._stop.is_set():
                    await asyncio.sleep(0.02)
                server.should_exit = True
                await serving
            await close_app(app)


@pytest.fixture(scope="module")
def client(tmp_path_factory):
    state = str(tmp_path_factory.mktemp("state") / "state.db")
    with Server(state) as server, openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0) as client:
        yield client


def test_whole_and_streamed_are_the_same(client):
    whole = client.responses.create(model="skald", input=SUM, temperature=0)
    assert "85" in whole.output_text
    assert whole.status == "completed"
    events = list(client.responses.create(model="skald", input=SUM, temperature=0, stream=True))
    for event in events:
        EVENT.validate_python(event.to_dict())
    assert "".join(one.delta for one in events if one.type == "response.output_text.delta") == whole.output_text
    last = events[-1].response
    assert last.output_text == whole.output_text
    assert last.usage.output_tokens == whole.usage.output_tokens
    assert client.responses.retrieve(last.id) == last


def test_a_conversation_hits_the_cache(client):
    """The earlier turns are rendered to the same tokens, so their blocks are found again."""
    story = "Tell me about the sea. " * 20
    first = client.responses.create(model="skald", input=story, temperature=0, max_output_tokens=40)
    second = client.responses.create(
        model="skald", input=SUM, previous_response_id=first.id, temperature=0, max_output_tokens=20
    )
    assert second.usage.input_tokens > first.usage.input_tokens + 30
    assert second.usage.input_tokens_details.cached_tokens >= first.usage.input_tokens // 16 * 16
    items = client.responses.input_items.list(second.id, order="asc").data
    assert [item.content[0].text for item in items] == [story, first.output_text, SUM]


def test_structured_output(client):
    class Person(pydantic.BaseModel):
        name: str = pydantic.Field(max_length=12)
        age: int = pydantic.Field(ge=0, le=150)

    found = client.responses.parse(
        model="skald", input="Who are you?", text_format=Person, temperature=1.0, max_output_tokens=200
    )
    assert isinstance(found.output_parsed, Person)
    schema = Person.model_json_schema()
    jsonschema.validate(json.loads(found.output_text), schema)


def test_background_and_resumption(client):
    fields = {"model": "skald", "input": "Tell me a story.", "temperature": 0, "max_output_tokens": 60}
    seen = []
    with client.responses.create(**fields, background=True, stream=True) as stream:
        for event in stream:
            seen.append(event)
            if len(seen) == 6:
                break
    rest = list(client.responses.retrieve(seen[0].response.id, stream=True, starting_after=seen[-1].sequence_number))
    events = [*seen, *rest]
    assert [one.sequence_number for one in events] == list(range(len(events)))
    text = "".join(one.delta for one in events if one.type == "response.output_text.delta")
    assert text == client.responses.create(**fields).output_text


def test_cancel(client):
    running = client.responses.create(model="skald", input="Go on.", background=True, extra_body={"ignore_eos": True})
    assert client.responses.cancel(running.id).status == "cancelled"
    time.sleep(0.1)
    assert client.responses.retrieve(running.id).status == "cancelled"


def test_too_long(client):
    with pytest.raises(openai.BadRequestError) as caught:
        client.responses.create(model="skald", input="x " * 20000)
    assert caught.value.code == "context_length_exceeded"


# -- decisions


STATE = "Ann: I waited for two weeks and nothing came. Refund me."
QUESTIONS = [
    {"type": "predicate", "name": "angry", "instructions": "Is the customer angry?"},
    {"type": "choice", "instructions": "What does she want?", "choices": [{"value": v} for v in ("a refund", "help", True)]},
    {"type": "score", "name": "urgency", "instructions": "How urgent is it?",
     "levels": [{"value": 1, "label": "not at all"}, {"value": 2}, {"value": 10, "label": "very"}]},
]  # fmt: skip


def ask_decisions(client, **body):
    return client.post("/decisions", cast_to=httpx.Response, body={"model": "skald", "input": STATE} | body).json()


def scored(client, question, answers):
    """Log probability of each answer and the end of the turn behind the question, every token of the prompt scored anew."""
    base = str(client.base_url).removesuffix("/v1/")
    said = [{"role": "user", "content": question}]
    prompt = httpx.post(f"{base}/tokenize", json={"messages": said, "add_generation_prompt": True}).json()["tokens"]
    end = httpx.post(f"{base}/tokenize", json={"prompt": "<|im_end|>", "add_special_tokens": False}).json()["tokens"]
    totals = []
    for answer in answers:
        own = httpx.post(f"{base}/tokenize", json={"prompt": answer, "add_special_tokens": False}).json()["tokens"]
        body = {"prompt": [*prompt, *own, *end], "max_tokens": 1, "prompt_logprobs": 0, "temperature": 0}
        scores = httpx.post(f"{base}/v1/completions", json=body).json()["choices"][0]["prompt_logprobs"][len(prompt) :]
        totals.append(sum(next(iter(one.values()))["logprob"] for one in scores))
    weights = [math.exp(total - max(totals)) for total in totals]
    return [weight / sum(weights) for weight in weights]


def test_decisions_are_the_models_own_probabilities(client):
    found = ask_decisions(client, questions=QUESTIONS)
    angry, wish, urgency = found["answers"]
    assert (found["object"], angry["type"], angry["name"], wish["name"]) == ("decision", "predicate", "angry", None)
    asked = f"{STATE}\n\nIs the customer angry?\nAnswer with Yes or No, and nothing else."
    assert angry["probability"] == pytest.approx(scored(client, asked, ["Yes", "No"])[0], abs=2e-3)
    asked = f"{STATE}\n\nWhat does she want?\nAnswer with one of these, and nothing else:\n- a refund\n- help\n- Yes"
    shares = scored(client, asked, ["a refund", "help", "Yes"])
    assert [one["probability"] for one in wish["probabilities"]] == pytest.approx(shares, abs=2e-3)
    assert [one["value"] for one in wish["probabilities"]] == ["a refund", "help", True]
    assert wish["choice"] == ["a refund", "help", True][shares.index(max(shares))]
    assert wish["confidence"] == pytest.approx(max(shares), abs=2e-3)
    levels = urgency["probabilities"]
    assert [(one["value"], one["label"]) for one in levels] == [(1, "not at all"), (2, None), (10, "very")]
    assert sum(one["probability"] for one in levels) == pytest.approx(1)
    assert urgency["score"] == pytest.approx(sum(one["value"] * one["probability"] for one in levels))
    usage = found["usage"]
    assert usage["total_tokens"] == usage["input_tokens"] + usage["output_tokens"]
    again = ask_decisions(client, questions=QUESTIONS)
    assert again["usage"]["input_tokens_details"]["cached_tokens"] >= usage["input_tokens_details"]["cached_tokens"] > 0
    assert again["answers"][0]["probability"] == pytest.approx(angry["probability"], abs=2e-3)


@pytest.mark.parametrize(
    ("body", "word"),
    [
        ({"questions": []}, "questions"),
        ({"questions": [{"type": "guess", "instructions": "a"}]}, "type"),
        ({"questions": [{"type": "predicate"}]}, "instructions"),
        ({"questions": [{"type": "choice", "instructions": "a", "choices": [{"value": "a"}]}]}, "choices"),
        ({"questions": [{"type": "choice", "instructions": "a", "choices": ["a", "a"]}]}, "same"),
        ({"questions": [{"type": "choice", "instructions": "a", "choices": ["a", 3]}]}, "value"),
        ({"questions": [{"type": "score", "instructions": "a", "levels": [1, "x", None]}]}, "levels"),
        ({"questions": [{"type": "predicate", "instructions": "a", "levels": [1, 2]}]}, "levels"),
        ({"questions": [{"type": "predicate", "instructions": "a", "weight": 1}]}, "weight"),
        ({"questions": QUESTIONS, "temperature": 0.5}, "temperature"),
        ({"questions": QUESTIONS, "input": []}, "input"),
    ],
)
def test_decisions_refused(client, body, word):
    with pytest.raises(openai.BadRequestError, match=word):
        ask_decisions(client, **body)


# -- compaction, tools


def test_compaction_goes_on(client):
    first = client.responses.create(model="skald", input=SUM, temperature=0)
    system = {"role": "system", "content": "Be brief."}
    raw = client.responses.with_raw_response.compact(model="skald", previous_response_id=first.id, input=[system])
    small = raw.parse()
    assert small.object == "response.compaction"
    kept, summary = small.output
    assert (kept.role, summary.type) == ("system", "compaction")
    assert small.usage.output_tokens > 0
    text = carried(summary.encrypted_content)
    assert text
    then = client.responses.create(
        model="skald", input=[*json.loads(raw.text)["output"], {"role": "user", "content": SUM}], temperature=0
    )
    read = f"Be brief.\n\nSummary of the conversation so far:\n{text}"
    told = [{"role": "system", "content": read}, {"role": "user", "content": SUM}]
    same = client.responses.create(model="skald", input=told, temperature=0)
    assert (then.status, then.output_text) == ("completed", same.output_text)
    assert then.usage.input_tokens == same.usage.input_tokens
    (said, *_) = client.responses.input_items.list(then.id, order="asc").data
    assert said.content[0].text == "Be brief."
    foreign = {"type": "compaction", "encrypted_content": "gAAAA"}
    with pytest.raises(openai.BadRequestError, match="wasn't written by this server"):
        client.responses.create(model="skald", input=[foreign, {"role": "user", "content": SUM}])
    with pytest.raises(openai.BadRequestError, match="temperature isn't supported"):
        client.responses.compact(model="skald", input="Hi", extra_body={"temperature": 1})


WEATHER = {
    "type": "function", "name": "get_weather", "strict": True,
    "parameters": {"type": "object", "properties": {"city": {"type": "string", "maxLength": 12}}, "required": ["city"],
                   "additionalProperties": False},
}  # fmt: skip


@pytest.mark.parametrize("choice", ["required", {"type": "function", "name": "get_weather"}])
def test_a_tool_and_its_result(client, choice):
    """Forced at temperature 1; streamed by the client's own reading; the result goes on from the stored response."""
    ask = {
        "model": "skald",
        "input": "Weather in Bergen?",
        "tools": [WEATHER],
        "temperature": 1.0,
        "max_output_tokens": 200,
    }
    with client.responses.stream(**ask, tool_choice=choice, parallel_tool_calls=False) as stream:
        events = list(stream)
        final = stream.get_final_response()
    (call,) = [item for item in final.output if item.type == "function_call"]
    jsonschema.validate(json.loads(call.arguments), WEATHER["parameters"])
    deltas = [e.delta for e in events if e.type == "response.function_call_arguments.delta"]
    done = [e for e in events if e.type == "response.function_call_arguments.done"]
    assert "".join(deltas) == done[0].arguments == call.arguments
    stored = client.responses.retrieve(final.id)
    assert stored.output == [type(one).model_validate(one.to_dict()) for one in stored.output]
    assert [item.to_dict() for item in stored.output][-1]["arguments"] == call.arguments
    result = {"type": "function_call_output", "call_id": call.call_id, "output": "Rain."}
    then = client.responses.create(model="skald", input=[result], previous_response_id=final.id, temperature=0)
    items = client.responses.input_items.list(then.id, order="asc").data
    assert [item.type for item in items] == ["message", *(one.type for one in final.output), "function_call_output"]


def test_tools_in_a_conversation_in_the_background(client):
    talk = client.conversations.create()
    ask = {"model": "skald", "conversation": talk.id, "tools": [WEATHER], "tool_choice": "required"}
    begun = client.responses.create(
        **ask, input="Weather in Oslo?", background=True, stream=True, max_output_tokens=200
    )
    final = list(begun)[-1].response
    assert final.output[-1].type == "function_call"
    kinds = [item.type for item in client.conversations.items.list(talk.id, order="asc").data]
    assert kinds == ["message", *(item.type for item in final.output)]


@pytest.mark.parametrize(
    "kind", ["web_search", "file_search", "code_interpreter", "computer_use_preview", "mcp", "custom"]
)
def test_tools_of_others_are_refused_by_name(client, kind):
    with pytest.raises(openai.BadRequestError, match=kind):
        client.responses.create(model="skald", input="Hi", tools=[{"type": kind}])


@pytest.mark.parametrize("kind", ["input_image", "input_audio", "input_file"])
def test_what_isnt_text_is_refused_by_name(client, kind):
    part = {"role": "user", "content": [{"type": kind, "image_url": "https://example.com/a.png"}]}
    with pytest.raises(openai.BadRequestError, match=kind):
        client.responses.create(model="skald", input=[part])
