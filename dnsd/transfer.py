"""What secondaries are given: whole zones (RFC 5936) and what changed since a serial (RFC 1995).

Pure. All that is transferred is found through ZoneData.find, so that a secondary says what dnsd says; only
`_fresh` stands still between two serials. Who may ask, signatures and sockets are others'.
"""

from __future__ import annotations

import struct
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from itertools import chain

import msgspec

from dnsd.answer import pack_data, pack_name, pack_record
from dnsd.services import connectors
from dnsd.zone import (
    CONNECTOR_LABEL,
    FRESH_LABEL,
    FRESH_TTL_SECONDS,
    NAMESERVER_LABEL,
    RELAY_LABEL,
    RELAYS_NAME,
    Labels,
    Outcome,
    ZoneData,
    differing,
)
from ztna.dns import Code, SoaData, Type, decode
from ztna.errors import ProtocolError
from ztna.leases import Lease, beside

PUBLISH_SECONDS = 1.0
"""The least time between two serials, so that serials keep to the clock and outlive a restart of dnsd."""
FRESH_SECONDS = 60.0
"""How often secondaries hear of a `_fresh` that moved (design.md 2.8)."""
CHANGES_KEPT_MAX = 256
RECORDS_KEPT_MAX = 200_000
"""Records in the changes that are kept; who is further behind gets the whole zone."""
MESSAGE_RECORDS_BYTES = 8_192
"""Records in one message of a transfer, in bytes; others are answered between two of them."""

_HEADER = struct.Struct("!HHHHHH")
_QR, _AA, _RD = 0x8000, 0x0400, 0x0100
_APEX = b"\xc0\x0c"
"""Every message of a transfer repeats the question, which is the apex: all names end there."""
_POINTER = 0xC0
_MARKS = (struct.pack("!BHH", 0, Type.AXFR, 1), struct.pack("!BHH", 0, Type.IXFR, 1))

_SERVICE_TYPES = (Type.A, Type.AAAA, Type.SRV, Type.TXT)
_PROGRAM_TYPES = (Type.SRV, Type.TXT, Type.PTR)
_HOST_TYPES = (Type.A, Type.AAAA)
_FIXED: tuple[tuple[Labels, tuple[Type, ...]], ...] = (
    ((NAMESERVER_LABEL,), _HOST_TYPES),
    *(((label, "_dns-sd", "_udp"), (Type.PTR,)) for label in ("b", "db", "lb")),
    (("_services", "_dns-sd", "_udp"), (Type.PTR,)),
)

Owner = tuple[Labels, tuple[Type, ...]]
"""A whole name and the types it may have."""


class Request(msgspec.Struct, frozen=True):
    """A transfer that somebody asks for; `serial` is what they have, None when they ask for everything."""

    id: int
    flags: int
    question: bytes
    apex: Labels
    serial: int | None


class Delta(msgspec.Struct, frozen=True):
    """What one zone lost and gained between two serials, as records whose owners end in the apex."""

    removed: frozenset[bytes]
    added: frozenset[bytes]


class _Change(msgspec.Struct, frozen=True):
    before: ZoneData
    after: ZoneData
    deltas: Mapping[Labels, Delta]
    records: int


class Publication:
    """The zone as secondaries know it, and the last changes that led there."""

    def __init__(self) -> None:
        self.zone: ZoneData | None = None
        self._changes: deque[_Change] = deque()
        self._records = 0

    def publish(self, zone: ZoneData) -> tuple[Labels, ...]:
        """Take the next state, whose serial is new; return the apexes that it changed."""
        before, self.zone = self.zone, zone
        if before is None:
            return zone.apexes
        if before.apexes != zone.apexes or before.settings != zone.settings:
            # Other rules make other records everywhere: all is transferred anew.
            self.withdraw()
            self.zone = zone
            return tuple(dict.fromkeys((*before.apexes, *zone.apexes)))
        deltas = differences(before, zone)
        records = sum(len(delta.removed) + len(delta.added) for delta in deltas.values())
        self._changes.append(_Change(before, zone, deltas, records))
        self._records += records
        while len(self._changes) > CHANGES_KEPT_MAX or self._records > RECORDS_KEPT_MAX:
            self._records -= self._changes.popleft().records
        return tuple(deltas)

    def withdraw(self) -> None:
        """Have no zone, and no changes that would lead from one to the next."""
        self.zone = None
        self._changes.clear()
        self._records = 0

    def answer(self, request: Request, *, over_tcp: bool) -> Iterator[bytes] | Code:
        """Return the messages of a transfer, made one by one, or the code to refuse it with.

        Over UDP an IXFR gets the newest SOA alone, which says whether to come by TCP (RFC 1995 2).
        """
        zone = self.zone
        if zone is None:
            return Code.SERVFAIL
        if request.apex not in zone.apexes or (request.serial is None and not over_tcp):
            return Code.REFUSED
        soa = _soa(zone, request.apex)
        if request.serial is not None and not (over_tcp and _is_newer(zone.serial, request.serial)):
            return iter((_message(request, [soa]),))
        changes = None if request.serial is None else self._since(request.serial)
        if changes is None:
            return _messages(request, chain((soa,), _transferable(zone, request.apex), (soa,)))
        return _messages(request, _incremental(zone, changes, request.apex))

    def _since(self, serial: int) -> list[_Change] | None:
        """Return the changes that lead from a serial to now, None when they are not known any more."""
        changes = list(self._changes)
        for place, change in enumerate(changes):
            if change.before.serial == serial:
                return changes[place:]
        return None


def may_be(data: bytes) -> bool:
    """Return whether a query may ask for a transfer: False is certain."""
    return any(mark in data for mark in _MARKS)


def read(data: bytes) -> Request | None:
    """Return the transfer that a query asks for, None when it is another query. Raises ProtocolError."""
    message = decode(data)
    question = message.questions[0] if len(message.questions) == 1 else None
    if (
        question is None
        or message.opcode
        or message.is_response
        or question.type not in (Type.AXFR, Type.IXFR)
    ):
        return None
    apex = tuple(question.name.split("."))
    serial = None
    if question.type == Type.IXFR:
        # RFC 1995 3: the SOA that the asker has stands in the authority section.
        soas = [each.data for each in message.authority if isinstance(each.data, SoaData)]
        serial = soas[0].serial if soas else None
    end = _HEADER.size
    while data[end]:
        if data[end] >= _POINTER:
            raise ProtocolError("a question whose name is compressed")
        end += 1 + data[end]
    flags = int.from_bytes(data[2:4])
    return Request(message.id, flags, data[_HEADER.size : end + 5], apex, serial)


def refuse(request: Request, code: Code) -> bytes:
    """Return the one message that refuses a transfer."""
    head = _HEADER.pack(request.id, _QR | request.flags & _RD | code, 1, 0, 0, 0)
    return head + request.question


def differences(before: ZoneData, after: ZoneData) -> Mapping[Labels, Delta]:
    """Return what changed, by apex; looks only at names whose service or lease is another."""
    names = differing(before.services, after.services) | differing(before.leases, after.leases)
    removed, added = _by_apex(before, names, before, after), _by_apex(after, names, before, after)
    return {
        apex: Delta(lost, gained)
        for apex in after.apexes
        if (lost := removed[apex] - added[apex]) | (gained := added[apex] - removed[apex])
    }


def _by_apex(
    zone: ZoneData, names: set[str], before: ZoneData, after: ZoneData
) -> Mapping[Labels, frozenset[bytes]]:
    """Return what one of two states has for the changed names and all that belongs to them."""
    found: dict[Labels, set[bytes]] = {apex: set() for apex in zone.apexes}
    touched = {
        connector
        for state in (before, after)
        for name in names
        if (service := state.services.get(name)) is not None
        for connector, _ in connectors(service)
    }
    addresses = [
        pointer
        for state in (before, after)
        for name in names
        if name in state.leases
        for pointer in _pointers(zone, state.leases[name])
    ]
    domain = zone.apexes[0]
    for labels, types in _owners(domain, names, touched, addresses):
        for apex, record in _records(zone, labels, types):
            found[apex].add(record)
    found[domain].add(_fresh(zone))
    return {apex: frozenset(records) for apex, records in found.items()}


def _owners(
    domain: Labels, names: Iterable[str], touched: Iterable[str], addresses: Iterable[str]
) -> Iterator[Owner]:
    """Return every name that some services, connectors and reverse names are behind."""
    for name in names:
        yield (name, *domain), _SERVICE_TYPES
        yield ("*", name, *domain), _HOST_TYPES
        for protocol in ("_tcp", "_udp"):
            yield (f"_{name}", protocol, *domain), _PROGRAM_TYPES
            yield (name, f"_{name}", protocol, *domain), _PROGRAM_TYPES
    for connector in touched:
        yield (connector, CONNECTOR_LABEL, *domain), _HOST_TYPES
    for address in addresses:
        yield tuple(address.split(".")), (Type.PTR,)
    for labels, types in _FIXED:
        yield (*labels, *domain), types


def _transferable(zone: ZoneData, apex: Labels) -> Iterator[bytes]:
    """Return every record of one zone but its SOA, NS first."""
    for _, record in _records(zone, apex, (Type.NS,)):
        yield record
    domain = zone.apexes[0]
    if apex == domain:
        yield _fresh(zone)
        names = dict.fromkeys((*zone.services, *zone.leases))
        touched = {connector for service in zone.services.values() for connector, _ in connectors(service)}
        owners: Iterator[Owner] = chain(_relay_owners(zone), _owners(domain, names, touched, ()))
    else:
        pointers = (pointer for lease in zone.leases.values() for pointer in _pointers(zone, lease))
        owners = ((tuple(pointer.split(".")), (Type.PTR,)) for pointer in pointers)
    for labels, types in owners:
        for place, record in _records(zone, labels, types):
            if place == apex:
                yield record


def _relay_owners(zone: ZoneData) -> Iterator[Owner]:
    """Return the names behind which the relays are; they change with the settings only."""
    domain = zone.apexes[0]
    if zone.settings.relays:
        yield (*RELAYS_NAME, *domain), (Type.SRV,)
    for name in dict.fromkeys(each.name for each in zone.settings.relays):
        yield (name, RELAY_LABEL, *domain), _HOST_TYPES


def _pointers(zone: ZoneData, lease: Lease) -> Iterator[str]:
    """Return the reverse names of a lease's addresses."""
    yield lease.ip.reverse_pointer
    if zone.settings.ula is not None:
        yield beside(zone.settings.ula, lease.ip).reverse_pointer


def _records(zone: ZoneData, labels: Labels, types: Iterable[Type]) -> Iterator[tuple[Labels, bytes]]:
    """Return a name's records of these types, with the apex they belong to."""
    for kind in types:
        found = zone.find(labels, kind)
        if found.outcome is not Outcome.ANSWER:
            continue
        apex = tuple(found.apex.split("."))
        owner = _owner(labels, apex)
        for data in found.records:
            yield apex, pack_record(owner, kind, zone.settings.ttl_s, pack_data(data))


def _fresh(zone: ZoneData) -> bytes:
    text = (str(zone.fresh_at).encode(),)
    return pack_record(pack_name(FRESH_LABEL)[:-1] + _APEX, Type.TXT, FRESH_TTL_SECONDS, pack_data(text))


def _is_newer(serial: int, than: int) -> bool:
    """RFC 1982 3.2."""
    return 0 < (serial - than) & 0xFFFFFFFF < 0x80000000


def _soa(zone: ZoneData, apex: Labels) -> bytes:
    return pack_record(_APEX, Type.SOA, zone.settings.ttl_s, pack_data(zone.soa(".".join(apex))))


def _owner(labels: Labels, apex: Labels) -> bytes:
    relative = labels[: len(labels) - len(apex)]
    return (pack_name(".".join(relative))[:-1] if relative else b"") + _APEX


def _incremental(zone: ZoneData, changes: Iterable[_Change], apex: Labels) -> Iterator[bytes]:
    """RFC 1995 4: for each change the old SOA and what went, the new SOA and what came."""
    yield _soa(zone, apex)
    for change in changes:
        delta = change.deltas.get(apex, Delta(frozenset(), frozenset()))
        yield _soa(change.before, apex)
        yield from sorted(delta.removed)
        yield _soa(change.after, apex)
        yield from sorted(delta.added)
    yield _soa(zone, apex)


def _messages(request: Request, records: Iterable[bytes]) -> Iterator[bytes]:
    """Pack records, in order, into as few messages as are wanted."""
    pending: list[bytes] = []
    size = 0
    for record in records:
        if pending and size + len(record) > MESSAGE_RECORDS_BYTES:
            yield _message(request, pending)
            pending, size = [], 0
        pending.append(record)
        size += len(record)
    yield _message(request, pending)


def _message(request: Request, records: list[bytes]) -> bytes:
    head = _HEADER.pack(request.id, _QR | _AA | request.flags & _RD, 1, len(records), 0, 0)
    return b"".join((head, request.question, *records))
