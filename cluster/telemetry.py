"""Traces: one per request, from the gateway to the ranks, under OpenTelemetry's GenAI names (metrics' names too).

Exported by OTLP/gRPC as the standard OTEL_* variables say; without an endpoint nothing is imported and nothing is done.
Parents travel in our own messages, never in context variables: spans of one request are made in three threads.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from kvasir.engine.errors import ConfigError
from kvasir.engine.event import Finished, Pooled, Timing
from kvasir.engine.request import Request

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.trace import Span, Tracer

PROVIDER = "kvasir"
OPERATION_NAME = "gen_ai.operation.name"
PROVIDER_NAME = "gen_ai.provider.name"
REQUEST_MODEL = "gen_ai.request.model"
REQUEST_MAX_TOKENS = "gen_ai.request.max_tokens"
REQUEST_TEMPERATURE = "gen_ai.request.temperature"
REQUEST_TOP_P = "gen_ai.request.top_p"
REQUEST_TOP_K = "gen_ai.request.top_k"
REQUEST_SEED = "gen_ai.request.seed"
REQUEST_CHOICE_COUNT = "gen_ai.request.choice.count"
REQUEST_DIMENSIONS = "gen_ai.embeddings.dimension.count"
RESPONSE_ID = "gen_ai.response.id"
RESPONSE_MODEL = "gen_ai.response.model"
RESPONSE_FINISH_REASONS = "gen_ai.response.finish_reasons"
USAGE_INPUT_TOKENS = "gen_ai.usage.input_tokens"
USAGE_OUTPUT_TOKENS = "gen_ai.usage.output_tokens"
USAGE_CACHED_TOKENS = "gen_ai.usage.cache_read.input_tokens"
ERROR_TYPE = "error.type"
INDEX = "kvasir.continuation.index"
PREEMPTIONS = "kvasir.preemptions"

REQUEST_DURATION_METRIC = "gen_ai.server.request.duration"
TIME_TO_FIRST_TOKEN_METRIC = "gen_ai.server.time_to_first_token"
TIME_PER_OUTPUT_TOKEN_METRIC = "gen_ai.server.time_per_output_token"

ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
DEFAULTS = {"OTEL_TRACES_SAMPLER": "parentbased_always_on", "OTEL_BSP_SCHEDULE_DELAY": "500"}
"""Every trace whose caller didn't decide otherwise; exported half a second after a span ends."""

SHUTDOWN_S = 3.0
"""How long the last spans may take. The SDK tries for half a minute where nobody receives them, and processes wait for it."""


def otel_environment(environ: Mapping[str, str]) -> dict[str, str]:
    """What the processes of an application must know of the environment it was started in."""
    return {name: value for name, value in environ.items() if name.startswith("OTEL_")}


def log_to_stderr(level: str) -> None:
    """Plain lines of our own loggers from this level on; Ray carries stderr to the terminal of `kvasir serve`."""
    logging.basicConfig(format="%(levelname)s %(message)s")
    logging.getLogger("kvasir").setLevel(level.upper())


@dataclass
class RequestSpan:
    """A request at its gateway: a SERVER span with stages as children. Does nothing when tracing is off."""

    tracer: Tracer | None = None
    span: Span | None = None
    trace_context: dict[str, str] = field(default_factory=dict)
    """For Request.trace_context: the parent of the group's spans."""

    @contextmanager
    def stage(self, name: str) -> Iterator[dict[str, str | int | float]]:
        """A child span: `admit` (validate, tokenise, wait for a place) or `route` (choose a group). What is put into the
        dictionary becomes its attributes, as kvasir.`name`.KEY."""
        facts: dict[str, str | int | float] = {}
        if self.tracer is None or self.span is None:
            yield facts
            return
        from opentelemetry.trace import set_span_in_context

        child = self.tracer.start_span(name, context=set_span_in_context(self.span))
        try:
            yield facts
        finally:
            child.set_attributes({f"kvasir.{name}.{key}": value for key, value in facts.items()})
            child.end()

    def end(
        self,
        *,
        response_id: str = "",
        finish_reasons: Sequence[str] = (),
        input_tokens: int = 0,
        output_tokens: int = 0,
        cached_tokens: int = 0,
        error: str | None = None,
    ) -> None:
        """The answer is complete, or failed with `error` (a code of errors.ERRORS)."""
        if self.span is None:
            return
        usage = {USAGE_INPUT_TOKENS: input_tokens, USAGE_OUTPUT_TOKENS: output_tokens}
        usage[USAGE_CACHED_TOKENS] = cached_tokens
        self.span.set_attributes({**usage, RESPONSE_FINISH_REASONS: list(finish_reasons), RESPONSE_ID: response_id})
        if error is not None:
            from opentelemetry.trace import StatusCode

            self.span.set_attribute(ERROR_TYPE, error)
            self.span.set_status(StatusCode.ERROR)
        self.span.end()


class Tracing:
    """A process's way to make spans; inert unless OTEL_* names an endpoint."""

    def __init__(self, provider: TracerProvider | None = None) -> None:
        self._provider = provider
        self._tracer = provider.get_tracer("kvasir") if provider else None

    @classmethod
    def from_environment(cls, environ: Mapping[str, str]) -> Tracing:
        """Export as the OTEL_* variables in `environ` say. Raises ConfigError for a protocol other than gRPC."""
        off = environ.get("OTEL_TRACES_EXPORTER", "otlp") == "none" or environ.get("OTEL_SDK_DISABLED", "") == "true"
        if off or not any(environ.get(name) for name in ENDPOINTS):
            return cls()
        _check_protocol(environ)
        # a client's bad tracestate is no news of ours
        logging.getLogger("opentelemetry.trace.span").setLevel(logging.ERROR)
        os.environ.update(DEFAULTS | {"OTEL_SERVICE_NAME": "kvasir"} | otel_environment(environ))
        return cls(_provider())

    def request(
        self, operation: str, model: str, headers: Mapping[str, str], facts: Mapping[str, str | int | float | None] = {}
    ) -> RequestSpan:
        """The span of a request: `operation` is chat or text_completion, `facts` are attributes (None: left out).

        `headers` (lower case) may hold the caller's traceparent.
        """
        if self._tracer is None:
            return RequestSpan()
        from opentelemetry.trace import SpanKind, set_span_in_context
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        propagator = TraceContextTextMapPropagator()
        names = {OPERATION_NAME: operation, PROVIDER_NAME: PROVIDER, REQUEST_MODEL: model}
        known = {name: value for name, value in facts.items() if value is not None}
        span = self._tracer.start_span(
            f"{operation} {model}",
            context=propagator.extract(dict(headers)),
            kind=SpanKind.SERVER,
            attributes={**names, **known},
        )
        carrier: dict[str, str] = {}
        propagator.inject(carrier, context=set_span_in_context(span))
        return RequestSpan(self._tracer, span, carrier)

    def stages(self, request: Request, finished: Finished | Pooled) -> None:
        """The group's spans of one continuation: queue and prefill (once per request), decode."""
        if self._tracer is None or not request.trace_context:
            return
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        parent = TraceContextTextMapPropagator().extract(dict(request.trace_context))
        for name, start, end, facts in _stages(finished, finished.timing):
            if finished.index == 0 or name == "decode":
                span = self._tracer.start_span(name, context=parent, start_time=_ns(start), attributes=facts)
                span.end(_ns(end))

    def shutdown(self) -> None:
        """Export what is left, if that is soon done."""
        if self._provider is not None:
            last = threading.Thread(target=self._provider.shutdown, daemon=True)
            last.start()
            last.join(SHUTDOWN_S)


def _check_protocol(environ: Mapping[str, str]) -> None:
    for name in ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL"):
        if environ.get(name, "grpc") != "grpc":
            why = f"{name}={environ[name]} isn't supported; set it to grpc (collectors listen for that on port 4317)"
            raise ConfigError(why, param=name)


def _provider() -> TracerProvider:
    from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    provider = TracerProvider(shutdown_on_exit=True)
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    return provider


def _stages(
    finished: Finished | Pooled, timing: Timing
) -> Iterator[tuple[str, float, float, dict[str, str | int | list[str]]]]:
    """(name, start, end, attributes) of the stages that the continuation reached."""
    yield "queue", timing.queued, timing.scheduled or timing.finished, {}
    if timing.scheduled:
        usage = {USAGE_INPUT_TOKENS: finished.prompt_tokens, USAGE_CACHED_TOKENS: finished.cached_tokens}
        yield "prefill", timing.scheduled, timing.first_token or timing.finished, {**usage}
    if timing.first_token and isinstance(finished, Finished):
        facts = {USAGE_OUTPUT_TOKENS: finished.output_tokens, INDEX: finished.index, PREEMPTIONS: finished.preemptions}
        yield "decode", timing.first_token, timing.finished, {**facts, RESPONSE_FINISH_REASONS: [finished.reason]}


def _ns(seconds: float) -> int:
    return int(seconds * 1e9)
