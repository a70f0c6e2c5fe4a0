"""/v1/files and /v1/batches over real sockets, by httpx and OpenAI's own client."""

from __future__ import annotations

import dataclasses
import json
import time

import httpx
import openai
import pytest
from waiting import until

from kvasir.cluster.config import GatewayConfig
from kvasir.cluster.service_fields import BATCH_PRIORITY
from kvasir.engine.errors import OverloadedError, UnavailableError
from kvasir.engine.scheduler import Stats

TEXT = "Hello, wörld!"
CHAT = "/v1/chat/completions"


@pytest.fixture(autouse=True)
def _soon(monkeypatch):
    monkeypatch.setattr("kvasir.cluster.batch_run.LOOK_S", 0.02)
    monkeypatch.setattr("kvasir.cluster.batch_run.RETRY_S", 0.05)
    monkeypatch.setattr("kvasir.cluster.background.WATCH_S", 0.1)


def line(custom_id, url=CHAT, **fields):
    body = {"model": "bytes", "messages": [{"role": "user", "content": f"no. {custom_id}"}]} | fields
    return {"custom_id": custom_id, "method": "POST", "url": url, "body": body}


def upload(client, *lines):
    data = "".join((one if isinstance(one, str) else json.dumps(one)) + "\n" for one in lines)
    return client.files.create(file=("in.jsonl", data.encode()), purpose="batch")


def start(client, *lines, endpoint=CHAT, **fields):
    file = upload(client, *lines)
    return client.batches.create(input_file_id=file.id, endpoint=endpoint, completion_window="24h", **fields)


def ended(client, batch):
    """The batch when it has come to an end."""
    open_ = ("validating", "in_progress", "finalizing", "cancelling")
    return until(lambda: (found := client.batches.retrieve(batch.id)).status not in open_ and found)


def entries(client, file_id):
    """custom_id -> line."""
    return {one["custom_id"]: one for one in map(json.loads, client.files.content(file_id).text.splitlines())}


def test_files(client):
    data = b"a" * 2**21 + b"\r\n--boundary\r\n" + bytes(range(256))
    file = client.files.create(
        file=('nämé".jsonl', data), purpose="batch", expires_after={"anchor": "created_at", "seconds": 3600}
    )
    assert (file.bytes, file.purpose, file.status, file.object) == (len(data), "batch", "processed", "file")
    assert file.expires_at - file.created_at == 3600
    assert client.files.retrieve(file.id).to_dict() == file.to_dict()
    assert client.files.content(file.id).content == data
    other = upload(client, "{}")
    assert [one.id for one in client.files.list(purpose="batch")][:2] == [other.id, file.id]
    assert [one.id for one in client.files.list(limit=1, order="desc")][:2] == [other.id, file.id]  # two pages
    assert list(client.files.list(purpose="batch_output")) == []
    assert client.files.delete(file.id).deleted
    for call in (client.files.retrieve, client.files.content, client.files.delete):
        with pytest.raises(openai.NotFoundError):
            call(file.id)


@pytest.mark.parametrize(
    ("form", "param"),
    [
        ({"data": {"purpose": "batch"}, "files": {"wrong": b""}}, "file"),
        ({"files": {"file": b""}}, "purpose"),
        ({"data": {"purpose": "fine-tune"}, "files": {"file": b""}}, "purpose"),
        ({"data": {"purpose": "x" * 5000}, "files": {"file": b""}}, "purpose"),
        ({"data": {"purpose": "batch", "expires_after[anchor]": "created_at", "expires_after[seconds]": "1"},
          "files": {"file": b""}}, "expires_after"),
        ({"files": [("purpose", (None, "batch")), ("purpose", (None, "batch")), ("file", b"")]}, "purpose"),
        ({"json": {}}, None),
        ({"content": b"--x\r\nnothing", "headers": {"content-type": "multipart/form-data; boundary=x"}}, None),
    ],
)  # fmt: skip
def test_uploads_that_are_refused(gateway, client, form, param):
    before = len(list(client.files.list()))
    reply = httpx.post(gateway.url + "/v1/files", **form)
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, param)
    assert len(list(client.files.list())) == before


def test_upload_larger_than_the_room(live_gateway):
    with live_gateway(GatewayConfig(state_path=":memory:", max_state_bytes=2**20)) as gateway:
        reply = httpx.post(gateway.url + "/v1/files", data={"purpose": "batch"}, files={"file": b"x" * 2**20})
        assert (reply.status_code, reply.json()["error"]["code"]) == (413, "storage_full")


@pytest.mark.parametrize("name", [["bytes"], {"name": "bytes"}, 3])
def test_a_model_that_is_no_name_fails_its_line_alone(client, name):
    done = ended(client, start(client, line("a"), line("b", model=name)))
    assert (done.status, done.request_counts.completed, done.request_counts.failed) == ("completed", 1, 1)
    assert entries(client, done.error_file_id)["b"]["error"]["param"] == "model"


def test_batch(gateway, client):
    batch = start(client, line("a"), "", line("b", temperature=-1), line("c", n=2), metadata={"what": "test"})
    assert (batch.status, batch.metadata, batch.expires_at - batch.created_at) == (
        "validating",
        {"what": "test"},
        86400,
    )
    done = ended(client, batch)
    assert (done.status, done.model) == ("completed", "bytes")
    assert done.request_counts.to_dict() == {"total": 3, "completed": 2, "failed": 1}
    assert done.usage.output_tokens == 45
    found = entries(client, done.output_file_id)
    assert found.keys() == {"a", "c"}
    assert found["a"]["response"]["body"]["choices"][0]["message"]["content"] == TEXT
    assert found["a"]["response"]["status_code"] == 200
    (wrong,) = entries(client, done.error_file_id).values()
    assert (wrong["response"]["status_code"], wrong["error"]["param"]) == (400, "temperature")
    assert {request.priority for request in gateway.group.requests[-2:]} == {BATCH_PRIORITY}
    assert client.files.retrieve(done.output_file_id).purpose == "batch_output"
    assert next(iter(client.batches.list(limit=1))).id == batch.id
    with pytest.raises(openai.BadRequestError, match="completed"):
        client.batches.cancel(batch.id)


@pytest.mark.parametrize(
    ("url", "fields", "read"),
    [
        ("/v1/completions", {"prompt": "x"}, lambda body: body["choices"][0]["text"]),
        ("/v1/responses", {"input": "x"}, lambda body: body["output"][0]["content"][0]["text"]),
    ],
)
def test_endpoints(client, url, fields, read):
    one = {"custom_id": "1", "method": "POST", "url": url, "body": {"model": "bytes", **fields}}
    done = ended(client, start(client, one, endpoint=url))
    (entry,) = entries(client, done.output_file_id).values()
    assert read(entry["response"]["body"]) == TEXT
    assert done.usage.output_tokens == 15


def test_embeddings(live_gateway):
    with live_gateway() as gateway, openai.OpenAI(base_url=gateway.url + "/v1", api_key="any") as client:
        gateway.group.info = dataclasses.replace(gateway.group.info, tasks=("embed",))
        one = line("1", "/v1/embeddings", input="abc")
        del one["body"]["messages"]
        done = ended(client, start(client, one, endpoint="/v1/embeddings"))
        (entry,) = entries(client, done.output_file_id).values()
        assert entry["response"]["body"]["data"][0]["embedding"] == [3.0, 0.5]
        assert gateway.group.requests[-1].priority == BATCH_PRIORITY


def test_responses_that_need_others(client):
    fields = [{"background": True}, {"previous_response_id": "resp_1"}, {"stream": True}, {"store": True}]
    lines = [line(str(i), "/v1/responses", input="x", **more) for i, more in enumerate(fields)]
    for one in lines:
        del one["body"]["messages"]
    done = ended(client, start(client, *lines, endpoint="/v1/responses"))
    wrong = entries(client, done.error_file_id)
    assert [wrong[str(i)]["error"]["param"] for i in range(3)] == [next(iter(one)) for one in fields[:3]]
    (fine,) = entries(client, done.output_file_id).values()
    assert fine["response"]["body"]["warnings"] == ["store"]
    assert fine["response"]["body"]["store"] is False


def test_files_that_fail(client):
    bad = [line("a"), "{", line("a"), line("b", url="/v1/completions"), {"custom_id": "c"}, line(True)]
    done = ended(client, start(client, *bad))
    assert (done.status, done.request_counts.total) == ("failed", 0)
    assert [one.line for one in done.errors.data] == [2, 3, 4, 5, 6]
    assert "is in line 1 already" in done.errors.data[1].message
    assert ended(client, start(client)).errors.data[0].message == "the file is empty"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"input_file_id": "file-none"}, "input_file_id"),
        ({"endpoint": "/v1/moderations"}, "endpoint"),
        ({"completion_window": "1h"}, "completion_window"),
        ({"metadata": {"a": 1}}, "metadata"),
        ({"output_expires_after": {"anchor": "created_at", "seconds": 1}}, "output_expires_after"),
    ],
)
def test_refusals(gateway, client, fields, param):
    body = {"input_file_id": upload(client, line("a")).id, "endpoint": CHAT, "completion_window": "24h"} | fields
    reply = httpx.post(gateway.url + "/v1/batches", json=body)
    assert reply.status_code in (400, 404)
    assert reply.json()["error"]["param"] == param


def test_cancel(live_gateway):
    """One line is answered, the others have far to go."""
    with live_gateway() as gateway, openai.OpenAI(base_url=gateway.url + "/v1", api_key="any") as client:
        script = gateway.group.script
        first = [*b"no. 0"]
        gateway.group.script = lambda request, index: script(request, index) * (1 if holds(request, first) else 250)
        gateway.group.step_s = 0.02
        batch = start(client, *[line(str(i), max_tokens=3000, ignore_eos=True) for i in range(20)])
        until(lambda: client.batches.retrieve(batch.id).request_counts.completed)
        assert client.batches.cancel(batch.id).status == "cancelling"
        done = ended(client, batch)
        assert done.status == "cancelled"
        assert done.request_counts.completed == 1
        assert entries(client, done.output_file_id).keys() == {"0"}
        assert client.batches.cancel(batch.id).status == "cancelled"


def holds(request, ids):
    prompt = [*request.prompt_token_ids]
    return any(prompt[at : at + len(ids)] == ids for at in range(len(prompt)))


def test_expiry(live_gateway, monkeypatch):
    monkeypatch.setattr("kvasir.cluster.batches_api.WINDOW_S", 1.0)
    with live_gateway(GatewayConfig(state_path=":memory:")) as gateway:
        gateway.group.step_s = 0.04
        with openai.OpenAI(base_url=gateway.url + "/v1", api_key="any") as client:
            done = ended(client, start(client, *[line(str(i)) for i in range(5)]))
            assert done.status == "expired"
            wrong = entries(client, done.error_file_id)
            assert len(wrong) == done.request_counts.failed == 5 - done.request_counts.completed > 0
            assert {one["error"]["code"] for one in wrong.values()} == {"batch_expired"}


def test_a_server_that_is_full_or_away_fails_no_line(gateway, client):
    for refusal in (OverloadedError("the queue is full"), UnavailableError("restarting")):
        gateway.group.refusal = refusal
        batch = start(client, line("a"))
        time.sleep(0.2)
        assert client.batches.retrieve(batch.id).status == "in_progress"
        gateway.group.refusal = None
        assert ended(client, batch).request_counts.completed == 1


def test_a_bug_ends_its_batch(gateway, client, monkeypatch, caplog):
    monkeypatch.setattr("kvasir.cluster.batch_run.openai_entry", lambda *_: 1 // 0)
    done = ended(client, start(client, line("a")))
    assert (done.status, done.errors.data[0].code) == ("failed", "internal_error")
    assert "ZeroDivisionError" in caplog.text


def test_idle_capacity(live_gateway):
    """Lines fill seven of eight seats, less those that others have; one at least."""
    with live_gateway(GatewayConfig(state_path=":memory:")) as gateway:
        group, desk, seen = gateway.group, gateway.desk, []
        group.info = dataclasses.replace(group.info, max_num_seqs=16)
        group.step_s = 0.01
        submit = group.submit

        class Crowd(type(group)):
            """Others' requests run beside ours; a report is never old here."""

            others = 0

            @property
            def stats(self):
                return Stats(running=crowd.others + len(desk.priorities(desk.models[0])))

            async def submit(self, *request):
                stream = await submit(*request)
                seen.append(self.running)
                return stream

        crowd = Crowd
        group.__class__ = Crowd
        with openai.OpenAI(base_url=gateway.url + "/v1", api_key="any") as client:
            for crowd.others, wanted in ((0, 14), (10, 4), (99, 1)):
                seen.clear()
                done = ended(client, start(client, *[line(str(i)) for i in range(20 if wanted > 1 else 2)]))
                assert done.status == "completed"
                assert wanted - 1 <= max(seen) <= wanted, crowd.others


def test_resumed_after_a_restart(live_gateway, tmp_path):
    """No line is answered twice, but those that ran when the gateway ended."""
    config = GatewayConfig(state_path=str(tmp_path / "state.db"))
    with live_gateway(config) as gateway:
        gateway.group.step_s = 0.01
        with openai.OpenAI(base_url=gateway.url + "/v1", api_key="any") as client:
            batch = start(client, *[line(str(i)) for i in range(12)])
            until(lambda: client.batches.retrieve(batch.id).request_counts.completed >= 3)
    first = len(gateway.group.requests)
    with live_gateway(config) as gateway:
        gateway.call(gateway.app.state.shelf.background.start)
        with openai.OpenAI(base_url=gateway.url + "/v1", api_key="any") as client:
            done = ended(client, batch)
            assert (done.status, done.request_counts.completed) == ("completed", 12)
            assert entries(client, done.output_file_id).keys() == {str(i) for i in range(12)}
    assert first + len(gateway.group.requests) <= 13


def test_another_key_sees_nothing(live_gateway):
    with live_gateway(GatewayConfig(api_key=("one", "two"), state_path=":memory:")) as gateway:
        mine, theirs = (
            openai.OpenAI(base_url=gateway.url + "/v1", api_key=key, max_retries=0) for key in ("one", "two")
        )
        with mine, theirs:
            batch = start(mine, line("a"))
            ended(mine, batch)
            assert list(theirs.files.list()) == list(theirs.batches.list()) == []
            calls = [
                lambda: theirs.files.retrieve(batch.input_file_id),
                lambda: theirs.files.content(batch.input_file_id),
                lambda: theirs.files.delete(batch.input_file_id),
                lambda: theirs.files.list(after=batch.input_file_id),
                lambda: theirs.batches.retrieve(batch.id),
                lambda: theirs.batches.cancel(batch.id),
                lambda: theirs.batches.create(
                    input_file_id=batch.input_file_id, endpoint=CHAT, completion_window="24h"
                ),
            ]
            for call in calls:
                with pytest.raises(openai.NotFoundError):
                    call()
