"""What /status of each daemon says in a small mesh: two services that are used, one whose backend is down."""

from __future__ import annotations

from typing import Any

from ztna.pages import seen
from ztna.pages.markup import Element, html

AGENT = "spiffe://ztna/agent"


def own(daemon: str, **more: Any) -> dict[str, Any]:
    """Return what every daemon says, and more."""
    return {
        "daemon": daemon,
        "version": "0.1.0",
        "pid": 7,
        "uptime_s": 75.0,
        "readiness": {"ready": True, "awaiting": {}, "warnings": {}},
        "counted": {"refused": {}, "dropped": {}},
    } | more


def certificate(name: str, **more: Any) -> dict[str, Any]:
    return {"name": name, "not_after": "2030-01-02T03:04:05+00:00", "days_left": 9.0} | more


def relay(**more: Any) -> dict[str, Any]:
    session = {"agent": AGENT, "connector_id": "alpha", "open": True, "age_s": 12.0, "path": "forwarded"}
    return (
        own(
            "ztna-relay",
            relay={"name": "north", "address": "127.0.0.1:4433", "draining": False},
            connections=[
                {
                    "peer": AGENT,
                    "address": "127.0.0.1:9",
                    "transport": "quic",
                    "version": "9.9.9",
                    "sessions": 2,
                    "certificate_days": 9.0,
                },
                {
                    "peer": "spiffe://ztna/connector",
                    "address": "127.0.0.1:8",
                    "transport": "tls",
                    "connector_id": "alpha",
                    "services": ["db", "web"],
                    "sessions": 2,
                    "certificate_days": 0.5,
                    "silent": True,
                },
            ],
            sessions=[
                session | {"session": "1", "service": "web", "bytes": 0, "link_bytes": 7776},
                session | {"session": "2", "service": "echo", "bytes": 12, "link_bytes": 0, "open": False},
            ],
            srv={
                "fresh_age_s": 3.0,
                "failing": "",
                "services": {
                    "db": {"age_s": 1.0, "connectors": []},
                    "web": {"age_s": 1.0, "connectors": [{"id": "alpha", "priority": 0, "weight": 1}]},
                },
            },
            forwarder={"udp": {"received": 16, "links": [{}]}, "tcp": {"pairs": 1, "bytes": 2048}},
            certificate=certificate("spiffe://ztna/relay"),
        )
        | more
    )


def dnsd(**more: Any) -> dict[str, Any]:
    def name(service: str, status: str, **told: Any) -> dict[str, Any]:
        instance = {"id": f"{service}@alpha", "node": "n", "connector": "alpha", "address": "10.0.0.1:4435"}
        return {
            "service": service,
            "ip": "10.100.0.2",
            "ports": [{"protocol": "tcp", "port": 8080}],
            "instances_total": 1,
            "instances": [instance | {"status": status}],
        } | told

    return (
        own(
            "ztna-dnsd",
            dns={
                "zone": "ztna.local",
                "serial": 5,
                "services": 2,
                "leases": 2,
                "udp_received": 150,
                "udp_dropped": 1,
            },
            keeper={"elected": True, "trouble": None, "problems": {}},
            pool={"size": 100, "leased": 2, "resting": 1, "free": 97},
            names={"services_total": 2, "services": [name("db", "critical"), name("web", "passing")]},
            leases={
                "total": 2,
                "holdings": [
                    {"ip": "10.100.0.2", "service": "web", "state": "leased", "pinned": True, "since_s": 5.0},
                    {"ip": "10.100.0.3", "service": "old", "state": "quarantined", "since_s": 4000.0},
                ],
            },
        )
        | more
    )


def route(verdict: str, backend: str, **more: Any) -> dict[str, Any]:
    checks = [{"kind": "tcp", "target": backend, "verdict": verdict, "output": f"tcp is {verdict}"}]
    return {
        "verdict": verdict,
        "output": f"it is {verdict}",
        "since_s": 70.0,
        "registered": True,
        "lease": {"ip": "10.100.0.2", "ports": [{"protocol": "tcp", "port": 8080}]},
        "backends": [
            {
                "backend": backend,
                "protocol": "tcp",
                "port": 8080,
                "verdict": verdict,
                "flows": 1,
                "checks": checks,
            }
        ],
    } | more


def connector(**more: Any) -> dict[str, Any]:
    told = {
        "id": "alpha",
        "services": {"db": route("critical", "127.0.0.1:5432"), "web": route("passing", "127.0.0.1:8080")},
        "relays": [
            {
                "name": "north",
                "address": "127.0.0.1:4433",
                "connected": True,
                "transport": "quic",
                "problem": None,
            },
            {
                "name": "south",
                "address": "127.0.0.1:4533",
                "connected": False,
                "transport": None,
                "problem": "refused",
            },
        ],
        "consul": {"problem": None},
        "sessions_total": 1,
        "sessions": [{"service": "web", "agent": AGENT, "relay": "north", "state": "live"}],
        "links": [
            {"agent": AGENT, "relay": "north", "path": "direct"},
            {"agent": AGENT, "relay": "south", "path": "spare"},
            {"agent": None, "relay": "north", "path": "forwarded"},
        ],
        "udp_flows": 1,
        "tcp_flows": 2,
    } | more
    return own("ztna-sidecar connector", connector=told, certificate=certificate("spiffe://ztna/connector"))


def agent(**more: Any) -> dict[str, Any]:
    port = {"protocol": "tcp", "port": 8080}
    told = {
        "mode": "listen",
        "pool": "10.100.0.0/16",
        "relays": [
            {"relay": "north", "state": "up", "preferred": True, "transport": "quic", "rtt_ms": 2.25},
            {"relay": "south", "state": "down", "preferred": False, "problem": "no answer"},
        ],
        "services": [
            {"service": "db", "ip": "10.100.0.3", "ports": [port], "state": "denied", "reason": "no_grant"},
            {"service": "web", "ip": "10.100.0.2", "ports": [port], "state": "open"}
            | {"health": "passing", "connector": "alpha"},
        ],
        "held_ports": {"tcp 10.100.0.3:8080": "no grant"},
        "sessions": [{"service": "web", "connector": "alpha", "relay": "north"}],
        "links": [
            {
                "connector": "alpha",
                "relay": "north",
                "carrier": "quic",
                "path": "direct",
                "rtt_ms": 12.0,
                "candidates": [{"address": "10.0.0.9:4435", "state": "valid", "rtt_ms": 12.0}],
                "sent_bytes": 48,
                "received_bytes": 2_000_000,
            }
        ],
        "streams": {
            "flows": 1,
            "running": {"web": {"flows": 1, "sent_bytes": 10, "received_bytes": 20}},
            "carriers": 1,
            "routes": {"alpha": "forwarded", "beta": "direct", "gamma": "quic"},
        },
        "udp_flows": 3,
    } | more
    return own("ztna-sidecar agent", agent=told, certificate=certificate(AGENT))


def all_of_them() -> list[seen.Daemon]:
    """Return what each of the four says, read."""
    return [seen.read(status) for status in (relay(), dnsd(), connector(), agent())]


def shown(*elements: Element) -> str:
    """Return elements as HTML."""
    return "".join(map(html, elements))
