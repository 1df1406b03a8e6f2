"""Agents and connectors that know relays by DNS alone follow it: those that come are used, those that go are left."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import msgspec
import pytest

from tests.support.consul import KINDS, note_version
from tests.support.lab import http_get, tcp_route, until
from tests.support.relayed import Mesh, records, relayed_mesh
from ztna import config as configuration
from ztna.config import Endpoint

pytestmark = [pytest.mark.namespaces, pytest.mark.slow]

HTTP_PORT = 18080


@pytest.fixture(params=KINDS)
def mesh(request: pytest.FixtureRequest) -> Iterator[Mesh]:
    note_version(request, request.param)
    routes = [tcp_route("web-app", Endpoint("127.0.0.1", HTTP_PORT))]
    with relayed_mesh(request.param, routes, found=["east"]) as made:
        made.lab.python("backend", made.core, "-m", "tests.support.backends", "--http", str(HTTP_PORT))
        yield made


def name_relays(mesh: Mesh, names: Sequence[str]) -> None:
    """Have DNS name exactly these relays: dnsd starts again with another configuration."""
    file = mesh.dnsd.config_file
    assert file is not None
    config = configuration.load(file, {}, {})
    assert config.dnsd is not None
    dnsd = msgspec.structs.replace(config.dnsd, relays=records(mesh.lab, names))
    file.write_text(configuration.dump(msgspec.structs.replace(config, dnsd=dnsd), secrets=True))
    mesh.dnsd.restart()
    mesh.dnsd.wait_ready()


def relays_of(mesh: Mesh) -> dict[str, str]:
    """Return the states of the relays that the agent knows."""
    return {each["relay"]: each["state"] for each in mesh.status()["relays"]}


def test_relays_come_and_go_as_dns_says(mesh: Mesh) -> None:
    web = mesh.address("web-app")
    until("it is served", lambda: http_get(mesh.laptop, f"http://{web}:8080/")[0] == 200)
    assert relays_of(mesh) == {"east": "up"}
    names = mesh.lab.dig("laptop", "_ztna-relay._udp.ztna.local", "SRV", server=mesh.core.address)
    assert names == ["0 1 4433 east.relay.ztna.local."]

    name_relays(mesh, ["east", "west"])
    until("the agent has found another", lambda: relays_of(mesh) == {"east": "up", "west": "up"}, 30)
    mesh.wait_known(["east", "west"])

    name_relays(mesh, ["west"])
    until("all has left the first", lambda: _relays_used(mesh) == {"west"}, 30)
    assert relays_of(mesh)["east"] == "draining", "and it is kept for a while"


def _relays_used(mesh: Mesh) -> set[str]:
    http_get(mesh.laptop, f"http://{mesh.address('web-app')}:8080/")
    return {str(session["relay"]) for session in mesh.status()["sessions"]}
