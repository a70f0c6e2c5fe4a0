"""/v1/responses over a real engine and real sockets, by OpenAI's own client."""

from __future__ import annotations

import asyncio
import json
import threading
import time

import jsonschema
import openai
import pydantic
import pytest
import uvicorn
from openai.types.responses import ResponseStreamEvent

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
        self._thread = threading.Thread(target=asyncio.run, args=(self._serve(sock),))

    def __enter__(self):
        self._thread.start()
        assert self._ready.wait(60)
        return self

    def __exit__(self, *_):
        self._stop.set()
        self._thread.join(20)

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
