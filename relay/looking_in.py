"""What /status of a relay shows, by section.

A part that wants a section of its own adds one line to `sources`. Reads only.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from relay.daemon import Relay

SESSIONS_MAX = 1_000


def sources(relay: Relay) -> dict[str, Callable[[], object]]:
    """Return what shows each section."""
    return {
        "relay": lambda: {
            "name": relay.config.name,
            "address": "{}:{}".format(*relay.address),
            "draining": relay.draining,
            "half_open": relay.server.half_open,
        },
        "connections": lambda: connections(relay),
        "sessions": lambda: _sessions(relay),
        "srv": lambda: relay.puller.status() | _notified(relay),
        "conflicts": lambda: _conflicts(relay),
        "forwarder": lambda: {"udp": relay.forwarder.status(), "tcp": relay.splicer.status()},
    }


def _notified(relay: Relay) -> dict[str, object]:
    return {} if relay.notified is None else {"notified": relay.notified.heard}


def connections(relay: Relay) -> list[dict[str, object]]:
    """Return the live connections."""
    return [
        {
            "peer": peer.identity.name,
            "address": "{}:{}".format(*relay.peers[key].connection.peer_address),
            "connector_id": peer.connector_id,
            "services": sorted(peer.services),
            "sessions": len(peer.sessions),
            "silent": peer.silent_since is not None,
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
    return [
        {
            "session": each.id,
            "service": each.service,
            "agent": each.agent_name,
            "connector_id": each.connector_id,
            "open": each.open,
        }
        for each in shown
    ]
