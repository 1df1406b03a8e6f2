"""One of two relays is killed, or swallowed by the network: packet links move to the other within 2 s and live on."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from ipaddress import IPv4Network

import pytest

from tests.support.consul import note_version
from tests.support.lab import Daemon, Lab, lab, udp_route, until
from tests.support.namespaces import Host
from ztna.config import Endpoint

pytestmark = [pytest.mark.namespaces, pytest.mark.slow]

BACKEND_PORT = 18007
INTERVAL_SECONDS = 0.02
MOVED_SECONDS = 2.0
ANSWER_SECONDS = 1.0
"""What was asked so long ago and has no answer is lost; nothing here takes longer."""
SWALLOWED = ('iifname "eth0"', 'oifname "eth0"')


class Backend:
    """Echoes datagrams, and remembers who asked: a flow that lives on keeps its address here."""

    def __init__(self, host: Host) -> None:
        self.askers: set[tuple[str, int]] = set()
        self._socket = host.socket(socket.SOCK_DGRAM)
        self._socket.bind(("127.0.0.1", BACKEND_PORT))
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while True:
            try:
                data, asker = self._socket.recvfrom(2048)
            except OSError:
                return
            if not data:
                return
            self.askers.add(asker)
            self._socket.sendto(data, asker)

    def close(self) -> None:
        self._socket.close()


@dataclass
class Asker:
    """Asks at a steady pace, and knows when each question that has no answer was asked."""

    host: Host
    address: str
    asked: dict[bytes, float] = field(default_factory=dict)
    answered: dict[bytes, float] = field(default_factory=dict)

    @contextmanager
    def asking(self) -> Iterator[Asker]:
        """Ask while inside, and wait for the last answers at the end."""
        over = threading.Event()
        with self.host.socket(socket.SOCK_DGRAM) as asker:
            asker.connect((self.address, 7))
            asker.settimeout(ANSWER_SECONDS)
            threads = [threading.Thread(target=run, args=(asker, over)) for run in (self._ask, self._listen)]
            for thread in threads:
                thread.start()
            try:
                yield self
            finally:
                over.set()
                for thread in threads:
                    thread.join(30)

    def lost(self) -> list[float]:
        """Return when what was never answered was asked."""
        return sorted(at for question, at in self.asked.items() if question not in self.answered)

    def answers_after(self, moment: float) -> int:
        """Count the answers to what was asked after a moment."""
        return sum(self.asked[question] > moment for question in tuple(self.answered))

    def _ask(self, asker: socket.socket, over: threading.Event) -> None:
        number = 0
        while not over.wait(INTERVAL_SECONDS):
            number += 1
            question = b"%d" % number
            self.asked[question] = time.monotonic()
            asker.send(question)

    def _listen(self, asker: socket.socket, over: threading.Event) -> None:
        while True:
            try:
                answer = asker.recv(2048)
            except TimeoutError:
                if over.is_set():
                    return
            else:
                self.answered[answer] = time.monotonic()


@dataclass
class Mesh:
    lab: Lab
    relays: dict[str, Daemon]
    connector: Daemon
    agent: Daemon
    backend: Backend
    asker: Asker

    def carrier(self) -> str:
        """Return the relay that the one link goes by now."""
        (link,) = self.agent.status()["agent"]["links"]
        return str(link["relay"])


@pytest.fixture
def mesh(request: pytest.FixtureRequest) -> Iterator[Mesh]:
    note_version(request, "newest")
    with lab("core", "east", "west", "laptop") as made:
        made.start_consul("newest")
        core = made.host("core")
        backend = Backend(core)
        made.dnsd(listen=Endpoint("0.0.0.0", 5533), allow=(IPv4Network("0.0.0.0/0"),)).wait_ready()
        resolvers = {"resolvers": (Endpoint(core.address, 5533),), "dns_insecure": True, "drain_s": 20.0}
        relays = {name: made.relay(name, host=name, **resolvers) for name in ("east", "west")}
        both = {"relays": tuple(made.target(name, host=name) for name in relays)}
        route = udp_route("echo-service", Endpoint("127.0.0.1", BACKEND_PORT))
        connector = made.connector("alpha", [route], **both)
        agent = made.agent("laptop", ["echo-service"], host="laptop", direct=False, **both)
        for daemon in (*relays.values(), connector, agent):
            daemon.wait_ready()
        until("both relays have the connector", lambda: all(_knows(relay) for relay in relays.values()), 30)
        address = made.address("echo-service", "laptop", server=core.address)
        yield Mesh(made, relays, connector, agent, backend, Asker(made.host("laptop"), address))
        backend.close()


def _knows(relay: Daemon) -> bool:
    return bool(relay.status()["srv"]["services"].get("echo-service", {}).get("connectors"))


def killed(mesh: Mesh, name: str) -> AbstractContextManager[None]:
    mesh.relays[name].kill()
    return nullcontext()


def swallowed(mesh: Mesh, name: str) -> AbstractContextManager[None]:
    return mesh.lab.host(name).dropping(*SWALLOWED)


@pytest.mark.parametrize("lose", [killed, swallowed])
def test_only_what_was_under_way_for_two_seconds_is_lost(
    mesh: Mesh, lose: Callable[[Mesh, str], AbstractContextManager[None]]
) -> None:
    with mesh.asker.asking() as asker:
        until("it is answered", lambda: len(asker.answered) > 50)
        doomed = mesh.carrier()
        lost_at = time.monotonic()
        with lose(mesh, doomed):
            begun = time.monotonic()
            until("it is answered again", lambda: asker.answers_after(begun + MOVED_SECONDS) > 50, 30)
            assert mesh.carrier() != doomed
    lost = [at for at in asker.lost() if at > lost_at - ANSWER_SECONDS]
    assert lost, "the relay carried it"
    print(f"lost {len(lost)} of {len(asker.asked)}, the last {max(lost) - begun:.2f} s after the relay")
    assert max(lost) - begun < MOVED_SECONDS
    assert not [at for at in asker.lost() if at <= lost_at - ANSWER_SECONDS]
    assert len(mesh.backend.askers) == 1, "the flow's socket at the backend lived on"
    assert len(mesh.agent.events("link_opened")) == 1, "and the link's connection too"
    assert mesh.agent.events("link_moved")


def test_a_drained_relay_loses_nothing(mesh: Mesh) -> None:
    with mesh.asker.asking() as asker:
        until("it is answered", lambda: len(asker.answered) > 50)
        doomed = mesh.carrier()
        begun = time.monotonic()
        assert mesh.relays[doomed].stop(30) == 0
        ended_s = time.monotonic() - begun
        until("it is answered", lambda: asker.answers_after(time.monotonic() - 0.2) > 5)
        assert mesh.carrier() != doomed
    assert asker.lost() == []
    assert len(mesh.backend.askers) == 1
    assert ended_s < 10, "it ends when it is empty, not at the deadline"
    print(f"the relay had drained in {ended_s:.2f} s")
