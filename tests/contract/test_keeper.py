"""The keeper on every Consul: elected, quick, replaced when it is killed, and with the ACL rules it is given."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from ipaddress import IPv4Network

import msgspec
import pytest

from dnsd.keeper import Pool, Problem, Rules
from dnsd.keeping import LEASE_CAS_ATTEMPTS, Keeping, check_schema
from tests.support.consul import ConsulUnderTest
from ztna.catalog import Registration
from ztna.config import ConsulConfig
from ztna.consul.client import ConsulClient
from ztna.consul.watch import CatalogWatch
from ztna.errors import ZtnaError
from ztna.jsontypes import to_json
from ztna.leases import VIP_PREFIX, Port, Table, audit, read_table

DEADLINE_SECONDS = 60.0
TAKE_OVER_SECONDS = 15.0
POOL = Pool(IPv4Network("127.100.0.0/24"))


class Dnsd:
    """The keeper's half of a dnsd, in this process."""

    def __init__(self, client: ConsulClient, rules: Rules) -> None:
        self.problems: tuple[Problem, ...] = ()
        self.catalog = CatalogWatch(client)
        self.keeping = Keeping(client, self.catalog, rules, session_ttl_s=10.0, report=self._hear)
        self.tasks = [asyncio.ensure_future(self.catalog.run()), asyncio.ensure_future(self.keeping.run())]

    def _hear(self, problems: tuple[Problem, ...]) -> None:
        self.problems = problems

    async def stop(self) -> None:
        for task in self.tasks:
            task.cancel()
        await asyncio.wait(self.tasks)

    async def kill(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Stop without a word to Consul."""
        with monkeypatch.context() as patched:
            patched.setattr(self.keeping, "_step_down", lambda: asyncio.sleep(0))
            await self.stop()


@asynccontextmanager
async def dnsd(
    config: ConsulConfig, *, grace_s: float = 300.0, quarantine_s: float = 3600.0
) -> AsyncIterator[Dnsd]:
    async with ConsulClient(config) as client:
        made = Dnsd(client, Rules(POOL, grace_s, quarantine_s))
        try:
            yield made
        finally:
            await made.stop()


async def until(what: str, condition: object, seconds: float = DEADLINE_SECONDS) -> float:
    """Wait for something of Consul's doing; return how long it took."""
    started = time.monotonic()
    while True:
        found = condition()  # type: ignore[operator]
        if asyncio.iscoroutine(found):
            found = await found
        if found:
            return time.monotonic() - started
        assert time.monotonic() - started < seconds, what
        await asyncio.sleep(0.02)


async def table(client: ConsulClient) -> Table:
    return read_table({pair.key: pair for pair in await client.kv_list(VIP_PREFIX)})


async def register(client: ConsulClient, *names: str, port: int = 8080) -> None:
    for name in names:
        await client.register_service(
            Registration(
                service=name,
                instance_id=f"{name}@c1",
                address="127.0.0.1",
                port=4435,
                meta={"ztna-connector": "c1", "ztna-ports": f"tcp:{port}"},
            )
        )


async def leased(client: ConsulClient, *names: str) -> bool:
    return set(names) <= (await table(client)).leases.keys()


async def test_leases_are_given_released_and_given_back(own_consul: ConsulUnderTest) -> None:
    async with ConsulClient(own_consul.config()) as client, dnsd(own_consul.config(), grace_s=0.5) as one:
        await until("elected", lambda: one.keeping.session)
        names = [f"s{n}" for n in range(100)]
        await register(client, *names)
        await until("all are leased", lambda: leased(client, *names))
        await register(client, "late")
        assert await until("a new service is leased at once", lambda: leased(client, "late")) < 1.0
        before = (await table(client)).leases["s7"].record  # type: ignore[index]

        await client.deregister_service("s7@c1")
        await until("released", lambda: _not(leased(client, "s7")))
        resting = (await table(client)).holdings[before.ip].record
        assert (resting.service, resting.state) == ("s7", "quarantined")
        await register(client, "s7")
        await until("given back", lambda: leased(client, "s7"))
        after = await table(client)
        assert after.leases["s7"].record.ip == before.ip  # type: ignore[index]
        assert after.leases["s7"].record.epoch > before.epoch  # type: ignore[index]
        assert audit(after) == ()
        assert (await client.kv_get("ztna/schema")).value == b"1"  # type: ignore[union-attr]


async def test_a_killed_keeper_is_replaced_in_time_and_one_that_steps_down_at_once(
    own_consul: ConsulUnderTest, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = own_consul.config()
    async with ConsulClient(config) as client, dnsd(config) as first:
        await until("the first is elected", lambda: first.keeping.session)
        async with dnsd(config) as second:
            await first.kill(monkeypatch)
            await register(client, "web")
            started = time.monotonic()
            await until("the second is at work", lambda: leased(client, "web"))
            assert time.monotonic() - started < TAKE_OVER_SECONDS
            async with dnsd(config) as third:
                await second.stop()
                assert await until("the third is elected", lambda: third.keeping.session) < 5.0
                assert await until("it works", lambda: leased(client, "web")) < 5.0


async def test_what_somebody_else_broke_is_mended_and_consul_may_go_away(own_consul: ConsulUnderTest) -> None:
    config = own_consul.config()
    async with ConsulClient(config) as client, dnsd(config) as one:
        await register(client, "web")
        await until("leased", lambda: leased(client, "web"))
        # The keeper does not watch the table: it meets the change when its next transaction fails.
        await client.kv_put("ztna/vip/service/web", b'{"ip":"127.100.0.9","epoch":1,"ports":[]}')
        await register(client, "web", port=9090)

        async def mended() -> bool:
            found = (await table(client)).leases["web"].record  # type: ignore[index]
            return [port.port for port in found.ports] == [9090] and audit(await table(client)) == ()

        await until("mended", mended)
        await asyncio.to_thread(own_consul.stop)
        await asyncio.to_thread(own_consul.start)
        await register(client, "after")
        await until("leased after Consul was away", lambda: leased(client, "after"))
        assert one.tasks[1].done() is False


async def test_conflicts_between_which_a_plan_succeeds_end_nobodys_term(
    own_consul: ConsulUnderTest, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Somebody else is always first to write what the keeper wants, so that its plans after that are empty."""

    def conflicts() -> int:
        return sum(record.message == "lease_conflict" for record in caplog.records)

    planned_after: set[int] = set()
    config = own_consul.config()
    with caplog.at_level("WARNING", "dnsd.keeping"):
        async with ConsulClient(config) as client, dnsd(config) as one:
            await register(client, "web")
            await until("leased", lambda: leased(client, "web"))
            session = one.keeping.session
            monkeypatch.setattr(one.keeping, "hear", lambda decided: planned_after.add(conflicts()))
            for count in range(1, 2 * LEASE_CAS_ATTEMPTS + 1):
                lease = (await table(client)).leases["web"].record  # type: ignore[index]
                wanted = msgspec.structs.replace(lease, ports=(Port("tcp", 9000 + count),))
                await client.kv_put("ztna/vip/service/web", to_json(wanted))
                await register(client, "web", port=9000 + count)
                await until(
                    f"plans after {count} conflicts",
                    lambda count=count: max(planned_after, default=0) >= count,
                )
            assert one.keeping.session == session is not None
            assert one.keeping.trouble is None


async def test_a_newer_schema_is_refused(own_consul: ConsulUnderTest) -> None:
    async with ConsulClient(own_consul.config()) as client:
        await check_schema(client)
        assert await client.kv_get("ztna/schema") is None
        for version in (b"2", b"one"):
            await client.kv_put("ztna/schema", version)
            with pytest.raises(ZtnaError, match="newer ztna-mesh"):
                await check_schema(client)
            async with dnsd(own_consul.config()) as one:
                with contextlib.suppress(Exception):
                    await asyncio.wait_for(asyncio.shield(one.tasks[1]), DEADLINE_SECONDS)
                assert one.tasks[1].done()


@pytest.mark.real_consul
async def test_the_policy_of_dnsd_is_enough(
    acl_consul: ConsulUnderTest, unique: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = acl_consul.config(acl_consul.token_for("dnsd.hcl"))
    async with ConsulClient(acl_consul.config()) as client, dnsd(config) as first:
        await until("elected", lambda: first.keeping.session)
        await register(client, unique)
        await until("leased", lambda: leased(client, unique))
        await first.kill(monkeypatch)
        async with dnsd(config) as second:
            took = await until("the silent one is unseated", lambda: second.keeping.session)
            assert took < TAKE_OVER_SECONDS
        await client.deregister_service(f"{unique}@c1")


async def _not(answer: object) -> bool:
    return not await answer  # type: ignore[misc]
