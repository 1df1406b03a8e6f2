from __future__ import annotations

import pytest

from sidecar.connector.health import CheckHealth, Outcome, ServiceHealth, next_delay
from ztna.leases import Port

GOOD, BAD = Outcome(True, "connected"), Outcome(False, "connection refused")
TCP, UDP = Port("tcp", 80), Port("udp", 53)


def health(passing: int = 1, critical: int = 2) -> CheckHealth:
    return CheckHealth(success_before_passing=passing, failures_before_critical=critical, now=0.0)


def fed(check: CheckHealth, *outcomes: Outcome) -> list[str]:
    verdicts = []
    for at, outcome in enumerate(outcomes, 1):
        check.handle(outcome, float(at))
        verdicts.append(check.verdict)
    return verdicts


def test_starts_critical() -> None:
    assert (health().verdict, health().output) == ("critical", "not yet checked")


def test_counts_in_a_row_only() -> None:
    check = health(passing=2, critical=2)
    assert fed(check, GOOD, BAD, GOOD, GOOD) == ["critical"] * 3 + ["passing"]
    assert check.since == 4.0
    assert fed(check, BAD, GOOD, BAD, BAD) == ["passing"] * 3 + ["critical"]


def test_says_when_the_verdict_changed() -> None:
    check = health()
    assert check.handle(GOOD, 1.0)
    assert not check.handle(GOOD, 2.0)
    assert not check.handle(BAD, 3.0)
    assert check.handle(BAD, 4.0)
    assert (check.since, check.output) == (4.0, "connection refused")


def test_a_service_passes_only_when_all_its_checks_do() -> None:
    service = ServiceHealth({TCP: health(), UDP: health(critical=1)}, 0.0)
    assert not service.handle(TCP, GOOD, 1.0)
    assert service.output == "udp:53 not yet checked"
    assert service.handle(UDP, GOOD, 2.0)
    assert (service.verdict, service.since, service.output) == ("passing", 2.0, "connected; connected")
    assert service.handle(UDP, BAD, 3.0)
    assert (service.verdict, service.since) == ("critical", 3.0)
    assert service.output == "udp:53 connection refused"


@pytest.mark.parametrize(("draw", "delay"), [(0.0, 9.0), (0.5, 10.0), (1.0, 11.0)])
def test_checks_spread_out(draw: float, delay: float) -> None:
    assert next_delay(10.0, draw) == pytest.approx(delay)
