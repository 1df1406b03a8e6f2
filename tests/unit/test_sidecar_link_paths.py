"""sidecar.link.paths: which candidates may be probed, when, and which path carries."""

import itertools

import pytest

from sidecar.link.paths import (
    CANDIDATES_TRIED_MAX,
    PROBE_GIVE_UP_SECONDS,
    PROBE_INTERVAL_SECONDS,
    REST_SECONDS,
    TRANSACTIONS_MAX,
    Paths,
    Probe,
    SockAddr,
    is_usable,
)

FORWARDER = ("203.0.113.1", 4434)
NEAR = ("198.51.100.1", 1000)
FAR = ("198.51.100.2", 2000)


class Link:
    """Paths with a clock that goes in steps of a tenth and remembers what was probed."""

    def __init__(self, *candidates: SockAddr) -> None:
        self.paths = Paths(FORWARDER)
        self.now = 100.0
        self._numbers = itertools.count()
        self.paths.add(candidates, self.now)

    def due(self) -> list[Probe]:
        return self.paths.due(self.now, lambda: next(self._numbers).to_bytes(12, "big"))

    def run(self, seconds: float, answering: dict[SockAddr, float]) -> int:
        """Pass time; candidates in `answering` answer after so many seconds (under a tenth). Returns the probes."""
        count = 0
        for _ in range(round(seconds * 10)):
            for probe in self.due():
                count += 1
                if probe.address in answering:
                    rtt = answering[probe.address]
                    assert self.paths.answered(probe.transaction, probe.address, self.now + rtt)
            self.now = round(self.now + 0.1, 3)
        return count


@pytest.mark.parametrize(
    "host", ["127.0.0.1", "169.254.1.1", "224.0.0.1", "255.255.255.255", "0.0.0.0", "240.0.0.1", "::1",
             "fe80::1", "ff02::1", "::", "nonsense"],
)  # fmt: skip
def test_never_usable(host: str) -> None:
    assert not is_usable((host, 4435), allow_private=True)


@pytest.mark.parametrize("host", ["10.0.0.1", "192.168.1.1", "172.16.0.1", "100.64.0.1", "fd00::1"])
def test_private_only_where_configured(host: str) -> None:
    assert is_usable((host, 4435), allow_private=True)
    assert not is_usable((host, 4435), allow_private=False)


@pytest.mark.parametrize("host", ["8.8.8.8", "2600::1"])
def test_public_is_usable_with_a_port(host: str) -> None:
    assert is_usable((host, 1), allow_private=False)
    assert not is_usable((host, 0), allow_private=False)
    assert not is_usable((host, 65536), allow_private=False)


def test_starts_on_the_forwarder_with_nothing_to_do() -> None:
    link = Link()
    assert link.paths.current == FORWARDER
    assert not link.paths.is_direct
    assert link.paths.next_timer() is None
    assert link.due() == []


def test_probes_five_times_a_second_for_ten_seconds_and_again_after_a_rest() -> None:
    link = Link(NEAR)
    assert 40 <= link.run(PROBE_GIVE_UP_SECONDS, {}) <= PROBE_GIVE_UP_SECONDS / PROBE_INTERVAL_SECONDS
    assert link.run(REST_SECONDS - 0.1, {}) == 0
    assert link.run(1.2, {}) >= 4
    assert not link.paths.is_direct


def test_an_answered_candidate_carries() -> None:
    link = Link(NEAR)
    link.run(0.1, {NEAR: 0.01})
    assert link.paths.current == NEAR
    assert link.paths.is_direct
    assert link.run(10, {NEAR: 0.01}) in (9, 10)


def test_the_faster_path_carries_and_small_differences_do_not_swing() -> None:
    link = Link(NEAR, FAR)
    link.run(0.1, {NEAR: 0.02, FAR: 0.01})
    assert link.paths.current == FAR
    link.run(3, {NEAR: 0.009, FAR: 0.01})
    assert link.paths.current == FAR
    link.run(3, {NEAR: 0.002, FAR: 0.01})
    assert link.paths.current == NEAR


def test_a_silent_path_falls_back_within_four_seconds_and_is_tried_again_later() -> None:
    link = Link(NEAR)
    link.run(5, {NEAR: 0.01})
    last_answer = link.now
    while link.paths.is_direct:
        link.run(0.1, {})
    assert link.now - last_answer <= 4
    assert link.run(REST_SECONDS - 1, {NEAR: 0.01}) == 0
    link.run(1.2, {NEAR: 0.01})
    assert link.paths.current == NEAR


def test_a_silent_path_gives_way_to_another_that_is_valid() -> None:
    link = Link(NEAR, FAR)
    link.run(2, {NEAR: 0.001, FAR: 0.05})
    assert link.paths.current == NEAR
    link.run(5, {FAR: 0.05})
    assert link.paths.current == FAR


def test_single_lost_probes_change_nothing() -> None:
    link = Link(NEAR)
    for _ in range(5):
        link.run(1, {NEAR: 0.01})
        link.run(1.5, {})
    assert link.paths.current == NEAR


def test_an_answer_from_elsewhere_or_twice_counts_for_nothing() -> None:
    link = Link(NEAR)
    [probe] = link.due()
    assert not link.paths.answered(probe.transaction, FAR, link.now)
    assert not link.paths.answered(b"?" * 12, NEAR, link.now)
    assert link.paths.answered(probe.transaction, NEAR, link.now)
    assert not link.paths.answered(probe.transaction, NEAR, link.now)


def test_a_resting_candidate_that_is_named_again_is_probed_at_once() -> None:
    link = Link(NEAR)
    link.run(PROBE_GIVE_UP_SECONDS + 1, {})
    assert link.due() == []
    link.paths.add([NEAR], link.now)
    assert [probe.address for probe in link.due()] == [NEAR]
    link.paths.add([NEAR], link.now)
    assert link.due() == []


def test_candidates_and_transactions_are_bounded() -> None:
    link = Link(*[(f"198.51.100.{number}", 1) for number in range(CANDIDATES_TRIED_MAX)])
    assert link.paths.add([FAR, FORWARDER], link.now) == 2
    first = link.due()[0]
    link.run(9, {})
    assert len(link.paths._transactions) == TRANSACTIONS_MAX
    assert not link.paths.answered(first.transaction, first.address, link.now)


def test_the_next_timer_is_the_earliest() -> None:
    link = Link(NEAR)
    assert link.paths.next_timer() == link.now
    link.due()
    assert link.paths.next_timer() == pytest.approx(link.now + PROBE_INTERVAL_SECONDS)
