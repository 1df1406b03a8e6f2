"""Read leases from what DNS says of services (design.md 6): TXT has ports and epoch, A the address. Pure."""

from __future__ import annotations

from collections.abc import Iterator
from ipaddress import IPv4Address
from typing import get_args

from ztna.dns import HostData, Message, Type
from ztna.errors import BadName
from ztna.leases import Lease, Port, Protocol
from ztna.names import ServiceName, Zone

PROTOCOLS: tuple[Protocol, ...] = get_args(Protocol)
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
    if ip is None or len(epochs) != 1 or not epochs[0].isdecimal():
        return None
    try:
        ports = tuple(
            _port(item)
            for line in lines
            if line.startswith(_PORTS)
            for item in line.removeprefix(_PORTS).split(",")
            if item
        )
        return Lease(ip, int(epochs[0]), ports)
    except ValueError:
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


def _port(item: str) -> Port:
    """Read `tcp:8080`. Raises ValueError."""
    name, _, number = item.partition(":")
    protocol = next((each for each in PROTOCOLS if each == name), None)
    if protocol is None or not number.isdecimal() or int(number) > 65535:
        raise ValueError(item)
    return Port(protocol, int(number))
