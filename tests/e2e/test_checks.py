"""Checks of several kinds on a real connector, and what becomes of their verdicts in Consul and in DNS."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from tests.support.consul import KINDS, note_version
from tests.support.lab import Daemon, Lab, lab, tcp_route, until
from ztna.config import CheckConfig, Endpoint, RouteConfig

pytestmark = [pytest.mark.namespaces, pytest.mark.slow]

BACKEND_PORT = 18080
BACKEND = Endpoint("127.0.0.1", BACKEND_PORT)
PROMPT: dict[str, Any] = {"interval_s": 0.2, "timeout_s": 5.0, "failures_before_critical": 1}
WEIGHT = 100
SLOW_START_SECONDS = 12.0


@pytest.fixture(params=KINDS)
def made(request: pytest.FixtureRequest) -> Iterator[Lab]:
    note_version(request, request.param)
    with lab("core") as made:
        made.start_consul(request.param)
        made.dnsd()
        made.relay()
        core = made.host("core")
        core.run("sysctl", "-qw", "net.ipv4.ping_group_range=0 2147483647")
        made.python(
            "backend", core, "-m", "tests.support.backends", "--http", str(BACKEND_PORT), "--label", "one"
        )
        yield made


def script(line: str) -> CheckConfig:
    return CheckConfig(kind="script", command=("/bin/sh", "-c", line), **PROMPT)


def weights(made: Lab, service: str) -> list[int]:
    return [int(record.split()[1]) for record in made.dig("core", f"{service}.ztna.local", "SRV")]


def reported(connector: Daemon, service: str) -> dict[str, str]:
    """What the connector's own status says of each check, by kind."""
    backends = connector.status()["connector"]["services"][service]["backends"]
    checks = [check for backend in backends for check in backend["checks"]]
    return {check["kind"]: f"{check['verdict']}: {check['output']}" for check in checks}


def test_the_worst_of_several_checks_is_the_services(made: Lab, tmp_path: Path) -> None:
    verdict = tmp_path / "verdict"
    verdict.write_text("0")
    checks = (
        CheckConfig(kind="http", body="hello from", **PROMPT),
        CheckConfig(kind="icmp", **PROMPT),
        script(f"status=$(cat {verdict}); echo says $status; exit $status"),
    )
    route = RouteConfig(service="web-app", backend=BACKEND, port=8080, checks=checks)  # type: ignore[arg-type]
    connector = made.connector("alpha", [route]).wait_ready()
    until("passing", lambda: made.check_states("web-app") == ["passing"])
    assert reported(connector, "web-app") == {
        "http": "passing: GET /: 200",
        "icmp": "passing: icmp 127.0.0.1: answered",
        "script": "passing: sh: says 0",
    }
    until("in SRV", lambda: weights(made, "web-app") == [1])
    for status, state in (("1", "warning"), ("2", "critical"), ("0", "passing")):
        verdict.write_text(status)
        until(state, lambda state=state: made.check_states("web-app") == [state])
        until(
            "SRV has only who passes",
            lambda state=state: bool(weights(made, "web-app")) is (state == "passing"),
        )


def test_a_service_that_recovered_starts_slowly(made: Lab, tmp_path: Path) -> None:
    is_up = tmp_path / "up"
    is_up.touch()
    route = tcp_route("web-app", BACKEND)
    route = msgspec.structs.replace(
        route, weight=WEIGHT, slow_start_s=SLOW_START_SECONDS, checks=(script(f"test -e {is_up} || exit 2"),)
    )
    made.connector("alpha", [route]).wait_ready()
    seen: list[int] = []

    def grown() -> bool:
        now = weights(made, "web-app")
        if now and now != seen[-1:]:
            seen.extend(now)
        return seen[-1:] == [WEIGHT]

    until("at its whole weight", grown, seconds=SLOW_START_SECONDS + 60)
    assert seen == sorted(seen) and seen[0] < WEIGHT and len(seen) >= 3, "in steps, from little"
    is_up.unlink()
    until("critical", lambda: made.check_states("web-app") == ["critical"])
    until("gone from SRV", lambda: weights(made, "web-app") == [])
    is_up.touch()
    until("back with little", lambda: weights(made, "web-app") not in ([], [WEIGHT]))
