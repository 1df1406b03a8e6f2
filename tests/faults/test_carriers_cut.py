"""TCP carriers that are cut under downloads and idle flows: every byte arrives, nothing is reset."""

from __future__ import annotations

import socket
import struct
from collections.abc import Callable, Iterator

import pytest

from tests.support.consul import note_version
from tests.support.lab import until
from tests.support.namespaces import Host
from tests.support.relayed import Mesh, relayed_mesh
from tests.support.traffic import (
    DOWNLOADS,
    ECHO_PORT,
    HTTP_PORT,
    IDLE_FLOWS,
    PATIENCE_SECONDS,
    ROUTES,
    traffic,
)

pytestmark = [pytest.mark.namespaces, pytest.mark.slow, pytest.mark.timeout(PATIENCE_SECONDS + 120)]

LINK_PORT, FORWARDER_PORT = 4435, 4434
PATHS = tuple(f"tcp {end} {port}" for port in (LINK_PORT, FORWARDER_PORT) for end in ("dport", "sport"))
NOTICE_SECONDS = 10.0
"""By then a peer that vanished without a word must have been missed (TCP_USER_TIMEOUT, keepalive)."""


@pytest.fixture(params=[True, False], ids=["direct", "forwarded"])
def mesh(request: pytest.FixtureRequest) -> Iterator[Mesh]:
    note_version(request, "newest")
    with relayed_mesh("newest", ROUTES, ("east",), direct=request.param) as made:
        yield made


@pytest.fixture
def direct(request: pytest.FixtureRequest) -> Iterator[Mesh]:
    note_version(request, "newest")
    with relayed_mesh("newest", ROUTES, ("east",), direct=True) as made:
        yield made


def destroyed(host: Host, *which: str) -> None:
    """Have the kernel abort TCP connections of a host, as a NAT that forgot them does: both ends get a RST."""
    host.run("ss", "--kill", "--tcp", "--no-header", *which)


def flows(mesh: Mesh, outcome: str) -> float:
    """Return how many flows the agent counted so."""
    return mesh.agent.metric("ztna_tcp_flows_total", outcome=outcome)


def test_connections_are_reset_again_and_again(mesh: Mesh) -> None:
    east = mesh.relays["east"].host
    cuts: tuple[Callable[[], None], ...] = (
        lambda: destroyed(mesh.laptop, "dport", "=", f":{LINK_PORT}"),
        lambda: destroyed(mesh.core, "sport", "=", f":{LINK_PORT}"),
        lambda: destroyed(mesh.laptop, "dport", "=", f":{FORWARDER_PORT}"),
        lambda: destroyed(east, "sport", "=", f":{FORWARDER_PORT}"),
    )
    with traffic(mesh) as running:
        for number in range(4):
            running.wait_for(0.1 + number * 0.15)
            for cut in cuts:
                cut()
        running.check()
        assert flows(mesh, "resumed") >= DOWNLOADS + IDLE_FLOWS
        assert flows(mesh, "forsaken") == 0


def test_the_direct_path_is_swallowed_without_a_word(direct: Mesh) -> None:
    """It is missed in time, and all goes on through the forwarder."""
    with traffic(direct) as running:
        running.wait_for(0.1)
        with direct.laptop.dropping(f"tcp dport {LINK_PORT}", f"tcp sport {LINK_PORT}"):
            until(
                "every flow is resumed",
                lambda: flows(direct, "resumed") >= DOWNLOADS + IDLE_FLOWS,
                2 * NOTICE_SECONDS,
            )
            running.check()
            assert flows(direct, "forsaken") == 0


def test_every_path_is_swallowed_for_a_while(mesh: Mesh) -> None:
    """Longer than it takes to miss the other end, and less than a detached flow lives."""
    detached = DOWNLOADS + IDLE_FLOWS
    with traffic(mesh) as running:
        running.wait_for(0.1)
        with mesh.laptop.dropping(*PATHS):
            until("every flow is detached", lambda: flows(mesh, "detached") >= detached, 2 * NOTICE_SECONDS)
        running.check()
        assert flows(mesh, "forsaken") == 0


def test_a_reset_that_died_with_its_carrier_is_told_again(direct: Mesh) -> None:
    """The carrier dies without a word, and the program resets its flow meanwhile: the backend must not wait for it."""

    def served() -> int:
        return int(direct.connector.status()["connector"]["tcp_flows"])

    ports = ("--http", str(HTTP_PORT), "--tcp", str(ECHO_PORT))
    direct.lab.python("backend", direct.core, "-m", "tests.support.backends", *ports)
    address = direct.address("shell")
    direct.wait_known()
    with direct.laptop.socket() as program:
        program.settimeout(NOTICE_SECONDS)
        program.connect((address, 22))
        program.sendall(b"hello")
        assert program.recv(5) == b"hello"
        until("it is served", lambda: served() == 1, NOTICE_SECONDS)
        with direct.laptop.dropping(f"tcp dport {LINK_PORT}", f"tcp sport {LINK_PORT}"):
            program.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            program.close()
            # By the forwarder, and long before the connector would miss the agent and forsake the flow.
            until("the connector knows", lambda: served() == 0, NOTICE_SECONDS)
        assert direct.connector.metric("ztna_tcp_flows_total", outcome="forsaken") == 0
