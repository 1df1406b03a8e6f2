"""A mesh whose agents, each on a host of its own, have flows that go on all the time while hosts and paths change."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from tests.support.lab import Daemon, Lab, lab, tcp_route, udp_route, until
from tests.support.namespaces import Host
from tests.support.nat import Kind, place
from tests.support.steady import Echoes, Flow, Flows
from ztna.config import Endpoint, RouteConfig
from ztna.wire.control import Address

BACKEND_PORT = 18007
LINK_PORT, FORWARDER_PORT = "4435", "4434"
START_SECONDS = 60.0
FOUND_SECONDS = 30.0
GAP_SECONDS = 5.0
"""What was measured of a host that moved is under a second."""


@dataclass
class Mesh:
    """Agents with a UDP and a TCP flow each; those that are `direct` are to have a direct path, the others none."""

    lab: Lab
    connector: Daemon
    agents: dict[str, Daemon]
    direct: list[str]
    flows: Flows
    echoes: Echoes

    def path(self, agent: str) -> str:
        """Return what the agent's one link goes by."""
        (link,) = self.agents[agent].packet_links()
        return str(link["path"])

    def addresses(self, agent: str) -> list[str]:
        """Return where an agent's direct path goes."""
        (link,) = self.agents[agent].packet_links()
        return [each["address"] for each in link["candidates"] if each["state"] == "carries"]

    def carriers(self, agent: str) -> set[str]:
        """Return where an agent's TCP goes: to the connector's link, the relay's forwarder, both or neither."""
        said = self.lab.host(agent).run("ss", "-Htn", "state", "established")
        return {port for port in (LINK_PORT, FORWARDER_PORT) if f":{port} " in f"{said} "}

    def wait_direct(self, what: str) -> None:
        """Wait until those have a direct path that are to have one."""
        for name in self.direct:
            until(
                f"{name} has a direct path {what}",
                lambda name=name: self.path(name) == "direct",
                FOUND_SECONDS,
            )
        assert all(self.path(name) == "forwarded" for name in self.agents.keys() - self.direct)

    @contextmanager
    def going_on(self, what: str, gap_s: float = GAP_SECONDS) -> Iterator[None]:
        """AssertionError when a flow breaks inside, or stands still for longer than that."""
        begun, askers = time.monotonic(), {name: set(each) for name, each in self.echoes.askers.items()}
        yield
        changed = time.monotonic()
        until(
            "all are answered again",
            lambda: all(flow.is_answered_since(changed) for flow in self.flows.all),
            FOUND_SECONDS,
        )
        assert [flow.broken for flow in self.flows.all if flow.broken] == []
        gaps = {flow.name: flow.longest_gap(begun, changed + 0.1) for flow in self.flows.all}
        print(f"{what}: " + ", ".join(f"{name} stood still for {gap:.2f} s" for name, gap in gaps.items()))
        assert max(gaps.values()) < gap_s, gaps
        assert self.echoes.askers == askers, "each has its socket at the backend still"


@contextmanager
def mesh_behind(
    kind: Kind,
    agents: Mapping[str, Mapping[str, Any]],
    *,
    connector: Kind = Kind.OPEN,
    more: Sequence[RouteConfig] = (),
) -> Iterator[Mesh]:
    """A mesh of these agents, by name with settings; each, and the connector, has such a NAT before it.

    `more` are routes beside those of the flows.
    """
    with lab("core", subnet="25.0.0") as made, ExitStack() as stack:
        core = made.host("core")
        rack, outside = place(made.network, "rack", connector, core.address)
        for name in agents:
            place(made.network, name, kind, core.address)
        made.start_consul("newest")
        for daemon in (made.dnsd(), made.relay()):
            daemon.wait_ready()
        flows, echoes = Flows(), Echoes()
        echoes.serve(rack, BACKEND_PORT)
        stack.enter_context(echoes.running())
        backend = Endpoint("127.0.0.1", BACKEND_PORT)
        fronting = made.connector(
            "alpha",
            [udp_route("echo-service", backend), tcp_route("shell", backend, 22), *more],
            "rack",
            link=Endpoint("0.0.0.0", 4435),
            link_advertise=Address(outside, 4435),
        ).wait_ready(START_SECONDS)
        services = ("echo-service", "shell", *(str(route.service) for route in more))
        running = {name: made.agent(name, services, name, **keys) for name, keys in agents.items()}
        for agent in running.values():
            agent.wait_ready(START_SECONDS)
        at = {service: made.address(service) for service in services}
        stack.enter_context(flows.running())
        for name in agents:
            host = made.host(name)
            flows.udp(f"UDP {name}", host, (at["echo-service"], 7))
            until(f"TCP {name}", lambda n=name, h=host: _begun(flows, n, h, (at["shell"], 22)), START_SECONDS)
        until("all are answered", lambda: all(flow.answered for flow in flows.all), START_SECONDS)
        direct = [name for name, keys in agents.items() if keys.get("direct", True)]
        mesh = Mesh(made, fronting, running, direct, flows, echoes)
        mesh.wait_direct("at first")
        yield mesh


def _begun(flows: Flows, name: str, host: Host, address: tuple[str, int]) -> Flow:
    return flows.tcp(f"TCP {name}", host, address)
