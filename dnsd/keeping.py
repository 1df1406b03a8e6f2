"""Being the keeper: stand for election, read the table, carry out plans, step down.

What to change is dnsd.keeper's to decide, and when to stand is dnsd.election's; this does it. Killed or
paused anywhere, it leaves a table that the next keeper goes on from: each change is one transaction, and each
transaction fails once the lock is lost.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import time
from collections.abc import Callable, Collection, Mapping, Sequence

from dnsd.election import BEAT_SECONDS, LOOK_SECONDS, Rival, Step
from dnsd.keeper import plan
from dnsd.plans import CatalogRead, Change, Plan, PoolUse, Problem, Rules, Transaction, View, transactions
from dnsd.services import Service, describe_all
from ztna.catalog import (
    MESH_TAG,
    CatalogSnapshot,
    KvCheckSession,
    KvDeleteCas,
    KvPair,
    KvSet,
    KvSnapshot,
)
from ztna.consul.client import ConsulClient
from ztna.consul.watch import CatalogWatch, KvWatch
from ztna.errors import ConsulError, ConsulUnavailable, LeaseConflict, ZtnaError
from ztna.jsontypes import to_json
from ztna.leases import (
    KEEPER_KEY,
    SCHEMA_KEY,
    SCHEMA_VERSION,
    SERVICE_PREFIX,
    VIP_PREFIX,
    WISH_PREFIX,
    Table,
    amended,
    read_table,
    wish_key,
)
from ztna.telemetry import KEEPER, LEASE_CHANGES, logger

TRANSACTIONS_AT_ONCE = 8
LEASE_CAS_ATTEMPTS = 5
"""Plans in a row that may meet a table changed by somebody else, before the keeper steps down."""
REREAD_SECONDS = 60.0
"""How often the keeper compares what it believes with what is in KV."""
RETRY_SECONDS = 1.0
STEP_DOWN_SECONDS = 2.0

_log = logger(__name__)


class Deposed(Exception):
    """The keeper's lock is somebody else's, or nobody's, now."""


class _Conflict(Exception):
    """A transaction met a record that was changed by somebody else."""


class Keeping:
    """One dnsd's candidacy, and its work while it is elected."""

    def __init__(
        self,
        client: ConsulClient,
        catalog: CatalogWatch,
        rules: Rules,
        *,
        session_ttl_s: float,
        report: Callable[[tuple[Problem, ...]], None],
    ) -> None:
        """`catalog` is run by the caller; `report` hears of the services that stay without, and of none."""
        self.client = client
        self.catalog = catalog
        self.rules = rules
        self._session_ttl_s = session_ttl_s
        self._leases: KvWatch | None = None
        self.work = asyncio.Event()
        self._services_seen: object = None
        self._leases_before = KvSnapshot()
        self._wishes_before: Mapping[str, KvPair] = {}
        self.epoch_floor = 0
        self._report = report
        self._name = f"{socket.gethostname()}:{os.getpid()}"
        self._beats = 0
        self.session: str | None = None
        """The session that holds the lock, None while somebody else is the keeper."""
        self.trouble: str | None = None
        """Why this one could not be elected, or had to stop, the last time; None while it works."""
        self.pool: PoolUse | None = None
        """How full the pool is; None while somebody else is the keeper."""
        self.table = Table()
        """Who has which address, as of the last plan; empty while somebody else is the keeper."""
        catalog.subscribe(self._see_catalog)

    def follow(self, leases: KvWatch) -> None:
        """Notice from a watch of SERVICE_PREFIX, which the caller runs, when records vanish.

        Without it the keeper meets that at its next reading of the whole table.
        """
        self._leases = leases
        leases.subscribe(self._see_leases)

    def change_rules(self, rules: Rules) -> None:
        """Plan by other rules from now on."""
        self.rules = rules
        self.work.set()

    def hear(self, decided: Plan) -> None:
        """Remember and pass on what a plan said that was carried out."""
        self.epoch_floor = decided.epoch_floor
        self.pool = decided.pool
        self._report(decided.problems)

    @property
    def latest_leases(self) -> KvSnapshot | None:
        """What the watch of the leases shows, if there is one."""
        return self._leases.latest if self._leases is not None else None

    def _see_leases(self, snapshot: KvSnapshot) -> None:
        # Growth is our own doing; only what looks like a loss is worth a look (each costs a whole planning).
        before, self._leases_before = self._leases_before, snapshot
        if len(snapshot.pairs) < len(before.pairs) or snapshot.index < before.index:
            self.work.set()

    def _see_wishes(self, snapshot: KvSnapshot) -> None:
        # While there is no wish, Consul answers this query at every change of any key, ours too.
        if snapshot.pairs is not self._wishes_before:
            self._wishes_before = snapshot.pairs
            self.work.set()

    def _see_catalog(self, snapshot: CatalogSnapshot) -> None:
        # A snapshot that only confirms the services keeps the very same mapping.
        if snapshot.services is not self._services_seen:
            self._services_seen = snapshot.services
            self.work.set()

    async def run(self) -> None:
        """Stand for election and keep the leases when elected, until cancelled; then step down at once."""
        while True:
            try:
                session = self.session = await self._elected()
                _log.info("keeper_elected", session=session)
                KEEPER.set(1)
                self.trouble = None
                async with asyncio.TaskGroup() as tasks:
                    tasks.create_task(self._beat(session), name="keeper-beat")
                    tasks.create_task(self._keep(session), name="keeper-table")
            except* Deposed as group:
                _log.warning("keeper_deposed", session=self.session, error=_first(group))
            except* (ConsulError, LeaseConflict) as group:
                self.trouble = str(_first(group))
                _log.warning("keeper_stopped", session=self.session, error=_first(group))
            finally:
                KEEPER.set(0)
                self._report(())
                self.pool, self.table = None, Table()
                await self._step_down()
            await asyncio.sleep(RETRY_SECONDS)

    async def _elected(self) -> str:
        """Return the session that holds the lock, once that is ours."""
        rival = Rival()
        while True:
            try:
                pair = await self.client.kv_get(KEEPER_KEY, consistent=True)
                step = rival.look(pair, time.monotonic())
                if step is Step.ACQUIRE:
                    session = await self._acquire()
                    if session is not None:
                        return session
                elif step is Step.UNSEAT and pair is not None and pair.session is not None:
                    _log.warning("keeper_unseated", session=pair.session, was=pair.value.decode("latin-1"))
                    await self.client.session_destroy(pair.session)
                    continue
            except ConsulUnavailable:
                rival.lose_sight()
            await asyncio.sleep(LOOK_SECONDS)

    async def _acquire(self) -> str | None:
        # No lock-delay: it protects what cannot check a session, and every transaction of ours does.
        session = await self.client.session_create(
            "ztna-keeper", ttl_s=self._session_ttl_s, behavior="release", lock_delay_s=0.0
        )
        if await self._write_beat(session):
            return session
        await self.client.session_destroy(session)
        return None

    async def _beat(self, session: str) -> None:
        """Show that the holder is alive, to Consul and to the rivals, until the lock is lost."""
        while True:
            await asyncio.sleep(BEAT_SECONDS)
            try:
                if not await self.client.session_renew(session):
                    raise Deposed("Consul has ended the session")
                if not await self._write_beat(session):
                    raise Deposed("another session holds the lock")
            except ConsulUnavailable as error:
                # Nobody else can be elected meanwhile either; the lock may well still be ours after it.
                _log.warning("keeper_beat_failed", error=error)

    async def _write_beat(self, session: str) -> bool:
        self._beats += 1
        value = to_json({"keeper": self._name, "beats": self._beats})
        return await self.client.kv_put(KEEPER_KEY, value, acquire=session)

    async def _keep(self, session: str) -> None:
        """Keep the table right for as long as the lock is ours."""
        await check_schema(self.client, write=True)
        async with asyncio.TaskGroup() as tasks:
            wishes = KvWatch(self.client, WISH_PREFIX)
            wishes.subscribe(self._see_wishes)
            tasks.create_task(wishes.run(), name="keeper-wishes")
            await self._keep_table(session, wishes)

    async def _keep_table(self, session: str, wishes: KvWatch) -> None:
        conflicts = 0
        while True:
            table = _TableKeeper(self, session, wishes)
            try:
                await table.run()
            except _Conflict as error:
                # In a row means: without a whole plan, or anything of one, that could be carried out in between.
                conflicts = 1 if table.has_succeeded else conflicts + 1
                _log.warning("lease_conflict", error=error, attempt=conflicts)
                if conflicts >= LEASE_CAS_ATTEMPTS:
                    raise LeaseConflict(f"somebody else keeps changing the leases: {error}") from None
            except ConsulUnavailable as error:
                _log.warning("keeper_waits_for_consul", error=error)
                await asyncio.sleep(RETRY_SECONDS)

    async def _step_down(self) -> None:
        session, self.session = self.session, None
        if session is None:
            return
        try:
            async with asyncio.timeout(STEP_DOWN_SECONDS):
                await self.client.session_destroy(session)
        except (ConsulError, TimeoutError) as error:
            # The session ends by itself, only later.
            _log.warning("keeper_session_left", session=session, error=str(error) or type(error).__name__)


class _TableKeeper:
    """The table as the keeper believes it to be, from one complete read on."""

    def __init__(self, keeping: Keeping, session: str, wishes: KvWatch) -> None:
        self._keeping = keeping
        self._client = keeping.client
        self._session = session
        self._wishes = wishes
        self._wishes_seen: KvSnapshot | None = None
        self._leases_seen: KvSnapshot | None = None
        self._pairs: dict[str, KvPair] = {}
        self._table = Table()
        self._services: Mapping[str, Service] = {}
        self._gone_since: Mapping[str, float] = {}
        self._catalog_read: CatalogRead | None = None
        self.has_succeeded = False

    async def run(self) -> None:
        """Plan and carry out, each time something changes or is due, until something fails."""
        keeping = self._keeping
        while True:
            await self._read_table()
            reread_at = time.monotonic() + REREAD_SECONDS
            while time.monotonic() < reread_at:
                keeping.work.clear()
                snapshot = await keeping.catalog.changed()
                self._services = describe_all(snapshot.services, self._services)
                self._see_wishes()
                if self._misses_records():
                    _log.warning("lease_records_lost", leases=len(self._table.leases))
                    # A Consul that lost them may count anew: the same index need not be the same record.
                    self._table = Table()
                    break
                decided = self._plan()
                if decided.wants_catalog_read:
                    self._catalog_read = await self._read_catalog()
                    decided = self._plan()
                await self._carry_out(decided.changes)
                self.has_succeeded = True
                keeping.table = self._table
                keeping.hear(decided)
                await self._pause(decided, reread_at)

    async def _pause(self, decided: Plan, reread_at: float) -> None:
        """Wait until there is work, but not past what is due next."""
        wait_s = reread_at - time.monotonic()
        if decided.due_at is not None:
            wait_s = min(wait_s, decided.due_at - time.time())
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(max(0.0, wait_s)):
                await self._keeping.work.wait()

    def _plan(self) -> Plan:
        view = View(
            services=self._services,
            table=self._table,
            gone_since=self._gone_since,
            catalog_read=self._catalog_read,
            epoch_floor=self._keeping.epoch_floor,
        )
        decided = plan(view, self._keeping.rules, time.time())
        self._gone_since = decided.gone_since
        return decided

    def _see_wishes(self) -> None:
        """Take over the wishes that the watch shows, unless it has not yet seen what we wrote since."""
        shown = self._wishes.latest
        if shown is None or shown is self._wishes_seen:
            return
        self._wishes_seen = shown
        gone = [
            key
            for key in (*map(wish_key, self._table.wishes), *self._table.unreadable)
            if key.startswith(WISH_PREFIX)
            and key not in shown.pairs
            and self._pairs[key].modify_index <= shown.index
        ]
        newer = {
            key: pair
            for key, pair in shown.pairs.items()
            if key not in self._pairs or self._pairs[key].modify_index < pair.modify_index
        }
        self._note(newer, gone)

    def _misses_records(self) -> bool:
        """Whether the watch of the leases shows that KV is not as we left it, so that it must be read again."""
        shown, before = self._keeping.latest_leases, self._leases_seen
        if shown is None or shown is before:
            return False
        self._leases_seen = shown
        went_back = before is not None and shown.index < before.index
        for key, pair in self._pairs.items():
            if key.startswith(SERVICE_PREFIX):
                there = shown.pairs.get(key)
                if there is None:
                    if went_back or pair.modify_index <= shown.index:
                        return True
                elif there.modify_index > pair.modify_index:
                    return True
                elif went_back and there.modify_index < pair.modify_index:
                    # Restored from a backup. (Or the watch is only late again: reading does no harm.)
                    return True
        return False

    async def _read_table(self) -> None:
        pairs = await self._client.kv_list(VIP_PREFIX, consistent=True)
        self._pairs = {pair.key: pair for pair in pairs}
        self._table = read_table(self._pairs, self._table)

    async def _read_catalog(self) -> CatalogRead:
        at = time.time()
        names = await self._client.services(tag=MESH_TAG, consistent=True)
        return CatalogRead(frozenset(names), at)

    async def _carry_out(self, changes: Sequence[Change]) -> None:
        if not changes:
            return
        waiting = iter(transactions(changes, self._session))

        async def carry_out_next() -> None:
            # All share the one iterator, so each transaction is sent once.
            for transaction in waiting:
                await self._carry_out_one(transaction)

        failures: list[Exception] = []
        try:
            async with asyncio.TaskGroup() as tasks:
                for _ in range(TRANSACTIONS_AT_ONCE):
                    tasks.create_task(carry_out_next(), name="keeper-transaction")
        except* (ZtnaError, Deposed, _Conflict) as group:
            failures.extend(group.exceptions)
        if failures:
            # Losing the lock explains all others.
            raise next((error for error in failures if isinstance(error, Deposed)), failures[0])

    async def _carry_out_one(self, transaction: Transaction) -> None:
        outcome = await self._client.txn(transaction.operations)
        for failure in outcome.failures:
            operation = transaction.operations[failure.operation]
            if isinstance(operation, KvCheckSession):
                raise Deposed(failure.what)
            raise _Conflict(f"{operation.key}: {failure.what}")
        indexes = {pair.key: pair.modify_index for pair in outcome.pairs}
        written: dict[str, KvPair] = {}
        deleted: set[str] = set()
        for operation in transaction.operations:
            if isinstance(operation, KvSet):
                key, value = operation.key, operation.value
                written[key] = KvPair(key=key, value=value, modify_index=indexes[key])
            elif isinstance(operation, KvDeleteCas):
                deleted.add(operation.key)
        self._note(written, deleted)
        self.has_succeeded = True
        # Told here and not after all of them, of which there can be thousands: others have a turn in between.
        for change in transaction.changes:
            LEASE_CHANGES.labels(change.kind).inc()
            fields = {"service": change.service, "address": change.address, "why": change.why}
            _log.info(f"lease_{change.kind}", **{name: value for name, value in fields.items() if value})

    def _note(self, written: Mapping[str, KvPair], deleted: Collection[str]) -> None:
        """Believe that KV has these now."""
        for key in deleted:
            self._pairs.pop(key, None)
        self._pairs |= written
        self._table = amended(self._table, written, deleted)


async def check_schema(client: ConsulClient, *, write: bool = False) -> None:
    """Refuse a KV that a newer version has written; with `write`, note our version where there is none.

    Raises ZtnaError. Source: design.md 4.
    """
    pair = await client.kv_get(SCHEMA_KEY, consistent=True)
    if pair is None:
        if write:
            await client.kv_put(SCHEMA_KEY, str(SCHEMA_VERSION).encode(), cas=0)
        return
    text = pair.value.decode("latin-1").strip()
    if not text.isdigit() or int(text) > SCHEMA_VERSION:
        raise ZtnaError(
            f"KV {SCHEMA_KEY} is {text!r}: this version knows up to {SCHEMA_VERSION}; install a newer ztna-mesh"
        )


def _first(group: BaseExceptionGroup[BaseException]) -> BaseException:
    error = group.exceptions[0]
    return _first(error) if isinstance(error, BaseExceptionGroup) else error
