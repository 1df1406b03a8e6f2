"""SRV records pulled from a real DNS server on loopback."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable

import pytest

from relay import srv
from relay.policy import EMPTY_TABLE, SrvTable
from relay.srv import SrvPuller
from tests.support.dns_server import DnsServer
from ztna.names import ConnectorId, ServiceName, Zone
from ztna.resolver import Resolver, SrvAnswer, SrvRecord, TxtAnswer

WEB, DB = ServiceName("web"), ServiceName("db")
HOLD_S = 60.0
DEADLINE_S = 10.0


class Pulling:
    """A puller, its server, and the newest table."""

    def __init__(self) -> None:
        self.dns = DnsServer()
        self.table = EMPTY_TABLE
        self.tables = 0
        self._published = asyncio.Event()

    async def start(self) -> None:
        resolver = Resolver((await self.dns.start(),), 0.5)
        self.puller = SrvPuller(resolver, Zone("ztna.local"), HOLD_S, self._publish)
        self._task = asyncio.ensure_future(self.puller.run())

    async def stop(self) -> None:
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
        self.dns.close()

    def _publish(self, table: SrvTable) -> None:
        self.table = table
        self.tables += 1
        self._published.set()

    async def until(self, holds: Callable[[], object]) -> None:
        async with asyncio.timeout(DEADLINE_S):
            while not holds():
                self._published.clear()
                await self._published.wait()

    async def until_asked(self, more: int, of: str = "") -> None:
        """Wait for so many more questions whose name begins so."""
        goal = self._asked(of) + more
        async with asyncio.timeout(DEADLINE_S):
            while self._asked(of) < goal:
                await asyncio.sleep(0.01)

    def _asked(self, of: str) -> int:
        return sum(each.startswith(of) for each in self.dns.asked)

    def connectors(self, service: ServiceName = WEB) -> list[str] | None:
        entry = self.table.entries.get(service)
        return None if entry is None else [route.connector_id for route in entry.routes]


class Counting:
    """Answers at once and for long, and counts the questions of each turn of the loop."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.turns: Counter[int] = Counter()
        self._turn = 0
        self._is_counting = False

    async def srv(self, name: str) -> SrvAnswer:
        self.asked.append(name)
        self.turns[self._turn] += 1
        if not self._is_counting:
            self._is_counting = True
            asyncio.get_running_loop().call_soon(self._next)
        return SrvAnswer(
            (SrvRecord(0, 1, 1, "con-x.connector.ztna.local"),), 300, negative=False, stale=False
        )

    servers, first = ("one",), "one"

    def prefer(self, server: str) -> None:
        raise AssertionError("there is only one")

    async def txt(self, name: str, server: str) -> TxtAnswer:
        return TxtAnswer((), 300, stale=False)

    def _next(self) -> None:
        self._turn += 1
        self._is_counting = False


@pytest.fixture
async def pulling() -> AsyncIterator[Pulling]:
    pulling = Pulling()
    await pulling.start()
    yield pulling
    await pulling.stop()


async def test_only_watched_names_are_asked_for_and_changes_are_seen_within_a_ttl(pulling: Pulling) -> None:
    pulling.dns.routes["web"] = [(0, 1, "con-x")]
    pulling.puller.watch([WEB])
    await pulling.until(lambda: pulling.connectors() == ["con-x"])
    loop = asyncio.get_running_loop()
    pulling.dns.routes["web"] = [(0, 1, "con-y"), (1, 1, "con-x")]
    changed_at = loop.time()
    await pulling.until(lambda: pulling.connectors() == ["con-y", "con-x"])
    assert loop.time() - changed_at <= pulling.dns.ttl_s + 0.1
    assert {name.split()[0] for name in pulling.dns.asked} == {"web.ztna.local", "_fresh.ztna.local"}


async def test_a_negative_answer_is_kept_and_asked_for_again_soon(pulling: Pulling) -> None:
    pulling.dns.negative_ttl_s = 60
    pulling.puller.watch([WEB])
    await pulling.until(lambda: pulling.connectors() == [])
    pulling.dns.routes["web"] = [(0, 1, "con-x")]
    await pulling.until(lambda: pulling.connectors() == ["con-x"])


async def test_a_new_registration_asks_at_once(pulling: Pulling) -> None:
    pulling.dns.ttl_s = 300
    pulling.dns.routes["web"] = [(0, 1, "con-x")]
    pulling.puller.watch([WEB])
    await pulling.until(lambda: pulling.connectors() == ["con-x"])
    pulling.dns.routes["web"].append((0, 1, "con-y"))
    pulling.puller.expect(WEB, ConnectorId("con-y"))
    pulling.puller.expect(DB, ConnectorId("con-y"))
    await pulling.until(lambda: pulling.connectors() == ["con-x", "con-y"])


async def test_a_registered_connector_is_asked_about_until_it_is_in_dns_beside_others(
    pulling: Pulling,
) -> None:
    """It registers at the relay a moment before Consul has it: others' records say nothing of when it comes."""
    pulling.dns.ttl_s = 300
    pulling.dns.routes["web"] = [(0, 1, "con-x")]
    pulling.puller.watch([WEB])
    await pulling.until(lambda: pulling.connectors() == ["con-x"])
    pulling.puller.expect(WEB, ConnectorId("con-y"))
    await pulling.until_asked(3, of="web.")
    pulling.dns.routes["web"].append((0, 1, "con-y"))
    await pulling.until(lambda: pulling.connectors() == ["con-x", "con-y"])
    assert pulling.puller._names[WEB].expected == {}


async def test_a_registered_connector_that_does_not_come_is_not_asked_about_for_ever(
    pulling: Pulling, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(srv, "EXPECTED_SECONDS", 0.0)
    pulling.dns.ttl_s = 300
    pulling.dns.routes["web"] = [(0, 1, "con-x")]
    pulling.puller.watch([WEB])
    await pulling.until(lambda: pulling.connectors() == ["con-x"])
    pulling.puller.expect(WEB, ConnectorId("con-y"))
    await pulling.until_asked(1, of="web.")
    await pulling.until(lambda: not pulling.puller._names[WEB].asking)
    name = pulling.puller._names[WEB]
    assert name.expected == {} and name.due_at > asyncio.get_running_loop().time() + 60


async def test_a_stale_answer_renews_and_changes_nothing(pulling: Pulling) -> None:
    pulling.dns.routes["web"] = [(0, 1, "con-x")]
    pulling.puller.watch([WEB])
    await pulling.until(lambda: pulling.connectors() == ["con-x"])
    before = pulling.table.entries[WEB]
    pulling.dns.stale = True
    pulling.dns.routes.clear()
    pulling.puller.ask_soon(WEB)
    await pulling.until_asked(2)
    assert pulling.puller._entries[WEB] == before


async def test_the_last_answer_stays_while_dns_is_away(pulling: Pulling) -> None:
    pulling.dns.routes["web"] = [(0, 1, "con-x")]
    pulling.puller.watch([WEB])
    await pulling.until(lambda: pulling.connectors() == ["con-x"] and pulling.table.fresh)
    pulling.dns.silent = True
    async with asyncio.timeout(DEADLINE_S):
        while not pulling.puller.failing:
            await asyncio.sleep(0.02)
    assert pulling.connectors() == ["con-x"]
    pulling.dns.silent = False
    pulling.dns.routes["web"] = [(0, 1, "con-y")]
    await pulling.until(lambda: pulling.connectors() == ["con-y"])
    assert not pulling.puller.failing


async def test_freshness_is_followed_and_never_goes_back(pulling: Pulling) -> None:
    await pulling.until(lambda: pulling.table.fresh)
    first = pulling.puller.fresh_at
    assert first is not None
    for text in ("soon", "", "12345678901234", "1"):
        pulling.dns.fresh = text or None
        await pulling.until_asked(1)
    assert pulling.puller.fresh_at == first


async def test_a_time_to_come_counts_from_when_it_was_first_said(pulling: Pulling) -> None:
    """The clock of dnsd is an hour ahead, or ours was set back: were it fresh for an hour, permission would be too."""
    ahead = int(time.time()) + 3600
    pulling.dns.fresh = str(ahead)
    await pulling.until_asked(2)
    first = pulling.puller.fresh_at
    await pulling.until_asked(2)
    assert pulling.puller.fresh_at == first
    pulling.dns.fresh = str(ahead + 1)
    await pulling.until_asked(2)
    assert pulling.puller.fresh_at is not None and first is not None and pulling.puller.fresh_at > first
    second = pulling.puller.fresh_at
    # Whole seconds are said: rounded up, it is no older than what was known before.
    pulling.dns.fresh = str(int(time.time()) + 1)
    await pulling.until(lambda: pulling.puller.fresh_at != second)
    assert pulling.puller.fresh_at > second, "a clock that is right again counts too"


async def test_targets_that_are_no_connectors_route_nothing(pulling: Pulling) -> None:
    pulling.dns.foreign["web"] = "evil.example.org"
    pulling.puller.watch([WEB])
    await pulling.until(lambda: pulling.connectors() == [])


async def test_a_name_that_nobody_serves_lingers_and_then_goes(
    pulling: Pulling, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("relay.srv.LINGER_SECONDS", 0.3)
    pulling.dns.routes["web"] = [(0, 1, "con-x")]
    pulling.puller.watch([WEB, DB])
    await pulling.until(lambda: pulling.connectors() == ["con-x"])
    pulling.puller.watch([DB])
    pulling.puller.watch([DB])
    assert pulling.connectors() == ["con-x"]
    await pulling.until(lambda: pulling.connectors() is None)
    pulling.puller.watch([WEB, DB])
    await pulling.until(lambda: pulling.connectors() == ["con-x"])


async def test_status_shows_the_table(pulling: Pulling) -> None:
    pulling.dns.routes["web"] = [(0, 7, "con-x")]
    pulling.puller.watch([WEB])
    await pulling.until(lambda: pulling.connectors() == ["con-x"])
    status = pulling.puller.status()
    assert status["services"]["web"]["connectors"] == [{"id": "con-x", "priority": 0, "weight": 7}]  # type: ignore[index]


async def test_everything_is_asked_again_at_once_when_the_zone_changed(pulling: Pulling) -> None:
    pulling.dns.ttl_s = 300
    pulling.dns.routes = {"web": [(0, 1, "con-x")], "db": [(0, 1, "con-x")]}
    pulling.puller.watch([WEB, DB])
    await pulling.until(lambda: pulling.connectors() == pulling.connectors(DB) == ["con-x"])
    pulling.dns.routes = {"web": [(0, 1, "con-y")], "db": [(0, 1, "con-y")]}
    pulling.puller.ask_all_soon()
    await pulling.until(lambda: pulling.connectors() == pulling.connectors(DB) == ["con-y"])


async def test_a_thousand_names_make_no_burst() -> None:
    """However many are due at once, few are asked for in each turn, and all of them soon."""
    services = [ServiceName(f"svc-{number}") for number in range(1_000)]
    dns = Counting()
    puller = SrvPuller(dns, Zone("ztna.local"), HOLD_S, lambda table: None)
    task = asyncio.ensure_future(puller.run())
    for _ in range(2):
        dns.asked.clear()
        dns.turns.clear()
        puller.watch(services)
        puller.ask_all_soon()
        async with asyncio.timeout(DEADLINE_S):
            while len(set(dns.asked)) < len(services):
                await asyncio.sleep(0.005)
        assert max(dns.turns.values()) <= srv.QUESTIONS_PER_TURN_MIN
        assert len(dns.asked) == len(services), "and none of them twice"
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def test_a_name_registered_again_and_again_is_asked_for_a_few_times_a_second() -> None:
    dns = Counting()
    puller = SrvPuller(dns, Zone("ztna.local"), HOLD_S, lambda table: None)
    task = asyncio.ensure_future(puller.run())
    puller.watch([WEB])
    loop = asyncio.get_running_loop()
    start = loop.time()
    while (churned := loop.time() - start) < 3 * srv.ASK_SOON_SECONDS:
        puller.ask_soon(WEB)
        await asyncio.sleep(0.001)
    assert 1 <= len(dns.asked) <= churned / srv.ASK_SOON_SECONDS + 2
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def test_news_while_a_name_is_asked_for_is_not_lost(pulling: Pulling) -> None:
    pulling.dns.ttl_s = 300
    pulling.dns.silent = True
    pulling.dns.routes["web"] = [(0, 1, "con-x")]
    pulling.puller.watch([WEB])
    async with asyncio.timeout(DEADLINE_S):
        while not pulling.puller._names[WEB].asking:
            await asyncio.sleep(0.01)
    pulling.puller.ask_all_soon()
    pulling.dns.silent = False
    await pulling.until(lambda: pulling.connectors() == ["con-x"])
    assert not pulling.puller._names[WEB].again


async def test_a_server_too_far_behind_takes_no_permission_that_another_gave() -> None:
    """The good one is away and a stuck secondary answers: the last good answers hold for their bound."""
    good, stuck = DnsServer(), DnsServer()
    stuck.fresh = str(int(time.time() - 2 * HOLD_S))
    for dns in (good, stuck):
        dns.routes["web"] = [(0, 1, "con-x")]
    tables: list[SrvTable] = []
    resolver = Resolver((await good.start(), await stuck.start()), 0.5)
    puller = SrvPuller(resolver, Zone("ztna.local"), HOLD_S, tables.append)
    puller.watch([WEB])
    task = asyncio.ensure_future(puller.run())
    try:
        async with asyncio.timeout(DEADLINE_S):
            while not (tables and tables[-1].routes(WEB, time.monotonic()) and len(tables[-1].fresh) == 2):
                await asyncio.sleep(0.01)
            good.silent = True
            while stuck.asked.count("web.ztna.local SRV") < 2:
                await asyncio.sleep(0.01)
        assert resolver.first == resolver.servers[1]
        assert tables[-1].routes(WEB, time.monotonic()) is not None
        assert puller._entries[WEB].source == resolver.servers[0]
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        stuck.close()
        good.close()


async def test_who_says_that_the_catalog_is_confirmed_says_it_of_its_own_answers_only() -> None:
    """A secondary that is stuck on an old zone, without a word of it, gives no permission beside one that is not."""
    stuck, good = DnsServer(), DnsServer()
    stuck.fresh = str(int(time.time() - srv.BEHIND_SECONDS))
    for dns in (stuck, good):
        dns.routes["web"] = [(0, 1, "con-x")]
    tables: list[SrvTable] = []
    resolver = Resolver((await stuck.start(), await good.start()), 0.5)
    puller = SrvPuller(resolver, Zone("ztna.local"), HOLD_S, tables.append)
    puller.watch([WEB])
    task = asyncio.ensure_future(puller.run())
    try:
        good.silent = True
        async with asyncio.timeout(DEADLINE_S):
            while not (tables and WEB in tables[-1].entries and tables[-1].fresh):
                await asyncio.sleep(0.01)
            while "no answer" not in str(puller.status()["resolvers"]):
                await asyncio.sleep(0.01)
        assert tables[-1].routes(WEB, time.monotonic()) is None, "confirmed too long ago"
        # The other one is back: it is asked first from now on, and what it says counts.
        good.silent = False
        async with asyncio.timeout(DEADLINE_S):
            while tables[-1].routes(WEB, time.monotonic()) is None:
                await asyncio.sleep(0.01)
        assert resolver.first == resolver.servers[1]
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        stuck.close()
        good.close()
