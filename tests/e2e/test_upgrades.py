"""Daemons of an earlier release and of this one side by side, and every daemon upgraded in turn.

What a mesh of both must do is asked at each step of two ways through an upgrade: relays first, and relays last. So each
kind of daemon of one release meets each of the other.
"""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from functools import lru_cache
from importlib.metadata import version

import pytest

from tests.support.consul import note_version
from tests.support.lab import Daemon, Lab, http_get, tcp_route, udp_ask, udp_route, until
from tests.support.relayed import Mesh, relayed_mesh
from tests.support.releases import NOW, change, earlier, unpacked
from ztna.config import Endpoint

pytestmark = [pytest.mark.namespaces, pytest.mark.slow]

HTTP_PORT, TCP_PORT, UDP_PORT = 18080, 18081, 18082
ROUTES = (
    tcp_route("web-app", Endpoint("127.0.0.1", HTTP_PORT)),
    tcp_route("shell", Endpoint("127.0.0.1", TCP_PORT), port=22),
    udp_route("echo-service", Endpoint("127.0.0.1", UDP_PORT)),
)
PREVIOUS, *OLDER = earlier()
DRAIN_SECONDS = 3.0
STOP_SECONDS = 30.0
UNNOTICED = frozenset({"east", "west", "dnsd"})
"""What flows live through. Those of an agent end with it, those of a connector when it has drained."""
ORDERS = {
    "relays_first": ("east", "west", "dnsd", "beta", "alpha", "laptop"),
    "relays_last": ("laptop", "beta", "alpha", "dnsd", "west", "east"),
}


@pytest.fixture(scope="module")
def environments(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Mapping[str, str]]:
    """Returns the environment of a release's daemons, each unpacked once."""
    return lru_cache(lambda commit: unpacked(commit, tmp_path_factory.mktemp("release")))


@contextmanager
def mesh_of(release: Mapping[str, str]) -> Iterator[Mesh]:
    """Two relays, two connectors of the same services and an agent, all of a release."""

    def prepare(lab: Lab) -> None:
        lab.environment = lambda name: release
        ports = ("--http", str(HTTP_PORT), "--tcp", str(TCP_PORT), "--udp", str(UDP_PORT))
        lab.python("backend", lab.host("core"), "-m", "tests.support.backends", *ports)

    with relayed_mesh(
        "newest", ROUTES, drain_s=DRAIN_SECONDS, prepare=prepare, connector_keys={"drain_s": DRAIN_SECONDS}
    ) as made:
        link = Endpoint(made.core.address, 4445)
        relays = tuple(made.lab.target(name, host=name) for name in made.relays)
        made.lab.connector("beta", ROUTES, relays=relays, link=link, drain_s=DRAIN_SECONDS).wait_ready()
        yield made


def works(mesh: Mesh) -> None:
    """Wait until names resolve, and TCP and UDP flow."""
    web, echo = (mesh.address(service) for service in ("web-app", "echo-service"))
    until("TCP flows", lambda: http_get(mesh.laptop, f"http://{web}:8080/")[0] == 200, 60)
    until("UDP flows", lambda: udp_ask(mesh.laptop, echo, 7, b"a word") == b"a word", 60)


def versions(relay: Daemon) -> dict[str, str | None]:
    """Return the release that each peer of a relay of this release says it is."""
    return {each["peer"].rpartition("/")[2]: each["version"] for each in relay.status()["connections"]}


def both_known(mesh: Mesh) -> bool:
    """Whether both relays send sessions of all services to both connectors."""
    told = [relay.status()["srv"]["services"] for relay in mesh.relays.values()]
    return all(len(each[service]["connectors"]) == 2 for each in told for service in mesh.services)


def daemon(mesh: Mesh, name: str) -> Daemon:
    return next(each for each in mesh.lab.daemons if each.name == name)


class Traffic:
    """Requests one after the other, and one flow that stays, through an upgrade; what fails is kept."""

    def __init__(self, mesh: Mesh) -> None:
        self.answered = 0
        self.failed: list[str] = []
        self._mesh = mesh
        self._url = f"http://{mesh.address('web-app')}:8080/"
        self._shell = mesh.address("shell")
        self._over = threading.Event()
        self._held = self._opened()

    def ask(self) -> None:
        """Ask until it is over."""
        while not self._over.is_set():
            try:
                assert http_get(self._mesh.laptop, self._url, 20)[0] == 200
                self.answered += 1
            except (OSError, AssertionError) as error:
                self.failed.append(repr(error))

    @contextmanager
    def going_on(self) -> Iterator[None]:
        """Ask all the while that is inside: nothing may fail, and the flow that stays lives through it."""
        self._over.clear()
        with ThreadPoolExecutor(1) as threads:
            asking = threads.submit(self.ask)
            before = self.answered
            try:
                until("requests are answered", lambda: self.answered > before)
                yield
                before = self.answered
                until("requests are answered", lambda: self.answered > before + 1, 60)
            finally:
                self._over.set()
            asking.result()
        assert not self.failed
        self._speak()

    def again(self) -> None:
        """Begin the flow that stays anew."""
        self._held.close()
        self._held = until("a flow", self._opened, 60)

    def _opened(self) -> socket.socket:
        self._held = self._mesh.laptop.socket()
        self._held.settimeout(20)
        self._held.connect((self._shell, 22))
        self._speak()
        return self._held

    def _speak(self) -> None:
        self._held.sendall(b"a word\n")
        assert self._held.recv(100) == b"a word\n"

    def close(self) -> None:
        self._held.close()


@pytest.mark.parametrize(
    ("commit", "order"),
    [(PREVIOUS, "relays_first"), (PREVIOUS, "relays_last"), *((each, "relays_last") for each in OLDER)],
    ids=lambda value: value[:12],
)
def test_every_daemon_in_turn(
    request: pytest.FixtureRequest,
    environments: Callable[[str], Mapping[str, str]],
    commit: str,
    order: str,
) -> None:
    """Whatever was upgraded, it works at each step; from the previous release on nobody notices relays and dnsd."""
    note_version(request, "newest")
    with mesh_of(environments(commit)) as mesh:
        works(mesh)
        until("the relays know both connectors", lambda: both_known(mesh), 60)
        with closing(Traffic(mesh)) as traffic:
            for name in ORDERS[order]:
                upgraded = daemon(mesh, name)
                if commit == PREVIOUS and name in UNNOTICED:
                    with traffic.going_on():
                        change(upgraded, NOW, STOP_SECONDS)
                else:
                    change(upgraded, NOW, STOP_SECONDS)
                    traffic.again()
                works(mesh)
                until("the relays know both connectors", lambda: both_known(mesh), 60)
        told = until(
            "all peers are here",
            lambda: {"alpha", "beta", "laptop"} <= (found := versions(mesh.relays["west"])).keys() and found,
        )
        assert set(told.values()) == {version("ztna-mesh")}
