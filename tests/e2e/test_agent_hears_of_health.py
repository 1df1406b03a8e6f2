"""A check that flips is known at the agent: its /status says what the relay told it."""

from __future__ import annotations

import pytest

from tests.support.consul import KINDS, note_version
from tests.support.lab import Daemon, lab, tcp_route, until
from ztna.config import Endpoint

pytestmark = [pytest.mark.namespaces, pytest.mark.slow]

BACKEND = Endpoint("127.0.0.1", 18080)
SRV_TTL_SECONDS = 1
TOLD_SECONDS = 10.0
"""A check (0.5 s), a second to Consul and DNS, a TTL until the relay asks again; and what a busy machine takes."""


def health(agent: Daemon, service: str) -> str:
    found = {each["service"]: each for each in agent.status()["agent"]["services"]}
    # A relay may say itself that it does not know.
    assert found[service]["health_since_s"] is not None or found[service]["health"] == "unknown"
    return str(found[service]["health"])


@pytest.mark.parametrize("kind", KINDS)
def test_a_flipped_check_shows_in_the_agents_status(request: pytest.FixtureRequest, kind: str) -> None:
    note_version(request, kind)
    with lab("core") as made:
        made.start_consul(kind)
        made.dnsd(ttl_s=SRV_TTL_SECONDS)
        relay = made.relay()
        argv = ("-m", "tests.support.backends", "--http", str(BACKEND.port))
        backend = made.python("backend", made.host("core"), *argv)
        routes = [tcp_route("web-app", BACKEND), tcp_route("down", Endpoint("127.0.0.1", 9), port=81)]
        made.connector("alpha", routes)
        agent = made.agent("laptop-1", ["web-app", "down"]).wait_ready()
        until("leased", lambda: len(agent.status()["agent"]["services"]) == 2)
        until("passing", lambda: health(agent, "web-app") == "passing")
        until("critical from the start", lambda: health(agent, "down") == "critical")
        backend.stop()
        until("critical", lambda: health(agent, "web-app") == "critical", TOLD_SECONDS)
        backend.start()
        until("passing again", lambda: health(agent, "web-app") == "passing", TOLD_SECONDS)
        relay.kill()
        until("nobody stands for it", lambda: health(agent, "web-app") == "unknown", 45)
        relay.start()
        until("told again", lambda: health(agent, "web-app") == "passing", 45)
        assert health(agent, "down") == "critical"
