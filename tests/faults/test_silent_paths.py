"""Paths that swallow large packets, or all, and say nothing of it: no ICMP comes, and no end knows of the size."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

import pytest

from tests.support.blocked import dropping
from tests.support.consul import note_version
from tests.support.lab import until
from tests.support.load import ROUTES, Asker, load, serve
from tests.support.relayed import Mesh, relayed_mesh

pytestmark = [pytest.mark.namespaces, pytest.mark.slow, pytest.mark.timeout(300)]

NARROW_BYTES = 1280
HOLE = f'iifname "eth0" meta length > {NARROW_BYTES}'
LARGE_BYTES = 1250
"""Of a datagram that fits into a packet of a link only while those are large."""
PATIENCE_SECONDS = 90.0
"""A carrier whose packets vanish is given up after 10 s, a handshake after 5."""
GIVEN_UP_SECONDS = 10.0
"""When TCP itself gives a carrier up (TCP_USER_TIMEOUT), which is too late."""
TCP = tuple(f"tcp {end} {{ 4434, 4435 }}" for end in ("dport", "sport"))
UDP = tuple(f"udp {end} {{ 4433, 4434, 4435 }}" for end in ("dport", "sport"))


@pytest.fixture(scope="module", params=[True, False], ids=["direct", "forwarded"])
def mesh(request: pytest.FixtureRequest) -> Iterator[Mesh]:
    with relayed_mesh("newest", ROUTES, ("east",), direct=request.param) as made:
        serve(made)
        for each in made.lab.network.hosts.values():
            # As in test_bad_links: else nothing but the last segment of many has a size of its own.
            each.run("ip", "link", "set", "eth0", "gso_max_segs", "1")
        yield made


def is_direct(request: pytest.FixtureRequest) -> bool:
    """Say which of the two meshes it is."""
    return bool(request.node.callspec.params["mesh"])


@contextlib.contextmanager
def black_hole(mesh: Mesh) -> Iterator[None]:
    """No host hears anything large of another while inside."""
    with contextlib.ExitStack() as holes:
        for host in mesh.lab.network.hosts.values():
            holes.enter_context(dropping(host, (HOLE,)))
        yield


@contextlib.contextmanager
def large_echoes(mesh: Mesh) -> Iterator[None]:
    """Large datagrams are asked all the while, and answered at the end."""
    asker = Asker(mesh.laptop, mesh.address("echo-service"), (LARGE_BYTES,))
    with asker.asking():
        yield
        began = time.monotonic()
        until("large echoes", lambda: asker.answers_after(began, LARGE_BYTES) > 3, PATIENCE_SECONDS)
    assert asker.strange() == []


def test_a_carrier_that_is_cut_without_a_word_is_missed_by_both_ends_before_tcp_gives_it_up(
    request: pytest.FixtureRequest, mesh: Mesh
) -> None:
    """Of a forwarded one the connector's leg is cut, and the agent learns of it from the relay.

    The first of these: after the others an agent does without the direct way for a minute.
    """
    note_version(request, "newest")

    def detached() -> list[float]:
        ends = (mesh.agent, mesh.connector)
        return [each.metric("ztna_tcp_flows_total", outcome="detached") for each in ends]

    with load(mesh) as running, running.upload_begun() as held:
        until("the flow is carried", lambda: mesh.agent.metric("ztna_flows", protocol="tcp") > 0)
        running.passes(PATIENCE_SECONDS)
        before = detached()
        with dropping(mesh.core, TCP):
            cut = time.monotonic()
            held.sendall(b"said as it is cut")
            until("the flow is detached", lambda: all(n > m for n, m in zip(detached(), before, strict=True)))
            assert time.monotonic() - cut < GIVEN_UP_SECONDS
        running.passes(PATIENCE_SECONDS)
        running.finish_upload(held, b" and after", b"said as it is cut")


def test_a_path_becomes_a_black_hole_and_wide_again(request: pytest.FixtureRequest, mesh: Mesh) -> None:
    note_version(request, "newest")
    with load(mesh) as running, black_hole(mesh), large_echoes(mesh):
        running.passes(PATIENCE_SECONDS)
    with load(mesh) as running:
        running.passes(PATIENCE_SECONDS)


def test_a_mesh_starts_in_a_black_hole(request: pytest.FixtureRequest, mesh: Mesh) -> None:
    """The one over QUIC, and TCP where it can; the other where no UDP gets through either."""
    note_version(request, "newest")
    blocked = () if is_direct(request) else UDP
    mesh.agent.stop()
    mesh.connector.stop()
    with black_hole(mesh), contextlib.ExitStack() as blocking:
        if blocked:
            blocking.enter_context(dropping(mesh.laptop, blocked))
        for daemon in (mesh.connector, mesh.agent):
            daemon.start()
            daemon.wait_ready(PATIENCE_SECONDS)
        mesh.wait_known()
        with load(mesh) as running:
            running.passes(PATIENCE_SECONDS)
