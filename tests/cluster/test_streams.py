"""Streams with ids: read again from any event, cancelled, kept for a while; over HTTP in every dialect, and gRPC."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import time

import grpc
import httpx
import openai
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from waiting import until

from kvasir.cluster.auth import ApiKeys
from kvasir.cluster.config import GatewayConfig
from kvasir.cluster.recordings import PIECE_BYTES, EventsGoneError, Recordings, StreamNotFoundError
from kvasir.engine.errors import ClientError, UnavailableError
from kvasir.proto import inference_pb2 as pb
from kvasir.proto.inference_pb2_grpc import InferenceStub

RESUMABLE = {"kvasir-resumable": "true"}
TEXT = "Hello, wörld!"
DIALECTS = {
    "/v1/completions": {"model": "bytes", "prompt": "Hi", "stream": True},
    "/v1/chat/completions": {"model": "bytes", "messages": [{"role": "user", "content": "Hi"}], "stream": True},
    "/v1/messages": {
        "model": "bytes", "max_tokens": 20, "messages": [{"role": "user", "content": "Hi"}], "stream": True,
    },
    "/v1/responses": {"model": "bytes", "input": "Hi", "stream": True},
    "/api/generate": {"model": "bytes", "prompt": "Hi"},
    "/api/chat": {"model": "bytes", "messages": [{"role": "user", "content": "Hi"}]},
}  # fmt: skip


def begin(gateway, path="/v1/completions", events=3, headers=RESUMABLE, **fields):
    """Read so many events, and lose the connection: (stream id, what was read)."""
    body, seen = DIALECTS[path] | fields, ""
    with httpx.stream("POST", gateway.url + path, json=body, headers=headers, timeout=60) as reply:
        assert reply.status_code == 200, reply.read()
        end = "\n" if path.startswith("/api/") else "\n\n"
        for part in reply.iter_text():
            seen += part
            if seen.count(end) >= events:
                break
        return reply.headers["kvasir-stream-id"], end.join(seen.split(end)[:events]) + end


def resume(gateway, stream_id, after=None, headers=None):
    params = {} if after is None else {"after": after}
    return httpx.get(f"{gateway.url}/v1/streams/{stream_id}", params=params, headers=headers or {}, timeout=60)


def long(gateway, step_s=0.01, tokens=3000):
    """Answers take a while."""
    gateway.group.script = lambda request, index: [65 + i % 26 for i in range(tokens)]
    gateway.group.step_s = step_s


@pytest.mark.parametrize("path", DIALECTS)
def test_what_comes_later_fits(live_gateway, path):
    """The client reads a part, goes away, and comes back: both parts are the stream as it would have been."""
    with live_gateway() as gateway:
        gateway.group.step_s = 0.01
        stream_id, seen = begin(gateway, path)
        whole = resume(gateway, stream_id)
        assert whole.status_code == 200
        assert whole.headers["kvasir-stream-id"] == stream_id
        assert whole.headers["content-type"].startswith("application/x-ndjson" if "/api" in path else "text/event-str")
        assert whole.text.startswith(seen)
        for after in (1, 3, 5):
            assert whole.text.endswith(resume(gateway, stream_id, after).text)
        assert resume(gateway, stream_id, after=3).text == whole.text[len(seen) :]
        assert gateway.desk.running == gateway.group.running == 0


def test_events_are_numbered(gateway):
    reply = httpx.post(gateway.url + "/v1/completions", json=DIALECTS["/v1/completions"], headers=RESUMABLE)
    events = reply.text.split("\n\n")[:-1]
    assert [event.split("\n")[0] for event in events] == [f"id: {number + 1}" for number in range(len(events))]
    plain = httpx.post(gateway.url + "/v1/completions", json=DIALECTS["/v1/completions"])
    assert "id: " not in plain.text
    assert plain.headers["kvasir-stream-id"] != reply.headers["kvasir-stream-id"]


def test_last_event_id(gateway):
    """A browser that reconnects by itself sends the header, and the URL as it was."""
    stream_id, _ = begin(gateway)
    by_header = resume(gateway, stream_id, after=1, headers={"Last-Event-ID": "7"})
    assert by_header.text == resume(gateway, stream_id, after=7).text
    assert by_header.text.startswith("id: 8\n")


def test_openai_client_reads_numbered_events(gateway):
    with openai.OpenAI(base_url=gateway.url + "/v1", api_key="any", max_retries=0) as client:
        stream = client.chat.completions.with_raw_response.create(
            model="bytes", messages=[{"role": "user", "content": "Hi"}], stream=True, extra_headers=RESUMABLE
        )
        assert "".join(chunk.choices[0].delta.content or "" for chunk in stream.parse() if chunk.choices) == TEXT
        assert stream.headers["kvasir-stream-id"]


def test_it_goes_on_without_a_reader(live_gateway):
    with live_gateway() as gateway:
        long(gateway)
        stream_id, _ = begin(gateway, max_tokens=100)
        plain, _ = begin(gateway, headers={}, max_tokens=3000)
        until(lambda: gateway.desk.running == 0)
        assert {name for name, *_ in gateway.group.aborted} == {gateway.group.requests[1].request_id}
        text = resume(gateway, stream_id).text
        assert text.count('"text":') >= 100
        assert "data: [DONE]" in text
        gone = resume(gateway, plain)
        assert (gone.status_code, "kvasir-resumable: true" in gone.json()["error"]["message"]) == (404, True)


def test_nobody_comes_back(live_gateway):
    """Running, it is aborted after --stream-ttl; ended, it is forgotten."""
    with live_gateway(GatewayConfig(stream_ttl_s=0.3)) as gateway:
        ended, _ = begin(gateway)
        until(lambda: gateway.desk.running == 0)
        long(gateway)
        began = time.monotonic()
        stream_id, _ = begin(gateway, max_tokens=3000)
        until(lambda: gateway.group.running == gateway.desk.running == 0)
        assert time.monotonic() - began > 0.3
        assert gateway.group.aborted[-1][0] == gateway.group.requests[-1].request_id
        for gone in (ended, stream_id):
            reply = resume(gateway, gone)
            assert (reply.status_code, reply.json()["error"]["code"]) == (404, "stream_not_found")
            assert "--stream-ttl" in reply.json()["error"]["message"]


def test_readers_keep_it(live_gateway):
    with live_gateway(GatewayConfig(stream_ttl_s=0.3)) as gateway:
        long(gateway)
        body = DIALECTS["/v1/completions"] | {"max_tokens": 100}
        with httpx.stream("POST", gateway.url + "/v1/completions", json=body, headers=RESUMABLE, timeout=60) as first:
            lines = first.iter_lines()
            next(lines)
            url = f"{gateway.url}/v1/streams/{first.headers['kvasir-stream-id']}"
            with httpx.stream("GET", url, timeout=60) as second:
                first.close()
                assert "[DONE]" in second.read().decode()  # takes a second


@pytest.mark.parametrize("headers", [RESUMABLE, {}])
def test_delete_cancels(live_gateway, headers):
    """A stream of any kind; who reads it is told."""
    with live_gateway() as gateway:
        long(gateway)
        body = DIALECTS["/v1/completions"] | {"max_tokens": 3000}
        with httpx.stream("POST", gateway.url + "/v1/completions", json=body, headers=headers, timeout=60) as reply:
            lines = reply.iter_lines()
            next(lines)
            url = f"{gateway.url}/v1/streams/{reply.headers['kvasir-stream-id']}"
            deleted = httpx.delete(url)
            assert deleted.json() == {"id": reply.headers["kvasir-stream-id"], "object": "stream", "deleted": True}
            last = [line for line in lines if line.startswith("data: {")][-1]
        assert json.loads(last[6:])["error"]["code"] == "cancelled"
        until(lambda: gateway.group.running == gateway.desk.running == 0)
        assert httpx.delete(url).status_code == httpx.get(url).status_code == 404


def test_only_with_the_same_key(live_gateway):
    with live_gateway(GatewayConfig(api_key=("one", "two"))) as gateway:
        mine, other = {"Authorization": "Bearer one"}, {"Authorization": "Bearer two"}
        stream_id, _ = begin(gateway, headers=RESUMABLE | mine)
        assert resume(gateway, stream_id, headers=other).status_code == 404
        assert httpx.delete(f"{gateway.url}/v1/streams/{stream_id}", headers=other).status_code == 404
        assert resume(gateway, stream_id).status_code == 401
        assert resume(gateway, stream_id, headers=mine).status_code == 200
        assert resume(gateway, stream_id, headers={"x-api-key": "one"}).status_code == 200


@pytest.mark.parametrize(
    ("after", "status", "says"),
    [("x", 400, "number of an event"), ("-1", 400, "number of an event"), ("", 400, "number"), ("9999", 400, "so far")],
)
def test_places_that_arent(gateway, after, status, says):
    stream_id, _ = begin(gateway)
    reply = resume(gateway, stream_id, after)
    assert reply.status_code == status
    assert says in reply.json()["error"]["message"]


def test_what_isnt_kept_says_so(live_gateway):
    with live_gateway() as gateway:
        long(gateway)
        body = DIALECTS["/v1/completions"] | {"max_tokens": 3000}
        with httpx.stream("POST", gateway.url + "/v1/completions", json=body, timeout=60) as reply:
            found = resume(gateway, reply.headers["kvasir-stream-id"])
        assert found.status_code == 400
        assert "kvasir-resumable: true" in found.json()["error"]["message"]


def test_the_header_is_checked(gateway):
    body = DIALECTS["/v1/completions"]
    reply = httpx.post(gateway.url + "/v1/completions", json=body, headers={"kvasir-resumable": "perhaps"})
    assert reply.status_code == 400
    assert "kvasir-resumable must be true or false" in reply.json()["error"]["message"]
    whole = httpx.post(gateway.url + "/v1/completions", json=body | {"stream": False}, headers=RESUMABLE)
    assert "kvasir-resumable" in whole.headers["x-kvasir-warning"]


def test_failures_are_kept_too(live_gateway):
    with live_gateway() as gateway:
        gateway.group.step_s, gateway.group.dies_after = 0.01, 5
        stream_id, _ = begin(gateway)
        for _ in range(2):
            assert json.loads(resume(gateway, stream_id).text.split("data: ")[-1])["error"]["code"] == "unavailable"
        gateway.group.refusal = UnavailableError("no")
        refused = httpx.post(gateway.url + "/v1/completions", json=DIALECTS["/v1/completions"], headers=RESUMABLE)
        assert refused.status_code == 503


def test_the_gateway_that_has_it_answers(live_gateway):
    """Gateways share a port: whichever is asked, the one that the id names answers."""
    with live_gateway() as one, live_gateway() as two:
        two.others[one.desk.recordings.gateway] = one.url
        long(one)
        stream_id, seen = begin(one, max_tokens=60)
        later = resume(two, stream_id, after=3)
        assert later.headers["kvasir-stream-id"] == stream_id
        assert seen + later.text == resume(one, stream_id).text
        for door in (one, two):
            told = httpx.get(f"{door.url}/v1/streams/{stream_id}?after=3&odd=1").headers
            assert told.get_list("x-kvasir-warning") == ["ignored: odd"]
            assert "x-kvasir-warning" not in resume(door, stream_id, after=3).headers
        assert resume(two, stream_id, after=9999).status_code == 400
        stream_id, _ = begin(one, max_tokens=3000)
        assert httpx.delete(f"{two.url}/v1/streams/{stream_id}").status_code == 200
        until(lambda: one.group.running == 0)
        assert resume(two, stream_id).status_code == 404
        unknown = resume(one, "12345678-0")
        assert "no gateway that runs began it" in unknown.json()["error"]["message"]
        two.others[one.desk.recordings.gateway] = "http://127.0.0.1:1"
        assert resume(two, stream_id).status_code == 404


def test_a_reader_elsewhere_that_goes_away(live_gateway):
    with live_gateway(GatewayConfig(stream_ttl_s=0.3)) as one, live_gateway() as two:
        two.others[one.desk.recordings.gateway] = one.url
        long(one)
        stream_id, _ = begin(one, max_tokens=3000)
        with httpx.stream("GET", f"{two.url}/v1/streams/{stream_id}", timeout=60) as reply:
            next(reply.iter_lines())
        until(lambda: one.group.running == 0)


def test_a_stream_that_breaks_elsewhere_breaks_here(live_gateway):
    """To end it would say that this was all."""
    with live_gateway() as one, live_gateway() as two:
        two.others[one.desk.recordings.gateway] = one.url
        long(one)
        stream_id, _ = begin(one, max_tokens=3000)
        with httpx.stream("GET", f"{two.url}/v1/streams/{stream_id}", timeout=60) as reply:
            lines = reply.iter_lines()
            next(lines)
            one.call(lambda: [connection.transport.abort() for connection in [*one.connections]])
            with pytest.raises(httpx.RemoteProtocolError):
                list(lines)
        httpx.delete(f"{one.url}/v1/streams/{stream_id}")


# ---- gRPC


def stub(gateway):
    return InferenceStub(grpc.insecure_channel(gateway.grpc_address))


def generate(gateway, metadata=(("kvasir-resumable", "true"),), **fields):
    return stub(gateway).Generate(pb.GenerateRequest(model="bytes", text="Hi", **fields), metadata=metadata, timeout=60)


def test_grpc_resume(live_gateway):
    with live_gateway() as gateway:
        gateway.group.step_s = 0.01
        call = generate(gateway)
        stream_id = dict(call.initial_metadata())["kvasir-stream-id"]
        seen = [next(call), next(call)]
        call.cancel()
        rest = list(stub(gateway).Resume(pb.ResumeRequest(stream_id=stream_id, after=2), timeout=60))
        assert [reply.number for reply in seen + rest] == list(range(1, len(seen + rest) + 1))
        assert "".join(reply.text for reply in seen + rest) == TEXT
        assert rest[-1].usage.completion_tokens == 15
        assert resume(gateway, stream_id).status_code == 400  # by HTTP


def test_grpc_cancel(live_gateway):
    with live_gateway() as gateway:
        long(gateway)
        for metadata in ((), (("kvasir-resumable", "true"),)):
            call = generate(gateway, metadata, sampling=pb.Sampling(max_tokens=3000))
            stream_id = dict(call.initial_metadata())["kvasir-stream-id"]
            next(call)
            stub(gateway).Cancel(pb.CancelRequest(stream_id=stream_id), timeout=60)
            with pytest.raises(grpc.RpcError) as raised:
                list(call)
            assert raised.value.code() == grpc.StatusCode.CANCELLED
            until(lambda: gateway.group.running == 0)
        with pytest.raises(grpc.RpcError) as raised:
            list(stub(gateway).Resume(pb.ResumeRequest(stream_id=stream_id), timeout=60))
        assert raised.value.code() == grpc.StatusCode.NOT_FOUND


# ---- where the time went


def test_server_timing(gateway):
    body = DIALECTS["/v1/completions"]
    whole = httpx.post(gateway.url + "/v1/completions", json=body | {"stream": False})
    names = [part.split(";")[0] for part in whole.headers["server-timing"].split(", ")]
    assert names == ["queue", "prefill", "decode", "total", "cached", "group"]
    assert 'cached;desc="2", group;desc="group-1"' in whole.headers["server-timing"]
    assert "timing" not in whole.json()


def test_acceptance_is_told_where_something_was_proposed(gateway):
    gateway.group.drafts = 8, 6
    try:
        answer = httpx.post(
            gateway.url + "/v1/completions", json={"model": "bytes", "prompt": "a", "return_timing": True}
        )
    finally:
        gateway.group.drafts = 0, 0
    assert answer.headers["server-timing"].endswith('group;desc="group-1", acceptance;desc="0.75"')
    assert answer.json()["timing"]["acceptance"] == 0.75


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
@pytest.mark.parametrize("usage", [True, False])
def test_return_timing(gateway, path, usage):
    body = DIALECTS[path] | {"return_timing": True}
    whole = httpx.post(gateway.url + path, json=body | {"stream": False}).json()
    assert list(whole["timing"]) == ["queue_ms", "prefill_ms", "decode_ms", "total_ms", "cached_tokens", "group"]
    assert whole["timing"]["total_ms"] > 0
    assert whole["timing"]["prefill_ms"] == pytest.approx(1.0, abs=0.01)  # the fake's
    options = {"stream_options": {"include_usage": True}} if usage else {}
    frames = httpx.post(gateway.url + path, json=body | options).text.split("\n\n")
    last = json.loads(next(f for f in reversed(frames) if f.startswith("data: {"))[6:])
    assert last["choices"] == []
    assert last["timing"]["group"] == "group-1"
    assert ("usage" in last) == usage


@pytest.mark.parametrize("path", ["/v1/messages", "/v1/responses", "/api/generate", "/api/chat"])
@pytest.mark.parametrize("streamed", [True, False])
def test_return_timing_in_other_dialects(gateway, path, streamed):
    """In the answer, or in the event that ends the stream."""
    found = {}
    for wanted in (True, False):
        body = DIALECTS[path] | {"stream": streamed, "return_timing": wanted}
        text = httpx.post(gateway.url + path, json=body).text
        parts = [
            json.loads(line.removeprefix("data: ")) for line in text.splitlines() if line.startswith(("{", "data: {"))
        ]
        parts = [part.get("response", part) if isinstance(part.get("response"), dict) else part for part in parts]
        found[wanted] = [part["timing"] for part in parts if "timing" in part]
    assert not found[False]
    (timing,) = found[True]
    assert timing["group"] == "group-1"
    assert timing["total_ms"] > 0


POOLING = {
    "/v1/embeddings": {"input": "Hi"},
    "/score": {"queries": "a", "documents": ["b"]},
    "/rerank": {"query": "a", "documents": ["b"]},
    "/api/embed": {"model": "bytes", "input": "Hi"},
    "/api/embeddings": {"model": "bytes", "prompt": "Hi"},
}


@pytest.mark.parametrize("path", [*POOLING, "/v1/decisions"])
def test_return_timing_where_nothing_is_streamed(gateway, monkeypatch, path):
    if path in POOLING:
        monkeypatch.setattr(gateway.group, "info", dataclasses.replace(gateway.group.info, tasks=("embed",)))
        body = POOLING[path]
    else:
        body = {"input": "Hi", "questions": [{"type": "predicate", "instructions": "Is it?"}]}
    for asked in (True, False):
        found = httpx.post(gateway.url + path, json={**body, "return_timing": asked}, timeout=60)
        assert "x-kvasir-warning" not in found.headers
        assert found.headers["server-timing"].startswith("queue;dur=")
        assert ("timing" in found.json()) == asked
        if asked:
            assert found.json()["timing"]["group"] == "group-1"


def test_grpc_timing(gateway):
    call = generate(gateway, (), return_timing=True)
    replies = list(call)
    assert dict(call.trailing_metadata())["server-timing"].startswith("queue;dur=")
    assert replies[-1].timing.group == "group-1"
    assert replies[-1].timing.prefill_ms == pytest.approx(1.0, abs=0.01)
    assert not replies[0].HasField("timing")


# ---- recordings by themselves


def run(coroutine):
    return asyncio.run(asyncio.wait_for(coroutine, 60))


async def everything(recording, after=0):
    return [event async for events in recording.read(after) for event in events]


@settings(max_examples=50)
@given(
    steps=st.lists(st.lists(st.binary(min_size=1, max_size=3), max_size=3), max_size=12),
    cuts=st.lists(st.tuples(st.integers(0, 12), st.integers(0, 36)), max_size=4),
)
def test_any_reader_at_any_time_gets_the_rest(steps, cuts):
    async def main():
        recordings = Recordings(ttl_s=5)
        recording = recordings.new({"kvasir-resumable": "1"})
        recording.open(b"x")
        gates = [asyncio.Event() for _ in steps]

        async def source():
            for gate, events in zip(gates, steps, strict=True):
                await gate.wait()
                yield events

        recording.record(source())
        readers = []
        for number in range(len(steps) + 1):
            readers += [
                (after, asyncio.ensure_future(everything(recording, after)))
                for at, after in cuts
                if at == number and after <= recording.count
            ]
            if number < len(steps):
                gates[number].set()
            await asyncio.sleep(0)
            await asyncio.sleep(0)
        whole = [event for events in steps for event in events]
        for after, reader in readers:
            assert await reader == whole[after:]

    run(main())


def test_memory_is_bounded():
    async def main():
        recordings = Recordings(ttl_s=5, max_bytes=1000)

        async def record(count):
            recording = recordings.new({"kvasir-resumable": "true"})
            recording.open(b"x")

            async def source():
                for _ in range(count):
                    yield [b"0123456789"]

            recording.record(source())
            await asyncio.sleep(0.01)
            return recording

        first, second = await record(60), await record(39)
        assert recordings.find(first.id, {}) is first
        third = await record(10)  # the one that ended first goes
        with pytest.raises(StreamNotFoundError):
            recordings.find(first.id, {})
        assert recordings.find(second.id, {}) is second
        large = await record(500)  # alone, it keeps what is new
        with pytest.raises(EventsGoneError, match="--stream-memory"):
            await everything(large, 0)
        assert large.size <= 1000
        assert len(await everything(large, 450)) == 50
        assert third.size == 100

    run(main())


def test_a_slow_reader_has_no_copy_of_all():
    """Nor what was dropped meanwhile."""

    async def main():
        recordings = Recordings(ttl_s=5, max_bytes=10 * PIECE_BYTES)
        recording = recordings.new({"kvasir-resumable": "1"})
        recording.open(b"x")
        event = bytes(PIECE_BYTES // 4)
        recording.add([event] * 40)
        reader = recording.read(0)
        assert [len(await anext(reader)) for _ in range(2)] == [4, 4]
        recording.add([event])
        with pytest.raises(EventsGoneError, match="events 9 to 21 are no longer held"):
            await anext(reader)
        assert len(await anext(recording.read(40))) == 1

    run(main())


def test_a_bug_ends_its_stream(caplog):
    async def main():
        recording = Recordings().new({})
        recording.open(b"x")

        async def source():
            yield [b"one"]
            raise ZeroDivisionError

        recording.record(source())
        with pytest.raises(Exception, match="internal error"):
            await everything(recording)

    run(main())
    assert "ZeroDivisionError" in caplog.text


def test_owners():
    keys = ApiKeys(("a", "b"))
    assert keys.owner("Bearer a") == keys.owner(None, "a") != keys.owner("Bearer b")
    assert ApiKeys(()).owner("Bearer a") == ApiKeys(()).owner(None) == b""
    with pytest.raises(ClientError, match="kvasir-resumable"):
        Recordings().new({"kvasir-resumable": "x"})
