"""Two keepers over a Consul's KV, killed and paused at any write: no history gives one address to two.

The catalog and the time are the test's; planning is the keeper's own, and sessions, locks, transactions and
what is lost are Consul's. Elections by silence, which take a real clock, are tests/contract's.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Mapping, Sequence
from ipaddress import IPv4Address, IPv4Network
from typing import Any, TypeVar

import msgspec
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from dnsd.keeper import plan
from dnsd.plans import CatalogRead, Plan, Rules, View, transactions
from dnsd.pool import Pool
from dnsd.services import Service, describe
from tests.support.consul import ConsulUnderTest
from tests.support.dns import instance
from ztna.catalog import KvCheckSession, KvDeleteCas, KvPair, KvSet, TxnOp
from ztna.config import ConsulConfig
from ztna.consul.client import ConsulClient
from ztna.jsontypes import to_json
from ztna.leases import (
    ADDRESS_PREFIX,
    KEEPER_KEY,
    SERVICE_PREFIX,
    VIP_PREFIX,
    WISH_PREFIX,
    Table,
    Wish,
    WishKind,
    address_key,
    audit,
    read_table,
    service_key,
    wish_key,
)
from ztna.names import ServiceName

GRACE_SECONDS, QUARANTINE_SECONDS = 10.0, 30.0
WRITE_SECONDS = 0.01
"""Nothing happens twice within a millisecond: Consul needs longer for any write."""
NETWORK = IPv4Network("127.100.0.0/29")
SERVICES = st.sampled_from([f"s{number}" for number in range(8)])
PINS = st.sampled_from([None, *map(str, NETWORK.hosts())])
KEEPERS = st.sampled_from([0, 1])
EXAMPLES = {"embedded": 60, "oldest": 15, "newest": 15}

T = TypeVar("T")


def any_keeper(condition: Callable[[Keeper], object]) -> Callable[[KeepersOnConsul], bool]:
    """Let a rule run only when it is one for some keeper: chance is not to be spent on nothing."""
    return lambda machine: any(map(condition, machine.keepers))


def has_session(keeper: Keeper) -> bool:
    return keeper.session is not None


def has_pending(keeper: Keeper) -> bool:
    return bool(keeper.pending)


def may_plan(keeper: Keeper) -> bool:
    return has_session(keeper) and not has_pending(keeper)


class Keeper:
    """What one keeper believes: its session, the table, and what of its plan is not written yet."""

    def __init__(self) -> None:
        self.session: str | None = None
        self.pairs: dict[str, KvPair] = {}
        self.gone_since: Mapping[str, float] = {}
        self.epoch_floor = 0
        self.pending: list[Sequence[TxnOp]] = []

    def forget(self) -> None:
        """Know nothing, as a process that has just started."""
        self.__init__()  # type: ignore[misc]


class KeepersOnConsul(RuleBasedStateMachine):
    """Services come, go and pin; keepers are elected, plan, write one by one, die, sleep on; KV is lost or restored."""

    def __init__(self, call: Callable[[Coroutine[Any, Any, Any]], Any], client: ConsulClient) -> None:
        super().__init__()
        self._call = call
        self._client = client
        self.rules_of_leases = Rules(Pool(NETWORK), GRACE_SECONDS, QUARANTINE_SECONDS)
        self.keepers = (Keeper(), Keeper())
        self.present: dict[str, tuple[int, str | None]] = {}
        self.last_seen: dict[str, float] = {}
        self.now = 1_700_000_000.0
        # What agents may remember: by address and by service the newest epoch, and whose or where it was.
        self.owners: dict[IPv4Address, tuple[int, str]] = {}
        self.homes: dict[str, tuple[int, IPv4Address]] = {}
        self.resting: dict[IPv4Address, tuple[str, float]] = {}
        # Which service an address ever meant under an epoch, restored tables or not.
        self.meant: dict[tuple[IPv4Address, int], str] = {}
        self.backup: tuple[KvPair, ...] = ()
        self.sessions: list[str] = []

    def call(self, coroutine: Coroutine[Any, Any, T]) -> T:
        self.now += WRITE_SECONDS
        return self._call(coroutine)  # type: ignore[no-any-return]

    @initialize(services=st.sets(SERVICES, max_size=6))
    def start(self, services: set[str]) -> None:
        self.call(self._client.kv_delete("ztna/", recurse=True))
        self.present.update(dict.fromkeys(services, (80, None)))
        self.is_elected(0)

    def _one(self, number: int, condition: Callable[[Keeper], object]) -> Keeper:
        """The keeper of that number when the condition is true of it, else the other."""
        return self.keepers[number if condition(self.keepers[number]) else 1 - number]

    # The catalog and the time

    @rule(service=SERVICES, port=st.sampled_from([80, 81]), pin=PINS)
    def registers(self, service: str, port: int, pin: str | None) -> None:
        self.present[service] = (port, pin)

    @rule(service=SERVICES)
    def vanishes(self, service: str) -> None:
        if self.present.pop(service, None):
            self.last_seen[service] = self.now

    @rule(seconds=st.sampled_from([0.5, 6.0, GRACE_SECONDS, QUARANTINE_SECONDS]))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds

    @rule(service=SERVICES, kind=st.sampled_from(["pin", "unpin", "release", "move"]), ip=PINS)
    def is_wished(self, service: str, kind: WishKind, ip: str | None) -> None:
        """An operator asks; nothing is forced, so nobody may get what another still rests on."""
        wish = Wish(kind, str(self.now), IPv4Address(ip) if ip else None, asked_at=self.now)
        self.call(self._client.kv_put(wish_key(ServiceName(service)), to_json(wish)))
        for keeper in self.keepers:
            if keeper.session is not None and not keeper.pending:
                self._read(keeper)

    # The keepers

    @precondition(any_keeper(lambda keeper: not has_session(keeper)))
    @rule(number=KEEPERS)
    def is_elected(self, number: int) -> None:
        """Unseat whoever holds the lock, alive or not, take it and read the table."""
        keeper = self._one(number, lambda keeper: not has_session(keeper))
        held = self.call(self._client.kv_get(KEEPER_KEY, consistent=True))
        if held is not None and held.session is not None:
            self.call(self._client.session_destroy(held.session))
        session = self.call(
            self._client.session_create("ztna-keeper", ttl_s=86_400, behavior="release", lock_delay_s=0.0)
        )
        self.sessions.append(session)
        assert self.call(self._client.kv_put(KEEPER_KEY, b"{}", acquire=session))
        keeper.session = session
        self._read(keeper)

    @precondition(any_keeper(may_plan))
    @rule(number=KEEPERS, at_once=st.booleans(), written=st.integers(0, 3))
    def plans(self, number: int, at_once: bool, written: int) -> None:
        """Plan from what it believes, in whole transactions or in one for each change, and write a few."""
        keeper = self._one(number, may_plan)
        decided = self._plan(keeper)
        changes = [decided.changes] if at_once else [(change,) for change in decided.changes]
        assert keeper.session is not None
        keeper.pending = [
            packed.operations for each in changes for packed in transactions(each, keeper.session)
        ]
        for _ in range(written):
            self._write_next(keeper)

    @precondition(any_keeper(has_pending))
    @rule(number=KEEPERS)
    def writes_the_next(self, number: int) -> None:
        self._write_next(self._one(number, has_pending))

    @precondition(any_keeper(may_plan))
    @rule(number=KEEPERS)
    def works(self, number: int) -> None:
        keeper = self._one(number, may_plan)
        assert keeper.session is not None
        keeper.pending = [
            each.operations for each in transactions(self._plan(keeper).changes, keeper.session)
        ]
        while keeper.pending:
            self._write_next(keeper)

    @precondition(any_keeper(has_session))
    @rule(number=KEEPERS, last_words_arrive=st.booleans())
    def dies(self, number: int, last_words_arrive: bool) -> None:
        """End between two writes, or with one on its way whose answer nobody hears."""
        keeper = self._one(number, has_session)
        if keeper.pending and last_words_arrive:
            self.call(self._client.txn(keeper.pending[0]))
        keeper.forget()

    @precondition(any_keeper(has_pending))
    @rule(number=KEEPERS)
    def is_paused_past_its_session(self, number: int) -> None:
        """Consul ends its session; the keeper believes in it, and in its plan, until it next writes."""
        session = self._one(number, has_pending).session
        assert session is not None
        self.call(self._client.session_destroy(session))

    # What else happens to the table

    @rule()
    def the_kv_is_lost(self) -> None:
        self.call(self._client.kv_delete("ztna/", recurse=True))
        self.resting.clear()
        # A table that grows back must not say anything again under an epoch that it had.
        self.owners = {address: (epoch, "") for address, (epoch, _) in self.owners.items()}
        self.homes = {name: (epoch, NETWORK.network_address) for name, (epoch, _) in self.homes.items()}

    @rule()
    def is_backed_up(self) -> None:
        pairs = self.call(self._client.kv_list(VIP_PREFIX, consistent=True))
        self.backup = tuple(pair for pair in pairs if pair.key != KEEPER_KEY)

    @rule()
    def is_restored(self) -> None:
        """Let all records be those of the backup, at once; whoever keeps the leases goes on."""
        for prefix in (SERVICE_PREFIX, ADDRESS_PREFIX, WISH_PREFIX):
            self.call(self._client.kv_delete(prefix, recurse=True))
        for pair in self.backup:
            self.call(self._client.kv_put(pair.key, pair.value))
        self.resting.clear()
        self.owners = {address: (epoch, "") for address, (epoch, _) in self.owners.items()}
        self.homes = {name: (epoch, NETWORK.network_address) for name, (epoch, _) in self.homes.items()}
        # Whoever had these before is believed to have forgotten it, as a connector does; all else rises on.
        for name, stored in self.table().leases.items():
            self.owners[stored.record.ip] = (stored.record.epoch, name)
            self.homes[name] = (stored.record.epoch, stored.record.ip)

    @rule(service=SERVICES, half=st.sampled_from(["lease", "holding"]))
    def half_a_lease_is_lost(self, service: str, half: str) -> None:
        stored = self.table().leases.get(ServiceName(service))
        if stored is not None:
            address = stored.record.ip
            key = service_key(ServiceName(service)) if half == "lease" else address_key(address)
            self.call(self._client.kv_delete(key))

    # What holds at any time

    @invariant()
    def no_address_ever_means_two_services_under_one_epoch(self) -> None:
        leases = self.table().leases
        addresses = [stored.record.ip for stored in leases.values()]
        assert len(addresses) == len(set(addresses)), "one address, two owners"
        for name, stored in leases.items():
            lease = stored.record
            assert self.meant.setdefault((lease.ip, lease.epoch), name) == name
            epoch, owner = self.owners.get(lease.ip, (0, name))
            assert lease.epoch > epoch or (lease.epoch, name) == (epoch, owner)
            self.owners[lease.ip] = (lease.epoch, name)
            epoch, home = self.homes.get(name, (0, lease.ip))
            assert lease.epoch > epoch or (lease.epoch, lease.ip) == (epoch, home)
            self.homes[name] = (lease.epoch, lease.ip)

    @invariant()
    def nobody_takes_what_rests(self) -> None:
        table = self.table()
        owners = {stored.record.ip: name for name, stored in table.leases.items()}
        for address, (owner, until) in list(self.resting.items()):
            held = table.holdings.get(address)
            if held is None or address in owners:
                assert owners.get(address, owner) == owner or self.now >= until
                del self.resting[address]
        for address, held in table.holdings.items():
            if held.record.state == "quarantined" and held.record.released_at is not None:
                until = held.record.released_at + QUARANTINE_SECONDS
                self.resting[address] = (held.record.service, until)

    def teardown(self) -> None:
        """Whatever was left behind, the next keeper makes it whole."""
        for keeper in self.keepers:
            keeper.forget()
        self.is_elected(0)
        for _ in range(3):
            self.now += QUARANTINE_SECONDS
            self.works(0)
        table = self.table()
        assert audit(table) == ()
        assert self._plan(self.keepers[0]).changes == (), "a plan that was carried out leaves nothing to do"
        without = {problem.service for problem in self._plan(self.keepers[0]).problems}
        assert self.present.keys() - without <= table.leases.keys()
        for session in self.sessions:
            self.call(self._client.session_destroy(session))

    def table(self) -> Table:
        """The table as it is in Consul."""
        pairs = self._call(self._client.kv_list(VIP_PREFIX, consistent=True))
        return read_table({pair.key: pair for pair in pairs})

    def _read(self, keeper: Keeper) -> None:
        pairs = self.call(self._client.kv_list(VIP_PREFIX, consistent=True))
        keeper.pairs = {pair.key: pair for pair in pairs}

    def _plan(self, keeper: Keeper) -> Plan:
        view = View(
            services=self._services(),
            table=read_table(keeper.pairs),
            gone_since=keeper.gone_since,
            catalog_read=CatalogRead(frozenset(self.present), self.now),
            epoch_floor=keeper.epoch_floor,
        )
        decided = plan(view, self.rules_of_leases, self.now)
        keeper.gone_since, keeper.epoch_floor = decided.gone_since, decided.epoch_floor
        return decided

    def _services(self) -> Mapping[str, Service]:
        found: dict[str, Service] = {}
        for name, (port, pin) in self.present.items():
            made = instance(name, ports=f"tcp:{port}")
            if pin is not None:
                made = msgspec.structs.replace(made, meta={**made.meta, "ztna-virtual-ip": pin})
            found[name] = describe(name, (made,))
        return found

    def _write_next(self, keeper: Keeper) -> None:
        """Carry a transaction out; who has lost the lock changes nothing, and who met a change reads again."""
        if not keeper.pending:
            return
        operations = keeper.pending.pop(0)
        held = self._call(self._client.kv_get(KEEPER_KEY, consistent=True))
        outcome = self.call(self._client.txn(operations))
        if held is None or held.session != keeper.session:
            failed = [operations[failure.operation] for failure in outcome.failures]
            assert any(isinstance(operation, KvCheckSession) for operation in failed)
            keeper.forget()
        elif not outcome.ok:
            keeper.pending = []
            self._read(keeper)
        else:
            self._remember(keeper, operations, {pair.key: pair.modify_index for pair in outcome.pairs})

    @staticmethod
    def _remember(keeper: Keeper, operations: Sequence[TxnOp], indexes: Mapping[str, int]) -> None:
        for operation in operations:
            if isinstance(operation, KvSet):
                key, value = operation.key, operation.value
                keeper.pairs[key] = KvPair(key=key, value=value, modify_index=indexes[key])
            elif isinstance(operation, KvDeleteCas):
                keeper.pairs.pop(operation.key, None)


def test_keepers_that_die_and_sleep_at_every_write(own_consul: ConsulUnderTest) -> None:
    config: ConsulConfig = own_consul.config()
    with asyncio.Runner() as runner:
        client = runner.run(_opened(config))
        try:
            run_state_machine_as_test(
                lambda: KeepersOnConsul(runner.run, client),  # type: ignore[arg-type]
                settings=settings(
                    max_examples=EXAMPLES[own_consul.kind],
                    stateful_step_count=40,
                    deadline=None,
                    suppress_health_check=list(HealthCheck),
                ),
            )
        finally:
            runner.run(client.__aexit__(None, None, None))


async def _opened(config: ConsulConfig) -> ConsulClient:
    return await ConsulClient(config).__aenter__()
