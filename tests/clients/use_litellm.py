"""litellm against a server: python use_litellm.py URL KEY. Prints which other hosts it tried to reach."""

from __future__ import annotations

import faulthandler
import gc
import json
import socket
import sys

faulthandler.dump_traceback_later(150, exit=True)  # before its caller loses patience: which call hangs is told
# litellm leaves a stream of Ollama's after its last line, unread to its end and in a cycle. The collector, when it comes by
# while httpcore holds its pool's lock (to ask for /api/show), closes that stream, which takes the same lock: for ever.
gc.disable()
URL, KEY = sys.argv[1:]
tried: list[str] = []
connect, resolve = socket.socket.connect, socket.getaddrinfo


def only_here(self, address):
    if self.family in (socket.AF_INET, socket.AF_INET6) and address[0] not in ("127.0.0.1", "localhost", "::1"):
        tried.append(str(address[0]))
        raise OSError(f"{address} is out of bounds")
    return connect(self, address)


def resolve_only_here(host, *rest, **more):
    if host not in ("127.0.0.1", "localhost", "::1", None):
        tried.append(str(host))
        raise OSError(f"{host} is out of bounds")
    return resolve(host, *rest, **more)


socket.socket.connect, socket.getaddrinfo = only_here, resolve_only_here

import litellm  # noqa: E402
import pytest  # noqa: E402

litellm.telemetry = False
SUM = [{"role": "user", "content": "What is 47 + 38?"}]
WEATHER = [{"role": "user", "content": "What is the weather in Bergen?"}]
CITY = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
TOOL = {
    "type": "function",
    "function": {"name": "get_weather", "description": "Get the weather of a city.", "parameters": CITY},
}
SCHEMA = {
    "type": "object",
    "properties": {"age": {"type": "integer"}},
    "required": ["age"],
    "additionalProperties": False,
}
WAYS = {
    "openai/skald": {"api_base": URL + "/v1", "api_key": KEY},
    "hosted_vllm/skald": {"api_base": URL + "/v1", "api_key": KEY},
    "anthropic/skald": {"api_base": URL, "api_key": KEY, "max_tokens": 60},
    "ollama_chat/skald": {"api_base": URL, "api_key": KEY},
}

for model, way in WAYS.items():
    ask = {"model": model, "num_retries": 0, "temperature": 0, "timeout": 60, **way}
    whole = litellm.completion(messages=SUM, **ask)
    assert "85" in whole.choices[0].message.content, (model, whole)
    chunks = litellm.completion(messages=SUM, stream=True, **ask)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert text == whole.choices[0].message.content, (model, text)
    called = litellm.completion(messages=WEATHER, tools=[TOOL], **ask).choices[0].message.tool_calls
    assert [json.loads(one.function.arguments) for one in called] == [{"city": "Bergen"}], (model, called)
    if not model.startswith("anthropic"):
        form = {"type": "json_schema", "json_schema": {"name": "age", "schema": SCHEMA, "strict": True}}
        said = litellm.completion(messages=SUM, response_format=form, **ask).choices[0].message.content
        assert set(json.loads(said)) == {"age"}, (model, said)
    # litellm gives every error of Ollama's this class
    wrong, stranger = litellm.BadRequestError, litellm.AuthenticationError
    if model.startswith("ollama"):
        wrong = stranger = litellm.APIConnectionError
    with pytest.raises(wrong, match="top_p"):
        litellm.completion(messages=SUM, top_p=7, **ask)
    with pytest.raises(stranger, match="Incorrect API key provided"):
        litellm.completion(messages=SUM, **{**ask, "api_key": "wrong"})

vectors = litellm.embedding(
    "openai/skald", input=["a ship"], api_base=URL + "/v1", api_key=KEY, encoding_format="float"
)
assert len(vectors.data[0]["embedding"]) > 10
print(json.dumps({"tried": tried}), flush=True)
