"""What the elected keeper should change in the lease table, as transactions (design.md 2.7 and 4).

A plain function of the catalog, the table, the pool and the time. Pure: reading and writing Consul, and
being elected, are dnsd.daemon's and dnsd.election's.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from hashlib import sha256
from ipaddress import AddressValueError, IPv4Address, IPv4Network
from typing import Literal

import msgspec

from dnsd.services import Service
from ztna.catalog import TXN_OPERATIONS_MAX, KvCheckIndex, KvCheckSession, KvDeleteCas, KvSet, TxnOp
from ztna.jsontypes import to_json
from ztna.leases import (
    ADDRESS_PREFIX,
    KEEPER_KEY,
    SERVICE_PREFIX,
    Holding,
    Lease,
    Port,
    Stored,
    Table,
    address_key,
    service_key,
)
from ztna.names import ServiceName

CATALOG_READ_SECONDS_MAX = 5.0
"""How old a consistent read of the catalog may be for a lease to be released on its word."""

UNREADABLE = "its lease in KV cannot be read; `ztna leases audit` says why"

Kind = Literal["granted", "returned", "moved", "released", "repaired", "ports_changed"]


class Pool:
    """The addresses that may be leased: the network without its ends and without what is reserved."""

    def __init__(self, cidr: IPv4Network, reserved: Iterable[IPv4Network] = ()) -> None:
        self.cidr = cidr
        ends = 1 if cidr.num_addresses > 2 else 0
        self._first = int(cidr.network_address) + ends
        self._last = int(cidr.broadcast_address) - ends
        self._blocks = self._merged(reserved)
        self._starts = [first for first, _ in self._blocks]
        self.size = self._last - self._first + 1 - sum(last - first + 1 for first, last in self._blocks)

    def __contains__(self, address: IPv4Address) -> bool:
        number = int(address)
        return self._first <= number <= self._last and self._block(number) is None

    def probe(self, name: str) -> Iterator[IPv4Address]:
        """Yield every address once, beginning where the name hashes to: a lost table grows back the same."""
        span = self._last - self._first + 1
        start = self._first + int.from_bytes(sha256(name.encode()).digest()[:8]) % span
        for first, last in ((start, self._last), (self._first, start - 1)):
            number = first
            while number <= last:
                block = self._block(number)
                if block is None:
                    yield IPv4Address(number)
                    number += 1
                else:
                    number = block[1] + 1

    def _block(self, number: int) -> tuple[int, int] | None:
        place = bisect_right(self._starts, number) - 1
        return self._blocks[place] if place >= 0 and number <= self._blocks[place][1] else None

    def _merged(self, reserved: Iterable[IPv4Network]) -> list[tuple[int, int]]:
        """Return the reserved ranges inside the pool, in order, none touching another."""
        blocks: list[tuple[int, int]] = []
        for network in sorted(reserved):
            first = max(int(network.network_address), self._first)
            last = min(int(network.broadcast_address), self._last)
            if first > last:
                continue
            if blocks and first <= blocks[-1][1] + 1:
                blocks[-1] = (blocks[-1][0], max(last, blocks[-1][1]))
            else:
                blocks.append((first, last))
        return blocks


class Rules(msgspec.Struct, frozen=True):
    """For how long a service may be gone before its lease is released, and what then rests how long."""

    pool: Pool
    grace_s: float
    quarantine_s: float


class CatalogRead(msgspec.Struct, frozen=True):
    """A consistent read: the names in the catalog and the Unix time before it was asked for."""

    names: frozenset[str]
    at: float


class View(msgspec.Struct, frozen=True, kw_only=True):
    """What the keeper knows when it plans. `gone_since`: by service with a lease but not in the catalog."""

    services: Mapping[str, Service]
    table: Table
    gone_since: Mapping[str, float] = {}
    catalog_read: CatalogRead | None = None


class Change(msgspec.Struct, frozen=True):
    """One service's step, whole or not at all; `operations` guard each key by its index."""

    kind: Kind
    service: str
    address: IPv4Address
    operations: tuple[TxnOp, ...]


ProblemKind = Literal["pool_exhausted", "lease_unreadable", "service_not_served"]


class Problem(msgspec.Struct, frozen=True, order=True):
    """A service that has no lease, or is not served, and what to do about it."""

    service: str
    kind: ProblemKind
    what: str


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """The changes, what stands in the way of others, and what to remember for the next plan.

    `wants_catalog_read`: releases are due and need a CatalogRead. `due_at` is when time alone may change the plan.
    """

    changes: tuple[Change, ...]
    problems: tuple[Problem, ...]
    gone_since: Mapping[str, float]
    wants_catalog_read: bool
    due_at: float | None


def plan(view: View, rules: Rules, now: float) -> Plan:
    """Decide every change that is due at `now` (Unix seconds).

    Each service gets at most one change and each address at most one owner, whatever the table holds: an
    unreadable record is left alone and what it stands for is not given out.
    """
    return _Planner(view, rules, now).plan()


def transactions(changes: Sequence[Change], session: str) -> tuple[tuple[TxnOp, ...], ...]:
    """Pack changes into transactions; each fails as a whole once `session` has lost the keeper's lock."""
    guard = KvCheckSession(KEEPER_KEY, session)
    packed: list[tuple[TxnOp, ...]] = []
    current: list[TxnOp] = [guard]
    for change in changes:
        if len(current) + len(change.operations) > TXN_OPERATIONS_MAX:
            packed.append(tuple(current))
            current = [guard]
        current += change.operations
    if len(current) > 1:
        packed.append(tuple(current))
    return tuple(packed)


class _Planner:
    """One planning: the table as it will be, and the changes that lead there."""

    def __init__(self, view: View, rules: Rules, now: float) -> None:
        self._view = view
        self._rules = rules
        self._now = now
        self._leases = view.table.leases
        self._holdings = view.table.holdings
        self._owners = _owners(view.table)
        self._former_homes = _former_homes(view.table, self._owners)
        self._changes: list[Change] = []
        self._problems: list[Problem] = []
        self._gone_since: dict[str, float] = {}
        self._wants_catalog_read = False
        self._due_at: float | None = None
        # What no other service may take: held now, resting, or taken in this planning.
        self._taken = {*self._owners, *_unreadable_addresses(view.table)}

    def plan(self) -> Plan:
        homeless: list[Service] = []
        for name, service in sorted(self._view.services.items()):
            if service.problem is not None:
                self._problems.append(Problem(name, "service_not_served", service.problem))
            elif service_key(ServiceName(name)) in self._view.table.unreadable:
                self._problems.append(Problem(name, "lease_unreadable", UNREADABLE))
            elif not self._keep(service):
                homeless.append(service)
        newcomers = [service for service in homeless if not self._take_back(service)]
        for name in sorted(self._leases.keys() - self._view.services.keys()):
            self._let_go(name)
        self._retire_strays()
        self._settle(newcomers)
        return Plan(
            changes=tuple(self._changes),
            problems=tuple(self._problems),
            gone_since=self._gone_since,
            wants_catalog_read=self._wants_catalog_read,
            due_at=self._due_at,
        )

    def _keep(self, service: Service) -> bool:
        """Leave a service where it is, mending its records; False when it has no address of its own."""
        name = ServiceName(service.name)
        stored = self._leases.get(name)
        if stored is None or self._owners[stored.record.ip] != name:
            return False
        lease, holding = stored.record, self._holdings.get(stored.record.ip)
        if holding is None or not _agree(name, lease, holding.record):
            self._mend(name, service.ports, lease.ip)
        elif lease.ports != service.ports:
            # The address did not change hands, so the epoch stays and no session ends for it.
            renewed = Lease(lease.ip, lease.epoch, service.ports)
            self._add(
                "ports_changed",
                name,
                lease.ip,
                KvSet(service_key(name), to_json(renewed), stored.index),
                KvCheckIndex(address_key(lease.ip), holding.index),
            )
        return True

    def _mend(self, name: ServiceName, ports: tuple[Port, ...], address: IPv4Address) -> None:
        if address_key(address) not in self._view.table.unreadable:
            self._grant("repaired", name, ports, address)

    def _take_back(self, service: Service) -> bool:
        """Give a service the address it had last, resting or not; False when it has none to return to."""
        name = ServiceName(service.name)
        for address in self._former_homes.get(name, ()):
            if address in self._rules.pool and address not in self._taken:
                self._grant("moved" if name in self._leases else "returned", name, service.ports, address)
                return True
        return False

    def _let_go(self, name: ServiceName) -> None:
        """Release the lease of a service that has left the catalog, once that is sure and long enough ago."""
        stored = self._leases[name]
        holding = self._holdings.get(stored.record.ip)
        if holding is not None and holding.record.pinned:
            return
        since = self._view.gone_since.get(name, self._now)
        self._gone_since[name] = since
        due_at = since + self._rules.grace_s
        if self._now < due_at:
            self._look_again_at(due_at)
            lease = stored.record
            is_owner = self._owners[lease.ip] == name
            if is_owner and (holding is None or not _agree(name, lease, holding.record)):
                self._mend(name, lease.ports, lease.ip)
        elif self._surely_gone(name, holding):
            self._release(name, stored, holding)

    def _surely_gone(self, name: ServiceName, holding: Stored[Holding] | None) -> bool:
        read = self._view.catalog_read
        changed_at = holding.record.leased_at if holding else 0.0
        if read is None or self._now - read.at >= CATALOG_READ_SECONDS_MAX or read.at <= changed_at:
            self._wants_catalog_read = True
            return False
        return name not in read.names

    def _release(self, name: ServiceName, stored: Stored[Lease], holding: Stored[Holding] | None) -> None:
        address = stored.record.ip
        operations: list[TxnOp] = [KvDeleteCas(service_key(name), stored.index)]
        if self._owners[address] == name and address_key(address) not in self._view.table.unreadable:
            operations.append(self._rest(address, holding, name, stored.record.epoch))
        self._add("released", name, address, *operations)

    def _retire_strays(self) -> None:
        """Put to rest addresses whose holding says leased although no lease points at them."""
        for address, stored in sorted(self._holdings.items()):
            name, epoch = stored.record.service, stored.record.epoch
            if (
                stored.record.state == "leased"
                and address not in self._taken
                and SERVICE_PREFIX + name not in self._view.table.unreadable
            ):
                self._taken.add(address)
                self._add("released", name, address, self._rest(address, stored, name, epoch))

    def _rest(self, address: IPv4Address, holding: Stored[Holding] | None, name: str, epoch: int) -> KvSet:
        resting = Holding(
            service=name,
            epoch=max(epoch, holding.record.epoch if holding else 0),
            state="quarantined",
            leased_at=holding.record.leased_at if holding else 0.0,
            released_at=self._now,
        )
        return KvSet(address_key(address), to_json(resting), holding.index if holding else 0)

    def _settle(self, newcomers: Sequence[Service]) -> None:
        """Give addresses to services that never had one: unused ones first, then the longest rested."""
        unused = self._rules.pool.size - sum(
            1 for address in self._taken | self._holdings.keys() if address in self._rules.pool
        )
        rested = self._rested()
        for service in newcomers:
            name = ServiceName(service.name)
            if unused > 0:
                unused -= 1
                address = next(
                    address
                    for address in self._rules.pool.probe(name)
                    if address not in self._holdings and address not in self._taken
                )
            else:
                free = next(rested, None)
                if free is None:
                    self._look_again_when_one_has_rested()
                    self._problems.append(Problem(name, "pool_exhausted", self._exhausted()))
                    continue
                address = free
            self._grant("moved" if name in self._leases else "granted", name, service.ports, address)

    def _look_again_when_one_has_rested(self) -> None:
        for address, stored in self._holdings.items():
            if address not in self._taken and address in self._rules.pool:
                self._look_again_at(_rests_since(stored.record) + self._rules.quarantine_s)

    def _look_again_at(self, due_at: float) -> None:
        self._due_at = due_at if self._due_at is None else min(due_at, self._due_at)

    def _rested(self) -> Iterator[IPv4Address]:
        """Yield the addresses past their quarantine, the longest rested first."""
        rested = sorted(
            (_rests_since(stored.record), address)
            for address, stored in self._holdings.items()
            if stored.record.state == "quarantined"
            and address not in self._taken
            and address in self._rules.pool
            and self._now - _rests_since(stored.record) >= self._rules.quarantine_s
        )
        return (address for _, address in rested)

    def _exhausted(self) -> str:
        resting = sum(1 for stored in self._holdings.values() if stored.record.state == "quarantined")
        return (
            f"no virtual address left for it: pool {self._rules.pool.cidr} has {self._rules.pool.size}, "
            f"{len(self._owners)} leased, {resting} in quarantine; enlarge dnsd.pool or remove services"
        )

    def _grant(self, kind: Kind, name: ServiceName, ports: tuple[Port, ...], address: IPv4Address) -> None:
        """Write both records anew, under an epoch above all that either has known."""
        lease, holding = self._leases.get(name), self._holdings.get(address)
        epoch = max(
            lease.record.epoch + 1 if lease else 0,
            holding.record.epoch + 1 if holding else 0,
            int(self._now * 1000),
        )
        self._taken.add(address)
        pinned = holding is not None and holding.record.service == name and holding.record.pinned
        held = Holding(service=name, epoch=epoch, state="leased", pinned=pinned, leased_at=self._now)
        self._add(
            kind,
            name,
            address,
            KvSet(service_key(name), to_json(Lease(address, epoch, ports)), lease.index if lease else 0),
            KvSet(address_key(address), to_json(held), holding.index if holding else 0),
        )

    def _add(self, kind: Kind, service: str, address: IPv4Address, *operations: TxnOp) -> None:
        self._changes.append(Change(kind, service, address, operations))


def _owners(table: Table) -> dict[IPv4Address, ServiceName]:
    """Return who owns each leased address. Of several leases on one, the holding decides, then the older."""
    claims: dict[IPv4Address, list[tuple[int, ServiceName]]] = {}
    for service, stored in table.leases.items():
        claims.setdefault(stored.record.ip, []).append((stored.record.epoch, service))
    owners: dict[IPv4Address, ServiceName] = {}
    for address, claimants in claims.items():
        holding = table.holdings.get(address)
        favoured = holding.record.service if holding and holding.record.state == "leased" else None
        owners[address] = min((service != favoured, epoch, service) for epoch, service in claimants)[2]
    return owners


def _former_homes(
    table: Table, owners: Mapping[IPv4Address, ServiceName]
) -> Mapping[str, Sequence[IPv4Address]]:
    """Return by service the addresses nobody owns whose holding names it, the one it left last first."""
    homes: dict[str, list[tuple[bool, float, IPv4Address]]] = {}
    for address, stored in table.holdings.items():
        if address not in owners:
            resting = stored.record.state == "quarantined"
            left = (resting, -_rests_since(stored.record), address)
            homes.setdefault(stored.record.service, []).append(left)
    return {service: [address for *_, address in sorted(found)] for service, found in homes.items()}


def _unreadable_addresses(table: Table) -> Iterator[IPv4Address]:
    for key in table.unreadable:
        if key.startswith(ADDRESS_PREFIX):
            with suppress(AddressValueError):
                yield IPv4Address(key[len(ADDRESS_PREFIX) :])


def _agree(name: ServiceName, lease: Lease, holding: Holding) -> bool:
    return (holding.service, holding.epoch, holding.state) == (name, lease.epoch, "leased")


def _rests_since(holding: Holding) -> float:
    return holding.leased_at if holding.released_at is None else holding.released_at
