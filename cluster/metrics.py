"""What /metrics says: the gateway's own measurements and its groups' Stats, under the names that tools query.

vLLM's names (as of 0.32), and OpenTelemetry's gen_ai.server.* in Prometheus' spelling.
"""

from __future__ import annotations

import time
from bisect import bisect_left
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import accumulate

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector
from prometheus_client.exposition import generate_latest
from prometheus_client.metrics_core import HistogramMetricFamily, Metric
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from kvasir.cluster import telemetry
from kvasir.cluster.group_directory import GroupDirectory
from kvasir.engine.errors import KvasirError
from kvasir.engine.event import Finished, Pooled
from kvasir.engine.request import Request

LAST_REQUEST = "kvasir:last_request_timestamp_seconds"
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

_SHORT_S = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 0.75, 1, 2.5, 5, 10, 20, 40)
_LONG_S = (0.01, 0.05, 0.1, 0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920)
_TOKENS = tuple(float(step * 10**power) for power in range(7) for step in (1, 2, 5))
_COUNT = (1.0, 2.0, 5.0, 10.0, 20.0)

_HISTOGRAMS: dict[str, tuple[str, Sequence[float]]] = {
    "time_to_first_token_seconds": ("Seconds from the request's arrival to its first token.", _SHORT_S),
    "request_time_per_output_token_seconds": ("Mean seconds per output token behind the first.", _SHORT_S),
    "e2e_request_latency_seconds": ("Seconds from the request's arrival to its end.", _LONG_S),
    "request_queue_time_seconds": ("Seconds that the request waited in its group.", _LONG_S),
    "request_inference_time_seconds": ("Seconds from being scheduled to the end.", _LONG_S),
    "request_prefill_time_seconds": ("Seconds from being scheduled to the first token.", _LONG_S),
    "request_decode_time_seconds": ("Seconds from the first token to the end.", _LONG_S),
    "request_prompt_tokens": ("Prompt tokens of a request.", _TOKENS),
    "request_generation_tokens": ("Output tokens of a continuation.", _TOKENS),
    "request_max_num_generation_tokens": ("Output tokens of a request's longest continuation.", _TOKENS),
    "request_prefill_kv_computed_tokens": ("Prompt tokens that weren't in the prefix cache.", _TOKENS),
    "request_params_n": ("n of requests.", _COUNT),
    "request_params_max_tokens": ("max_tokens of requests that have one.", _TOKENS),
}
_GEN_AI: dict[str, tuple[str, Sequence[float]]] = {
    telemetry.REQUEST_DURATION_METRIC: ("Seconds from the request's arrival to its end.", _LONG_S),
    telemetry.TIME_TO_FIRST_TOKEN_METRIC: ("Seconds from the request's arrival to its first token.", _SHORT_S),
    telemetry.TIME_PER_OUTPUT_TOKEN_METRIC: ("Mean seconds per output token behind the first.", _SHORT_S),
}


class Metrics:
    """All series of one gateway process."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        ProcessCollector(registry=self._registry)
        self._histograms = {
            name: Histogram(f"vllm:{name}", text, ["model_name"], buckets=bounds, registry=self._registry)
            for name, (text, bounds) in _HISTOGRAMS.items()
        }
        self._gaps = _Gaps()
        self._registry.register(self._gaps)
        gen_ai = [_flat(name) for name in (telemetry.OPERATION_NAME, telemetry.PROVIDER_NAME, telemetry.REQUEST_MODEL)]
        self._gen_ai = {
            name: Histogram(f"{_flat(name)}_seconds", text, gen_ai, buckets=bounds, registry=self._registry)
            for name, (text, bounds) in _GEN_AI.items()
        }
        self._success = self._counter("vllm:request_success", "Requests that ended well, by reason.", "finished_reason")
        self._failed = self._counter("kvasir:request_failed", "Requests refused or failed, by code.", "code")
        self._failovers = Counter(
            "kvasir:failovers",
            "Requests whose group died, and that went on at another.",
            ["model_name"],
            registry=self._registry,
        )
        self._moves = self._counter("kvasir:moves", "Requests that another group took over while they ran.", "why")
        text = "When the model's last request was accepted, in seconds since 1970."
        self._last = Gauge(LAST_REQUEST, text, ["model_name"], registry=self._registry)
        self._series: dict[tuple[str, str], _Series] = {}

    def call(self, model: str, operation: str, requests: Sequence[Request], started: float) -> CallRecord:
        """A call was accepted at `started` (time.monotonic)."""
        self._last.labels(model).set_to_current_time()
        key = model, operation
        if key not in self._series:
            self._series[key] = _Series(self._children(model, operation), self._success, self._gaps.of(model), model)
        return CallRecord(self._series[key], requests, started)

    def failed(self, model: str, code: str) -> None:
        """A call was refused, or failed later; `cancelled`: its client went away."""
        self._failed.labels(model, code).inc()

    def refused(self, error: KvasirError) -> None:
        """A request got no other answer; unless it was counted under its model, it counts without one."""
        if not error.counted:
            self.failed("", error.code)

    def failover(self, model: str) -> None:
        """A request's group died."""
        self._failovers.labels(model).inc()

    def moved(self, model: str, why: str) -> None:
        """Another group took a request over while it ran: its own drains, or only computes prompts."""
        self._moves.labels(model, why).inc()

    def render(self) -> bytes:
        """This gateway's own series, in Prometheus' text format."""
        return generate_latest(self._registry)

    def watch(self, directory: GroupDirectory) -> None:
        """Say from now on what this gateway knows of its groups' blocks."""
        self._registry.register(_Directories(directory))

    @staticmethod
    def render_groups(directory: GroupDirectory, models: Sequence[str]) -> bytes:
        """What the groups of `models` last said about themselves."""
        groups = CollectorRegistry()
        groups.register(_GroupStats(directory, models))
        return generate_latest(groups)

    def _counter(self, name: str, text: str, label: str) -> Counter:
        return Counter(name, text, ["model_name", label], registry=self._registry)

    def _children(self, model: str, operation: str) -> dict[str, Histogram]:
        children = {name: histogram.labels(model) for name, histogram in self._histograms.items()}
        labelled = {name: h.labels(operation, telemetry.PROVIDER, model) for name, h in self._gen_ai.items()}
        return children | labelled


class _Series:
    """The series of one model and operation, looked up once."""

    def __init__(
        self, histograms: Mapping[str, Histogram], success: Counter, gap: Callable[[float], None], model: str
    ) -> None:
        self._observe = {name: histogram.observe for name, histogram in histograms.items()}
        self._success = success
        self._model = model
        self.gap = gap

    def first(self, seconds: float) -> None:
        self._observe["time_to_first_token_seconds"](seconds)
        self._observe[telemetry.TIME_TO_FIRST_TOKEN_METRIC](seconds)

    def accepted(self, request: Request) -> None:
        sampling = request.sampling
        self._observe["request_prompt_tokens"](len(request.prompt_token_ids))
        self._observe["request_params_n"](sampling.n)
        if sampling.max_tokens is not None:
            self._observe["request_params_max_tokens"](sampling.max_tokens)

    def continuation(self, event: Finished) -> None:
        """From the group's own clock: where one continuation's time went."""
        timing, tokens = event.timing, event.output_tokens
        self._observe["request_generation_tokens"](tokens)
        if not timing.first_token:
            return
        decode = timing.finished - timing.first_token
        self._observe["request_decode_time_seconds"](decode)
        self._observe["request_inference_time_seconds"](timing.finished - timing.scheduled)
        if tokens > 1:
            self._observe["request_time_per_output_token_seconds"](decode / (tokens - 1))
            self._observe[telemetry.TIME_PER_OUTPUT_TOKEN_METRIC](decode / (tokens - 1))
        if event.index == 0:
            self._observe["request_queue_time_seconds"](timing.scheduled - timing.queued)
            self._observe["request_prefill_time_seconds"](timing.first_token - timing.scheduled)
            self._observe["request_prefill_kv_computed_tokens"](event.prompt_tokens - event.cached_tokens)

    def vector(self, event: Pooled) -> None:
        """The same for a prompt that was embedded or classified."""
        timing = event.timing
        self._observe["request_queue_time_seconds"](timing.scheduled - timing.queued)
        self._observe["request_prefill_time_seconds"](timing.finished - timing.scheduled)
        self._observe["request_inference_time_seconds"](timing.finished - timing.scheduled)
        self._observe["request_prefill_kv_computed_tokens"](event.prompt_tokens - event.cached_tokens)

    def complete(self, seconds: float, longest: int, reason: str) -> None:
        self._observe["e2e_request_latency_seconds"](seconds)
        self._observe[telemetry.REQUEST_DURATION_METRIC](seconds)
        self._observe["request_max_num_generation_tokens"](longest)
        self._success.labels(self._model, reason).inc()


class _Gaps(Collector):
    """The only histogram that is told of every token: without locks, in the loop's thread alone (0.3 us; Histogram: 3)."""

    def __init__(self) -> None:
        self._counts: dict[str, list[int]] = {}
        self._sums: dict[str, float] = {}

    def of(self, model: str) -> Callable[[float], None]:
        """What observes the seconds between two deliveries of a continuation's tokens."""
        counts = self._counts.setdefault(model, [0] * (len(_SHORT_S) + 1))
        sums = self._sums
        sums.setdefault(model, 0.0)

        def observe(seconds: float) -> None:
            counts[bisect_left(_SHORT_S, seconds)] += 1
            sums[model] += seconds

        return observe

    def collect(self) -> Iterable[Metric]:
        text = "Seconds between two deliveries of a continuation's tokens."
        family = HistogramMetricFamily("vllm:inter_token_latency_seconds", text, labels=["model_name"])
        bounds = [*map(floatToGoString, _SHORT_S), "+Inf"]
        for model, counts in self._counts.items():
            family.add_metric([model], [*zip(bounds, accumulate(counts), strict=True)], self._sums[model])
        return [family]


class CallRecord:
    """Measures the requests of one call."""

    def __init__(self, series: _Series, requests: Sequence[Request], started: float) -> None:
        self._series = series
        self._started = started
        self._remaining = [request.sampling.streams for request in requests]
        self._longest = [0] * len(requests)
        self._last: list[float | None] = [None] * len(requests)
        for request in requests:
            series.accepted(request)

    def tokens(self, number: int) -> None:
        """Tokens of the request `number` arrived."""
        now = time.monotonic()
        last = self._last[number]
        self._last[number] = now
        if last is None:
            self._series.first(now - self._started)
        else:
            self._series.gap(now - last)

    def finished(self, number: int, event: Finished) -> None:
        """One of its continuations is complete."""
        self._series.continuation(event)
        self._longest[number] = max(self._longest[number], event.output_tokens)
        self._remaining[number] -= 1
        if not self._remaining[number]:
            self._series.complete(time.monotonic() - self._started, self._longest[number], event.reason)

    def pooled(self, event: Pooled) -> None:
        """One of its vectors is there."""
        self._series.vector(event)
        self._series.complete(time.monotonic() - self._started, 0, "stop")


class _Directories(Collector):
    """Which blocks of which groups a gateway knows: what is held elsewhere, too, counts once for each group."""

    def __init__(self, directory: GroupDirectory) -> None:
        self._directory = directory

    def collect(self) -> Iterable[Metric]:
        held = Metric("kvasir:directory_blocks", "Blocks times groups that are known to hold them.", "gauge")
        room = Metric("kvasir:directory_room_blocks", "How many more could be known.", "gauge")
        text = "The same that aren't known, or not any longer, for want of room."
        dropped = Metric("kvasir:directory_blocks_dropped", text, "counter")
        for model, blocks in self._directory.blocks().items():
            labels = {"model_name": model}
            room.add_sample(room.name, labels, blocks.max_holdings - blocks.num_holdings)
            for tier, size in blocks.sizes().items():
                held.add_sample(held.name, labels | {"tier": tier}, size)
                dropped.add_sample(f"{dropped.name}_total", labels | {"tier": tier}, blocks.dropped[tier])
        return [held, room, dropped]


class _GroupStats(Collector):
    """What the groups last said about themselves. `engine` is a group's name, the same at all gateways and of no other
    group: by a number, one whose neighbour was replaced would go on in that one's series, and rates would leap."""

    def __init__(self, directory: GroupDirectory, models: Sequence[str]) -> None:
        self._directory = directory
        self._models = models

    def collect(self) -> Iterable[Metric]:
        families = {name: Metric(name, text, kind) for name, (text, kind, *_) in (_STATS | _TIERS).items()}
        alive = Metric("kvasir:group_alive", "1: the group's step loop turns.", "gauge")
        role = Metric("kvasir:group_role", "What a group is for.", "gauge")
        draining = Metric("kvasir:group_draining", "1: it gives away what runs there.", "gauge")
        groups = [(model, client) for model in self._models for client in self._directory.clients(model)]
        for model, client in groups:
            labels = {"model_name": model, "engine": client.name}
            alive.add_sample("kvasir:group_alive", labels, float(client.alive))
            role.add_sample("kvasir:group_role", labels | {"role": client.member.role}, 1.0)
            draining.add_sample("kvasir:group_draining", labels, float(client.draining))
            stats = client.stats if client.alive else None
            for name, (_, _, attribute, samples) in _STATS.items():
                for sample in samples if stats is not None else ():
                    families[name].add_sample(sample, labels, float(getattr(stats, attribute)))
            for name, (_, _, fields) in _TIERS.items():
                for tier, attribute in fields.items() if stats is not None else ():
                    sample = name if families[name].type == "gauge" else f"{name}_total"
                    families[name].add_sample(sample, labels | {"tier": tier}, float(getattr(stats, attribute)))
        return [*families.values(), alive, role, draining]


def _flat(name: str) -> str:
    """OpenTelemetry's name in Prometheus' alphabet."""
    return name.replace(".", "_")


def _counter(name: str, text: str, attribute: str, *aliases: str) -> tuple[str, tuple[str, str, str, tuple[str, ...]]]:
    return f"vllm:{name}", (text, "counter", attribute, (f"vllm:{name}_total", *aliases))


def _gauge(name: str, text: str, attribute: str) -> tuple[str, tuple[str, str, str, tuple[str, ...]]]:
    return f"vllm:{name}", (text, "gauge", attribute, (f"vllm:{name}",))


_STATS: dict[str, tuple[str, str, str, tuple[str, ...]]] = dict(
    [
        _gauge("num_requests_running", "Sequences in the batch.", "running"),
        _gauge("num_requests_waiting", "Sequences that wait for a place in the batch.", "waiting"),
        _gauge("kv_cache_usage_perc", "Share of KV cache blocks in use, 0 to 1.", "kv_usage"),
        _counter("prefix_cache_queries", "Prompt tokens looked up in the prefix cache.", "prefix_queries"),
        _counter("prefix_cache_hits", "Prompt tokens found in the prefix cache.", "prefix_hits"),
        _counter("prompt_tokens_cached", "Prompt tokens that weren't computed again.", "prefix_hits"),
        _counter("num_preemptions", "Sequences that were put back to make room.", "preemptions"),
        _counter("prompt_tokens", "Prompt tokens computed.", "prompt_tokens", "vllm:prompt_tokens"),
        _counter("generation_tokens", "Tokens made.", "generation_tokens", "vllm:generation_tokens"),
    ]
)
"""Name -> (text, type, field of Stats, samples). Some tools ask for the token counters without `_total`."""

_TIERS: dict[str, tuple[str, str, dict[str, str]]] = {
    "kvasir:kv_tier_bytes": ("Bytes that rank 0 holds.", "gauge", {"host": "host_bytes", "disk": "disk_bytes"}),
    "kvasir:kv_blocks_stored": ("KV blocks put there.", "counter", {"host": "host_stored", "disk": "disk_stored"}),
    "kvasir:kv_blocks_loaded": (
        "KV blocks read.",
        "counter",
        {"host": "host_loaded", "disk": "disk_loaded", "peer": "peer_loaded"},
    ),
    "kvasir:kv_blocks_evicted": ("KV blocks that left.", "counter", {"host": "host_evicted", "disk": "disk_evicted"}),
    "kvasir:kv_blocks_failed": (
        "KV blocks not written, or missing or bad when read.",
        "counter",
        {"disk": "disk_failed", "peer": "peer_failed"},
    ),
    "kvasir:kv_blocks_served": ("KV blocks sent to other groups.", "counter", {"peer": "peer_served"}),
    "kvasir:kv_fetched_bytes": ("Bytes of KV blocks that came from other groups.", "counter", {"peer": "peer_bytes"}),
    "kvasir:kv_fetch_floor_seconds": ("Time before a fetch's first byte, lately.", "gauge", {"peer": "fetch_floor_s"}),
    "kvasir:kv_fetch_bytes_per_second": ("Speed of fetches, lately.", "gauge", {"peer": "fetch_bytes_per_s"}),
}
"""Name -> (text, type, tier or "peer" -> field of Stats)."""
