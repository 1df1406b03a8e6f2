"""`ztna leases pin | unpin | release | move` against a keeper at work, on every Consul."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from ipaddress import IPv4Network

import pytest
from click.testing import CliRunner

from dnsd.plans import Rules
from dnsd.pool import Pool
from tests.contract.test_keeper import dnsd, leased, register, table, until
from tests.support.consul import ConsulUnderTest
from ztna.catalog import Registration
from ztna.cli.leases import leases
from ztna.consul.client import ConsulClient
from ztna.consul.watch import KvWatch
from ztna.leases import SERVICE_PREFIX, audit
from ztna.names import ServiceName

WEB = ServiceName("web")
FREE = "127.100.0.77"


async def call(consul: ConsulUnderTest, *words: str) -> tuple[int, str]:
    """Run the command in a thread, as it has a loop of its own."""
    arguments = [*words, "--consul", consul.address]
    done = await asyncio.to_thread(CliRunner().invoke, leases, arguments)
    return done.exit_code, done.output.strip()


async def test_wishes_are_carried_out_and_answered(own_consul: ConsulUnderTest) -> None:
    config = own_consul.config()
    async with ConsulClient(config) as client, dnsd(config, grace_s=3600.0):
        await register(client, "web", "db")
        await until("leased", lambda: leased(client, "web", "db"))
        was = (await table(client)).leases[WEB].record
        taken = (await table(client)).leases[ServiceName("db")].record.ip

        assert await call(own_consul, "pin", "web") == (0, f"web is pinned to {was.ip}")
        assert await call(own_consul, "pin", "web", str(taken), "--force") == (1, f"{taken} is held by db")
        status, told = await call(own_consul, "move", "web", FREE, "--json")
        assert (status, json.loads(told)["ok"]) == (1, False)
        assert await call(own_consul, "unpin", "web") == (0, f"web is no longer pinned to {was.ip}")
        assert await call(own_consul, "move", "web", FREE) == (0, f"web moved from {was.ip} to {FREE}")
        moved = (await table(client)).leases[WEB].record
        assert (str(moved.ip), moved.epoch > was.epoch) == (FREE, True)
        assert (await call(own_consul, "release", "web"))[0] == 1

        await client.deregister_service("web@c1")

        async def released() -> bool:
            return (await call(own_consul, "release", "web"))[0] == 0

        await until("the keeper knows that it is gone", released)
        assert (await call(own_consul, "release", "web"))[0] == 1
        assert (await call(own_consul, "release", "web", "--force"))[0] == 0
        after = await table(client)
        assert WEB not in after.leases
        assert all(held.record.service == "db" for held in after.holdings.values())
        assert (after.wishes, audit(after)) == ({}, ())


async def test_an_address_that_a_definition_asks_for(own_consul: ConsulUnderTest) -> None:
    config = own_consul.config()
    async with ConsulClient(config) as client, dnsd(config) as one:
        await register(client, "db")
        await until("leased", lambda: leased(client, "db"))
        taken = (await table(client)).leases[ServiceName("db")].record.ip

        async def ask(address: str) -> None:
            meta = {"ztna-connector": "c1", "ztna-ports": "tcp:8080", "ztna-virtual-ip": address}
            await client.register_service(
                Registration(service="web", instance_id="web@c1", address="127.0.0.1", port=4435, meta=meta)
            )

        async def has(address: str) -> bool:
            found = (await table(client)).leases.get(WEB)
            return found is not None and str(found.record.ip) == address

        await ask(str(taken))
        await until("it is told who has it", lambda: any("held by db" in each.what for each in one.problems))
        assert await leased(client, "web")
        await ask(FREE)
        await until("it has what it asks for", lambda: has(FREE))
        assert audit(await table(client)) == ()


async def test_a_lost_kv_grows_back_at_once_the_same_with_higher_epochs(own_consul: ConsulUnderTest) -> None:
    config = own_consul.config()
    async with ConsulClient(config) as client, dnsd(config) as one:
        watched = KvWatch(client, SERVICE_PREFIX)
        one.keeping.follow(watched)
        running = asyncio.ensure_future(watched.run())
        try:
            names = [f"s{number}" for number in range(50)]
            await register(client, *names)
            await until("leased", lambda: leased(client, *names))
            before = (await table(client)).leases
            await until("the watch has seen them", lambda: len(watched.latest.pairs) == 50)  # type: ignore[union-attr]
            await client.kv_delete("ztna/vip/", recurse=True)
            assert await until("all are back", lambda: leased(client, *names)) < 10.0
            after = await table(client)
            for name, stored in before.items():
                assert after.leases[name].record.ip == stored.record.ip
                assert after.leases[name].record.epoch > stored.record.epoch
            assert audit(after) == ()
        finally:
            running.cancel()


async def test_a_pool_shrinks_and_grows_while_the_keeper_works(own_consul: ConsulUnderTest) -> None:
    config = own_consul.config()
    async with ConsulClient(config) as client, dnsd(config) as one:
        names = [f"s{number}" for number in range(6)]
        await register(client, *names)
        await until("leased", lambda: leased(client, *names))
        before = (await table(client)).leases
        small = Pool(IPv4Network("127.101.0.0/29"))
        one.keeping.change_rules(Rules(small, 300.0, 3600.0))
        await until("all are reported", lambda: {each.kind for each in one.problems} == {"outside_pool"})
        assert (await table(client)).leases == before
        await register(client, "new")
        await until("a new one is inside", lambda: leased(client, "new"))
        assert (await table(client)).leases[ServiceName("new")].record.ip in small
        assert (await call(own_consul, "move", "s3"))[0] == 0
        assert (await table(client)).leases[ServiceName("s3")].record.ip in small
        grown = Pool(IPv4Network("127.101.0.0/29"), more=[IPv4Network("127.100.0.0/24")])
        one.keeping.change_rules(Rules(grown, 300.0, 3600.0))
        await until("nothing is outside any more", lambda: one.problems == ())


async def test_a_registry_that_is_suddenly_empty_empties_no_table(own_consul: ConsulUnderTest) -> None:
    config = own_consul.config()
    async with ConsulClient(config) as client, dnsd(config, grace_s=3.0) as one:
        await register(client, "web", "db")
        await until("leased", lambda: leased(client, "web", "db"))
        before = (await table(client)).leases
        for name in ("web", "db"):
            await client.deregister_service(f"{name}@c1")
        await until("it is told", lambda: any(each.kind == "catalog_empty" for each in one.problems))
        await register(client, "web", "db")
        await until("all is well", lambda: one.problems == ())
        assert (await table(client)).leases == before


@pytest.fixture
def operator(acl_consul: ConsulUnderTest) -> Iterator[str]:
    """A token with the operator's documented policy."""
    yield acl_consul.token_for("operator.hcl")


@pytest.mark.real_consul
async def test_the_policies_of_operator_and_dnsd_are_enough(
    acl_consul: ConsulUnderTest, operator: str, unique: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ZTNA_CONSUL_TOKEN", operator)
    async with (
        ConsulClient(acl_consul.config()) as client,
        dnsd(acl_consul.config(acl_consul.token_for("dnsd.hcl"))),
    ):
        await register(client, unique)
        await until("leased", lambda: leased(client, unique))
        status, told = await call(acl_consul, "pin", unique)
        assert (status, "is pinned to" in told) == (0, True)
        assert (await call(acl_consul, "unpin", unique))[0] == 0
        await client.deregister_service(f"{unique}@c1")
