"""sidecar.agent.anyip: which pools a mode takes, and the local route, in a network namespace of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from ipaddress import IPv4Address, IPv4Network, IPv6Network
from pathlib import Path
from typing import Literal

import pytest

from sidecar.agent.anyip import check_overrides, check_pool, check_ula, runtime_directory
from tests.support import namespaces
from ztna.config import Override
from ztna.errors import ConfigError
from ztna.names import ServiceName

POOL = "10.100.0.0/16"
ROUTE = f"local {POOL} dev lo proto 90 scope host"

HOLD = """
import asyncio, json, os, signal, sys
from ipaddress import ip_network
from pathlib import Path
import uvloop
from sidecar.agent.anyip import local_route
from ztna.errors import ZtnaError

async def main(pool, directory):
    try:
        async with local_route(ip_network(pool), Path(directory)):
            print(json.dumps({"held": True}), flush=True)
            await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)
    except ZtnaError as error:
        print(json.dumps({"error": str(error), "kind": type(error).__name__}), flush=True)

with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
    runner.run(main(*sys.argv[1:]))
"""


@pytest.mark.parametrize(
    ("mode", "pool", "words"),
    [
        ("listen", "10.100.0.0/16", "anyip"),
        ("listen", "126.0.0.0/7", "anyip"),
        ("anyip", "127.100.0.0/16", "agent.mode to listen"),
        ("anyip", "224.0.0.0/16", "no mode"),
        ("listen", "0.0.0.0/8", "no mode"),
    ],
)
def test_a_pool_that_a_mode_cannot_bind_names_what_can(
    mode: Literal["listen", "anyip"], pool: str, words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        check_pool(mode, IPv4Network(pool))


def test_the_other_pools_are_fine() -> None:
    check_pool("listen", IPv4Network("127.100.0.0/16"))
    check_pool("anyip", IPv4Network(POOL))


@pytest.mark.parametrize(
    ("mode", "ula", "words"),
    [
        ("listen", "fd12::/96", "mode to anyip"),
        ("anyip", "fd12::/64", "a /96"),
        ("anyip", "2001:db8::/96", "RFC 4193"),
    ],
)
def test_ipv6_that_cannot_be_had_is_refused(mode: Literal["listen", "anyip"], ula: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        check_ula(mode, IPv6Network(ula))


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ([("web", "127.9.0.1"), ("web", "127.9.0.2")], "web is given to two; each service once"),
        ([("web", "127.9.0.1"), ("db", "127.9.0.1")], "127.9.0.1 is given to two; each ip once"),
        ([("web", "224.0.0.1")], "no unicast"),
    ],
)
def test_overrides_that_contradict_each_other_are_refused(
    overrides: list[tuple[str, str]], words: str
) -> None:
    check_ula("anyip", IPv6Network("fd12::/96"))
    with pytest.raises(ConfigError, match=words):
        check_overrides([Override(service=ServiceName(name), ip=IPv4Address(ip)) for name, ip in overrides])


def test_the_runtime_directory_is_the_service_managers_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RUNTIME_DIRECTORY", "/run/one:/run/two")
    assert runtime_directory() == Path("/run/one")
    monkeypatch.delenv("RUNTIME_DIRECTORY")
    monkeypatch.setenv("XDG_RUNTIME_DIR", "/run/user/7")
    monkeypatch.setattr(os, "geteuid", lambda: 7)
    assert runtime_directory() == Path("/run/user/7/ztna-mesh-7")
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert runtime_directory() == Path("/run/ztna-mesh")


class Holder:
    """A process that holds the pool's route until its standard input ends."""

    def __init__(self, host: namespaces.Host, directory: Path, pool: str = POOL) -> None:
        self.process = subprocess.Popen(
            [*host.prefix, sys.executable, "-c", HOLD, pool, str(directory)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdout is not None
        self.said: dict[str, object] = json.loads(self.process.stdout.readline())

    def end(self) -> None:
        self.process.communicate(timeout=30)

    def kill(self) -> None:
        self.process.kill()
        self.process.communicate(timeout=30)


@pytest.fixture
def host() -> Iterator[namespaces.Host]:
    why = namespaces.why_not()
    if why:
        pytest.skip(why)
    network = namespaces.Network()
    try:
        network.open()
        yield network.host("one")
    finally:
        network.close()


def routes(host: namespaces.Host) -> str:
    return host.run("ip", "route", "show", "table", "local")


@pytest.mark.namespaces
class TestRoute:
    def test_an_ipv6_network_is_taken_and_given_back(self, host: namespaces.Host, tmp_path: Path) -> None:
        holder = Holder(host, tmp_path, "fd12:3456:789a::/96")
        assert holder.said == {"held": True}
        there = host.run("ip", "-6", "route", "show", "table", "local")
        assert "local fd12:3456:789a::/96 dev lo proto 90" in there
        holder.kill()
        Holder(host, tmp_path).end()
        assert "fd12" not in host.run("ip", "-6", "route", "show", "table", "local")

    def test_it_is_there_while_held_and_gone_after(self, host: namespaces.Host, tmp_path: Path) -> None:
        holder = Holder(host, tmp_path)
        assert holder.said == {"held": True}
        assert ROUTE in routes(host)
        host.run(sys.executable, "-c", "import socket; socket.socket().bind(('10.100.7.7', 80))")
        holder.end()
        assert "10.100" not in routes(host)
        assert list(tmp_path.iterdir()) == []

    def test_a_crashed_agents_route_is_removed_at_the_next_start(
        self, host: namespaces.Host, tmp_path: Path
    ) -> None:
        Holder(host, tmp_path).kill()
        assert ROUTE in routes(host)
        holder = Holder(host, tmp_path, "10.101.0.0/16")
        assert holder.said == {"held": True}
        assert "10.100" not in routes(host)
        holder.kill()
        holder = Holder(host, tmp_path, "10.101.0.0/16")
        assert holder.said == {"held": True}
        holder.end()
        assert "10.1" not in routes(host).replace("10.91", "")

    def test_two_agents_with_one_pool_are_refused(self, host: namespaces.Host, tmp_path: Path) -> None:
        first = Holder(host, tmp_path)
        second = Holder(host, tmp_path)
        assert "another agent" in str(second.said["error"])
        second.end()
        assert ROUTE in routes(host)
        other = Holder(host, tmp_path, "10.101.0.0/16")
        assert other.said == {"held": True}
        other.end()
        assert ROUTE in routes(host)
        first.end()

    def test_a_route_of_somebody_else_is_a_conflict_and_stays(
        self, host: namespaces.Host, tmp_path: Path
    ) -> None:
        host.run("ip", "route", "add", "local", "10.100.3.0/24", "dev", "lo")
        holder = Holder(host, tmp_path)
        assert holder.said["kind"] == "ConfigError"
        assert "10.100.3.0/24" in str(holder.said["error"])
        holder.end()
        assert "10.100.3.0/24" in routes(host)

    def test_a_route_like_ours_that_we_did_not_add_stays(self, host: namespaces.Host, tmp_path: Path) -> None:
        host.run("ip", "route", "add", "local", POOL, "dev", "lo", "proto", "90")
        holder = Holder(host, tmp_path)
        assert holder.said["kind"] == "ConfigError"
        holder.end()
        assert ROUTE in routes(host)
        assert list(tmp_path.iterdir()) == []

    def test_a_torn_record_is_no_obstacle(self, host: namespaces.Host, tmp_path: Path) -> None:
        Holder(host, tmp_path).kill()
        (record,) = tmp_path.iterdir()
        record.write_text("10.10")
        host.run("ip", "route", "del", "local", POOL, "dev", "lo")
        holder = Holder(host, tmp_path)
        assert holder.said == {"held": True}
        holder.end()

    def test_without_the_capability_it_says_what_is_needed(
        self, host: namespaces.Host, tmp_path: Path
    ) -> None:
        tmp_path.chmod(0o777)
        done = host.try_run(
            "setpriv",
            "--bounding-set=-all",
            "--inh-caps=-all",
            sys.executable,
            "-c",
            HOLD,
            POOL,
            str(tmp_path),
        )
        assert "CAP_NET_ADMIN" in done.stdout, done.stdout + done.stderr
