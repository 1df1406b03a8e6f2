"""What /status of each daemon says, as far as pages show it.

Pure. Whatever a daemon of another version does not say is empty.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from ztna.errors import ProtocolError
from ztna.jsontypes import shortened

Json = dict[str, Any]


class Told(msgspec.Struct, frozen=True, kw_only=True):
    """A part of /status; what is not known of it is passed over."""


class Readiness(Told, frozen=True):
    """What /readyz says."""

    ready: bool = False
    awaiting: Mapping[str, str] = {}
    warnings: Mapping[str, str] = {}


class Certificate(Told, frozen=True):
    """The daemon's own certificate."""

    name: str = ""
    not_after: str = ""
    days_left: float = 0.0
    expiring: bool = False
    broken: Mapping[str, str] = {}
    crls: tuple[Mapping[str, Any], ...] = ()


class Counted(Told, frozen=True):
    """What was refused and dropped since the start, by where and why."""

    refused: Mapping[str, int] = {}
    dropped: Mapping[str, int] = {}


class Port(Told, frozen=True):
    """A virtual port."""

    protocol: str
    port: int


class Daemon(Told, frozen=True):
    """What every daemon says; `unreadable` is why the rest of it is not here, if it cannot be read."""

    unreadable: str = ""
    daemon: str = ""
    version: str = ""
    pid: int = 0
    uptime_s: float = 0.0
    readiness: Readiness = Readiness()
    certificate: Certificate | None = None
    counted: Counted = Counted()


# --- relay


class RelaySelf(Told, frozen=True):
    """The relay itself."""

    name: str = ""
    address: str = ""
    draining: bool = False
    half_open: int = 0
    half_open_tls: int = 0


class Connection(Told, frozen=True):
    """A peer's connection to a relay; `version` is the peer's release."""

    peer: str
    version: str | None = None
    address: str = ""
    transport: str = ""
    connector_id: str | None = None
    services: tuple[str, ...] = ()
    sessions: int = 0
    silent: bool = False
    certificate_days: float = 0.0


class RelaySession(Told, frozen=True):
    """A session as a relay sees it."""

    session: str
    service: str
    agent: str
    connector_id: str
    open: bool = True
    age_s: float | None = None
    path: str = "unseen"
    bytes: int = 0
    link_bytes: int = 0


class SrvTarget(Told, frozen=True):
    """A connector that an SRV record names."""

    id: str
    priority: int = 0
    weight: int = 0


class SrvName(Told, frozen=True):
    """What DNS says of a service."""

    age_s: float | None = None
    connectors: tuple[SrvTarget, ...] = ()


class Srv(Told, frozen=True):
    """What a relay has pulled from DNS."""

    fresh_age_s: float | None = None
    failing: str = ""
    services: Mapping[str, SrvName] = {}


class Forwarding(Told, frozen=True):
    """Who copies UDP."""

    in_use: str = ""
    why_user: str | None = None
    in_kernel: int = 0


class UdpForwarder(Told, frozen=True):
    """Sealed packets."""

    forwarding: Forwarding = Forwarding()
    received: int = 0
    sent: int = 0
    links: tuple[Any, ...] = ()


class TcpForwarder(Told, frozen=True):
    """Sealed streams."""

    pairs: int = 0
    joined: int = 0
    bytes: int = 0


class Forwarder(Told, frozen=True):
    """A relay's forwarder."""

    udp: UdpForwarder = UdpForwarder()
    tcp: TcpForwarder = TcpForwarder()


class Relay(Daemon, frozen=True):
    """A relay's status."""

    relay: RelaySelf = RelaySelf()
    connections: tuple[Connection, ...] = ()
    sessions: tuple[RelaySession, ...] = ()
    srv: Srv = Srv()
    forwarder: Forwarder = Forwarder()


# --- dnsd


class Dns(Told, frozen=True):
    """The server."""

    zone: str = ""
    serial: int = 0
    services: int = 0
    leases: int = 0
    udp_received: int = 0
    udp_dropped: int = 0
    tcp_connections: int = 0
    confirmed_at: float = 0.0
    stale: bool = False
    unreadable: Mapping[str, str] = {}
    workers: tuple[Any, ...] = ()


class Keeper(Told, frozen=True):
    """Who keeps the leases."""

    elected: bool = False
    trouble: str | None = None
    problems: Mapping[str, str] = {}


class Pool(Told, frozen=True):
    """The addresses; nothing at one that is not the keeper."""

    size: int = 0
    leased: int = 0
    resting: int = 0
    free: int = 0


class Instance(Told, frozen=True):
    """An instance in Consul's catalog."""

    id: str
    node: str = ""
    connector: str | None = None
    address: str = ""
    status: str = "unknown"


class Name(Told, frozen=True):
    """A service in Consul's catalog."""

    service: str
    ip: str | None = None
    ports: tuple[Port, ...] = ()
    problem: str | None = None
    instances_total: int = 0
    instances: tuple[Instance, ...] = ()


class Names(Told, frozen=True):
    """Services, a part of them where they are many."""

    services_total: int = 0
    services: tuple[Name, ...] = ()


class Holding(Told, frozen=True):
    """Who has an address."""

    ip: str
    service: str
    state: str
    pinned: bool = False
    since_s: float | None = None


class Leases(Told, frozen=True):
    """Addresses, a part of them where they are many."""

    total: int = 0
    holdings: tuple[Holding, ...] = ()


class Dnsd(Daemon, frozen=True):
    """A dnsd's status."""

    dns: Dns = Dns()
    keeper: Keeper = Keeper()
    pool: Pool = Pool()
    names: Names = Names()
    leases: Leases = Leases()


# --- connector


class Check(Told, frozen=True):
    """A check of a backend."""

    kind: str
    target: str = ""
    verdict: str = "unknown"
    output: str = ""
    runner: str = ""


class Backend(Told, frozen=True):
    """A backend of a port."""

    backend: str
    protocol: str = ""
    port: int = 0
    verdict: str = "unknown"
    ejected: bool = False
    flows: int = 0
    weight: int = 1
    checks: tuple[Check, ...] = ()


class LeaseSeen(Told, frozen=True):
    """A service's lease."""

    ip: str
    ports: tuple[Port, ...] = ()


class Route(Told, frozen=True):
    """A service that a connector fronts."""

    verdict: str = "unknown"
    output: str = ""
    since_s: float | None = None
    registered: bool = False
    refused: str | None = None
    waiting_for_backend: bool = False
    lease: LeaseSeen | None = None
    backends: tuple[Backend, ...] = ()


class ConnectorRelay(Told, frozen=True):
    """A connector's connection to a relay; `version` is the relay's release."""

    name: str
    version: str | None = None
    address: str = ""
    connected: bool = False
    transport: str | None = None
    problem: str | None = None


class ConnectorSession(Told, frozen=True):
    """A session as a connector sees it."""

    service: str
    agent: str
    relay: str = ""
    state: str = ""


class ConnectorLink(Told, frozen=True):
    """A link's way at its connector; the agent's name is known once it has come this way."""

    agent: str | None = None
    relay: str = ""
    path: str = ""


class ConsulSeen(Told, frozen=True):
    """How a connector gets on with Consul."""

    problem: str | None = None


class ConnectorSelf(Told, frozen=True):
    """The connector itself."""

    id: str = ""
    services: Mapping[str, Route] = {}
    relays: tuple[ConnectorRelay, ...] = ()
    consul: ConsulSeen = ConsulSeen()
    sessions_total: int = 0
    sessions: tuple[ConnectorSession, ...] = ()
    links: tuple[ConnectorLink, ...] = ()
    udp_flows: int = 0
    tcp_flows: int = 0


class Connector(Daemon, frozen=True):
    """A connector's status."""

    connector: ConnectorSelf = ConnectorSelf()


# --- agent


class AgentRelay(Told, frozen=True):
    """An agent's connection to a relay; `version` is the relay's release."""

    relay: str
    version: str | None = None
    state: str = ""
    preferred: bool = False
    transport: str | None = None
    rtt_ms: float | None = None
    problem: str | None = None


class AgentService(Told, frozen=True):
    """A service as an agent has it."""

    service: str
    ip: str = ""
    ports: tuple[Port, ...] = ()
    listening: tuple[str, ...] = ()
    state: str = "idle"
    reason: str | None = None
    health: str = "unknown"
    connector: str | None = None


class AgentSession(Told, frozen=True):
    """A session as an agent sees it."""

    service: str
    connector: str
    relay: str = ""


class Candidate(Told, frozen=True):
    """A direct path that is tried."""

    address: str
    state: str = ""
    rtt_ms: float | None = None


class AgentLink(Told, frozen=True):
    """A link of an agent with a connector."""

    connector: str
    relay: str = ""
    carrier: str = ""
    path: str = ""
    sessions: int = 0
    rtt_ms: float | None = None
    candidates: tuple[Candidate, ...] = ()
    sent_bytes: int = 0
    received_bytes: int = 0


class Running(Told, frozen=True):
    """The TCP flows of a service."""

    flows: int = 0
    sent_bytes: int = 0
    received_bytes: int = 0


class Streams(Told, frozen=True):
    """An agent's TCP flows and their carriers."""

    flows: int = 0
    running: Mapping[str, Running] = {}
    carriers: int = 0
    idle: Mapping[str, int] = {}
    routes: Mapping[str, str] = {}


class AgentSelf(Told, frozen=True):
    """The agent itself."""

    mode: str = ""
    pool: str = ""
    relays: tuple[AgentRelay, ...] = ()
    services: tuple[AgentService, ...] = ()
    held_ports: Mapping[str, str] = {}
    sessions: tuple[AgentSession, ...] = ()
    links: tuple[AgentLink, ...] = ()
    streams: Streams = Streams()
    udp_flows: int = 0


class Agent(Daemon, frozen=True):
    """An agent's status."""

    agent: AgentSelf = AgentSelf()


KINDS: Mapping[str, type[Daemon]] = {
    "ztna-relay": Relay,
    "ztna-dnsd": Dnsd,
    "ztna-sidecar connector": Connector,
    "ztna-sidecar agent": Agent,
}


def read(status: object) -> Daemon:
    """Return what a status says; one whose details cannot be read is a plain Daemon that names the place.

    Raises ProtocolError when it is no status at all.
    """
    try:
        plain = msgspec.convert(status, Daemon)
    except msgspec.ValidationError as error:
        raise ProtocolError(f"no status of a daemon: {shortened(str(error))}") from None
    try:
        return msgspec.convert(status, KINDS.get(plain.daemon, Daemon))
    except msgspec.ValidationError as error:
        return msgspec.structs.replace(plain, unreadable=shortened(str(error)))
