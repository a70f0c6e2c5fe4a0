"""What every HTTP route shares: bodies, errors, clients that go away or read slowly."""

from __future__ import annotations

import http.client
import json

import httpx
import openai
import pytest
from waiting import until

from kvasir.cluster.config import GatewayConfig

BODY = {"model": "bytes", "prompt": "Hi"}
MESSAGES = [{"role": "user", "content": "Hi"}]


def complete(gateway, **fields):
    return httpx.post(gateway.url + "/v1/completions", json=BODY | fields, timeout=60)


def chat(gateway, **fields):
    body = {"model": "bytes", "messages": MESSAGES} | fields
    return httpx.post(gateway.url + "/v1/chat/completions", json=body, timeout=60)


def frames(reply):
    """The JSON of each SSE frame but [DONE]."""
    return [json.loads(line[6:]) for line in reply.text.split("\n\n") if line.startswith("data: {")]


@pytest.mark.parametrize(
    ("content", "kind", "status", "text"),
    [
        (b"{", "application/json", 400, "isn't valid JSON"),
        (b'{"a": "\xff"}', "application/json", 400, "isn't valid JSON"),
        (b"[1]", "application/json; charset=utf-8", 400, "must be a JSON object, got a list"),
        (b"", "application/json", 400, "isn't valid JSON"),
        (b"[" * 5000, "application/json", 400, "isn't valid JSON"),
        (json.dumps(BODY).encode(), "text/plain", 415, "Content-Type: application/json, got text/plain"),
        (json.dumps(BODY).encode(), None, 415, "got none"),
    ],
)
def test_malformed_bodies(gateway, content, kind, status, text):
    headers = {"Content-Type": kind} if kind else {}
    reply = httpx.post(gateway.url + "/v1/completions", content=content, headers=headers)
    assert reply.status_code == status
    assert reply.json()["error"]["type"] == "invalid_request_error"
    assert text in reply.json()["error"]["message"]


def test_unknown_routes_and_methods(gateway):
    reply = httpx.get(gateway.url + "/v1/nothing")
    assert reply.status_code == 404
    assert reply.json()["error"]["code"] == "unknown_url"
    reply = httpx.get(gateway.url + "/v1/completions")
    assert reply.status_code == 405
    assert reply.headers["allow"] == "POST"
    assert "doesn't answer GET" in reply.json()["error"]["message"]
    assert httpx.get(gateway.url + "/v1/models/other/one").json()["error"]["code"] == "model_not_found"


def test_large_bodies(live_gateway):
    with live_gateway(GatewayConfig(max_body_bytes=10_000)) as gateway:
        reply = complete(gateway, prompt="a" * 20_000)
        assert reply.status_code == 413
        assert "10000 bytes (--max-body-bytes)" in reply.json()["error"]["message"]
        assert complete(gateway, prompt="a" * 3_000).status_code == 200
        head = {"Content-Type": "application/json"}
        chunks = (b"x" * 1000 for _ in range(30))
        assert httpx.post(gateway.url + "/v1/completions", content=chunks, headers=head).status_code == 413


def test_body_that_never_ends_is_not_read(live_gateway):
    """The answer comes although the client goes on sending; nothing of the rest is kept."""
    with live_gateway(GatewayConfig(max_body_bytes=1000)) as gateway:
        connection = http.client.HTTPConnection(gateway.url.removeprefix("http://"), timeout=60)
        connection.putrequest("POST", "/v1/completions")
        connection.putheader("Content-Type", "application/json")
        connection.putheader("Transfer-Encoding", "chunked")
        connection.endheaders()
        for _ in range(3):
            connection.send(b"3e8\r\n" + b"x" * 1000 + b"\r\n")
        assert connection.getresponse().status == 413
        connection.close()


def test_client_that_leaves_a_stream_frees_its_blocks(live_gateway):
    with live_gateway() as gateway:
        gateway.group.step_s = 0.05  # longer than anybody waits for an end
        gateway.group.script = lambda request, index: [65] * 2000
        body = {"model": "bytes", "prompt": "a", "stream": True, "n": 3, "max_tokens": 2000}
        with httpx.stream("POST", gateway.url + "/v1/completions", json=body) as reply:
            lines = reply.iter_lines()  # held: it closes the connection when it is collected
            next(lines)
            assert gateway.group.running == 1
        until(lambda: not gateway.group.running)
        until(lambda: not gateway.desk.running)


@pytest.mark.parametrize("prompt", ["a", ["a", "b"]])
def test_client_that_leaves_while_it_waits_frees_its_blocks(live_gateway, prompt):
    with live_gateway() as gateway:
        gateway.group.step_s = 0.05
        gateway.group.script = lambda request, index: [65] * 2000
        body = {"model": "bytes", "prompt": prompt, "max_tokens": 2000}
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(gateway.url + "/v1/completions", json=body, timeout=httpx.Timeout(60, read=0.2))
        until(lambda: not gateway.group.running)
        until(lambda: not gateway.desk.running)


def test_failure_before_the_first_token_has_a_status(live_gateway):
    with live_gateway() as gateway:
        gateway.group.dies_after = 0
        reply = chat(gateway, stream=True)
        assert reply.status_code == 503
        assert reply.json()["error"] == {
            "message": "the group died", "type": "server_error", "param": None, "code": "unavailable",
        }  # fmt: skip


def test_failure_in_a_stream_is_an_event(live_gateway):
    with live_gateway() as gateway:
        gateway.group.dies_after = 3
        reply = chat(gateway, stream=True)
        assert reply.status_code == 200
        assert frames(reply)[-1]["error"]["message"] == "the group died"
        with (
            openai.OpenAI(base_url=gateway.url + "/v1", api_key="any", max_retries=0) as client,
            pytest.raises(openai.APIError, match="the group died"),
        ):
            list(client.chat.completions.create(model="bytes", messages=MESSAGES, stream=True))
        assert chat(gateway).status_code == 503


def test_slow_client_is_cut_off(live_gateway):
    with live_gateway(GatewayConfig(max_stream_buffer=50)) as gateway:
        gateway.group.script = lambda request, index: [65] * 4000
        gateway.group.info = gateway.group.info.__class__(name="bytes", max_model_len=5000, vocab_size=261)
        body = {"model": "bytes", "prompt": "a", "stream": True, "max_tokens": 4000, "n": 20, "ignore_eos": True}
        with httpx.stream("POST", gateway.url + "/v1/completions", json=body, timeout=60) as reply:
            chunks = reply.iter_raw(1024)
            next(chunks)
            until(lambda: not gateway.group.running, limit_s=20)
            rest = b"".join(chunks)
        assert b"reads too slowly" in rest
