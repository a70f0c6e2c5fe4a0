"""Responses that go on without whoever asked, and the state in which gateways keep them."""

from __future__ import annotations

import contextlib
import json
import sqlite3
import time
from dataclasses import replace

import httpx
import openai
import pytest
from responses_calls import TEXT, events, post
from waiting import until

from kvasir.cluster.config import GatewayConfig
from kvasir.cluster.store import Store
from kvasir.engine.errors import ConfigError, OverloadedError


def test_background(gateway, client):
    found = client.responses.create(model="bytes", input="Hi", background=True)
    assert found.status == "queued"
    until(lambda: client.responses.retrieve(found.id).status == "completed")
    assert client.responses.retrieve(found.id).output_text == TEXT
    assert client.responses.cancel(found.id).status == "completed"
    reply = httpx.get(f"{gateway.url}/v1/responses/{found.id}?stream=true")
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, "stream")
    once = client.responses.create(model="bytes", input="Hi")
    with pytest.raises(openai.BadRequestError, match="background"):
        client.responses.cancel(once.id)


def test_background_stream_goes_on_elsewhere(gateway, client):
    gateway.group.step_s = 0.03
    try:
        seen = []
        with client.responses.create(model="bytes", input="Hi", background=True, stream=True) as stream:
            for event in stream:
                seen.append(event)
                if event.type == "response.output_text.delta":
                    break
        response_id = seen[0].response.id
        rest = list(client.responses.retrieve(response_id, stream=True, starting_after=seen[-1].sequence_number))
    finally:
        gateway.group.step_s = 0.0
    assert [one.sequence_number for one in (*seen, *rest)] == list(range(len(seen) + len(rest)))
    assert [one.type for one in seen[:3]] == ["response.created", "response.queued", "response.in_progress"]
    assert "".join(one.delta for one in (*seen, *rest) if one.type == "response.output_text.delta") == TEXT
    assert rest[-1].type == "response.completed"
    assert rest[-1].response.to_dict() == client.responses.retrieve(response_id).to_dict()
    again = httpx.get(f"{gateway.url}/v1/responses/{response_id}?stream=true").text
    assert len(events(again)) == len(seen) + len(rest)
    for query in ("stream=1", "stream=true&starting_after=x"):
        assert httpx.get(f"{gateway.url}/v1/responses/{response_id}?{query}").status_code == 400


@pytest.mark.parametrize("end", ["cancel", "delete"])
def test_background_is_ended(gateway, client, end):
    gateway.group.step_s = 0.1
    try:
        found = client.responses.create(model="bytes", input="Hi", background=True)
        until(lambda: gateway.group.running)
        with pytest.raises(openai.BadRequestError, match="wait"):
            client.responses.create(model="bytes", input="x", previous_response_id=found.id)
        getattr(client.responses, end)(found.id)
        until(lambda: not gateway.group.running)
    finally:
        gateway.group.step_s = 0.0
    if end == "cancel":
        assert client.responses.retrieve(found.id).status == "cancelled"
    else:
        with pytest.raises(openai.NotFoundError):
            client.responses.retrieve(found.id)


def test_background_waits_for_room(live_gateway, monkeypatch):
    monkeypatch.setattr("kvasir.cluster.background.RETRY_S", 0.05)
    with live_gateway() as gateway:
        gateway.group.refusal = OverloadedError("the queue is full")
        found = post(gateway, background=True).json()
        time.sleep(0.2)
        place = f"{gateway.url}/v1/responses/{found['id']}"
        assert httpx.get(place).json()["status"] == "queued"
        gateway.group.refusal = None
        until(lambda: httpx.get(place).json()["status"] == "completed")


def test_background_fails(gateway, client):
    """What can be known at once is said at once; a failure later is the response's."""
    assert post(gateway, background=True, input="x" * 5000).status_code == 400
    gateway.group.dies_after = 2
    try:
        found = client.responses.create(model="bytes", input="Hi", background=True, stream=True)
        last = list(found)[-1]
    finally:
        gateway.group.dies_after = None
    assert (last.type, last.response.error.code) == ("response.failed", "server_error")
    assert client.responses.retrieve(last.response.id).status == "failed"


def test_stream_that_fails(gateway):
    gateway.group.dies_after = 2
    try:
        last = events(post(gateway, stream=True).text)[-1]
    finally:
        gateway.group.dies_after = None
    assert last["type"] == "response.failed"


def test_another_key_sees_nothing(live_gateway, tmp_path):
    config = GatewayConfig(api_key=("one", "two"), state_path=str(tmp_path / "deep" / "state.db"))
    with live_gateway(config) as gateway:
        mine, theirs = (
            openai.OpenAI(base_url=gateway.url + "/v1", api_key=key, max_retries=0) for key in ("one", "two")
        )
        with mine, theirs:
            found = mine.responses.create(model="bytes", input="secret")
            calls = [
                lambda c: c.responses.retrieve(found.id),
                lambda c: c.responses.input_items.list(found.id).data,
                lambda c: c.responses.create(model="bytes", input="x", previous_response_id=found.id),
                lambda c: c.responses.cancel(found.id),
                lambda c: c.responses.delete(found.id),
            ]
            for call in calls:
                with pytest.raises(openai.NotFoundError):
                    call(theirs)
            assert mine.responses.retrieve(found.id).output_text == TEXT
    state = (tmp_path / "deep" / "state.db").read_bytes()
    assert b"secret" in state
    assert (tmp_path / "deep" / "state.db").stat().st_mode & 0o777 == 0o600


def test_gateways_share_a_file(live_gateway, tmp_path, monkeypatch):
    """One continues, cancels and takes over what another began."""
    monkeypatch.setattr("kvasir.cluster.background.WATCH_S", 0.1)
    config = GatewayConfig(state_path=str(tmp_path / "state.db"))
    with live_gateway(config) as one:
        with live_gateway(config) as other:
            first = post(one).json()
            assert post(other, previous_response_id=first["id"]).status_code == 200
            one.group.step_s = 0.2
            running = post(one, background=True).json()
            until(lambda: one.group.running)
            assert httpx.post(f"{other.url}/v1/responses/{running['id']}/cancel").json()["status"] == "cancelled"
            until(lambda: not one.group.running)
            other.group.step_s = 5
            left = post(other, background=True).json()
            streamed = httpx.stream("POST", other.url + "/v1/responses", json={
                "model": "bytes", "input": "Hi", "background": True, "stream": True})  # fmt: skip
            with streamed as reply:
                begun = json.loads(next(line for line in reply.iter_lines() if line.startswith("data"))[6:])["response"]
        one.group.step_s = 0.0
        until(lambda: httpx.get(f"{one.url}/v1/responses/{left['id']}").json()["status"] == "completed")
        ended = httpx.get(f"{one.url}/v1/responses/{begun['id']}?stream=true").text
        assert events(ended)[-1]["type"] == "response.failed"


def test_what_is_refused_by_now_fails(live_gateway, tmp_path, monkeypatch):
    """Another version of this program took it; it isn't tried for ever."""
    monkeypatch.setattr("kvasir.cluster.background.WATCH_S", 0.1)
    config = GatewayConfig(state_path=str(tmp_path / "state.db"))
    with live_gateway(config) as one:
        one.group.step_s = 5
        left = post(one, background=True).json()
    with contextlib.closing(sqlite3.connect(tmp_path / "state.db")) as db:
        (private,) = db.execute("SELECT private FROM object WHERE id = ?", (left["id"],)).fetchone()
        older = json.loads(private) | {"ask": {"model": "bytes", "input": "x", "background": True, "top_p": 7}}
        db.execute("UPDATE object SET private = ? WHERE id = ?", (json.dumps(older).encode(), left["id"]))
        db.commit()
    with live_gateway(config) as other:
        post(other, background=True)  # from now on it is looked for what others left
        place = f"{other.url}/v1/responses/{left['id']}"
        until(lambda: httpx.get(place).json()["status"] == "failed")
        assert "top_p" in httpx.get(place).json()["error"]["message"]


def test_state_that_cannot_be_used(live_gateway, tmp_path, monkeypatch, caplog):
    (tmp_path / "file").write_text("this is no database, and long enough to be seen to be none" * 20)
    with pytest.raises(ConfigError, match="--state-path"):
        Store.open(str(tmp_path / "file"), 2**20, {})
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "file"))
    gateway = live_gateway()
    gateway.config = replace(gateway.config, state_path=None)
    with gateway:
        found = post(gateway).json()
        assert httpx.get(f"{gateway.url}/v1/responses/{found['id']}").status_code == 200
    assert "in memory" in caplog.text


def test_time_to_live(live_gateway):
    with live_gateway(GatewayConfig(state_path=":memory:", response_ttl_s=1.0)) as gateway:
        found = post(gateway).json()
        place = f"{gateway.url}/v1/responses/{found['id']}"
        assert httpx.get(place).status_code == 200
        until(lambda: httpx.get(place).status_code == 404)
