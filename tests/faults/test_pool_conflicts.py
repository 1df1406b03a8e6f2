"""An agent whose host already routes the pool: it takes nothing, says so everywhere, and takes it when it can."""

from __future__ import annotations

import json
import socket
import sys
from collections.abc import Iterator
from ipaddress import IPv4Address
from pathlib import Path

import pytest

from tests.support.consul import KINDS, note_version
from tests.support.lab import Lab, lab, tcp_route, until
from tests.support.namespaces import Host
from ztna.config import Endpoint, Override
from ztna.names import ServiceName

pytestmark = [pytest.mark.namespaces, pytest.mark.slow]

AGENT = "laptop-1"
THEIRS = "10.100.3.0/24"
SERVICES = ("web", "db", "ssh")
BACKEND_PORT = 18080


@pytest.fixture(params=KINDS)
def made(request: pytest.FixtureRequest) -> Iterator[Lab]:
    note_version(request, request.param)
    with lab("core", "laptop", pool="10.100.0.0/16") as made:
        made.start_consul(request.param)
        yield made


def conflicts(made: Lab, relay_admin: int) -> list[dict[str, object]]:
    argv = [str(Path(sys.executable).parent / "ztna"), "leases", "conflicts", "--json"]
    argv += ["--config", str(made.operator_config()), "--relay", f"127.0.0.1:{relay_admin}"]
    found: list[dict[str, object]] = json.loads(made.host("core").run(*argv))
    return found


def dial_vpn(host: Host) -> None:
    """Give a host a device that routes may lead to."""
    host.run("ip", "link", "add", "vpn0", "type", "veth", "peer", "name", "vpn1")
    host.run("ip", "link", "set", "vpn1", "up")
    host.run("ip", "link", "set", "vpn0", "up")


def test_a_pool_that_the_host_routes_is_refused_reported_and_taken_later(made: Lab) -> None:
    laptop = made.host("laptop")
    made.dnsd().wait_ready()
    relay = made.relay().wait_ready()
    dial_vpn(laptop)
    laptop.run("ip", "route", "add", THEIRS, "dev", "vpn0")
    before = laptop.run("ip", "-4", "route", "show", "table", "all")
    agent = made.agent(AGENT, ["web"], host="laptop", mode="anyip")

    def told() -> list[dict[str, object]]:
        return [each for each in conflicts(made, relay.admin_port) if len(each["by"]) == 2]  # type: ignore[arg-type]

    (found,) = until("Consul and the relay are told", told, 30)
    assert (found["agent"], found["cidr"], found["with"]) == (
        AGENT,
        "10.100.0.0/16",
        f"route {THEIRS} (vpn0)",
    )
    code, ready = agent.get("/readyz")
    assert code == 503
    assert THEIRS in ready
    assert laptop.run("ip", "-4", "route", "show", "table", "all") == before, "the host's routes are its own"

    laptop.run("ip", "route", "del", THEIRS, "dev", "vpn0")
    agent.wait_ready()
    assert "local 10.100.0.0/16" in laptop.run("ip", "route", "show", "table", "local")
    until(
        "Consul has no report any more", lambda: "ztna/conflict/" + AGENT not in made.kv("ztna/conflict/"), 30
    )

    until("the relay has none either", lambda: not conflicts(made, relay.admin_port), 30)
    agent.stop()


def test_a_route_that_comes_over_a_held_pool_gets_it_and_gives_it_back(made: Lab) -> None:
    laptop = made.host("laptop")
    made.python("backends", made.host("core"), "-m", "tests.support.backends", "--tcp", str(BACKEND_PORT))
    relay = made.relay()
    daemons = [
        made.dnsd(),
        relay,
        made.connector("alpha", [tcp_route("web", Endpoint("127.0.0.1", BACKEND_PORT))]),
        made.agent(AGENT, ["web"], host="laptop", mode="anyip"),
    ]
    agent = daemons[-1]
    for daemon in daemons:
        daemon.wait_ready()
    vip = made.address("web")
    # Beside the service: who calls an address in the host's new route is no longer heard, and cannot be told.
    theirs = next(str(each) for each in made.pool.subnets(new_prefix=24) if IPv4Address(vip) not in each)

    def echoes(flow: socket.socket) -> bool:
        flow.sendall(b"hello")
        return flow.recv(100) == b"hello"

    def connect() -> socket.socket | None:
        flow = laptop.socket()
        flow.settimeout(10)
        try:
            flow.connect((vip, 8080))
            assert echoes(flow)
        except OSError:
            flow.close()
            return None
        return flow

    with until("the service answers", connect, 30) as flow:
        dial_vpn(laptop)
        laptop.run("ip", "route", "add", theirs, "dev", "vpn0")
        until(
            "it is told",
            lambda: any(
                each["with"] == f"route {theirs} (vpn0)" for each in conflicts(made, relay.admin_port)
            ),
            30,
        )
        with pytest.raises(ConnectionResetError):
            while True:
                echoes(flow)
    code, ready = agent.get("/readyz")
    assert code == 503
    assert "10.100.0.0/16 not taken" in ready
    until(
        "the route is gone", lambda: "10.100." not in laptop.run("ip", "route", "show", "table", "local"), 30
    )
    assert connect() is None

    laptop.run("ip", "route", "del", theirs, "dev", "vpn0")
    agent.wait_ready()
    until("the service answers again", connect, 30).close()
    until("nobody reports it any more", lambda: not conflicts(made, relay.admin_port), 30)
    agent.stop()


def test_overrides_and_the_hosts_file_are_compared_with_the_leases(made: Lab) -> None:
    laptop = made.host("laptop")
    made.python("backends", made.host("core"), "-m", "tests.support.backends", "--tcp", str(BACKEND_PORT))
    backend = Endpoint("127.0.0.1", BACKEND_PORT)
    made.dnsd().wait_ready()
    relay = made.relay().wait_ready()
    made.connector("alpha", [tcp_route(name, backend) for name in SERVICES]).wait_ready()
    vips = {name: made.address(name) for name in SERVICES}
    hosts = made.directory / "hosts"
    hosts.write_text(f"127.53.0.80 web.ztna.local\n192.0.2.80 db.ztna.local\n{vips['ssh']} ssh.ztna.local\n")
    overrides = (
        Override(service=ServiceName("web"), ip=IPv4Address("127.53.0.80")),
        Override(service=ServiceName("db"), ip=IPv4Address(vips["ssh"])),
    )
    agent = made.agent(
        AGENT, SERVICES, host="laptop", mode="anyip", overrides=overrides, hosts_file=str(hosts)
    ).wait_ready()

    def answers(address: str) -> bool:
        with laptop.socket() as flow:
            flow.settimeout(10)
            try:
                flow.connect((address, 8080))
                flow.sendall(b"hello")
                return flow.recv(100) == b"hello"
            except OSError:
                return False

    for address in ("127.53.0.80", vips["ssh"], vips["db"]):
        until(f"{address} answers", lambda address=address: answers(address), 30)
    assert not answers(vips["web"]), "it is called elsewhere on this host"

    def told() -> dict[object, object]:
        return {each["with"]: each["cidr"] for each in conflicts(made, relay.admin_port)}

    expected = {
        "agent.overrides of db": f"{vips['ssh']}/32",
        f"{hosts}:2: 192.0.2.80 db.ztna.local": f"{vips['db']}/32",
    }
    until("both are told, and no more", lambda: told() == expected, 30)
    assert "agent.overrides of db" in agent.get("/readyz")[1]
    hosts.write_text("")
    until("one is over", lambda: list(told()) == ["agent.overrides of db"], 30)
    agent.stop()
    until("the report goes with the agent", lambda: not made.kv("ztna/conflict/"), 30)
