"""What /status of a relay shows, by section.

A part that wants a section of its own adds one line to `sources`. Reads only.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from relay.commands import LinkKey
from relay.state import Session
from relay.v1_peers import PASSED
from ztna.names import SessionId
from ztna.telemetry import FORWARDED_BYTES, RELAY_SIZES, SRV_AGE, Tallied
from ztna.tls_control import TlsConnection

if TYPE_CHECKING:
    from relay.daemon import Relay

SESSIONS_MAX = 5_000
TASKS_MAX = 200
DAY_SECONDS = 86_400


def sources(relay: Relay) -> dict[str, Callable[[], object]]:
    """Return what shows each section."""
    return {
        "relay": lambda: {
            "name": relay.config.name,
            "address": "{}:{}".format(*relay.address),
            "draining": relay.draining,
            "half_open": relay.server.half_open,
            "half_open_tls": relay.door.half_open,
            "sessions": len(relay.sessions.sessions),
        },
        "connections": lambda: connections(relay),
        "sessions": lambda: _sessions(relay),
        "srv": lambda: relay.puller.status() | _notified(relay),
        "conflicts": lambda: _conflicts(relay),
        "audit": lambda: relay.reports.audit and relay.reports.audit.status(),
        "tasks": _tasks,
        "forwarder": lambda: {"udp": relay.forwarder.status(), "tcp": relay.splicer.status()},
    }


def _tasks() -> list[str]:
    return sorted(task.get_name() for task in asyncio.all_tasks())[:TASKS_MAX]


def _notified(relay: Relay) -> dict[str, object]:
    return {} if relay.notified is None else {"notified": relay.notified.heard}


def connections(relay: Relay) -> list[dict[str, object]]:
    """Return the live connections."""
    return [
        {
            "peer": peer.identity.name,
            "address": "{}:{}".format(*relay.peers[key].connection.peer_address),
            "transport": "tls" if isinstance(relay.peers[key].connection, TlsConnection) else "quic",
            "version": peer.software or None,
            "connector_id": peer.connector_id,
            "services": sorted(peer.services),
            "sessions": len(peer.sessions),
            "silent": peer.silent_since is not None,
            "certificate_days": round((peer.identity.not_after.timestamp() - time.time()) / DAY_SECONDS, 1),
            "conflicts": [each.cidr for each in peer.conflicts.values()],
        }
        for key, peer in relay.sessions.peers.items()
        if key in relay.peers
    ]


def _conflicts(relay: Relay) -> list[dict[str, object]]:
    """Return what agents said of their pools, for `ztna leases conflicts`."""
    return [
        {"agent": peer.identity.name, "cidr": each.cidr, "with": each.with_, "detail": each.detail}
        for peer in relay.sessions.peers.values()
        for each in peer.conflicts.values()
    ]


def _sessions(relay: Relay) -> list[dict[str, object]]:
    shown = list(relay.sessions.sessions.values())[:SESSIONS_MAX]
    return [session_shown(relay, each) for each in shown]


def session_shown(relay: Relay, session: Session) -> dict[str, object]:
    """Return what is known of one session."""
    opened_at = session.opened_at
    return {
        "session": session.id,
        "service": session.service,
        "agent": session.agent_name,
        "connector_id": session.connector_id,
        "open": session.open,
        "age_s": None if opened_at is None else round(time.monotonic() - opened_at, 1),
        **carried(relay, session.id, session.link, session.path, session.v1_bytes),
    }


def carried(
    relay: Relay, session: SessionId, link: LinkKey, path: str | None, v1_bytes: int
) -> dict[str, object]:
    """Return what went through this relay for a live session: sealed bytes, both ways.

    UDP is counted by link, which the sessions of one agent with one connector share. What goes directly is not
    seen here, and neither is its path unless the ends told of it.
    """
    traffic = relay.forwarder.traffic(link)
    link_bytes = 0 if traffic is None else traffic.up_bytes + traffic.down_bytes
    own = relay.splicer.bytes_of(session) + v1_bytes
    seen = "forwarded" if own or link_bytes else "unseen"
    return {"path": path or seen, "bytes": own, "link_bytes": link_bytes}


class Measures:
    """The metrics that follow what a relay holds and counts for itself."""

    def __init__(self, relay: Relay) -> None:
        self._relay = relay
        self._udp, self._tcp = Tallied(FORWARDED_BYTES.labels("udp")), Tallied(FORWARDED_BYTES.labels("tcp"))

    def take(self) -> None:
        """Bring them up to date."""
        relay = self._relay
        self._udp.count, self._tcp.count = relay.forwarder.passed_bytes, relay.splicer.copied
        for tallied in (self._udp, self._tcp, PASSED):
            tallied.settle()
        _measure(relay)


def _measure(relay: Relay) -> None:
    sizes = {
        "connections": len(relay.peers),
        "tls_connections": len(relay.door.connections),
        "sessions": len(relay.sessions.sessions),
        "services": len(relay.sessions.services),
        "srv_names": relay.puller.names,
        "links": relay.forwarder.links,
        "tcp_pairs": relay.splicer.pairs,
    }
    for what, size in sizes.items():
        RELAY_SIZES.labels(what).set(size)
    fresh_at = relay.puller.fresh_at
    SRV_AGE.set(-1 if fresh_at is None else time.monotonic() - fresh_at)
