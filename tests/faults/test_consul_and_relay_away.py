"""Consul away for a minute, and a relay restarted: names and flows go on, nothing needs restarting."""

from __future__ import annotations

import contextlib
import signal
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from ipaddress import IPv4Network

import pytest

from tests.support.consul import KINDS, note_version
from tests.support.lab import Daemon, Lab, http_get, lab, tcp_route, udp_ask, udp_route, until
from ztna.config import Endpoint

pytestmark = [pytest.mark.namespaces, pytest.mark.slow]

AWAY_SECONDS = 60.0
SETTLE_SECONDS = 12.0
BACK_SECONDS = 5.0
HTTP_PORT, COUNTING_PORT, UDP_PORT = 18080, 18081, 18007


class Mesh:
    def __init__(self, made: Lab, kind: str, *, hangs: bool = False) -> None:
        """`hangs`: its Consul goes away by answering nothing any more, its connections still open."""
        self.lab = made
        self.hangs = hangs
        self.laptop, self.core = made.host("laptop"), made.host("core")
        self.consul = made.start_consul(kind)
        ports = ("--http", HTTP_PORT, "--udp", UDP_PORT, "--counting", COUNTING_PORT)
        made.python("backend", self.core, "-m", "tests.support.backends", *map(str, ports))
        self.dnsd = made.dnsd(listen=Endpoint("0.0.0.0", 5533), allow=(IPv4Network("0.0.0.0/0"),))
        self.relay = made.relay()
        routes = [
            tcp_route("web-app", Endpoint("127.0.0.1", HTTP_PORT)),
            tcp_route("counting", Endpoint("127.0.0.1", COUNTING_PORT)),
            udp_route("echo-service", Endpoint("127.0.0.1", UDP_PORT)),
        ]
        self.connector = made.connector("alpha", routes)
        self.agent = made.agent("laptop", ["web-app", "echo-service", "counting"], host="laptop")
        for daemon in self.daemons:
            daemon.wait_ready()
        self.vip = {
            name: made.address(name, "laptop", server=self.core.address)
            for name in ("web-app", "echo-service", "counting")
        }
        until("everything works", self.works)

    @property
    def daemons(self) -> tuple[Daemon, ...]:
        return (self.dnsd, self.relay, self.connector, self.agent)

    def works(self) -> bool:
        """Whether a name, a new TCP flow and a UDP echo work right now."""
        try:
            named = self.lab.dig("laptop", "web-app.ztna.local", server=self.core.address) == [
                self.vip["web-app"]
            ]
            served = http_get(self.laptop, f"http://{self.vip['web-app']}:8080/", 3.0)[0] == 200
        except OSError:
            return False
        return named and served and udp_ask(self.laptop, self.vip["echo-service"], 7, b"ask") == b"ask"

    def live_without_consul(self) -> None:
        """A minute without Consul: every second everything works, through its return too."""
        pids = [daemon.pid for daemon in self.daemons]
        with self.laptop.socket() as held, self.always_working():
            held.settimeout(30)
            held.connect((self.vip["counting"], 8080))
            held.sendall(b"before")
            self._take_consul_away()
            time.sleep(AWAY_SECONDS)  # what is under test is a minute of real time without Consul
            held.sendall(b" after")
            self._bring_consul_back()
            until("Consul is back", lambda: self.lab.consul_get("/v1/status/leader"), 30)
            for name in self.vip:
                until(f"{name} passes again", lambda n=name: self.lab.check_states(n) == ["passing"], 60)
            # A change made now is seen: the watches are at work again.
            with self.lab.registered("another") as name:
                assert self.lab.address(name, "laptop", server=self.core.address, seconds=30)
            time.sleep(SETTLE_SECONDS)  # what the return may break late: the relay asks again within seconds
            held.shutdown(socket.SHUT_WR)
            assert held.recv(4096).startswith(b"12 "), "the flow held through it all"
        assert [daemon.pid for daemon in self.daemons] == pids
        assert all(daemon.alive for daemon in self.daemons)

    def _take_consul_away(self) -> None:
        if self.hangs:
            self.consul.signal(signal.SIGSTOP)
        else:
            self.consul.stop()

    def _bring_consul_back(self) -> None:
        if self.hangs:
            self.consul.signal(signal.SIGCONT)
        else:
            self.consul.start()

    @contextlib.contextmanager
    def always_working(self) -> Iterator[None]:
        """AssertionError at the end when anything did not work in any second while inside."""
        over = threading.Event()
        rounds: list[tuple[float, bool]] = []

        def watch() -> None:
            started = time.monotonic()
            while not over.wait(1.0):
                rounds.append((time.monotonic() - started, self.works()))

        with ThreadPoolExecutor(1) as threads:
            watching = threads.submit(watch)
            try:
                yield
            finally:
                over.set()
            watching.result()
        failed = [f"{at:.1f}" for at, worked in rounds if not worked]
        assert not failed, f"something did not work, seconds after the start: {', '.join(failed)}"
        assert len(rounds) >= AWAY_SECONDS / 3, "it was hardly asked"


@pytest.fixture
def meshes(request: pytest.FixtureRequest) -> Iterator[list[Mesh]]:
    """A mesh for each kind of Consul that stops, and one whose Consul hangs: the minute passes for all at once."""
    with contextlib.ExitStack() as labs:
        made = []
        for kind, hangs in [*((kind, False) for kind in KINDS), ("newest", True)]:
            made.append(Mesh(labs.enter_context(lab("core", "laptop")), kind, hangs=hangs))
            note_version(request, kind)
        yield made


def test_consul_away_for_a_minute(meshes: list[Mesh]) -> None:
    with ThreadPoolExecutor(len(meshes)) as threads:
        for done in [threads.submit(mesh.live_without_consul) for mesh in meshes]:
            done.result()


@pytest.fixture(params=KINDS)
def mesh(request: pytest.FixtureRequest) -> Iterator[Mesh]:
    note_version(request, request.param)
    with lab("core", "laptop") as made:
        yield Mesh(made, request.param)


def test_relay_restarted(mesh: Mesh) -> None:
    for end in (mesh.relay.stop, mesh.relay.kill):
        end()
        mesh.relay.start()
        mesh.relay.wait_ready()
        ready = time.monotonic()
        until("agents and connectors are back", mesh.works, seconds=BACK_SECONDS)
        assert time.monotonic() - ready < BACK_SECONDS
