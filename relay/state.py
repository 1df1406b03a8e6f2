"""What relay.sessions remembers of connections, openings, sessions and links.

Pure; holds data and decides nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from relay.commands import BindTicket, ConnectionKey, LinkKey
from relay.pace import Pace
from ztna.identity import Identity
from ztna.jsontypes import Secret
from ztna.names import ConnectorId, ServiceName, SessionId
from ztna.reasons import Reason
from ztna.wire import control
from ztna.wire.control import Address


@dataclass(slots=True)
class Peer:
    """One live connection."""

    key: ConnectionKey
    identity: Identity
    forwarder: Address | None
    """The forwarder's address as this peer reaches it, None for one that only speaks to the relay (`ztna-v1`)."""
    features: frozenset[str] | None = None
    """None before its `hello`."""
    software: str = ""
    """Its release, as it says; empty for one that does not."""
    connector_id: ConnectorId | None = None
    link_address: Address | None = None
    services: set[ServiceName] = field(default_factory=set)
    sessions: set[SessionId] = field(default_factory=set)
    takes_datagrams: bool = True
    """Whether packets of `ztna-v1` can be put to it: not over TLS."""
    silent_since: float | None = None
    conflicts: dict[str, control.Conflict] = field(default_factory=dict)
    pace: Pace = field(default_factory=Pace)

    @property
    def v1(self) -> bool:
        """Whether the relay itself carries its packets, as nothing else can."""
        return self.forwarder is None


@dataclass(slots=True)
class Attempt:
    """One `open` on its way through the connectors that may have it."""

    request: control.Open
    tried: set[ConnectionKey] = field(default_factory=set)
    refusal: Reason | None = None
    park_until: float = 0.0
    began_at: float = 0.0


@dataclass(slots=True)
class Session:
    """One session; it is `open` from `accepted` on."""

    id: SessionId
    service: ServiceName
    agent: ConnectionKey
    connector: ConnectionKey
    connector_id: ConnectorId
    agent_name: str
    attempt: Attempt
    opened_at: float | None = None
    path: Literal["v1", "direct", "forwarded"] | None = None
    """What carries its packets, as far as the relay was told."""
    v1_bytes: int = 0
    """What the relay itself carried for a v1 agent."""
    v1_bytes_seen: int = 0
    v1_used_at: float = 0.0
    """When the last look found that more was carried than at the one before."""
    candidates: control.Candidates | None = None
    retired: bool = False
    """Whether its agent was told to use it for nothing new."""

    @property
    def open(self) -> bool:
        """Whether its connector accepted it."""
        return self.opened_at is not None

    @property
    def link(self) -> LinkKey:
        return self.agent, self.connector


@dataclass(slots=True)
class Link:
    """What one agent connection and one connector connection share at the forwarder."""

    agent: BindTicket
    connector: BindTicket
    probe_key: Secret
    sessions: set[SessionId] = field(default_factory=set)
