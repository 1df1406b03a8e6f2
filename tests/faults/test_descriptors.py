"""A daemon has no descriptor left: what runs goes on, nobody new comes in, nothing spins; then all is well again."""

from __future__ import annotations

import contextlib
import os
import resource
import socket
import time
from collections.abc import Iterator

import pytest

from tests.support.consul import note_version
from tests.support.lab import Daemon, until
from tests.support.load import ROUTES, load, serve
from tests.support.namespaces import Host
from tests.support.relayed import Mesh, relayed_mesh

pytestmark = [pytest.mark.namespaces, pytest.mark.slow]

SPARE = 4
CROWD = 60
CONNECT_SECONDS = 10.0
HELD_FLOWS = 3
REFUSALS_PER_SECOND_MAX = 200
"""A loop that spins refuses tens of thousands."""


@pytest.fixture(scope="module")
def mesh() -> Iterator[Mesh]:
    with relayed_mesh("newest", ROUTES, ("east",)) as made:
        serve(made)
        yield made


def free(daemon: Daemon, limit: int) -> list[int]:
    """Return the numbers below a limit that no descriptor has; a new one takes the lowest."""
    return sorted(set(range(limit)) - set(map(int, os.listdir(f"/proc/{daemon.pid}/fd"))))


@contextlib.contextmanager
def limited(daemon: Daemon) -> Iterator[None]:
    """Allow a daemon few more descriptors than it has, while inside."""
    before = resource.prlimit(daemon.pid, resource.RLIMIT_NOFILE)
    limit = free(daemon, before[0])[SPARE]
    resource.prlimit(daemon.pid, resource.RLIMIT_NOFILE, (limit, before[1]))
    try:
        yield
    finally:
        resource.prlimit(daemon.pid, resource.RLIMIT_NOFILE, before)


def exhausted(daemon: Daemon) -> bool:
    """Say whether it has every descriptor that it may have."""
    return not free(daemon, resource.prlimit(daemon.pid, resource.RLIMIT_NOFILE)[0])


@contextlib.contextmanager
def crowd(host: Host, address: str, port: int, said: bytes) -> Iterator[None]:
    """Connect so often, say this and no more, and stay, while inside."""
    sockets: list[socket.socket] = []
    try:
        for _ in range(CROWD):
            sock = host.socket()
            sockets.append(sock)
            sock.settimeout(CONNECT_SECONDS)
            sock.connect((address, port))
            sock.sendall(said)
        yield
    finally:
        for sock in sockets:
            sock.close()


def refusals(daemon: Daemon) -> float:
    """Return how often it said that it had no descriptor for a connection, in whose words ever."""
    drops = sum(daemon.metric("ztna_drops_total", why=why) for why in ("exhausted", "limit"))
    return drops + daemon.metric("ztna_refusals_total", reason="limit_reached")


@pytest.mark.parametrize("whose", ["laptop", "east", "alpha"])
def test_what_runs_goes_on_and_all_is_well_afterwards(
    request: pytest.FixtureRequest, mesh: Mesh, whose: str
) -> None:
    note_version(request, "newest")
    daemon = next(each for each in mesh.lab.daemons if each.name == whose)
    where = {
        "laptop": (mesh.laptop, mesh.address("web-app"), 8080, b""),
        "east": (mesh.laptop, mesh.lab.host("east").address, 4434, b"\0ZTD"),
        "alpha": (mesh.laptop, mesh.core.address, 4435, b""),
    }
    with load(mesh, transfers=False) as running, contextlib.ExitStack() as flows:
        held = [flows.enter_context(running.upload_begun()) for _ in range(HELD_FLOWS)]
        for sock in held:
            sock.sendall(b"before")
        running.echoes()
        before = refusals(daemon)
        with limited(daemon):
            with crowd(*where[whose]):
                until("no descriptor is left", lambda: exhausted(daemon))
                began = time.monotonic()
                for sock in held:
                    sock.sendall(b", while nobody new comes in")
                running.echoes()
            until("descriptors are free again", lambda: not exhausted(daemon))
            told = until("it tells", lambda: max(0.0, refusals(daemon) - before))
            assert told < REFUSALS_PER_SECOND_MAX * (time.monotonic() - began)
            for sock in held:
                running.finish_upload(sock, b", and afterwards", said=b"before, while nobody new comes in")
    with load(mesh) as running:
        running.passes()
    until("all are ready", lambda: all(each.ready() for each in mesh.lab.daemons))
