"""The Open Inference Protocol beside its answers: its definition, statistics, limits, overload, and who may ask."""

from __future__ import annotations

import queue
import time
from pathlib import Path

import grpc
import httpx
import pytest
from google.protobuf.descriptor_pb2 import FileDescriptorProto, FileDescriptorSet
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_tools import protoc
from kserve_requests import asking
from waiting import until

from kvasir.cluster import grpc_api, open_inference_api
from kvasir.cluster.config import GatewayConfig
from kvasir.cluster.metrics import Metrics
from kvasir.cluster.open_inference_statistics import statistics
from kvasir.engine.errors import OverloadedError
from kvasir.proto import open_inference_pb2 as pb
from kvasir.proto.open_inference_pb2_grpc import GRPCInferenceServiceStub

PUBLISHED = (
    ("kserve+open-inference-protocol", "open_inference_grpc.proto"),
    ("triton-inference-server+common", "grpc_service.proto"),
)
PROBES = ("ServerLive", "ServerReady", "ModelReady")


def test_names_and_numbers_are_the_published_ones(data, tmp_path):
    """Each message, field and method of ours is KServe's or Triton's."""
    published = {}
    for folder, name in PUBLISHED:
        out = tmp_path / name
        source = data(f"api-grpc/{folder}")
        assert protoc.main(["protoc", f"-I{source}", f"--descriptor_set_out={out}", str(source / name)]) == 0
        published |= shape(FileDescriptorSet.FromString(out.read_bytes()).file[-1])
    ours = FileDescriptorProto()
    pb.DESCRIPTOR.CopyToProto(ours)
    assert len(shape(ours)) > 60
    assert shape(ours).items() <= published.items()


def shape(file: FileDescriptorProto) -> dict[str, tuple]:
    """Name of each field and method -> what is on the wire."""
    found = {}
    messages = [(message.name, message) for message in file.message_type]
    while messages:
        name, message = messages.pop()
        messages += [(f"{name}.{inner.name}", inner) for inner in message.nested_type]
        found |= {f"{name}.{f.name}": (f.number, f.type, f.label, f.type_name) for f in message.field}
    for service in file.service:
        for m in service.method:
            found[f"{file.package}.{service.name}/{m.name}"] = (
                m.input_type, m.output_type, m.client_streaming, m.server_streaming,
            )  # fmt: skip
    return found


def test_statistics(live_gateway, connect):
    """They count what came by any protocol."""
    with live_gateway() as gateway:
        stub = connect(gateway)
        (before,) = stub.ModelStatistics(pb.ModelStatisticsRequest(), timeout=60).model_stats
        assert (before.name, before.version, before.last_inference, before.inference_count) == ("bytes", "1", 0, 0)
        began = time.time()
        stub.ModelInfer(asking(sampling={"n": 2}), timeout=60)
        body = {"model": "bytes", "prompt": ["a", "b"], "max_tokens": 3}
        assert httpx.post(gateway.url + "/v1/completions", json=body, timeout=60).status_code == 200
        with pytest.raises(grpc.RpcError):
            stub.ModelInfer(asking(sampling={"max_tokens": 9999}), timeout=60)
        (after,) = stub.ModelStatistics(
            pb.ModelStatisticsRequest(name="alias/bytes", version="1"), timeout=10
        ).model_stats
        found = {field.name: value.count for field, value in after.inference_stats.ListFields()}
        assert found == {"success": 3, "fail": 1, "queue": 3, "compute_infer": 4}
        assert after.inference_count == 3
        assert after.inference_stats.success.ns >= after.inference_stats.compute_infer.ns / 4 > 0
        assert 1000 * began - 1 <= after.last_inference <= 1000 * time.time() + 1
        for request in (pb.ModelStatisticsRequest(name="other"), pb.ModelStatisticsRequest(version="2")):
            with pytest.raises(grpc.RpcError) as caught:
                stub.ModelStatistics(request, timeout=60)
            assert caught.value.code() == grpc.StatusCode.NOT_FOUND


def test_statistics_of_several_gateways():
    texts = []
    for count in (1, 2):
        metrics = Metrics()
        for _ in range(count):
            metrics.call("m", "text_completion", [], 0.0)
            metrics.failed("m", "unavailable")
        texts.append(metrics.render().decode())
    m, other = statistics(texts, ["m", "other"]).model_stats
    assert m.inference_stats.fail.count == 3
    assert m.last_inference > 0
    assert other == pb.ModelStatistics(name="other", version="1", inference_stats=other.inference_stats)


def test_cancellation_deadlines_and_limits(live_gateway, connect, monkeypatch):
    monkeypatch.setattr(open_inference_api, "MAX_AT_ONCE", 2)
    with live_gateway() as gateway:
        stub, group = connect(gateway), gateway.group
        group.step_s = 0.05  # longer than anybody waits for an end
        group.script = lambda request, index: [65] * 2000
        whole = asking(sampling={"max_tokens": 2000})
        requests = queue.Queue()
        for request in (asking(stream=True, sampling={"max_tokens": 2000}), whole, whole):
            requests.put(request)
        call = stub.ModelStreamInfer(iter(requests.get, None), timeout=60)
        next(call)
        until(lambda: group.running == 2)
        call.cancel()
        requests.put(None)
        until(lambda: not group.running and not gateway.desk.running)
        assert len(group.requests) == 2  # the third one wasn't read
        with pytest.raises(grpc.RpcError) as caught:
            stub.ModelInfer(whole, timeout=0.2)
        assert caught.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED
        until(lambda: not group.running and not gateway.desk.running)


def test_a_stream_ends_whose_client_takes_nothing(live_gateway, monkeypatch):
    """Whole: an answer of which something were missing would look as if it went on, to who reads again."""
    monkeypatch.setattr(grpc_api, "_gone_after", lambda limit_s: [])  # it is there, but may be held up
    little = [("grpc.http2.bdp_probe", 0), ("grpc.http2.lookahead_bytes", 4096)]
    requests = queue.Queue()  # more may come
    requests.put(asking("x" * 200_000, sampling={"truncate_prompt_tokens": 3, "max_tokens": 1}))
    requests.put(asking(stream=True, sampling={"max_tokens": 2000}))
    with (
        live_gateway(GatewayConfig(receive_timeout_s=0.3)) as gateway,
        grpc.insecure_channel(gateway.grpc_address, little) as channel,
    ):
        gateway.group.step_s = 0.05
        gateway.group.script = lambda request, index: [65] * 2000
        call = GRPCInferenceServiceStub(channel).ModelStreamInfer(iter(requests.get, None), timeout=60)
        until(lambda: gateway.group.aborted and not gateway.desk.running)
        with pytest.raises(grpc.RpcError) as caught:
            list(call)
        requests.put(None)
    assert caught.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
    assert "took no message for 0.3 s (--receive-timeout)" in caught.value.details()


def test_overload_drain_and_bugs(live_gateway, connect, caplog):
    with live_gateway() as gateway:
        stub = connect(gateway)
        gateway.group.refusal = OverloadedError("the queue is full", retry_after_s=2.0)
        with pytest.raises(grpc.RpcError) as caught:
            stub.ModelInfer(asking(), timeout=60)
        assert caught.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
        assert dict(caught.value.trailing_metadata())["retry-after"] == "2"
        gateway.desk.draining = True
        assert not stub.ServerReady(pb.ServerReadyRequest(), timeout=60).ready
        assert not stub.ModelReady(pb.ModelReadyRequest(name="bytes"), timeout=60).ready
        assert stub.ServerLive(pb.ServerLiveRequest(), timeout=60).live
        gateway.desk.draining, gateway.group.alive = False, False
        assert not stub.ServerLive(pb.ServerLiveRequest(), timeout=60).live
        gateway.desk.directory = None
        (reply,) = stub.ModelStreamInfer(iter([asking()]), timeout=60)
        assert "AttributeError" not in reply.error_message
    assert "AttributeError" in caplog.text


def test_probes_need_no_key(live_gateway, connect):
    with live_gateway(GatewayConfig(api_key=("secret",))) as gateway:
        stub = connect(gateway)
        service = pb.DESCRIPTOR.services_by_name["GRPCInferenceService"]
        for name, method in service.methods_by_name.items():
            request = getattr(pb, method.input_type.name)()
            call = getattr(stub, name)
            if name in PROBES:
                assert call(request, timeout=60) is not None
                continue
            with pytest.raises(grpc.RpcError) as caught:
                list(call(iter([request]), timeout=60)) if method.client_streaming else call(request, timeout=60)
            assert caught.value.code() == grpc.StatusCode.UNAUTHENTICATED, name
        metadata = (("authorization", "Bearer secret"),)
        assert stub.ModelInfer(asking(), timeout=60, metadata=metadata).outputs
        with grpc.insecure_channel(gateway.grpc_address) as channel:
            health = health_pb2_grpc.HealthStub(channel)
            request = health_pb2.HealthCheckRequest(service="inference.GRPCInferenceService")
            assert health.Check(request, timeout=60).status == health_pb2.HealthCheckResponse.SERVING


def test_every_field_is_commented():
    """Readers of the definition find what becomes of each."""
    source = Path(open_inference_api.__file__).parents[1] / "proto" / "inference" / "open_inference.proto"
    lines = source.read_text().splitlines()
    ends = [number for number, line in enumerate(lines) if line.startswith("  ") and line.endswith(";")]
    assert [lines[number] for number in ends if not lines[number - 1].strip().startswith("//")] == []
