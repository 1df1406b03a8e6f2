"""Checks that Consul's agent runs, on the oldest and the newest real one: what it finds, the connector goes by."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import msgspec
import pytest

from tests.support.consul import POLICIES, REAL_KINDS, note_version
from tests.support.lab import Daemon, Lab, lab, until
from ztna.config import CheckConfig, Endpoint, RouteConfig
from ztna.names import ServiceName

pytestmark = [pytest.mark.namespaces, pytest.mark.slow]

BACKEND = Endpoint("127.0.0.1", 18080)
SERVICE = "web-app"
FOLLOW_SECONDS = 5.0
"""Consul asks each second, and twice before it believes a failure."""
BY_CONSUL: dict[str, Any] = {"runner": "consul", "interval_s": 1.0, "timeout_s": 1.0}
TTL_CHECK = f"ztna:{SERVICE}@alpha"


@pytest.fixture(params=REAL_KINDS)
def made(request: pytest.FixtureRequest) -> Iterator[Lab]:
    note_version(request, request.param)
    with lab("core") as made:
        made.start_consul(request.param)
        yield made


def connector(
    made: Lab, *checks: CheckConfig, policies: tuple[str, ...] = ("connector-consul-checks",)
) -> Daemon:
    rules = made.rules("connector", [SERVICE])
    rules += "".join((POLICIES / f"{each}.hcl").read_text() for each in policies)
    token = until("a token", lambda: made.token_for(rules))
    consul = msgspec.structs.replace(made.consul, token=token)
    route = RouteConfig(service=ServiceName(SERVICE), backend=BACKEND, port=8080, checks=checks)
    return made.connector("alpha", [route], consul=consul, ttl_s=3.0)


def in_consul(made: Lab) -> dict[str, str]:
    """The status of each check of the service by its type, as the catalog has it."""
    checks = made.consul_get(f"/v1/health/checks/{SERVICE}")
    return {each["Type"]: each["Status"] for each in checks}


def runners(daemon: Daemon) -> dict[str, str]:
    """Who runs each check by its kind, and why not Consul."""
    (backend,) = daemon.status()["connector"]["services"][SERVICE]["backends"]
    return {each["kind"]: each["not_consul"] or each["runner"] for each in backend["checks"]}


def verdict(daemon: Daemon) -> str:
    return str(daemon.status()["connector"]["services"][SERVICE]["verdict"])


def backend(made: Lab) -> Any:
    return made.python(
        "backend", made.host("core"), "-m", "tests.support.backends", "--http", str(BACKEND.port)
    )


def test_the_connector_goes_by_what_consul_finds(made: Lab) -> None:
    served = backend(made)
    http = CheckConfig(kind="http", failures_before_critical=2, **BY_CONSUL)
    alpha = connector(made, http, CheckConfig(kind="script", command=("/bin/true",), **BY_CONSUL))
    until("Consul runs one", lambda: in_consul(made) == {"ttl": "passing", "http": "passing"})
    until("and the connector knows", lambda: runners(alpha)["http"] == "consul")
    assert "enable_script_checks is off" in runners(alpha)["script"]
    assert [each["check"] for each in alpha.events("sidecar_runs_check")] == ["script"]

    served.stop()
    until(
        "Consul notices",
        lambda: in_consul(made) == {"ttl": "passing", "http": "critical"},
        FOLLOW_SECONDS + 10,
    )
    until("the connector follows", lambda: verdict(alpha) == "critical", FOLLOW_SECONDS)
    assert in_consul(made)["ttl"] == "passing", "which tells of the connector and of the script alone"
    served.start()
    until("it is back", lambda: verdict(alpha) == "passing", FOLLOW_SECONDS + 10)

    # Somebody takes Consul's check away: it is registered again.
    (lost,) = [each for each in made.consul_get("/v1/agent/checks") if each.startswith(f"{TTL_CHECK}:")]
    made.consul_put(f"/v1/agent/check/deregister/{lost}")
    until("registered again", lambda: lost in made.consul_get("/v1/agent/checks"))
    assert alpha.stop() == 0
    assert made.consul_get("/v1/agent/checks") == {}


def test_while_consul_is_away_the_sidecar_runs_its_checks(made: Lab) -> None:
    served = backend(made)
    alpha = connector(made, CheckConfig(kind="tcp", failures_before_critical=1, **BY_CONSUL))
    until("Consul runs it", lambda: runners(alpha) == {"tcp": "consul"})
    until("passing", lambda: verdict(alpha) == "passing")
    consul = next(each for each in made.running if each.name == "consul")
    consul.kill()
    until("the sidecar runs it", lambda: runners(alpha)["tcp"] != "consul")
    served.stop()
    until("and sees what happens", lambda: verdict(alpha) == "critical")
    consul.start()
    until("Consul runs it again", lambda: runners(alpha) == {"tcp": "consul"}, 30)
    served.start()
    until("passing", lambda: verdict(alpha) == "passing")


def test_a_token_that_may_not_look_leaves_the_checks_to_the_sidecar(made: Lab) -> None:
    backend(made)
    alpha = connector(made, CheckConfig(kind="tcp", **BY_CONSUL), policies=())
    until("passing all the same", lambda: in_consul(made) == {"ttl": "passing"})
    until("it says why", lambda: 'agent_prefix ""' in runners(alpha)["tcp"])
