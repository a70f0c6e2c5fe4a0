"""/v1/conversations by OpenAI's own client, and responses in them."""

from __future__ import annotations

import time

import httpx
import openai
import pytest

from kvasir.cluster.config import GatewayConfig

TEXT = "Hello, wörld!"


def prompt_of(gateway):
    return bytes(t for t in gateway.group.requests[-1].prompt_token_ids if t < 256).decode()


def texts(client, conversation):
    return [item.content[0].text for item in client.conversations.items.list(conversation.id, order="asc")]


def test_its_life(client):
    made = client.conversations.create(metadata={"a": "b"}, items=[{"role": "user", "content": "one"}])
    assert client.conversations.retrieve(made.id) == made
    added = client.conversations.items.create(
        made.id, items=[{"role": "assistant", "content": "two"}, {"role": "user", "content": "three"}]
    )
    assert [item.content[0].text for item in added.data] == ["two", "three"]
    assert texts(client, made) == ["one", "two", "three"]
    newest = client.conversations.items.list(made.id, limit=1)
    assert newest.data[0].id == added.last_id
    assert client.conversations.items.retrieve(added.first_id, conversation_id=made.id).role == "assistant"
    client.conversations.items.delete(added.first_id, conversation_id=made.id)
    assert texts(client, made) == ["one", "three"]
    assert client.conversations.update(made.id, metadata={"c": "d"}).metadata == {"c": "d"}
    assert client.conversations.delete(made.id).deleted
    for call in (client.conversations.retrieve, client.conversations.delete, client.conversations.items.list):
        with pytest.raises(openai.NotFoundError):
            call(made.id)


@pytest.mark.parametrize("fields", [{}, {"stream": True}, {"background": True}, {"store": False}])
def test_responses_read_it_and_add_to_it(gateway, client, fields):
    made = client.conversations.create()
    for number, said in enumerate(("one", "two")):
        found = client.responses.create(model="bytes", input=said, conversation=made.id, instructions="Be.", **fields)
        if "stream" in fields:
            assert [*found][-1].response.conversation.id == made.id
        limit = time.monotonic() + 60
        while len(heard := texts(client, made)) < 2 * number + 2:
            assert time.monotonic() < limit
            time.sleep(0.02)
    assert heard == ["one", TEXT, "two", TEXT]
    assert prompt_of(gateway) == f"Be.one{TEXT}two"


def test_what_means_nothing_in_items_is_named(gateway):
    item = {"role": "user", "content": [{"type": "input_text", "text": "x", "strange": 1}], "odd": 1}
    url = f"{gateway.url}/v1/conversations"
    made = httpx.post(url, json={"items": [item]})
    added = httpx.post(f"{url}/{made.json()['id']}/items", json={"items": [item]})
    for reply in (made, added):
        assert (reply.status_code, reply.headers["x-kvasir-warning"]) == (
            200,
            "ignored: items[].odd, items[].content[].strange",
        )


def test_refusals(gateway, client):
    made = client.conversations.create()
    for path, body, param in (
        ("", {"items": [{"role": "robot", "content": "x"}]}, "input"),
        ("", {"metadata": {"a": 1}}, "metadata"),
        ("", {"nonsense": 1}, "nonsense"),
        (f"/{made.id}", {}, "metadata"),
        (f"/{made.id}/items", {}, "items"),
        (f"/{made.id}/items", {"items": []}, "items"),
        (f"/{made.id}/items", {"items": [{"id": "a", "role": "user", "content": "x"}] * 2}, "items"),
    ):
        reply = httpx.post(f"{gateway.url}/v1/conversations{path}", json=body)
        assert (reply.status_code, reply.json()["error"]["param"]) == (400, param)
    with pytest.raises(openai.NotFoundError):
        client.conversations.items.retrieve("msg_none", conversation_id=made.id)


def test_another_key_sees_nothing(live_gateway):
    with live_gateway(GatewayConfig(api_key=("one", "two"), state_path=":memory:")) as gateway:
        mine, theirs = (
            openai.OpenAI(base_url=gateway.url + "/v1", api_key=key, max_retries=0) for key in ("one", "two")
        )
        with mine, theirs:
            made = mine.conversations.create(items=[{"role": "user", "content": "secret"}])
            for call in (
                lambda: theirs.conversations.retrieve(made.id),
                lambda: theirs.conversations.items.list(made.id),
                lambda: theirs.responses.create(model="bytes", input="x", conversation=made.id),
            ):
                with pytest.raises(openai.NotFoundError):
                    call()
