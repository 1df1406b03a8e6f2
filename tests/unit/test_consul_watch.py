"""Watches against a Consul that misbehaves; how they follow a good one is in tests/contract."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable

import pytest
from aiohttp import web

from tests.unit.test_consul_transport import server
from ztna.config import ConsulConfig
from ztna.consul import watch as watches
from ztna.consul.client import ConsulClient
from ztna.consul.watch import CatalogWatch, KvWatch, next_index
from ztna.errors import ConsulForbidden, ConsulUnavailable

Scene = Callable[[web.Request], web.Response]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watches, "COALESCE_SECONDS", 0.001)
    monkeypatch.setattr(watches, "BACKOFF_SECONDS_MIN", 0.001)
    monkeypatch.setattr(watches, "BACKOFF_SECONDS_MAX", 0.01)


def answer(value: object, index: int, *, leader: str = "true", status: int = 200) -> web.Response:
    headers = {"X-Consul-Index": str(index), "X-Consul-KnownLeader": leader}
    return web.Response(status=status, text=json.dumps(value), headers=headers)


def entry(value: str = "eA==") -> dict[str, object]:
    pair = {"Key": "k/a", "Value": value, "Flags": 0, "LockIndex": 0}
    return {**pair, "CreateIndex": 1, "ModifyIndex": 1}


@pytest.mark.parametrize("is_early", [False, True])
@pytest.mark.parametrize(
    ("asked", "answered", "follows"), [(0, 5, 5), (5, 9, 9), (9, 5, 0), (5, 0, 0), (0, 0, 0)]
)
def test_an_index_that_goes_backwards_starts_over(
    asked: int, answered: int, follows: int, is_early: bool
) -> None:
    assert next_index(asked, answered, is_early=is_early) == follows


@pytest.mark.parametrize(("is_early", "follows"), [(False, 5), (True, 0)])
def test_an_answer_without_news_before_its_time_starts_over(is_early: bool, follows: int) -> None:
    assert next_index(5, 5, is_early=is_early) == follows


async def test_a_restored_consul_is_read_from_the_beginning() -> None:
    asked: list[int] = []
    enough = asyncio.Event()
    indexes = iter((90, 95, 3, 4))

    async def serve(request: web.Request) -> web.StreamResponse:
        asked.append(int(request.query.get("index", "0")))
        index = next(indexes, None)
        if index is None:
            enough.set()
            await asyncio.Event().wait()
        return answer([entry()], index or 0)

    async with server(serve) as address, ConsulClient(ConsulConfig(address=address)) as client:
        task = asyncio.create_task(KvWatch(client, "k/").run())
        await asyncio.wait_for(enough.wait(), 5)
        task.cancel()
    assert asked == [0, 90, 95, 0, 4]


async def test_what_was_restored_is_seen_though_the_waiting_query_ends_with_what_was_before() -> None:
    asked: list[int] = []

    async def serve(request: web.Request) -> web.StreamResponse:
        asked.append(int(request.query.get("index", "0")))
        if len(asked) <= 2:
            return answer([entry()], 90)
        if asked[-1]:
            await asyncio.Event().wait()
        return answer([entry("eQ==")], 40)

    async with server(serve) as address, ConsulClient(ConsulConfig(address=address)) as client:
        watch = KvWatch(client, "k/")
        task = asyncio.create_task(watch.run())
        async with asyncio.timeout(5):
            snapshot = await watch.changed()
            while snapshot.pairs["k/a"].value != b"y":
                snapshot = await watch.changed(snapshot)
        task.cancel()
    assert asked[:3] == [0, 90, 0]


async def test_an_answer_without_a_leader_confirms_nothing() -> None:
    leader = ["false"]

    async def serve(request: web.Request) -> web.StreamResponse:
        return answer([entry()], 5, leader=leader[0])

    async with server(serve) as address, ConsulClient(ConsulConfig(address=address)) as client:
        watch = KvWatch(client, "k/")
        task = asyncio.create_task(watch.run())
        async with asyncio.timeout(5):
            while watch.problem is None:
                await asyncio.sleep(0)
        assert isinstance(watch.problem, ConsulUnavailable)
        assert "no leader" in str(watch.problem)
        assert watch.latest is None
        leader[0] = "true"
        snapshot = await asyncio.wait_for(watch.changed(), 5)
        assert snapshot.pairs["k/a"].value == b"x"
        task.cancel()


async def test_a_confirmation_keeps_the_mapping() -> None:
    async def serve(request: web.Request) -> web.StreamResponse:
        return answer([entry()], 5)

    async with server(serve) as address, ConsulClient(ConsulConfig(address=address)) as client:
        watch = KvWatch(client, "k/")
        task = asyncio.create_task(watch.run())
        first = await asyncio.wait_for(watch.changed(), 5)
        second = await asyncio.wait_for(watch.changed(first), 5)
        assert second is not first
        assert second.pairs is first.pairs
        assert second.confirmed_at > first.confirmed_at
        task.cancel()


def check(service: str, status: str = "passing", node: str = "n", index: int = 1) -> dict[str, object]:
    ids = {"CheckID": f"{service}-check", "ServiceID": f"{service}-1" if service else ""}
    return {"Node": node, "Status": status, "ServiceName": service, "ModifyIndex": index, **ids}


def instance(service: str, status: str = "passing", port: int = 1) -> dict[str, object]:
    return {
        "Node": {"Node": "n", "Address": "127.0.0.1"},
        "Service": {"Service": service, "ID": f"{service}-1", "Address": "", "Port": port, "Tags": ["ztna"]},
        "Checks": [{"Status": status}],
    }


class Catalog:
    """A little Consul: what it has can be set, and its queries block until that happened."""

    def __init__(self) -> None:
        self.index = 1
        self.services: dict[str, list[str]] = {}
        self.checks: list[dict[str, object]] = []
        self.instances: dict[str, list[dict[str, object]]] = {}
        self.forbidden = False
        self.reads: list[str] = []
        self._changed = asyncio.Event()

    def change(self) -> None:
        self.index += 1
        self._changed.set()
        self._changed = asyncio.Event()

    async def __call__(self, request: web.Request) -> web.StreamResponse:
        path = request.path
        if path.startswith("/v1/health/service/"):
            name = path.rpartition("/")[2]
            self.reads.append(name)
            if self.forbidden:
                return web.Response(status=403, text="Permission denied")
            return answer(self.instances.get(name, []), self.index)
        while int(request.query.get("index", "0")) >= self.index:
            await self._changed.wait()
        return answer(self.services if path == "/v1/catalog/services" else self.checks, self.index)


async def test_only_what_changed_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watches, "SWEEP_SECONDS_MIN", 3600.0)
    catalog = Catalog()
    for name in ("a", "b", "c"):
        catalog.services[name] = ["ztna"]
        catalog.checks.append(check(name))
        catalog.instances[name] = [instance(name)]
    catalog.services["untagged"] = []
    catalog.checks += [check("untagged"), check("", node="n")]
    async with server(catalog) as address, ConsulClient(ConsulConfig(address=address)) as client:
        watch = CatalogWatch(client)
        task = asyncio.create_task(watch.run())
        async with asyncio.timeout(5):
            snapshot = await watch.changed()
            assert set(snapshot.services) == {"a", "b", "c"}
            catalog.change()
            while watch._sweep_wanted is False and catalog.reads.count("a") < 2:
                await asyncio.sleep(0)
            while catalog.reads.count("c") < 2:
                await asyncio.sleep(0)
            catalog.reads.clear()
            catalog.checks[1] = check("b", "critical", index=9)
            catalog.instances["b"] = [instance("b", "critical")]
            catalog.change()
            while snapshot.services["b"][0].status != "critical":
                snapshot = await watch.changed(snapshot)
            assert catalog.reads == ["b"]
            catalog.checks[-1] = check("", "critical", index=10)
            catalog.change()
            while sorted(catalog.reads) != ["a", "b", "b", "c"]:
                await asyncio.sleep(0)
            del catalog.services["c"]
            catalog.change()
            while "c" in snapshot.services:
                snapshot = await watch.changed(snapshot)
            catalog.instances["a"] = []
            catalog.checks[0] = check("a", "passing", index=12)
            catalog.change()
            while "a" in snapshot.services:
                snapshot = await watch.changed(snapshot)
        task.cancel()


async def test_a_read_that_fails_is_made_good_later() -> None:
    catalog = Catalog()
    catalog.services["a"] = ["ztna"]
    catalog.instances["a"] = [instance("a")]
    catalog.forbidden = True
    async with server(catalog) as address, ConsulClient(ConsulConfig(address=address)) as client:
        watch = CatalogWatch(client)
        task = asyncio.create_task(watch.run())
        async with asyncio.timeout(5):
            while not isinstance(watch.problem, ConsulForbidden):
                await asyncio.sleep(0)
            assert watch.latest is None
            catalog.forbidden = False
            snapshot = await watch.changed()
        assert [found.port for found in snapshot.services["a"]] == [1]
        task.cancel()


async def test_a_silent_change_is_found_by_a_sweep(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watches, "SWEEP_SECONDS_MIN", 0.01)
    catalog = Catalog()
    catalog.services["a"] = ["ztna"]
    catalog.instances["a"] = [instance("a")]
    async with server(catalog) as address, ConsulClient(ConsulConfig(address=address)) as client:
        watch = CatalogWatch(client)
        task = asyncio.create_task(watch.run())
        async with asyncio.timeout(5):
            snapshot = await watch.changed()
            for port in (2, 3):
                catalog.instances["a"] = [instance("a", port=port)]
                catalog.change()
                while snapshot.services["a"][0].port != port:
                    snapshot = await watch.changed(snapshot)
        task.cancel()


class BusyCatalog(Catalog):
    """A catalog in which something changes during each sweep."""

    def __init__(self, last: str) -> None:
        super().__init__()
        self._last = last
        self.is_noticed: Callable[[], bool] = lambda: True

    async def __call__(self, request: web.Request) -> web.StreamResponse:
        found = await super().__call__(request)
        if request.path.endswith(f"/{self._last}"):
            self.change()
            while not self.is_noticed():
                await asyncio.sleep(0)
        return found


async def test_where_something_always_changes_a_whole_sweep_confirms(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watches, "SWEEP_SECONDS_MIN", 0.01)
    monkeypatch.setattr(watches, "SWEEP_SERVICES_AT_ONCE", 1)
    catalog = BusyCatalog("c")
    for name in ("a", "b", "c"):
        catalog.services[name] = ["ztna"]
        catalog.instances[name] = [instance(name)]
    async with server(catalog) as address, ConsulClient(ConsulConfig(address=address)) as client:
        watch = CatalogWatch(client)
        task = asyncio.create_task(watch.run())
        async with asyncio.timeout(20):
            first = await watch.changed()
            catalog.is_noticed = lambda: watch._sweep_wanted
            catalog.change()
            begun, snapshot = time.time(), first
            while snapshot.confirmed_at <= begun:
                snapshot = await watch.changed(snapshot)
        task.cancel()


class HeldCatalog(Catalog):
    """A catalog that holds the second read of some services until it is let go."""

    def __init__(self, *held: str) -> None:
        super().__init__()
        self.is_held = {name: asyncio.Event() for name in held}
        self.let_go = {name: asyncio.Event() for name in held}

    async def __call__(self, request: web.Request) -> web.StreamResponse:
        found = await super().__call__(request)
        name = request.path.rpartition("/")[2]
        if name in self.is_held and self.reads.count(name) == 2:
            self.is_held[name].set()
            await self.let_go[name].wait()
        return found

    def fail(self, name: str) -> None:
        """Have the only check of a service's only instance be critical from now on."""
        place = next(place for place, each in enumerate(self.checks) if each["ServiceName"] == name)
        self.checks[place] = check(name, "critical", index=9)
        self.instances[name] = [instance(name, "critical")]
        self.change()


async def test_what_changes_amid_a_sweep_does_not_wait_for_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watches, "SWEEP_SECONDS_MIN", 0.01)
    monkeypatch.setattr(watches, "SWEEP_SERVICES_AT_ONCE", 1)
    catalog = HeldCatalog("s03")
    names = [f"s{number:02}" for number in range(20)]
    for name in names:
        catalog.services[name] = ["ztna"]
        catalog.checks.append(check(name))
        catalog.instances[name] = [instance(name)]
    async with server(catalog) as address, ConsulClient(ConsulConfig(address=address)) as client:
        watch = CatalogWatch(client)
        task = asyncio.create_task(watch.run())
        async with asyncio.timeout(5):
            first = await watch.changed()
            catalog.reads.clear()
            catalog.reads.append("s03")
            catalog.change()
            await catalog.is_held["s03"].wait()
            catalog.fail("s19")
            while "s19" not in watch._dirty:
                await asyncio.sleep(0)
            catalog.let_go["s03"].set()
            snapshot = await watch.changed(first)
            assert snapshot.services["s19"][0].status == "critical"
            assert "s06" not in catalog.reads
            # Half a sweep confirms nothing; the whole one does.
            assert snapshot.confirmed_at == first.confirmed_at
            while snapshot.confirmed_at == first.confirmed_at:
                snapshot = await watch.changed(snapshot)
            assert set(names) <= set(catalog.reads)
        task.cancel()


async def test_what_changes_before_the_last_of_a_sweep_does_not_wait_for_other_news(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(watches, "SWEEP_SECONDS_MIN", 0.01)
    monkeypatch.setattr(watches, "SWEEP_SERVICES_AT_ONCE", 1)
    catalog = HeldCatalog("s0", "s1")
    for name in ("s0", "s1"):
        catalog.services[name] = ["ztna"]
        catalog.checks.append(check(name))
        catalog.instances[name] = [instance(name)]
    async with server(catalog) as address, ConsulClient(ConsulConfig(address=address)) as client:
        watch = CatalogWatch(client)
        task = asyncio.create_task(watch.run())
        async with asyncio.timeout(20):
            snapshot = await watch.changed()
            catalog.change()
            await catalog.is_held["s0"].wait()
            # The sweep is half done, and no other begins in the time of this test.
            monkeypatch.setattr(watches, "SWEEP_SECONDS_MIN", 3600.0)
            for changed, held in (("s1", "s0"), ("s0", "s1")):
                catalog.fail(changed)
                while changed not in watch._dirty:
                    await asyncio.sleep(0)
                catalog.let_go[held].set()
                if changed == "s1":
                    await catalog.is_held["s1"].wait()
            while snapshot.services["s0"][0].status != "critical":
                snapshot = await watch.changed(snapshot)
        task.cancel()
