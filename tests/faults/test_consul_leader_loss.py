"""Three real Consul servers lose their leader while 2,000 services get their leases: none twice, none lost."""

from __future__ import annotations

import asyncio
import subprocess
import time
from collections.abc import Awaitable, Callable, Iterator
from ipaddress import IPv4Network
from itertools import pairwise
from pathlib import Path
from typing import TypeVar

import pytest

from tests.support.consul import REAL_KINDS, note_version
from tests.support.consul_cluster import Cluster, Server
from ztna import config as configuration
from ztna.catalog import KvPair, Registration
from ztna.cli.processes import console_script
from ztna.config import Config, DnsdConfig, Endpoint, PoolConfig
from ztna.consul.client import ConsulClient
from ztna.errors import ConsulError, ConsulUnavailable
from ztna.leases import VIP_PREFIX, Lease, Table, audit, read_table
from ztna.names import ServiceName

pytestmark = [pytest.mark.real_consul, pytest.mark.slow, pytest.mark.timeout(240)]

SERVICES = 2_000
LEASED_BEFORE_THE_LOSS = 300
REGISTRATIONS_AT_ONCE = 16
DEADLINE_SECONDS = 120.0
POLL_SECONDS = 0.2
"""The whole table is read each time, which must not be what keeps Consul busy."""
POOL = IPv4Network("127.100.0.0/20")


@pytest.fixture(params=REAL_KINDS)
def cluster(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Cluster]:
    note_version(request, request.param)
    made = Cluster(request.param, tmp_path)
    try:
        made.start()
        yield made
    finally:
        made.stop()


@pytest.fixture
def dnsds(tmp_path: Path) -> Iterator[Callable[[Server], None]]:
    """Start a ztna-dnsd beside a server; all are ended with the test."""
    processes: list[subprocess.Popen[bytes]] = []

    def start(server: Server) -> None:
        anywhere = Endpoint("127.0.0.1", 0)
        section = DnsdConfig(listen=anywhere, admin=anywhere, pool=PoolConfig(cidr=POOL))
        file = tmp_path / f"dnsd-{server.number}.yaml"
        file.write_text(configuration.dump(Config(consul=server.config, dnsd=section)))
        argv = [console_script("ztna-dnsd"), "--config", str(file)]
        with (tmp_path / f"dnsd-{server.number}.log").open("wb") as log:
            processes.append(subprocess.Popen(argv, stdout=log, stderr=log))

    yield start
    for process in processes:
        process.terminate()
    for process in processes:
        process.wait(15)


@pytest.mark.parametrize("keeper_at_the_leader", [True, False], ids=["keeper-at-leader", "keeper-elsewhere"])
async def test_two_thousand_leases_while_the_leader_is_lost(
    cluster: Cluster, dnsds: Callable[[Server], None], keeper_at_the_leader: bool
) -> None:
    leader = await asyncio.to_thread(cluster.leader)
    followers = [server for server in cluster.servers if server is not leader]
    first, second = (leader, followers[0]) if keeper_at_the_leader else (followers[0], followers[1])
    names = [f"service-{number:04}" for number in range(SERVICES)]
    async with ConsulClient(followers[1].config) as client, asyncio.TaskGroup() as tasks:
        dnsds(first)
        await until("the first dnsd keeps the leases", lambda: is_kept(client))
        dnsds(second)
        tasks.create_task(register(client, names))
        before = await until("some are leased", lambda: at_least(client, LEASED_BEFORE_THE_LOSS))
        assert len(before.leases) < SERVICES, "the leader must be lost amid the allocations"
        leader.kill()
        seen = [before]

        async def all_are_leased() -> bool:
            seen.append(await table(client))
            return len(seen[-1].leases) == SERVICES

        await until("every service is leased", all_are_leased)
    for earlier, later in pairwise(seen):
        kept = {name: stored.record for name, stored in later.leases.items()}
        lost = [name for name, stored in earlier.leases.items() if kept.get(name) != stored.record]
        assert lost == [], "a lease that was there is gone or another"
    assert audit(seen[-1]) == ()
    assert len({stored.record.ip for stored in seen[-1].leases.values()}) == SERVICES

    # The server that was lost comes back and holds the very same table.
    cluster.start(leader)
    await asyncio.to_thread(cluster.leader)
    async with ConsulClient(leader.config) as client:

        async def is_the_same() -> bool:
            return records(await table(client)) == records(seen[-1])

        await until("the lost server has it all", is_the_same)


async def register(client: ConsulClient, names: list[str]) -> None:
    """Register every name at one server, which answers for its own agent also while there is no leader."""
    waiting = iter(names)

    async def register_next() -> None:
        for name in waiting:
            wanted = Registration(
                service=name,
                instance_id=f"{name}@c1",
                address="127.0.0.1",
                port=4435,
                meta={"ztna-connector": "c1", "ztna-ports": "tcp:8080"},
            )
            while True:
                try:
                    await client.register_service(wanted)
                except ConsulUnavailable:
                    await asyncio.sleep(0.05)  # there is no leader for a moment
                else:
                    break

    async with asyncio.TaskGroup() as tasks:
        for _ in range(REGISTRATIONS_AT_ONCE):
            tasks.create_task(register_next())


T = TypeVar("T")


async def until(what: str, condition: Callable[[], Awaitable[T | None]]) -> T:
    """Wait for something of other processes' doing; what Consul cannot answer just now is asked again."""
    end = time.monotonic() + DEADLINE_SECONDS
    while True:
        try:
            found = await condition()
        except ConsulError:
            found = None
        if found:
            return found
        assert time.monotonic() < end, what
        await asyncio.sleep(POLL_SECONDS)


async def table(client: ConsulClient) -> Table:
    pairs = await client.kv_list(VIP_PREFIX, consistent=True)
    return read_table({pair.key: pair for pair in pairs})


async def at_least(client: ConsulClient, count: int) -> Table | None:
    found = await table(client)
    return found if len(found.leases) >= count else None


async def is_kept(client: ConsulClient) -> bool:
    pair: KvPair | None = await client.kv_get("ztna/vip/keeper", consistent=True)
    return pair is not None and pair.session is not None


def records(found: Table) -> dict[ServiceName, Lease]:
    return {name: stored.record for name, stored in found.leases.items()}
