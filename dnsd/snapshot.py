"""The last names as bytes, for a file that outlives a restart (design.md decision 8).

Pure. Layout: one line `ztna-names 1 <confirmed> <serial> <domain> <SHA-256>`, then one line of JSON for each
service. `confirmed` is when Consul last confirmed the names, Unix seconds in ten digits at a fixed place, so
that it can be moved without writing the rest again; the sum covers the lines after the first.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping

import msgspec

from dnsd.services import Service, describe
from ztna.catalog import Instance
from ztna.errors import ProtocolError
from ztna.jsontypes import decode_hook, decoding, to_json
from ztna.leases import Lease
from ztna.names import Zone

SNAPSHOT_BYTES_MAX = 512 * 1024 * 1024
CONFIRMED_OFFSET = 13
"""Where the ten digits of the time stand in the file."""

_HEAD = re.compile(rb"ztna-names 1 (\d{10}) (\d{1,10}) (\S{1,255}) ([0-9a-f]{64})\n")


class Entry(msgspec.Struct, frozen=True, omit_defaults=True):
    """What is known of one service: its instances in the catalog, its lease, or both."""

    name: str
    instances: tuple[Instance, ...] = ()
    lease: Lease | None = None


class Snapshot(msgspec.Struct, frozen=True):
    """The names as they were when Consul last confirmed them, Unix seconds."""

    domain: str
    serial: int
    confirmed_at: float
    services: Mapping[str, Service]
    leases: Mapping[str, Lease]


_ENTRY = msgspec.json.Decoder(Entry, dec_hook=decode_hook)


def entries(services: Mapping[str, Service], leases: Mapping[str, Lease]) -> Iterator[bytes]:
    """Yield the lines of a snapshot after its first."""
    # In no order: to sort 100,000 names would take 0.1 s in which no other thread runs.
    for name, service in services.items():
        yield to_json(Entry(name, service.instances, leases.get(name))) + b"\n"
    for name, lease in leases.items():
        if name not in services:
            yield to_json(Entry(name, (), lease)) + b"\n"


def encode(domain: Zone, serial: int, confirmed_at: float, lines: Iterable[bytes]) -> bytes:
    """Return a whole snapshot of what `entries` yielded."""
    body = b"".join(lines)
    digest = hashlib.sha256(body).hexdigest()
    return f"ztna-names 1 {confirmed(confirmed_at).decode()} {serial} {domain} {digest}\n".encode() + body


def confirmed(confirmed_at: float) -> bytes:
    """Return what stands at CONFIRMED_OFFSET for a time."""
    return b"%010d" % int(confirmed_at)


def decode(data: bytes) -> Snapshot:
    """Read a snapshot. Raises ProtocolError for anything that is not a whole one."""
    head = _HEAD.match(data)
    if head is None:
        raise ProtocolError("no names of this version of ztna-dnsd")
    body = data[head.end() :]
    if hashlib.sha256(body).hexdigest().encode() != head[4]:
        raise ProtocolError("names that were cut short or changed")
    read = [decoding(_ENTRY, line) for line in body.splitlines()]
    return Snapshot(
        domain=head[3].decode("latin-1"),
        serial=int(head[2]) & 0xFFFFFFFF,
        confirmed_at=float(head[1]),
        services={entry.name: describe(entry.name, entry.instances) for entry in read if entry.instances},
        leases={entry.name: entry.lease for entry in read if entry.lease is not None},
    )
