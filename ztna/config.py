"""Configuration as types: file, then environment, then flags (design.md 3).

One YAML or JSON file, one top key per daemon (`relay`, `dnsd`, `connector`, `agent`) beside the shared
`consul`, `domain` and `log`. An unknown key or a bad value raises ConfigError with its path.
"""

from __future__ import annotations

from ipaddress import IPv4Network
from typing import Annotated, Literal

import msgspec

from ztna.leases import Protocol
from ztna.names import ConnectorId, ServiceName, Zone
from ztna.wire.control import Address

Seconds = Annotated[float, msgspec.Meta(gt=0, le=31_536_000)]
PortNumber = Annotated[int, msgspec.Meta(ge=1, le=65535)]
ListenPort = Annotated[int, msgspec.Meta(ge=0, le=65535)]
Count = Annotated[int, msgspec.Meta(ge=1, le=1_000_000)]


class _Section(msgspec.Struct, forbid_unknown_fields=True, frozen=True, kw_only=True, omit_defaults=False):
    """A section: unknown keys are errors."""


class Endpoint(msgspec.Struct, frozen=True, order=True):
    """`host:port` in a file; the host may be a name where a daemon dials it."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


class TlsConfig(_Section):
    """A daemon's own certificate chain and key (PEM, the key 0600) and whom it trusts."""

    certificate: str
    key: str
    ca: str


class ConsulConfig(_Section):
    """How to reach Consul's HTTP API."""

    address: str = "http://127.0.0.1:8500"
    token: str | None = None
    token_file: str | None = None
    datacenter: str | None = None
    ca: str | None = None
    certificate: str | None = None
    key: str | None = None
    timeout_s: Seconds = 10.0


class LogConfig(_Section):
    """`auto` is human on a terminal and JSON otherwise."""

    level: Literal["debug", "info", "warning", "error"] = "info"
    format: Literal["auto", "human", "json"] = "auto"


class PoolConfig(_Section):
    """The addresses that leases are taken from."""

    cidr: IPv4Network = IPv4Network("10.100.0.0/16")
    reserved: tuple[IPv4Network, ...] = ()


class DnsdConfig(_Section):
    """ztna-dnsd."""

    listen: Endpoint = Endpoint("127.0.0.1", 5533)
    admin: Endpoint = Endpoint("127.0.0.1", 9432)
    allow: tuple[IPv4Network, ...] = (IPv4Network("127.0.0.0/8"),)
    pool: PoolConfig = PoolConfig()
    keeper: bool = True
    ttl_s: Annotated[int, msgspec.Meta(ge=0, le=86400)] = 5
    negative_ttl_s: Annotated[int, msgspec.Meta(ge=0, le=86400)] = 10
    quarantine_s: Seconds = 3600.0
    grace_s: Seconds = 300.0
    keeper_session_ttl_s: Annotated[float, msgspec.Meta(ge=10, le=86400)] = 10.0


class RelayConfig(_Section):
    """ztna-relay. `name` must stand in its certificate as `relay.<name>.ztna`."""

    name: str
    tls: TlsConfig
    listen: Endpoint = Endpoint("0.0.0.0", 4433)
    forwarder: Endpoint = Endpoint("0.0.0.0", 4434)
    forwarder_advertise: Endpoint | None = None
    admin: Endpoint = Endpoint("127.0.0.1", 9431)
    resolvers: tuple[Endpoint, ...] = (Endpoint("127.0.0.1", 5533),)
    dns_insecure: bool = False
    reset_key_file: str | None = None
    retry: bool = True
    sessions_per_identity: Count = 1000
    sessions_total: Count = 100_000
    half_open_max: Count = 1000
    srv_hold_s: Seconds = 600.0
    drain_s: Seconds = 25.0


class RelayTarget(_Section):
    """A relay that an agent or connector connects to, and the name its certificate must carry."""

    address: Endpoint
    name: str


class CheckConfig(_Section):
    """How a backend's health is found out."""

    kind: Literal["tcp", "http", "none"] = "tcp"
    path: str = "/"
    interval_s: Seconds = 5.0
    timeout_s: Seconds = 2.0
    success_before_passing: Count = 1
    failures_before_critical: Count = 2


class RouteConfig(_Section):
    """One service: where its backend listens, its virtual port, how it is checked."""

    service: ServiceName
    backend: Endpoint
    port: PortNumber
    protocol: Protocol = "tcp"
    check: CheckConfig = CheckConfig()
    connect_timeout_s: Seconds = 5.0
    udp_idle_s: Seconds = 120.0
    allow_v1: bool = False
    weight: Annotated[int, msgspec.Meta(ge=1, le=65535)] = 1


class ConnectorConfig(_Section):
    """ztna-sidecar connector."""

    id: ConnectorId
    tls: TlsConfig
    relays: tuple[RelayTarget, ...]
    routes: tuple[RouteConfig, ...]
    link: Endpoint = Endpoint("0.0.0.0", 4435)
    link_advertise: Address | None = None
    admin: Endpoint = Endpoint("127.0.0.1", 9433)
    deregister_critical_after_s: Annotated[float, msgspec.Meta(ge=60, le=31_536_000)] = 600.0
    ttl_s: Annotated[float, msgspec.Meta(ge=3, le=86400)] = 15.0
    flows_per_agent: Count = 1000
    flows_total: Count = 20_000
    drain_s: Seconds = 25.0


class AgentConfig(_Section):
    """ztna-sidecar agent."""

    tls: TlsConfig
    relays: tuple[RelayTarget, ...]
    mode: Literal["listen", "anyip"] = "listen"
    pool: IPv4Network = IPv4Network("10.100.0.0/16")
    direct: bool = True
    admin: Endpoint = Endpoint("127.0.0.1", 9434)
    flows_total: Count = 20_000
    udp_idle_s: Seconds = 120.0
    drain_s: Seconds = 5.0


class Config(_Section):
    """A whole file; a daemon reads the shared sections and its own."""

    domain: Zone = Zone("ztna.local")
    consul: ConsulConfig = ConsulConfig()
    log: LogConfig = LogConfig()
    dnsd: DnsdConfig | None = None
    relay: RelayConfig | None = None
    connector: ConnectorConfig | None = None
    agent: AgentConfig | None = None
