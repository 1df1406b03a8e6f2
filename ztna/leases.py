"""Leases as values: the records in KV and the transactions that change them (design.md 4).

Pure. Who may have which address is decided in dnsd.keeper; who carries it out is ztna.consul.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from ipaddress import AddressValueError, IPv4Address, IPv6Address, IPv6Network
from typing import Annotated, Any, Generic, Literal, TypeVar

import msgspec

from ztna.catalog import KvPair
from ztna.errors import BadName, ProtocolError
from ztna.jsontypes import decode_hook, decoding
from ztna.names import ServiceName

SERVICE_PREFIX = "ztna/vip/service/"
ADDRESS_PREFIX = "ztna/vip/ip/"
WISH_PREFIX = "ztna/vip/wish/"
VIP_PREFIX = "ztna/vip/"
KEEPER_KEY = "ztna/vip/keeper"
SCHEMA_KEY = "ztna/schema"
SCHEMA_VERSION = 1
ULA = IPv6Network("fc00::/7")
ULA_PREFIX_BITS = 96

EPOCH_MAX = 2**63 - 1
"""What a control message can carry: who told an agent of more would have its relays close their connections."""

Protocol = Literal["tcp", "udp", "icmp"]
PortNumber = Annotated[int, msgspec.Meta(ge=0, le=65535)]
Epoch = Annotated[int, msgspec.Meta(ge=0, le=EPOCH_MAX)]


class Port(msgspec.Struct, frozen=True, order=True):
    """A published virtual port of a service."""

    protocol: Protocol
    port: PortNumber


class Lease(msgspec.Struct, frozen=True):
    """KV `ztna/vip/service/<service>`: the address a service has now. `epoch` only rises."""

    ip: IPv4Address
    epoch: Epoch
    ports: tuple[Port, ...] = ()


class Holding(msgspec.Struct, frozen=True):
    """KV `ztna/vip/ip/<address>`: who has an address, or had it last. Times in Unix seconds."""

    service: str
    epoch: Epoch
    state: Literal["leased", "quarantined"]
    pinned: bool = False
    leased_at: float = 0.0
    released_at: float | None = None


WishKind = Literal["pin", "unpin", "release", "move"]


class WishAnswer(msgspec.Struct, frozen=True):
    """What the keeper made of a wish, in words, and when (Unix seconds)."""

    ok: bool
    what: str
    at: float


class Wish(msgspec.Struct, frozen=True):
    """KV `ztna/vip/wish/<service>`: what an operator wants changed; `id` tells one asking from the next.

    `ip` is the address for `pin` and `move`, when it matters which. `force` overrides what only protects
    the programs that still remember a former holder.
    """

    kind: WishKind
    id: str
    ip: IPv4Address | None = None
    force: bool = False
    asked_by: str = ""
    asked_at: float = 0.0
    answer: WishAnswer | None = None


def beside(ula: IPv6Network, address: IPv4Address) -> IPv6Address:
    """Return the IPv6 address of a lease: the /96, then the 32 bits of its IPv4 address."""
    return IPv6Address(int(ula.network_address) | int(address))


def is_ula(network: IPv6Network) -> bool:
    """Say whether addresses beside leases may lie there: a /96 of our own choosing (RFC 4193)."""
    return network.prefixlen == ULA_PREFIX_BITS and network.subnet_of(ULA)


def service_key(service: ServiceName) -> str:
    """Return the KV key of a service's lease."""
    return SERVICE_PREFIX + service


def address_key(address: IPv4Address) -> str:
    """Return the KV key of an address's holding."""
    return ADDRESS_PREFIX + str(address)


def wish_key(service: ServiceName) -> str:
    """Return the KV key of the wish about a service."""
    return WISH_PREFIX + service


T = TypeVar("T", bound=Lease | Holding | Wish)


class Stored(msgspec.Struct, Generic[T], frozen=True):
    """A record as it lies in KV; `index` is the modify index that a compare-and-set must name.

    `value` is what it was read from: another Consul may come to the same index by another record.
    """

    record: T
    index: int
    value: bytes = b""


class Table(msgspec.Struct, frozen=True, kw_only=True):
    """Every lease, holding and wish. `unreadable` says by key what is wrong with a record nobody may touch.

    `subjects` has by key whose record it is: reading keys costs more than the rest of a table that stays.
    """

    leases: Mapping[ServiceName, Stored[Lease]] = {}
    holdings: Mapping[IPv4Address, Stored[Holding]] = {}
    wishes: Mapping[ServiceName, Stored[Wish]] = {}
    unreadable: Mapping[str, str] = {}
    subjects: Mapping[str, ServiceName | IPv4Address] = {}


def read_table(pairs: Mapping[str, KvPair], previous: Table | None = None) -> Table:
    """Read the records under VIP_PREFIX (or a part of it); what did not change since `previous` is kept."""
    reading = _Reading(previous or Table(), Table())
    for key, pair in pairs.items():
        reading.put(key, pair)
    return reading.table()


def amended(table: Table, written: Mapping[str, KvPair], deleted: Iterable[str] = ()) -> Table:
    """Return the table with some records written and others deleted; costs what changed."""
    reading = _Reading(table, table)
    for key in (*deleted, *written):
        reading.drop(key)
    for key, pair in written.items():
        reading.put(key, pair)
    return reading.table()


class _Reading:
    """A table that is being made from records, beginning with those of another."""

    def __init__(self, before: Table, base: Table) -> None:
        """What `before` has of a record whose index is the same is kept."""
        self._before = before
        self._leases = dict(base.leases)
        self._holdings = dict(base.holdings)
        self._wishes = dict(base.wishes)
        self._unreadable = dict(base.unreadable)
        self._subjects = dict(base.subjects)

    def put(self, key: str, pair: KvPair) -> None:
        before = self._before
        try:
            subject = before.subjects.get(key) or _subject(key)
            if subject is None:
                return
            self._subjects[key] = subject
            if isinstance(subject, IPv4Address):
                self._holdings[subject] = _stored(pair, before.holdings.get(subject), _HOLDING)
            elif key.startswith(SERVICE_PREFIX):
                self._leases[subject] = _stored(pair, before.leases.get(subject), _LEASE)
            else:
                self._wishes[subject] = _stored(pair, before.wishes.get(subject), _WISH)
        except (BadName, AddressValueError, ProtocolError) as error:
            self._unreadable[key] = str(error)

    def drop(self, key: str) -> None:
        self._unreadable.pop(key, None)
        subject = self._subjects.pop(key, None)
        if isinstance(subject, IPv4Address):
            self._holdings.pop(subject, None)
        elif subject is not None:
            records: dict[ServiceName, Any] = self._leases if key.startswith(SERVICE_PREFIX) else self._wishes
            records.pop(subject, None)

    def table(self) -> Table:
        return Table(
            leases=self._leases,
            holdings=self._holdings,
            wishes=self._wishes,
            unreadable=self._unreadable,
            subjects=self._subjects,
        )


def _subject(key: str) -> ServiceName | IPv4Address | None:
    """Return whose record a key holds, None when it is no record. Raises BadName or AddressValueError."""
    if key.startswith(SERVICE_PREFIX):
        return ServiceName(key[len(SERVICE_PREFIX) :])
    if key.startswith(ADDRESS_PREFIX):
        return IPv4Address(key[len(ADDRESS_PREFIX) :])
    return ServiceName(key[len(WISH_PREFIX) :]) if key.startswith(WISH_PREFIX) else None


def _stored(pair: KvPair, before: Stored[T] | None, decoder: msgspec.json.Decoder[T]) -> Stored[T]:
    if before is not None and (before.index, before.value) == (pair.modify_index, pair.value):
        return before
    return Stored(decoding(decoder, pair.value), pair.modify_index, pair.value)


_LEASE = msgspec.json.Decoder(Lease, dec_hook=decode_hook)
_HOLDING = msgspec.json.Decoder(Holding, dec_hook=decode_hook)
_WISH = msgspec.json.Decoder(Wish, dec_hook=decode_hook)


def is_another(lease: Lease, known: Lease) -> bool:
    """Say whether two leases of one service are not the same; one with other ports is."""
    return (lease.epoch, lease.ip) != (known.epoch, known.ip)


def went_back(known: Mapping[ServiceName, Lease], table: Table) -> Mapping[ServiceName, Lease | None]:
    """Return what to go by instead of some leases that were known before the table was read consistently.

    An older one is right, as the table was restored from a backup. A service without a lease keeps the one
    it had, but not (None) at an address that is another's. Newer ones are left out.
    """
    addresses = {stored.record.ip for stored in table.leases.values()}
    others: dict[ServiceName, Lease | None] = {}
    for service, was in known.items():
        stored = table.leases.get(service)
        if stored is None:
            if was.ip in addresses:
                others[service] = None
        elif stored.record.epoch <= was.epoch and is_another(stored.record, was):
            others[service] = stored.record
    return others


def audit(table: Table) -> tuple[str, ...]:
    """Return what is wrong with a table, a line each: no address may have two owners, and records must agree.

    Source: design.md 4. An empty tuple proves that every lease is whole and every address has one owner.
    """
    broken = [f"{key}: {what}" for key, what in sorted(table.unreadable.items())]
    services: dict[IPv4Address, list[str]] = {}
    for service, stored in sorted(table.leases.items()):
        services.setdefault(stored.record.ip, []).append(service)
        broken += _disagreements(service, stored.record, table.holdings.get(stored.record.ip))
    for address, names in sorted(services.items()):
        if len(names) > 1:
            broken.append(f"{address}: leased to {len(names)} services: {', '.join(names)}")
    for address, held in sorted(table.holdings.items()):
        holder = table.leases.get(ServiceName(held.record.service)) if _is_name(held.record.service) else None
        if held.record.state == "leased" and (holder is None or holder.record.ip != address):
            broken.append(f"{address}: held by {held.record.service}, whose lease is not for it")
    return tuple(broken)


def _disagreements(service: ServiceName, lease: Lease, held: Stored[Holding] | None) -> list[str]:
    if held is None:
        return [f"{service}: its address {lease.ip} has no record of its own"]
    holding = held.record
    if (holding.service, holding.state) != (service, "leased"):
        return [f"{service}: its address {lease.ip} is {holding.state} by {holding.service}"]
    if holding.epoch != lease.epoch:
        return [f"{service}: epoch {lease.epoch}, but {holding.epoch} at its address {lease.ip}"]
    return []


def _is_name(text: str) -> bool:
    try:
        ServiceName(text)
    except BadName:
        return False
    return True
