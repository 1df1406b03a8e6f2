"""dnsd.tally: what workers counted is in our metrics once, and a gauge's share ends with its worker."""

from __future__ import annotations

from dnsd.tally import Tally, counted
from ztna.telemetry import DNS_CONNECTIONS, DROPS, REGISTRY, UNEXPECTED


def value(name: str, **labels: str) -> float:
    return REGISTRY.get_sample_value(name, labels) or 0.0


def test_shares_are_added_once_and_gauges_taken_back() -> None:
    DROPS.labels("here", "tally").inc()
    before = value("ztna_drops_total", where="here", why="tally"), value("ztna_dns_tcp_connections")
    unexpected = value("ztna_unexpected_errors_total")
    first, second = Tally(), Tally()
    counts = {"ztna_drops\there\ttally": 3.0, "ztna_dns_tcp_connections": 2.0, "ztna_unexpected_errors": 1.0}
    first.add(counts)
    first.add(counts | {"ztna_drops\there\ttally": 5.0, "ztna_dns_tcp_connections": 1.0})
    second.add(counts | {"of another make\tx": 1.0})
    assert value("ztna_drops_total", where="here", why="tally") == before[0] + 8
    assert value("ztna_dns_tcp_connections") == before[1] + 3
    assert value("ztna_unexpected_errors_total") == unexpected + 2
    first.end()
    second.end()
    assert value("ztna_drops_total", where="here", why="tally") == before[0] + 8
    assert value("ztna_dns_tcp_connections") == before[1]


def test_what_is_counted_here_can_be_added_elsewhere() -> None:
    DROPS.labels("there", "tally").inc(4)
    UNEXPECTED.inc()
    DNS_CONNECTIONS.inc()
    counts = counted()
    assert counts["ztna_drops\tthere\ttally"] == 4.0 and counts["ztna_unexpected_errors"] >= 1
    tally = Tally()
    tally.add(counts)
    assert counted() == {series: 2 * each for series, each in counts.items()}
    DNS_CONNECTIONS.dec()
    tally.end()
