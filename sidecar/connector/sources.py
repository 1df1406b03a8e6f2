"""Where services are defined, and which definition counts when a name comes from two places.

    configuration file > routes_dir (by file name) > local API > Consul

A service is taken whole from one place: its ports are never mixed. Pure; who reads each place tells
sidecar.connector.discovery.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

from sidecar.connector.routes import RouteTable, ServiceRoutes
from ztna.config import RouteConfig
from ztna.errors import ConfigError
from ztna.identity import Identity
from ztna.names import ServiceName

SERVICES_MAX = 5_000
"""How many services one connector fronts, whatever they come from."""

KEPT = "what it had before is in use"

Kind = Literal["config", "file", "api", "consul"]

_RANK: Mapping[Kind, int] = {"config": 0, "file": 1, "api": 2, "consul": 3}


class Origin(NamedTuple):
    """One place that defines services; `name` is a file's."""

    kind: Kind
    name: str = ""

    def __str__(self) -> str:
        return self.name if self.kind == "file" else self.kind


@dataclass(frozen=True, slots=True)
class Definition:
    """One service as one place defines it; with a `problem` it cannot be used as it stands."""

    service: ServiceName
    origin: Origin
    routes: tuple[RouteConfig, ...]
    problem: str | None = None


@dataclass(frozen=True, slots=True)
class Entry:
    """What became of a name: the definition that counts, those that do not, and why it cannot be used, if so.

    `used` is the place whose routes are in use, None while there are none. While it `is_awaited`, DNS has not yet said
    for the first time where its backends are, and the problem is no more than that.
    """

    definition: Definition
    shadowed: tuple[Origin, ...] = ()
    problem: str | None = None
    is_awaited: bool = False
    used: Origin | None = None

    @property
    def is_kept(self) -> bool:
        """Whether what is in use is what it had before, as what it has now cannot be used."""
        return self.problem is not None and self.used is not None


@dataclass(frozen=True, slots=True)
class Settled:
    """All names that are defined, and the routes of those that are fronted."""

    entries: Mapping[ServiceName, Entry]
    table: RouteTable

    def kept(self, entry: Entry) -> tuple[ServiceRoutes | None, Origin | None]:
        """Return what a service has in use and from where, if the place that it came from still defines it."""
        known = self.entries.get(entry.definition.service)
        if known is None or known.used not in (entry.definition.origin, *entry.shadowed):
            return None, None
        return self.table.services[entry.definition.service], known.used


NOTHING = Settled({}, RouteTable.of({}))


def definitions(routes: Iterable[RouteConfig], origin: Origin) -> tuple[Definition, ...]:
    """Return the services that the routes of one place make, in the order of their first route."""
    grouped: dict[ServiceName, list[RouteConfig]] = {}
    for route in routes:
        grouped.setdefault(route.service, []).append(route)
    return tuple(Definition(service, origin, tuple(group)) for service, group in grouped.items())


def chosen(found: Iterable[Definition]) -> dict[ServiceName, Entry]:
    """Return the definition that counts of each name, and where else it is defined."""
    by_name: dict[ServiceName, list[Definition]] = {}
    for each in sorted(found, key=lambda each: (_RANK[each.origin.kind], each.origin.name)):
        by_name.setdefault(each.service, []).append(each)
    return {
        service: Entry(group[0], tuple(each.origin for each in group[1:]), group[0].problem)
        for service, group in by_name.items()
    }


def settle(
    entries: Mapping[ServiceName, Entry],
    identity: Identity,
    before: Settled,
    check: Callable[[RouteTable], None],
) -> Settled:
    """Return what is fronted: granted by our certificate, its routes in order, and within SERVICES_MAX.

    One that cannot be has a problem and keeps no other out. What is as it was `before` is the very same object; of
    what is not, `check` raises ConfigError when this host lacks what it needs, a file most often: then what was in use
    stays in use, and the problem says so.
    """
    settled: dict[ServiceName, Entry] = {}
    services: dict[ServiceName, ServiceRoutes] = {}
    for service, entry in entries.items():
        problem, routes = entry.problem, None
        if problem is None:
            try:
                routes = usable(entry.definition, identity)
                if len(services) >= SERVICES_MAX:
                    raise ConfigError(f"{service}: expected at most {SERVICES_MAX} services")
            except ConfigError as error:
                problem, routes = str(error), None
        if routes is not None and before.table.services.get(service) == routes:
            routes = before.table.services[service]
        elif routes is not None:
            problem = _lacking(check, routes)
        if problem is None and routes is not None:
            used: Origin | None = entry.definition.origin
        else:
            may_keep = routes is not None or (entry.is_awaited and identity.may_serve(service))
            may_keep &= len(services) < SERVICES_MAX
            routes, used = before.kept(entry) if may_keep else (None, None)
            problem = f"{problem}; {KEPT}" if routes is not None else problem
        if routes is not None:
            services[service] = routes
        settled[service] = replace(entry, problem=problem, used=used)
    return Settled(settled, RouteTable.of(services))


def _lacking(check: Callable[[RouteTable], None], routes: ServiceRoutes) -> str | None:
    """Return what this host lacks for a service, in words."""
    try:
        check(RouteTable.of({routes.service: routes}))
    except ConfigError as error:
        return str(error)
    return None


def usable(definition: Definition, identity: Identity) -> ServiceRoutes:
    """Return a definition's routes. Raises ConfigError when our certificate or the routes themselves forbid it."""
    service = definition.service
    if not identity.may_serve(service):
        raise ConfigError(lacks_grant(service))
    return RouteTable(definition.routes).services[service]


def lacks_grant(service: ServiceName) -> str:
    """Return what our certificate lacks to front a service, in words."""
    return f"{service} needs connector.{service}.ztna in connector.tls.certificate"
