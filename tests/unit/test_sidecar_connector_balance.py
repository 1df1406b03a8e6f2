from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

from sidecar.connector.balance import EJECT_SECONDS_MAX, Balancer, Policy
from ztna.config import Endpoint

ONE, TWO, THREE = (Endpoint(f"10.0.0.{number}", 80) for number in (1, 2, 3))
ALL = (ONE, TWO, THREE)


def balancer(*weights: int, **policy: Any) -> Balancer:
    made = Balancer(dict(zip(ALL, weights, strict=False)), Policy(**policy))
    for address in ALL[: len(weights)]:
        made.judge(address, "passing")
    return made


def picked(made: Balancer, times: int, now: float = 0.0, *, source: str = "ann") -> list[Endpoint | None]:
    found = []
    for _ in range(times):
        address = made.pick(source, now)
        assert address is not None
        made.ended(address)
        found.append(address)
    return found


def test_round_robin_follows_the_weights_and_spreads_them() -> None:
    made = balancer(3, 1, 1)
    assert picked(made, 5) == [ONE, TWO, ONE, THREE, ONE]
    assert Counter(picked(made, 50)) == {ONE: 30, TWO: 10, THREE: 10}


def test_least_connections_counts_what_runs_by_weight() -> None:
    made = balancer(2, 1, method="least_connections")
    taken = [made.pick("ann", 0.0) for _ in range(6)]
    assert Counter(taken) == {ONE: 4, TWO: 2}
    made.ended(TWO)
    made.ended(TWO)
    assert [made.pick("ann", 0.0) for _ in range(2)] == [TWO, TWO]
    # Idle ones take turns, or one that is quick would get everything.
    assert set(picked(balancer(1, 1, method="least_connections"), 2)) == {ONE, TWO}


def test_a_source_stays_with_its_backend() -> None:
    made = balancer(1, 1, 1, method="source_hash")
    agents = [f"agent-{number}" for number in range(600)]
    homes = {agent: made.pick(agent, 0.0) for agent in agents}
    assert {agent: made.pick(agent, 0.0) for agent in agents} == homes
    assert all(150 < count < 250 for count in Counter(homes.values()).values())
    made.judge(TWO, "critical")
    moved = {agent: made.pick(agent, 0.0) for agent in agents}
    assert all((moved[agent] == homes[agent]) == (homes[agent] != TWO) for agent in agents)
    made.judge(TWO, "passing")
    assert {agent: made.pick(agent, 0.0) for agent in agents} == homes


def test_source_hash_knows_weights() -> None:
    made = balancer(3, 1, method="source_hash")
    counted = Counter(made.pick(f"agent-{number}", 0.0) for number in range(800))
    assert 540 < counted[ONE] < 660


def test_the_best_health_is_served_and_the_worst_only_when_nothing_else_is_left() -> None:
    made = balancer(1, 1, 1)
    made.judge(ONE, "warning")
    assert not made.judge(ONE, "warning"), "it is no other verdict"
    assert set(picked(made, 4)) == {TWO, THREE}
    assert made.has_better(ONE, 0.0) and not made.has_better(TWO, 0.0)
    for address in (TWO, THREE):
        assert made.judge(address, "critical")
    assert picked(made, 2) == [ONE, ONE]
    made.judge(ONE, "critical")
    assert set(picked(made, 3)) == set(ALL), "within a session trying costs less than refusing"


def test_who_fails_in_a_row_is_passed_over_for_a_while() -> None:
    made = balancer(1, 1, eject_after=2, eject_s=10.0)
    assert not made.failed(ONE, 0.0)
    made.succeeded(ONE)
    assert not made.failed(ONE, 0.0), "not in a row"
    assert made.failed(ONE, 1.0)
    assert not made.failed(ONE, 1.0), "it is out already"
    assert picked(made, 3, 10.9) == [TWO] * 3
    assert made.has_better(ONE, 10.9)
    assert ONE in picked(made, 2, 11.0)
    assert made.failed(ONE, 11.0), "once is enough now, and for twice as long"
    assert picked(made, 2, 30.9) == [TWO] * 2
    assert ONE in picked(made, 2, 31.0)
    made.succeeded(ONE)
    assert not made.failed(ONE, 32.0)
    assert made.failed(ONE, 32.0)
    assert ONE in picked(made, 2, 42.0), "a success made it forget"


def test_ejections_grow_to_a_bound() -> None:
    made, now = balancer(1, 1, eject_after=1, eject_s=100.0), 0.0
    for seconds in (100.0, 200.0, EJECT_SECONDS_MAX, EJECT_SECONDS_MAX):
        assert made.failed(ONE, now)
        assert next(iter(made.standings())).is_ejected(now + seconds - 0.1)
        now += seconds
        assert not next(iter(made.standings())).is_ejected(now)


def test_when_all_are_ejected_none_is() -> None:
    made = balancer(1, 1, eject_after=1)
    made.judge(TWO, "warning")
    made.failed(ONE, 0.0)
    made.failed(TWO, 0.0)
    assert set(picked(made, 2)) == {ONE, TWO}
    made.judge(TWO, "critical")
    assert picked(made, 2) == [ONE, ONE]


def test_a_flow_tries_each_once() -> None:
    made = balancer(1, 1)
    first = made.pick("ann", 0.0)
    assert first is not None
    second = made.pick("ann", 0.0, [first])
    assert second is not None and second != first
    assert made.pick("ann", 0.0, [first, second]) is None


def test_what_stays_keeps_its_standing() -> None:
    made = balancer(1, 1, method="least_connections", eject_after=1)
    made.pick("ann", 0.0)
    made.failed(TWO, 0.0)
    made.update({TWO: 1, THREE: 2}, Policy("round_robin"))
    standings = {each.address: each for each in made.standings()}
    assert standings[TWO].is_ejected(1.0)
    assert (standings[THREE].verdict, standings[THREE].weight) == ("critical", 2)
    # What is still said of one that is gone means nothing any more.
    made.ended(ONE)
    made.succeeded(ONE)
    assert not made.failed(ONE, 0.0)


def test_flows_count_on_a_backend_that_left_and_came_back() -> None:
    made = balancer(1, 1, method="least_connections")
    assert {made.pick("ann", 0.0), made.pick("bob", 0.0), made.pick("cem", 0.0, [TWO])} == {ONE, TWO}
    made.update({TWO: 1}, Policy("least_connections"))
    made.ended(ONE)
    made.update({ONE: 1, TWO: 1}, Policy("least_connections"))
    made.judge(ONE, "passing")
    assert {each.address: each.flows for each in made.standings()} == {ONE: 1, TWO: 1}
    # What began on it anew is not taken back by the end of what ran before.
    assert made.pick("dan", 0.0, [TWO]) == ONE
    made.ended(ONE)
    assert {each.address: each.flows for each in made.standings()} == {ONE: 1, TWO: 1}


def test_who_left_is_forgotten_with_its_last_flow() -> None:
    made = balancer(1)
    assert made.is_idle
    made.pick("ann", 0.0)
    assert not made.is_idle
    made.failed(ONE, 0.0)
    made.update({}, Policy())
    assert not made.is_idle and not made.standings()
    made.ended(ONE)
    assert made.is_idle
    made.update({ONE: 1}, Policy())
    assert [(each.flows, each.failures) for each in made.standings()] == [(0, 0)]


def test_no_flow_is_taken_back_twice() -> None:
    made = balancer(1)
    made.ended(ONE)
    assert [each.flows for each in made.standings()] == [0]


@pytest.mark.parametrize("method", ["round_robin", "least_connections", "source_hash"])
def test_one_backend_gets_everything(method: str) -> None:
    assert picked(balancer(1, method=method), 3) == [ONE] * 3


def test_a_higher_priority_serves_only_while_no_lower_one_can() -> None:
    made = balancer(1, 1, 1)
    policy, weights = Policy(eject_after=1), dict.fromkeys(ALL, 1)
    made.update(weights, policy, {TWO: 10, THREE: 20})
    assert Counter(picked(made, 6)) == {ONE: 6}
    assert made.has_better(TWO, 0.0) and not made.has_better(ONE, 0.0)
    assert made.judge(ONE, "critical")
    assert Counter(picked(made, 6)) == {TWO: 6}
    assert made.failed(TWO, 0.0)
    assert Counter(picked(made, 6)) == {THREE: 6}
    assert made.pick("ann", 0.0, tried=(THREE,)) == TWO, "an ejected one rather than one that is critical"
    made.judge(ONE, "passing")
    assert Counter(picked(made, 6)) == {ONE: 6}
    made.update(weights, policy)
    assert {each.priority for each in made.standings()} == {0}
