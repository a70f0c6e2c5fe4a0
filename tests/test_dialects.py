"""Ollama's and Anthropic's dialects over a real engine and real sockets, by clients that others wrote."""

from __future__ import annotations

import asyncio
import json
import re
import socket
import subprocess
import threading
from pathlib import Path

import anthropic
import httpx
import jsonschema
import ollama
import openai
import pytest
import uvicorn
from ollama_documents import OllamaDocuments

from kvasir.cluster.config import GatewayConfig
from kvasir.cluster.gateway import create_app
from kvasir.cluster.local_desk import local_desk
from kvasir.engine import EngineConfig

SUM = [{"role": "user", "content": "What is 47 + 38?"}]


class Server:
    """The gateway's HTTP server over skald, in a thread with a loop of its own."""

    def __init__(self):
        sock = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{sock.getsockname()[1]}"
        self._ready, self._stop = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=asyncio.run, args=(self._serve(sock),))

    def __enter__(self):
        self._thread.start()
        assert self._ready.wait(60)
        return self

    def __exit__(self, *_):
        self._stop.set()
        self._thread.join(60)

    async def _serve(self, sock):
        async with local_desk(EngineConfig(served_model_name=("skald",), max_num_seqs=4), {}) as desk:
            app = create_app(desk, GatewayConfig())
            server = uvicorn.Server(uvicorn.Config(app, log_config=None, access_log=False, lifespan="off"))
            with sock:
                serving = asyncio.ensure_future(server._serve([sock]))
                self._ready.set()
                while not self._stop.is_set():
                    await asyncio.sleep(0.02)
                server.should_exit = True
                await serving


@pytest.fixture(scope="module")
def url():
    with Server() as server:
        yield server.url


def test_commands_of_the_readme(url):
    """They are run as they are written, but for the port."""
    readme = (Path(__file__).parents[1] / "README.md").read_text()
    commands = re.findall(
        r"^curl http://127\.0\.0\.1:8000/(?:api|v1/messages).*?\}'$", readme, re.DOTALL | re.MULTILINE
    )
    assert len(commands) == 2
    for command in commands:
        here = command.replace("http://127.0.0.1:8000", url).replace("curl", "curl -sSf", 1)
        run = subprocess.run(["bash", "-c", here], capture_output=True, text=True, check=True)
        texts = re.findall(r'"(?:content|text)":\s?"([^"]*)"', run.stdout)
        assert "skald" in "".join(texts).lower()


def test_ollama_client(url):
    with ollama.Client(url) as client:
        whole = client.chat("skald:latest", SUM, options={"temperature": 0})
        assert "85" in whole.message.content
        assert whole.done_reason == "stop"
        parts = [*client.chat("skald", SUM, options={"temperature": 0}, stream=True)]
        assert "".join(part.message.content for part in parts) == whole.message.content
        assert parts[-1].eval_count == whole.eval_count
        assert parts[-1].total_duration >= parts[-1].eval_duration > 0
        assert parts[-1].prompt_eval_duration > 0


def test_ollama_context_and_seed(url):
    with ollama.Client(url) as client:
        first = client.generate("skald", "The code of amber is 4172.", options={"temperature": 0})
        again = client.generate(
            "skald", "What is the code of amber?", context=first.context, options={"temperature": 0}
        )
        assert "4172" in again.response
        options = {"temperature": 1.0, "seed": 3, "num_predict": 20}
        drawn = {client.generate("skald", "Tell me something.", options=options).response for _ in range(2)}
        assert len(drawn) == 1


def test_schemas_are_enforced(url):
    schema = {
        "type": "object",
        "properties": {"age": {"type": "integer", "minimum": 0, "maximum": 99}, "available": {"type": "boolean"}},
        "required": ["age", "available"],
        "additionalProperties": False,
    }
    options = {"temperature": 1.0, "seed": 1, "num_predict": 100}
    with ollama.Client(url) as client:
        found = [client.chat("skald", SUM, format=schema, options=options | {"seed": i}) for i in range(5)]
    with anthropic.Anthropic(base_url=url, api_key="none", max_retries=0) as client:
        form = {"format": {"type": "json_schema", "schema": schema}}
        last = client.messages.create(model="skald", max_tokens=100, messages=SUM, output_config=form)
    for text in [*(reply.message.content for reply in found), last.content[0].text]:
        jsonschema.validate(json.loads(text), schema)


def test_ollamas_sampler_options_work(url):
    options = {
        "temperature": 1.0, "seed": 7, "num_predict": 30, "repeat_penalty": 1.2, "repeat_last_n": 32, "penalize_newline": False,
        "typical_p": 0.9, "tfs_z": 0.95, "mirostat": 2, "mirostat_tau": 3.0, "mirostat_eta": 0.1, "num_keep": 4,
    }  # fmt: skip
    body = {"model": "skald", "prompt": "The ship", "raw": True, "stream": False, "truncate": True}
    found = [httpx.post(url + "/api/generate", json=body | {"options": options}, timeout=60) for _ in range(2)]
    assert found[0].json()["response"] == found[1].json()["response"] != ""
    assert "x-kvasir-warning" not in found[0].headers
    other = httpx.post(
        url + "/api/generate", json=body | {"options": options | {"mirostat_tau": 9.0, "tfs_z": 1.0}}, timeout=30
    )
    assert other.json()["response"] != found[0].json()["response"]
    banned = options | {"bad_words": ["sea"], "temperature": 0, "num_predict": 60}
    text = httpx.post(url + "/api/generate", json=body | {"options": banned}, timeout=60).json()["response"]
    assert " sea" not in text


def test_beams_by_openais_client(url):
    search = {"use_beam_search": True, "best_of": 4, "length_penalty": 0.8}
    call = {
        "model": "skald",
        "prompt": "Once upon a time",
        "max_tokens": 12,
        "n": 2,
        "temperature": 0,
        "extra_body": search,
    }
    with openai.OpenAI(base_url=url + "/v1", api_key="none", max_retries=0) as client:
        whole = client.completions.create(**call, logprobs=0)
        assert len({choice.text for choice in whole.choices}) == 2
        texts = ["", ""]
        for chunk in client.completions.create(**call, stream=True):
            for choice in chunk.choices:
                texts[choice.index] += choice.text
        assert texts == [choice.text for choice in whole.choices]
        call["extra_body"] = {"best_of": 4, "seed": 1, "temperature": 1.0}
        drawn = client.completions.create(**call)
        assert drawn.usage.completion_tokens > 2 * 12  # all four were made
        chat = client.chat.completions.create(
            model="skald", messages=SUM, extra_body={"use_beam_search": True, "best_of": 3}, temperature=0
        )
        assert "85" in chat.choices[0].message.content


def test_prompts_are_cut_when_asked(url):
    long = "to be or not to be " * 2000
    body = {"model": "skald", "prompt": long, "stream": False, "options": {"num_predict": 5}}
    cut = httpx.post(url + "/api/generate", json=body | {"truncate": True}, timeout=60)
    assert cut.json()["prompt_eval_count"] == 2048 - 5
    assert "tokens of the prompt were cut off" in cut.headers["x-kvasir-warning"]


def test_ollama_models(url):
    with ollama.Client(url) as client:
        (model,) = client.list().models
        assert (model.model, model.details.family) == ("skald:latest", "qwen3")
        assert (model.details.parameter_size, model.details.quantization_level) == ("3.2M", "BF16")
        assert model.size > 6_000_000
        shown = client.show("skald")
        assert shown.modelinfo["qwen3.context_length"] == 2048
        assert shown.modelinfo["general.parameter_count"] > 3_000_000
        assert "completion" in shown.capabilities
        assert client.ps().models[0].context_length > 0


REFUSED = {
    "suffix": "does not support insert",
    "images": "images",
    "image": "image",
    "think": "no thoughts",
    "thinking": "no thoughts",
    "dimensions": "can't be cut",
}
"""What skald can't."""


def test_every_example_of_ollamas_documentation(url, data):
    documents = OllamaDocuments(data("api-ollama/docs"), "skald", REFUSED)
    found = [documents.answered(url, *_short(*request)) for request in documents.requests()]
    assert len(found) >= 80
    assert sum(found) >= 55


def _short(method, path, body):
    """Of what skald would write for seconds the first tokens are enough."""
    try:
        fields = json.loads(body or "{}")
    except ValueError:
        return method, path, body
    if fields and path in ("/api/generate", "/api/chat"):
        fields["options"] = {"num_predict": 30, **fields.get("options", {})}
        return method, path, json.dumps(fields)
    return method, path, body


def test_langchain_ollama(url):
    chat_models = pytest.importorskip("langchain_ollama")
    model = chat_models.ChatOllama(model="skald", base_url=url, temperature=0)
    assert "85" in model.invoke("What is 47 + 38?").content
    assert "85" in "".join(chunk.content for chunk in model.stream("What is 47 + 38?"))
    model._client.close()


def test_anthropic_client(url):
    with anthropic.Anthropic(base_url=url, api_key="none", max_retries=0) as client:
        facts = "You answer sums with nothing but the result, in digits, as shortly as you can."
        call = {"model": "skald", "system": facts, "max_tokens": 40, "messages": SUM, "extra_body": {"temperature": 0}}
        whole = client.messages.create(**call)
        assert "85" in whole.content[0].text
        assert whole.stop_reason == "end_turn"
        with client.messages.stream(**call) as stream:
            assert "".join(stream.text_stream) == whole.content[0].text
        usage = stream.get_final_message().usage
        assert usage.cache_read_input_tokens > 0  # the whole prompt but its last block was there
        counted = client.messages.count_tokens(model="skald", messages=SUM, system=facts).input_tokens
        assert usage.input_tokens + usage.cache_read_input_tokens == counted
        prefilled = client.messages.create(**call | {"messages": [*SUM, {"role": "assistant", "content": "47 + 38"}]})
        assert "85" in prefilled.content[0].text


def test_context_overflow_is_a_client_error(url):
    long = "to be or not to be " * 2000
    reply = httpx.post(url + "/api/generate", json={"model": "skald", "prompt": long}, timeout=60)
    assert reply.status_code == 400
    assert "2048" in reply.json()["error"]
    with (
        anthropic.Anthropic(base_url=url, api_key="none", max_retries=0) as client,
        pytest.raises(anthropic.BadRequestError, match="2048"),
    ):
        client.messages.create(model="skald", max_tokens=5, messages=[{"role": "user", "content": long}])
