"""Chats with `store`, and the tiers that requests may ask for, by OpenAI's own client."""

from __future__ import annotations

import httpx
import openai
import pytest

from kvasir.cluster.config import GatewayConfig

TEXT = "Hello, wörld!"
MESSAGES = [{"role": "system", "content": "Be."}, {"role": "user", "content": "Hi"}]
CHAT = {"model": "bytes", "messages": MESSAGES}


@pytest.fixture
def client(live_gateway):
    config = GatewayConfig(state_path=":memory:")
    with live_gateway(config) as gateway, openai.OpenAI(base_url=gateway.url + "/v1", api_key="any") as client:
        yield client


def test_stored_and_fetched(client):
    kept = client.chat.completions.create(**CHAT, store=True, metadata={"a": "1"})
    client.chat.completions.create(**CHAT)
    found = client.chat.completions.retrieve(kept.id)
    assert found.choices[0].message.content == TEXT
    assert found.metadata == {"a": "1"}
    messages = client.chat.completions.messages.list(kept.id).data
    assert [(one.role, one.content) for one in messages] == [("system", "Be."), ("user", "Hi")]
    assert client.chat.completions.messages.list(kept.id, after=messages[0].id).data == messages[1:]
    assert client.chat.completions.update(kept.id, metadata={"b": "2"}).metadata == {"b": "2"}
    assert client.chat.completions.delete(kept.id).deleted
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.retrieve(kept.id)


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "metadata"),
        ({"metadata": None}, "metadata"),
        ({"metadata": [1]}, "metadata"),
        ({"metadata": {}, "model": "other"}, "model"),
    ],
)
def test_metadata_is_all_that_can_be_changed(client, body, param):
    kept = client.chat.completions.retrieve(client.chat.completions.create(**CHAT, store=True).id)
    reply = httpx.post(f"{client.base_url}chat/completions/{kept.id}", json=body)
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, param)
    assert client.chat.completions.retrieve(kept.id) == kept


def test_messages_are_told_as_they_were_sent(client):
    """A template may know them by other names."""
    sent = [
        {"role": "user", "content": "Rain?"},
        {"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": "{}"}},
        {"role": "function", "name": "f", "content": "rain"},
    ]
    kept = client.chat.completions.create(model="bytes", messages=sent, store=True)
    told = client.chat.completions.messages.list(kept.id).to_dict()["data"]
    assert [{name: one[name] for name in given} for one, given in zip(told, sent, strict=True)] == sent
    assert not any("tool_calls" in one or "tool_call_id" in one for one in told)


def test_streamed(client):
    chunks = list(client.chat.completions.create(**CHAT, store=True, stream=True))
    assert client.chat.completions.retrieve(chunks[0].id).choices[0].message.content == TEXT


def test_listed(client):
    kept = [client.chat.completions.create(**CHAT, store=True, metadata={"n": str(i % 2)}) for i in range(5)]
    assert [one.id for one in client.chat.completions.list(limit=2)] == [one.id for one in kept]
    newest = client.chat.completions.list(order="desc", limit=2)
    assert [one.id for one in newest.data] == [kept[4].id, kept[3].id]
    odd = client.chat.completions.list(limit=1, metadata={"n": "1"})
    assert [one.id for one in odd] == [kept[1].id, kept[3].id]
    assert client.chat.completions.list(model="other").data == []


@pytest.mark.parametrize("query", ["limit=0", "limit=x", "order=up", "after=none"])
def test_pages_that_there_are_none_of(client, query):
    assert httpx.get(f"{client.base_url}chat/completions?{query}").status_code in (400, 404)


def test_an_id_of_the_client_is_no_key(client):
    """Two answers to requests of one id are two stored chats."""
    headers = {"X-Request-ID": "mine"}
    ids = {client.chat.completions.create(**CHAT, store=True, extra_headers=headers).id for _ in range(2)}
    assert len(ids) == 2


def test_metadata_alone_does_nothing(gateway):
    reply = httpx.post(gateway.url + "/v1/chat/completions", json={**CHAT, "metadata": {"a": "1"}})
    assert reply.headers["x-kvasir-warning"] == "ignored: metadata"


@pytest.mark.parametrize(
    ("fields", "priority", "tier"),
    [({}, 0, None), ({"service_tier": "flex"}, 100, "flex"), ({"service_tier": "fast", "priority": 7}, -93, "priority"),
     ({"service_tier": "auto"}, 0, "default")],
)  # fmt: skip
def test_tiers(gateway, fields, priority, tier):
    for path, more in (("chat/completions", CHAT), ("completions", {"model": "bytes", "prompt": "Hi"})):
        body = httpx.post(f"{gateway.url}/v1/{path}", json={**more, **fields}).json()
        assert gateway.group.requests[-1].priority == priority
        assert body.get("service_tier") == tier
    assert httpx.post(gateway.url + "/v1/completions", json={**more, "service_tier": "gold"}).status_code == 400
