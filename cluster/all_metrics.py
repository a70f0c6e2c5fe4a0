"""/metrics of several gateways that share a port: who is asked answers for all of them, since a scraper can't choose whom
it reaches."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping

from prometheus_client.exposition import generate_latest
from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector, CollectorRegistry

OtherMetrics = Callable[[], Awaitable[Mapping[str, str] | None]]
"""Name -> own series of each other gateway that is known, in Prometheus' text format; None: there can be no others."""


async def no_others() -> None:
    """Of a gateway that is alone."""


def merged(texts: Mapping[str, str]) -> bytes:
    """The series of all gateways, told apart by the label `gateway`."""
    registry = CollectorRegistry()
    registry.register(_Merged(texts))
    return generate_latest(registry)


class _Merged(Collector):
    def __init__(self, texts: Mapping[str, str]) -> None:
        self._texts = texts

    def describe(self) -> list[Metric]:
        return []

    def collect(self) -> list[Metric]:
        families: dict[str, Metric] = {}
        for gateway, text in sorted(self._texts.items()):
            for family in text_string_to_metric_families(text):
                found = families.setdefault(family.name, Metric(family.name, family.documentation, family.type))
                for sample in family.samples:
                    found.add_sample(sample.name, {**sample.labels, "gateway": gateway}, sample.value)
        return list(families.values())
