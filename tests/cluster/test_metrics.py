"""/metrics: what third-party tools query is there, and counts what happened."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import re
import socket
from types import SimpleNamespace

import grpc
import httpx
import pytest
from fake_gateway import FakeGroup
from kserve_requests import changed
from prometheus_client.parser import text_string_to_metric_families
from waiting import until

from kvasir.cluster import siblings
from kvasir.cluster.all_metrics import merged
from kvasir.cluster.config import GatewayConfig
from kvasir.cluster.gateway import close_app, create_app
from kvasir.cluster.metrics import Metrics
from kvasir.engine.errors import UnavailableError
from kvasir.engine.event import Finished
from kvasir.engine.request import Request, SamplingParams
from kvasir.proto import inference_pb2
from kvasir.proto.inference_pb2_grpc import InferenceStub
from kvasir.proto.open_inference_pb2_grpc import GRPCInferenceServiceStub

NOT_MEASURED = {
    "vllm:iteration_tokens_total",
    "vllm:kv_block_idle_before_evict_seconds",
    "vllm:kv_block_lifetime_seconds",
    "vllm:kv_block_reuse_gap_seconds",
    "vllm:external_prefix_cache_hits",
    "vllm:external_prefix_cache_queries",
    "vllm:mm_cache_hits",
    "vllm:mm_cache_queries",
    "vllm:corrupted_requests",
}
"""Queried by tools, and not known here: no block statistics, no multimodal input, no external cache."""


FAILED = "kvasir:request_failed_total"


def samples(gateway):
    """{(name, labels...): value}."""
    families = text_string_to_metric_families(httpx.get(gateway.url + "/metrics").text)
    return {(s.name, *sorted(s.labels.items())): s.value for family in families for s in family.samples}


def value(found, name, **labels):
    """Sum over the series of `name` that have `labels`."""
    return sum(v for (series, *rest), v in found.items() if series == name and labels.items() <= dict(rest).items())


@pytest.fixture
def live(live_gateway):
    with live_gateway() as gateway:
        yield gateway


def complete(gateway, **fields):
    return httpx.post(gateway.url + "/v1/completions", json={"model": "bytes", "prompt": "Hi"} | fields)


def test_counts_and_times(live):
    complete(live)
    complete(live, n=2, max_tokens=4, stream=True)
    complete(live, prompt=["a", "b"])
    complete(live, temperature=-1)
    live.group.dies_after = 2
    complete(live)
    found = samples(live)
    assert value(found, "vllm:request_success_total", model_name="bytes", finished_reason="stop") == 3
    assert value(found, "vllm:request_success_total", finished_reason="length") == 1
    assert value(found, "kvasir:request_failed_total", code="invalid_request_error") == 1
    assert value(found, "kvasir:request_failed_total", code="unavailable") == 1
    assert value(found, "vllm:time_to_first_token_seconds_count") == 5
    assert value(found, "vllm:e2e_request_latency_seconds_count") == 4
    assert value(found, "vllm:request_prompt_tokens_sum") == 8
    assert value(found, "vllm:request_generation_tokens_sum") == 15 + 8 + 30
    assert value(found, "vllm:request_max_num_generation_tokens_sum") == 15 + 4 + 30
    assert value(found, "vllm:request_params_n_sum") == 6
    assert value(found, "vllm:request_prefill_kv_computed_tokens_count") == 4
    assert value(found, "vllm:inter_token_latency_seconds_count") >= 10
    labels = {
        "gen_ai_operation_name": "text_completion",
        "gen_ai_provider_name": "kvasir",
        "gen_ai_request_model": "bytes",
    }
    assert value(found, "gen_ai_server_request_duration_seconds_count", **labels) == 4
    assert value(found, "gen_ai_server_time_to_first_token_seconds_count", **labels) == 5
    assert value(found, "gen_ai_server_time_per_output_token_seconds_count", **labels) == 5


def test_a_refusal_before_a_model_is_known_is_counted_without_one(live):
    assert complete(live, stream="x").status_code == 400
    assert complete(live, model="nobody").status_code == 404
    assert httpx.post(live.url + "/v1/completions", json={}, headers={"x-request-id": "a" * 999}).status_code == 400
    assert httpx.get(live.url + "/nowhere").status_code == 404
    assert complete(live, temperature=-1).status_code == 400
    live.group.dies_after = 2
    assert complete(live).status_code == 503
    found = samples(live)
    counts = {"invalid_request_error": 2, "model_not_found": 1, "unknown_url": 1}
    assert {code: value(found, FAILED, model_name="", code=code) for code in counts} == counts
    assert value(found, FAILED) == sum(counts.values()) + 2  # those of the model count once


def without_a_model(live):
    """{code: how many}; of all that was refused or failed, which is nothing else."""
    found = samples(live)
    failed = {
        dict(rest)["code"]: v for (name, *rest), v in found.items() if name == FAILED and ("model_name", "") in rest
    }
    assert value(found, FAILED) == sum(failed.values())
    return failed


def test_so_is_what_grpc_refuses(live_gateway):
    config = GatewayConfig(api_key=("secret",), failover_timeout_s=0)
    with live_gateway(config) as live, grpc.insecure_channel(live.grpc_address) as channel:
        inference, tensors = InferenceStub(channel), GRPCInferenceServiceStub(channel)
        key = ("authorization", "Bearer secret")
        refused = [
            lambda: inference.Embed(inference_pb2.EmbedRequest(), timeout=60),
            lambda: inference.Embed(
                inference_pb2.EmbedRequest(), metadata=[key, ("x-request-id", "a" * 999)], timeout=60
            ),
            lambda: inference.Tokenize(inference_pb2.TokenizeRequest(model="nobody"), metadata=[key], timeout=60),
            lambda: [*inference.Generate(inference_pb2.GenerateRequest(model="nobody", text="a"), metadata=[key])],
        ]
        for call in refused:
            with pytest.raises(grpc.RpcError):
                call()
        asked = iter([changed(lambda request: setattr(request, "model_name", "nobody"))])
        assert [reply.error_message != "" for reply in tensors.ModelStreamInfer(asked, metadata=[key])] == [True]
        live.group.dies_after = 2
        with pytest.raises(grpc.RpcError):
            [*inference.Generate(inference_pb2.GenerateRequest(text="a"), metadata=[key])]
        text = live.desk.metrics.render().decode()
    found = {line.partition("{")[2] for line in text.splitlines() if line.startswith(FAILED)}
    assert found == {
        'code="invalid_api_key",model_name=""} 1.0',
        'code="invalid_request_error",model_name=""} 1.0',
        'code="model_not_found",model_name=""} 3.0',
        'code="unavailable",model_name="bytes"} 1.0',
    }


def test_so_is_what_is_no_request(live):
    """The application never sees it."""
    with socket.create_connection(("localhost", httpx.URL(live.url).port), timeout=60) as sock:
        sock.sendall(b"\0\0\r\n\r\n")
        while sock.recv(4096):
            pass
    assert without_a_model(live) == {"invalid_request_error": 1}


def test_so_are_lines_of_a_batch(live):
    def batch(*lines):
        data = b"".join(json.dumps(line).encode() + b"\n" for line in lines)
        file = httpx.post(live.url + "/v1/files", data={"purpose": "batch"}, files={"file": data}).json()["id"]
        body = {"input_file_id": file, "endpoint": "/v1/completions", "completion_window": "24h"}
        made = httpx.post(live.url + "/v1/batches", json=body).json()["id"]
        return until(lambda: _ended(httpx.get(f"{live.url}/v1/batches/{made}").json()))

    def line(number, **fields):
        body = {"model": "bytes", "prompt": "Hi", **fields}
        return {"custom_id": str(number), "method": "POST", "url": "/v1/completions", "body": body}

    assert batch({}, line(1), [], line(1))["status"] == "failed"
    assert without_a_model(live) == {"invalid_request_error": 3}
    assert batch(line(1), line(2, model="nobody"), line(3, stop=1))["request_counts"]["failed"] == 2
    assert without_a_model(live) == {"invalid_request_error": 4, "model_not_found": 1}


def _ended(batch):
    return batch["status"] in ("failed", "completed") and batch


def test_the_groups_stats(live):
    found = samples(live)
    assert value(found, "vllm:num_requests_running", model_name="bytes", engine="group-1") == 3
    assert value(found, "vllm:num_requests_waiting") == 1
    assert value(found, "vllm:kv_cache_usage_perc") == 0.25
    assert value(found, "vllm:prefix_cache_queries_total") == 40
    assert value(found, "vllm:prefix_cache_hits_total") == 16
    assert value(found, "kvasir:kv_blocks_stored_total", tier="disk", model_name="bytes") == 7
    assert value(found, "kvasir:kv_blocks_stored_total", tier="host") == 0
    assert value(found, "kvasir:kv_tier_bytes", tier="host") == 9
    assert value(found, "kvasir:group_alive") == 1
    live.group.alive = False
    found = samples(live)
    assert value(found, "kvasir:group_alive") == 0
    assert not any(name == "vllm:num_requests_running" for name, *_ in found)


def test_a_group_keeps_its_series_when_another_is_replaced():
    groups = [FakeGroup() for _ in "abc"]
    for group, name in zip(groups, "abc", strict=True):
        group.name, group.stats = name, dataclasses.replace(group.stats, prefix_hits=ord(name))

    def hits(*known):
        text = Metrics.render_groups(SimpleNamespace(clients=lambda _: known), ["bytes"]).decode()
        return set(
            re.findall(r'^vllm:prefix_cache_hits_total{engine="(.)",model_name="bytes"} (.*)$', text, re.MULTILINE)
        )

    a, b, c = groups
    assert hits(a, b) == hits(b, a) == {("a", "97.0"), ("b", "98.0")}
    assert hits(b, c) == {("b", "98.0"), ("c", "99.0")}


def test_what_is_known_of_blocks(live):
    """Even of groups that hold nothing."""
    (directory,) = live.desk.directory.blocks().values()
    other = directory.join()
    directory.change(other, "disk", range(1, 8), ())
    directory.dropped["host"] = 3
    found = samples(live)
    for tier, blocks, dropped in (("device", 0, 0), ("host", 0, 3), ("disk", 7, 0)):
        labels = {"model_name": "bytes", "tier": tier}
        assert value(found, "kvasir:directory_blocks", **labels) == blocks
        assert value(found, "kvasir:directory_blocks_dropped_total", **labels) == dropped
    assert value(found, "kvasir:directory_room_blocks", model_name="bytes") == directory.max_holdings - 7


def test_a_client_that_leaves_is_counted(live):
    live.group.step_s, live.group.script = 0.02, lambda *_: [65] * 2000
    body = {"prompt": "Hi", "stream": True, "max_tokens": 2000}
    with httpx.stream("POST", live.url + "/v1/completions", json=body) as reply:
        next(reply.iter_lines())
    until(lambda: value(samples(live), "kvasir:request_failed_total", code="cancelled") == 1)


def test_what_tools_query_is_there(live, data):
    """Each query of a third-party tool finds a series under its name, with the model's label; regular expressions find
    one name only, so that sums over them don't count twice."""
    queries = data("traces-inference-perf/tests/required/client/metricsclient/goldens/vllm_queries.txt").read_text()
    complete(live)
    names = {name for name, *labels in samples(live) if ("model_name", "bytes") in labels}
    plain = set(re.findall(r"(vllm:\w+)\{", queries))
    patterns = set(re.findall(r'__name__=~"([^"]+)"', queries))
    assert len(plain) > 20
    assert len(patterns) > 5
    unmeasured = re.compile("|".join(NOT_MEASURED))
    assert {name for name in plain if name not in names and not unmeasured.match(name)} == set()
    for pattern in patterns:
        if not unmeasured.match(pattern):
            assert len([name for name in names if re.fullmatch(pattern, name)]) == 1, pattern


def test_unmeasured_names_are_not_made_up(live):
    assert not any(name.startswith(tuple(NOT_MEASURED)) for name, *_ in samples(live))


def test_of_several_gateways():
    """Each has its own series; what they share, their groups, is told once."""
    texts = {}
    for name, calls in (("a", 1), ("b", 3)):
        own = Metrics()
        for number in range(calls):
            request = Request(request_id=str(number), prompt_token_ids=[1], sampling=SamplingParams())
            record = own.call("bytes", "chat", [request], 0.0)
            record.tokens(0)
            record.tokens(0)
            record.finished(0, Finished(str(number), 0, "stop"))
        texts[name] = own.render().decode()
    families = {family.name: family for family in text_string_to_metric_families(merged(texts).decode())}
    ends = {(s.labels["gateway"], s.name): s.value for s in families["vllm:request_success"].samples}
    assert ends["a", "vllm:request_success_total"] == 1
    assert ends["b", "vllm:request_success_total"] == 3
    gaps = families["vllm:inter_token_latency_seconds"]
    assert gaps.type == "histogram"
    counts = [s.value for s in gaps.samples if s.labels == {"gateway": "b", "model_name": "bytes"}]
    assert counts[0] == 3
    buckets = [s for s in gaps.samples if s.labels["gateway"] == "b" and s.name.endswith("_bucket")]
    assert [s.labels["le"] for s in (buckets[0], buckets[-1])] == ["0.001", "+Inf"]
    assert buckets[-1].value == 3
    assert [s.value for s in buckets] == sorted(s.value for s in buckets)


def test_labels_are_the_same_when_nobody_else_answers(live):
    """Of gateways that share a port: the label is there before others are known, and when they are slow."""
    complete(live)

    async def scrape(others):
        async def told():
            return others

        app = create_app(live.desk, live.config, other_metrics=told)
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://gateway") as client:
            text = (await client.get("/metrics")).text
        await close_app(app)
        return [s for family in text_string_to_metric_families(text) for s in family.samples]

    def labelled(others):
        found = [s for s in asyncio.run(scrape(others)) if s.name == "vllm:request_success_total"]
        assert found
        return {s.labels.get("gateway") for s in found}

    own = live.desk.recordings.gateway
    other = live.desk.metrics.render().decode()
    assert labelled(None) == {None}
    assert labelled({}) == {own}
    assert labelled({"b": other}) == {own, "b"}


def test_who_does_not_answer_is_taken_to_be_as_it_was():
    answers = iter(
        [
            [("a", "1"), ("b", "1"), ("c", "1")],
            [("a", "2"), RuntimeError("slow"), ("c", "2")],
            TimeoutError(),
            [("a", "4"), ("c", "4")],
        ]
    )

    async def ask():
        if isinstance(answer := next(answers), TimeoutError):
            raise answer
        return answer

    async def told():
        gateways = siblings.Siblings(ask)
        return [await gateways.told() for _ in range(4)]

    first, second, third, fourth = asyncio.run(told())
    assert first == {"a": "1", "b": "1", "c": "1"}
    assert second == third == {"a": "2", "b": "1", "c": "2"}
    assert fourth == {"a": "4", "c": "4"}


def test_who_looks_for_a_gateway_while_all_are_asked_waits_for_the_answer(monkeypatch):
    """And who asks a moment later, behind somebody who asked for one that isn't there, is answered, too."""
    monkeypatch.setattr(siblings, "PAUSE_S", 0.05)
    asked, there = [], [("a", "door")]

    async def ask():
        asked.append(len(there))
        await asyncio.sleep(0.01)
        return [*there]

    async def found():
        doors = siblings.Siblings(ask)
        first = await asyncio.gather(doors.find("a"), doors.find("a"), doors.find("nobody"))
        there.append(("b", "another"))
        return first, await asyncio.gather(doors.find("b"), doors.find("a"))

    assert asyncio.run(found()) == (["door", "door", None], ["another", "door"])
    assert asked == [1, 2]


def test_of_a_gateway_that_does_not_answer_nobody_says_that_it_is_not_there(monkeypatch):
    monkeypatch.setattr(siblings, "PAUSE_S", 0.0)
    answers = iter([TimeoutError(), [("a", "door"), RuntimeError("held up")], [("a", "door"), ("b", "another")]])

    async def ask():
        if isinstance(answer := next(answers), TimeoutError):
            raise answer
        return answer

    async def found():
        doors = siblings.Siblings(ask)
        for _ in range(2):
            with pytest.raises(UnavailableError):
                await doors.find("b")
        return await doors.find("a"), await doors.find("b"), await doors.find("a")

    assert asyncio.run(found()) == ("door", "another", "door")
