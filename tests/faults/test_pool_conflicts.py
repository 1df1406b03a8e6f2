"""An agent whose host already routes the pool: it takes nothing, says so everywhere, and takes it when it can."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.consul import KINDS, note_version
from tests.support.lab import Lab, lab, until

pytestmark = [pytest.mark.namespaces, pytest.mark.slow]

AGENT = "laptop-1"
THEIRS = "10.100.3.0/24"


@pytest.fixture(params=KINDS)
def made(request: pytest.FixtureRequest) -> Iterator[Lab]:
    note_version(request, request.param)
    with lab("core", "laptop", pool="10.100.0.0/16") as made:
        made.start_consul(request.param)
        yield made


def conflicts(made: Lab, relay_admin: int) -> list[dict[str, object]]:
    argv = [str(Path(sys.executable).parent / "ztna"), "leases", "conflicts", "--json"]
    argv += ["--config", str(made.operator_config()), "--relay", f"127.0.0.1:{relay_admin}"]
    found: list[dict[str, object]] = json.loads(made.host("core").run(*argv))
    return found


def test_a_pool_that_the_host_routes_is_refused_reported_and_taken_later(made: Lab) -> None:
    laptop = made.host("laptop")
    made.dnsd().wait_ready()
    relay = made.relay().wait_ready()
    laptop.run("ip", "link", "add", "vpn0", "type", "veth", "peer", "name", "vpn1")
    laptop.run("ip", "link", "set", "vpn1", "up")
    laptop.run("ip", "link", "set", "vpn0", "up")
    laptop.run("ip", "route", "add", THEIRS, "dev", "vpn0")
    before = laptop.run("ip", "-4", "route", "show", "table", "all")
    agent = made.agent(AGENT, ["web"], host="laptop", mode="anyip")

    def told() -> list[dict[str, object]]:
        return [each for each in conflicts(made, relay.admin_port) if len(each["by"]) == 2]  # type: ignore[arg-type]

    (found,) = until("Consul and the relay are told", told, 30)
    assert (found["agent"], found["cidr"], found["with"]) == (
        AGENT,
        "10.100.0.0/16",
        f"route {THEIRS} (vpn0)",
    )
    code, ready = agent.get("/readyz")
    assert code == 503
    assert THEIRS in ready
    assert laptop.run("ip", "-4", "route", "show", "table", "all") == before, "the host's routes are its own"

    laptop.run("ip", "route", "del", THEIRS, "dev", "vpn0")
    agent.wait_ready()
    assert "local 10.100.0.0/16" in laptop.run("ip", "route", "show", "table", "local")
    until(
        "Consul has no report any more", lambda: "ztna/conflict/" + AGENT not in made.kv("ztna/conflict/"), 30
    )

    # A route that comes over a pool that is held: told, and what runs is left alone.
    laptop.run("ip", "route", "add", THEIRS, "dev", "vpn0")
    until("it is told again", lambda: "ztna/conflict/" + AGENT in made.kv("ztna/conflict/"), 30)
    assert agent.get("/readyz")[0] == 200
    agent.stop()
    until("the report goes with the agent", lambda: not made.kv("ztna/conflict/"), 30)
