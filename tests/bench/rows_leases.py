"""How soon 5,000 services that come at once have addresses, and one more has a name; on a real Consul.

`row` measures the storm, `change_row` how soon DNS and a relay know what the catalog says.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import tempfile
import time
import urllib.request
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator, Sequence
from dataclasses import dataclass
from ipaddress import IPv4Network
from pathlib import Path
from statistics import median, quantiles
from typing import Any

from tests.bench.harness import (
    CannotMeasure,
    Contender,
    Figures,
    Measure,
    Row,
    accepts,
    free_port,
    running,
    wait_until,
)
from tests.support.consul import NEWEST, peers_folder
from tests.support.relay import running_relay
from ztna import config as configuration
from ztna.catalog import CheckDefinition, Registration
from ztna.cli.mesh import dev_consul_argv
from ztna.cli.processes import console_script
from ztna.config import Config, ConsulConfig, DnsdConfig, Endpoint, PoolConfig
from ztna.consul.client import ConsulClient
from ztna.errors import ResolverUnavailable
from ztna.leases import SERVICE_PREFIX, VIP_PREFIX, audit, read_table
from ztna.names import ServiceName, Zone
from ztna.resolver import Resolver

SERVICES = 5_000
POOL = IPv4Network("10.100.0.0/19")
"""8,190 addresses."""
NEWCOMERS = 20
FLIPS = 50
RELAY_FLIPS = 10
"""Fewer, as each takes most of a TTL: it comes just after the relay has asked."""
SERVICES_OF_FLIPS = 1_000
ANSWER_SECONDS = 30.0
STORM_SECONDS = 240.0
REGISTRATIONS_AT_ONCE = 16
POLL_SECONDS = 0.01
DOMAIN = Zone("ztna.local")
TTL_SECONDS = DnsdConfig().ttl_s
CHECKED, CONNECTOR = "checked", "c"


def row(directory: Path) -> Row:
    """Return the row of the storm; everything is written under `directory`."""
    return Row(
        f"leases: {SERVICES:,} services at once, pool of 8,190, Consul {NEWEST}",
        "> 1,000 leases/s, no duplicate, no failure; one new service named within 500 ms",
        [Contender("ztna-dnsd", lambda: _on_consul(directory / "leases", storm))],
    )


def change_row(directory: Path) -> Row:
    """Return the row of a check that flips; everything is written under `directory`."""
    return Row(
        f"catalog change to DNS answer and to the relay, {SERVICES_OF_FLIPS:,} services, Consul {NEWEST}",
        f"p99 < 1 s by DNS; the relay, which is not told, within one TTL of SRV ({TTL_SECONDS} s)",
        [Contender("ztna-dnsd", lambda: _on_consul(directory / "change", flips))],
    )


@dataclass
class Bench:
    """A running Consul, and how to start a dnsd on it."""

    folder: Path
    consul: ConsulConfig

    @contextlib.contextmanager
    def dnsd(self) -> Iterator[Endpoint]:
        """Run a ztna-dnsd and yield where it answers."""
        port = free_port()
        section = DnsdConfig(
            listen=Endpoint("127.0.0.1", port),
            admin=Endpoint("127.0.0.1", free_port()),
            pool=PoolConfig(cidr=POOL),
        )
        file = self.folder / "dnsd.yaml"
        file.write_text(configuration.dump(Config(consul=self.consul, dnsd=section)))
        with running([console_script("ztna-dnsd"), "--config", str(file)], self.folder / "dnsd.log"):
            wait_until("ztna-dnsd", lambda: accepts(port))
            yield section.listen


@contextlib.contextmanager
def _on_consul(folder: Path, measure: Callable[[Bench], Coroutine[Any, Any, Figures]]) -> Iterator[Measure]:
    """Give each measurement a fresh Consul of its own."""
    binary = peers_folder() / f"consul-{NEWEST}"
    if not binary.exists():
        raise CannotMeasure("no Consul: run `make peers`")
    folder.mkdir()

    def once() -> Figures:
        http = free_port()
        argv = dev_consul_argv(str(binary), NEWEST, http, free_port(), free_port())
        with running(argv, folder / "consul.log"):
            api = f"http://127.0.0.1:{http}"
            wait_until("Consul", lambda: _get(f"{api}/v1/status/leader") not in (None, ""))
            return asyncio.run(measure(Bench(folder, ConsulConfig(address=api))))

    yield once


def _get(url: str) -> object:
    with urllib.request.urlopen(url, timeout=2) as answer:
        return json.load(answer)


async def storm(bench: Bench) -> Figures:
    """Register them all, then let a dnsd find them; and one after the other with it running."""
    names = [f"service-{number:04}" for number in range(SERVICES)]
    async with ConsulClient(bench.consul) as client:
        await register(client, names)
        with bench.dnsd() as listening:
            resolver = Resolver([listening], timeout_s=2.0)
            await until(lambda: at_least(client, 1), STORM_SECONDS)
            started, already = time.monotonic(), len(await leased(client))
            await until(lambda: at_least(client, SERVICES), STORM_SECONDS)
            took = time.monotonic() - started
            delays = [await named_in(client, resolver, f"newcomer-{n}") for n in range(NEWCOMERS)]
            pairs = {pair.key: pair for pair in await client.kv_list(VIP_PREFIX, consistent=True)}
            broken = audit(read_table(pairs))
    if broken:
        raise CannotMeasure(f"the table is broken: {broken[:3]}")
    return {
        "leases/s": (SERVICES - already) / took,
        "new name p50 ms": median(delays) * 1e3,
        "new name max ms": max(delays) * 1e3,
    }


async def named_in(client: ConsulClient, resolver: Resolver, name: str) -> float:
    """Register one more service; return after how many seconds its name has an address."""
    started = time.monotonic()
    await client.register_service(registration(name))

    async def has_lease() -> bool:
        return bool((await resolver.srv(f"_{name}._tcp.{DOMAIN}")).records)

    await until(has_lease, ANSWER_SECONDS)
    return time.monotonic() - started


async def flips(bench: Bench) -> Figures:
    """Turn a check to critical and back, and see how soon the service's SRV follows, and how soon a relay."""
    names = [f"service-{number:04}" for number in range(SERVICES_OF_FLIPS)]
    async with ConsulClient(bench.consul) as client:
        await register(client, names)
        with bench.dnsd() as listening:
            resolver = Resolver([listening], timeout_s=2.0)
            await until(lambda: at_least(client, SERVICES_OF_FLIPS), STORM_SECONDS)
            check = CheckDefinition(check_id="flip", name="flip", ttl_s=600.0)
            await client.register_service(registration(CHECKED, check))

            async def has_records() -> bool:
                return bool((await resolver.srv(f"{CHECKED}.{DOMAIN}")).records)

            by_dns = [await flip(client, number % 2 == 0, has_records) for number in range(FLIPS)]
            async with following_relay(bench.folder, listening) as has_connectors:
                by_relay = [
                    await flip(client, number % 2 == 0, has_connectors) for number in range(RELAY_FLIPS)
                ]
    cuts = quantiles(by_dns, n=100, method="inclusive")
    return {
        "p50 ms": cuts[49] * 1e3,
        "p99 ms": cuts[98] * 1e3,
        "relay p50 ms": median(by_relay) * 1e3,
        "relay max ms": max(by_relay) * 1e3,
    }


async def flip(client: ConsulClient, passing: bool, is_served: Callable[[], Awaitable[bool]]) -> float:
    """Set the check; return after how many seconds it is known."""
    started = time.monotonic()
    await client.update_check("flip", "passing" if passing else "critical")

    async def is_known() -> bool:
        return await is_served() is passing

    await until(is_known, ANSWER_SECONDS)
    return time.monotonic() - started


@contextlib.asynccontextmanager
async def following_relay(folder: Path, resolver: Endpoint) -> AsyncIterator[Callable[[], Awaitable[bool]]]:
    """Run a relay in this process; yields what says whether it knows connectors in DNS for the checked service.

    A connector has registered there, so that the relay asks for its name; nobody tells it of changes.
    """
    with tempfile.TemporaryDirectory(dir=folder) as directory:
        async with running_relay(Path(directory), resolvers=(resolver,)) as running:
            await running.connector(CONNECTOR, (ServiceName(CHECKED),))

            async def has_connectors() -> bool:
                services: Any = running.relay.puller.status()["services"]
                return bool(services.get(CHECKED, {}).get("connectors"))

            yield has_connectors


def registration(name: str, *checks: CheckDefinition) -> Registration:
    """Return a service of one instance."""
    return Registration(
        service=name,
        instance_id=f"{name}@{CONNECTOR}",
        address="192.0.2.1",
        port=4435,
        meta={"ztna-connector": CONNECTOR, "ztna-ports": "tcp:8080"},
        checks=checks,
    )


async def register(client: ConsulClient, names: Sequence[str]) -> None:
    """Register every name, several at once."""
    waiting = iter(names)

    async def register_next() -> None:
        for name in waiting:
            await client.register_service(registration(name))

    async with asyncio.TaskGroup() as tasks:
        for _ in range(REGISTRATIONS_AT_ONCE):
            tasks.create_task(register_next())


async def leased(client: ConsulClient) -> Sequence[str]:
    """Return the keys of all leases, without their values."""
    found = await client.read(f"/v1/kv/{SERVICE_PREFIX}", [("keys", "1")], shape=list[str])
    return found.data or []


async def at_least(client: ConsulClient, count: int) -> bool:
    """Whether so many services have leases."""
    return len(await leased(client)) >= count


async def until(condition: Callable[[], Awaitable[bool]], seconds: float) -> None:
    """Ask until it is so; CannotMeasure when it is not in time."""
    end = time.monotonic() + seconds
    while True:
        with contextlib.suppress(ResolverUnavailable):
            if await condition():
                return
        if time.monotonic() > end:
            raise CannotMeasure(f"not within {seconds:.0f} s")
        await asyncio.sleep(POLL_SECONDS)
