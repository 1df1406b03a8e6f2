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
    State,
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
        self.last: dict[SockAddr, Probe] = {}
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
                self.last[probe.address] = probe
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


def test_rests_grow_until_there_is_an_answer_or_news() -> None:
    def rests(link: Link, times: int) -> list[int]:
        found = []
        for _ in range(times):
            link.run(PROBE_GIVE_UP_SECONDS + 0.5, {})
            begun = link.now
            while not link.due():
                link.now += 1
            found.append(round((link.now - begun) / REST_SECONDS))
        return found

    link = Link(NEAR)
    assert rests(link, 6) == [1, 2, 4, 8, 16, 16]
    link.run(1, {NEAR: 0.01})
    link.run(5, {})
    assert rests(link, 2) == [1, 2]
    link.paths.add([NEAR], link.now)
    assert rests(link, 2) == [1, 2]
    link.paths.doubt(link.now)
    assert rests(link, 1) == [1]


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
    link.run(5, {NEAR: 0.002, FAR: 0.01})
    assert link.paths.current == NEAR


def test_one_quick_answer_moves_nothing_and_nor_does_less_than_a_millisecond() -> None:
    link = Link(NEAR, FAR)
    link.run(0.1, {NEAR: 0.02, FAR: 0.01})
    link.run(1, {NEAR: 0.001, FAR: 0.01})
    link.run(2, {NEAR: 0.02, FAR: 0.01})
    assert link.paths.current == FAR
    near = Link(NEAR, FAR)
    near.run(0.1, {NEAR: 0.0005, FAR: 0.0004})
    assert near.paths.current == NEAR, "the first that answered"
    near.run(10, {NEAR: 0.0009, FAR: 0.0002})
    assert near.paths.current == NEAR


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


def test_the_path_that_carries_is_kept_alive_each_second_whatever_it_carries() -> None:
    """A NAT on it forgets a mapping that nothing crosses (RFC 4787, REQ-5: some after half a minute)."""
    link = Link(NEAR)
    link.run(5, {NEAR: 0.01})
    assert link.paths.current == NEAR
    for _ in range(120):
        assert link.run(1, {NEAR: 0.01}) == 1
    assert link.paths.current == NEAR


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


def test_a_path_in_doubt_that_still_works_is_not_left() -> None:
    link = Link(NEAR)
    link.run(5, {NEAR: 0.01})
    link.paths.doubt(link.now)
    for _ in range(30):
        link.run(0.1, {NEAR: 0.01})
        assert link.paths.current == NEAR
    assert link.run(5, {NEAR: 0.01}) in (4, 5, 6), "and from then on it is only kept alive"


def test_a_path_in_doubt_that_is_dead_is_left_within_a_second_and_probed_on() -> None:
    link = Link(NEAR)
    link.run(5, {NEAR: 0.01})
    link.paths.doubt(link.now)
    assert link.run(1, {}) >= 4
    assert not link.paths.is_direct
    link.run(PROBE_GIVE_UP_SECONDS - 2, {})
    link.run(0.3, {NEAR: 0.01})
    assert link.paths.current == NEAR


def test_a_path_in_doubt_is_given_its_round_trips() -> None:
    link = Link(NEAR)
    [probe] = link.due()
    assert link.paths.answered(probe.transaction, NEAR, link.now + 0.5)
    link.now += 1.5
    link.paths.doubt(link.now)
    link.run(2.9, {})
    assert link.paths.is_direct
    link.run(0.2, {})
    assert not link.paths.is_direct


def test_an_answer_to_what_was_asked_before_the_doubt_ends_none() -> None:
    link = Link(NEAR)
    link.run(5, {NEAR: 0.01})
    link.now += 1
    [probe] = link.due()
    link.now += 0.05
    link.paths.doubt(link.now)
    assert link.paths.answered(probe.transaction, NEAR, link.now)
    link.run(1, {})
    assert not link.paths.is_direct


def test_doubt_wakes_what_rests_and_begins_what_is_probed_anew() -> None:
    link = Link(NEAR)
    link.run(PROBE_GIVE_UP_SECONDS + 1, {})
    link.paths.doubt(link.now)
    link.run(PROBE_GIVE_UP_SECONDS / 2, {})
    link.paths.doubt(link.now)
    assert link.run(PROBE_GIVE_UP_SECONDS, {}) >= 40
    assert link.run(REST_SECONDS / 2, {}) == 0


def test_what_is_seen_of_candidates() -> None:
    link = Link(NEAR, FAR)
    link.run(0.1, {NEAR: 0.01})
    assert link.paths.seen == [(NEAR, State.VALID, pytest.approx(0.01)), (FAR, State.PROBING, None)]
    link.run(PROBE_GIVE_UP_SECONDS + 1, {NEAR: 0.01})
    assert [each.state for each in link.paths.seen] == [State.VALID, State.RESTING]


def test_a_new_candidate_takes_the_place_of_the_one_that_rested_longest() -> None:
    others = [(f"198.51.100.{number}", 1) for number in range(3, CANDIDATES_TRIED_MAX + 1)]
    link = Link(NEAR, FAR)
    link.run(1, {NEAR: 0.01})
    link.paths.add(others, link.now)
    link.run(PROBE_GIVE_UP_SECONDS - 0.5, {NEAR: 0.01})
    newest = ("198.51.100.200", 1)
    assert link.paths.add([newest], link.now) == 0
    known = [each.address for each in link.paths.seen]
    assert FAR not in known and {NEAR, newest, *others} <= set(known)
    last = link.last[FAR]
    assert not link.paths.answered(last.transaction, FAR, link.now), "it is forgotten"
    assert link.paths.add([FAR], link.now) == 1, "all others are in use"


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


def test_the_path_that_carries_is_wondered_about_once_it_was_not_heard_for_a_while() -> None:
    link = Link(NEAR)
    assert not link.paths.wonder(link.now), "the forwarder is not to be doubted"
    link.run(0.1, {NEAR: 0.01})
    assert not link.paths.wonder(link.now), "it was answered just now"
    link.now += 0.5
    assert link.paths.wonder(link.now)
    assert not link.paths.wonder(link.now), "it is in doubt already"
    link.run(1, {})
    assert not link.paths.is_direct
