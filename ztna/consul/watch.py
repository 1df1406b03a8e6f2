"""Watches: blocking queries that publish one immutable snapshot after another.

Two blocking queries follow a catalog of any size. A watch decides nothing about what it sees, and never gives
up: while Consul is away the last snapshot stays, its `confirmed_at` stands still, and `problem` says why.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from typing import Any, Generic, TypeVar

import msgspec

from ztna.catalog import (
    MESH_TAG,
    CatalogSnapshot,
    CheckSeen,
    ChecksSnapshot,
    Instance,
    KvPair,
    KvSnapshot,
)
from ztna.consul import shapes
from ztna.consul.client import ConsulClient, Read
from ztna.errors import ConsulError, ConsulUnavailable

WAIT_SECONDS = 20.0
"""How long Consul may hold a query; also how often an unchanged catalog is confirmed."""
COALESCE_SECONDS = 0.05
COALESCE_COST_FACTOR = 4.0
"""Pause between two reads of one query, so that a storm of changes is read in gulps: at least the seconds,
and this many times what digesting the last answer took."""
BACKOFF_SECONDS_MIN = 0.1
BACKOFF_SECONDS_MAX = 3.0
SERVICE_READS_AT_ONCE = 8
SWEEP_SECONDS_MIN = 0.5
SWEEP_COST_FACTOR = 10.0
"""Sweeps pause this many times their own duration: they never take more than a tenth of the time."""
SWEEP_SERVICES_AT_ONCE = 16
"""A sweep reads so many before what has changed meanwhile is read: that does not wait for the whole sweep."""

S = TypeVar("S", CatalogSnapshot, KvSnapshot, ChecksSnapshot)


class _Check(msgspec.Struct, frozen=True, rename="pascal"):
    """What a watch looks at in an entry of /v1/health/state/any."""

    node: str
    check_id: str = msgspec.field(name="CheckID")
    status: str
    service_id: str = msgspec.field(name="ServiceID")
    service_name: str
    modify_index: int


class _KvEntry(msgspec.Struct, frozen=True, rename="pascal"):
    key: str
    modify_index: int
    create_index: int
    lock_index: int
    flags: int
    value: bytes | None = None
    session: str = ""


class Watch(Generic[S]):
    """Something that is followed: `latest` is None until the first complete read.

    `run` is awaited by its owner's task group and ends only when it is cancelled. `problem` is what the last
    read failed with, None when it succeeded.
    """

    def __init__(self, client: ConsulClient) -> None:
        self._client = client
        self.latest: S | None = None
        self.problem: ConsulError | None = None
        self._published = asyncio.Event()
        self._callbacks: list[Callable[[S], None]] = []

    async def changed(self, after: S | None = None) -> S:
        """Return the latest snapshot as soon as it is another than `after`.

        One that differs only in `confirmed_at` keeps the very same mapping: compare that with `is`.
        """
        while self.latest is None or self.latest is after:
            await self._published.wait()
        return self.latest

    def subscribe(self, callback: Callable[[S], None]) -> None:
        """Call back with every snapshot from now on, in the event loop; it must not block."""
        self._callbacks.append(callback)

    def _publish(self, snapshot: S) -> None:
        self.latest = snapshot
        self._published.set()
        self._published = asyncio.Event()
        for callback in self._callbacks:
            callback(snapshot)

    async def _follow(
        self, path: str, params: Sequence[tuple[str, str]], shape: Any
    ) -> AsyncIterator[Read[Any]]:
        """Yield what a blocking query says, for ever; also when nothing changed within WAIT_SECONDS."""
        index, failures = 0, 0
        while True:
            asked_at = time.monotonic()
            try:
                found = await self._client.read(path, params, shape=shape, index=index, wait_s=WAIT_SECONDS)
                if not found.known_leader:
                    raise ConsulUnavailable(f"{path}: Consul has no leader")
            except ConsulError as error:
                self.problem = error
                await asyncio.sleep(_backoff(failures))
                # Start over without an index: the Consul that comes back may count from the beginning.
                index, failures = 0, failures + 1
                continue
            self.problem, failures = None, 0
            started = time.monotonic()
            index = next_index(index, found.index, is_early=started - asked_at < WAIT_SECONDS)
            yield found
            await asyncio.sleep(max(COALESCE_SECONDS, COALESCE_COST_FACTOR * (time.monotonic() - started)))


class KvWatch(Watch[KvSnapshot]):
    """Follow every pair under a prefix."""

    def __init__(self, client: ConsulClient, prefix: str) -> None:
        super().__init__(client)
        self._prefix = prefix

    async def run(self) -> None:
        """Follow until cancelled."""
        path = f"/v1/kv/{self._prefix}"
        async for found in self._follow(path, [("recurse", "1")], list[_KvEntry]):
            now = time.time()
            pairs: Mapping[str, KvPair] = {entry.key: _pair(entry) for entry in found.data or ()}
            if self.latest is not None and self.latest.pairs == pairs:
                pairs = self.latest.pairs
            self._publish(KvSnapshot(pairs=pairs, index=found.index, confirmed_at=now))


class _NodeCheck(msgspec.Struct, frozen=True, rename="pascal"):
    check_id: str = msgspec.field(name="CheckID")
    status: str
    output: str = ""


class NodeChecksWatch(Watch[ChecksSnapshot]):
    """Follow every check on one node."""

    def __init__(self, client: ConsulClient, node: str) -> None:
        super().__init__(client)
        self._node = node

    async def run(self) -> None:
        """Follow until cancelled."""
        async for found in self._follow(f"/v1/health/node/{self._node}", (), list[_NodeCheck]):
            checks = {
                each.check_id: CheckSeen(shapes.status(each.status), each.output) for each in found.data or ()
            }
            self._publish(ChecksSnapshot(checks=checks, index=found.index, confirmed_at=time.time()))


class CatalogWatch(Watch[CatalogSnapshot]):
    """Follow all instances of the services that carry a tag.

    One query blocks on every check, one on the list of services; what they show to have changed is read anew.
    An instance that was registered again with another port or Meta shows in neither, only in the index of the
    list: after each of its changes all services are read once more, at a bounded rate (a sweep).
    """

    def __init__(self, client: ConsulClient, tag: str = MESH_TAG) -> None:
        super().__init__(client)
        self._tag = tag
        self._tags_of: dict[str, frozenset[str]] = {}
        self._checks_of: dict[str, frozenset[_Check]] = {}
        self._node_checks: frozenset[_Check] = frozenset()
        self._instances: dict[str, tuple[Instance, ...]] = {}
        self._has_news = False
        self._dirty: set[str] = set()
        self._work = asyncio.Event()
        self._services_index = 0
        self._services_confirmed = 0.0
        self._checks_confirmed = 0.0
        self._sweep_wanted = False
        self._sweep_left: list[str] = []
        self._sweep_is_next = False
        self._sweep_cost_s = 0.0
        self._next_sweep = 0.0
        self._sweep_confirms = 0.0
        """What the sweep that is under way confirms once it is whole: 0, nothing, after a read that failed."""

    async def run(self) -> None:
        """Follow until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._follow_services(), name="watch-services")
            tasks.create_task(self._follow_checks(), name="watch-checks")
            tasks.create_task(self._read_what_changed(), name="watch-instances")

    async def _follow_services(self) -> None:
        async for found in self._follow("/v1/catalog/services", (), dict[str, frozenset[str]]):
            tagged = {name: tags for name, tags in found.data.items() if self._tag in tags}
            self._dirty |= {name for name, tags in tagged.items() if self._tags_of.get(name) != tags}
            self._dirty |= self._tags_of.keys() - tagged.keys()
            self._tags_of = tagged
            self._sweep_wanted |= self._services_index not in (0, found.index)
            self._services_index = found.index
            self._services_confirmed = time.time()
            self._work.set()

    async def _follow_checks(self) -> None:
        async for found in self._follow("/v1/health/state/any", (), list[_Check]):
            of_nodes, of_services = _sorted_checks(found.data)
            self._dirty |= {
                name
                for name in self._checks_of.keys() | of_services.keys()
                if self._checks_of.get(name) != of_services.get(name)
            }
            self._dirty |= self._names_on({check.node for check in self._node_checks ^ of_nodes})
            self._checks_of, self._node_checks = of_services, of_nodes
            self._checks_confirmed = time.time()
            self._work.set()

    def _names_on(self, nodes: set[str]) -> set[str]:
        if not nodes:
            return set()
        return {name for name, found in self._instances.items() if any(each.node in nodes for each in found)}

    async def _read_what_changed(self) -> None:
        failures = 0
        while True:
            await self._wait_for_work()
            confirmed = min(self._services_confirmed, self._checks_confirmed)
            if confirmed == 0.0:
                continue
            names, swept = self._take_work(confirmed)
            started = time.monotonic()
            try:
                await self._read_services(names)
            except ConsulError as error:
                self.problem = error
                self._dirty |= names
                self._sweep_confirms = 0.0
                self._work.set()
                await asyncio.sleep(_backoff(failures))
                failures += 1
                continue
            failures = 0
            if swept:
                now = time.monotonic()
                self._sweep_cost_s += now - started
                self._next_sweep = now + max(SWEEP_SECONDS_MIN, SWEEP_COST_FACTOR * self._sweep_cost_s)
            self._publish_instances(confirmed, is_whole=swept and not self._sweep_left)

    async def _wait_for_work(self) -> None:
        """Return when a query said something, or when a sweep goes on or is wanted and may begin."""
        if not self._sweep_left:
            try:
                until_sweep = max(0.0, self._next_sweep - time.monotonic())
                async with asyncio.timeout(until_sweep if self._sweep_wanted and self.latest else None):
                    await self._work.wait()
            except TimeoutError:
                return
        self._work.clear()

    def _take_work(self, confirmed: float) -> tuple[set[str], bool]:
        """Return the names to read now, and whether they are a sweep's.

        What is known to have changed does not wait for a sweep, and the two take turns while there is much of both.
        """
        if self._sweep_wanted and not self._sweep_left and time.monotonic() >= self._next_sweep:
            self._sweep_wanted, self._sweep_cost_s = False, 0.0
            self._sweep_left = sorted(self._tags_of.keys() | self._instances.keys())
            self._sweep_confirms = confirmed
        if self._sweep_left and (self._sweep_is_next or not self._dirty):
            names = set(self._sweep_left[:SWEEP_SERVICES_AT_ONCE])
            del self._sweep_left[:SWEEP_SERVICES_AT_ONCE]
            self._sweep_is_next = False
            if self._dirty:
                # Nothing else would end the wait for them, should this have been the sweep's end.
                self._work.set()
            return names, True
        names, self._dirty = self._dirty, set()
        self._sweep_is_next = True
        return names, False

    async def _read_services(self, names: set[str]) -> None:
        """Read the named services into the table; those that have gone leave it."""
        for name in names - self._tags_of.keys():
            self._put(name, ())
        wanted = iter(sorted(names & self._tags_of.keys()))

        async def read() -> None:
            # All readers share the one iterator, so each name is read once.
            for name in wanted:
                self._put(name, await self._client.service_instances(name, tag=self._tag))

        failures: list[Exception] = []
        try:
            async with asyncio.TaskGroup() as tasks:
                for _ in range(min(SERVICE_READS_AT_ONCE, len(names))):
                    tasks.create_task(read(), name="read-service")
        except* ConsulError as errors:
            failures.extend(errors.exceptions)
        if failures:
            raise failures[0]

    def _put(self, name: str, found: tuple[Instance, ...]) -> None:
        if found != self._instances.get(name, ()):
            self._has_news = True
            if found:
                self._instances[name] = found
            else:
                del self._instances[name]

    def _publish_instances(self, confirmed: float, *, is_whole: bool) -> None:
        """Show what was read; `is_whole` says that a sweep has just ended."""
        known = self.latest
        services = known.services if known is not None and not self._has_news else dict(self._instances)
        self._has_news = False
        if self._dirty or self._sweep_wanted or self._sweep_left:
            # Something is known to be out of date: show what was read, but do not call it confirmed. Where there
            # is always something, everything is at least as young as the beginning of the last whole sweep.
            swept = self._sweep_confirms if is_whole else 0.0
            confirmed = max(known.confirmed_at, swept) if known is not None else confirmed
        if known is None or services is not known.services or confirmed != known.confirmed_at:
            self._publish(
                CatalogSnapshot(services=services, index=self._services_index, confirmed_at=confirmed)
            )


def next_index(asked: int, answered: int, *, is_early: bool) -> int:
    """Return the index to block on next: 0, start over, when it went backwards (a restored or new Consul).

    Also when an answer without news was early. So Consul ends the queries that wait while it is restored: with
    what it had before (`blockingQuery` returns at AbandonCh); one on the same index would wait to its end again.
    """
    if answered < asked or (answered == asked and is_early):
        return 0
    return answered


def _backoff(failures: int) -> float:
    longest = min(BACKOFF_SECONDS_MAX, BACKOFF_SECONDS_MIN * 2 ** min(failures, 10))
    return random.uniform(longest / 2, longest)


def _sorted_checks(checks: Iterable[_Check]) -> tuple[frozenset[_Check], dict[str, frozenset[_Check]]]:
    of_nodes: set[_Check] = set()
    of_services: defaultdict[str, set[_Check]] = defaultdict(set)
    for check in checks:
        (of_services[check.service_name] if check.service_name else of_nodes).add(check)
    return frozenset(of_nodes), {name: frozenset(found) for name, found in of_services.items()}


def _pair(entry: _KvEntry) -> KvPair:
    return KvPair(
        key=entry.key,
        value=entry.value or b"",
        modify_index=entry.modify_index,
        create_index=entry.create_index,
        lock_index=entry.lock_index,
        flags=entry.flags,
        session=entry.session or None,
    )
