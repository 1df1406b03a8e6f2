"""Which carrier TCP takes where only UDP goes directly is a setting; either goes on when the path goes and comes."""

from __future__ import annotations

import pytest

from tests.support.consul import note_version
from tests.support.lab import until
from tests.support.moving import FORWARDER_PORT, FOUND_SECONDS, Mesh, mesh_behind
from tests.support.nat import Kind, udp_only_with

pytestmark = [pytest.mark.namespaces, pytest.mark.slow]

AGENTS = {"relayed": {}, "packet": {"tcp_on_punched": "packet"}}
GAP_SECONDS = 8.0
"""A direct path that is cut without a word is left within 4 s."""
BACK_SECONDS = 60.0


def new_flow(mesh: Mesh, agent: str) -> None:
    """Begin another TCP flow, for which the carrier is chosen as things are now."""
    flow = mesh.flows.tcp(f"TCP {agent}, later", mesh.lab.host(agent), (mesh.lab.address("shell"), 22))
    until("it is answered", lambda: flow.answered, FOUND_SECONDS)


def test_each_takes_what_it_was_told_and_goes_on(request: pytest.FixtureRequest) -> None:
    note_version(request, "newest")
    with mesh_behind(Kind.PORT, AGENTS, connector=Kind.PORT) as mesh:
        assert mesh.carriers("relayed") == {FORWARDER_PORT}
        # What began before there was a direct path may go through the relay; what begins now does not.
        streams = mesh.agents["packet"].status()["agent"]["streams"]["on_links"]
        new_flow(mesh, "packet")
        new_flow(mesh, "relayed")
        assert mesh.agents["packet"].status()["agent"]["streams"]["on_links"] == streams + 1
        assert mesh.agents["relayed"].status()["agent"]["streams"]["on_links"] == 0

        core = mesh.lab.host("core").address
        with mesh.going_on("the direct paths were cut", GAP_SECONDS):
            for name in AGENTS:
                mesh.lab.host(name).nft(udp_only_with(core, "cut"))
            for name in AGENTS:
                until(f"{name} is forwarded", lambda name=name: mesh.path(name) == "forwarded", FOUND_SECONDS)
        with mesh.going_on("the direct paths came back", GAP_SECONDS):
            for name in AGENTS:
                mesh.lab.host(name).run("nft", "delete", "table", "ip", "cut")
            for name in AGENTS:
                until(f"{name} goes directly", lambda name=name: mesh.path(name) == "direct", BACK_SECONDS)
        assert mesh.agents["packet"].status()["agent"]["streams"]["on_links"] == streams + 1, (
            "on the same stream"
        )
