"""An agent or a connector is killed and started again: its flows end, none with wrong bytes, and all is well."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.consul import note_version
from tests.support.lab import until
from tests.support.load import ROUTES, load, serve
from tests.support.relayed import Mesh, relayed_mesh

pytestmark = [pytest.mark.namespaces, pytest.mark.slow]


@pytest.fixture(scope="module")
def mesh() -> Iterator[Mesh]:
    with relayed_mesh("newest", ROUTES, ("east",)) as made:
        serve(made)
        yield made


@pytest.mark.parametrize("whose", ["laptop", "alpha"])
def test_all_is_well_once_it_is_started_again(request: pytest.FixtureRequest, mesh: Mesh, whose: str) -> None:
    note_version(request, "newest")
    daemon = next(each for each in mesh.lab.daemons if each.name == whose)
    with load(mesh) as running:
        running.passes()
        held = running.upload_begun()
        held.sendall(b"never finished")
    with held:
        daemon.kill()
        daemon.start()
        try:
            told = held.recv(100)
        except ConnectionError:
            told = b""
        assert told == b"", "the flow ended with its daemon, and nobody counted a part of it as all"
    daemon.wait_ready()
    mesh.wait_known()
    serving = {daemon.name: daemon.pid for daemon in mesh.lab.daemons}
    with load(mesh) as running:
        running.passes()
    assert serving == {daemon.name: daemon.pid for daemon in mesh.lab.daemons}
    until("all are ready", lambda: all(each.ready() for each in mesh.lab.daemons))
