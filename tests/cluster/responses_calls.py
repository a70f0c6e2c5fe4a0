"""Calls of /v1/responses, for several tests."""

from __future__ import annotations

import json

import httpx
import pydantic
from openai.types.responses import ResponseStreamEvent

TEXT = "Hello, wörld!"
EVENT = pydantic.TypeAdapter(ResponseStreamEvent)


def post(gateway, **body):
    return httpx.post(gateway.url + "/v1/responses", json={"model": "bytes", "input": "Hi"} | body, timeout=60)


def events(text):
    """The JSON of each event, whose name is its type and whose numbers follow each other."""
    found = []
    for frame in filter(None, text.split("\n\n")):
        head, data = frame.split("\n")
        value = json.loads(data.removeprefix("data: "))
        assert head == f"event: {value['type']}"
        EVENT.validate_python(value, strict=False)
        found.append(value)
    first = found[0]["sequence_number"]
    assert [one["sequence_number"] for one in found] == list(range(first, first + len(found)))
    return found


def prompt_of(gateway):
    return bytes(t for t in gateway.group.requests[-1].prompt_token_ids if t < 256)
