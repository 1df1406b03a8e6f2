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
META_PORTS = "ztna-ports"
META_VIRTUAL_IP = "ztna-virtual-ip"
META_WILDCARD = "ztna-wildcard"
PORTS_PER_SERVICE_MAX = 64

_PROTOCOLS: Mapping[str, Protocol] = {"tcp": "tcp", "udp": "udp", "icmp": "icmp"}
_PORT_TAG = re.compile(r"ztna-(tcp|udp|icmp):(\d{1,5})")
_PORT = re.compile(r"(tcp|udp|icmp):(\d{1,5})")


def published(ports: Iterable[Port]) -> str:
    """Return Meta `ztna-ports`, e.g. `tcp:8080,udp:53`."""
    return ",".join(map(port_text, ports))


def port_text(port: Port) -> str:
    """Return `tcp:8080`."""
    return f"{port.protocol}:{port.port}"


def ports_of(instance: Instance | AgentService) -> tuple[Port, ...]:
    """Return Meta `ztna-ports`, else tags `ztna-tcp:8080`, else the instance's own port as tcp.

    Raises BadName for what nobody can read.
    """
    listed = instance.meta.get(META_PORTS)
    if listed is not None:
        texts = [_PORT.fullmatch(part.strip()) for part in listed.split(",")]
    else:
        texts = [_PORT_TAG.fullmatch(tag) for tag in instance.tags if tag.startswith("ztna-")]
        if not texts:
            return (Port("tcp", instance.port),) if instance.port else ()
    ports = {
        Port(_PROTOCOLS[match[1]], int(match[2])) for match in texts if match and _is_port(match[1], match[2])
    }
    if None in texts or len(ports) != len(texts) or len(ports) > PORTS_PER_SERVICE_MAX:
        raise BadName(
            f"instance {instance.instance_id!r}: expected {META_PORTS} like 'tcp:8080,udp:53', each once, "
            f"at most {PORTS_PER_SERVICE_MAX}"
        )
    return tuple(sorted(ports))


def _is_port(protocol: str, number: str) -> bool:
    """ICMP has no ports: it is published as `icmp:0`."""
    return int(number) == 0 if protocol == "icmp" else 1 <= int(number) <= 65535
