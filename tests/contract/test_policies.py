"""The policies of docs/policies, file by file, on real Consuls that deny everything else (design.md 4)."""

from __future__ import annotations

import asyncio
import os
import re
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.support.consul import POLICIES, ConsulUnderTest
from ztna.catalog import CheckDefinition, KvCheckSession, KvSet, Registration
from ztna.cli.examine import rights
from ztna.config import Config, ConnectorConfig, ConsulConfig, DnsdConfig, Endpoint, RouteConfig, TlsConfig
from ztna.consul.client import ConsulClient, Right
from ztna.errors import ConsulAclsOff, ConsulForbidden
from ztna.names import ConnectorId, ServiceName

APPEAR_SECONDS = 10.0
LEASE = "ztna/vip/service/web-app"
HOLDING = "ztna/vip/ip/10.100.0.2"
KEEPER = "ztna/vip/keeper"
CONFIG = Config(
    dnsd=DnsdConfig(),
    connector=ConnectorConfig(
        id=ConnectorId("alpha"),
        tls=TlsConfig(certificate="x", key="x", ca="x"),
        routes=tuple(
            RouteConfig(service=ServiceName(name), backend=Endpoint("127.0.0.1", 9), port=80)
            for name in ("echo-service", "web-app", "db")
        ),
    ),
)
READS = (
    Right("service", "any", "read"),
    Right("node", "any", "read"),
    Right("key", LEASE, "read"),
    Right("key", "ztna/schema", "read"),
)
NEEDS: dict[str, Sequence[Right]] = {
    "dnsd": rights(CONFIG, "dnsd"),
    "dnsd-readonly": rights(Config(dnsd=DnsdConfig(keeper=False)), "dnsd"),
    "connector": rights(CONFIG, "connector"),
    "connector-consul-checks": (Right("agent", "any", "read"), Right("node", "any", "read")),
    "agent": (*rights(CONFIG, "agent"), Right("key", "ztna/conflict/laptop-1", "write")),
    "operator": (
        *READS,
        Right("key", "ztna/vip/wish/web-app", "write"),
        Right("key", "ztna/conflict/laptop-1", "read"),
    ),
}
"""What each daemon does with its token, as the tests here do it and as the doctor asks."""
RULE = re.compile(r'^\w+ "[^"]*" \{.*?^\}$', re.MULTILINE | re.DOTALL)


def client(consul: ConsulUnderTest, policy: str) -> ConsulClient:
    return ConsulClient(consul.config(consul.token_for(f"{policy}.hcl")))


def rule(kind: str, name: str) -> str:
    """Return a pattern for the rule that a 403 has to name."""
    return re.escape(f'{kind} "{name}" {{ policy = "write" }}')


def registration(service: str, unique: str) -> Registration:
    instance_id = f"{service}@{unique}"
    check = CheckDefinition(check_id=f"{instance_id}:ttl", name="backend", ttl_s=60, status="passing")
    return Registration(
        service=service, instance_id=instance_id, address="127.0.0.1", port=4435, checks=(check,)
    )


async def appears(reader: ConsulClient, service: str, instance_id: str) -> None:
    """Wait for the agent's sync with the catalog, which is Consul's own clock."""
    end = time.monotonic() + APPEAR_SECONDS
    while instance_id not in {each.instance_id for each in await reader.service_instances(service)}:
        assert time.monotonic() < end, f"{instance_id} does not appear"
        await asyncio.sleep(0.05)


async def test_a_connector_serves_its_services_and_everyone_sees_them(
    acl_consul: ConsulUnderTest, unique: str
) -> None:
    async with client(acl_consul, "connector") as connector:
        for service in ("echo-service", "web-app", "db"):
            made = registration(service, unique)
            await connector.register_service(made)
            assert await connector.update_check(made.checks[0].check_id, "passing", "ok")
            for policy in ("dnsd", "dnsd-readonly", "agent", "operator"):
                async with client(acl_consul, policy) as reader:
                    await appears(reader, service, made.instance_id)
            assert made.instance_id in await connector.agent_services()
            await connector.deregister_service(made.instance_id)


async def test_what_was_reaped_is_told_apart_from_a_consul_that_fails(
    acl_consul: ConsulUnderTest, unique: str
) -> None:
    """With ACLs on, 1.8 says it in other words than without."""
    async with client(acl_consul, "connector") as connector:
        assert not await connector.update_check(f"web-app@{unique}:ttl", "passing")
        assert not await connector.deregister_service(f"web-app@{unique}")


async def test_a_connector_can_register_no_other_name(acl_consul: ConsulUnderTest, unique: str) -> None:
    async with client(acl_consul, "connector") as connector:
        with pytest.raises(ConsulForbidden, match=rule("service", "billing")):
            await connector.register_service(registration("billing", unique))


async def test_a_connector_can_touch_no_other_services_check(
    acl_consul: ConsulUnderTest, unique: str
) -> None:
    made = registration(f"billing-{unique}", unique)
    async with (
        ConsulClient(acl_consul.config()) as operator,
        client(acl_consul, "connector") as connector,
    ):
        await operator.register_service(made)
        with pytest.raises(ConsulForbidden):
            await connector.update_check(made.checks[0].check_id, "critical", "mine now")
        with pytest.raises(ConsulForbidden):
            await connector.deregister_service(made.instance_id)
        await operator.deregister_service(made.instance_id)


@pytest.mark.parametrize("policy", ["connector", "agent", "dnsd-readonly", "operator"])
@pytest.mark.parametrize("key", [LEASE, HOLDING, KEEPER])
async def test_only_the_keeper_writes_leases(acl_consul: ConsulUnderTest, policy: str, key: str) -> None:
    named = rule("key", key)
    async with client(acl_consul, policy) as holder:
        with pytest.raises(ConsulForbidden, match=named):
            await holder.kv_put(key, b"{}")
        with pytest.raises(ConsulForbidden, match=named):
            await holder.kv_delete(key)
        with pytest.raises(ConsulForbidden, match=named):
            await holder.txn([KvSet(key, b"{}", 0)])


@pytest.mark.parametrize("policy", ["connector", "agent", "dnsd-readonly", "operator"])
async def test_everyone_reads_leases(acl_consul: ConsulUnderTest, policy: str, unique: str) -> None:
    key = f"ztna/vip/service/{unique}"
    async with client(acl_consul, "dnsd") as keeper, client(acl_consul, policy) as reader:
        assert await keeper.kv_put(key, b"lease")
        found = await reader.kv_get(key)
        assert found is not None
        assert found.value == b"lease"
        assert key in {pair.key for pair in await reader.kv_list("ztna/vip/service/")}
        assert await keeper.kv_delete(key)


async def test_the_keeper_locks_and_writes_in_a_checked_transaction(
    acl_consul: ConsulUnderTest, unique: str
) -> None:
    lock = f"ztna/vip/{unique}"
    async with client(acl_consul, "dnsd") as keeper:
        session = await keeper.session_create("keeper", ttl_s=10, lock_delay_s=0)
        assert await keeper.kv_put(lock, b"", acquire=session)
        outcome = await keeper.txn(
            [KvCheckSession(lock, session), KvSet(f"{lock}/service", b"1", 0), KvSet(f"{lock}/ip", b"1", 0)]
        )
        assert outcome.ok
        assert await keeper.session_renew(session)
        await keeper.session_destroy(session)
        assert await keeper.kv_delete(lock, recurse=True)
        assert await keeper.kv_put("ztna/schema", b"1")


async def test_an_agent_reports_its_own_conflict_only(acl_consul: ConsulUnderTest) -> None:
    async with client(acl_consul, "agent") as agent:
        session = await agent.session_create("laptop-1", ttl_s=10, behavior="delete", lock_delay_s=0)
        assert await agent.kv_put("ztna/conflict/laptop-1", b"{}", acquire=session)
        with pytest.raises(ConsulForbidden, match='key "ztna/conflict/laptop-2"'):
            await agent.kv_put("ztna/conflict/laptop-2", b"{}", acquire=session)
        await agent.session_destroy(session)


async def test_an_operator_wishes_and_writes_nothing_else(acl_consul: ConsulUnderTest, unique: str) -> None:
    wish = f"ztna/vip/wish/{unique}"
    async with client(acl_consul, "operator") as operator:
        assert await operator.kv_put(wish, b"{}")
        assert await operator.kv_delete(wish)
        with pytest.raises(ConsulForbidden):
            await operator.session_create("x", ttl_s=10)


async def test_a_token_that_consul_does_not_know_is_named_as_such(acl_consul: ConsulUnderTest) -> None:
    unknown = "11111111-2222-3333-4444-555555555555"
    async with ConsulClient(acl_consul.config(unknown)) as stranger:
        with pytest.raises(ConsulForbidden, match="does not know the ACL token"):
            await stranger.kv_put("ztna/vip/x", b"")


async def test_without_a_token_the_missing_rule_is_named(acl_consul: ConsulUnderTest) -> None:
    with pytest.raises(ConsulForbidden, match=rule("session_prefix", "")):
        async with ConsulClient(acl_consul.config("anonymous")) as nobody:
            await nobody.session_create("x", ttl_s=10)


async def test_a_token_file_is_read_again_when_it_changes(
    acl_consul: ConsulUnderTest, tmp_path: Path, unique: str
) -> None:
    file = tmp_path / "token"
    file.write_text(acl_consul.token_for("connector.hcl") + "\n")
    config = ConsulConfig(address=acl_consul.address, token_file=str(file))
    async with ConsulClient(config) as changing:
        with pytest.raises(ConsulForbidden):
            await changing.kv_put(f"ztna/vip/{unique}", b"")
        fresh = tmp_path / "new"
        fresh.write_text(acl_consul.token_for("dnsd.hcl"))
        os.replace(fresh, file)
        assert await changing.kv_put(f"ztna/vip/{unique}", b"")


def test_every_policy_file_is_tested_here() -> None:
    assert {file.stem for file in POLICIES.glob("*.hcl")} == NEEDS.keys()


@pytest.mark.parametrize("policy", NEEDS)
async def test_a_policy_is_the_smallest_that_is_enough(
    acl_consul: ConsulUnderTest, tmp_path: Path, policy: str
) -> None:
    """With all its rules everything may be done, and without any of them, or with less of it, something not."""
    wanted, text = NEEDS[policy], (POLICIES / f"{policy}.hcl").read_text()
    rules = RULE.findall(text)
    assert len(rules) == text.count("{")

    async def lacking(left: str) -> list[Right]:
        file = tmp_path / f"{policy}.hcl"
        file.write_text(left)
        async with ConsulClient(acl_consul.config(acl_consul.token_for(file))) as holder:
            return [right for right, has in zip(wanted, await holder.may(wanted), strict=True) if not has]

    assert await lacking(text) == []
    for each in rules:
        assert await lacking(text.replace(each, "")), f"nobody needs {each}"
        if '"write"' in each:
            assert await lacking(text.replace(each, each.replace('"write"', '"read"'))), (
                f"to read is enough: {each}"
            )


@pytest.mark.parametrize("daemon", ["dnsd", "connector", "agent"])
async def test_the_doctor_asks_for_what_the_policy_gives_and_misses_it_in_others(
    acl_consul: ConsulUnderTest, daemon: str
) -> None:
    wanted = rights(CONFIG, daemon)
    async with client(acl_consul, daemon) as sound:
        assert await sound.may(wanted) == (True,) * len(wanted)
    async with ConsulClient(acl_consul.config("")) as anonymous:
        assert not any(await anonymous.may(wanted))


async def test_a_consul_without_acls_says_so_and_tells_the_time(consul: ConsulUnderTest) -> None:
    async with ConsulClient(consul.config()) as plain:
        with pytest.raises(ConsulAclsOff):
            await plain.may([Right("key", "x", "read")])
        assert abs(await plain.clock() - time.time()) < 5
