"""TCP is dropped from the start, or in the middle: TCP flows ride the packet carrier, and TCP again when they can."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator

import pytest

from tests.support import traffic as traffic_module
from tests.support.blocked import RELAY, TCP_OF_MESH, blocked_mesh
from tests.support.consul import note_version
from tests.support.lab import http_get, until
from tests.support.relayed import Mesh
from tests.support.traffic import HTTP_PORT, ROUTES, traffic

pytestmark = [pytest.mark.namespaces, pytest.mark.slow]

CHOSEN_SECONDS = 4.0
STOPPED_BYTES_MAX = 32 * 1024 * 1024
GOING_ON = 20


@pytest.fixture
def mesh(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Mesh]:
    monkeypatch.setattr(traffic_module, "DOWNLOAD_BYTES", 6 << 20)
    note_version(request, "newest")
    with blocked_mesh("newest", ROUTES, direct=True) as made:
        yield made


def wait_all_ready(mesh: Mesh) -> None:
    for daemon in (mesh.connector, mesh.agent):
        daemon.wait_ready()


def routes(mesh: Mesh) -> dict[str, str]:
    """Return which way TCP flows go, by connector."""
    found: dict[str, str] = mesh.status()["streams"]["routes"]
    return found


def is_asked(mesh: Mesh, address: str) -> bool:
    return http_get(mesh.laptop, f"http://{address}:8080/")[0] == 200


@pytest.mark.parametrize("host", ["laptop", "core", RELAY])
def test_from_the_start(mesh: Mesh, host: str) -> None:
    """Every byte arrives, whoever's TCP is blocked; with the relay's alone it goes directly."""
    with mesh.lab.host(host).dropping(*TCP_OF_MESH):
        wait_all_ready(mesh)
        with traffic(mesh) as running:
            running.check()
        assert routes(mesh) == {"alpha": "direct" if host == RELAY else "quic"}


def test_in_the_middle_and_back(mesh: Mesh) -> None:
    """Flows change the kind of carrier by RESUME; new ones go by TCP again once that gets through."""
    wait_all_ready(mesh)
    with traffic(mesh) as running:
        running.wait_for(0.05)
        assert routes(mesh) == {"alpha": "direct"}
        with mesh.laptop.dropping(*TCP_OF_MESH):
            until("the packet carrier is chosen", lambda: routes(mesh) == {"alpha": "quic"}, 30)
            running.check()
        web = mesh.address("web-app")
        until(
            "new flows go by TCP",
            lambda: is_asked(mesh, web) and routes(mesh) == {"alpha": "direct"},
            100,
            every=1.0,
        )
        running.shells.speak(b"and at last")
    assert mesh.agent.metric("ztna_tcp_flows_total", outcome="resumed") > 0


def test_a_reader_that_stops_costs_no_more_than_its_window(mesh: Mesh) -> None:
    mesh.lab.python("backend", mesh.core, "-m", "tests.support.backends", "--http", str(HTTP_PORT))
    with mesh.laptop.dropping(*TCP_OF_MESH):
        wait_all_ready(mesh)
        web = mesh.address("web-app")
        begun = 0.0

        def is_first_answered() -> bool:
            nonlocal begun
            begun = time.monotonic()
            return is_asked(mesh, web)

        until("it is answered", is_first_answered, 30)
        took = time.monotonic() - begun
        print(f"the first flow took {took:.2f} s")
        assert took < CHOSEN_SECONDS
        before = mesh.agent.memory(), mesh.connector.memory()
        with mesh.laptop.socket() as sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 64 * 1024)
            sock.settimeout(10)
            sock.connect((web, 8080))
            sock.sendall(b"GET /bytes/%d/7 HTTP/1.0\r\n\r\n" % (1 << 30))
            assert sock.recv(1)
            # Others are served meanwhile, for far longer than a window takes to fill.
            assert all(is_asked(mesh, web) for _ in range(GOING_ON))
            after = mesh.agent.memory(), mesh.connector.memory()
        grown = [now - then for then, now in zip(before, after, strict=True)]
        assert max(grown) < STOPPED_BYTES_MAX, grown
