"""Services that others registered with the local Consul agent under the tag `ztna`, as routes (design.md 4).

A definition file, Nomad or an API call made them; what stands in for them in the mesh is our own instance,
`<service>@<connector-id>`, registered beside theirs. Theirs are only read: never registered again, changed or removed.
Pure.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from sidecar.connector.routes import BACKENDS_PER_ROUTE_MAX
from sidecar.connector.sources import Definition, Origin
from ztna.catalog import MESH_TAG, AgentService, Status
from ztna.config import BackendConfig, Endpoint, RouteConfig
from ztna.errors import BadName
from ztna.leases import Port
from ztna.names import ConnectorId, ServiceName
from ztna.published import META_CONNECTOR, META_FRONTED_BY, ports_of, published

ORIGIN = Origin("consul")


def local_definitions(
    known: Mapping[str, AgentService],
    health: Mapping[str, Status],
    host: str,
    may_serve: Callable[[ServiceName], bool],
    own_id: ConnectorId,
) -> tuple[Definition, ...]:
    """Return the services to front: tagged, granted, and not a connector's own (those name one in their Meta).

    One that says which connector fronts it is for the connector of that id, `own_id` or not, and nobody else.
    `health` is the worst status of each instance that has checks; a critical one is no backend. An instance without
    an address is at `host`. Of an unusable one the definition says why.
    """
    grouped: dict[ServiceName, list[AgentService]] = {}
    for each in sorted(known.values(), key=lambda each: each.instance_id):
        if MESH_TAG in each.tags and META_CONNECTOR not in each.meta and _is_for(own_id, each):
            try:
                service = ServiceName(each.service)
            except BadName:
                continue  # no certificate can grant it
            if may_serve(service):
                grouped.setdefault(service, []).append(each)
    return tuple(_definition(service, group, health, host) for service, group in grouped.items())


def _is_for(own_id: ConnectorId, instance: AgentService) -> bool:
    return instance.meta.get(META_FRONTED_BY, own_id) == own_id


def _definition(
    service: ServiceName, instances: list[AgentService], health: Mapping[str, Status], host: str
) -> Definition:
    try:
        offered = {ports_of(each): each.instance_id for each in instances}
    except BadName as error:
        return Definition(service, ORIGIN, (), str(error))
    if len(offered) > 1:
        said = "; ".join(f"{who} says {published(ports) or 'none'}" for ports, who in sorted(offered.items()))
        return Definition(service, ORIGIN, (), f"instances disagree on the ports: {said}")
    (ports,) = offered
    if not ports:
        return Definition(service, ORIGIN, (), f"instance {instances[0].instance_id!r} has no port")
    healthy = [each for each in instances if health.get(each.instance_id, "passing") != "critical"]
    if not healthy:
        return Definition(service, ORIGIN, (), "no instance that Consul finds healthy")
    routes = tuple(_route(service, port, ports, healthy[:BACKENDS_PER_ROUTE_MAX], host) for port in ports)
    return Definition(service, ORIGIN, routes)


def _route(
    service: ServiceName, port: Port, ports: tuple[Port, ...], instances: Iterable[AgentService], host: str
) -> RouteConfig:
    backends: dict[Endpoint, BackendConfig] = {}
    for each in instances:
        address = Endpoint(each.address or host, _backend_port(each, port, ports))
        # Nomad and a definition file may both have registered what listens there.
        backends.setdefault(address, BackendConfig(address=address, weight=max(1, each.weight_passing)))
    return RouteConfig(
        service=service, port=port.port or None, protocol=port.protocol, backends=tuple(backends.values())
    )


def _backend_port(instance: AgentService, port: Port, ports: tuple[Port, ...]) -> int:
    """Where it really listens: at its own port when that is what it publishes, else at each one it publishes."""
    return instance.port if len(ports) == 1 and instance.port else port.port
