"""The nearest relay carries new sessions: when the way to one becomes long, another takes over, but not at once."""

from __future__ import annotations

import heapq
import select
import socket
import threading
import time
from collections.abc import Iterator

import msgspec
import pytest

from sidecar.agent.relays import BETTER_FOR_SECONDS
from tests.support.consul import note_version
from tests.support.lab import http_get, tcp_route, until
from tests.support.namespaces import Host
from tests.support.relayed import Mesh, relayed_mesh
from ztna import config as configuration
from ztna.config import Endpoint, RelayTarget
from ztna.wire.control import Address

pytestmark = [pytest.mark.namespaces, pytest.mark.slow]

HTTP_PORT = 18080
LONG_SECONDS = 0.06
WAKE_SECONDS = 0.05


class Way:
    """A way to a UDP port for one client, as long as the test wants it to be."""

    def __init__(self, host: Host, target: tuple[str, int]) -> None:
        self.delay_s = 0.0
        self._front, self._back = (host.socket(socket.SOCK_DGRAM) for _ in range(2))
        self._front.bind((host.address, target[1]))
        self._back.connect(target)
        self._client: tuple[str, int] | None = None
        self._waiting: list[tuple[float, int, bytes, bool]] = []
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def close(self) -> None:
        self._over.set()
        self._thread.join(10)
        self._front.close()
        self._back.close()

    def _run(self) -> None:
        number = 0
        while not self._over.is_set():
            due_s = self._waiting[0][0] - time.monotonic() if self._waiting else WAKE_SECONDS
            ready, _, _ = select.select([self._front, self._back], [], [], min(WAKE_SECONDS, max(0.0, due_s)))
            for sock in ready:
                try:
                    data, source = sock.recvfrom(65536)
                except ConnectionRefusedError:
                    continue
                if sock is self._front:
                    self._client = source
                number += 1
                due = time.monotonic() + self.delay_s
                heapq.heappush(self._waiting, (due, number, data, sock is self._front))
            while self._waiting and self._waiting[0][0] <= time.monotonic():
                _, _, data, onward = heapq.heappop(self._waiting)
                if onward:
                    self._back.send(data)
                elif self._client is not None:
                    self._front.sendto(data, self._client)


@pytest.fixture
def mesh(request: pytest.FixtureRequest) -> Iterator[Mesh]:
    note_version(request, "embedded")
    with relayed_mesh("embedded", [tcp_route("web-app", Endpoint("127.0.0.1", HTTP_PORT))]) as made:
        made.lab.python("backend", made.core, "-m", "tests.support.backends", "--http", str(HTTP_PORT))
        made.wait_known()
        yield made


@pytest.fixture
def way(mesh: Mesh) -> Iterator[Way]:
    """The way to the relay `east`, by which the agent reaches it from now on, alone at first."""
    between, east = mesh.lab.host("between"), mesh.lab.host("east")
    made = Way(between, (east.address, 4433))
    try:
        target = RelayTarget(
            name="east",
            address=Endpoint(between.address, 4433),
            forwarders=(Address(east.address, 4434),),
        )
        use_relays(mesh, target, mesh.lab.target("west", host="west"))
        yield made
    finally:
        made.close()


def use_relays(mesh: Mesh, *targets: RelayTarget) -> None:
    """Start the agent again with these relays."""
    file = mesh.agent.config_file
    assert file is not None
    config = configuration.load(file, {}, {})
    assert config.agent is not None
    agent = msgspec.structs.replace(config.agent, relays=targets)
    file.write_text(configuration.dump(msgspec.structs.replace(config, agent=agent), secrets=True))
    mesh.agent.restart()
    mesh.agent.wait_ready()


def preferred(mesh: Mesh) -> str:
    return next(str(each["relay"]) for each in mesh.status()["relays"] if each["preferred"])


def asked_over(mesh: Mesh) -> str:
    """Make a new connection; return the relay of the session that it got."""
    web = mesh.address("web-app")
    before = {session["session"] for session in mesh.status()["sessions"]}
    assert http_get(mesh.laptop, f"http://{web}:8080/")[0] == 200
    sessions = mesh.status()["sessions"]
    newer = [each for each in sessions if each["session"] not in before] or sessions
    return str(newer[-1]["relay"])


def test_new_sessions_go_over_the_nearest_relay(mesh: Mesh, way: Way) -> None:
    mesh.relays["west"].stop(30)
    until("only one is there", lambda: preferred(mesh) == "east", 30)
    mesh.relays["west"].start()
    mesh.wait_known()
    until("both are up", lambda: {each["state"] for each in mesh.status()["relays"]} == {"up"}, 30)
    assert preferred(mesh) == "east", "one that is there is not left for another that is as near"
    assert asked_over(mesh) == "east"

    way.delay_s = LONG_SECONDS
    begun = time.monotonic()
    until("the other one is preferred", lambda: preferred(mesh) == "west", 60)
    assert time.monotonic() - begun >= BETTER_FOR_SECONDS, "not for a moment's sake"
    until("and new sessions are there", lambda: asked_over(mesh) == "west", 10)
