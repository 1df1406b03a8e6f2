"""A service by name, end to end: names, UDP, HTTP, many at once, a stopped reader, half-close; both modes."""

from __future__ import annotations

import hashlib
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from ipaddress import IPv4Address, IPv4Network

import pytest

from tests.support.backends import BLOCK_BYTES, stream_digest
from tests.support.consul import KINDS, note_version
from tests.support.lab import Daemon, Lab, http_get, lab, tcp_route, udp_ask, udp_route, until
from tests.support.namespaces import Host
from ztna.config import Endpoint

pytestmark = [pytest.mark.namespaces, pytest.mark.slow]

PEER_BUDGET_BYTES = 64 << 20
"""protocol.md, stream carrier: budgets."""

HTTP_PORT, COUNTING_PORT, SPEAKING_PORT, UDP_PORT = 18080, 18081, 18082, 18007
MODES = (("listen", "127.100.0.0/16"), ("anyip", "10.100.0.0/16"))
SERVICES = ("web-app", "counting", "speaking", "echo-service")


class Mesh:
    """The mesh of one Consul and mode; two agents, of which the remote one cannot dial the connector."""

    def __init__(self, made: Lab, kind: str, mode: str) -> None:
        self.kind = kind
        self.lab = made
        self.core = made.host("core")
        self.at = {"direct": made.host("laptop"), "forwarded": made.host("remote")}
        ports = (
            "--http",
            HTTP_PORT,
            "--counting",
            COUNTING_PORT,
            "--speaking",
            SPEAKING_PORT,
            "--udp",
            UDP_PORT,
        )
        made.python("backends", self.core, "-m", "tests.support.backends", *map(str, ports))
        self.dnsd = made.dnsd(listen=Endpoint("0.0.0.0", 5533), allow=(IPv4Network("0.0.0.0/0"),))
        self.relay = made.relay()
        at = "127.0.0.1"
        routes = [
            tcp_route("web-app", Endpoint(at, HTTP_PORT)),
            tcp_route("counting", Endpoint(at, COUNTING_PORT), 9001),
            tcp_route("speaking", Endpoint(at, SPEAKING_PORT), 9002),
            udp_route("echo-service", Endpoint(at, UDP_PORT)),
        ]
        self.connector = made.connector("alpha", routes)
        self.agents = {
            path: made.agent(host.name, SERVICES, host=host.name, mode=mode) for path, host in self.at.items()
        }
        for daemon in (self.dnsd, self.relay, self.connector, *self.agents.values()):
            daemon.wait_ready()
        self.vip = {name: made.address(name, "laptop", server=self.core.address) for name in SERVICES}
        for path in self.at:
            until(f"the {path} agent serves", lambda path=path: self.get(path, "web-app")[0] == 200)

    def daemons(self, path: str) -> tuple[Daemon, ...]:
        return (self.agents[path], self.relay, self.connector)

    def get(self, path: str, service: str) -> tuple[int, str]:
        return http_get(self.at[path], f"http://{self.vip[service]}:8080/")

    def connect(self, path: str, service: str, port: int) -> socket.socket:
        connection = self.at[path].socket()
        connection.settimeout(60)
        connection.connect((self.vip[service], port))
        return connection


MESHES = [(kind, *mode) for kind in KINDS for mode in MODES]


@pytest.fixture(scope="module", params=MESHES, ids=lambda p: f"{p[0]}-{p[1]}")
def mesh(request: pytest.FixtureRequest) -> Iterator[Mesh]:
    kind, mode, pool = request.param
    with lab("core", "laptop", "remote", pool=pool) as made, made.host("remote").dropping("tcp dport 4435"):
        made.start_consul(kind)
        yield Mesh(made, kind, mode)


@pytest.fixture(autouse=True)
def _counted(request: pytest.FixtureRequest, mesh: Mesh) -> None:
    note_version(request, mesh.kind)


def download(host: Host, address: str, size: int, seed: int) -> str:
    """Return the SHA-256 of a download from a host."""
    digest = hashlib.sha256()
    with host.socket() as connection:
        connection.settimeout(120)
        connection.connect((address, 8080))
        connection.sendall(f"GET /bytes/{size}/{seed} HTTP/1.0\r\n\r\n".encode())
        for piece in body(connection):
            digest.update(piece)
    return digest.hexdigest()


def body(connection: socket.socket) -> Iterator[bytes]:
    """Yield what comes after an HTTP header, to the end."""
    head = b""
    while b"\r\n\r\n" not in head:
        piece = connection.recv(65536)
        assert piece, f"closed after {head!r}"
        head += piece
    yield head.partition(b"\r\n\r\n")[2]
    while piece := connection.recv(1 << 18):
        yield piece


def test_dig_gets_address_srv_and_ptr(mesh: Mesh) -> None:
    server = {"server": mesh.core.address}
    for name, address in mesh.vip.items():
        assert IPv4Address(address) in mesh.lab.pool
        assert mesh.lab.dig("laptop", "-x", address, **server) == [f"{name}.ztna.local."]
    assert len(set(mesh.vip.values())) == len(SERVICES)
    srv = mesh.lab.dig("laptop", "web-app.ztna.local", "SRV", **server)
    assert [line.split(" ")[2:] for line in srv] == [["4435", "alpha.connector.ztna.local."]]
    srv = mesh.lab.dig("laptop", "_web-app._tcp.ztna.local", "SRV", **server)
    assert [line.split(" ")[2:] for line in srv] == [["8080", "web-app.ztna.local."]]
    assert mesh.lab.dig("laptop", "alpha.connector.ztna.local", **server) == [mesh.core.address]


@pytest.mark.parametrize("path", ["direct", "forwarded"])
def test_udp_echo_and_http(mesh: Mesh, path: str) -> None:
    questions = [b"hello %d" % number for number in range(10)]
    answers = [udp_ask(mesh.at[path], mesh.vip["echo-service"], 7, question) for question in questions]
    assert answers[1:] == questions[1:], "the first datagram alone may be lost, while the session opens"
    assert mesh.get(path, "web-app") == (200, "hello from backend\n")


@pytest.mark.parametrize("path", ["direct", "forwarded"])
def test_tcp_takes_the_path_it_should(mesh: Mesh, path: str) -> None:
    download(mesh.at[path], mesh.vip["web-app"], BLOCK_BYTES, 1)
    assert mesh.agents[path].status()["agent"]["streams"]["routes"] == {"alpha": path}


@pytest.mark.parametrize("path", ["direct", "forwarded"])
def test_fifty_downloads_at_once_arrive_intact(mesh: Mesh, path: str) -> None:
    with ThreadPoolExecutor(50) as pool:
        host, address = mesh.at[path], mesh.vip["web-app"]
        got = list(pool.map(lambda seed: download(host, address, BLOCK_BYTES, seed), range(50)))
    assert got == [stream_digest(seed, BLOCK_BYTES) for seed in range(50)]


@pytest.mark.parametrize("path", ["direct", "forwarded"])
def test_a_reader_that_stops_costs_no_more_than_the_budget(mesh: Mesh, path: str) -> None:
    size = 1 << 30
    before = {daemon.name: daemon.memory() for daemon in mesh.daemons(path)}
    digest, received = hashlib.sha256(), 0
    with mesh.connect(path, "web-app", 8080) as connection:
        connection.sendall(f"GET /bytes/{size}/7 HTTP/1.0\r\n\r\n".encode())
        pieces = body(connection)
        while received < BLOCK_BYTES:
            piece = next(pieces)
            digest.update(piece)
            received += len(piece)
        peak = _sample_until_stalled(mesh, path)
        for name, most in peak.items():
            assert most - before[name] < PEER_BUDGET_BYTES, f"{name} grew from {before[name]} to {most} bytes"
        for piece in pieces:
            digest.update(piece)
            received += len(piece)
    assert received == size
    assert digest.hexdigest() == stream_digest(7, size)


def _sample_until_stalled(mesh: Mesh, path: str) -> dict[str, int]:
    """Return each daemon's largest memory until the backend has been unable to send for a second."""
    peak = {daemon.name: 0 for daemon in mesh.daemons(path)}
    url = f"http://127.0.0.1:{HTTP_PORT}/sent"
    sent, since, deadline = -1, time.monotonic(), time.monotonic() + 60
    while time.monotonic() - since < 1.0:
        for daemon in mesh.daemons(path):
            peak[daemon.name] = max(peak[daemon.name], daemon.memory())
        now = int(http_get(mesh.core, url)[1])
        if now != sent:
            sent, since = now, time.monotonic()
        assert time.monotonic() < deadline, "the backend was never stopped: nothing holds the sender back"
    return peak


@pytest.mark.parametrize("path", ["direct", "forwarded"])
def test_the_client_may_close_its_side_first(mesh: Mesh, path: str) -> None:
    payload = b"x" * 300_000
    with mesh.connect(path, "counting", 9001) as connection:
        connection.sendall(payload)
        connection.shutdown(socket.SHUT_WR)
        told = b"".join(iter(lambda: connection.recv(4096), b""))
    assert told == b"%d %s\n" % (len(payload), hashlib.sha256(payload).hexdigest().encode())


@pytest.mark.parametrize("path", ["direct", "forwarded"])
def test_the_backend_may_close_its_side_first(mesh: Mesh, path: str) -> None:
    received = f"http://127.0.0.1:{HTTP_PORT}/received"
    before = int(http_get(mesh.core, received)[1])
    with mesh.connect(path, "speaking", 9002) as connection:
        assert b"".join(iter(lambda: connection.recv(4096), b"")) == b"greeting\n"
        connection.sendall(b"y" * 300_000)
        connection.shutdown(socket.SHUT_WR)
        until("the backend has it all", lambda: int(http_get(mesh.core, received)[1]) - before == 300_000)
