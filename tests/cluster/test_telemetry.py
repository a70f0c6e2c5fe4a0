"""Traces, as a real OTLP/gRPC receiver gets them."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading

import pytest

from kvasir.cluster import telemetry
from kvasir.cluster.group_client import GroupClient
from kvasir.cluster.telemetry import Tracing
from kvasir.engine.errors import ConfigError
from kvasir.engine.event import Finished, Pooled
from kvasir.engine.request import PoolingParams, Request, SamplingParams

TRACE = "0af7651916cd43dd8448eb211c80319c"
PARENT = "b7ad6b7169203331"


async def one_request(group, tracing, headers, n=1, pooling=None):
    span = tracing.request(
        "embeddings" if pooling else "chat",
        "m",
        headers,
        {telemetry.REQUEST_MAX_TOKENS: 4, telemetry.REQUEST_SEED: None},
    )
    client = GroupClient(group.endpoint)
    client.start()
    with span.stage("admit"):
        while not client.alive:
            await asyncio.sleep(0.01)
    request = Request(
        request_id="r",
        prompt_token_ids=[1, 2, 3],
        sampling=SamplingParams(max_tokens=4, n=n),
        trace_context=span.trace_context,
        pooling=pooling,
    )
    with span.stage("route") as facts:
        facts["why"] = "only"
        stream = await client.submit(request)
    ends = [event async for event in stream if isinstance(event, (Finished, Pooled))]
    span.end(response_id="x", finish_reasons=["length"], input_tokens=3, output_tokens=4 * n)
    await client.close()
    return ends


def test_one_tree_per_request(group_of_fakes, otlp_receiver, monkeypatch):
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", otlp_receiver.endpoint)
    tracing = Tracing.from_environment({"OTEL_EXPORTER_OTLP_ENDPOINT": otlp_receiver.endpoint})

    async def main():
        async with group_of_fakes(tracing) as group:
            await one_request(group, tracing, {"traceparent": f"00-{TRACE}-{PARENT}-01"}, n=2)

    asyncio.run(main())
    tracing.shutdown()
    spans = otlp_receiver.spans
    assert sorted(span.name for span in spans) == ["admit", "chat m", "decode", "decode", "prefill", "queue", "route"]
    root = next(span for span in spans if span.name == "chat m")
    assert {span.trace_id.hex() for span in spans} == {TRACE}
    assert root.parent_span_id.hex() == PARENT
    assert {span.parent_span_id for span in spans if span is not root} == {root.span_id}
    (route,) = (span for span in spans if span.name == "route")
    assert otlp_receiver.attributes(route) == {"kvasir.route.why": "only"}
    facts = otlp_receiver.attributes(root)
    assert facts[telemetry.USAGE_INPUT_TOKENS] == 3
    assert facts[telemetry.REQUEST_MAX_TOKENS] == 4
    assert telemetry.REQUEST_SEED not in facts
    decoded = [otlp_receiver.attributes(span)[telemetry.USAGE_OUTPUT_TOKENS] for span in spans if span.name == "decode"]
    assert sum(decoded) == facts[telemetry.USAGE_OUTPUT_TOKENS] == 8


def test_a_vector_has_no_decode(group_of_fakes, otlp_receiver, monkeypatch):
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", otlp_receiver.endpoint)
    tracing = Tracing.from_environment({"OTEL_EXPORTER_OTLP_ENDPOINT": otlp_receiver.endpoint})

    async def main():
        async with group_of_fakes(tracing) as group:
            (event,) = await one_request(group, tracing, {}, pooling=PoolingParams())
            assert tuple(event.values) == (0.5, -1.0)
            assert group.service._running == {}

    asyncio.run(main())
    tracing.shutdown()
    spans = {span.name: span for span in otlp_receiver.spans}
    assert sorted(spans) == ["admit", "embeddings m", "prefill", "queue", "route"]
    assert otlp_receiver.attributes(spans["prefill"])[telemetry.USAGE_INPUT_TOKENS] == 3


def test_the_sampler_is_honoured(group_of_fakes, otlp_receiver, monkeypatch):
    environ = {"OTEL_EXPORTER_OTLP_ENDPOINT": otlp_receiver.endpoint, "OTEL_TRACES_SAMPLER": "always_off"}
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    tracing = Tracing.from_environment(environ)

    async def main():
        async with group_of_fakes(tracing) as group:
            assert await one_request(group, tracing, {})

    asyncio.run(main())
    tracing.shutdown()
    assert otlp_receiver.spans == []


def test_a_bad_state_of_a_trace_fills_no_log(otlp_receiver, monkeypatch, caplog):
    """It is dropped, and its trace goes on."""
    environ = {"OTEL_EXPORTER_OTLP_ENDPOINT": otlp_receiver.endpoint}
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    tracing = Tracing.from_environment(environ)
    headers = {"traceparent": f"00-{TRACE}-{PARENT}-01", "tracestate": "x" * 1000 + ","}
    span = tracing.request("chat", "m", headers)
    assert TRACE in span.trace_context["traceparent"]
    assert "tracestate" not in span.trace_context
    span.end()
    tracing.shutdown()
    assert caplog.records == []


@pytest.mark.parametrize("environ", [{}, {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://x", "OTEL_TRACES_EXPORTER": "none"}])
def test_off_costs_nothing(group_of_fakes, environ):
    tracing = Tracing.from_environment(environ)
    span = tracing.request("chat", "m", {})
    assert span.trace_context == {}

    async def main():
        async with group_of_fakes(tracing) as group:
            assert await one_request(group, tracing, {})

    asyncio.run(main())


def test_off_imports_nothing():
    code = "import sys; from kvasir.cluster.telemetry import Tracing"
    code += "; Tracing.from_environment({}).request('chat', 'm', {})"
    code += "; sys.exit('opentelemetry' in sys.modules or 'torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_other_protocols_are_refused():
    environ = {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://x", "OTEL_EXPORTER_OTLP_PROTOCOL": "http/protobuf"}
    with pytest.raises(ConfigError, match="http/protobuf"):
        Tracing.from_environment(environ)


def test_only_otel_variables_travel():
    environ = {"OTEL_SERVICE_NAME": "s", "AWS_SECRET_ACCESS_KEY": "k"}
    assert telemetry.otel_environment(environ) == {"OTEL_SERVICE_NAME": "s"}


def test_who_ends_waits_for_no_receiver(monkeypatch):
    """One that is down was waited for half a minute, by every process."""
    monkeypatch.setattr(telemetry, "SHUTDOWN_S", 0.01)

    class Provider:
        left = threading.Event()

        def get_tracer(self, name):
            return None

        def shutdown(self):
            assert self.left.wait(60)

    Tracing(Provider()).shutdown()
    assert not Provider.left.is_set()
    Provider.left.set()
