"""Pulls the SRV records of the registered services from DNS and publishes them as one table.

Asks again before a TTL ends, jittered; asks soon and then ever more rarely for names that have no records
yet, or not those of a connector that has just registered; keeps an answer until the next good one. How old an
answer may be is relay.policy's decision, and who may serve too.
"""

from __future__ import annotations

import asyncio
import heapq
import math
import random
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Protocol

from relay.policy import EMPTY_TABLE, Route, SrvEntry, SrvTable, routes_of
from ztna.errors import ResolverUnavailable
from ztna.names import ConnectorId, ServiceName, Zone
from ztna.resolver import SrvAnswer, TxtAnswer
from ztna.telemetry import dropped, logger

FRESH_LABEL = "_fresh"
REFRESH_PART_MIN, REFRESH_PART_MAX = 0.6, 0.9
"""When in its TTL an answer is asked for again; drawn for each, so that names spread out."""
REFRESH_SECONDS_MIN = 0.5
REFRESH_SECONDS_MAX = 300.0
NEGATIVE_SECONDS_MIN = 0.2
NEGATIVE_SECONDS_MAX = 2.0
"""A connector that registered is about to be in the catalog: its name is asked for more often than told to."""
EXPECTED_SECONDS = 10.0
"""For so long, where the name has others' records already: one that is not well yet may never come."""
FAILURE_SECONDS_MIN = 0.5
FAILURE_SECONDS_MAX = 5.0
FRESH_SECONDS_MAX = 10.0
BEHIND_SECONDS = 150.0
"""A server whose catalog is older than another's by so much is not asked first: a secondary is told each 60 s."""
LINGER_SECONDS = 60.0
"""How long a name is still known after its last connector has gone: `no_healthy_connector` meanwhile."""
TURN_SECONDS = 0.01
QUESTIONS_PER_TURN_MIN = 8
TURNS_PER_ROUND_MAX = 128
"""All names are asked for within so many turns, however many there are, and few in each: no bursts."""
ASK_SOON_SECONDS = 0.2
"""A name that is registered again and again is not asked for more often."""
PUBLISH_SECONDS = 0.02
"""Answers that come together are published together."""

_log = logger(__name__)


class Asker(Protocol):
    """What is needed of ztna.resolver.Resolver."""

    async def srv(self, name: str) -> SrvAnswer:
        """Return the SRV records of a name. Raises ResolverUnavailable."""

    async def txt(self, name: str, server: str) -> TxtAnswer:
        """Return the TXT records that one server has. Raises ResolverUnavailable."""

    @property
    def servers(self) -> tuple[str, ...]:
        """Every server that may answer."""

    @property
    def first(self) -> str:
        """The one that is asked first."""

    def prefer(self, server: str) -> None:
        """Ask this one first from now on."""


@dataclass(slots=True)
class _Name:
    """One name that is kept: `drop_at` is set once no connector serves it."""

    repeats: int = 0
    failures: int = 0
    drop_at: float | None = None
    due_at: float = 0.0
    asking: bool = False
    asked_at: float = -ASK_SOON_SECONDS
    again: bool = False
    """There was news while it was being asked for."""
    expected: dict[ConnectorId, float] = field(default_factory=dict)
    """Connectors that registered and have no record yet, and until when that may come any moment."""

    def still_expects(self, routes: Iterable[Route], now: float) -> bool:
        """Strike off who has come or is late; say whether anybody is left."""
        come = {route.connector_id for route in routes}
        self.expected = {who: end for who, end in self.expected.items() if who not in come and now < end}
        return bool(self.expected)


class SrvPuller:
    """Keeps the SRV records of the services it is told of. `publish` gets each new table."""

    def __init__(
        self,
        resolver: Asker,
        zone: Zone,
        hold_s: float,
        publish: Callable[[SrvTable], None],
        *,
        clock: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
    ) -> None:
        """Times of the table are on `clock`; `wall` is what `_fresh` is compared with, Unix seconds."""
        self._resolver, self._zone, self._hold_s, self._publish = resolver, zone, hold_s, publish
        self._clock, self._wall = clock, wall
        self._names: dict[ServiceName, _Name] = {}
        self._entries: dict[ServiceName, SrvEntry] = {}
        self._published = EMPTY_TABLE
        self._queue: list[tuple[float, ServiceName]] = []
        self._woken = asyncio.Event()
        self._changed = asyncio.Event()
        self._fresh: dict[str, float] = {}
        self._said: dict[str, tuple[int, float]] = {}
        """What each server says, and since when on `clock`."""
        self._silent: dict[str, str] = {}
        self.failing = ""
        """What the last question failed with; empty while DNS answers."""

    @property
    def fresh_at(self) -> float | None:
        """When the catalog was last confirmed as far as any server knows, on `clock`."""
        return max(self._fresh.values(), default=None)

    @property
    def names(self) -> int:
        """How many names are kept."""
        return len(self._names)

    def watch(self, services: Iterable[ServiceName]) -> None:
        """Keep exactly these; the others linger for LINGER_SECONDS."""
        wanted = set(services)
        for service in wanted:
            name = self._names.setdefault(service, _Name())
            if name.drop_at is not None or not name.due_at:
                name.drop_at, name.repeats = None, 0
                self._schedule(service, name, 0.0)
        drop_at = self._clock() + LINGER_SECONDS
        for service, name in self._names.items():
            if service not in wanted and name.drop_at is None:
                name.drop_at = drop_at

    def expect(self, service: ServiceName, connector_id: ConnectorId) -> None:
        """Ask again at once: a connector has just registered the name, and may be new in the catalog."""
        name = self._names.get(service)
        if name is not None:
            name.expected[connector_id] = self._clock() + EXPECTED_SECONDS
            self.ask_soon(service)

    def ask_soon(self, service: ServiceName) -> None:
        """Ask again at once: there is news of the name."""
        name = self._names.get(service)
        if name is not None:
            name.repeats = 0
            name.again = name.asking
            self._schedule(service, name, max(0.0, name.asked_at + ASK_SOON_SECONDS - self._clock()))

    def ask_all_soon(self) -> None:
        """Ask for everything again at once: the zone has changed."""
        for service in self._names:
            self.ask_soon(service)

    async def run(self) -> None:
        """Pull until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            for server in self._resolver.servers:
                tasks.create_task(self._follow_freshness(server), name=f"srv freshness of {server}")
            tasks.create_task(self._publish_changes(), name="srv publish")
            while True:
                await self._ask_due(tasks)

    def status(self) -> dict[str, object]:
        """Return the table that was last published, as /status shows it: ages in seconds."""
        now, fresh_at = self._clock(), self.fresh_at
        return {
            "fresh_age_s": None if fresh_at is None else round(now - fresh_at, 1),
            "resolvers": {
                server: {
                    "fresh_age_s": round(now - self._fresh[server], 1) if server in self._fresh else None,
                    "failing": self._silent.get(server, ""),
                }
                for server in self._resolver.servers
            },
            "failing": self.failing,
            "services": {
                service: {
                    "age_s": round(now - entry.answered_at, 1),
                    "connectors": [
                        {"id": route.connector_id, "priority": route.priority, "weight": route.weight}
                        for route in entry.routes
                    ],
                }
                for service, entry in sorted(self._published.entries.items())
            },
        }

    async def _ask_due(self, tasks: asyncio.TaskGroup) -> None:
        now = self._clock()
        left = max(QUESTIONS_PER_TURN_MIN, len(self._names) // TURNS_PER_ROUND_MAX)
        while self._queue and self._queue[0][0] <= now:
            if not left:
                await asyncio.sleep(TURN_SECONDS)
                return
            due_at, service = heapq.heappop(self._queue)
            name = self._names.get(service)
            if name is None or name.asking or name.due_at != due_at:
                continue
            if name.drop_at is not None and name.drop_at <= now:
                self._forget(service)
                continue
            left -= 1
            name.asking, name.asked_at = True, now
            tasks.create_task(self._ask(service, name), name=f"srv {service}")
        self._woken.clear()
        try:
            async with asyncio.timeout(self._queue[0][0] - now if self._queue else None):
                await self._woken.wait()
        except TimeoutError:
            return

    async def _ask(self, service: ServiceName, name: _Name) -> None:
        try:
            answer = await self._resolver.srv(f"{service}.{self._zone}")
        except ResolverUnavailable as error:
            delay = self._failed(name, error)
        else:
            delay = self._answered(service, name, answer)
        name.asking = False
        self._schedule(service, name, 0.0 if name.again else delay)
        name.again = False

    def _answered(self, service: ServiceName, name: _Name, answer: SrvAnswer) -> float:
        self._works()
        name.failures = 0
        if answer.stale:
            # The server's own word that it may no longer be so: it renews nothing (design.md 2.8).
            return _between(answer.ttl_s)
        if self._knows_less(service, answer.server):
            dropped("relay.srv", "behind")
            return _between(answer.ttl_s)
        routes = routes_of(((each.priority, each.weight, each.target) for each in answer.records), self._zone)
        if len(routes) < len(answer.records):
            dropped("relay.srv", "foreign_target", len(answer.records) - len(routes))
        self._record(service, routes, answer.server)
        if not name.still_expects(routes, self._clock()) and routes:
            name.repeats = 0
            return _between(answer.ttl_s)
        name.repeats += 1
        backoff = NEGATIVE_SECONDS_MIN * 2 ** min(name.repeats - 1, 10)
        return _jittered(min(backoff, NEGATIVE_SECONDS_MAX, max(answer.ttl_s, NEGATIVE_SECONDS_MIN)))

    def _knows_less(self, service: ServiceName, server: str) -> bool:
        """Say whether a server is too far behind to be gone by while another's last answer may still be."""
        before, now = self._entries.get(service), self._clock()
        if before is None or before.source == server:
            return False
        stands = SrvTable(self._entries, self._fresh, self._hold_s).routes(service, now) is not None
        return stands and now - self._fresh.get(server, -math.inf) > self._hold_s

    def _record(self, service: ServiceName, routes: tuple[Route, ...], source: str) -> None:
        before = self._entries.get(service)
        self._entries[service] = SrvEntry(routes, self._clock(), source)
        if before is None or before.routes != routes:
            names = ",".join(route.connector_id for route in routes)
            _log.info("srv_changed", service=service, connectors=names)
        self._changed.set()

    def _failed(self, name: _Name, error: ResolverUnavailable) -> float:
        name.failures += 1
        if not self.failing:
            _log.warning("dns_unavailable", error=error)
        self.failing = str(error)
        return _backoff(name.failures)

    def _works(self) -> None:
        if self.failing:
            _log.info("dns_available")
            self.failing = ""

    def _schedule(self, service: ServiceName, name: _Name, delay: float) -> None:
        name.due_at = self._clock() + delay
        heapq.heappush(self._queue, (name.due_at, service))
        self._woken.set()

    def _forget(self, service: ServiceName) -> None:
        del self._names[service]
        if self._entries.pop(service, None) is not None:
            self._changed.set()

    async def _follow_freshness(self, server: str) -> None:
        """Read `_fresh.<zone>` of one server: the Unix time at which its catalog was last confirmed."""
        failures = _Name()
        while True:
            try:
                answer = await self._resolver.txt(f"{FRESH_LABEL}.{self._zone}", server)
            except ResolverUnavailable as error:
                self._silent[server] = str(error)
                if len(self._silent) == len(self._resolver.servers):
                    await asyncio.sleep(self._failed(failures, error))
                else:
                    await asyncio.sleep(_jittered(FAILURE_SECONDS_MAX))
                continue
            self._silent.pop(server, None)
            self._works()
            if self._note_freshness(server, answer):
                failures.failures = 0
                await asyncio.sleep(_between(min(answer.ttl_s, FRESH_SECONDS_MAX)))
            else:
                # Nothing is permitted without: a server that has just started will say it soon.
                failures.failures += 1
                await asyncio.sleep(_backoff(failures.failures))

    def _note_freshness(self, server: str, answer: TxtAnswer) -> bool:
        """Take in what a server says; say whether it said anything."""
        text = answer.strings[0] if answer.strings else b""
        if not text.isdigit() or len(text) > 12:
            dropped("relay.srv", "no_freshness")
            return False
        now, said = self._clock(), int(text)
        if self._said.get(server, (None,))[0] != said:
            self._said[server] = said, now
        # The clock of one that says a time to come is ahead of ours: when it said so first is what is certain.
        fresh_at = min(self._said[server][1], now - max(0.0, self._wall() - said))
        if server not in self._fresh or fresh_at > self._fresh[server]:
            self._fresh[server] = fresh_at
            self._changed.set()
        first = self._resolver.first
        if first != server and fresh_at - self._fresh.get(first, -math.inf) > BEHIND_SECONDS:
            # Its answers would count for nothing soon, or do so already.
            _log.warning("resolver_behind", resolver=first, preferred=server)
            self._resolver.prefer(server)
        return True

    async def _publish_changes(self) -> None:
        while True:
            await self._changed.wait()
            self._changed.clear()
            self._published = SrvTable(dict(self._entries), dict(self._fresh), self._hold_s)
            self._publish(self._published)
            await asyncio.sleep(PUBLISH_SECONDS)


def _between(ttl_s: float) -> float:
    """Return when to ask again for what may be kept so long."""
    delay = ttl_s * random.uniform(REFRESH_PART_MIN, REFRESH_PART_MAX)
    return min(max(delay, REFRESH_SECONDS_MIN), REFRESH_SECONDS_MAX)


def _backoff(failures: int) -> float:
    return _jittered(min(FAILURE_SECONDS_MIN * 2 ** min(failures - 1, 10), FAILURE_SECONDS_MAX))


def _jittered(delay: float) -> float:
    return delay * random.uniform(0.8, 1.2)
