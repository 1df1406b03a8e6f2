"""Leases as values: the records in KV and the transactions that change them (design.md 4).

Pure. Who may have which address is decided in dnsd.keeper; who carries it out is ztna.consul.
"""

from __future__ import annotations

from ipaddress import IPv4Address
from typing import Literal

import msgspec

from ztna.names import ServiceName

SERVICE_PREFIX = "ztna/vip/service/"
ADDRESS_PREFIX = "ztna/vip/ip/"
VIP_PREFIX = "ztna/vip/"
KEEPER_KEY = "ztna/vip/keeper"
SCHEMA_KEY = "ztna/schema"
SCHEMA_VERSION = 1

Protocol = Literal["tcp", "udp", "icmp"]


class Port(msgspec.Struct, frozen=True, order=True):
    """A published virtual port of a service."""

    protocol: Protocol
    port: int


class Lease(msgspec.Struct, frozen=True):
    """KV `ztna/vip/service/<service>`: the address a service has now. `epoch` only rises."""

    ip: IPv4Address
    epoch: int
    ports: tuple[Port, ...] = ()


class Holding(msgspec.Struct, frozen=True):
    """KV `ztna/vip/ip/<address>`: who holds, or in quarantine last held, an address. Times in Unix seconds."""

    service: str
    epoch: int
    state: Literal["leased", "quarantined"]
    pinned: bool = False
    leased_at: float = 0.0
    released_at: float | None = None


def service_key(service: ServiceName) -> str:
    """Return the KV key of a service's lease."""
    return SERVICE_PREFIX + service


def address_key(address: IPv4Address) -> str:
    """Return the KV key of an address's holding."""
    return ADDRESS_PREFIX + str(address)
