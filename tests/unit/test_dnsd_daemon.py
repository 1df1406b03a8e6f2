"""ztna-dnsd whole, on an embedded Consul: what it serves, what it shows, and how it starts and ends."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from ipaddress import IPv4Network, IPv6Network
from pathlib import Path
from typing import Any

import pytest

import dnsd.daemon
import dnsd.serving
from dnsd.answer import Answers
from dnsd.daemon import run
from dnsd.server import Server
from dnsd.zone import Settings as ZoneSettings
from tests.support.consul import ConsulUnderTest, free_ports
from tests.support.dns import POOL, lease, zone
from tests.support.dns_serving import serving
from ztna import config as configuration
from ztna.catalog import Registration
from ztna.config import Config, ConsulConfig, DnsdConfig, Endpoint, PoolConfig
from ztna.consul.client import ConsulClient
from ztna.dns import Code, Type, decode, encode_query
from ztna.errors import ConfigError, ResolverUnavailable, ZtnaError
from ztna.names import Zone
from ztna.resolver import Resolver
from ztna.runtime import Daemon

DEADLINE_SECONDS = 30.0


@pytest.fixture
def consul(tmp_path: Path) -> Iterator[ConsulUnderTest]:
    server = ConsulUnderTest("embedded", tmp_path)
    yield server
    server.stop()


class Running:
    def __init__(self, daemon: Daemon, port: int) -> None:
        self.daemon = daemon
        self.port = port
        self.resolver = Resolver([Endpoint("127.0.0.1", port)], 2.0)

    async def ask(self, name: str, kind: Type) -> object:
        """Ask over UDP; return the message as ztna.dns reads it."""
        loop = asyncio.get_running_loop()
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            sock.setblocking(False)
            sock.connect(("127.0.0.1", self.port))
            sock.send(encode_query(1, name, kind, 1232))
            async with asyncio.timeout(5):
                return decode(await loop.sock_recv(sock, 4096))


def settings(consul: ConsulConfig, port: int, **keys: object) -> Config:
    pool = PoolConfig(cidr=IPv4Network("127.100.0.0/29"))
    section = DnsdConfig(
        listen=Endpoint("127.0.0.1", port),
        admin=Endpoint("127.0.0.1", 0),
        **({"pool": pool} | keys),  # type: ignore[arg-type]
    )
    return Config(consul=consul, dnsd=section)


@asynccontextmanager
async def running(consul: ConsulConfig, **keys: object) -> AsyncIterator[Running]:
    (port,) = free_ports(1)
    async with asyncio.TaskGroup() as tasks:
        daemon = Daemon("ztna-dnsd", settings(consul, port, **keys), tasks)
        task = tasks.create_task(run(daemon))
        await asyncio.sleep(0)
        if "snapshot" not in keys:
            workers = {"workers"} if "workers" in keys else set()
            assert set(daemon.readiness.report()["awaiting"]) == {"catalog", "leases"} | workers
        yield Running(daemon, port)
        daemon.stopping.set()
        async with asyncio.timeout(5):
            await task


async def until(what: str, condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + DEADLINE_SECONDS
    while True:
        found = condition()
        if asyncio.iscoroutine(found):
            found = await found
        if found:
            return
        assert time.monotonic() < deadline, what
        await asyncio.sleep(0.02)


async def register(
    consul: ConsulUnderTest, *names: str, ports: str = "tcp:8080", connector: str = "c1"
) -> None:
    async with ConsulClient(consul.config()) as client:
        for name in names:
            await client.register_service(
                Registration(
                    service=name,
                    instance_id=f"{name}@{connector}",
                    address="127.0.0.1",
                    port=4435,
                    meta={"ztna-connector": connector, "ztna-ports": ports},
                )
            )


async def has(here: Running, name: str) -> bool:
    with contextlib.suppress(ResolverUnavailable):
        return not (await here.resolver.srv(f"_{name}._tcp.ztna.local")).negative
    return False


async def test_a_registered_service_is_leased_and_served(consul: ConsulUnderTest) -> None:
    async with running(consul.config()) as here:
        await until("ready", lambda: here.daemon.readiness.ready)
        await register(consul, "web")
        await until("served", lambda: has(here, "web"))
        program = await here.resolver.srv("_web._tcp.ztna.local")
        relay = await here.resolver.srv("web.ztna.local")
        assert (program.records[0].port, relay.records[0].port) == (8080, 4435)
        assert relay.records[0].addresses == ("127.0.0.1",)
        (confirmed,) = (await here.resolver.txt("_fresh.ztna.local")).strings
        assert abs(int(confirmed) - time.time()) < 60
        dns, keeper = (here.daemon.status_sources[name]() for name in ("dns", "keeper"))
        assert (dns["services"], dns["leases"], dns["stale"]) == (1, 1, False)  # type: ignore[index]
        assert keeper == {"elected": True, "trouble": None, "problems": {}}


async def test_what_stands_in_the_way_is_shown_and_taken_back(
    consul: ConsulUnderTest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dnsd.daemon, "TICK_SECONDS", 0.05)
    names = [f"s{n}" for n in range(7)]
    await register(consul, *names)
    async with running(consul.config()) as here:

        def warnings() -> dict[str, str]:
            return here.daemon.readiness.report()["warnings"]

        await until("exhausted", lambda: "no virtual address left" in warnings().get("services", ""))
        await register(consul, "s0", ports="tcp:9", connector="c2")
        await until("two problems", lambda: "disagree" in warnings().get("services", ""))
        async with ConsulClient(consul.config()) as client:
            await client.deregister_service("s0@c2")
            left = list(here.daemon.status_sources["keeper"]()["problems"])  # type: ignore[index]
            for name in left:
                await client.deregister_service(f"{name}@c1")
        await until("taken back", lambda: "services" not in warnings())


async def test_names_outlive_consul_are_marked_stale_and_end(
    consul: ConsulUnderTest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dnsd.daemon, "TICK_SECONDS", 0.05)
    await register(consul, "web")
    async with running(consul.config()) as here:
        await until("served", lambda: has(here, "web"))
        assert not (await here.ask("web.ztna.local", Type.A)).stale  # type: ignore[attr-defined]
        await asyncio.to_thread(consul.stop)
        monkeypatch.setattr(dnsd.serving, "STALE_AFTER_SECONDS", 0.0)

        async def stale() -> bool:
            return (await here.ask("web.ztna.local", Type.A)).stale  # type: ignore[attr-defined, no-any-return]

        await until("stale", stale)
        assert (await here.resolver.srv("web.ztna.local")).stale
        await until("told", lambda: "consul" in here.daemon.readiness.report()["warnings"])
        monkeypatch.setattr(dnsd.serving, "STALE_SECONDS_MAX", 0.0)

        async def ended() -> bool:
            return (await here.ask("web.ztna.local", Type.A)).code == Code.SERVFAIL  # type: ignore[attr-defined]

        await until("not served any more", ended)
        monkeypatch.setattr(dnsd.serving, "STALE_AFTER_SECONDS", 60.0)
        monkeypatch.setattr(dnsd.serving, "STALE_SECONDS_MAX", 86_400.0)
        await asyncio.to_thread(consul.start)
        await until("back without a restart", lambda: has(here, "web"))


async def test_names_outlive_a_restart_without_consul(
    consul: ConsulUnderTest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(dnsd.daemon, "TICK_SECONDS", 0.05)
    file = tmp_path / "names"
    await register(consul, "web")
    async with running(consul.config(), snapshot=str(file), ttl_s=300) as here:
        await until("served", lambda: has(here, "web"))
        assert (await here.ask("web.ztna.local", Type.A)).answers[0].ttl_s == 300  # type: ignore[attr-defined]
        serial = here.daemon.status_sources["dns"]()["serial"]  # type: ignore[index]
    await asyncio.to_thread(consul.stop)
    async with running(consul.config(), snapshot=str(file), ttl_s=300) as here:
        answer = await here.ask("web.ztna.local", Type.A)
        assert (answer.stale, answer.answers[0].ttl_s) == (True, 5)  # type: ignore[attr-defined]
        assert here.daemon.readiness.ready
        assert here.daemon.status_sources["dns"]()["serial"] >= serial  # type: ignore[index]
        await until("told", lambda: "names" in here.daemon.readiness.report()["warnings"])
        await until("why", lambda: "consul" in here.daemon.readiness.report()["warnings"])
        await asyncio.to_thread(consul.start)

        async def confirmed() -> bool:
            return not (await here.ask("web.ztna.local", Type.A)).stale  # type: ignore[attr-defined, no-any-return]

        await until("confirmed again", confirmed)
        await until("taken back", lambda: "names" not in here.daemon.readiness.report()["warnings"])


async def test_names_on_disk_end_at_their_bound(
    consul: ConsulUnderTest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(dnsd.daemon, "TICK_SECONDS", 0.05)
    file = tmp_path / "names"
    await register(consul, "web")
    async with running(consul.config(), snapshot=str(file)) as here:
        await until("served", lambda: has(here, "web"))
    await asyncio.to_thread(consul.stop)
    async with running(consul.config(), snapshot=str(file), stale_max_s=0.001) as here:
        answer = await here.ask("web.ztna.local", Type.A)
        assert (answer.code, answer.edns.options) == (Code.SERVFAIL, ((15, b"\0\x16"),))  # type: ignore[attr-defined]
        await until(
            "told", lambda: "not served" in here.daemon.readiness.report()["warnings"].get("names", "")
        )
        assert not here.daemon.readiness.ready


async def test_it_waits_for_consul_and_answers_servfail_meanwhile() -> None:
    (nobody,) = free_ports(1)
    async with running(ConsulConfig(address=f"http://127.0.0.1:{nobody}", timeout_s=0.5)) as here:
        await until("why", lambda: "Consul" in here.daemon.readiness.report()["awaiting"]["catalog"])
        assert (await here.ask("web.ztna.local", Type.A)).code == Code.SERVFAIL  # type: ignore[attr-defined]


async def test_without_a_keeper_of_its_own_it_only_serves(consul: ConsulUnderTest) -> None:
    async with running(consul.config(), keeper=False) as here:
        await until("ready", lambda: here.daemon.readiness.ready)
        assert here.daemon.status_sources["keeper"]()["elected"] is False  # type: ignore[index]


async def test_settings_that_contradict_each_other_and_taken_ports_are_refused() -> None:
    with pytest.raises(ExceptionGroup) as refused:
        async with running(ConsulConfig(), ttl_s=60, quarantine_s=60.0):
            pass
    assert refused.group_contains(ConfigError, match=r"dnsd\.quarantine_s")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as taken:
        taken.bind(("127.0.0.1", 0))
        daemon = Daemon("ztna-dnsd", settings(ConsulConfig(), taken.getsockname()[1]), asyncio.TaskGroup())
        with pytest.raises(ZtnaError, match=str(taken.getsockname()[1])):
            await run(daemon)


@pytest.mark.parametrize(
    ("keys", "named"),
    [
        ({"pool": PoolConfig(ula=IPv6Network("fd12::/64"))}, r"dnsd\.pool\.ula"),
        ({"pool": PoolConfig(ula=IPv6Network("2001:db8::/96"))}, r"dnsd\.pool\.ula"),
        ({"nsid": "x" * 129}, r"dnsd\.nsid"),
        ({"upstreams": (Endpoint("dns.example.com", 53),)}, r"dnsd\.upstreams"),
        (
            {"listen": Endpoint("127.0.0.1", 53), "upstreams": (Endpoint("127.0.0.1", 53),)},
            r"dnsd\.upstreams",
        ),
    ],
)
def test_what_cannot_work_is_refused_by_name(keys: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        dnsd.daemon._check(DnsdConfig(**keys))


async def test_what_an_operator_chooses_is_told(consul: ConsulUnderTest) -> None:
    pool = PoolConfig(cidr=IPv4Network("127.100.0.0/29"), ula=IPv6Network("fd12:3456:789a::/96"))
    wide = (IPv4Network("127.0.0.0/8"), IPv4Network("192.0.2.0/24"))
    async with running(consul.config(), pool=pool, allow=wide, nsid="dns-1", version_bind=True) as here:
        await register(consul, "web")
        await until("served", lambda: has(here, "web"))
        answer = await here.ask("web.ztna.local", Type.AAAA)
        assert str(answer.answers[0].data).startswith("fd12:3456:789a::7f64:")  # type: ignore[attr-defined]
        assert "192.0.2.0/24" in here.daemon.readiness.report()["warnings"]["allow"]


async def test_names_outside_are_asked_of_upstreams_even_without_consul() -> None:
    (nobody,) = free_ports(1)
    example = zone({}, {"www": lease("203.0.113.1")}, ZoneSettings(Zone("example.com"), POOL, 5, 10))
    with serving({"upstream": Server((IPv4Network("127.0.0.0/8"),), Answers(example))}) as ports:
        upstreams = (Endpoint("127.0.0.1", ports["upstream"]),)
        away = ConsulConfig(address=f"http://127.0.0.1:{nobody}", timeout_s=0.5)
        async with running(away, upstreams=upstreams) as here:
            answer = await here.ask("www.example.com", Type.A)
            assert str(answer.answers[0].data) == "203.0.113.1"  # type: ignore[attr-defined]
            assert (await here.ask("web.ztna.local", Type.A)).code == Code.SERVFAIL  # type: ignore[attr-defined]


def test_an_unspecified_or_foreign_address_names_no_nameserver() -> None:
    assert dnsd.daemon._nameserver("0.0.0.0") is None
    assert dnsd.daemon._nameserver("::1") is None
    assert str(dnsd.daemon._nameserver("192.0.2.1")) == "192.0.2.1"


async def test_the_console_script_starts_and_ends_cleanly(consul: ConsulUnderTest, tmp_path: Path) -> None:
    port, admin = free_ports(2)
    file = tmp_path / "dnsd.yaml"
    file.write_text(configuration.dump(settings(consul.config(), port), secrets=True))
    argv = [sys.executable, "-m", "dnsd", "--config", str(file), "--set", f"dnsd.admin=127.0.0.1:{admin}"]
    process = subprocess.Popen(argv, stderr=subprocess.PIPE)
    try:
        await register(consul, "web")
        here = Running.__new__(Running)
        here.resolver = Resolver([Endpoint("127.0.0.1", port)], 2.0)
        await until("served", lambda: has(here, "web"))
        process.send_signal(signal.SIGTERM)
        assert await asyncio.to_thread(process.wait, 5) == 0
    finally:
        process.kill()
        _, log = process.communicate()
    assert b'"event":"keeper_elected"' in log
    assert b"Traceback" not in log
