"""What the zone looks up other than by service: connectors' addresses and the names of addresses.

Pure. An index is updated for the services that changed, so that one change among 100,000 costs as much as one
among ten. Knows nothing of records.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from ipaddress import AddressValueError, IPv4Address

from dnsd.services import Service, connectors
from ztna.leases import Lease

Services = Mapping[str, Service]
Leases = Mapping[str, Lease]


class Index:
    """Immutable to its readers; `updated` makes the next one.

    `addresses` has a connector's addresses in order, `names` who has a leased address (several only while the
    table is broken; the first is told), and `octets` how many leased addresses lie under each name between a
    reverse zone and its records (RFC 8020). `served` has the services of each connector.
    """

    def __init__(self) -> None:
        self.addresses: dict[str, tuple[IPv4Address, ...]] = {}
        self.names: dict[str, tuple[str, ...]] = {}
        self.octets: Counter[str] = Counter()
        self.served: dict[str, frozenset[str]] = {}
        self._claims: dict[str, Counter[IPv4Address | None]] = {}

    def updated(
        self, changed: Iterable[str], before: tuple[Services, Leases], after: tuple[Services, Leases]
    ) -> tuple[Index, frozenset[str]]:
        """Return the index after these services changed, and the connectors whose addresses did.

        `before` and `after` are the catalog and the leases as they were and as they are.
        """
        index = Index()
        index.addresses, index.names = dict(self.addresses), dict(self.names)
        index.octets, index._claims = Counter(self.octets), dict(self._claims)
        index.served = dict(self.served)
        names = sorted(changed)
        for name in names:
            index._forget_name(name, *before)
        for name in names:
            index._learn_name(name, *after)
        return index, index._renew_connectors(names, before[0], after[0])

    def _forget_name(self, name: str, services: Services, leases: Leases) -> None:
        address = _reverse_address(name, services, leases)
        if address is None:
            return
        self.names[address] = tuple(each for each in self.names[address] if each != name)
        if not self.names[address]:
            del self.names[address]
            self.octets.subtract(_octets(address))
            for prefix in _octets(address):
                if not self.octets[prefix]:
                    del self.octets[prefix]

    def _learn_name(self, name: str, services: Services, leases: Leases) -> None:
        address = _reverse_address(name, services, leases)
        if address is None:
            return
        if address not in self.names:
            self.octets.update(_octets(address))
        self.names[address] = tuple(sorted((*self.names.get(address, ()), name)))

    def _renew_connectors(self, names: Iterable[str], before: Services, after: Services) -> frozenset[str]:
        claims = self._claims
        # By connector: which of the services it had, and which it has.
        touched: dict[str, tuple[set[str], set[str]]] = {}
        for place, (services, step) in enumerate(((before, -1), (after, 1))):
            for name in names:
                for connector, address in _claimed(services.get(name)):
                    if connector not in touched:
                        touched[connector] = set(), set()
                        claims[connector] = Counter(claims.get(connector))
                    claims[connector][address] += step
                    touched[connector][place].add(name)
        for connector, (had, has) in touched.items():
            self.served[connector] = self.served.get(connector, frozenset()) - had | has
        moved: set[str] = set()
        for connector in touched:
            claims[connector] = found = +claims[connector]
            addresses = tuple(sorted(address for address in found if address is not None))
            if not found:
                del self.addresses[connector], claims[connector], self.served[connector]
            elif addresses == self.addresses.get(connector):
                continue
            else:
                self.addresses[connector] = addresses
            moved.add(connector)
        return frozenset(moved)


def _claimed(service: Service | None) -> Iterator[tuple[str, IPv4Address | None]]:
    """Yield each connector with its address: None for one that has no IPv4 address but is there."""
    for connector, instance in connectors(service) if service is not None else ():
        try:
            yield connector, IPv4Address(instance.address)
        except AddressValueError:
            yield connector, None


def _reverse_address(name: str, services: Services, leases: Leases) -> str | None:
    """Return the address that leads back to a service, None while it is not served."""
    lease, service = leases.get(name), services.get(name)
    if lease is None or (service is not None and service.problem is not None):
        return None
    return str(lease.ip)


def _octets(address: str) -> tuple[str, str, str]:
    first, second, third, _ = address.split(".")
    return first, f"{first}.{second}", f"{first}.{second}.{third}"
