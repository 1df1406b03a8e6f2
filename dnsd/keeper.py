"""What the elected keeper should change in the lease table, as transactions (design.md 2.7 and 4).

A plain function of the catalog, the table, the pool and the time. Pure: reading and writing Consul, and
being elected, are dnsd.daemon's and dnsd.election's.
"""

from __future__ import annotations

from collections.abc import Sequence
from ipaddress import IPv4Address

import msgspec

from dnsd.book import Book, agree
from dnsd.plans import CatalogRead as CatalogRead
from dnsd.plans import Kind, Plan, Problem, Rules, View
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
    SERVICE_PREFIX,
    Holding,
    Lease,
    Port,
    Stored,
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


class _Planner(Book):
    """Decides, service by service; the books are kept by Book."""

    def __init__(self, view: View, rules: Rules, now: float) -> None:
        super().__init__(view, rules, now)
        self._problems: list[Problem] = []
        self._gone_since: dict[str, float] = {}
        self._wants_catalog_read = False
        self._empty_catalog = False
        self._settled: set[str] = set()
        """Services whose one change a wish has made; the catalog's is for the next plan."""

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
            lease is not None and (holding is None or not agree(name, lease.record, holding.record))
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

    # Services in the catalog

    def _keep(self, service: Service) -> bool:
        """Leave a service where it is, mending its records; False when it has no address of its own."""
        name = ServiceName(service.name)
        stored = self._leases.get(name)
        if stored is None or self._owners[stored.record.ip] != name:
            return False
        lease, holding = stored.record, self._holdings.get(stored.record.ip)
        if holding is None or not agree(name, lease, holding.record):
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
            if is_owner and (holding is None or not agree(name, lease, holding.record)):
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
