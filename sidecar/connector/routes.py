"""The route table: service and published port -> backends, checks and limits (design decision 6).

Pure. Dials nothing and knows no health; `destination` of a flow picks a published port here, never an address.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from ipaddress import IPv4Address
from typing import Literal

from sidecar.connector.balance import Policy
from sidecar.connector.checks import CHECKS_PER_ROUTE_MAX, Check, parse
from sidecar.connector.proxy_protocol import own_header
from ztna.config import BackendConfig, BackendTlsConfig, CheckConfig, Endpoint, RouteConfig
from ztna.errors import ConfigError
from ztna.identity import Identity
from ztna.leases import Port, Protocol
from ztna.names import ConnectorId, ServiceName

ICMP_PORT = 0
"""ICMP has no ports: it is published as `icmp:0`."""
PING_IDLE_SECONDS = 60.0
"""RFC 5508, 3.1: an ICMP query session lives that long at least."""
BACKENDS_PER_ROUTE_MAX = 64

ProxyProtocol = Literal["none", "v1", "v2"]


@dataclass(frozen=True, slots=True)
class Backend:
    """One place where a port of a service is really served."""

    address: Endpoint
    weight: int
    checks: tuple[Check, ...]
    priority: int = 0


@dataclass(frozen=True, slots=True)
class Route:
    """One published port of a service and the backends behind it."""

    service: ServiceName
    port: Port
    backends: tuple[Backend, ...]
    policy: Policy
    connect_timeout_s: float
    tcp_idle_s: float
    udp_idle_s: float
    proxy_protocol: ProxyProtocol = "none"
    backend_tls: BackendTlsConfig | None = None
    allow_v1: bool = False
    answers_pings: bool = False
    """Whether the connector answers pings itself (ICMP)."""

    @property
    def weights(self) -> dict[Endpoint, int]:
        """The weight of each backend."""
        return {backend.address: backend.weight for backend in self.backends}

    @property
    def priorities(self) -> dict[Endpoint, int]:
        """The priority of each backend: those of a higher number only serve when none of a lower one can."""
        return {backend.address: backend.priority for backend in self.backends}

    def is_same(self, other: Route) -> bool:
        """Whether it is the same published port, in whichever table."""
        return (self.service, self.port) == (other.service, other.port)


@dataclass(frozen=True, slots=True)
class ServiceRoutes:
    """All routes of one service, in the order of their ports; `virtual_ip` is the address it asks for."""

    service: ServiceName
    routes: tuple[Route, ...]
    weight: int
    virtual_ip: IPv4Address | None = None
    wildcard: bool = False
    slow_start_s: float = 0.0
    drain_s: float | None = None

    @property
    def allow_v1(self) -> bool:
        """Whether a v1 agent can reach any of its ports."""
        return any(route.allow_v1 for route in self.routes)

    @property
    def ports(self) -> tuple[Port, ...]:
        """What the service publishes."""
        return tuple(route.port for route in self.routes)


class RouteTable:
    """The services a connector fronts; never changes."""

    def __init__(self, configs: Iterable[RouteConfig]) -> None:
        """Group the routes by service. Raises ConfigError naming the route that cannot be used."""
        grouped: dict[ServiceName, list[tuple[RouteConfig, Route]]] = {}
        for index, config in enumerate(configs):
            _require_protocol(config, f"connector.routes[{index}]")
            grouped.setdefault(config.service, []).append(
                (config, _route(config, f"connector.routes[{index}]"))
            )
        self._set({service: _service_routes(service, group) for service, group in grouped.items()})

    @classmethod
    def of(cls, services: Mapping[ServiceName, ServiceRoutes]) -> RouteTable:
        """Return the table of these services."""
        made = cls(())
        made._set(services)
        return made

    def _set(self, services: Mapping[ServiceName, ServiceRoutes]) -> None:
        self.services: Mapping[ServiceName, ServiceRoutes] = services
        self._routes = {
            (route.service, route.port): route for service in services.values() for route in service.routes
        }

    @property
    def pings(self) -> bool:
        """Whether a backend is to answer pings."""
        return any(
            route.port.protocol == "icmp" and not route.answers_pings for route in self._routes.values()
        )

    def pick(self, service: ServiceName, protocol: Protocol, port: int) -> Route | None:
        """Return the route behind a published port, None when the service publishes no such port."""
        return self._routes.get((service, Port(protocol, port)))

    def require_granted(self, identity: Identity, connector_id: ConnectorId) -> None:
        """Raise ConfigError when our own certificate does not let us be this connector of these services."""
        if not identity.carries(connector_id):
            raise ConfigError(
                f"connector.id: {connector_id} needs id.{connector_id.name}.ztna in connector.tls.certificate"
            )
        for service in self.services:
            if not identity.may_serve(service):
                raise ConfigError(
                    f"connector.routes: {service} needs connector.{service}.ztna in connector.tls.certificate"
                )


def _service_routes(service: ServiceName, group: list[tuple[RouteConfig, Route]]) -> ServiceRoutes:
    configs = [config for config, _ in group]
    weights = {config.weight for config in configs}
    if len(weights) > 1:
        raise ConfigError(
            f"connector.routes: {service}: expected one weight, got {', '.join(map(str, sorted(weights)))}"
        )
    asked = {config.virtual_ip for config in configs if config.virtual_ip is not None}
    if len(asked) > 1:
        raise ConfigError(
            f"connector.routes: {service}: expected one virtual_ip, got {', '.join(map(str, sorted(asked)))}"
        )
    routes = sorted((route for _, route in group), key=_place)
    for first, second in itertools.pairwise(routes):
        if first.port == second.port:
            raise ConfigError(
                f"connector.routes: {service}: {first.port.protocol} port {first.port.port} is routed twice"
            )
    return ServiceRoutes(
        service=service,
        routes=tuple(routes),
        weight=configs[0].weight,
        virtual_ip=next(iter(asked), None),
        wildcard=any(config.wildcard for config in configs),
        slow_start_s=max(config.slow_start_s for config in configs),
        drain_s=max((config.drain_s for config in configs if config.drain_s is not None), default=None),
    )


def _require_protocol(config: RouteConfig, where: str) -> None:
    """Raise ConfigError for a key that means nothing to the route's protocol."""
    for key, is_set, protocol, why in (
        ("allow_v1", config.allow_v1, "udp", "which is what v1 agents are served"),
        ("proxy_protocol", config.proxy_protocol != "none", "tcp", "which has a beginning to say it at"),
        ("backend_tls", config.backend_tls is not None, "tcp", "which TLS runs on"),
    ):
        if is_set and config.protocol != protocol:
            raise ConfigError(f"{where}.{key}: expected protocol {protocol}, {why}, got {config.protocol}")


def _route(config: RouteConfig, where: str) -> Route:
    tls = config.backend_tls
    if tls is not None and (tls.certificate is None) != (tls.key is None):
        raise ConfigError(f"{where}.backend_tls: expected certificate and key, or neither")
    return Route(
        service=config.service,
        port=_port(config, where),
        backends=_backends(config, where),
        policy=Policy(config.balance, config.eject_after, config.eject_s),
        connect_timeout_s=config.connect_timeout_s,
        tcp_idle_s=config.tcp_idle_s,
        udp_idle_s=PING_IDLE_SECONDS if config.protocol == "icmp" else config.udp_idle_s,
        proxy_protocol=config.proxy_protocol,
        backend_tls=tls,
        allow_v1=config.allow_v1,
        answers_pings=config.icmp == "connector",
    )


def _port(config: RouteConfig, where: str) -> Port:
    if config.protocol == "icmp":
        if config.port is not None:
            raise ConfigError(f"{where}.port: icmp has no ports, leave it out; got {config.port}")
        return Port("icmp", ICMP_PORT)
    if config.icmp != "backend":
        raise ConfigError(f"{where}.icmp: only a route of protocol icmp has it, got {config.protocol}")
    if config.port is None:
        raise ConfigError(f"{where}.port: expected the port on the virtual address")
    return Port(config.protocol, config.port)


def _place(route: Route) -> tuple[bool, Port]:
    """ICMP stands last: where one port stands for a service, it is one that programs can connect to."""
    return (route.port.protocol == "icmp", route.port)


def _backends(config: RouteConfig, where: str) -> tuple[Backend, ...]:
    if (config.backend is None) == (not config.backends):
        raise ConfigError(
            f"{where}: expected backend or backends, got {'both' if config.backends else 'neither'}"
        )
    if len(config.backends) > BACKENDS_PER_ROUTE_MAX:
        raise ConfigError(
            f"{where}.backends: expected at most {BACKENDS_PER_ROUTE_MAX}, got {len(config.backends)}"
        )
    if config.backend is not None:
        if config.backend.srv_name is not None:
            raise ConfigError(f"{where}.backend: {config.backend} has to be asked for in DNS first")
        return (
            _backend(
                BackendConfig(address=Endpoint(config.backend.host, config.backend.port)), config, where
            ),
        )
    backends = tuple(
        _backend(each, config, where if each.checks is None else f"{where}.backends[{number}]")
        for number, each in enumerate(config.backends)
    )
    twice = [address for address, times in Counter(each.address for each in backends).items() if times > 1]
    if twice:
        raise ConfigError(f"{where}.backends: {twice[0]} is there twice: give it the weight instead")
    return backends


def _backend(config: BackendConfig, route: RouteConfig, where: str) -> Backend:
    checks: tuple[CheckConfig, ...] = route.checks if config.checks is None else config.checks
    if not 0 < len(checks) <= CHECKS_PER_ROUTE_MAX:
        raise ConfigError(
            f"{where}.checks: expected 1 to {CHECKS_PER_ROUTE_MAX} (kind none checks nothing), got {len(checks)}"
        )
    return Backend(
        address=config.address,
        weight=config.weight,
        priority=config.priority,
        checks=tuple(
            _introduced(parse(check, route.protocol, config.address, f"{where}.checks[{number}]"), route)
            for number, check in enumerate(checks)
        ),
    )


def _introduced(check: Check, route: RouteConfig) -> Check:
    """Return a tcp check as a backend that wants PROXY headers takes it; another port of it may not."""
    if route.proxy_protocol == "none" or check.kind != "tcp" or check.config.port is not None:
        return check
    return replace(check, introduction=own_header(route.proxy_protocol))
