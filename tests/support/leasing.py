"""A KV that carries out the keeper's transactions as Consul would: whole or not at all."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from ipaddress import IPv4Address

from dnsd.keeper import CatalogRead, Plan, Pool, Rules, View, plan, transactions
from dnsd.plans import Transaction
from dnsd.services import Service
from ztna.catalog import (
    TXN_OPERATIONS_MAX,
    KvCheckIndex,
    KvCheckNotExists,
    KvCheckSession,
    KvDeleteCas,
    KvPair,
    KvSet,
    TxnOp,
)
from ztna.jsontypes import to_json
from ztna.leases import Table, Wish, WishAnswer, WishKind, read_table, wish_key
from ztna.names import ServiceName


class FakeKv:
    """Pairs, an index that only rises, and the session that holds the keeper's lock."""

    def __init__(self, holder: str = "me") -> None:
        self.pairs: dict[str, KvPair] = {}
        self.index = 0
        self.holder = holder

    @property
    def table(self) -> Table:
        """The lease table in it."""
        return read_table(self.pairs)

    def put(self, key: str, value: bytes) -> None:
        """Write, as anybody with a token may."""
        self.index += 1
        self.pairs[key] = KvPair(key=key, value=value, modify_index=self.index)

    def carry_out(self, transaction: Transaction) -> bool:
        """Carry out all or none; False when any operation fails."""
        operations = transaction.operations
        assert len(operations) <= TXN_OPERATIONS_MAX
        if not all(map(self._holds, operations)):
            return False
        for operation in operations:
            if isinstance(operation, KvSet):
                self.put(operation.key, operation.value)
            elif isinstance(operation, KvDeleteCas):
                self.index += 1
                del self.pairs[operation.key]
        return True

    def _holds(self, operation: TxnOp) -> bool:
        pair = self.pairs.get(operation.key)
        match operation:
            case KvSet(cas=None):
                return True
            case KvSet(cas=0) | KvCheckNotExists():
                return pair is None
            case KvSet(cas=index) | KvDeleteCas(index=index) | KvCheckIndex(index=index):
                return pair is not None and pair.modify_index == index
            case KvCheckSession(session=session):
                return session == self.holder
        raise AssertionError(operation)


class Lab:
    """A keeper over a FakeKv: hand it catalogs, and it does what the plans say."""

    def __init__(self, pool: Pool, *, grace_s: float = 300.0, quarantine_s: float = 3600.0) -> None:
        self.kv = FakeKv()
        self.rules = Rules(pool, grace_s, quarantine_s)
        self.gone_since: Mapping[str, float] = {}
        self.epoch_floor = 0

    def wish(self, service: str, kind: WishKind, ip: str | None = None, *, force: bool = False) -> None:
        """Ask the keeper for a change, as `ztna leases` does."""
        wanted = Wish(kind, "w1", IPv4Address(ip) if ip else None, force)
        self.kv.put(wish_key(ServiceName(service)), to_json(wanted))

    def answer(self, service: str) -> WishAnswer:
        """What the keeper answered."""
        answer = self.kv.table.wishes[ServiceName(service)].record.answer
        assert answer is not None
        return answer

    def plan(self, services: Mapping[str, Service], now: float, *, read_at: float | None = None) -> Plan:
        """Plan from what is in KV; with `read_at`, after a consistent read of the catalog at that time."""
        read = None if read_at is None else CatalogRead(frozenset(services), read_at)
        view = View(
            services=services,
            table=self.kv.table,
            gone_since=self.gone_since,
            catalog_read=read,
            epoch_floor=self.epoch_floor,
        )
        return plan(view, self.rules, now)

    def keep(self, services: Mapping[str, Service], now: float) -> Plan:
        """Plan with a fresh read and carry everything out."""
        decided = self.plan(services, now, read_at=now)
        self.gone_since = decided.gone_since
        self.epoch_floor = decided.epoch_floor
        for transaction in transactions(decided.changes, "me"):
            assert self.kv.carry_out(transaction), "a plan must fit the table it was made from"
        return decided

    def address(self, service: str) -> str | None:
        """The address a service has now."""
        found = {name: stored.record for name, stored in self.kv.table.leases.items()}
        return str(found[service].ip) if service in found else None  # type: ignore[index]


def kinds(decided: Plan) -> Iterable[str]:
    """The changes of a plan as `kind service address`."""
    return [f"{change.kind} {change.service} {change.address}" for change in decided.changes]
