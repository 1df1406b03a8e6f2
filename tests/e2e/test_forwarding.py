"""A whole mesh whose relay forwards links in user space, or has the kernel do it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tests.support.lab import udp_ask, udp_route, until
from tests.support.relayed import Mesh, relayed_mesh
from ztna.config import Endpoint

pytestmark = [pytest.mark.namespaces, pytest.mark.slow]

BACKEND_PORT = 18007
QUESTION = b"sealed on the way"
STOPPED_SECONDS = 5.0
"""A second is promised and tests/faults/test_forwarding.py holds it; this machine may be busy with whole meshes."""


@pytest.fixture(params=["user", "kernel"])
def mesh(request: pytest.FixtureRequest) -> Iterator[Mesh]:
    routes = [udp_route("echo-service", Endpoint("127.0.0.1", BACKEND_PORT))]
    with relayed_mesh("embedded", routes, ["edge"], forwarding=request.param) as made:
        made.lab.python("backends", made.core, "-m", "tests.support.backends", "--udp", str(BACKEND_PORT))
        yield made


def udp(mesh: Mesh) -> dict[str, Any]:
    shown: dict[str, Any] = mesh.relays["edge"].status()["forwarder"]["udp"]
    return shown


def answers(mesh: Mesh, address: str) -> bool:
    return udp_ask(mesh.laptop, address, 7, QUESTION) is not None


def test_a_mesh_forwards_and_stops_with_its_sessions_and_its_relay(
    mesh: Mesh, request: pytest.FixtureRequest
) -> None:
    relay, edge = mesh.relays["edge"], mesh.lab.host("edge")
    wanted = "kernel" if "kernel" in request.node.name else "user"
    assert udp(mesh)["forwarding"]["in_use"] == wanted, udp(mesh)
    assert relay.metric("ztna_forwarding_in_kernel") == (wanted == "kernel")
    address = mesh.address("echo-service")
    until("an answer", lambda: answers(mesh, address))
    if wanted == "kernel":
        until("the link is in the kernel", lambda: udp(mesh)["forwarding"]["in_kernel"] == 2)
    before = udp(mesh)
    for _ in range(20):
        until("an answer", lambda: answers(mesh, address))

    def carried() -> int:
        (link,) = udp(mesh)["links"]
        return int(link["agent"]["packets"])

    until("what went is counted", lambda: carried() - before["links"][0]["agent"]["packets"] >= 20)
    if wanted == "kernel":
        assert udp(mesh)["sent"] - before["sent"] <= 4, "user space has only binds to answer"
        assert "4434" not in edge.try_run("conntrack", "-L", "-p", "udp").stdout

    relay.kill()
    assert "ztna_forwarder" not in edge.run("nft", "list", "ruleset")
    assert not answers(mesh, address)
    relay.restart().wait_ready()
    until("the mesh is back", lambda: answers(mesh, address), 60)

    mesh.connector.stop()
    until("its links end", lambda: not udp(mesh)["links"], STOPPED_SECONDS)
    assert udp(mesh)["forwarding"]["in_kernel"] == 0
