"""The names that dnsd answers for, from the catalog and the leases (design.md 6).

Pure, and immutable once built. Knows nothing of DNS messages: dnsd.answer puts what is found into bytes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import copy
from enum import Enum, auto
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from typing import TypeVar

import msgspec

from dnsd.index import Index
from dnsd.services import Service, connectors
from ztna.dns import Data, HostData, SoaData, SrvData, Type
from ztna.leases import Lease, beside
from ztna.names import Zone
from ztna.reasons import Reason

SRV_RECORDS_MAX = 500
"""Records of one SRV answer: more would not fit a DNS message over TCP with their addresses."""
SERVICES_LISTED_MAX = 500
TXT_BYTES_MAX = 255

SOA_REFRESH_SECONDS = 60
SOA_RETRY_SECONDS = 10
SOA_EXPIRE_SECONDS = 86_400
FRESH_TTL_SECONDS = 1

CONNECTOR_LABEL = "connector"
NAMESERVER_LABEL = "ns"
RELAY_LABEL = "relay"
RELAYS_NAME = ("_ztna-relay", "_udp")
"""Where agents and connectors look for relays."""
FRESH_LABEL = "_fresh"
NO_SUBJECT = ""
"""The subject of an answer that depends on more than one service or connector."""
_BROWSING = ("b", "db", "lb")
_DNS_SD = "_dns-sd"
_HEX = "0123456789abcdef"
_NIBBLES_OF_ADDRESS = 8
_NAME_LABELS_OF_IPV6 = 34
_EMPTY_NON_TERMINALS = frozenset({(CONNECTOR_LABEL,), ("_tcp",), ("_udp",), ("_dns-sd", "_udp")})

T = TypeVar("T")
Labels = tuple[str, ...]
Address = IPv4Address | IPv6Address


class Outcome(Enum):
    """What became of a question."""

    ANSWER = auto()
    NODATA = auto()
    NXDOMAIN = auto()
    OUTSIDE = auto()
    FRESH = auto()
    """The zone's own freshness: the answer moves with the clock of the catalog, not with the zone."""


class RelayHost(msgspec.Struct, frozen=True):
    """A relay by its name, and where it listens."""

    name: str
    address: IPv4Address
    port: int


class Settings(msgspec.Struct, frozen=True):
    """`nameserver` is the address behind `ns.<domain>`, when it is known; `more` are further pools.

    With `ula`, a /96, each leased address has an IPv6 one beside it: the network's 96 bits, then its own 32.
    """

    domain: Zone
    pool: IPv4Network
    ttl_s: int
    negative_ttl_s: int
    nameserver: IPv4Address | None = None
    more: tuple[IPv4Network, ...] = ()
    ula: IPv6Network | None = None
    relays: tuple[RelayHost, ...] = ()


class Found(msgspec.Struct, frozen=True):
    """The outcome, the apex of the zone asked about ("" outside), and the records for the name asked.

    `additional` are names with the addresses that save the asker another question.
    """

    outcome: Outcome
    apex: str = ""
    records: tuple[Data, ...] = ()
    additional: tuple[tuple[str, tuple[Address, ...]], ...] = ()


class ZoneData:
    """One state of the zone; a changed one is another object with a higher serial."""

    def __init__(
        self,
        settings: Settings,
        services: Mapping[str, Service],
        leases: Mapping[str, Lease],
        serial: int = 1,
        fresh_at: int = 0,
    ) -> None:
        """`fresh_at` is what secondaries say of `_fresh`: Unix seconds, as of this serial."""
        self.settings = settings
        self.services = services
        self.leases = leases
        self.serial = serial
        self.fresh_at = fresh_at
        self.follows: int | None = None
        """The serial of the state before this one, when `changed` tells the difference."""
        self.changed: frozenset[str] = frozenset()
        """The subjects whose answers are others than in the state before."""
        self._domain = tuple(settings.domain.split("."))
        # Two small pools may share a reverse zone.
        self._reverse = tuple(
            dict.fromkeys(zone for pool in (settings.pool, *settings.more) for zone in reverse_zones(pool))
        )
        if settings.ula is not None:
            self._reverse += (ula_zone(settings.ula),)
        everything = services.keys() | leases.keys()
        self._index, _ = Index().updated(everything, ({}, {}), (services, leases))

    def soa(self, apex: str) -> SoaData:
        """Return the SOA of the zone or of one of its reverse zones."""
        domain, settings = self.settings.domain, self.settings
        return SoaData(
            f"{NAMESERVER_LABEL}.{domain}",
            f"hostmaster.{domain}",
            self.serial,
            SOA_REFRESH_SECONDS,
            SOA_RETRY_SECONDS,
            SOA_EXPIRE_SECONDS,
            settings.negative_ttl_s,
        )

    @property
    def apexes(self) -> tuple[Labels, ...]:
        """The zone and its reverse zones."""
        return (self._domain, *self._reverse)

    def under(self, serial: int, fresh_at: int) -> ZoneData:
        """Return this state under another serial and freshness; what it is made of is shared."""
        zone = copy(self)
        zone.serial, zone.fresh_at = serial, fresh_at
        return zone

    def renumbered(self, serial: int, fresh_at: int) -> ZoneData:
        """Return a state that follows this one and says the same."""
        zone = self.under(serial, fresh_at)
        zone.follows, zone.changed = self.serial, frozenset()
        return zone

    def followed_by(
        self, services: Mapping[str, Service], leases: Mapping[str, Lease], serial: int, changed: set[str]
    ) -> ZoneData:
        """Return the next state of the zone, in which only the services named in `changed` are different."""
        zone = copy(self)
        zone.services, zone.leases, zone.serial = services, leases, serial
        zone._index, moved = self._index.updated(changed, (self.services, self.leases), (services, leases))
        zone.follows, zone.changed = self.serial, self._subjects(changed, moved, leases)
        return zone

    def _subjects(
        self, changed: set[str], moved: frozenset[str], leases: Mapping[str, Lease]
    ) -> frozenset[str]:
        """Return the subjects of changed services, with the addresses they had and have under these leases,
        of moved connectors, and of all that these connectors serve."""
        # Who was not there before serves only services that changed.
        known = {connector for connector in moved if connector in self._index.addresses}
        served = frozenset().union(*(self._index.served[connector] for connector in known))
        addresses = {
            str(table[name].ip) for table in (self.leases, leases) for name in changed & table.keys()
        }
        return frozenset(changed | served | addresses | {f"{each}.{CONNECTOR_LABEL}" for each in moved})

    def subject(self, labels: Labels) -> str:
        """Return the service, connector or address on which alone an answer depends, or NO_SUBJECT."""
        depth = len(self._domain)
        if labels[-depth:] != self._domain:
            address = _address_named(labels)
            return address if address in self._index.names else NO_SUBJECT
        match labels[:-depth]:
            case (str(name),) if name != NAMESERVER_LABEL:
                return name
            case (str(connector), "connector"):
                return f"{connector}.{CONNECTOR_LABEL}"
            case (*_, str(name), "_tcp" | "_udp") if name.startswith("_") and name != _DNS_SD:
                return name[1:]
            case (_, *_, str(name)) if self._is_wildcard(name):
                return name
        return NO_SUBJECT

    def find(self, labels: Labels, kind: int) -> Found:
        """Return what the zone has for a name (lower-case labels, the root left out) and a record type."""
        depth = len(self._domain)
        if labels[-depth:] == self._domain:
            return self._find_forward(labels[:-depth], kind)
        if labels[-1:] == ("arpa",):
            return self._find_reverse(labels, kind)
        return Found(Outcome.OUTSIDE)

    def _find_forward(self, relative: Labels, kind: int) -> Found:
        apex: str = self.settings.domain
        if not relative:
            return self._find_apex(apex, kind)
        if relative == (FRESH_LABEL,):
            return Found(Outcome.FRESH if kind == Type.TXT else Outcome.NODATA, apex)
        records = self._records(relative)
        if records is None:
            return Found(Outcome.NXDOMAIN, apex)
        found = records.get(kind, ())
        if not found:
            return Found(Outcome.NODATA, apex)
        return Found(Outcome.ANSWER, apex, found, self._additional(found))

    def _find_apex(self, apex: str, kind: int) -> Found:
        if kind == Type.SOA:
            return Found(Outcome.ANSWER, apex, (self.soa(apex),))
        if kind == Type.NS:
            nameserver = HostData(f"{NAMESERVER_LABEL}.{self.settings.domain}")
            return Found(Outcome.ANSWER, apex, (nameserver,), self._additional((nameserver,)))
        return Found(Outcome.NODATA, apex)

    def _records(self, relative: Labels) -> Mapping[int, tuple[Data, ...]] | None:
        """Return a name's records by type, empty when the name exists without any, None when it does not."""
        if relative in _EMPTY_NON_TERMINALS:
            return {}
        if self.settings.relays and relative[-1] in (RELAY_LABEL, RELAYS_NAME[1]):
            found = self._relays_found(relative)
            if found is not None:
                return found
        match relative:
            case (str(name),) if name in self.services or name in self.leases:
                return self._service_records(name)
            case (str(connector), "connector") if connector in self._index.addresses:
                return {Type.A: self._index.addresses[connector]}
            case (str(name), "_tcp" | "_udp" as protocol) if name.startswith("_"):
                return self._program_records(name[1:], protocol[1:])
            case ("ns",):
                address = self.settings.nameserver
                return {Type.A: (address,)} if address else {}
            case ("_services", "_dns-sd", "_udp"):
                return {Type.PTR: self._service_list()}
            case (str(name), "_dns-sd", "_udp") if name in _BROWSING:
                # RFC 6763 11: where to browse.
                return {Type.PTR: (HostData(self.settings.domain),)}
            case (str(name), str(kind), "_tcp" | "_udp" as protocol) if kind == f"_{name}":
                return self._browsed_records(name, protocol[1:])
            case (_, *_, str(name)) if self._is_wildcard(name):
                records = self._service_records(name)
                return {kind: records[kind] for kind in (Type.A, Type.AAAA) if kind in records}
        return None

    def _relays_found(self, relative: Labels) -> Mapping[int, tuple[Data, ...]] | None:
        """Return what leads to the relays that the configuration names, None for other names."""
        if relative == RELAYS_NAME:
            domain = f"{RELAY_LABEL}.{self.settings.domain}"
            return {
                Type.SRV: tuple(
                    SrvData(0, 1, each.port, f"{each.name}.{domain}") for each in self.settings.relays
                )
            }
        if relative == (RELAY_LABEL,):
            return {}
        addresses = self._relay_addresses(relative[0]) if relative[1:] == (RELAY_LABEL,) else ()
        return {Type.A: addresses} if addresses else None

    def _relay_addresses(self, name: str) -> tuple[IPv4Address, ...]:
        return tuple(each.address for each in self.settings.relays if each.name == name)

    def _service_records(self, name: str) -> Mapping[int, tuple[Data, ...]]:
        service, lease = self.services.get(name), self.leases.get(name)
        if service is not None and service.problem is not None:
            return {Type.TXT: (_told("problem", service.problem),)}
        records: dict[int, tuple[Data, ...]] = {}
        told: tuple[bytes, ...] = _txt(lease) if lease is not None else ()
        if service is not None:
            records[Type.SRV] = relayed = self._relay_records(service)
            if not relayed:
                # A name that resolves and does not answer is hard to understand: say why.
                told += _told("reason", Reason.NO_HEALTHY_CONNECTOR)
        if told:
            records[Type.TXT] = (told,)
        if lease is not None:
            records[Type.A] = (lease.ip,)
            if self.settings.ula is not None:
                records[Type.AAAA] = (beside(self.settings.ula, lease.ip),)
        return records

    def _is_wildcard(self, name: str) -> bool:
        service = self.services.get(name)
        return service is not None and service.wildcard

    def _relay_records(self, service: Service) -> tuple[SrvData, ...]:
        """Return what relays pull: one record per passing instance that has a connector."""
        domain = self.settings.domain
        found = {
            SrvData(0, min(instance.weight, 65535), instance.port, f"{connector}.{CONNECTOR_LABEL}.{domain}")
            for connector, instance in connectors(service)
        }
        return tuple(sorted(found)[:SRV_RECORDS_MAX])

    def _program_records(self, name: str, protocol: str) -> Mapping[int, tuple[Data, ...]] | None:
        """Return what programs ask (RFC 2782): the virtual ports of one protocol at the service's name."""
        lease = self.leases.get(name)
        if lease is None or _has_problem(self.services.get(name)):
            return None
        target = f"{name}.{self.settings.domain}"
        ports = tuple(SrvData(0, 1, port.port, target) for port in lease.ports if port.protocol == protocol)
        instance = HostData(f"{name}._{name}._{protocol}.{self.settings.domain}")
        return {Type.SRV: ports, Type.PTR: (instance,)} if ports else None

    def _browsed_records(self, name: str, protocol: str) -> Mapping[int, tuple[Data, ...]] | None:
        """Return the one instance that browsing a service finds (RFC 6763 4 to 6): the service itself."""
        records = self._program_records(name, protocol)
        if records is None:
            return None
        return {Type.SRV: records[Type.SRV], Type.TXT: self._service_records(name)[Type.TXT]}

    def _service_list(self) -> tuple[HostData, ...]:
        """Return every service and protocol with a lease (RFC 6763 9), as many as a message holds."""
        names = sorted(
            {
                f"_{name}._{port.protocol}.{self.settings.domain}"
                for name, lease in self.leases.items()
                if not _has_problem(self.services.get(name))
                for port in lease.ports
                if port.protocol != "icmp"
            }
        )
        return tuple(map(HostData, names[:SERVICES_LISTED_MAX]))

    def _additional(self, records: Sequence[Data]) -> tuple[tuple[str, tuple[Address, ...]], ...]:
        names: dict[str, tuple[Address, ...]] = {}
        for record in records:
            target = ""
            if isinstance(record, SrvData):
                target = record.target
            elif isinstance(record, HostData):
                target = record.host
            addresses = self._addresses_of(target)
            if addresses:
                names[target] = addresses
        return tuple(names.items())

    def _addresses_of(self, target: str) -> tuple[Address, ...]:
        first, _, rest = target.partition(".")
        if rest == f"{CONNECTOR_LABEL}.{self.settings.domain}":
            return self._index.addresses.get(first, ())
        if rest == f"{RELAY_LABEL}.{self.settings.domain}":
            return self._relay_addresses(first)
        if rest != self.settings.domain:
            return ()
        if first == NAMESERVER_LABEL:
            return (self.settings.nameserver,) if self.settings.nameserver else ()
        # Who is told to go to a service by name is told its lease.
        ip = self.leases[first].ip
        return (ip, beside(self.settings.ula, ip)) if self.settings.ula else (ip,)

    def _find_reverse(self, labels: Labels, kind: int) -> Found:
        apex = next((zone for zone in self._reverse if labels[-len(zone) :] == zone), None)
        if apex is None:
            return Found(Outcome.OUTSIDE)
        apex_name = ".".join(apex)
        if labels == apex:
            return self._find_apex(apex_name, kind)
        names = self._index.names.get(_address_named(labels))
        if names is None:
            exists = self._is_between(labels, len(apex))
            return Found(Outcome.NODATA if exists else Outcome.NXDOMAIN, apex_name)
        if kind != Type.PTR:
            return Found(Outcome.NODATA, apex_name)
        host = HostData(f"{names[0]}.{self.settings.domain}")
        return Found(Outcome.ANSWER, apex_name, (host,))

    def _is_between(self, labels: Labels, depth: int) -> bool:
        """Say whether a leased address lies under a reverse name: it exists without records (RFC 8020)."""
        if labels[-2] == "in-addr":
            return ".".join(reversed(labels[:-2])) in self._index.octets
        below = labels[:-depth]
        if len(below) >= _NIBBLES_OF_ADDRESS or not _are_nibbles(below):
            return False
        nibbles = "".join(reversed(below))
        # Octets are two nibbles: half of one stands for sixteen.
        whole = [nibbles] if len(nibbles) % 2 == 0 else [nibbles + half for half in _HEX]
        known = self._index.names if len(whole[0]) == _NIBBLES_OF_ADDRESS else self._index.octets
        return any(_dotted(each) in known for each in whole)


def rebuilt(
    previous: ZoneData, services: Mapping[str, Service], leases: Mapping[str, Lease], now: float
) -> ZoneData:
    """Return the zone as it is now: `previous` itself when nothing in it changed.

    The serial rises with the Unix time `now`, and always (RFC 1982 arithmetic, 32 bits).
    """
    changed = differing(previous.services, services) | differing(previous.leases, leases)
    if not changed:
        return previous
    return previous.followed_by(services, leases, max(previous.serial + 1, int(now)) & 0xFFFFFFFF, changed)


def differing(before: Mapping[str, T], after: Mapping[str, T]) -> set[str]:
    """Return the keys under which two tables have not the same; quick when most values are the very same objects."""
    if before is after:
        return set()
    known = before.get
    others = [(key, known(key), value) for key, value in after.items() if known(key) is not value]
    changed = {key for key, was, value in others if was != value}
    new = sum(key not in before for key, _, _ in others)
    if len(before) != len(after) - new:
        changed |= before.keys() - after.keys()
    return changed


def reverse_zones(pool: IPv4Network) -> tuple[Labels, ...]:
    """Return the in-addr.arpa zones that make up a pool, cut at the octet (RFC 1035 3.5)."""
    octets = max(1, min(3, -(-pool.prefixlen // 8)))
    length = octets * 8
    networks = (
        pool.subnets(new_prefix=length) if pool.prefixlen < length else [pool.supernet(new_prefix=length)]
    )
    return tuple(
        (*reversed(str(network.network_address).split(".")[:octets]), "in-addr", "arpa")
        for network in networks
    )


def ula_zone(ula: IPv6Network) -> Labels:
    """Return the ip6.arpa zone of a /96 (RFC 3596 2.5)."""
    return (*reversed(ula.network_address.exploded.replace(":", "")[:-_NIBBLES_OF_ADDRESS]), "ip6", "arpa")


def _address_named(labels: Labels) -> str:
    """Return the leased address that a reverse name means, as the index has it; "" for what means none."""
    if labels[-2:] == ("in-addr", "arpa"):
        return ".".join(reversed(labels[:-2]))
    own = labels[:_NIBBLES_OF_ADDRESS]
    is_whole = len(labels) == _NAME_LABELS_OF_IPV6 and _are_nibbles(own)
    return _dotted("".join(reversed(own))) if is_whole else ""


def _are_nibbles(labels: Labels) -> bool:
    return all(len(label) == 1 and label in _HEX for label in labels)


def _dotted(nibbles: str) -> str:
    return ".".join(str(int(nibbles[at : at + 2], 16)) for at in range(0, len(nibbles), 2))


def _has_problem(service: Service | None) -> bool:
    return service is not None and service.problem is not None


def _txt(lease: Lease) -> tuple[bytes, ...]:
    """Return the strings of a service's TXT record; a long list of ports is cut into several."""
    lines = ["ports="]
    for port in lease.ports:
        text = f"{port.protocol}:{port.port}"
        if len(lines[-1]) + len(text) + 1 > TXT_BYTES_MAX:
            lines.append("ports=")
        lines[-1] += text if lines[-1].endswith("=") else f",{text}"
    return (*(line.encode() for line in lines), f"epoch={lease.epoch}".encode())


def _told(key: str, text: str) -> tuple[bytes, ...]:
    return (f"{key}={text}".encode()[:TXT_BYTES_MAX],)
