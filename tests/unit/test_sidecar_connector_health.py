from __future__ import annotations

import pytest

from sidecar.connector.health import CheckHealth, CheckKey, Outcome, ServiceHealth, next_delay
from ztna.config import CheckConfig, Endpoint
from ztna.leases import Port

GOOD, BAD = Outcome(True, "connected"), Outcome(False, "connection refused")
WARNING = Outcome(True, "disk is nearly full", is_warning=True)
ONE, TWO = Endpoint("10.0.0.1", 80), Endpoint("10.0.0.2", 80)
TCP, UDP = CheckKey(Port("tcp", 80), ONE), CheckKey(Port("udp", 53), ONE, 1)


def health(passing: int = 1, critical: int = 2, **config: object) -> CheckHealth:
    thresholds = {"success_before_passing": passing, "failures_before_critical": critical}
    return CheckHealth(CheckConfig(**thresholds | config), now=0.0)  # type: ignore[arg-type]


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


def test_warns_before_it_is_critical() -> None:
    check = health(critical=3, failures_before_warning=2)
    assert fed(check, GOOD, BAD, BAD, BAD, BAD) == ["passing", "passing", "warning", "critical", "critical"]
    # One that is critical or only warned does not get better by a failure.
    assert fed(health(critical=9, failures_before_warning=1), BAD) == ["critical"]
    assert fed(health(critical=9, failures_before_warning=1), GOOD, BAD, BAD) == [
        "passing",
        "warning",
        "warning",
    ]


def test_a_warning_is_no_failure() -> None:
    check = health(passing=2)
    assert fed(check, WARNING, WARNING, GOOD, WARNING) == ["critical", "warning", "passing", "warning"]
    assert check.output == "disk is nearly full"


def test_who_flaps_has_to_prove_itself() -> None:
    check = health(critical=1, flaps_max=2, flap_hold_s=10.0)
    for at in (1.0, 3.0):
        check.handle(GOOD, at)
        check.handle(BAD, at + 1)
    assert not check.handle(GOOD, 5.0)
    assert check.output == "connected; it flaps: passing after 10 s without a failure"
    assert not check.handle(GOOD, 14.9)
    assert not check.handle(BAD, 15.0)
    assert not check.handle(GOOD, 16.0), "a failure begins the time anew"
    assert not check.handle(GOOD, 25.9)
    assert check.handle(GOOD, 26.0)
    # Long ago is forgotten.
    assert check.handle(BAD, 400.0)
    assert check.handle(GOOD, 401.0)


def test_a_service_is_as_bad_as_its_worst_check() -> None:
    service = ServiceHealth({TCP: health(), UDP: health(critical=1)}, 0.0)
    assert not service.handle(TCP, GOOD, 1.0)
    assert service.output == "udp:53 not yet checked"
    assert service.handle(UDP, GOOD, 2.0)
    assert (service.verdict, service.since, service.output) == ("passing", 2.0, "connected; connected")
    assert service.handle(TCP, WARNING, 2.5)
    assert (service.verdict, service.output) == ("warning", "tcp:80 disk is nearly full")
    assert service.handle(UDP, BAD, 3.0)
    assert (service.verdict, service.since) == ("critical", 3.0)
    assert service.output == "udp:53 connection refused; tcp:80 disk is nearly full"


def test_a_port_is_as_good_as_its_best_backend() -> None:
    first, second = CheckKey(Port("tcp", 80), ONE), CheckKey(Port("tcp", 80), TWO)
    service = ServiceHealth({first: health(critical=1), second: health(critical=1), UDP: health()}, 0.0)
    service.handle(UDP, GOOD, 1.0)
    assert service.handle(first, GOOD, 1.0)
    assert (service.verdict, service.backend(Port("tcp", 80), TWO)) == ("passing", "critical")
    assert not service.handle(second, BAD, 2.0)
    assert service.output == "connection refused; connected; connected", "what is wrong comes first"
    assert service.handle(first, WARNING, 3.0)
    assert service.verdict == "warning"
    assert service.output == "tcp:80 connection refused; tcp:80 disk is nearly full"
    assert service.handle(first, BAD, 4.0)
    assert service.verdict == "critical"
    assert service.handle(second, GOOD, 5.0)
    assert service.verdict == "passing"


def test_a_backend_is_as_bad_as_its_worst_check() -> None:
    tcp, http = CheckKey(Port("tcp", 80), ONE), CheckKey(Port("tcp", 80), ONE, 1)
    service = ServiceHealth({tcp: health(), http: health(critical=1)}, 0.0)
    service.handle(tcp, GOOD, 1.0)
    service.handle(http, BAD, 1.0)
    assert service.backend(Port("tcp", 80), ONE) == service.verdict == "critical"


def test_exchanging_backends_is_no_outage() -> None:
    first, second = CheckKey(Port("tcp", 80), ONE), CheckKey(Port("tcp", 80), TWO)
    service = ServiceHealth({first: health()}, 0.0)
    service.handle(first, GOOD, 1.0)
    assert not service.update({second: health(critical=2)}, 2.0, 10.0)
    assert not service.handle(second, BAD, 3.0), "its thresholds hold for a new backend too"
    assert service.verdict == "passing"
    assert service.handle(second, BAD, 4.0)
    assert service.verdict == "critical"
    assert service.weight(100, 4.0) == 20, "the slow start is the newer one"
    gone = {first: service.checks[second], second: health()}
    gone[first].handle(GOOD, 5.0)
    assert service.update(gone, 5.0, 0.0), "what is left decides at once"
    assert service.verdict == "passing"


def test_weight_grows_after_it_was_critical() -> None:
    service = ServiceHealth({TCP: health()}, 0.0, slow_start_s=10.0)
    assert service.weight(100, 0.0) == 20, "what is registered while critical is the first step"
    service.handle(TCP, GOOD, 1.0)
    assert [service.weight(100, 1.0 + age) for age in (0.0, 2.0, 9.9, 10.0, 99.0)] == [20, 40, 100, 100, 100]
    assert service.weight(1, 1.0) == 1
    service.handle(TCP, WARNING, 20.0)
    assert service.weight(100, 20.0) == 100, "a warning is no new start"
    assert ServiceHealth({TCP: health()}, 0.0).weight(100, 0.0) == 100


@pytest.mark.parametrize(("draw", "delay"), [(0.0, 8.0), (0.5, 10.0), (1.0, 12.0)])
def test_checks_spread_out(draw: float, delay: float) -> None:
    assert next_delay(10.0, 0.2, draw) == pytest.approx(delay)


def test_somebody_elses_verdict_is_taken_over_at_once() -> None:
    service = ServiceHealth({TCP: health(critical=2), UDP: health()}, now=0.0)
    service.handle(UDP, GOOD, 1.0)
    assert service.verdict == "critical"
    assert service.follow(TCP, "passing", "TCP connect: Success", 2.0)
    assert not service.follow(TCP, "passing", "again", 3.0)
    assert (service.verdict, service.checks[TCP].since) == ("passing", 2.0)
    assert service.follow(TCP, "critical", "refused", 4.0)
    assert (service.since, service.output) == (4.0, "tcp:80 refused")


def test_what_a_part_of_the_checks_comes_to() -> None:
    service = ServiceHealth({TCP: health(), UDP: health()}, now=0.0)
    service.handle(UDP, GOOD, 1.0)
    service.follow(TCP, "critical", "refused", 1.0)
    assert service.part(lambda key: key == UDP) == ("passing", "connected")
    assert service.part(lambda key: key == TCP) == ("critical", "tcp:80 refused")
    assert service.part(lambda key: True) == (service.verdict, service.output)
    assert service.part(lambda key: False) == ("passing", "Consul runs the checks")
