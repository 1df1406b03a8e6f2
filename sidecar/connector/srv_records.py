"""Backends out of DNS: what SRV records of a name make of a route whose backend is `srv://<name>` (RFC 2782).

Pure; sidecar.connector.srv asks for the records.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import msgspec

from sidecar.connector.routes import BACKENDS_PER_ROUTE_MAX, RouteTable
from sidecar.connector.sources import Definition
from ztna.config import BackendConfig, Endpoint, RouteConfig
from ztna.errors import ConfigError
from ztna.resolver import SrvRecord

Known = Callable[[str], tuple[BackendConfig, ...]]
"""Returns the backends of a name now. Raises ConfigError saying why it has none, NotYetKnown before any answer."""


class NotYetKnown(ConfigError):
    """DNS has not answered yet, not even that there is no such name."""


def backends_of(records: Iterable[SrvRecord]) -> tuple[BackendConfig, ...]:
    """Return a backend for each address of each record's target, in an order that does not depend on the answer's.

    Of too many those with the lowest priority are kept. A record of weight 0 has "a very small chance" (RFC 2782): the
    smallest weight there is.
    """
    made = [
        BackendConfig(
            address=Endpoint(address, record.port), weight=max(1, record.weight), priority=record.priority
        )
        for record in records
        if record.port
        for address in record.addresses
    ]
    made.sort(key=lambda each: (each.priority, each.address, each.weight))
    first: dict[Endpoint, BackendConfig] = {}
    for each in made:
        first.setdefault(each.address, each)
    return tuple(first.values())[:BACKENDS_PER_ROUTE_MAX]


def names_of(definitions: Iterable[Definition]) -> frozenset[str]:
    """Return the SRV names that these definitions ask for."""
    return frozenset(
        name
        for each in definitions
        for route in each.routes
        if route.backend is not None and (name := route.backend.srv_name) is not None
    )


def resolved(definition: Definition, known: Known) -> Definition:
    """Return the definition with backends in place of names. Raises ConfigError for a name that has none."""
    if not names_of((definition,)):
        return definition
    routes = tuple(_resolved(route, known) for route in definition.routes)
    return Definition(definition.service, definition.origin, routes, definition.problem)


def _resolved(route: RouteConfig, known: Known) -> RouteConfig:
    name = None if route.backend is None else route.backend.srv_name
    if name is None:
        return route
    if route.backends:
        raise ConfigError(f"{route.service}: expected backend or backends, got both")
    return msgspec.structs.replace(route, backend=None, backends=known(name))


def sound(routes: Iterable[RouteConfig]) -> RouteTable:
    """Return the table of routes as if DNS knew their names. Raises ConfigError naming the one that is not in order."""
    return RouteTable([_resolved(route, lambda name: _ANY) for route in routes])


_ANY = (BackendConfig(address=Endpoint("127.0.0.1", 1)),)
