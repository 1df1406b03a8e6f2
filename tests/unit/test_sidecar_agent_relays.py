"""sidecar.agent.relays: which relay is asked first, and how hard it is to become the preferred one."""

from __future__ import annotations

from sidecar.agent.relays import BETTER_FOR_SECONDS, Relays, RelayState


def up(*names: str) -> Relays:
    relays = Relays(names)
    for name in names:
        relays.set(name, RelayState.UP)
    return relays


def test_while_nothing_is_measured_the_listed_order_counts() -> None:
    relays = up("r1", "r2")
    assert (relays.preferred, relays.choose(), relays.choose({"r1"})) == ("r1", "r1", "r2")
    assert relays.choose({"r1", "r2"}) is None
    assert relays.rtt_s("r1") is None and relays.rtt_s("r9") is None


def test_none_is_preferred_while_none_is_up() -> None:
    relays = Relays(["r1"])
    assert relays.preferred is None and relays.choose() is None
    assert not relays.measured("r1", 0.01, 0.0)
    relays.set("r1", RelayState.SILENT)
    assert relays.preferred is None and relays.choose() == "r1"


def test_up_comes_before_silent_before_draining() -> None:
    relays = up("r1", "r2", "r3", "r4")
    relays.set("r1", RelayState.DRAINING)
    relays.set("r2", RelayState.SILENT)
    relays.set("r3", RelayState.DOWN)
    assert relays.choose() == "r4"
    assert relays.choose({"r4"}) == "r2"
    assert relays.choose({"r2", "r4"}) == "r1"
    assert relays.choose({"r1", "r2", "r4"}) is None


def test_the_nearest_is_preferred_once_the_preferred_one_is_lost() -> None:
    relays = up("r1", "r2", "r3")
    for name, rtt_s in (("r1", 0.010), ("r2", 0.030), ("r3", 0.011)):
        relays.measured(name, rtt_s, 0.0)
    relays.set("r1", RelayState.DOWN)
    assert relays.preferred == "r3"
    relays.set("r1", RelayState.UP)
    assert relays.preferred == "r3", "one that came back has first to be nearer for a while"


def test_another_must_be_much_nearer_for_a_while() -> None:
    relays = up("r1", "r2")
    relays.measured("r1", 0.030, 0.0)
    assert not relays.measured("r2", 0.010, 1.0)
    assert not relays.measured("r2", 0.010, BETTER_FOR_SECONDS)
    assert relays.measured("r2", 0.010, 1.0 + BETTER_FOR_SECONDS)
    assert relays.preferred == "r2"
    assert not relays.measured("r2", 0.010, 100.0)


def test_one_good_moment_is_not_enough() -> None:
    relays = up("r1", "r2", "r3")
    relays.measured("r1", 0.030, 0.0)
    relays.measured("r2", 0.010, 0.0)
    relays.measured("r2", 0.029, 5.0)
    assert not relays.measured("r2", 0.010, 6.0)
    assert not relays.measured("r2", 0.010, BETTER_FOR_SECONDS + 1.0)
    assert not relays.measured("r3", 0.005, BETTER_FOR_SECONDS + 2.0), "another one, from now"
    assert relays.preferred == "r1"


def test_a_small_difference_is_none() -> None:
    relays = up("r1", "r2")
    relays.measured("r1", 0.0020, 0.0)
    assert not relays.measured("r2", 0.0010, 0.0)
    assert not relays.measured("r2", 0.0010, 1000.0), "half the time, but only a millisecond"


def test_relays_come_and_go() -> None:
    relays = Relays([])
    relays.set("r1", RelayState.UP)
    assert relays.preferred == "r1" and relays.states == {"r1": RelayState.UP}
    assert not relays.measured("r2", 0.001, 0.0)
    relays.forget("r1")
    relays.forget("r1")
    assert relays.preferred is None
    assert relays.state("r1") is RelayState.DOWN
