"""A pool of two networks through a whole mesh, and addresses that move while programs talk."""

from __future__ import annotations

import json
import socket
import sys
from collections.abc import Iterator
from ipaddress import IPv4Network, IPv6Network
from pathlib import Path

import pytest

from tests.support.consul import KINDS, note_version
from tests.support.lab import Lab, lab, tcp_route, udp_ask, udp_route, until
from ztna.config import Endpoint, PoolConfig

pytestmark = [pytest.mark.namespaces, pytest.mark.slow]

SERVICES = ("echo-a", "echo-b", "echo-c")
MORE = IPv4Network("10.101.0.0/24")
ULA = IPv6Network("fd12:3456:789a::/96")
BACKEND_PORT = 18007


@pytest.fixture(params=KINDS)
def made(request: pytest.FixtureRequest) -> Iterator[Lab]:
    note_version(request, request.param)
    with lab("core", "laptop", pool="10.100.0.0/30") as made:
        made.start_consul(request.param)
        yield made


def leases(made: Lab, *words: str) -> tuple[int, dict[str, object]]:
    """Run `ztna leases` as an operator; return the exit status and what it says."""
    argv = [str(Path(sys.executable).parent / "ztna"), "leases", *words, "--json"]
    done = made.host("core").try_run(*argv, "--config", str(made.operator_config()))
    return done.returncode, json.loads(done.stdout)


def test_the_second_network_serves_and_a_service_is_followed_to_its_new_address(made: Lab) -> None:
    laptop = made.host("laptop")
    made.python("backends", made.host("core"), "-m", "tests.support.backends", "--udp", str(BACKEND_PORT))
    dnsd = made.dnsd(
        listen=Endpoint("0.0.0.0", 5533),
        allow=(IPv4Network("0.0.0.0/0"),),
        pool=PoolConfig(cidr=made.pool, more=(MORE,)),
    )
    relay = made.relay()
    routes = [udp_route(name, Endpoint("127.0.0.1", BACKEND_PORT)) for name in SERVICES]
    connector = made.connector("alpha", routes)
    agent = made.agent("laptop", SERVICES, host="laptop", mode="anyip", more_pools=(MORE,))
    for daemon in (dnsd, relay, connector, agent):
        daemon.wait_ready()

    def vip(name: str) -> str:
        return made.address(name, "laptop", server=made.host("core").address)

    def answers(address: str) -> bool:
        return udp_ask(laptop, address, 7, b"hello") == b"hello"

    addresses = {name: vip(name) for name in SERVICES}
    (beyond,) = [name for name, address in addresses.items() if address.startswith("10.101.0.")]
    for address in addresses.values():
        until(f"{address} answers", lambda address=address: answers(address), 30)

    status, told = leases(made, "pin", "echo-a", "10.101.0.77")
    assert (status, told["ok"]) == (0, True), told
    until("the name has moved", lambda: vip("echo-a") == "10.101.0.77", 30)
    until("the new address answers", lambda: answers("10.101.0.77"), 30)
    taken = addresses["echo-b" if beyond != "echo-b" else "echo-c"]
    status, told = leases(made, "move", "echo-a", taken, "--force")
    assert (status, "is held by" in str(told["what"])) == (1, True)
    assert answers(taken)
    assert leases(made, "audit")[0] == 0


def test_programs_reach_a_service_by_the_ipv6_address_that_dns_gives(made: Lab) -> None:
    laptop, core = made.host("laptop"), made.host("core")
    ports = ("--udp", str(BACKEND_PORT), "--tcp", str(BACKEND_PORT))
    made.python("backends", core, "-m", "tests.support.backends", *ports)
    backend = Endpoint("127.0.0.1", BACKEND_PORT)
    daemons = [
        made.dnsd(pool=PoolConfig(cidr=made.pool, ula=ULA)),
        made.relay(),
        made.connector("alpha", [udp_route("echo-a", backend), tcp_route("web", backend)]),
        made.agent("laptop", ("echo-a", "web"), host="laptop", mode="anyip", ula=ULA),
    ]
    for daemon in daemons:
        daemon.wait_ready()
    six = {
        name: until(
            f"{name} has an AAAA", lambda name=name: made.dig("core", f"{name}.ztna.local", "AAAA"), 30
        )[0]
        for name in ("echo-a", "web")
    }

    def udp_echoes(*words: bytes) -> bool:
        """Ask from several sockets at once, one of them over IPv4: each hears its own answer only."""
        askers = [laptop.socket(socket.SOCK_DGRAM, socket.AF_INET6) for _ in words]
        four = laptop.socket(socket.SOCK_DGRAM)
        try:
            for asker in askers:
                asker.settimeout(10)
                asker.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)  # leaves the port to IPv4, too
                asker.connect((six["echo-a"], 7))
            four.settimeout(10)
            four.bind(("", askers[0].getsockname()[1]))
            four.connect((made.address("echo-a"), 7))
            for asker, word in zip((*askers, four), (*words, b"four"), strict=True):
                asker.send(word)
            return [asker.recv(100) for asker in (*askers, four)] == [*words, b"four"]
        except (TimeoutError, ConnectionRefusedError):
            return False
        finally:
            for asker in (*askers, four):
                asker.close()

    until("UDP over IPv6", lambda: udp_echoes(b"one", b"two", b"three"), 60)

    def tcp_echoes() -> bool:
        with laptop.socket(socket.SOCK_STREAM, socket.AF_INET6) as flow:
            flow.settimeout(10)
            try:
                flow.connect((six["web"], 8080))
                flow.sendall(b"hello")
                return flow.recv(100) == b"hello"
            except OSError:
                return False

    until("TCP over IPv6", tcp_echoes, 60)
    there = laptop.run("ip", "-6", "route", "show", "table", "local")
    assert f"local {ULA} dev lo" in there
