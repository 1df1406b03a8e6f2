"""Gauges that agent and connector both have, taken from their state when somebody asks for the metrics."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping

from sidecar.link.relays import RelayClients
from ztna.telemetry import FLOWS_LIVE, LINKS_LIVE, RELAY_RTT, RELAYS, SESSIONS_LIVE

PATHS = ("direct", "forwarded", "dialling", "spare")


def measure(
    relays: RelayClients,
    links: Iterable[Mapping[str, object]],
    *,
    sessions: int,
    tcp_flows: int,
    udp_flows: int,
) -> None:
    """Set them; `links` is what `/status` shows of links."""
    clients = list(relays)
    connected = sum(client.connected for client in clients)
    RELAYS.labels("connected").set(connected)
    RELAYS.labels("away").set(len(clients) - connected)
    RELAY_RTT.clear()
    for client in clients:
        if client.connected and client.rtt_s is not None:
            RELAY_RTT.labels(relays.label(client)).set(client.rtt_s)
    paths = Counter(link["path"] for link in links)
    for path in PATHS:
        LINKS_LIVE.labels(path).set(paths[path])
    SESSIONS_LIVE.set(sessions)
    FLOWS_LIVE.labels("tcp").set(tcp_flows)
    FLOWS_LIVE.labels("udp").set(udp_flows)
