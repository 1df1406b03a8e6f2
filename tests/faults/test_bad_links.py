"""Links that lose, repeat and reorder packets, before each host: it goes on through them and is well afterwards."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.bad_link import bad_link
from tests.support.consul import note_version
from tests.support.lab import until
from tests.support.load import ROUTES, load, serve
from tests.support.namespaces import Host
from tests.support.relayed import Mesh, relayed_mesh

pytestmark = [pytest.mark.namespaces, pytest.mark.slow]

FAULTS = {
    "one in ten lost": {"lose": 0.1},
    "one in five repeated": {"repeat": 0.2},
    "one in five overtaken": {"delay": 0.2},
    "all of it": {"lose": 0.05, "repeat": 0.1, "delay": 0.1},
}
DONE = {"lose": "lost", "repeat": "repeated", "delay": "delayed"}


@pytest.fixture(scope="module", params=[("direct", "laptop"), ("forwarded", "core")], ids=" before the ".join)
def ground(request: pytest.FixtureRequest) -> Iterator[tuple[Mesh, Host]]:
    """A mesh, and the host that the link is before."""
    path, host = request.param
    with relayed_mesh("newest", ROUTES, ("east",), direct=path == "direct") as made:
        serve(made)
        for each in made.lab.network.hosts.values():
            # Segments that the kernel would cut only in the card pass this network as one frame.
            each.run("ip", "link", "set", "eth0", "gso_max_segs", "1")
        yield made, made.lab.host(host)


@pytest.mark.parametrize("fault", FAULTS)
def test_everything_goes_on(request: pytest.FixtureRequest, ground: tuple[Mesh, Host], fault: str) -> None:
    note_version(request, "newest")
    mesh, host = ground
    with load(mesh) as running:
        with bad_link(mesh.lab, host, **FAULTS[fault]) as told:
            running.passes()
        did = told()
        assert did.passed > 1000 and all(getattr(did, DONE[each]) > 50 for each in FAULTS[fault]), did
        running.passes()
    assert running.asker.repeated == 0, "a link delivers a datagram once"
    until("all are ready", lambda: all(daemon.ready() for daemon in mesh.lab.daemons))
