"""What the elected keeper should change in the lease table, as transactions (design.md 2.7 and 4).

A plain function of the catalog, the table, the pool and the time. Pure: reading and writing Consul, and
being elected, are dnsd.daemon's and dnsd.election's.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from ipaddress import AddressValueError, IPv4Address
from itertools import chain

import msgspec

from dnsd.plans import CatalogRead as CatalogRead
from dnsd.plans import Change, Kind, Plan, PoolUse, Problem, Rules, View
from dnsd.plans import transactions as transactions
from dnsd.pool import Pool as Pool
from dnsd.services import Service
from dnsd.wishes import (
    ANSWER_KEPT_SECONDS,
    Facts,
    Forget,
    Judgement,
    Leave,
    Move,
    Refuse,
    SetPin,
    judge,
)
from ztna.catalog import KvCheckIndex, KvDeleteCas, KvSet, TxnOp
from ztna.jsontypes import to_json
from ztna.leases import (
    ADDRESS_PREFIX,
    SERVICE_PREFIX,
    Holding,
    Lease,
    Port,
    Stored,
    Table,
    Wish,
    WishAnswer,
    address_key,
    service_key,
    wish_key,
)
from ztna.names import ServiceName

CATALOG_READ_SECONDS_MAX = 5.0
"""How old a consistent read of the catalog may be for a lease to be released on its word."""

EMPTY_CATALOG_SECONDS = 86_400.0
EMPTY_CATALOG_LEASES_MIN = 2
"""A catalog without any service at all, while so many have leases, is a registry that lost its mind, not
news: the table is kept as it is for so long."""
FREED_AT_ONCE_MAX = 32
"""Addresses whose rest one wish can end: they share a transaction with its answer."""

UNREADABLE = "its lease in KV cannot be read; `ztna leases audit` says why"


def plan(view: View, rules: Rules, now: float) -> Plan:
    """Decide every change that is due at `now` (Unix seconds).

    Each service gets at most one change and each address at most one owner, whatever the table holds: an
    unreadable record is left alone and what it stands for is not given out.
    """
    return _Planner(view, rules, now).plan()


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
        self._highest_epoch = max(view.epoch_floor, _highest_epoch(view.table))
        self._empty_catalog = False
        self._unused: list[int] | None = None
        """By range of the pool: how many addresses nobody has or had; None until asked for."""
        self._settled: set[str] = set()
        """Services whose one change a wish has made; the catalog's is for the next plan."""
        # What no other service may take, and who has it: held now, or taken in this planning. "" when that
        # cannot be read.
        self._taken: dict[IPv4Address, str] = {
            **dict.fromkeys(_unreadable_addresses(view.table), ""),
            **self._owners,
        }

    def plan(self) -> Plan:
        for asked_for, stored in sorted(self._view.table.wishes.items()):
            self._hear(asked_for, stored)
        homeless: list[Service] = []
        for name, service in sorted(self._view.services.items()):
            if name in self._settled:
                continue
            if service.problem is not None:
                self._problems.append(Problem(name, "service_not_served", service.problem))
            elif service_key(ServiceName(name)) in self._view.table.unreadable:
                self._problems.append(Problem(name, "lease_unreadable", UNREADABLE))
            elif not self._keep(service):
                homeless.append(service)
        homeless = [service for service in homeless if not self._take_asked(service)]
        newcomers = [service for service in homeless if not self._take_back(service)]
        for name in sorted(self._leases.keys() - self._view.services.keys()):
            if name not in self._settled:
                self._let_go(name)
        self._retire_strays()
        self._settle(newcomers)
        self._report_outsiders()
        return Plan(
            changes=tuple(self._changes),
            problems=tuple(self._problems),
            gone_since=self._gone_since,
            wants_catalog_read=self._wants_catalog_read,
            due_at=self._due_at,
            epoch_floor=self._highest_epoch,
            pool=self._pool_use(),
        )

    # Wishes

    def _hear(self, name: ServiceName, stored: Stored[Wish]) -> None:
        """Carry a wish out, or answer why not; the answer is written by the same transaction."""
        wish = stored.record
        if wish.answer is not None:
            forget_at = wish.answer.at + ANSWER_KEPT_SECONDS
            if self._now < forget_at:
                self._look_again_at(forget_at)
            else:
                self._add("wish_forgotten", name, None, KvDeleteCas(wish_key(name), stored.index))
            return
        lease = self._leases.get(name)
        holding = self._holdings.get(lease.record.ip) if lease else None
        broken = service_key(name) in self._view.table.unreadable or (
            lease is not None and (holding is None or not _agree(name, lease.record, holding.record))
        )
        if broken:
            judgement: Judgement = Refuse(
                f"the records of {name} do not agree or cannot be read; `ztna leases audit` says more, ask again"
            )
        else:
            judgement = judge(name, wish, self._facts(name, lease, holding))
        self._obey(name, stored, judgement)

    def _facts(
        self, name: ServiceName, lease: Stored[Lease] | None, holding: Stored[Holding] | None
    ) -> Facts:
        return Facts(
            service=self._view.services.get(name),
            lease=lease.record if lease else None,
            holding=holding.record if holding else None,
            resting=tuple(self._former_homes.get(name, ())),
            obstacle=lambda address, force: self._obstacle(name, address, force=force),
        )

    def _obey(self, name: ServiceName, stored: Stored[Wish], judgement: Judgement) -> None:
        match judgement:
            case Refuse(what):
                self._answer(name, stored, what, ok=False)
            case Leave(what):
                self._answer(name, stored, what, ok=True)
            case SetPin(pinned):
                self._pin(name, stored, pinned)
            case Move(ip, pinned):
                self._move(name, stored, ip, pinned)
            case Forget(addresses):
                self._forget(name, stored, addresses)
            case _:  # Release
                self._release_now(name, stored)

    def _answer(self, name: ServiceName, stored: Stored[Wish], what: str, *, ok: bool) -> None:
        kind: Kind = "wish_granted" if ok else "wish_refused"
        self._add(kind, name, None, self._answered(name, stored, what, ok=ok), why=what)

    def _answered(self, name: ServiceName, stored: Stored[Wish], what: str, *, ok: bool = True) -> KvSet:
        answered = msgspec.structs.replace(stored.record, answer=WishAnswer(ok, what, self._now))
        return KvSet(wish_key(name), to_json(answered), stored.index)

    def _pin(self, name: ServiceName, stored: Stored[Wish], pinned: bool) -> None:
        """Change the mark alone: the address does not change hands, so the epoch stays."""
        lease = self._leases[name]
        address = lease.record.ip
        holding = self._holdings[address]
        marked = msgspec.structs.replace(holding.record, pinned=pinned)
        what = f"{name} is {'pinned to' if pinned else 'no longer pinned to'} {address}"
        self._settle_wish(
            "pinned" if pinned else "unpinned",
            name,
            address,
            KvSet(address_key(address), to_json(marked), holding.index),
            KvCheckIndex(service_key(name), lease.index),
            self._answered(name, stored, what),
        )

    def _move(self, name: ServiceName, stored: Stored[Wish], ip: IPv4Address | None, pinned: bool) -> None:
        was = self._leases[name].record.ip
        address = ip or self._unused_address(name) or next(self._rested(), None)
        if address is None:
            self._answer(name, stored, f"{name} stays at {was}: {self._exhausted()}", ok=False)
            return
        answer = self._answered(name, stored, f"{name} moved from {was} to {address}")
        service = self._view.services.get(name)
        ports = service.ports if service and service.problem is None else self._leases[name].record.ports
        self._settled.add(name)
        self._look_again_at(self._now)
        self._relocate(name, ports, address, "wished", answer, pinned=pinned)

    def _forget(self, name: ServiceName, stored: Stored[Wish], addresses: tuple[IPv4Address, ...]) -> None:
        freed = addresses[:FREED_AT_ONCE_MAX]
        what = f"{', '.join(map(str, freed))} may be leased to anybody now"
        self._settle_wish(
            "freed",
            name,
            freed[0],
            *(KvDeleteCas(address_key(address), self._holdings[address].index) for address in freed),
            self._answered(name, stored, what),
        )

    def _release_now(self, name: ServiceName, stored: Stored[Wish]) -> None:
        lease = self._leases[name]
        holding = self._holdings[lease.record.ip]
        self._settled.add(name)
        if self._surely_gone(name, holding):
            what = f"{name} no longer has {lease.record.ip}, which rests now"
            self._release(name, lease, holding, self._answered(name, stored, what))
        elif not self._wants_catalog_read:
            self._answer(name, stored, f"{name} has just been registered again", ok=False)

    def _settle_wish(self, kind: Kind, name: str, address: IPv4Address, *operations: TxnOp) -> None:
        """Add the change that a wish is; what else is due for the service comes with the next plan."""
        self._settled.add(name)
        self._look_again_at(self._now)
        self._add(kind, name, address, *operations, why="wished")

    def _obstacle(self, name: str, address: IPv4Address, *, force: bool = False) -> str | None:
        """Say why the service cannot have an address, None when it can."""
        if address not in self._rules.pool:
            return f"{address} is outside the pool ({self._rules.pool}) or reserved"
        if address in self._taken:
            holder = self._taken[address]
            return f"{address} is held by {holder}" if holder else f"the record of {address} cannot be read"
        holding = self._holdings.get(address)
        if holding is None or holding.record.service == name or force:
            return None
        rested_at = _rests_since(holding.record) + self._rules.quarantine_s
        if self._now >= rested_at:
            return None
        self._look_again_at(rested_at)
        return f"{address} rests for {holding.record.service} until {_moment(rested_at)}"

    # Services in the catalog

    def _keep(self, service: Service) -> bool:
        """Leave a service where it is, mending its records; False when it has no address of its own."""
        name = ServiceName(service.name)
        stored = self._leases.get(name)
        if stored is None or self._owners[stored.record.ip] != name:
            return False
        lease, holding = stored.record, self._holdings.get(stored.record.ip)
        if holding is None or not _agree(name, lease, holding.record):
            self._mend(name, service.ports, lease.ip)
        elif self._goes_where_asked(service, lease, holding.record):
            pass
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

    def _goes_where_asked(self, service: Service, lease: Lease, holding: Holding) -> bool:
        """Move a service to the address its definition asks for, if another has not got it."""
        address = service.virtual_ip
        if service.virtual_ip_problem is None and (address is None or address == lease.ip):
            return False
        if holding.pinned and address is not None:
            what = (
                f"its definition asks for {address}, but it is pinned to {lease.ip}; `ztna leases unpin` it"
            )
            self._problems.append(Problem(service.name, "virtual_ip_refused", what))
            return False
        granted = self._granted_ask(service)
        if granted is not None:
            name = ServiceName(service.name)
            self._relocate(name, service.ports, granted, "its definition asks for it", pinned=False)
        return granted is not None

    def _take_asked(self, service: Service) -> bool:
        """Give a service without an address the one its definition asks for, if another has not got it."""
        address = self._granted_ask(service)
        if address is not None:
            name = ServiceName(service.name)
            kind: Kind = "moved" if name in self._leases else "granted"
            self._grant(kind, name, service.ports, address, why=self._lost_to(name))
        return address is not None

    def _lost_to(self, name: ServiceName) -> str:
        """Say who has the address that the service's own record claims, "" when it claims none."""
        claimed = self._leases.get(name)
        return f"{claimed.record.ip} is held by {self._owners[claimed.record.ip]}" if claimed else ""

    def _granted_ask(self, service: Service) -> IPv4Address | None:
        """Return the address its definition asks for if it can have it; report why it cannot."""
        what = service.virtual_ip_problem
        if service.virtual_ip is not None:
            obstacle = self._obstacle(service.name, service.virtual_ip)
            what = f"its definition asks for {service.virtual_ip}, but {obstacle}" if obstacle else None
        if what is not None:
            self._problems.append(Problem(service.name, "virtual_ip_refused", what))
            return None
        return service.virtual_ip

    def _relocate(
        self,
        name: ServiceName,
        ports: tuple[Port, ...],
        address: IPv4Address,
        why: str,
        *further: TxnOp,
        pinned: bool,
    ) -> None:
        """Lease another address to a service whose records agree; the one it leaves rests."""
        lease = self._leases[name].record
        rest = self._rest(lease.ip, self._holdings.get(lease.ip), name, lease.epoch)
        self._grant(
            "moved", name, ports, address, rest, *further, pinned=pinned, why=f"{why}; from {lease.ip}"
        )

    def _mend(self, name: ServiceName, ports: tuple[Port, ...], address: IPv4Address) -> None:
        if address_key(address) not in self._view.table.unreadable:
            self._grant("repaired", name, ports, address, why="its two records did not agree")

    def _take_back(self, service: Service) -> bool:
        """Give a service the address it had last, resting or not; False when it has none to return to."""
        name = ServiceName(service.name)
        for address in self._former_homes.get(name, ()):
            if address in self._rules.pool and address not in self._taken:
                kind: Kind = "moved" if name in self._leases else "returned"
                self._grant(kind, name, service.ports, address, why=self._lost_to(name))
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
        elif self._surely_gone(name, holding) and not self._doubts_the_catalog(since):
            self._release(name, stored, holding)

    def _doubts_the_catalog(self, since: float) -> bool:
        """Whether to keep all leases although the catalog says that every single service is gone."""
        read = self._view.catalog_read
        believe_at = since + EMPTY_CATALOG_SECONDS
        if read is None or read.names or len(self._leases) < EMPTY_CATALOG_LEASES_MIN:
            return False
        if self._now >= believe_at:
            return False
        self._look_again_at(believe_at)
        self._empty_catalog = True
        return True

    def _surely_gone(self, name: ServiceName, holding: Stored[Holding] | None) -> bool:
        read = self._view.catalog_read
        changed_at = holding.record.leased_at if holding else 0.0
        if read is None or self._now - read.at >= CATALOG_READ_SECONDS_MAX or read.at <= changed_at:
            self._wants_catalog_read = True
            return False
        return name not in read.names

    def _release(
        self,
        name: ServiceName,
        stored: Stored[Lease],
        holding: Stored[Holding] | None,
        *further: TxnOp,
    ) -> None:
        address = stored.record.ip
        operations: list[TxnOp] = [KvDeleteCas(service_key(name), stored.index)]
        if self._owners[address] == name and address_key(address) not in self._view.table.unreadable:
            operations.append(self._rest(address, holding, name, stored.record.epoch))
        self._add("released", name, address, *operations, *further)

    def _retire_strays(self) -> None:
        """Put to rest addresses whose holding says leased although no lease points at them."""
        strays = [
            address
            for address, stored in self._holdings.items()
            if stored.record.state == "leased"
            and address not in self._taken
            and SERVICE_PREFIX + stored.record.service not in self._view.table.unreadable
        ]
        for address in sorted(strays):
            stored = self._holdings[address]
            name, epoch = stored.record.service, stored.record.epoch
            self._taken[address] = name
            self._add(
                "released",
                name,
                address,
                self._rest(address, stored, name, epoch),
                why="no lease points at it",
            )

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
        rested = self._rested()
        for service in newcomers:
            name = ServiceName(service.name)
            address = self._unused_address(name) or next(rested, None)
            if address is None:
                self._look_again_when_one_has_rested()
                self._problems.append(Problem(name, "pool_exhausted", self._exhausted()))
                continue
            kind: Kind = "moved" if name in self._leases else "granted"
            self._grant(kind, name, service.ports, address, why=self._lost_to(name))

    def _unused_address(self, name: str) -> IPv4Address | None:
        """Return the address nobody has or had that is next from where the name hashes to."""
        if self._unused is None:
            touched = self._taken.keys() | self._holdings.keys()
            self._unused = [
                each.size - sum(1 for address in touched if address in each)
                for each in self._rules.pool.ranges
            ]
        for place, each in enumerate(self._rules.pool.ranges):
            if self._unused[place] > 0:
                return next(
                    address
                    for address in each.probe(name)
                    if address not in self._holdings and address not in self._taken
                )
        return None

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
            f"no virtual address left for it: pool {self._rules.pool} has {self._rules.pool.size}, "
            f"{len(self._owners)} leased, {resting} in quarantine; enlarge dnsd.pool or remove services"
        )

    def _grant(
        self,
        kind: Kind,
        name: ServiceName,
        ports: tuple[Port, ...],
        address: IPv4Address,
        *further: TxnOp,
        pinned: bool | None = None,
        why: str = "",
    ) -> None:
        """Write both records anew, under an epoch above all that either has known.

        Without `pinned` the mark stays as it is.
        """
        lease, holding = self._leases.get(name), self._holdings.get(address)
        epoch = self._next_epoch(lease, holding)
        self._count_as_used(address)
        self._taken[address] = name
        if pinned is None:
            pinned = holding is not None and holding.record.service == name and holding.record.pinned
        held = Holding(service=name, epoch=epoch, state="leased", pinned=pinned, leased_at=self._now)
        self._add(
            kind,
            name,
            address,
            KvSet(service_key(name), to_json(Lease(address, epoch, ports)), lease.index if lease else 0),
            KvSet(address_key(address), to_json(held), holding.index if holding else 0),
            *further,
            why=why,
        )

    def _next_epoch(self, lease: Stored[Lease] | None, holding: Stored[Holding] | None) -> int:
        """Return the time in milliseconds, or more: above both records', and above what a lost KV had.

        Source: design.md 4. What was lost matters only when the clock has gone back as well.
        """
        clock = int(self._now * 1000)
        lost = self._view.epoch_floor
        epoch = max(
            clock if clock > lost else lost + 1,
            lease.record.epoch + 1 if lease else 0,
            holding.record.epoch + 1 if holding else 0,
        )
        self._highest_epoch = max(self._highest_epoch, epoch)
        return epoch

    def _count_as_used(self, address: IPv4Address) -> None:
        if self._unused is None or address in self._taken or address in self._holdings:
            return
        for place, each in enumerate(self._rules.pool.ranges):
            self._unused[place] -= address in each

    # What to tell

    def _report_outsiders(self) -> None:
        """Name the leases outside the pool: they stay until somebody moves them."""
        pool = self._rules.pool
        outside = [address for address in self._owners if address not in pool]
        for address in sorted(outside):
            name = self._owners[address]
            if name not in self._settled:
                what = f"{address} is outside the pool ({pool}) or reserved; it is kept until `ztna leases move {name}`"
                self._problems.append(Problem(name, "outside_pool", what))
        if self._empty_catalog:
            what = (
                f"Consul's catalog lists no service at all, while {len(self._leases)} have leases: they are kept "
                f"for {EMPTY_CATALOG_SECONDS / 3600:g} hours; `ztna leases release` gives one up at once"
            )
            self._problems.append(Problem("every service", "catalog_empty", what))

    def _pool_use(self) -> PoolUse:
        pool = self._rules.pool
        resting = sum(
            1
            for address, stored in self._holdings.items()
            if address not in self._taken
            and address in pool
            and self._now - _rests_since(stored.record) < self._rules.quarantine_s
        )
        return PoolUse(pool.size, sum(1 for address in self._taken if address in pool), resting)

    def _add(
        self,
        kind: Kind,
        service: str,
        address: IPv4Address | None,
        *operations: TxnOp,
        why: str = "",
    ) -> None:
        self._changes.append(Change(kind, service, address, operations, why))


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


def _highest_epoch(table: Table) -> int:
    leased = (stored.record.epoch for stored in table.leases.values())
    return max(chain(leased, (stored.record.epoch for stored in table.holdings.values())), default=0)


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


def _moment(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
