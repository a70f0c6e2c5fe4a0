"""--isolate-keys: whose prompts share cached blocks, through every way in."""

from __future__ import annotations

import dataclasses
import json
import time

import grpc
import httpx
import openai
import pytest

from kvasir.cluster.auth import PRINCIPAL_HEADER, ApiKeys, load_keys
from kvasir.cluster.config import GatewayConfig
from kvasir.engine.errors import ConfigError
from kvasir.proto import inference_pb2 as pb
from kvasir.proto.inference_pb2_grpc import InferenceStub

CONFIG = GatewayConfig(api_key=("one", "two"), isolate_keys=True, failover_timeout_s=0)
BODY = {"model": "bytes", "prompt": "Hi"}


def test_each_key_shares_blocks_with_itself_alone(live_gateway):
    with live_gateway(CONFIG) as gateway:

        def salt(headers, **fields):
            reply = httpx.post(gateway.url + "/v1/completions", json=BODY | fields, headers=headers)
            assert reply.status_code == 200, reply.text
            return gateway.group.requests[-1].cache_salt

        first, second = ({"Authorization": f"Bearer {key}"} for key in ("one", "two"))
        mine = salt(first)
        assert mine == salt({"x-api-key": "one"})
        assert mine == salt(first | {PRINCIPAL_HEADER: "somebody else's"})
        assert "one" not in mine
        others = {salt(second), salt(first, cache_salt="a"), salt(second, cache_salt="a"), salt(first, cache_salt="b")}
        assert len(others | {mine}) == 5

        with grpc.insecure_channel(gateway.grpc_address) as channel:
            ask = pb.GenerateRequest(model="bytes", text="Hi")
            list(InferenceStub(channel).Generate(ask, metadata=[("authorization", "Bearer one")]))
        assert gateway.group.requests[-1].cache_salt == mine

        gateway.group.info = dataclasses.replace(gateway.group.info, tasks=("embed",))
        reply = httpx.post(gateway.url + "/v1/embeddings", json={"model": "bytes", "input": "Hi"}, headers=first)
        assert (reply.status_code, gateway.group.requests[-1].cache_salt) == (200, mine)


@pytest.mark.parametrize(
    ("path", "body", "field"),
    [
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "Hi"}]}, "cache_salt"),
        ("/v1/responses", {"input": "Hi"}, "cache_salt"),
        ("/v1/embeddings", {"input": "Hi"}, "cache_salt"),
        ("/v1/messages", {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2}, "cache_salt"),
        ("/api/chat", {"messages": [{"role": "user", "content": "Hi"}]}, "options.cache_salt"),
        ("/api/generate", {"prompt": "Hi"}, "options.cache_salt"),
        ("/api/embed", {"input": "Hi"}, "options.cache_salt"),
        ("/api/embeddings", {"prompt": "Hi"}, "options.cache_salt"),
    ],
)
def test_a_salt_counts_in_every_dialect(path, body, field, live_gateway):
    outer, _, inner = field.partition(".")
    with live_gateway(GatewayConfig(failover_timeout_s=0)) as gateway:
        if "embed" in path:
            gateway.group.info = dataclasses.replace(gateway.group.info, tasks=("embed",))

        def ask(salt):
            given = {outer: {inner: salt} if inner else salt}
            return httpx.post(gateway.url + path, json={"model": "bytes", "stream": False} | body | given)

        reply = ask("mine")
        assert reply.status_code == 200, reply.text
        assert "cache_salt" not in reply.headers.get("warning", "")
        assert gateway.group.requests[-1].cache_salt == "mine"
        assert ask(7).status_code == 400
        if inner:
            reply = httpx.post(gateway.url + path, json={"model": "bytes", "cache_salt": "mine"} | body)
            assert (reply.status_code, field in reply.text) == (400, True), reply.text


def test_so_do_batches_and_what_runs_in_the_background(live_gateway, monkeypatch):
    monkeypatch.setattr("kvasir.cluster.batch_run.LOOK_S", 0.02)
    with live_gateway(CONFIG) as gateway, openai.OpenAI(base_url=gateway.url + "/v1", api_key="two") as client:
        client.completions.create(**BODY)
        mine = gateway.group.requests[-1].cache_salt
        told = client.responses.create(model="bytes", input="Hi", background=True)
        while (told := client.responses.retrieve(told.id)).status not in ("completed", "failed"):
            time.sleep(0.02)
        line = {"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": BODY}
        file = client.files.create(file=("in.jsonl", json.dumps(line).encode()), purpose="batch")
        batch = client.batches.create(input_file_id=file.id, endpoint="/v1/completions", completion_window="24h")
        while (batch := client.batches.retrieve(batch.id)).status not in ("completed", "failed"):
            time.sleep(0.02)
        assert (told.status, batch.status, batch.request_counts.completed) == ("completed", "completed", 1)
        assert [request.cache_salt for request in gateway.group.requests] == [mine] * 3


def test_without_it_all_share(live_gateway):
    with live_gateway(GatewayConfig(api_key=("one", "two"), failover_timeout_s=0)) as gateway:
        for key in ("one", "two"):
            httpx.post(gateway.url + "/v1/completions", json=BODY, headers={"Authorization": f"Bearer {key}"})
        assert [request.cache_salt for request in gateway.group.requests] == ["", ""]


def test_each_key_has_sessions_of_its_own(live_gateway):
    """Two that call theirs the same aren't drawn to one group; and what routers remember of a long name is short."""
    with live_gateway(CONFIG) as gateway:

        def session(key, headers=(), **fields):
            sent = {"Authorization": f"Bearer {key}"} | dict(headers)
            reply = httpx.post(gateway.url + "/v1/completions", json=BODY | fields, headers=sent)
            assert reply.status_code == 200, reply.text
            return gateway.desk.directory.sessions[-1]

        assert session("one") == ""
        mine = session("one", {"kvasir-session": "1"})
        assert session("one", {"X-Session-ID": "1"}) == session("one", prompt_cache_key="1") == mine
        theirs, long = session("two", {"kvasir-session": "1"}), session("one", prompt_cache_key="x" * 2**20)
        assert len({mine, theirs, long}) == 3
        assert max(map(len, (mine, theirs, long))) < 100


@pytest.mark.parametrize("field", ["prompt_cache_key", "session_id", "cache_salt"])
def test_names_are_any_text(gateway, field):
    """Lone surrogates, too, which JSON can tell and UTF-8 can't."""
    sent = b'{"model": "bytes", "prompt": "Hi", "%s": "\\ud800"}' % field.encode()
    reply = httpx.post(gateway.url + "/v1/completions", content=sent, headers={"content-type": "application/json"})
    assert reply.status_code in (200, 400), reply.text


def test_needs_keys():
    with pytest.raises(ConfigError, match="--isolate-keys needs API keys"):
        load_keys(GatewayConfig(isolate_keys=True), {})
    assert ApiKeys(()).principal({PRINCIPAL_HEADER: "x"}) == "x"
