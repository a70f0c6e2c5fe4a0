"""ModelStatistics of open_inference.proto: read off /metrics, so that both say the same."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence

from prometheus_client.parser import text_string_to_metric_families

from kvasir.cluster.metrics import LAST_REQUEST
from kvasir.cluster.open_inference_wire import VERSION
from kvasir.proto import open_inference_pb2 as pb

_DURATIONS = {
    "success": "vllm:e2e_request_latency_seconds",
    "queue": "vllm:request_queue_time_seconds",
    "compute_infer": "vllm:request_inference_time_seconds",
}
"""Field of InferStatistics -> histogram."""
_SUMS = frozenset(
    {"kvasir:request_failed_total", *(f"{name}_{of}" for name in _DURATIONS.values() for of in ("sum", "count"))}
)


def statistics(texts: Iterable[str], models: Sequence[str]) -> pb.ModelStatisticsResponse:
    """Of each of `models`, in their order. texts: own series of each gateway, in Prometheus' text format."""
    found: dict[tuple[str, str], float] = defaultdict(float)
    for text in texts:
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                key = sample.labels.get("model_name", ""), sample.name
                if sample.name in _SUMS:
                    found[key] += sample.value
                elif sample.name == LAST_REQUEST:
                    found[key] = max(found[key], sample.value)
    reply = pb.ModelStatisticsResponse()
    for model in models:
        one = reply.model_stats.add(name=model, version=VERSION)
        one.last_inference = round(1000 * found[model, LAST_REQUEST])
        for field, name in _DURATIONS.items():
            duration = getattr(one.inference_stats, field)
            duration.count = round(found[model, f"{name}_count"])
            duration.ns = round(1e9 * max(0.0, found[model, f"{name}_sum"]))
        one.inference_stats.fail.count = round(found[model, "kvasir:request_failed_total"])
        one.inference_count = one.inference_stats.success.count
    return reply
