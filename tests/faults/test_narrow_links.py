"""A host's link becomes narrower than Ethernet under load, and wide again: carriers that stall are replaced."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest

from tests.support.consul import note_version
from tests.support.lab import until
from tests.support.load import ROUTES, load, serve
from tests.support.namespaces import Host, Network
from tests.support.relayed import Mesh, relayed_mesh

pytestmark = [pytest.mark.namespaces, pytest.mark.slow]

NARROW_BYTES, WIDE_BYTES = 1280, 1500
"""IPv6's least, which is what tunnels have at worst; and Ethernet's."""
PATIENCE_SECONDS = 90.0
"""A carrier whose packets vanish is given up after 10 s."""


@contextlib.contextmanager
def small_mtu(mesh: Mesh, host: Host) -> Iterator[None]:
    """The host's own device is narrow: it knows, others do not, and what they send that is larger vanishes."""
    network = mesh.lab.network
    assert isinstance(network, Network)
    port = network.port(host)
    try:
        for at, device in ((host, "eth0"), (network.switch, port)):
            at.run("ip", "link", "set", device, "mtu", str(NARROW_BYTES))
        yield
    finally:
        for at, device in ((network.switch, port), (host, "eth0")):
            at.run("ip", "link", "set", device, "mtu", str(WIDE_BYTES))


@pytest.fixture(scope="module", params=[("direct", "laptop"), ("forwarded", "core")], ids=" before the ".join)
def ground(request: pytest.FixtureRequest) -> Iterator[tuple[Mesh, Host]]:
    """A mesh, and the host whose link becomes narrow."""
    path, host = request.param
    with relayed_mesh("newest", ROUTES, ("east",), direct=path == "direct") as made:
        serve(made)
        for each in made.lab.network.hosts.values():
            # As in test_bad_links: else nothing but the last segment of many has a size of its own.
            each.run("ip", "link", "set", "eth0", "gso_max_segs", "1")
        yield made, made.lab.host(host)


def test_everything_goes_on(request: pytest.FixtureRequest, ground: tuple[Mesh, Host]) -> None:
    note_version(request, "newest")
    mesh, host = ground
    with load(mesh) as running:
        with small_mtu(mesh, host):
            running.passes(PATIENCE_SECONDS)
        running.passes(PATIENCE_SECONDS)
    until("all are ready", lambda: all(daemon.ready() for daemon in mesh.lab.daemons))
