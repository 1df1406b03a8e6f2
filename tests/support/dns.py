"""Services, leases and a zone to ask about, and dnslib as the judge of what dnsd answers."""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from ipaddress import IPv4Address, IPv4Network

from dnslib import QTYPE, DNSRecord

from dnsd.answer import Answers
from dnsd.services import Service, describe
from dnsd.zone import Settings, ZoneData
from ztna.catalog import Instance, Status
from ztna.leases import Lease, Port
from ztna.names import Zone

POOL = IPv4Network("10.100.0.0/16")
SETTINGS = Settings(Zone("ztna.local"), POOL, 5, 10, IPv4Address("192.0.2.53"))


def instance(
    service: str,
    connector: str = "c1",
    *,
    ports: str | None = "tcp:8080",
    address: str = "192.0.2.1",
    port: int = 4435,
    status: Status = "passing",
    weight: int = 1,
    tags: Sequence[str] = ("ztna",),
    virtual_ip: str | None = None,
    wildcard: str = "",
) -> Instance:
    """One instance; no `ztna-connector` when `connector` is empty, no `ztna-ports` when `ports` is None."""
    meta: dict[str, str] = {}
    if connector:
        meta["ztna-connector"] = connector
    if ports is not None:
        meta["ztna-ports"] = ports
    if wildcard:
        meta["ztna-wildcard"] = wildcard
    if virtual_ip is not None:
        meta["ztna-virtual-ip"] = virtual_ip
    return Instance(
        service=service,
        instance_id=f"{service}@{connector}",
        node="n1",
        address=address,
        port=port,
        tags=tuple(tags),
        meta=meta,
        weight_passing=weight,
        status=status,
    )


def catalog(*instances: Instance) -> dict[str, Service]:
    """Describe the services that these instances make."""
    by_name: dict[str, list[Instance]] = {}
    for each in instances:
        by_name.setdefault(each.service, []).append(each)
    return {name: describe(name, tuple(found)) for name, found in by_name.items()}


def lease(ip: str, *ports: Port, epoch: int = 1) -> Lease:
    """A lease; tcp:8080 when no ports are named."""
    return Lease(IPv4Address(ip), epoch, ports or (Port("tcp", 8080),))


def zone(
    services: Mapping[str, Service], leases: Mapping[str, Lease], settings: Settings = SETTINGS
) -> ZoneData:
    """One state of the zone, serial 7."""
    return ZoneData(settings, services, leases, 7)


def query(name: str, kind: str = "A", *, message_id: int = 0x1234) -> bytes:
    """A plain query as dnslib writes it."""
    record = DNSRecord.question(name, kind)
    record.header.id = message_id
    return bytes(record.pack())


def with_opt(
    data: bytes,
    *,
    size: int = 1232,
    version: int = 0,
    flags: int = 0,
    options: bytes = b"",
    name: bytes = b"\0",
) -> bytes:
    """Add an OPT record to a query."""
    opt = name + struct.pack("!HHIH", 41, size, version << 16 | flags, len(options)) + options
    count = int.from_bytes(data[10:12]) + 1
    return data[:10] + struct.pack("!H", count) + data[12:] + opt


def ask(answers: Answers, data: bytes, *, over_tcp: bool = False) -> DNSRecord:
    """Ask, and read the answer with dnslib."""
    answer = answers.answer(data, over_tcp=over_tcp)
    assert answer is not None
    return DNSRecord.parse(answer)


def told(record: DNSRecord) -> list[str]:
    """The answers as `TYPE data`."""
    return [f"{QTYPE[rr.rtype]} {rr.rdata}" for rr in record.rr]
