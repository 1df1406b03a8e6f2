"""UDP is dropped from the start, or in the middle, or for one end only: everything goes on over TCP, and back."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from datetime import datetime

import pytest

from tests.support.blocked import ALL_BUT_443_TCP, RELAY, UDP_OF_MESH, blocked_mesh, transport
from tests.support.consul import note_version
from tests.support.lab import Daemon, until
from tests.support.relayed import Mesh
from tests.support.traffic import ROUTES, traffic

pytestmark = [pytest.mark.namespaces, pytest.mark.slow]

CHOSEN_SECONDS = 3.0
BACK_SECONDS = 30.0


@pytest.fixture
def blocked(request: pytest.FixtureRequest) -> Iterator[Callable[..., Mesh]]:
    """Start a mesh; what `drops` name is dropped from before its connector and agent start."""
    note_version(request, "newest")
    with ExitStack() as stack:

        def start(drops: dict[str, Sequence[str]]) -> Mesh:
            mesh = stack.enter_context(blocked_mesh("newest", ROUTES))
            for host, rules in drops.items():
                stack.enter_context(mesh.lab.host(host).dropping(*rules))
            return mesh

        yield start


def wait_all_ready(mesh: Mesh) -> None:
    for daemon in (mesh.connector, mesh.agent):
        daemon.wait_ready()


@pytest.mark.parametrize(
    "drops",
    [
        pytest.param({"laptop": UDP_OF_MESH}, id="agent"),
        pytest.param({"core": UDP_OF_MESH}, id="connector"),
        pytest.param({RELAY: ALL_BUT_443_TCP}, id="only-443-tcp"),
    ],
)
def test_from_the_start(blocked: Callable[..., Mesh], drops: dict[str, Sequence[str]]) -> None:
    mesh = blocked(drops)
    wait_all_ready(mesh)
    with traffic(mesh) as running:
        running.check()
    assert transport(mesh) == ("quic" if drops.keys() == {"core"} else "tls")
    (seen,) = mesh.connector.status()["connector"]["relays"]
    assert seen["transport"] == ("quic" if drops.keys() == {"laptop"} else "tls")
    behind = {"laptop": [mesh.agent], "core": [mesh.connector], RELAY: [mesh.agent, mesh.connector]}
    (place,) = drops
    for daemon in behind[place]:
        assert seconds_until_connected(daemon) < CHOSEN_SECONDS


def seconds_until_connected(daemon: Daemon) -> float:
    """Return how long after its start a daemon had its relay, as it says itself."""
    (started, *_), (connected, *_) = daemon.events("started"), daemon.events("relay_connected")
    assert connected["transport"] == "tls"
    began, had = (datetime.fromisoformat(each["time"]) for each in (started, connected))
    return (had - began).total_seconds()


def test_in_the_middle_and_back(blocked: Callable[..., Mesh]) -> None:
    mesh = blocked({})
    wait_all_ready(mesh)
    assert transport(mesh) == "quic"
    with traffic(mesh) as running:
        running.wait_for(0.1)
        with mesh.lab.host(RELAY).dropping(*UDP_OF_MESH):
            begun = time.monotonic()
            until("TLS is chosen", lambda: transport(mesh) == "tls", 20)
            took = time.monotonic() - begun
            print(f"TLS was chosen {took:.2f} s after UDP was blocked")
            running.wait_for(0.3)
        until("QUIC again", lambda: transport(mesh) == "quic", BACK_SECONDS)
        running.check()
    assert took < CHOSEN_SECONDS
