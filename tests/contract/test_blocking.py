"""Blocking queries: indexes, waits and wake-ups, raw and through the watches."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any, TypeVar

import pytest

from tests.contract.test_services import definition, deregister, register
from tests.support.consul import ConsulUnderTest
from ztna.catalog import CatalogSnapshot, Instance, KvSnapshot
from ztna.consul.client import ConsulClient
from ztna.consul.watch import CatalogWatch, KvWatch, Watch
from ztna.errors import ConsulUnavailable

WAKE_SECONDS = 5.0
S = TypeVar("S", CatalogSnapshot, KvSnapshot)


async def block(consul: ConsulUnderTest, path: str, index: int, wait: str = "30s") -> tuple[Any, int, float]:
    """Ask a blocking query; returns the answer, its index and the seconds it took."""
    started = time.monotonic()
    asked = f"{path}{'&' if '?' in path else '?'}index={index}&wait={wait}"
    _, found, headers = await asyncio.to_thread(consul.request, "GET", asked)
    return found, int(headers["x-consul-index"]), time.monotonic() - started


def index_of(consul: ConsulUnderTest, path: str) -> int:
    return int(consul.request("GET", path)[2]["x-consul-index"])


async def woken(consul: ConsulUnderTest, path: str, change: Callable[[], object]) -> Any:
    """Block on a path, make a change, and return what the query woke up with."""
    index = index_of(consul, path)
    waiting = asyncio.create_task(block(consul, path, index))
    done, _ = await asyncio.wait([waiting], timeout=0.2)
    assert not done, "it did not block"
    await asyncio.to_thread(change)
    found, now, _ = await asyncio.wait_for(waiting, WAKE_SECONDS)
    assert now > index
    return found


async def test_a_wait_ends_unchanged_with_the_same_index(consul: ConsulUnderTest, unique: str) -> None:
    consul.request("PUT", f"/v1/kv/{unique}", b"x")
    index = index_of(consul, f"/v1/kv/{unique}")
    _, now, took = await block(consul, f"/v1/kv/{unique}", index, "400ms")
    assert now == index
    assert 0.35 < took < 2.0


async def test_an_older_index_is_answered_at_once(consul: ConsulUnderTest, unique: str) -> None:
    consul.request("PUT", f"/v1/kv/{unique}", b"x")
    index = index_of(consul, f"/v1/kv/{unique}")
    _, _, took = await block(consul, f"/v1/kv/{unique}", index - 1)
    assert took < WAKE_SECONDS


async def test_a_key_wakes_when_it_appears_changes_and_goes(consul: ConsulUnderTest, unique: str) -> None:
    path = f"/v1/kv/{unique}"
    [pair] = await woken(consul, path, lambda: consul.request("PUT", path, b"1"))
    assert pair["Value"] == "MQ=="
    [pair] = await woken(consul, path, lambda: consul.request("PUT", path, b"2"))
    assert pair["Value"] == "Mg=="
    assert await woken(consul, path, lambda: consul.request("DELETE", path)) == ""


async def test_a_prefix_wakes_for_its_own_changes_and_no_others(consul: ConsulUnderTest, unique: str) -> None:
    consul.request("PUT", f"/v1/kv/{unique}/a", b"1")
    path = f"/v1/kv/{unique}/?recurse"
    index = index_of(consul, path)
    waiting = asyncio.create_task(block(consul, path, index, "500ms"))
    await asyncio.to_thread(consul.request, "PUT", f"/v1/kv/other-{unique}", b"")
    _, now, _ = await waiting
    assert now == index
    found = await woken(consul, path, lambda: consul.request("PUT", f"/v1/kv/{unique}/b", b"1"))
    assert [pair["Key"] for pair in found] == [f"{unique}/a", f"{unique}/b"]
    found = await woken(consul, path, lambda: consul.request("DELETE", f"/v1/kv/{unique}/a"))
    assert [pair["Key"] for pair in found] == [f"{unique}/b"]
    last = await woken(consul, path, lambda: consul.request("DELETE", f"/v1/kv/{unique}/b"))
    assert last == ""


@pytest.mark.parametrize(
    "path", ["/v1/health/service/{name}", "/v1/catalog/service/{name}", "/v1/catalog/services"]
)
async def test_the_catalog_wakes_for_registrations(consul: ConsulUnderTest, unique: str, path: str) -> None:
    path = path.format(name=unique)
    assert await woken(consul, path, lambda: register(consul, definition(unique, Checks=[])))
    await woken(consul, path, lambda: deregister(consul, f"{unique}@c1"))


@pytest.mark.parametrize("path", ["/v1/health/service/{name}", "/v1/health/state/any"])
async def test_health_wakes_for_checks(consul: ConsulUnderTest, unique: str, path: str) -> None:
    register(consul, definition(unique))
    async with ConsulClient(consul.config()) as client:
        while not await client.service_instances(unique):
            pass
        report = f"/v1/agent/check/update/{unique}:ttl"
        await woken(
            consul, path.format(name=unique), lambda: consul.request("PUT", report, {"Status": "passing"})
        )
    deregister(consul, f"{unique}@c1")


# The watches


@asynccontextmanager
async def running(watch: Watch[S]) -> AsyncIterator[Watch[S]]:
    task = asyncio.create_task(watch.run())  # type: ignore[attr-defined]
    try:
        yield watch
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def comes(watch: Watch[S], holds: Callable[[S], bool], seconds: float = 10.0) -> S:
    """Wait for a snapshot that is as wanted."""
    snapshot: S | None = None
    try:
        async with asyncio.timeout(seconds):
            while True:
                snapshot = await watch.changed(snapshot)
                if holds(snapshot):
                    return snapshot
    except TimeoutError:
        pytest.fail(f"does not come: {snapshot} {watch.problem!r}")


def statuses(snapshot: CatalogSnapshot, name: str) -> list[str]:
    return [instance.status for instance in snapshot.services.get(name, ())]


async def test_a_kv_watch_follows_its_prefix(consul: ConsulUnderTest, unique: str) -> None:
    async with ConsulClient(consul.config()) as client:
        watch = KvWatch(client, f"{unique}/")
        seen: list[KvSnapshot] = []
        watch.subscribe(seen.append)
        async with running(watch):
            first = await comes(watch, lambda snapshot: snapshot.pairs == {})
            assert abs(first.confirmed_at - time.time()) < 5
            await client.kv_put(f"{unique}/a", b"1")
            await comes(watch, lambda snapshot: list(snapshot.pairs) == [f"{unique}/a"])
            await client.kv_put(f"{unique}/a", b"2")
            now = await comes(watch, lambda snapshot: snapshot.pairs[f"{unique}/a"].value == b"2")
            await client.kv_delete(f"{unique}/a")
            await comes(watch, lambda snapshot: snapshot.pairs == {})
        assert seen[0] is first
        assert now in seen


async def test_a_catalog_watch_follows_tagged_services(consul: ConsulUnderTest, unique: str) -> None:
    async with ConsulClient(consul.config()) as client, running(CatalogWatch(client)) as watch:
        await watch.changed()
        register(consul, definition(f"{unique}-untagged", Tags=[], Checks=[]))
        register(consul, definition(unique))
        await comes(watch, lambda snapshot: statuses(snapshot, unique) == ["critical"])
        for status in ("passing", "warning", "critical"):
            assert await client.update_check(f"{unique}:ttl", status)
            await comes(watch, lambda snapshot, status=status: statuses(snapshot, unique) == [status])
        second = definition(unique, ID=f"{unique}@c2", Checks=[])
        register(consul, second)
        await comes(watch, lambda snapshot: len(statuses(snapshot, unique)) == 2)
        assert watch.latest is not None
        assert f"{unique}-untagged" not in watch.latest.services
        deregister(consul, f"{unique}@c1")
        await comes(watch, lambda snapshot: statuses(snapshot, unique) == ["passing"])
        deregister(consul, f"{unique}@c2")
        await comes(watch, lambda snapshot: unique not in snapshot.services)
        assert watch.problem is None
    deregister(consul, f"{unique}-untagged@c1")


async def test_a_catalog_watch_sees_a_silent_change(consul: ConsulUnderTest, unique: str) -> None:
    """Another port or Meta changes no check and no tag, only the index of the list of services."""

    def shown(snapshot: CatalogSnapshot) -> Instance:
        return snapshot.services[unique][0]

    async with ConsulClient(consul.config()) as client, running(CatalogWatch(client)) as watch:
        register(consul, definition(unique))
        await comes(watch, lambda snapshot: unique in snapshot.services)
        register(consul, definition(unique, Port=1))
        await comes(watch, lambda snapshot: shown(snapshot).port == 1)
        register(consul, definition(unique, Port=1, Meta={"ztna-connector": "c2"}))
        await comes(watch, lambda snapshot: shown(snapshot).meta == {"ztna-connector": "c2"})
    deregister(consul, f"{unique}@c1")


async def test_watches_outlive_consul(own_consul: ConsulUnderTest, unique: str) -> None:
    own_consul.request("PUT", f"/v1/kv/{unique}/a", b"1")
    register(own_consul, definition(unique, Checks=[]))
    async with (
        ConsulClient(own_consul.config(timeout_s=2.0)) as client,
        running(KvWatch(client, f"{unique}/")) as pairs,
        running(CatalogWatch(client)) as catalog,
    ):
        await comes(pairs, lambda snapshot: f"{unique}/a" in snapshot.pairs)
        before = await comes(catalog, lambda snapshot: unique in snapshot.services)
        await asyncio.to_thread(own_consul.stop)
        async with asyncio.timeout(10):
            while pairs.problem is None or catalog.problem is None:
                await asyncio.sleep(0.02)
        assert catalog.latest is not None
        assert catalog.latest.services == before.services
        with pytest.raises(ConsulUnavailable):
            await client.kv_get(unique)
        await asyncio.to_thread(own_consul.start)
        own_consul.request("PUT", f"/v1/kv/{unique}/b", b"1")
        await comes(pairs, lambda snapshot: set(snapshot.pairs) == {f"{unique}/a", f"{unique}/b"})
        register(own_consul, definition(f"{unique}-new", Checks=[]))
        found = await comes(catalog, lambda snapshot: f"{unique}-new" in snapshot.services)
        assert unique in found.services
        await comes(catalog, lambda snapshot: snapshot.confirmed_at > before.confirmed_at)


async def test_a_consul_that_hangs_is_given_up_in_time(own_consul: ConsulUnderTest, unique: str) -> None:
    async with ConsulClient(own_consul.config(timeout_s=0.5)) as client:
        assert await client.kv_put(unique, b"1")
        own_consul.pause()
        started = time.monotonic()
        with pytest.raises(ConsulUnavailable, match=r"no answer within 0\.5 s"):
            await client.kv_get(unique)
        assert time.monotonic() - started < 2
        own_consul.resume()
        async with asyncio.timeout(20):
            while True:
                try:
                    found = await client.kv_get(unique)
                    break
                except ConsulUnavailable:
                    continue
        assert found is not None
        assert found.value == b"1"
