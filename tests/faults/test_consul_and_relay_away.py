"""Consul away for a minute, and a relay restarted: names and flows go on, nothing needs restarting."""

from __future__ import annotations

import time
from collections.abc import Iterator
from ipaddress import IPv4Network

import pytest

from tests.support.consul import KINDS, note_version
from tests.support.lab import Daemon, Lab, http_get, lab, tcp_route, udp_ask, udp_route, until
from ztna.config import Endpoint

pytestmark = [pytest.mark.namespaces, pytest.mark.slow]

AWAY_SECONDS = 60.0
BACK_SECONDS = 5.0
HTTP_PORT, COUNTING_PORT, UDP_PORT = 18080, 18081, 18007


class Mesh:
    def __init__(self, made: Lab, kind: str) -> None:
        self.lab = made
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


@pytest.fixture(params=KINDS)
def mesh(request: pytest.FixtureRequest) -> Iterator[Mesh]:
    note_version(request, request.param)
    with lab("core", "laptop") as made:
        yield Mesh(made, request.param)


def test_consul_away_for_a_minute(mesh: Mesh) -> None:
    pids = [daemon.pid for daemon in mesh.daemons]
    with mesh.laptop.socket() as held:
        held.settimeout(30)
        held.connect((mesh.vip["counting"], 8080))
        held.sendall(b"before")
        mesh.consul.stop()
        ends = time.monotonic() + AWAY_SECONDS
        rounds = 0
        while time.monotonic() < ends:
            assert mesh.works(), f"round {rounds}: something stopped while Consul was away"
            rounds += 1
            time.sleep(1.0)  # what is under test is a minute of real time without Consul
        held.sendall(b" after")
        mesh.consul.start()
        until("Consul is back", lambda: mesh.lab.consul_get("/v1/status/leader"), 30)
        until("passing again", lambda: mesh.lab.check_states("web-app") == ["passing"], 60)
        assert mesh.works()
        held.shutdown(1)
        assert held.recv(4096).startswith(b"12 "), "the flow held through it all"
    assert [daemon.pid for daemon in mesh.daemons] == pids
    assert all(daemon.alive for daemon in mesh.daemons)
    # A change made now is seen: the watches are at work again.
    with mesh.lab.registered("another") as name:
        assert mesh.lab.address(name, "laptop", server=mesh.core.address, seconds=30)


def test_relay_restarted(mesh: Mesh) -> None:
    for end in (mesh.relay.stop, mesh.relay.kill):
        end()
        mesh.relay.start()
        mesh.relay.wait_ready()
        ready = time.monotonic()
        until("agents and connectors are back", mesh.works, seconds=BACK_SECONDS)
        assert time.monotonic() - ready < BACK_SECONDS
