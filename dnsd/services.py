"""What the instances in the catalog together say of a service: its ports, or why it cannot be served.

Pure. Both the keeper and the zone read the catalog through this, so that they never disagree.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from ipaddress import AddressValueError, IPv4Address

import msgspec

from ztna.catalog import Instance
from ztna.errors import BadName
from ztna.leases import Port
from ztna.names import ConnectorId, ServiceName
from ztna.published import META_CONNECTOR, META_VIRTUAL_IP, META_WILDCARD, port_text, ports_of


class Service(msgspec.Struct, frozen=True):
    """A service of the catalog. With a `problem` it has no ports and is not served; the text says why.

    `virtual_ip` is the address its definition asks for; `virtual_ip_problem` says why that cannot be told.
    With `wildcard`, every name under the service's leads to it, too.
    """

    name: str
    ports: tuple[Port, ...]
    instances: tuple[Instance, ...]
    problem: str | None = None
    virtual_ip: IPv4Address | None = None
    virtual_ip_problem: str | None = None
    wildcard: bool = False


def describe(name: str, instances: tuple[Instance, ...]) -> Service:
    """Return the service that these instances (at least one) make.

    A name that is no service name, ports nobody can read and instances that disagree on the ports are
    problems (design.md 4).
    """
    try:
        ServiceName(name)
        published = {ports_of(instance): instance.instance_id for instance in instances}
    except BadName as error:
        return Service(name, (), instances, str(error))
    if len(published) > 1:
        said = "; ".join(
            f"{instance_id} says {','.join(map(port_text, ports)) or 'none'}"
            for ports, instance_id in sorted(published.items())
        )
        return Service(name, (), instances, f"instances disagree on the ports: {said}")
    (ports,) = published
    asked, unclear = _virtual_ip(instances)
    wildcard = any(instance.meta.get(META_WILDCARD) == "true" for instance in instances)
    return Service(name, ports, instances, None, asked, unclear, wildcard)


def describe_all(
    catalog: Mapping[str, tuple[Instance, ...]], previous: Mapping[str, Service] | None = None
) -> Mapping[str, Service]:
    """Describe every service of a catalog; what did not change since `previous` is the very same object."""
    before = previous or {}
    services: dict[str, Service] = {}
    for name, instances in catalog.items():
        known = before.get(name)
        unchanged = known is not None and (known.instances is instances or known.instances == instances)
        services[name] = known if known is not None and unchanged else describe(name, instances)
    return services


def connectors(service: Service) -> Iterator[tuple[ConnectorId, Instance]]:
    """Yield the passing instances that a connector serves, with its id: what a relay may route to."""
    for instance in service.instances:
        connector = instance.meta.get(META_CONNECTOR, "")
        if connector and instance.status == "passing" and 0 < instance.port <= 65535:
            try:
                yield ConnectorId(connector), instance
            except BadName:
                continue


def _virtual_ip(instances: tuple[Instance, ...]) -> tuple[IPv4Address | None, str | None]:
    """Return the address that the definitions ask for, or why that is unclear.

    Instances that ask for none are silent; a wish that is unclear does not stop the service.
    """
    asked = {
        instance.meta[META_VIRTUAL_IP]: instance.instance_id
        for instance in instances
        if instance.meta.get(META_VIRTUAL_IP)
    }
    if len(asked) > 1:
        said = "; ".join(f"{instance_id} says {text!r}" for text, instance_id in sorted(asked.items()))
        return None, f"instances ask for different virtual addresses: {said}"
    for text, instance_id in asked.items():
        try:
            return IPv4Address(text), None
        except AddressValueError:
            return None, f"instance {instance_id!r} asks for {text!r}, which is no IPv4 address"
    return None, None
