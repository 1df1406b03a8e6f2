"""sidecar.link.paths under any weather: no path is sent on that has been dead for 4 s, and probes stay few."""

from __future__ import annotations

import itertools

import hypothesis.strategies as st
from hypothesis import given

from sidecar.link.paths import (
    CANDIDATES_TRIED_MAX,
    KEEPALIVE_INTERVAL_SECONDS,
    PROBE_INTERVAL_SECONDS,
    REST_DOUBLINGS_MAX,
    REST_SECONDS,
    TRANSACTIONS_MAX,
    Paths,
    SockAddr,
)

FORWARDER = ("203.0.113.1", 4434)
ADDRESSES = [(f"198.51.100.{number}", 1) for number in range(CANDIDATES_TRIED_MAX + 4)]
SILENT_SECONDS_MAX = 4.0
LATE_SECONDS = 0.01

rtts = st.floats(0.0001, 0.15)
weather = st.lists(
    st.tuples(
        st.sampled_from(["pass", "pass", "pass", "works", "fails", "dark", "named", "doubt", "wonder"]),
        st.one_of(st.integers(0, 2), st.integers(0, len(ADDRESSES) - 1)),
        rtts,
        st.floats(0.1, 45.0),
    ),
    max_size=40,
)


class World:
    """Paths whose candidates answer as the weather says; time goes from timer to timer."""

    def __init__(self) -> None:
        self.paths = Paths(FORWARDER)
        self.now = 1000.0
        self.works: dict[SockAddr, float] = {}
        self.heard: dict[SockAddr, float] = {}
        self.probed: dict[SockAddr, float] = {}
        self._numbers = itertools.count()

    def happen(self, what: str, address: SockAddr, rtt: float) -> None:
        """Take one event."""
        if what == "works":
            self.works[address] = rtt
        elif what == "fails":
            self.works.pop(address, None)
        elif what == "dark":
            self.works.clear()
        elif what == "named":
            self.paths.add([address], self.now)
            self.probed.pop(address, None)
        elif what == "doubt":
            self.paths.doubt(self.now)
            self.probed.clear()
        elif what == "wonder" and self.paths.wonder(self.now):
            self.probed.pop(self.paths.current, None)

    def run(self, seconds: float) -> None:
        """Let time pass."""
        until = self.now + seconds
        while self.now < until:
            self.check()
            for probe in self.paths.due(self.now, lambda: next(self._numbers).to_bytes(12, "big")):
                since = self.now - self.probed.get(probe.address, -1.0)
                assert since > PROBE_INTERVAL_SECONDS - LATE_SECONDS, "not more than five a second"
                self.probed[probe.address] = self.now
                if (rtt := self.works.get(probe.address)) is not None:
                    assert self.paths.answered(probe.transaction, probe.address, self.now + rtt)
                    self.heard[probe.address] = self.now
            self.check()
            timer = self.paths.next_timer()
            self.now = max(self.now + 0.001, min(until, timer if timer is not None else until))

    def check(self) -> None:
        """AssertionError when it sends into nothing, or keeps too much."""
        current = self.paths.current
        if current != FORWARDER:
            assert self.now - self.heard[current] <= SILENT_SECONDS_MAX
        assert len(self.paths.seen) <= CANDIDATES_TRIED_MAX
        assert len(self.paths._transactions) <= TRANSACTIONS_MAX


@given(weather)
def test_no_dead_path_carries_for_long_and_probes_are_few(
    events: list[tuple[str, int, float, float]],
) -> None:
    world = World()
    world.works = dict.fromkeys(ADDRESSES[:3], 0.01)
    world.paths.add(ADDRESSES[:3], world.now)
    for what, number, rtt, seconds in events:
        world.happen(what, ADDRESSES[number], rtt)
        world.run(seconds if what == "pass" else 0.05)


@given(weather, rtts)
def test_whatever_was_a_candidate_that_works_again_carries_again(
    events: list[tuple[str, int, float, float]], rtt: float
) -> None:
    world = World()
    world.paths.add([ADDRESSES[0]], world.now)
    for what, number, rtt_then, seconds in events:
        world.happen(what, ADDRESSES[number], rtt_then)
        world.run(seconds if what == "pass" else 0.05)
    world.works = {each.address: rtt for each in world.paths.seen}
    world.run(REST_SECONDS * 2**REST_DOUBLINGS_MAX + KEEPALIVE_INTERVAL_SECONDS)
    assert world.paths.is_direct
