"""UDP echo through a network that drops UDP: over stream carriers within 3 s, and by UDP again when it gets through."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest

from tests.faults.test_relay_loss_udp import ANSWER_SECONDS, BACKEND_PORT, Asker, Backend
from tests.support.blocked import (
    ALL_BUT_443_TCP,
    FORWARDER_PORT,
    RELAY,
    UDP_OF_MESH,
    blocked_mesh,
    transport,
)
from tests.support.consul import note_version
from tests.support.lab import udp_ask, udp_route, until
from tests.support.relayed import Mesh
from ztna.config import Endpoint

pytestmark = [pytest.mark.namespaces, pytest.mark.slow]

CHOSEN_SECONDS = 3.0
BACK_SECONDS = 40.0
LARGE = bytes(range(250)) * 8


@pytest.fixture
def mesh(request: pytest.FixtureRequest) -> Iterator[Mesh]:
    note_version(request, "newest")
    routes = [udp_route("echo-service", Endpoint("127.0.0.1", BACKEND_PORT))]
    with blocked_mesh("newest", routes) as made:
        yield made


@pytest.fixture
def backend(mesh: Mesh) -> Iterator[Backend]:
    made = Backend(mesh.core)
    yield made
    made.close()


def asker(mesh: Mesh) -> Asker:
    for daemon in (mesh.connector, mesh.agent):
        daemon.wait_ready()
    mesh.wait_known()
    return Asker(mesh.laptop, mesh.address("echo-service"))


def carriers(mesh: Mesh) -> list[str]:
    """Return what carries packets now."""
    return [link["carrier"] for link in mesh.status()["links"] if link["path"] != "dialling"]


@pytest.mark.parametrize(
    ("host", "rules"),
    [
        pytest.param("laptop", UDP_OF_MESH, id="agent"),
        pytest.param("core", UDP_OF_MESH, id="connector"),
        pytest.param(RELAY, ALL_BUT_443_TCP, id="only-443-tcp"),
    ],
)
def test_from_the_start(mesh: Mesh, backend: Backend, host: str, rules: tuple[str, ...]) -> None:
    with mesh.lab.host(host).dropping(*rules):
        echo = asker(mesh)
        with echo.asking():
            until("it is answered", lambda: echo.answered, 30)
            took = min(echo.answered.values()) - min(echo.asked.values())
            print(f"the first answer came after {took:.2f} s")
            until("it goes on", lambda: len(echo.answered) > 100)
            assert carriers(mesh) == ["tls"]
        assert took < CHOSEN_SECONDS
        assert len(backend.askers) == 1, "one flow at the agent is one at the backend"


@pytest.mark.parametrize(
    "rules",
    [
        pytest.param(UDP_OF_MESH, id="all-udp"),
        pytest.param((f"udp dport {FORWARDER_PORT}", f"udp sport {FORWARDER_PORT}"), id="forwarder"),
    ],
)
def test_in_the_middle_and_back(mesh: Mesh, backend: Backend, rules: tuple[str, ...]) -> None:
    echo = asker(mesh)
    with echo.asking():
        until("it is answered", lambda: len(echo.answered) > 50)
        assert carriers(mesh) == ["quic"] and transport(mesh) == "quic"
        with mesh.lab.host("laptop").dropping(*rules):
            begun = time.monotonic()
            until("it is answered again", lambda: echo.answers_after(begun) > 50, 30)
            first = min(at for question, at in echo.answered.items() if echo.asked[question] > begun)
            print(f"UDP was blocked for {first - begun:.2f} s")
            until("the stream carrier carries", lambda: carriers(mesh) == ["tls"])
        restored = time.monotonic()
        until("UDP carries again", lambda: carriers(mesh) == ["quic"], BACK_SECONDS)
        until("control too", lambda: transport(mesh) == "quic", BACK_SECONDS)
        print(f"UDP carried again {time.monotonic() - restored:.2f} s after it got through")
        seen = len(echo.answered)
        until("it goes on", lambda: len(echo.answered) > seen + 100)
    assert first - begun < CHOSEN_SECONDS
    lost = [at for at in echo.lost() if at > restored + ANSWER_SECONDS]
    print(f"{len(lost)} of {len(echo.asked)} were lost on the way back")
    assert len(lost) < 50, "the way back costs what was under way, at most"
    assert len(backend.askers) == 1, "the flow went on"


def test_large_ones(mesh: Mesh, backend: Backend) -> None:
    """What would not fit into a DATAGRAM goes as one frame."""
    with mesh.lab.host("laptop").dropping(*UDP_OF_MESH):
        address = asker(mesh).address
        until("it is answered", lambda: udp_ask(mesh.laptop, address, 7, b"small") == b"small", 30)
        assert udp_ask(mesh.laptop, address, 7, LARGE, 5.0) == LARGE
