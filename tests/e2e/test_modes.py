"""The agent's modes on hosts of their own: what programs reach, who may, and what is left when it ends."""

from __future__ import annotations

import base64
import contextlib
import itertools
import json
import signal
import socket
import sys
from collections.abc import Iterator
from ipaddress import IPv4Network, IPv6Network
from pathlib import Path

import pytest

from tests.support.consul import find_binary
from tests.support.lab import Daemon, Lab, lab, tcp_route, udp_route, until
from tests.support.namespaces import Host
from tests.support.traces import traces
from ztna.config import CheckConfig, Endpoint, Override, PoolConfig, RouteConfig
from ztna.names import ServiceName

pytestmark = [pytest.mark.namespaces, pytest.mark.slow]

POOL = "10.100.0.0/16"
ULA = IPv6Network("fd12:3456:789a::/96")
WEB = "web-app"
SERVICES = (WEB, "quiet", "answered", "lost")
BACKEND_PORT = 18007
DEAD_PORT = 18008
FOREIGN_RULES = (
    "table inet foreign { chain out { type nat hook output priority -100; tcp dport 9 redirect to :10; }; }"
)
UNCHECKED = CheckConfig(kind="none")
_numbers = itertools.count(1)


def ping_route(service: str, host: str = "127.0.0.1", **keys: object) -> RouteConfig:
    return RouteConfig(
        service=ServiceName(service),
        backend=Endpoint(host, 1),
        protocol="icmp",
        checks=(UNCHECKED,),
        **keys,  # type: ignore[arg-type]
    )


@pytest.fixture(scope="module")
def mesh() -> Iterator[Lab]:
    """A mesh on the newest Consul there is, with a service by TCP, UDP and ping; agents come with the tests."""
    with lab("core", "laptop", pool=POOL) as made:
        core, laptop = made.host("core"), made.host("laptop")
        core.run("sysctl", "-qw", "net.ipv4.ping_group_range=0 2147483647")
        laptop.run("nft", FOREIGN_RULES)
        made.start_consul("newest" if find_binary("newest") is not None else "embedded")
        ports = ("--udp", str(BACKEND_PORT), "--tcp", str(BACKEND_PORT))
        made.python("backends", core, "-m", "tests.support.backends", *ports)
        backend = Endpoint("127.0.0.1", BACKEND_PORT)
        made.dnsd(pool=PoolConfig(cidr=made.pool, ula=ULA)).wait_ready()
        made.relay().wait_ready()
        routes = [
            tcp_route(WEB, backend),
            udp_route(WEB, backend),
            udp_route(WEB, Endpoint("127.0.0.1", DEAD_PORT), port=9),
            ping_route(WEB),
            udp_route("quiet", backend),
            ping_route("answered", "192.0.2.1", icmp="connector"),
            ping_route("lost", "192.0.2.1"),
        ]
        made.connector("alpha", routes).wait_ready()
        for service in SERVICES:
            made.address(service)
        yield made


@contextlib.contextmanager
def agent(made: Lab, mode: str, **keys: object) -> Iterator[Daemon]:
    """An agent on the laptop, which ends with status 0 and leaves nothing behind."""
    before = traces(made.host("laptop"))
    daemon = made.agent(f"laptop-{next(_numbers)}", SERVICES, "laptop", mode=mode, **keys)
    try:
        daemon.wait_ready()
        yield daemon
        if daemon.alive:
            assert daemon.stop() == 0, daemon.tail()
        assert traces(made.host("laptop")) == before
    finally:
        if daemon.alive:
            daemon.kill()
        made.running.remove(daemon)


def vip(made: Lab, service: str = WEB, kind: str = "A") -> str:
    return made.dig("core", f"{service}.ztna.local", kind)[0]


def connect(host: Host, address: str, port: int) -> socket.socket:
    flow = host.socket(socket.SOCK_STREAM, socket.AF_INET6 if ":" in address else socket.AF_INET)
    flow.settimeout(10)
    flow.connect((address, port))
    return flow


def tcp_echoes(host: Host, address: str, port: int = 8080) -> bool:
    with connect(host, address, port) as flow:
        flow.sendall(b"hello")
        return flow.recv(100) == b"hello"


def udp_echoes(host: Host, address: str, payload: bytes = b"hello", port: int = 7) -> bool:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with host.socket(socket.SOCK_DGRAM, family) as asker:
        asker.settimeout(10)
        asker.connect((address, port))
        asker.send(payload)
        return asker.recv(65_535) == payload


def ping(host: Host, address: str, *more: str) -> str:
    """Return what ping says; AssertionError when there is no answer."""
    return host.run("ping", "-n", "-c", "3", "-i", "0.2", "-w", "20", *more, address)


def refusal(host: Host, address: str, port: int, kind: int) -> type[OSError] | None:
    """Return how the kernel tells a program that nothing is there, None when it does not."""
    with host.socket(kind) as asker:
        asker.settimeout(10)
        try:
            asker.connect((address, port))
            asker.send(b"x")
            asker.recv(100)
        except OSError as error:
            return type(error)
    return None


@pytest.mark.parametrize("mode", ["anyip", "tun"])
def test_a_program_reaches_what_is_published_and_nothing_else(mesh: Lab, mode: str) -> None:
    laptop, web = mesh.host("laptop"), vip(mesh)
    with (
        agent(mesh, mode) as daemon,
        laptop.socket() as own_tcp,
        laptop.socket(socket.SOCK_DGRAM) as own_udp,
    ):
        until("TCP", lambda: tcp_echoes(laptop, web))
        until("UDP", lambda: udp_echoes(laptop, web))
        assert udp_echoes(laptop, web, b"x" * 30_000), "larger than any MTU on the way"
        # Programs may have these ports, without SO_REUSEADDR, also while a flow runs.
        with connect(laptop, web, 8080) as flow:
            assert daemon.status()["agent"]["listeners"] == "one", daemon.get("/readyz")
            own_tcp.bind(("0.0.0.0", 8080))
            own_tcp.listen()
            own_udp.bind(("0.0.0.0", 7))
            flow.sendall(b"on")
            assert flow.recv(100) == b"on"
            assert tcp_echoes(laptop, web)
            assert udp_echoes(laptop, web)
        # What is not published is refused, though programs listen everywhere.
        other = laptop.socket()
        with other, laptop.socket(socket.SOCK_DGRAM) as other_udp:
            other.bind(("0.0.0.0", 8081))
            other.listen()
            other_udp.bind(("0.0.0.0", 8081))
            for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM):
                assert refusal(laptop, web, 8081, kind) is ConnectionRefusedError
        assert refusal(laptop, web, 9, socket.SOCK_DGRAM) is ConnectionRefusedError, "the backend's own word"
        status = daemon.status()["agent"]
        assert (status["mode"], status["listeners"], status["allow_uids"]) == (mode, "one", "all")


@pytest.mark.parametrize("mode", ["anyip", "tun"])
def test_a_neighbour_reaches_nothing_through_a_host_that_routes(mesh: Lab, mode: str) -> None:
    laptop, core = mesh.host("laptop"), mesh.host("core")
    laptop.run("sysctl", "-qw", "net.ipv4.ip_forward=1")
    core.run("ip", "route", "add", POOL, "via", laptop.address)
    try:
        with agent(mesh, mode):
            address = vip(mesh)
            assert udp_echoes(laptop, address)
            for port, kind in ((7, socket.SOCK_DGRAM), (8080, socket.SOCK_STREAM)):
                assert refusal(core, address, port, kind) is ConnectionRefusedError
            assert (
                core.try_run("ping", "-n", "-c", "1", "-w", "5", address).returncode != 0 or mode == "anyip"
            )
            assert udp_echoes(laptop, address)
    finally:
        core.run("ip", "route", "del", POOL)
        laptop.run("sysctl", "-qw", "net.ipv4.ip_forward=0")


def test_tun_pings_the_backend_and_the_connector(mesh: Lab) -> None:
    laptop = mesh.host("laptop")
    with agent(mesh, "tun", ula=ULA):
        web = vip(mesh)
        assert "3 received" in until("ping", lambda: ping(laptop, web))
        assert "3 received" in ping(laptop, web, "-s", "4000")
        assert "3 received" in ping(laptop, vip(mesh, "answered"))
        assert "3 received" in ping(laptop, vip(mesh, kind="AAAA"))
        core = mesh.host("core")
        core.run("sysctl", "-qw", "net.ipv4.icmp_echo_ignore_all=1")
        assert "0 received" in laptop.try_run("ping", "-n", "-c", "1", "-w", "2", web).stdout, (
            "it is the backend"
        )
        core.run("sysctl", "-qw", "net.ipv4.icmp_echo_ignore_all=0")
        lost = laptop.try_run("ping", "-n", "-c", "1", "-w", "10", vip(mesh, "lost"))
        assert "Destination Net Unreachable" in lost.stdout
        unpublished = laptop.try_run("ping", "-n", "-c", "1", "-w", "10", vip(mesh, "quiet"))
        assert "Packet filtered" in unpublished.stdout
        nobody = laptop.try_run("ping", "-n", "-c", "1", "-w", "10", "10.100.255.77")
        assert "Destination Host Unreachable" in nobody.stdout


def test_tun_pings_where_udp_is_blocked(mesh: Lab) -> None:
    """ICMP rides a stream carrier then, as UDP does."""
    laptop = mesh.host("laptop")
    udp = (f"udp {end} {{ 4433, 4434, 4435 }}" for end in ("dport", "sport"))
    with laptop.dropping(*udp), agent(mesh, "tun") as daemon:
        web = vip(mesh)
        assert "3 received" in until("ping", lambda: ping(laptop, web))
        assert "3 received" in ping(laptop, web, "-s", "4000")
        links = daemon.status()["agent"]["links"]
        assert {link["carrier"] for link in links if link["path"] != "dialling"} == {"tls"}
        lost = laptop.try_run("ping", "-n", "-c", "1", "-w", "10", vip(mesh, "lost"))
        assert "Destination Net Unreachable" in lost.stdout


def test_a_connector_that_may_not_ping_says_what_to_set(mesh: Lab) -> None:
    # The laptop's network namespace is as the kernel makes it: no group may.
    connector = mesh.connector("beta", [ping_route("unpinged")], "laptop").wait_ready()
    assert "set net.ipv4.ping_group_range to include" in connector.get("/readyz")[1]
    assert connector.stop() == 0
    mesh.running.remove(connector)


@pytest.mark.parametrize("mode", ["anyip", "tun"])
def test_ipv6_programs_too(mesh: Lab, mode: str) -> None:
    laptop, six = mesh.host("laptop"), vip(mesh, kind="AAAA")
    with agent(mesh, mode, ula=ULA):
        until("TCP", lambda: tcp_echoes(laptop, six))
        until("UDP", lambda: udp_echoes(laptop, six))
        assert udp_echoes(laptop, six, b"x" * 30_000)


@pytest.mark.parametrize("mode", ["anyip", "tun"])
def test_a_crash_leaves_nothing_once_it_was_started_again(mesh: Lab, mode: str) -> None:
    laptop, web = mesh.host("laptop"), vip(mesh)
    before = traces(laptop)
    with agent(mesh, mode) as daemon:
        until("TCP", lambda: tcp_echoes(laptop, web))
        daemon.kill()
        if mode == "tun":
            assert traces(laptop) == before, "the kernel takes everything back"
        else:
            assert "ztna" not in "".join(traces(laptop)["nft list ruleset"])
        daemon.start()
        daemon.wait_ready()
        until("TCP again", lambda: tcp_echoes(laptop, web))
        until("UDP again", lambda: udp_echoes(laptop, web))


@pytest.mark.parametrize("mode", ["anyip", "tun"])
def test_two_agents_on_one_host(mesh: Lab, mode: str) -> None:
    laptop, web = mesh.host("laptop"), vip(mesh)
    with agent(mesh, mode):
        until("TCP", lambda: tcp_echoes(laptop, web))
        second = mesh.agent(f"second-{mode}", [WEB], "laptop", mode=mode)
        until("the second gave up", lambda: not second.alive)
        assert second.process is not None and second.process.returncode != 0
        assert "another agent on this host" in second.output(), second.output()
        mesh.running.remove(second)
        with agent(mesh, mode, pool=IPv4Network("10.102.0.0/16")):
            assert tcp_echoes(laptop, web)
            assert udp_echoes(laptop, web)
        assert tcp_echoes(laptop, web)


def test_tun_takes_its_pool_once_nothing_overlaps_it(mesh: Lab) -> None:
    laptop, web = mesh.host("laptop"), vip(mesh)
    before = traces(laptop)
    laptop.run("ip", "route", "add", "10.100.3.0/24", "dev", "eth0")
    daemon = mesh.agent(f"laptop-{next(_numbers)}", [WEB], "laptop", mode="tun")
    until("it says why not", lambda: "route 10.100.3.0/24 (eth0)" in daemon.get("/readyz")[1])
    laptop.run("ip", "route", "del", "10.100.3.0/24", "dev", "eth0")
    daemon.wait_ready()
    until("TCP", lambda: tcp_echoes(laptop, web))
    until("ping", lambda: ping(laptop, web))
    # The device's address is nobody's way here: no reason to look for paths again.
    assert not [each for each in daemon.events("network_changed") if "10.100.0.0" in str(each)]
    # A network that comes later has what lies in it, as long as it is there.
    laptop.run("ip", "route", "add", "10.100.0.0/16", "dev", "eth0", "metric", "77")
    until("it leaves the pool to the host", lambda: "ztna0" not in laptop.run("ip", "route"))
    laptop.run("ip", "route", "del", "10.100.0.0/16", "dev", "eth0", "metric", "77")
    until("TCP again", lambda: tcp_echoes(laptop, web), 30)
    assert daemon.stop() == 0
    mesh.running.remove(daemon)
    assert traces(laptop) == before


@pytest.mark.parametrize("mode", ["anyip", "tun"])
def test_flows_go_on_while_it_drains(mesh: Lab, mode: str) -> None:
    laptop, web = mesh.host("laptop"), vip(mesh)
    with agent(mesh, mode, drain_s=30.0) as daemon:
        until("TCP", lambda: tcp_echoes(laptop, web))
        with connect(laptop, web, 8080) as flow:
            flow.sendall(b"before")
            assert flow.recv(100) == b"before"
            daemon.signal(signal.SIGTERM)
            until(
                "nobody new", lambda: refusal(laptop, web, 8080, socket.SOCK_STREAM) is ConnectionRefusedError
            )
            flow.sendall(b"meanwhile")
            assert flow.recv(100) == b"meanwhile"
        until("it has ended", lambda: not daemon.alive)
        assert daemon.process is not None and daemon.process.returncode == 0


ASK = """
import socket, sys
address, port, kind = sys.argv[1], int(sys.argv[2]), getattr(socket, sys.argv[3])
with socket.socket(socket.AF_INET, kind) as asker:
    asker.settimeout(10)
    try:
        asker.connect((address, port))
        asker.send(b"hello")
        print(asker.recv(100).decode() or "end")
    except OSError as error:
        print(type(error).__name__)
"""


def asked_as(host: Host, uid: int, address: str, port: int, kind: str) -> str:
    """Return what a program of this user hears."""
    argv = ("setpriv", "--reuid", str(uid), "--clear-groups", "--inh-caps=-all", sys.executable, "-c", ASK)
    return host.run(*argv, address, str(port), kind).strip()


MANY = 5000
PAIRS_PER_TRANSACTION = 64


def test_five_thousand_names_need_one_listener() -> None:
    with lab("core", "laptop", pool=POOL) as made:
        core, laptop = made.host("core"), made.host("laptop")
        before = traces(laptop)
        made.start_consul("embedded")
        made.python("backends", core, "-m", "tests.support.backends", "--tcp", str(BACKEND_PORT))
        _write_leases(made, {f"service-{n}": f"10.100.{n // 250 + 1}.{n % 250 + 1}" for n in range(MANY)})
        _write_leases(made, {WEB: "10.100.0.9"})
        # The leases are ours: a keeper would find most of their services gone.
        made.dnsd(keeper=False, pool=PoolConfig(cidr=made.pool)).wait_ready()
        made.relay().wait_ready()
        made.connector("alpha", [tcp_route(WEB, Endpoint("127.0.0.1", BACKEND_PORT))]).wait_ready()
        daemon = made.agent("laptop", ["*"], "laptop", mode="anyip").wait_ready()
        listening = until("it serves all", lambda: _listening(daemon), 60)
        assert listening >= 2 * MANY
        assert len(list(Path(f"/proc/{daemon.pid}/fd").iterdir())) < 100
        until("one of them answers", lambda: tcp_echoes(laptop, "10.100.0.9"))
        for port in (8080, 53):
            for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM):
                with laptop.socket(kind) as program:
                    program.bind(("0.0.0.0", port))
        until("the others have no connector", lambda: _is_reset(laptop, "10.100.7.7"))
        assert daemon.stop() == 0
        assert traces(laptop) == before


def _write_leases(made: Lab, addresses: dict[str, str]) -> None:
    """Write leases with a TCP and a UDP port each, as a keeper does but for its lock."""
    ports = [{"protocol": "tcp", "port": 8080}, {"protocol": "udp", "port": 53}]
    pairs = []
    for name, ip in addresses.items():
        lease = {"ip": ip, "epoch": 1, "ports": ports if name != WEB else ports[:1]}
        value = base64.b64encode(json.dumps(lease).encode()).decode()
        pairs.append({"KV": {"Verb": "set", "Key": f"ztna/vip/service/{name}", "Value": value}})
    for start in range(0, len(pairs), PAIRS_PER_TRANSACTION):
        made.consul_put("/v1/txn", pairs[start : start + PAIRS_PER_TRANSACTION])


def _listening(daemon: Daemon) -> int:
    """Return how many ports are served once all services are known, else 0."""
    services = daemon.status()["agent"]["services"]
    return sum(len(each["listening"]) for each in services) if len(services) > MANY else 0


def _is_reset(host: Host, address: str) -> bool:
    with connect(host, address, 8080) as flow:
        flow.sendall(b"x")
        try:
            return flow.recv(100) == b""
        except ConnectionResetError:
            return True


@pytest.mark.parametrize("mode", ["listen", "anyip", "tun"])
def test_only_users_that_may_use_the_agent_do(mesh: Lab, mode: str) -> None:
    laptop, address = mesh.host("laptop"), vip(mesh)
    keys: dict[str, object] = {}
    if mode == "listen":
        # Its addresses are those of every host; the pool lies elsewhere, so the service is called at an override.
        address = "127.53.0.80"
        keys = {
            "pool": IPv4Network("127.100.0.0/16"),
            "overrides": (Override(service=ServiceName(WEB), ip=address),),
        }
    with agent(mesh, mode, allow_uids=(1001, 1002), **keys) as daemon:
        for uid in (1001, 1002):
            until("TCP", lambda uid=uid: asked_as(laptop, uid, address, 8080, "SOCK_STREAM") == "hello")
            until("UDP", lambda uid=uid: asked_as(laptop, uid, address, 7, "SOCK_DGRAM") == "hello")
        for uid in (0, 1003):
            heard = asked_as(laptop, uid, address, 8080, "SOCK_STREAM")
            assert heard in ("ConnectionRefusedError", "ConnectionResetError"), heard
            heard = asked_as(laptop, uid, address, 7, "SOCK_DGRAM")
            assert heard in ("PermissionError", "TimeoutError"), heard
        if mode == "tun":
            assert laptop.try_run("ping", "-n", "-c", "1", "-w", "2", address).returncode != 0
        assert daemon.status()["agent"]["allow_uids"] == [1001, 1002]
        assert daemon.metric("ztna_refusals_total", where="agent_user", reason="no_grant") >= 4
