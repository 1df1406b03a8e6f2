"""Metrics of several processes as one: what a worker counted, and how it is added to our own.

Counters and gauges alike are sums over the workers; a gauge's share ends with its worker.
"""

from __future__ import annotations

from collections.abc import Mapping

from prometheus_client import Counter, Gauge

from dnsd.feed import Counts
from ztna.telemetry import (
    DNS_CONNECTIONS,
    DNS_FORWARDED,
    DNS_QUERIES,
    DROPS,
    REFUSALS,
    TRANSFERS,
    UNEXPECTED,
    WORKER_CPU,
    WORKER_MEMORY,
)

_COUNTERS: tuple[Counter, ...] = (
    REFUSALS,
    DROPS,
    UNEXPECTED,
    DNS_QUERIES,
    DNS_FORWARDED,
    TRANSFERS,
    WORKER_CPU,
)
_GAUGES: tuple[Gauge, ...] = (DNS_CONNECTIONS, WORKER_MEMORY)
_METRICS: tuple[Counter | Gauge, ...] = (*_COUNTERS, *_GAUGES)
_BY_NAME: Mapping[str, Counter | Gauge] = {
    family.name: metric for metric in _METRICS for family in metric.collect()
}
_GAUGE_NAMES = frozenset(family.name for metric in _GAUGES for family in metric.collect())


def counted() -> Counts:
    """Return what this process counted so far."""
    return {
        "\t".join((name, *sample.labels.values())): sample.value
        for name, metric in _BY_NAME.items()
        for family in metric.collect()
        for sample in family.samples
    }


class Tally:
    """One worker's share in our metrics."""

    def __init__(self) -> None:
        self._added: dict[str, float] = {}

    def add(self, counts: Counts) -> None:
        """Bring our metrics up to what the worker counted so far; a series that is not ours is left out."""
        for series, value in counts.items():
            name, *labels = series.split("\t")
            metric = _BY_NAME.get(name)
            if metric is None:
                continue
            share = metric.labels(*labels) if labels else metric
            share.inc(value - self._added.get(series, 0.0))
            self._added[series] = value

    def end(self) -> None:
        """Take the worker's share in the gauges back: it is no more."""
        self.add({series: 0.0 for series in self._added if series.split("\t")[0] in _GAUGE_NAMES})
