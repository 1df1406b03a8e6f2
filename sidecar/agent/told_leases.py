"""Read leases from what DNS says of services (design.md 6): TXT has ports and epoch, A the address. Pure."""

from __future__ import annotations

from collections.abc import Iterator
from ipaddress import IPv4Address

from ztna.dns import HostData, Message, Type
from ztna.errors import BadName
from ztna.leases import EPOCH_MAX, Lease
from ztna.names import ServiceName, Zone
from ztna.published import PORTS_PER_SERVICE_MAX, port_of

_PORTS, _EPOCH = "ports=", "epoch="


def told(name: str, text: Message, address: Message) -> Lease | None:
    """Return the lease that a name's TXT and A records tell, None when they tell none."""
    ip = next(
        (each.data for each in address.answers if each.name == name and isinstance(each.data, IPv4Address)),
        None,
    )
    lines = [
        string.decode("ascii", "replace")
        for each in text.answers
        if each.name == name and each.type == Type.TXT and isinstance(each.data, tuple)
        for string in each.data
    ]
    epochs = [line.removeprefix(_EPOCH) for line in lines if line.startswith(_EPOCH)]
    if ip is None or len(epochs) != 1 or not epochs[0].isdecimal() or int(epochs[0]) > EPOCH_MAX:
        return None
    found = [
        port_of(item)
        for line in lines
        if line.startswith(_PORTS)
        for item in line.removeprefix(_PORTS).split(",")
        if item
    ]
    ports = tuple(port for port in found if port is not None)
    return Lease(ip, int(epochs[0]), ports) if len(ports) == len(found) <= PORTS_PER_SERVICE_MAX else None


def service_of(name: str, zone: Zone) -> ServiceName | None:
    """Return the service whose name this is, or below whose name it is; None for a name of something else."""
    relative = name.lower().removesuffix(f".{zone}")
    if relative == name.lower():
        return None
    try:
        return ServiceName(relative.rpartition(".")[2])
    except BadName:
        return None


def listed(message: Message, zone: Zone) -> Iterator[ServiceName]:
    """Yield the services that `_services._dns-sd._udp` names."""
    for each in message.answers:
        if not isinstance(each.data, HostData):
            continue
        labels = each.data.host.removesuffix(f".{zone}").split(".")
        try:
            yield ServiceName(labels[0].removeprefix("_"))
        except BadName:
            continue
