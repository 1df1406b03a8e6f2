"""Which path agent and connector take, for each kind of NAT before the one and the other, side by side in one mesh.

Six agents and six connectors, each behind its own: 36 links, each with a UDP and a TCP flow that goes on all the time.
docs/paths.md has the table of what is seen here; ZTNA_WRITE_PATHS=1 writes it there.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from sidecar.link.paths import PROBE_GIVE_UP_SECONDS, REST_SECONDS
from tests.support.consul import note_version
from tests.support.lab import Daemon, Lab, lab, tcp_route, udp_route, until
from tests.support.nat import BEHAVIOURS, Behaviour, Kind, Prober, place, udp_only_with
from tests.support.steady import Echoes, Flow, Flows
from ztna.config import Endpoint
from ztna.wire.control import Address

pytestmark = [pytest.mark.namespaces, pytest.mark.slow]

PAGE = Path(__file__).parents[2] / "docs" / "paths.md"
BACKEND_PORT = 18007
UDP_PORT, TCP_PORT = 7, 9
START_SECONDS = 120.0
SETTLED_SECONDS = 60.0
GAP_SECONDS = 10.0
"""A path that dies is left within 4 s (tests/unit/test_sidecar_link_paths.py); here many share what there is."""
OPEN_TO_MOST = {Kind.OPEN, Kind.FULL_CONE, Kind.ADDRESS}
CONES = OPEN_TO_MOST | {Kind.PORT}


def expected(one: Kind, other: Kind) -> str:
    """Return which path two ends can have: a hole is punched where either mapping can be known or learnt."""
    if {one, other} <= CONES:
        return "direct"
    if Kind.SYMMETRIC in (one, other) and {one, other} & OPEN_TO_MOST:
        return "direct"
    return "forwarded"


Pair = tuple[Kind, Kind]
"""An agent's and a connector's kind."""
PAIRS = [(one, other) for one in Kind for other in Kind]


@dataclass
class Crossing:
    """The mesh: an agent and a connector behind each kind."""

    lab: Lab
    behaviours: dict[str, tuple[Kind, Behaviour]]
    agents: dict[Kind, Daemon]
    connectors: dict[Kind, Daemon]
    flows: Flows
    echoes: Echoes
    udp: dict[Pair, Flow]
    tcp: dict[Pair, Flow]

    def paths(self) -> dict[Pair, str]:
        """Return the path of each link, as both ends tell it: `direct` only where both send directly."""
        ours, theirs = self._of_agents(), self._of_connectors()
        return {pair: ours[pair] if ours[pair] == theirs[pair] else "between" for pair in PAIRS}

    def carrying(self) -> dict[Pair, list[dict[str, Any]]]:
        """Return the candidate that carries, if any does, of each link."""
        return {
            (kind, kind_of(link["connector"])): [
                each for each in link["candidates"] if each["state"] == "carries"
            ]
            for kind, agent in self.agents.items()
            for link in agent.packet_links()
        }

    def _of_agents(self) -> dict[Pair, str]:
        seen = dict.fromkeys(PAIRS, "none")
        for kind, agent in self.agents.items():
            for link in agent.packet_links():
                seen[kind, kind_of(link["connector"])] = link["path"]
        return seen

    def _of_connectors(self) -> dict[Pair, str]:
        seen = dict.fromkeys(PAIRS, "none")
        for kind, connector in self.connectors.items():
            for link in connector.status()["connector"]["links"]:
                if link["agent"] is not None:
                    seen[kind_of(link["agent"].rpartition("agent-")[2]), kind] = link["path"]
        return seen

    @contextmanager
    def cut(self) -> Iterator[None]:
        """Let no UDP pass between any two ends while inside; with the relay it does."""
        hosts = [daemon.host for daemon in (*self.agents.values(), *self.connectors.values())]
        for host in hosts:
            host.nft(udp_only_with(self.lab.host("core").address, "cut"))
        yield
        for host in hosts:
            host.run("nft", "delete", "table", "ip", "cut")

    def check_flows(self, since: float, what: str) -> None:
        """AssertionError when a flow broke, or stood still for longer than a change of path takes."""
        broken = [f"{flow.name}: {flow.broken}" for flow in self.flows.all if flow.broken]
        assert not broken, broken
        now = time.monotonic() - 1.0
        gaps = {flow.name: flow.longest_gap(since, now) for flow in self.flows.all}
        worst = max(gaps, key=lambda name: gaps[name])
        print(f"{what}: the longest gap was {gaps[worst]:.2f} s, of {worst}")
        assert gaps[worst] < GAP_SECONDS, {name: gap for name, gap in gaps.items() if gap >= GAP_SECONDS}


def name_of(kind: Kind) -> str:
    return kind.name.lower().replace("_", "-")


def kind_of(name: str) -> Kind:
    return Kind[name.replace("-", "_").upper()]


@contextmanager
def crossing(consul: str) -> Iterator[Crossing]:
    with lab("core", subnet="25.0.0") as made, ExitStack() as stack:
        core = made.host("core")
        flows, echoes = Flows(), Echoes()
        behind = {
            (role, kind): place(made.network, f"{role}{number}", kind, core.address)
            for role in ("agent", "conn")
            for number, kind in enumerate(Kind)
        }
        prober = Prober(core, "25.0.0.200")
        behaviours = {
            f"{role} behind {kind}": (kind, prober.behaviour(host))
            for (role, kind), (host, _) in behind.items()
        }
        prober.close()
        made.start_consul(consul)
        for daemon in (made.dnsd(), made.relay()):
            daemon.wait_ready()
        services = {kind: (f"udp-{name_of(kind)}", f"tcp-{name_of(kind)}") for kind in Kind}
        backend = Endpoint("127.0.0.1", BACKEND_PORT)
        connectors, agents = {}, {}
        for kind in Kind:
            host, outside = behind["conn", kind]
            echoes.serve(host, BACKEND_PORT)
            udp, tcp = services[kind]
            connectors[kind] = made.connector(
                name_of(kind),
                [udp_route(udp, backend, UDP_PORT), tcp_route(tcp, backend, TCP_PORT)],
                host.name,
                link=Endpoint("0.0.0.0", 4435),
                link_advertise=Address(outside, 4435),
            )
        stack.enter_context(echoes.running())
        for connector in connectors.values():
            connector.wait_ready(START_SECONDS)
        for kind in Kind:
            name = f"agent-{name_of(kind)}"
            granted = [service for both in services.values() for service in both]
            agents[kind] = made.agent(name, granted, behind["agent", kind][0].name)
        for agent in agents.values():
            agent.wait_ready(START_SECONDS)
        addresses = {service: made.address(service) for both in services.values() for service in both}
        stack.enter_context(flows.running())
        cross = Crossing(made, behaviours, agents, connectors, flows, echoes, {}, {})
        for one, other in PAIRS:
            host, (udp, tcp) = agents[one].host, services[other]
            at = f"{one} to {other}"
            cross.udp[one, other] = flows.udp(f"UDP, {at}", host, (addresses[udp], UDP_PORT))
            cross.tcp[one, other] = until(
                f"TCP, {at}",
                lambda h=host, t=tcp, at=at: flows.tcp(f"TCP, {at}", h, (addresses[t], TCP_PORT)),
            )
        until("all flows are answered", lambda: all(flow.answered for flow in flows.all), START_SECONDS)
        yield cross


def settled(mesh: Crossing) -> dict[Pair, str]:
    """Return the paths when those that can be direct are, and the others have had their time."""
    wanted = {pair: expected(*pair) for pair in PAIRS}
    deadline = time.monotonic() + SETTLED_SECONDS
    until(
        "paths are found",
        lambda: mesh.paths() == wanted or time.monotonic() > deadline,
        SETTLED_SECONDS + 10,
        every=0.5,
    )
    return mesh.paths()


def table(paths: dict[Pair, str]) -> str:
    """Return the table of the page."""
    lines = ["| agent \\ connector | " + " | ".join(Kind) + " |", "|---" * (len(Kind) + 1) + "|"]
    for one in Kind:
        lines.append(f"| **{one}** | " + " | ".join(paths[one, other] for other in Kind) + " |")
    return "\n".join(lines) + "\n"


def on_page(seen: str) -> str:
    """Return the page's table; write what was seen there first where that is asked for."""
    text = PAGE.read_text()
    match = re.search(r"(<!-- seen: [^>]*-->\n)(.*?)(<!-- end -->)", text, re.DOTALL)
    assert match is not None, f"{PAGE} has no place for the table"
    if os.environ.get("ZTNA_WRITE_PATHS"):
        PAGE.write_text(text[: match.start(2)] + seen + text[match.end(2) :])
        return seen
    return match.group(2)


@pytest.mark.timeout(600)
def test_every_pair_takes_the_best_path_it_can_have_and_flows_outlive_every_switch(
    request: pytest.FixtureRequest,
) -> None:
    note_version(request, "newest")
    with crossing("newest") as mesh:
        wrong = {name: seen for name, (kind, seen) in mesh.behaviours.items() if seen != BEHAVIOURS[kind]}
        assert not wrong, f"not what it should stand for: {wrong}"
        begun = time.monotonic()
        paths = settled(mesh)
        assert paths == {pair: expected(*pair) for pair in PAIRS}
        mesh.check_flows(begun, "at first")
        for pair, carrying in mesh.carrying().items():
            assert len(carrying) == (paths[pair] == "direct"), f"{pair}: {carrying}"
            assert all(each["rtt_ms"] is not None for each in carrying)

        begun, askers = time.monotonic(), {name: set(each) for name, each in mesh.echoes.askers.items()}
        with mesh.cut():
            until("all are forwarded", lambda: set(mesh.paths().values()) == {"forwarded"}, 30, every=0.5)
            print(f"forwarded after {time.monotonic() - begun:.1f} s")
            again = time.monotonic()
            until("all are answered", lambda: all(f.is_answered_since(again) for f in mesh.flows.all), 30)
        until(
            "all are direct again",
            lambda: mesh.paths() == paths,
            REST_SECONDS + 2 * PROBE_GIVE_UP_SECONDS + 30,
            every=0.5,
        )
        print(f"direct again after {time.monotonic() - begun:.1f} s")
        mesh.check_flows(begun, "from the cut on")
        assert mesh.echoes.askers == askers, (
            "a UDP flow keeps its socket at the backend, whatever path it takes"
        )
        assert on_page(table(paths)) == table(paths), (
            "ZTNA_WRITE_PATHS=1 writes what was seen into docs/paths.md"
        )
