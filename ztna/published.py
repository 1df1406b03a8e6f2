"""What an instance in Consul says it publishes, in its Meta and tags, whoever registered it (design.md 4).

Pure. A connector writes it and reads what others wrote; dnsd reads all of it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from ztna.catalog import AgentService, Instance
from ztna.errors import BadName
from ztna.leases import Port, Protocol

META_CONNECTOR = "ztna-connector"
META_FRONTED_BY = "ztna-fronted-by"
"""Of an instance that others registered: the id of the one connector that is to front it."""
META_PORTS = "ztna-ports"
META_VIRTUAL_IP = "ztna-virtual-ip"
META_WILDCARD = "ztna-wildcard"
PORTS_PER_SERVICE_MAX = 64

_PROTOCOLS: Mapping[str, Protocol] = {"tcp": "tcp", "udp": "udp", "icmp": "icmp"}
_TAG = "ztna-"
_PORT = re.compile(r"(tcp|udp|icmp):([0-9]{1,5})")


def published(ports: Iterable[Port]) -> str:
    """Return Meta `ztna-ports`, e.g. `tcp:8080,udp:53`."""
    return ",".join(map(port_text, ports))


def port_text(port: Port) -> str:
    """Return `tcp:8080`."""
    return f"{port.protocol}:{port.port}"


def port_of(text: str) -> Port | None:
    """Read what `port_text` wrote, None for what is no port; ICMP has none: it is published as `icmp:0`."""
    match = _PORT.fullmatch(text)
    if match is None:
        return None
    protocol, number = _PROTOCOLS[match[1]], int(match[2])
    return Port(protocol, number) if number <= 65535 and (number == 0) == (protocol == "icmp") else None


def ports_of(instance: Instance | AgentService) -> tuple[Port, ...]:
    """Return Meta `ztna-ports`, else tags `ztna-tcp:8080`, else the instance's own port as tcp.

    Raises BadName for what nobody can read.
    """
    listed = instance.meta.get(META_PORTS)
    if listed is not None:
        found = [port_of(part.strip()) for part in listed.split(",")]
    else:
        found = [port_of(tag.removeprefix(_TAG)) for tag in instance.tags if tag.startswith(_TAG)]
        if not found:
            return (Port("tcp", instance.port),) if instance.port else ()
    ports = {port for port in found if port is not None}
    if len(ports) != len(found) or len(ports) > PORTS_PER_SERVICE_MAX:
        raise BadName(
            f"instance {instance.instance_id!r}: expected {META_PORTS} like 'tcp:8080,udp:53', each once, "
            f"at most {PORTS_PER_SERVICE_MAX}"
        )
    return tuple(sorted(ports))
