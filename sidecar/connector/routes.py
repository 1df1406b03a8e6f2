"""The route table: service and published port -> backend, check and limits (design decision 6).

Pure. Dials nothing and knows no health; `destination` of a flow picks a published port here, never an address.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from ipaddress import IPv4Address

from sidecar.connector.checks import CHECKS_PER_ROUTE_MAX, Check, parse
from ztna.config import Endpoint, RouteConfig
from ztna.errors import ConfigError
from ztna.identity import Identity
from ztna.leases import Port, Protocol
from ztna.names import ConnectorId, ServiceName

ICMP_PORT = 0
"""ICMP has no ports: it is published as `icmp:0`."""


@dataclass(frozen=True, slots=True)
class Route:
    """One published port of a service and the backend behind it."""

    service: ServiceName
    port: Port
    backend: Endpoint
    checks: tuple[Check, ...]
    connect_timeout_s: float
    udp_idle_s: float
    allow_v1: bool = False
    answers_pings: bool = False
    """Whether the connector answers pings itself (ICMP)."""


@dataclass(frozen=True, slots=True)
class ServiceRoutes:
    """All routes of one service, in the order of their ports; `virtual_ip` is the address it asks for."""

    service: ServiceName
    routes: tuple[Route, ...]
    weight: int
    virtual_ip: IPv4Address | None = None
    wildcard: bool = False
    slow_start_s: float = 0.0

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
            if config.allow_v1 and config.protocol != "udp":
                raise ConfigError(
                    f"connector.routes[{index}].allow_v1: expected protocol udp, which is what v1 agents are "
                    f"served, got {config.protocol}"
                )
            grouped.setdefault(config.service, []).append(
                (config, _route(config, f"connector.routes[{index}]"))
            )
        if not grouped:
            raise ConfigError("connector.routes: expected at least one route")
        self.services: Mapping[ServiceName, ServiceRoutes] = {
            service: _service_routes(service, group) for service, group in grouped.items()
        }
        self._routes = {
            (route.service, route.port): route
            for service in self.services.values()
            for route in service.routes
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
    )


def _route(config: RouteConfig, where: str) -> Route:
    if not 0 < len(config.checks) <= CHECKS_PER_ROUTE_MAX:
        raise ConfigError(
            f"{where}.checks: expected 1 to {CHECKS_PER_ROUTE_MAX} (kind none checks nothing), got {len(config.checks)}"
        )
    return Route(
        service=config.service,
        port=_port(config, where),
        backend=config.backend,
        checks=tuple(
            parse(check, config.protocol, config.backend, f"{where}.checks[{number}]")
            for number, check in enumerate(config.checks)
        ),
        connect_timeout_s=config.connect_timeout_s,
        udp_idle_s=config.udp_idle_s,
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
