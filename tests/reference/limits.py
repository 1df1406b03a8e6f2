"""The bounds that a plan of capacity meets: those of the configuration, and the constants of the code."""

from __future__ import annotations

import importlib

import msgspec

from tests.reference import markdown
from ztna.config import AgentConfig, ConnectorConfig, DnsdConfig, RelayConfig

INTRODUCTION = """What is more than these is refused, as `limit_reached` where the other end hears of it, and counted
(`ztna_refusals_total`, `ztna_drops_total`); nothing grows without bound. [Capacity](../capacity.md) says what each
costs. A key can be set, a constant stands in the code."""

KEYS = (
    (RelayConfig, "relay", "sessions_per_identity", "sessions of one identity"),
    (RelayConfig, "relay", "sessions_per_service", "sessions with one service"),
    (RelayConfig, "relay", "sessions_total", "sessions of a relay"),
    (RelayConfig, "relay", "half_open_max", "handshakes under way, of QUIC and of TLS each"),
    (RelayConfig, "relay", "half_open_per_source", "of these from one address"),
    (ConnectorConfig, "connector", "flows_per_agent", "flows of one agent, of UDP and of TCP each"),
    (ConnectorConfig, "connector", "flows_total", "flows of a connector, counted alike"),
    (AgentConfig, "agent", "flows_total", "flows of an agent"),
    (DnsdConfig, "dnsd", "rate_limit", "answers a second to one address over UDP"),
)
CONSTANTS = (
    ("relay.admission", "CONNECTIONS_MAX", "control connections of a relay"),
    ("relay.admission", "CONNECTIONS_PER_IDENTITY_MAX", "of these of one identity"),
    ("relay.admission", "SERVICES_PER_CONNECTION_MAX", "services that one connector registers at a relay"),
    ("relay.splicer", "CONNECTIONS_MAX", "TCP connections at a relay's forwarder"),
    ("relay.splicer", "STRANGERS_MAX", "of these that have shown no token yet"),
    ("sidecar.connector.sources", "SERVICES_MAX", "services of a connector"),
    ("sidecar.connector.routes", "BACKENDS_PER_ROUTE_MAX", "backends behind a route"),
    ("sidecar.connector.checks", "CHECKS_PER_ROUTE_MAX", "checks of a route"),
    ("ztna.published", "PORTS_PER_SERVICE_MAX", "ports that a service publishes"),
    ("sidecar.connector.sessions", "SESSIONS_MAX", "sessions of a connector"),
    ("sidecar.connector.sessions", "LINKS_MAX", "packet links of a connector, a UDP socket each"),
    ("sidecar.link.listener", "CARRIERS_MAX", "stream carriers of a connector, a TCP connection each"),
    ("sidecar.link.listener", "HANDSHAKES_MAX", "of these in their handshake"),
    ("sidecar.agent.sessions", "WAITING_PER_SERVICE_MAX", "flows that wait for a session of one service"),
    (
        "sidecar.agent.carriers",
        "IDLE_PER_CONNECTOR_MAX",
        "idle stream carriers that an agent keeps for a connector",
    ),
    (
        "sidecar.link.budget",
        "PROCESS_BYTES",
        "bytes of a sidecar for TCP windows and what is not acknowledged: room for 2,300 flows",
    ),
    ("sidecar.link.budget", "PEER_BYTES", "of these for one peer"),
    ("sidecar.link.known", "REMEMBERED_FLOWS_MAX", "ended flows that a connector remembers"),
    ("dnsd.zone", "SRV_RECORDS_MAX", "instances in one SRV answer"),
    ("dnsd.zone", "SERVICES_LISTED_MAX", "services that browsing lists"),
    ("dnsd.server", "TCP_CONNECTIONS_MAX", "TCP connections of a dnsd's worker"),
    ("dnsd.server", "TCP_CONNECTIONS_PER_CLIENT_MAX", "of these from one address"),
    ("dnsd.forwarding", "QUESTIONS_MAX", "questions that wait for upstreams"),
)


def page() -> str:
    """Return the page."""
    keys = [
        (meaning, _number(_default(section, key)), markdown.code(f"{path}.{key}"))
        for section, path, key, meaning in KEYS
    ]
    constants = [
        (meaning, _number(getattr(importlib.import_module(module), name)), markdown.code(f"{module}.{name}"))
        for module, name, meaning in CONSTANTS
    ]
    return markdown.page(
        "Limits",
        "the configuration's defaults and the constants",
        INTRODUCTION,
        "## Keys",
        markdown.table(("At most", "Default", "Key"), keys),
        "## Constants",
        markdown.table(("At most", "Is", "Constant"), constants),
    )


def _default(section: type[msgspec.Struct], key: str) -> float:
    (default,) = (field.default for field in msgspec.structs.fields(section) if field.name == key)
    return float(default)


def _number(value: float) -> str:
    return f"{value:,.0f}"
