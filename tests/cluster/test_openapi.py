"""The OpenAPI document: it holds every route, what it says of bodies is what the code checks, and of answers what they are."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator
from typing import Any

import httpx
import jsonschema
import pytest

from kvasir.cluster.config import GatewayConfig
from kvasir.cluster.gateway import create_app
from kvasir.cluster.openapi import METHODS, OPERATIONS, document
from kvasir.cluster.openapi_answers import ANSWERS
from kvasir.cluster.openapi_bodies import BODIES, SAMPLING
from kvasir.engine.errors import ClientError
from kvasir.engine.request import SamplingParams

MESSAGES = [{"role": "user", "content": "Hi"}]


def route_table(gateway) -> Iterator[tuple[str, str]]:
    for route in create_app(gateway.desk, GatewayConfig(state_path=":memory:")).routes:
        for method in route.methods:
            if method != "HEAD" or route.methods == {"HEAD"}:
                yield route.path.replace(":path", ""), method.lower()


def test_every_route_is_described_and_no_other(gateway):
    assert sorted(route_table(gateway)) == sorted(OPERATIONS)
    assert {method for _, method in OPERATIONS} <= set(METHODS)


def test_tags_say_whose_a_route_is():
    found = document()
    tags = {path: one["tags"] for path, item in found["paths"].items() for one in item.values() if "tags" in one}
    assert {tag for (tag,) in tags.values()} == {one["name"] for one in found["tags"]}
    for path, tag in {"/v1/groups": "Server", "/v1/streams/{id}": "Server", "/rerank": "Ranking", "/tokenize": "Tokens",
                      "/v1/messages": "Anthropic", "/api/chat": "Ollama", "/v1/decisions": "OpenAI"}.items():  # fmt: skip
        assert tags[path] == [tag], path


def refs(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        if "$ref" in value:
            yield value["$ref"]
        for one in value.values():
            yield from refs(one)
    elif isinstance(value, list):
        for one in value:
            yield from refs(one)


def test_the_document_is_whole():
    found = document()
    schemas = found["components"]["schemas"]
    assert {name.removeprefix("#/components/schemas/") for name in refs(found)} <= set(schemas)
    used = {name.removeprefix("#/components/schemas/") for name in refs(found)}
    assert set(schemas) <= used, "a schema that nothing uses"
    for schema in schemas.values():
        jsonschema.Draft202012Validator.check_schema(schema)
    assert not set(BODIES) & set(ANSWERS)


def test_it_is_served(live_gateway):
    with live_gateway(GatewayConfig(api_key=("secret",))) as gateway:
        assert httpx.get(gateway.url + "/openapi.json").json() == document()
        page = httpx.get(gateway.url + "/docs")
        assert page.headers["content-type"].startswith("text/html")
        assert "http" not in page.text, "it loads nothing from elsewhere"
    with live_gateway(GatewayConfig(enable_docs=False)) as gateway:
        for path in ("/docs", "/openapi.json"):
            assert httpx.get(gateway.url + path).status_code == 404


@pytest.mark.parametrize("name", SAMPLING)
def test_ranges_are_those_that_are_checked(name):
    """At each end of a range a value is taken, and beyond it refused."""
    schema = SAMPLING[name]
    if "enum" in schema:
        inside, outside = schema["enum"], ["other", 3]
    else:
        step: float = 1 if schema["type"] == "integer" else 0.125
        low, high = schema.get("minimum", schema.get("exclusiveMinimum")), schema.get("maximum")
        inside = [high] if high is not None else [10**9]
        outside = ["text", True] if high is None else ["text", True, high + step]
        if low is not None:
            inside.append(low + (step if "exclusiveMinimum" in schema else 0))
            outside += [low - step] + ([low] if "exclusiveMinimum" in schema else [])
    inside = [one for one in inside if not (name == "truncate_prompt_tokens" and one == 0)]
    for value in inside:
        SamplingParams(**{name: value, "max_tokens": None})
    for value in outside:
        if name == "early_stopping" and value is True:
            continue
        with pytest.raises(ClientError):
            SamplingParams(**{name: value, "max_tokens": None})
    assert all(isinstance(one, (str, bool)) or math.isfinite(one) for one in inside)


CALLS: list[tuple[str, str, Any]] = [
    ("post", "/v1/chat/completions", {"messages": MESSAGES}),
    ("post", "/v1/chat/completions", {"messages": MESSAGES, "n": 2, "logprobs": True, "return_token_ids": True}),
    ("post", "/v1/chat/completions", {"messages": MESSAGES, "return_timing": True}),
    ("post", "/v1/chat/completions", {"messages": MESSAGES, "stream": True, "stream_options": {"include_usage": True}}),
    ("post", "/v1/completions", {"prompt": "Hi", "logprobs": 2, "echo": True, "prompt_logprobs": 1}),
    ("post", "/v1/completions", {"prompt": ["Hi", "Ho"], "stream": True}),
    ("post", "/v1/responses", {"input": "Hi"}),
    ("post", "/v1/responses", {"input": "Hi", "stream": True}),
    ("post", "/v1/responses", {"input": "Hi", "return_timing": True}),
    ("post", "/v1/messages", {"messages": MESSAGES, "max_tokens": 5, "return_timing": True}),
    ("post", "/api/chat", {"messages": MESSAGES, "return_timing": True}),
    ("post", "/v1/responses/input_tokens", {"input": "Hi"}),
    ("post", "/v1/messages", {"messages": MESSAGES, "max_tokens": 5}),
    ("post", "/v1/messages", {"messages": MESSAGES, "max_tokens": 5, "stream": True}),
    ("post", "/v1/messages/count_tokens", {"messages": MESSAGES}),
    ("post", "/v1/embeddings", {"input": ["Hi", "Ho"]}),
    ("post", "/v1/embeddings", {"input": "Hi", "encoding_format": "base64"}),
    ("post", "/v1/rerank", {"query": "Hi", "documents": ["a", "b"]}),
    ("post", "/v1/score", {"text_1": "Hi", "text_2": "Ho"}),
    ("post", "/v1/classify", {"input": "Hi"}),
    ("post", "/tokenize", {"messages": MESSAGES, "return_token_strs": True}),
    ("post", "/detokenize", {"tokens": [65, 66]}),
    ("post", "/v1/conversations", {"metadata": {"a": "b"}}),
    ("post", "/api/generate", {"prompt": "Hi", "stream": False}),
    ("post", "/api/generate", {"prompt": "Hi"}),
    ("post", "/api/generate", {}),
    ("post", "/api/chat", {"messages": MESSAGES, "logprobs": True}),
    ("post", "/api/embed", {"input": "Hi"}),
    ("post", "/api/embeddings", {"prompt": "Hi"}),
    ("post", "/api/show", {"model": "bytes"}),
    *(("get", path, None) for path in ("/v1/models", "/v1/models/bytes", "/v1/chat/completions", "/v1/files", "/v1/batches")),
    *(("get", path, None) for path in ("/api/tags", "/api/ps", "/api/version", "/version")),
    *(("get", path, None) for path in ("/health", "/health/ready", "/-/healthz")),
]  # fmt: skip


@pytest.mark.parametrize("call", CALLS, ids=lambda call: f"{call[1]} {json.dumps(call[2])}")
def test_answers_are_as_described(gateway, judge, call):
    """Of every kind of answer at least one, with what may be asked for beside."""
    method, path, body = call
    info = gateway.group.info
    gateway.group.info = dataclasses.replace(info, tasks=("generate", "embed", "classify", "score"), labels=("a", "b"))
    answer = httpx.request(method, gateway.url + path, json=body, timeout=60)
    assert answer.status_code == 200, answer.text
    judge(path, method, answer)
