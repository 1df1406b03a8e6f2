"""A daemon that has no descriptor left: what runs goes on, nobody new comes in, nothing spins, and it ends by itself."""

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

SPARE = 12
CROWD = 60
HELD_FLOWS = 3
REFUSALS_PER_SECOND_MAX = 200
"""A loop that spins refuses tens of thousands."""


@pytest.fixture(scope="module")
def mesh() -> Iterator[Mesh]:
    with relayed_mesh("newest", ROUTES, ("east",)) as made:
        serve(made)
        yield made


def descriptors(daemon: Daemon) -> list[int]:
    return sorted(map(int, os.listdir(f"/proc/{daemon.pid}/fd")))


@contextlib.contextmanager
def limited(daemon: Daemon) -> Iterator[None]:
    """Allow a daemon few more descriptors than it has, while inside."""
    before = resource.prlimit(daemon.pid, resource.RLIMIT_NOFILE)
    least = descriptors(daemon)[-1] + 1 + SPARE
    resource.prlimit(daemon.pid, resource.RLIMIT_NOFILE, (least, before[1]))
    try:
        yield
    finally:
        resource.prlimit(daemon.pid, resource.RLIMIT_NOFILE, before)


def exhausted(daemon: Daemon) -> bool:
    """Say whether it has every descriptor that it may have."""
    return len(descriptors(daemon)) >= resource.prlimit(daemon.pid, resource.RLIMIT_NOFILE)[0]


@contextlib.contextmanager
def crowd(host: Host, address: str, port: int) -> Iterator[None]:
    """Connect so often and say nothing, again when it was closed, while inside."""
    sockets: list[socket.socket] = []
    try:
        for _ in range(CROWD):
            sock = host.socket()
            sockets.append(sock)
            sock.setblocking(False)
            sock.connect_ex((address, port))
        yield
    finally:
        for sock in sockets:
            sock.close()


def refusals(daemon: Daemon) -> float:
    return daemon.metric("ztna_drops_total", why="exhausted") + daemon.metric(
        "ztna_refusals_total", reason="limit_reached"
    )


@pytest.mark.parametrize("whose", ["laptop", "east", "alpha"])
def test_what_runs_goes_on_and_all_is_well_afterwards(
    request: pytest.FixtureRequest, mesh: Mesh, whose: str
) -> None:
    note_version(request, "newest")
    daemon = next(each for each in mesh.lab.daemons if each.name == whose)
    where = {
        "laptop": (mesh.laptop, mesh.address("web-app"), 8080),
        "east": (mesh.laptop, mesh.lab.host("east").address, 4434),
        "alpha": (mesh.laptop, mesh.core.address, 4435),
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
            told = until("it tells", lambda: [refusals(daemon)])[0] - before
            assert 0 < told < REFUSALS_PER_SECOND_MAX * (time.monotonic() - began)
            for sock in held:
                running.finish_upload(sock, b", and afterwards", said=b"before, while nobody new comes in")
    with load(mesh) as running:
        running.passes()
    until("all are ready", lambda: all(each.ready() for each in mesh.lab.daemons))
