"""A host's address or way out changes under its flows: UDP and TCP go on within seconds, directly where they did."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest

from tests.support.consul import note_version
from tests.support.lab import until
from tests.support.moving import FORWARDER_PORT, FOUND_SECONDS, LINK_PORT, Mesh, mesh_behind
from tests.support.namespaces import Host
from tests.support.nat import Kind

pytestmark = [pytest.mark.namespaces, pytest.mark.slow]

AGENTS = {"direct": {"direct": True}, "forwarded": {"direct": False}}


@pytest.fixture
def mesh(request: pytest.FixtureRequest) -> Iterator[Mesh]:
    note_version(request, "newest")
    with mesh_behind(Kind.OPEN, AGENTS) as made:
        yield made


def readdress(host: Host, address: str) -> None:
    """Give a host another address in place of the one it has."""
    host.run("ip", "addr", "del", f"{host.address}/24", "dev", "eth0")
    host.run("ip", "addr", "add", f"{address}/24", "dev", "eth0")


def restart_nat(router: Host, address: str) -> None:
    """Have a NAT forget everything, and come back with another address."""
    readdress(router, address)
    router.run("nft", "flush", "chain", "ip", "nat", "post")
    router.run("nft", "add", "rule", "ip", "nat", "post", "oifname", "eth0", "snat", "to", address)
    router.run("conntrack", "-F")


def test_flows_go_on_when_a_host_gets_another_address(mesh: Mesh) -> None:
    with mesh.going_on("agents moved"):
        for number, name in enumerate(mesh.agents, 101):
            readdress(mesh.lab.host(name), f"25.0.0.{number}")
        moved = time.monotonic()
        until(
            "all are answered after they moved",
            lambda: all(flow.is_answered_since(moved) for flow in mesh.flows.all),
            FOUND_SECONDS,
        )
        mesh.wait_direct("after the agents moved")
    until("TCP goes directly", lambda: mesh.carriers("direct") == {LINK_PORT})
    with mesh.going_on("the connector moved"):
        readdress(mesh.lab.host("rack"), "25.0.0.201")
        until("the new address is used", lambda: "25.0.0.201" in str(mesh.addresses("direct")), FOUND_SECONDS)
        mesh.wait_direct("after the connector moved")
    # Nothing answers any more at the link address that the relay tells.
    until("TCP goes through the relay", lambda: mesh.carriers("direct") == {FORWARDER_PORT})
    for daemon in (*mesh.agents.values(), mesh.connector):
        assert [each["addresses"] for each in daemon.events("network_changed")][-1] != [daemon.host.address]
    assert all(len(agent.events("link_opened")) == 1 for agent in mesh.agents.values()), (
        "and no link was made anew"
    )


def test_flows_go_on_when_a_nat_is_restarted_with_another_address(request: pytest.FixtureRequest) -> None:
    """The agents' own hosts see nothing of it: it is the relay that tells them."""
    note_version(request, "newest")
    with mesh_behind(Kind.PORT, AGENTS) as mesh:
        with mesh.going_on("the NATs were restarted"):
            for number, name in enumerate(mesh.agents, 101):
                restart_nat(mesh.lab.host(f"{name}-gw"), f"25.0.0.{number}")
            moved = time.monotonic()
            until(
                "all are answered after that",
                lambda: all(flow.is_answered_since(moved) for flow in mesh.flows.all),
                FOUND_SECONDS,
            )
            mesh.wait_direct("after that")
        assert all(len(agent.events("link_opened")) == 1 for agent in mesh.agents.values())


def test_a_default_route_counts_and_others_do_not(mesh: Mesh) -> None:
    agent, host, core = mesh.agents["direct"], mesh.lab.host("direct"), mesh.lab.host("core")
    with mesh.going_on("routes changed"):
        host.run("ip", "route", "add", "10.77.0.0/16", "via", core.address)
        host.run("ip", "route", "add", "default", "via", core.address)
        until("it is noticed", lambda: agent.events("network_changed"))
        host.run("ip", "route", "del", "10.77.0.0/16")
        host.run("ip", "route", "del", "default")
        until("that too", lambda: len(agent.events("network_changed")) == 2)
    assert mesh.path("direct") == "direct"
    assert not [each for each in agent.events("link_path") if each["path"] == "forwarded"], (
        "it was never left"
    )
