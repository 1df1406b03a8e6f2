"""The lease table as the keeper's planning will leave it: what is taken, what rests, what is written.

Pure. Keeps the books only: what to grant, move or release is dnsd.keeper's to decide.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from ipaddress import AddressValueError, IPv4Address
from itertools import chain

from dnsd.plans import Change, Kind, PoolUse, Rules, View
from ztna.catalog import KvDeleteCas, KvSet, TxnOp
from ztna.jsontypes import to_json
from ztna.leases import (
    ADDRESS_PREFIX,
    Holding,
    Lease,
    Port,
    Stored,
    Table,
    address_key,
    service_key,
)
from ztna.names import ServiceName


class Book:
    """One planning: the table as it will be, and the changes that lead there.

    Whatever is granted here is nobody else's, and each record is written under its index.
    """

    def __init__(self, view: View, rules: Rules, now: float) -> None:
        self._view = view
        self._rules = rules
        self._now = now
        self._leases = view.table.leases
        self._holdings = view.table.holdings
        self._owners = _owners(view.table)
        self._former_homes = _former_homes(view.table, self._owners)
        self._changes: list[Change] = []
        self._due_at: float | None = None
        self._highest_epoch = max(view.epoch_floor, _highest_epoch(view.table))
        self._unused: list[int] | None = None
        """By range of the pool: how many addresses nobody has or had; None until asked for."""
        # What no other service may take, and who has it: held now, or taken in this planning. "" when that
        # cannot be read.
        self._taken: dict[IPv4Address, str] = {
            **dict.fromkeys(_unreadable_addresses(view.table), ""),
            **self._owners,
        }

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

    def _obstacle(self, name: str, address: IPv4Address, *, force: bool = False) -> str | None:
        """Say why the service cannot have an address, None when it can."""
        if address not in self._rules.pool:
            return f"{address} is outside the pool ({self._rules.pool}) or reserved"
        if address in self._taken:
            holder = self._taken[address]
            return f"{address} is held by {holder}" if holder else f"the record of {address} cannot be read"
        holding = self._holdings.get(address)
        if holding is None or holding.record.service == name:
            return None
        if holding.record.state == "leased":
            # No lease points at it: it is given back or put to rest first.
            return f"{address} is held by {holding.record.service}"
        if force:
            return None
        rested_at = _rests_since(holding.record) + self._rules.quarantine_s
        if self._now >= rested_at:
            return None
        self._look_again_at(rested_at)
        return f"{address} rests for {holding.record.service} until {_moment(rested_at)}"

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

    def _rest(self, address: IPv4Address, holding: Stored[Holding] | None, name: str, epoch: int) -> KvSet:
        resting = Holding(
            service=name,
            epoch=max(epoch, holding.record.epoch if holding else 0),
            state="quarantined",
            leased_at=holding.record.leased_at if holding else 0.0,
            released_at=self._now,
        )
        return KvSet(address_key(address), to_json(resting), holding.index if holding else 0)

    def _exhausted(self) -> str:
        resting = sum(1 for stored in self._holdings.values() if stored.record.state == "quarantined")
        return (
            f"no virtual address left for it: pool {self._rules.pool} has {self._rules.pool.size}, "
            f"{len(self._owners)} leased, {resting} in quarantine; enlarge dnsd.pool or remove services"
        )

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

    def _look_again_when_one_has_rested(self) -> None:
        for address, stored in self._holdings.items():
            if address not in self._taken and address in self._rules.pool:
                self._look_again_at(_rests_since(stored.record) + self._rules.quarantine_s)

    def _look_again_at(self, due_at: float) -> None:
        self._due_at = due_at if self._due_at is None else min(due_at, self._due_at)

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


def agree(name: ServiceName, lease: Lease, holding: Holding) -> bool:
    """Say whether a service's lease and the record of its address tell the same."""
    return (holding.service, holding.epoch, holding.state) == (name, lease.epoch, "leased")


def _rests_since(holding: Holding) -> float:
    return holding.leased_at if holding.released_at is None else holding.released_at


def _moment(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
