"""Items that a request names by their ids: of responses and conversations, as long as those are stored."""

from __future__ import annotations

import asyncio
import sqlite3
import time
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from responses_calls import TEXT, events, post, prompt_of
from waiting import until

from kvasir.cluster.config import GatewayConfig
from kvasir.cluster.store import Part, Store, Stored


def reference(item_id: str) -> dict[str, str]:
    return {"type": "item_reference", "id": item_id}


def test_of_a_response(gateway, client):
    first = client.responses.create(model="bytes", input="one")
    asked = client.responses.input_items.list(first.id).data[0].id
    answered = first.output[0].id
    given = [reference(asked), {"type": None, "id": answered, "status": None}]
    second = client.responses.create(model="bytes", input=[*given, {"role": "user", "content": "two"}])
    assert prompt_of(gateway) == b"one" + TEXT.encode() + b"two"
    assert "two items" in post(gateway, input=[reference(asked), {"id": asked}]).json()["error"]["message"]
    client.responses.delete(first.id)
    assert post(gateway, input=[reference(answered)]).status_code == 200  # the second response holds it, too
    client.responses.delete(second.id)
    newest = post(gateway, input=given).json()["error"]
    assert newest == {
        "message": f"input[0]: Item with id '{asked}' not found: "
        "nothing with it was stored, or that was deleted or has expired",
        "type": "invalid_request_error", "param": "input", "code": "not_found",
    }  # fmt: skip


@pytest.mark.parametrize("fields", [{"stream": True}, {"background": True}, {"background": True, "stream": True}])
def test_however_the_response_was_made(gateway, fields):
    reply = post(gateway, **fields)
    made = events(reply.text)[-1]["response"] if "stream" in fields else reply.json()
    place = f"{gateway.url}/v1/responses/{made['id']}"
    until(lambda: httpx.get(place).json()["status"] == "completed")
    answered = httpx.get(place).json()["output"][0]["id"]
    assert post(gateway, input=[reference(answered)]).status_code == 200
    assert prompt_of(gateway) == TEXT.encode()


def test_of_a_conversation(gateway, client):
    one = client.conversations.create(items=[{"role": "user", "content": "one"}, {"role": "user", "content": "two"}])
    two, first = (item.id for item in client.conversations.items.list(one.id).data)
    other = client.conversations.create(items=[reference(first)])
    client.conversations.items.create(other.id, items=[reference(two), {"role": "user", "content": "three"}])
    client.responses.create(model="bytes", conversation=other.id, input=[reference(two)])
    assert prompt_of(gateway) == b"onetwothreetwo"
    client.conversations.items.delete(first, conversation_id=one.id)
    assert post(gateway, input=[reference(first)], store=False).status_code == 200
    client.conversations.delete(other.id)
    client.conversations.items.delete(two, conversation_id=one.id)
    for place in ("", f"/{one.id}/items"):
        answer = httpx.post(f"{gateway.url}/v1/conversations{place}", json={"items": [reference("msg_never")]})
        assert (answer.status_code, answer.json()["error"]["param"]) == (404, "items")
    assert post(gateway, input=[reference(first)]).status_code == 404
    assert post(gateway, input=[reference("msg_never")]).status_code == 404


def test_wherever_items_are_read(gateway, client):
    asked = client.responses.input_items.list(post(gateway, input="abc").json()["id"]).data[0].id
    counted = client.responses.input_tokens.count(model="bytes", input=[reference(asked)])
    assert counted.input_tokens == client.responses.input_tokens.count(model="bytes", input="abc").input_tokens
    assert client.responses.compact(model="bytes", input=[reference(asked)]).output
    assert prompt_of(gateway).startswith(b"abc")
    ask = {"model": "bytes", "input": [reference(asked)], "questions": [{"type": "predicate", "instructions": "?"}]}
    refused = httpx.post(gateway.url + "/v1/decisions", json=ask)
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "input")


def test_what_is_not_stored_cannot_be_named(live_gateway):
    config = GatewayConfig(api_key=("one", "two"), state_path=":memory:", response_ttl_s=1.0)
    with live_gateway(config) as gateway:
        mine, theirs = (
            openai.OpenAI(base_url=gateway.url + "/v1", api_key=key, max_retries=0) for key in ("one", "two")
        )
        with mine, theirs:
            unkept = mine.responses.create(model="bytes", input="x", store=False)
            kept = mine.responses.create(model="bytes", input="secret")
            given = [reference(kept.output[0].id)]
            mine.responses.create(model="bytes", input=given, store=False)
            for client, input_ in ((theirs, given), (mine, [reference(unkept.output[0].id)])):
                with pytest.raises(openai.NotFoundError, match="Item with id"):
                    client.responses.create(model="bytes", input=input_)

            def gone() -> bool:
                try:
                    mine.responses.create(model="bytes", input=given, store=False)
                except openai.NotFoundError:
                    return True
                return False

            until(gone)


def test_a_restart_asks_with_the_items_that_were_found(live_gateway, tmp_path, monkeypatch):
    """What they were named by may be gone by then."""
    monkeypatch.setattr("kvasir.cluster.background.WATCH_S", 0.1)
    config = GatewayConfig(state_path=str(tmp_path / "state.db"))
    with live_gateway(config) as gateway:
        first = post(gateway, input="one").json()
        answered = first["output"][0]["id"]
        gateway.group.step_s = 5
        left = post(gateway, input=[reference(answered)], background=True).json()
        httpx.delete(f"{gateway.url}/v1/responses/{first['id']}")
    with live_gateway(config) as gateway:
        other = post(gateway, input="two", background=True).json()  # from now on it is looked for what others left
        places = [f"{gateway.url}/v1/responses/{one['id']}" for one in (other, left)]
        until(lambda: all(httpx.get(place).json()["status"] == "completed" for place in places))
        prompts = {bytes(t for t in one.prompt_token_ids if t < 256) for one in gateway.group.requests}
        assert prompts == {b"two", TEXT.encode()}


def test_a_file_from_before(tmp_path: Path) -> None:
    """Items that were stored when there was no table of them are found."""
    path = str(tmp_path / "state.db")
    fields: dict[str, Any] = {"principal": "me", "expires": time.time() + 60}
    items = [{"id": "msg_1", "type": "message"}]

    async def put(store: Store) -> None:
        body, private = {"output": [{"id": "msg_2"}]}, {"items": items, "models": ["m"]}
        await store.put(Stored(id="resp_1", kind="response", body=body, private=private, **fields))
        await store.put(Stored(id="conv_1", kind="conversation", body={}, **fields), [Part(0, b'{"id":"msg_3"}')])
        await store.put(Stored(id="file-1", kind="file", body={}, **fields), [Part(0, b"no JSON")])

    async def find(store: Store) -> list[str]:
        return [*await store.items(["msg_1", "msg_2", "msg_3", "msg_4"], "me")]

    store = Store(path, 2**20)
    asyncio.run(put(store))
    store.close()
    db = sqlite3.connect(path)
    for kind, name in db.execute("SELECT type, name FROM sqlite_master WHERE type = 'trigger'").fetchall():
        db.execute(f"DROP {kind} {name}")
    db.execute("DROP TABLE item")
    db.commit()
    db.close()
    store = Store(path, 2**20)
    assert asyncio.run(find(store)) == ["msg_1", "msg_2", "msg_3"]
    asyncio.run(store.delete("resp_1", "response", "me"))
    assert asyncio.run(find(store)) == ["msg_3"]
    store.close()
    db = sqlite3.connect(path)
    assert db.execute("SELECT id, object FROM item").fetchall() == [("msg_3", "conv_1")]
    db.close()
