"""ztna.overview: one row a service, from what daemons say; rates, orders, short numbers."""

from __future__ import annotations

from typing import Any

import pytest

from ztna.overview import SORTS, Row, daemons, in_order, rows, short, with_rates

AGENT: dict[str, Any] = {
    "agent": {
        "services": [
            {"service": "web-app", "ip": "10.100.0.2", "health": "passing", "connector": "alpha"},
            {"service": "db", "ip": "10.100.0.3", "health": "unknown", "connector": None},
        ],
        "sessions": [{"service": "web-app"}, {"service": "web-app"}],
        "streams": {"running": {"web-app": {"flows": 3, "sent_bytes": 10, "received_bytes": 20}}},
        "links": [{"connector": "alpha", "path": "direct", "rtt_ms": 1.5}],
    }
}
RELAY: dict[str, Any] = {
    "sessions": [
        {"service": "web-app", "connector_id": "beta", "open": True, "path": "forwarded", "bytes": 7},
        {"service": "mail", "connector_id": "beta", "open": True, "path": "forwarded", "bytes": 1},
        {"service": "mail", "connector_id": "beta", "open": True, "path": "direct", "bytes": 2},
        {"service": "quiet", "connector_id": "beta", "open": True, "path": "unseen", "bytes": 0},
        {"service": "late", "connector_id": "beta", "open": False, "path": "unseen", "bytes": 0},
    ]
}
CONNECTOR: dict[str, Any] = {
    "connector": {
        "services": {
            "db": {"verdict": "critical", "lease": None},
            "own": {"verdict": "warning", "lease": {"ip": "10.100.0.9"}},
        },
        "sessions": [{"service": "own"}],
    }
}


def test_what_several_daemons_know_is_put_together() -> None:
    found = {row.service: row for row in rows({"agent": AGENT, "relay": RELAY, "connector": CONNECTOR})}
    assert list(found) == ["db", "mail", "own", "quiet", "web-app"]
    assert found["web-app"] == Row(
        service="web-app",
        address="10.100.0.2",
        health="passing",
        connectors=("alpha", "beta"),
        sessions=1,  # the relay counts, which sees other hosts' too
        flows=3,
        path="direct",
        rtt_ms=1.5,
        sent_bytes=10,
        received_bytes=20,
        relayed_bytes=7,
    )
    assert found["mail"].path == "direct+forwarded"
    assert (found["mail"].sessions, found["mail"].relayed_bytes) == (2, 3)
    assert found["quiet"].path is None
    assert (found["db"].health, found["db"].address) == ("critical", "10.100.0.3")
    assert (found["own"].health, found["own"].address) == ("warning", "10.100.0.9")


def test_without_a_relay_the_ends_count_their_sessions() -> None:
    found = {row.service: row.sessions for row in rows({"agent": AGENT, "connector": CONNECTOR})}
    assert found == {"web-app": 2, "own": 1, "db": 0}


def test_two_relays_of_a_host_count_together() -> None:
    states = {"relay 127.0.0.1:1": RELAY, "relay 127.0.0.1:2": RELAY}
    found = {row.service: row for row in rows(states)}
    assert (found["mail"].sessions, found["mail"].relayed_bytes) == (4, 6)


def test_nobody_knows_nothing() -> None:
    assert rows({}) == []
    assert rows({"dnsd": {}}) == []


def test_rates_are_what_came_since() -> None:
    before = {"a": Row(service="a", sent_bytes=100, received_bytes=50, relayed_bytes=8)}
    now = [Row(service="a", sent_bytes=300, received_bytes=40, relayed_bytes=8), Row(service="new")]
    same, new = with_rates(now, before, 2.0)
    # 40 is less than 50: the flow ended meanwhile.
    assert (same.sent_per_s, same.received_per_s, same.relayed_per_s) == (100.0, 0.0, 0.0)
    assert new.sent_per_s is None
    assert with_rates(now[:1], before, 0.0)[0].sent_per_s is None


@pytest.mark.parametrize(
    ("sort", "order"),
    [
        ("service", "abc"),
        ("rate", "cba"),
        ("flows", "bac"),
        ("sessions", "acb"),
        ("health", "cba"),
        ("rtt", "bca"),
    ],
)
def test_orders(sort: str, order: str) -> None:
    of = [
        Row(service="a", flows=1, sessions=9, health="passing"),
        Row(service="b", flows=2, rtt_ms=9.0, health="warning", sent_per_s=1.0, received_per_s=1.0),
        Row(service="c", sessions=1, rtt_ms=1.0, health="critical", relayed_per_s=5.0),
    ]
    assert sort in SORTS
    assert "".join(row.service for row in in_order(of, sort)) == order


def test_an_unknown_health_comes_last() -> None:
    of = [Row(service="a"), Row(service="b", health="passing")]
    assert [row.service for row in in_order(of, "health")] == ["b", "a"]


@pytest.mark.parametrize(
    ("value", "told"),
    [
        (None, ""),
        (0, "0"),
        (999.2, "999"),
        (999.6, "1.0k"),
        (1_234, "1.2k"),
        (99_960, "100k"),
        (345_600_000, "346M"),
        (2.5e9, "2.5G"),
        (7e13, "70.0T"),
    ],
)
def test_short_numbers(value: float | None, told: str) -> None:
    assert short(value) == told
    assert short(value, "B") == (f"{told}B" if told else "")
    assert len(told) <= 5


def test_daemons_say_what_troubles_them() -> None:
    states = {
        "relay": {"readiness": {"ready": True, "awaiting": {}, "warnings": {"pool": "full"}}},
        "agent": {"readiness": {"ready": False, "awaiting": {"relay": ""}, "warnings": {}}},
    }
    assert list(daemons(states)) == [("relay", True, "pool: full"), ("agent", False, "relay")]
