"""A minute of bad weather over a whole mesh, and then calm: what was sent arrived, and all ends agree."""

from __future__ import annotations

import pytest

from sidecar.agent.sessions import SESSION_IDLE_SECONDS
from sidecar.connector.sessions import DETACHED_SECONDS
from tests.sim.mesh import Mesh

WEATHER_SECONDS = 60.0
CALM_SECONDS = 3 * DETACHED_SECONDS
FLOWS, FLOW_BYTES_MAX = 40, 300_000
DATAGRAMS = 400
CUTS, CRASHES, LIES = 150, 2, 30
UNLISTINGS, TURNS = 12, 2
UNLISTED_SECONDS_MAX = 8.0
SEEDS = 30


def live_through(mesh: Mesh) -> None:
    """Have programs send, and break what carries it."""
    world, chance = mesh.world, mesh.world.chance

    def at_any_time(times: int, act: object) -> None:
        for _ in range(times):
            world.after(chance.uniform(0.0, WEATHER_SECONDS), act)  # type: ignore[arg-type]

    def cut_one() -> None:
        some = chance.choice((mesh.control, mesh.carriers, mesh.carriers)) or mesh.control
        chance.choice(some).cut()

    def begin() -> None:
        content = chance.randbytes(chance.choice((0, 1, 500, chance.randrange(FLOW_BYTES_MAX))))
        chance.choice(mesh.agents).begin(chance.choice(mesh.services), content)

    at_any_time(FLOWS, begin)
    at_any_time(DATAGRAMS, lambda: chance.choice(mesh.agents).say(str(world.now)))
    at_any_time(CUTS, cut_one)
    at_any_time(LIES, mesh.liar.lie)
    at_any_time(UNLISTINGS, lambda: mesh.unlist(chance.uniform(0.0, UNLISTED_SECONDS_MAX)))
    at_any_time(TURNS, mesh.turn)
    at_any_time(CRASHES, lambda: chance.choice(mesh.relays).crash())
    world.run(WEATHER_SECONDS + 5.0)


@pytest.mark.parametrize("seed", range(SEEDS))
def test_nothing_is_lost_reordered_or_misdelivered_and_all_ends_agree(seed: int) -> None:
    mesh = Mesh(seed)
    live_through(mesh)
    flows = [flow for agent in mesh.agents for flow in agent.flows.values()]
    mesh.world.run(CALM_SECONDS, until=lambda: all(flow.outcome for flow in flows))
    assert len(flows) == FLOWS and not [flow.id for flow in flows if not flow.outcome]
    assert {flow.outcome for flow in flows} <= {"finished", "failed"}, "none that had begun was cut off"
    assert sum(flow.outcome == "finished" for flow in flows) > FLOWS / 2, "or nothing is tested"
    assert sum(flow.attempt for flow in flows) > FLOWS / 4, "nor is without resuming"
    assert mesh.lies_refused and mesh.retired
    for agent in mesh.agents:
        for flow in agent.flows.values():
            served = [
                (connector.known.live(key) or connector.ended.get(key))
                for connector in mesh.connectors.values()
                for key in [(agent.name, flow.id)]
            ]
            halves = [each.half for each in served if each is not None]
            assert len(halves) <= 1, "one flow is dialled once"
            assert flow.content.startswith(flow.half.heard)
            for half in halves:
                assert flow.content.startswith(half.heard)
            if flow.outcome == "finished":
                (half,) = halves
                assert flow.half.heard == half.heard == flow.content
                assert half.state.is_delivered, "the other end takes it for finished, too"
    assert mesh.delivered > DATAGRAMS / 2 and sum(agent.answered for agent in mesh.agents)
    # Sessions that live are known to all three, whatever was cut; and idle ones end everywhere.
    mesh.world.run(CALM_SECONDS)
    ids = mesh.session_ids()
    assert ids["relays"] == ids["agents"] == ids["connectors"]
    mesh.world.run(SESSION_IDLE_SECONDS + DETACHED_SECONDS)
    assert mesh.session_ids() == {"relays": set(), "agents": set(), "connectors": set()}
    assert not [each for each in mesh.connectors.values() if len(each.sessions) or each.known.all_live()]


def test_a_seed_is_a_whole_run() -> None:
    told = []
    for _ in range(2):
        mesh = Mesh(7)
        live_through(mesh)
        told.append(
            [(flow.outcome, flow.attempt, bytes(flow.half.heard)) for flow in mesh.agents[0].flows.values()]
        )
    assert told[0] == told[1]
