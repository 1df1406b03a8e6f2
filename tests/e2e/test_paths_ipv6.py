"""Agent and connector that reach the relay by IPv4 and each other by IPv6 alone take the direct path there."""

from __future__ import annotations

from typing import Any

import pytest

from tests.support.consul import note_version
from tests.support.lab import Daemon, lab, udp_route, until
from tests.support.namespaces import Host
from tests.support.nat import udp_only_with
from tests.support.steady import Echoes, Flow, Flows
from ztna.config import Endpoint

pytestmark = [pytest.mark.namespaces, pytest.mark.slow]

BACKEND_PORT = 18007
NEAR, FAR = "2a10:77::1", "2a10:77::2"
GAP_SECONDS = 6.0
WAIT_SECONDS = 60.0


def give(host: Host, address: str) -> None:
    host.run("ip", "addr", "add", f"{address}/64", "dev", "eth0", "nodad")


def link(agent: Daemon) -> dict[str, Any]:
    (found,) = agent.packet_links()
    return found


def goes_by(agent: Daemon, address: str) -> bool:
    """Say whether the link carries on a path to that address."""
    candidates = link(agent)["candidates"]
    return any(
        each["state"] == "carries" and each["address"].startswith(f"[{address}]") for each in candidates
    )


def has_gone_on(flow: Flow, since: float, until_then: float) -> None:
    gap = flow.longest_gap(since, until_then)
    print(f"stood still for {gap:.2f} s")
    assert gap < GAP_SECONDS


def test_two_ends_with_ipv6_between_them_go_directly_though_the_relay_has_ipv4_only(
    request: pytest.FixtureRequest,
) -> None:
    note_version(request, "newest")
    with lab("core", "near", "far", subnet="25.0.0") as made:
        near, far, core = (made.host(name) for name in ("near", "far", "core"))
        for host in (near, far):
            host.nft(udp_only_with(core.address))
        give(far, FAR)
        made.start_consul("newest")
        for daemon in (made.dnsd(), made.relay()):
            daemon.wait_ready()
        backend = Endpoint("127.0.0.1", BACKEND_PORT)
        flows, echoes = Flows(), Echoes()
        echoes.serve(far, BACKEND_PORT)
        connector = made.connector("alpha", [udp_route("echo-service", backend)], "far").wait_ready()
        agent = made.agent("laptop", ["echo-service"], "near").wait_ready()
        with echoes.running(), flows.running():
            flow = flows.udp("UDP", near, (made.address("echo-service"), 7))
            until("it is answered", lambda: flow.answered, WAIT_SECONDS)
            assert link(agent)["path"] == "forwarded", "the near end has no IPv6 yet"

            give(near, NEAR)
            until("the path by IPv6 is taken", lambda: goes_by(agent, FAR), WAIT_SECONDS)
            until(
                "both ways",
                lambda: connector.status()["connector"]["links"][0]["path"] == "direct",
                WAIT_SECONDS,
            )
            used = flow.asked[-1]
            until("it is answered there", lambda: flow.is_answered_since(used))

            with near.dropping("meta nfproto ipv6 meta l4proto udp"):
                begun = flow.asked[-1]
                until("the relay forwards", lambda: link(agent)["path"] == "forwarded")
                until(
                    "it is answered again", lambda: flow.is_answered_since(begun + GAP_SECONDS), WAIT_SECONDS
                )
                has_gone_on(flow, begun, begun + GAP_SECONDS)
            until("the path by IPv6 is taken again", lambda: goes_by(agent, FAR), WAIT_SECONDS)
        assert {name: len(askers) for name, askers in echoes.askers.items()} == {"far": 1}
