"""Every field and path of OpenAI's and System One's surface that Kvasir must know, sent to a server: done, refused by name, or
named in a warning."""

from __future__ import annotations

import json

import httpx
import pytest

from kvasir.engine.event import Failed

USER = [{"role": "user", "content": "Hi"}]
CHAT = {"model": "bytes", "messages": USER}
RESPONSE = {"model": "bytes", "input": "Hi"}
DECISION = {"model": "bytes", "input": "Hi", "questions": [{"type": "predicate", "instructions": "A greeting?"}]}
SYSTEM_ONE = {"model": "bytes", "state": "Hi", "questions": {"q": {"type": "noul", "instructions": "A greeting."}}}
BODIES = {
    "/v1/chat/completions": CHAT,
    "/v1/responses": RESPONSE,
    "/v1/decisions": DECISION,
    "/v1/systemone": SYSTEM_ONE,
}
TOOL = {"type": "function", "function": {"name": "f"}}
TABLES = {
    "/v1/chat/completions": """
D messages [{"role":"user","content":"Ho"}]
D model "bytes"
R audio {"voice":"alloy","format":"wav"}
D frequency_penalty 0.5
R function_call {"name":"f"}
R functions [{"name":"f"}]
D logit_bias {"5":1}
D logprobs true
D max_completion_tokens 5
D max_tokens 5
D metadata {"a":"b"}
R modalities ["text","audio"]
R moderation {"model":"m"}
D n 2
D parallel_tool_calls false
W prediction {"type":"content","content":"Hi"}
D presence_penalty 0.5
D prompt_cache_key "k"
W prompt_cache_options {"mode":"explicit","ttl":"30m"}
W prompt_cache_retention "24h"
W reasoning_effort "low"
D response_format {"type":"json_object"}
W safety_identifier "me"
D seed 5
D service_tier "flex"
D stop ["x"]
D store true
D stream true
D stream_options {"include_usage":true}
D temperature 0.5
D tool_choice "auto"
D tools [{"type":"function","function":{"name":"f"}}]
D top_logprobs 2
D top_p 0.5
W user "me"
R verbosity "low"
R web_search_options {"search_context_size":"low"}
W nonsense 1
R guided_nonsense 1
""",
    "/v1/responses": """
D input "Ho"
D model "bytes"
D instructions "Be brief."
D background true
R context_management [{"type":"compaction","compact_threshold":1000}]
D include ["reasoning.encrypted_content"]
D max_output_tokens 5
D max_tool_calls 3
D metadata {"a":"b"}
R moderation {"model":"m"}
D parallel_tool_calls false
R prompt {"id":"pmpt_1"}
D prompt_cache_key "k"
W prompt_cache_options {"mode":"explicit","ttl":"30m"}
W prompt_cache_retention "24h"
W prewarm true
W reasoning {"effort":"low"}
D safety_identifier "me"
D service_tier "flex"
D store false
D stream true
W stream_options {"include_obfuscation":true}
D temperature 0.5
D text {"format":{"type":"json_object"}}
D tool_choice "auto"
D tools [{"type":"function","name":"f"}]
R tools [{"type":"web_search"}]
D top_logprobs 2
D top_p 0.5
D truncation "auto"
D user "me"
W nonsense 1
""",
    "/v1/decisions": """
D model "bytes"
D input [{"role":"user","content":"Ho"}]
D questions [{"type":"choice","name":"n","instructions":"Who?","choices":[{"value":"Ann"},{"value":true}]}]
D prompt_cache_key "k"
W prompt_cache_options {"mode":"explicit"}
W safety_identifier "me"
R stream true
R temperature 0.5
W nonsense 1
""",
    "/v1/systemone": """
D model "bytes"
D state {"said":["Hi"]}
D questions {"q":{"type":"score","instructions":"How warm?","criteria":["cold","warm"]}}
R images ["aGk="]
R audio ["aGk="]
R videos ["aGk="]
W keep_alive "5m"
D instructions "Be fair."
D chat_template_kwargs {"a":1}
D cache_salt "s"
D priority 3
W nonsense 1
""",
}
"""Path -> D, done, R, refused by name, or W, named in a warning; the field; a value."""
BESIDE = {
    "parallel_tool_calls": {"tools": [TOOL]},
    "tool_choice": {"tools": [TOOL]},
    "stream_options": {"stream": True},
    "top_logprobs": {"logprobs": True},
    "metadata": {"store": True},
}
BESIDE_OF = {
    "/v1/responses": {
        **{key: {"tools": [{"type": "function", "name": "f"}]} for key in ("parallel_tool_calls", "tool_choice")},
        "stream_options": {"stream": True},
        "top_logprobs": {"include": ["message.output_text.logprobs"]},
    }
}
"""What a field means nothing without."""


def rows():
    for path, table in TABLES.items():
        for line in table.strip().split("\n"):
            fate, name, value = line.split(" ", 2)
            yield pytest.param(path, name, json.loads(value), fate, id=f"{path}-{name}-{fate}")


@pytest.mark.parametrize(("path", "name", "value", "fate"), [*rows()])
def test_what_becomes_of(gateway, path, name, value, fate):
    beside = BESIDE_OF.get(path, BESIDE).get(name, {}) if fate != "R" else {}
    reply = httpx.post(gateway.url + path, json={**BODIES[path], **beside, name: value}, timeout=60)
    warned = reply.headers.get("x-kvasir-warning", "")
    if fate == "R":
        error = reply.json()["error"]
        assert (reply.status_code, error["param"]) == (400, name)
        assert name in error["message"]
        return
    assert reply.status_code == 200, reply.text
    assert (name in warned) == (fate == "W"), warned


PATHS = """
POST /v1/responses {"model":"bytes","input":"Hi","conversation":"CONVERSATION"}
GET /v1/responses/RESPONSE
GET /v1/responses/RESPONSE/input_items
POST /v1/responses {"model":"bytes","input":"Hi","previous_response_id":"RESPONSE"}
POST /v1/responses/LATER/cancel
POST /v1/responses/input_tokens {"model":"bytes","input":"Hi"}
POST /v1/responses/compact {"model":"bytes","input":[{"role":"user","content":"Hi"}]}
DELETE /v1/responses/RESPONSE
POST /v1/conversations {"metadata":{"a":"b"}}
GET /v1/conversations/CONVERSATION
POST /v1/conversations/CONVERSATION {"metadata":{"a":"c"}}
POST /v1/conversations/CONVERSATION/items {"items":[{"type":"message","role":"user","content":"Hi"}]}
GET /v1/conversations/CONVERSATION/items
GET /v1/conversations/CONVERSATION/items/ITEM
DELETE /v1/conversations/CONVERSATION/items/ITEM
DELETE /v1/conversations/CONVERSATION
POST /v1/chat/completions {"model":"bytes","messages":[{"role":"user","content":"Hi"}],"store":true}
GET /v1/chat/completions
GET /v1/chat/completions/CHAT
GET /v1/chat/completions/CHAT/messages
POST /v1/chat/completions/CHAT {"metadata":{"a":"c"}}
DELETE /v1/chat/completions/CHAT
GET /v1/models
GET /v1/models/bytes
GET /v1/files
GET /v1/batches
"""


def test_every_path_is_there(gateway):
    with httpx.Client(base_url=gateway.url, timeout=60) as client:
        ids = {
            "RESPONSE": client.post("/v1/responses", json=RESPONSE).json()["id"],
            "LATER": client.post("/v1/responses", json={**RESPONSE, "background": True}).json()["id"],
            "CONVERSATION": client.post("/v1/conversations", json={}).json()["id"],
            "CHAT": client.post("/v1/chat/completions", json={**CHAT, "store": True}).json()["id"],
        }
        items = {"items": [{"type": "message", "role": "user", "content": "Hi"}]}
        added = client.post(f"/v1/conversations/{ids['CONVERSATION']}/items", json=items)
        ids["ITEM"] = added.json()["data"][0]["id"]
        for line in PATHS.strip().split("\n"):
            for name, found in ids.items():
                line = line.replace(name, found)
            method, path, *body = line.split(" ", 2)
            reply = client.request(method, path, json=json.loads(body[0]) if body else None)
            assert reply.status_code == 200, (line, reply.text)


SCHEMA = {"type": "object"}
NAMED = [
    ("/v1/chat/completions", {**CHAT, "guided_json": SCHEMA, "response_format": {"type": "text"}}, "guided_json"),
    ("/v1/chat/completions", {**CHAT, "response_format": {"type": "json_object"}}, "response_format"),
    ("/v1/chat/completions", {**CHAT, "tools": [TOOL], "tool_choice": "required"}, "tools"),
    ("/v1/completions", {"model": "bytes", "prompt": "Hi", "extra_body": {"guided_regex": "a"}}, "guided_regex"),
    ("/v1/responses", {**RESPONSE, "text": {"format": {"type": "json_object"}}}, "text"),
]


@pytest.mark.parametrize(("path", "body", "name"), NAMED)
def test_a_group_that_refuses_names_the_field_as_its_sender_did(gateway, monkeypatch, path, body, name):
    """A grammar is compiled there: what is wrong with it comes back as an event."""

    def refuse(request, *_):
        return Failed(request.request_id, "unsupported_parameter", "not in a grammar", param="structured_outputs")

    monkeypatch.setattr(gateway.group, "_token", refuse)
    reply = httpx.post(gateway.url + path, json=body, timeout=60)
    error = reply.json()["error"]
    assert (reply.status_code, error["param"], error["code"]) == (400, name, "unsupported_parameter")
