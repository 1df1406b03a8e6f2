"""Short-lived certificates are renewed under traffic, and nothing is lost; one that is revoked ends, and it alone.

Real processes: agent, connector and relay, all of which take their files up by themselves.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from ipaddress import IPv4Network

import pytest

from tests.support.lab import Daemon, Lab, http_get, lab, tcp_route, udp_ask, udp_route, until
from tests.support.namespaces import Host
from ztna.ca import replace_file
from ztna.config import Endpoint

pytestmark = [pytest.mark.namespaces, pytest.mark.slow]

HTTP_PORT, COUNTING_PORT, SPEAKING_PORT, UDP_PORT = 18080, 18081, 18082, 18007
BRIEF = timedelta(seconds=20)
SERVICES = ("web-app", "echo-service")
GRANTS: dict[str, dict[str, object]] = {
    "relay": {"relay": "relay"},
    "alpha": {"connector": SERVICES, "connector_id": "alpha"},
    "laptop": {"agent": SERVICES},
}


class Mesh:
    """A mesh of three with backends, and a second agent that has nothing to do with it."""

    def __init__(self, made: Lab) -> None:
        self.lab = made
        self.core, self.laptop = made.host("core"), made.host("laptop")
        ports = {
            "--http": HTTP_PORT,
            "--counting": COUNTING_PORT,
            "--speaking": SPEAKING_PORT,
            "--udp": UDP_PORT,
        }
        argv = [str(each) for pair in ports.items() for each in pair]
        made.python("backends", self.core, "-m", "tests.support.backends", *argv)
        self.dnsd = made.dnsd(listen=Endpoint("0.0.0.0", 5533), allow=(IPv4Network("0.0.0.0/0"),))
        self.relay = made.relay()
        routes = [
            tcp_route("web-app", Endpoint("127.0.0.1", HTTP_PORT)),
            udp_route("echo-service", Endpoint("127.0.0.1", UDP_PORT)),
        ]
        self.connector = made.connector("alpha", routes)
        self.agent = made.agent("laptop", SERVICES, host="laptop")
        self.daemons: tuple[Daemon, ...] = (self.relay, self.connector, self.agent)
        for daemon in (self.dnsd, *self.daemons):
            daemon.wait_ready()
        self.vip = {name: made.address(name, "laptop", server=self.core.address) for name in SERVICES}
        until("the agent serves", lambda: self.get() == 200)

    def get(self) -> int:
        return http_get(self.laptop, f"http://{self.vip['web-app']}:8080/")[0]

    def renew(self, name: str, lifetime: timedelta) -> None:
        """Put a new key and certificate in place, as an issuing agent would: two files, one after the other."""
        days = lifetime / timedelta(days=1)
        chain, key = self.lab.authority.issue(name, days=days, **GRANTS[name])  # type: ignore[arg-type]
        directory = self.lab.directory
        replace_file(directory / f"{name}.pem", chain)
        replace_file(directory / f"{name}.key", key)

    def shown(self) -> list[datetime]:
        """When the certificates that are in use expire."""
        return [datetime.fromisoformat(each.status()["certificate"]["not_after"]) for each in self.daemons]


class Traffic:
    """What is done again and again in the background; each failure is written down."""

    def __init__(self) -> None:
        self.done: dict[str, int] = {}
        self.failures: list[str] = []
        self._over = threading.Event()
        self._threads: list[threading.Thread] = []

    def keep(self, name: str, act: Callable[[], None], pause_s: float) -> None:
        self.done[name] = 0

        def run() -> None:
            while not self._over.is_set():
                try:
                    act()
                    self.done[name] += 1
                except (OSError, AssertionError) as error:
                    self.failures.append(f"{time.strftime('%H:%M:%S')} {name}: {error!r}")
                self._over.wait(pause_s)

        self._threads.append(threading.Thread(target=run, name=name))
        self._threads[-1].start()

    def stop(self) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join(60)


@pytest.fixture
def mesh() -> Iterator[Mesh]:
    with lab("core", "laptop") as made:
        made.start_consul("embedded")
        yield Mesh(made)


def slow_download(host: Host, address: str, size: int) -> Callable[[], None]:
    """Return what reads a little more of one download each time; it fails when that ends too soon."""
    connection = host.socket()
    connection.settimeout(30)
    connection.connect((address, 8080))
    connection.sendall(f"GET /bytes/{size}/7 HTTP/1.0\r\n\r\n".encode())

    def more() -> None:
        for _ in range(16):
            assert connection.recv(16_384), "the download ended"

    return more


def test_renewal_of_all_three_under_traffic_loses_nothing(mesh: Mesh) -> None:
    traffic = Traffic()

    def ask() -> None:
        assert mesh.get() == 200

    def echo() -> None:
        payload = str(time.monotonic_ns()).encode()
        answers = (udp_ask(mesh.laptop, mesh.vip["echo-service"], 7, payload) for _ in range(3))
        assert payload in answers, "no datagram came back"

    traffic.keep("short flows", ask, 0.02)
    traffic.keep("datagrams", echo, 0.05)
    traffic.keep("a long flow", slow_download(mesh.laptop, mesh.vip["web-app"], 1 << 30), 0.05)
    try:
        for name in GRANTS:
            mesh.renew(name, BRIEF)
        ends = datetime.now(UTC) + BRIEF
        until("brief certificates are in use", lambda: max(mesh.shown()) <= ends + timedelta(seconds=1))
        for name in GRANTS:
            before = dict(traffic.done)
            mesh.renew(name, timedelta(days=1))
            until("traffic", lambda before=before: all(traffic.done[each] > before[each] for each in before))
        until("lasting ones are in use", lambda: min(mesh.shown()) > ends + timedelta(hours=1))
        until(
            "the brief ones have expired",
            lambda: datetime.now(UTC) > ends + timedelta(seconds=3),
            seconds=60,
        )
        before = dict(traffic.done)
        until("traffic", lambda: all(traffic.done[each] > before[each] + 5 for each in before))
    finally:
        traffic.stop()
    assert traffic.failures == [], traffic.done
    for daemon in mesh.daemons:
        assert daemon.metric("ztna_credential_reloads_total", what="certificate") == 2
        assert "certificate_expiring" not in daemon.status()["readiness"]["warnings"]
