"""What Consul should know of our services, what it knows, and the steps from one to the other (design.md 4).

Pure; sidecar.connector.registration carries the steps out. Ids of Nomad (`_nomad-...`) and of anybody else are never
touched: only `<service>@<our connector id>` with our id in its Meta is ours, also when a crashed predecessor left it.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass

from sidecar.connector.health import Verdict
from sidecar.connector.routes import ServiceRoutes
from ztna.catalog import (
    MESH_TAG,
    AgentService,
    CheckDefinition,
    ProbeDefinition,
    Registration,
    TaggedAddress,
)
from ztna.leases import Lease
from ztna.names import ConnectorId, ServiceName
from ztna.published import META_CONNECTOR, META_PORTS, META_VIRTUAL_IP, META_WILDCARD, published
from ztna.wire.control import Address

VIRTUAL = "virtual"
OUTPUT_CHARACTERS = 512


@dataclass(frozen=True, slots=True)
class Desired:
    """One of our services as it stands now; `since` and the `now` of a plan are of one clock, in seconds."""

    routes: ServiceRoutes
    weight: int
    verdict: Verdict
    since: float
    output: str
    lease: Lease | None = None
    reported: Verdict | None = None
    """What its TTL check says, when that is not the whole: the others Consul's agent finds by `probes`."""
    probes: tuple[ProbeDefinition, ...] = ()

    @property
    def ttl_verdict(self) -> Verdict:
        """What its TTL check says."""
        return self.verdict if self.reported is None else self.reported


@dataclass(frozen=True, slots=True)
class Registrant:
    """What all our registrations share; `link` is the catalog address of every instance."""

    connector_id: ConnectorId
    link: Address
    ttl_s: float
    deregister_after_s: float


@dataclass(frozen=True, slots=True)
class Plan:
    """Steps in order: `deregister` ids, then `register`; `waiting` are reaped services that are still critical."""

    deregister: tuple[str, ...]
    register: tuple[Registration, ...]
    waiting: tuple[ServiceName, ...]


def instance_id(service: ServiceName, connector_id: ConnectorId) -> str:
    """Return the id of our instance of a service."""
    return f"{service}@{connector_id}"


def check_id(service: ServiceName, connector_id: ConnectorId) -> str:
    """Return the id of our TTL check of a service."""
    return f"ztna:{instance_id(service, connector_id)}"


def registration(desired: Desired, registrant: Registrant) -> Registration:
    """Return how Consul should know a service of ours."""
    service, connector_id = desired.routes.service, registrant.connector_id
    check = CheckDefinition(
        check_id=check_id(service, connector_id),
        name=f"backend of {service} as {connector_id} sees it",
        ttl_s=registrant.ttl_s,
        status=desired.ttl_verdict,
        deregister_after_s=registrant.deregister_after_s,
    )
    return Registration(
        service=service,
        instance_id=instance_id(service, connector_id),
        address=registrant.link.ip,
        port=registrant.link.port,
        tags=(MESH_TAG,),
        meta=_meta(desired.routes, connector_id),
        tagged_addresses=_virtual(desired),
        weight_passing=desired.weight,
        weight_warning=desired.weight,
        checks=(check, *desired.probes),
    )


def plan(
    desired: Iterable[Desired],
    known: Mapping[str, AgentService],
    registrant: Registrant,
    now: float,
    *,
    anew: Container[ServiceName] = (),
    is_all: bool = True,
) -> Plan:
    """Return the steps that bring the local Consul agent's services to what we want.

    A service that is missing is registered, except one that Consul had reason to reap: it was critical for
    `deregister_after_s`, and registering it again would make it flap. That one waits until its backend passes.
    Those `anew` are registered again though they look as they should: their checks or their token do not. While what is
    wanted `is_all` that we will want it is known what a predecessor left for good, and only then removed.
    """
    wanted = {instance_id(each.routes.service, registrant.connector_id): each for each in desired}
    register: list[Registration] = []
    waiting: list[ServiceName] = []
    for own_id, each in wanted.items():
        target = registration(each, registrant)
        if own_id in known:
            if each.routes.service in anew or _differs(target, known[own_id]):
                register.append(target)
        elif each.verdict == "critical" and now - each.since >= registrant.deregister_after_s:
            waiting.append(each.routes.service)
        else:
            register.append(target)
    zombies = [
        each.instance_id
        for each in known.values()
        if is_all and each.instance_id not in wanted and _is_ours(each, registrant.connector_id)
    ]
    return Plan(tuple(sorted(zombies)), tuple(register), tuple(waiting))


def own_ids(known: Mapping[str, AgentService], connector_id: ConnectorId) -> tuple[str, ...]:
    """Return the ids among the agent's services that are ours, for a clean exit."""
    return tuple(sorted(each.instance_id for each in known.values() if _is_ours(each, connector_id)))


def _is_ours(service: AgentService, connector_id: ConnectorId) -> bool:
    return (
        service.instance_id == f"{service.service}@{connector_id}"
        and service.meta.get(META_CONNECTOR) == connector_id
        and MESH_TAG in service.tags
    )


def _meta(routes: ServiceRoutes, connector_id: ConnectorId) -> dict[str, str]:
    meta = {META_CONNECTOR: str(connector_id), META_PORTS: published(routes.ports)}
    if routes.virtual_ip is not None:
        meta[META_VIRTUAL_IP] = str(routes.virtual_ip)
    if routes.wildcard:
        meta[META_WILDCARD] = "true"
    return meta


def _virtual(desired: Desired) -> dict[str, TaggedAddress]:
    if desired.lease is None:
        return {}
    return {VIRTUAL: TaggedAddress(str(desired.lease.ip), desired.routes.ports[0].port)}


def _differs(target: Registration, known: AgentService) -> bool:
    return (
        (target.service, target.address, target.port, target.weight_passing, target.weight_warning)
        != (known.service, known.address, known.port, known.weight_passing, known.weight_warning)
        or set(target.tags) != set(known.tags)
        or dict(target.meta) != dict(known.meta)
        # Consul adds lan_ipv4 and wan_ipv4 of its own.
        or target.tagged_addresses.get(VIRTUAL) != known.tagged_addresses.get(VIRTUAL)
    )
