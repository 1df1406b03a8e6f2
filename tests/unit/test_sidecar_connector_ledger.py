from __future__ import annotations

from dataclasses import dataclass

import pytest

from sidecar.connector.ledger import EVICTABLE_SECONDS, Ledger
from ztna.errors import Refused
from ztna.reasons import Reason

IDLE_S = 100.0


@dataclass(eq=False)
class Flow:
    moved: int = 0


def ledger(per_agent: int = 2, total: int = 3) -> Ledger[Flow]:
    return Ledger(lambda flow: flow.moved, per_agent=per_agent, total=total)


def began(made: Ledger[Flow], agent: str, flow: str, now: float = 0.0) -> Flow:
    assert made.admit((agent, flow), IDLE_S, now) is None
    begun = Flow()
    made.began((agent, flow), begun, now)
    return begun


def test_at_its_limit_an_agent_loses_what_it_used_longest_ago() -> None:
    made = ledger()
    first, second = began(made, "ann", "1"), began(made, "ann", "2")
    first.moved = 7
    assert made.admit(("ann", "3"), IDLE_S, EVICTABLE_SECONDS) is second
    assert len(made) == 2


def test_a_flow_in_use_makes_way_for_nobody() -> None:
    made = ledger()
    flows = [began(made, "ann", "1"), began(made, "ann", "2")]
    for flow in flows:
        flow.moved = 7
    for now in (EVICTABLE_SECONDS, 2 * EVICTABLE_SECONDS - 0.1):
        with pytest.raises(Refused) as refused:
            made.admit(("ann", "3"), IDLE_S, now)
        assert refused.value.reason is Reason.LIMIT_REACHED
    assert made.admit(("ann", "3"), IDLE_S, 2 * EVICTABLE_SECONDS) is flows[0]


def test_nobody_loses_a_flow_to_another_agents_load() -> None:
    made = ledger()
    began(made, "ann", "1")
    began(made, "ann", "2")
    began(made, "bob", "1")
    with pytest.raises(Refused):
        made.admit(("carol", "1"), IDLE_S, 1e6)
    assert made.admit(("bob", "2"), IDLE_S, 1e6) is not None
    assert len(made) == 3


def test_one_that_is_being_dialled_counts_and_is_not_evicted() -> None:
    made = ledger(per_agent=1)
    made.admit(("ann", "1"), IDLE_S, 0.0)
    with pytest.raises(Refused):
        made.admit(("ann", "2"), IDLE_S, 1e6)
    assert made.idle(1e6) == []
    made.ended(("ann", "1"))
    made.ended(("ann", "1"))
    assert len(made) == 0
    began(made, "ann", "2")


def test_what_nothing_moves_on_is_idle() -> None:
    made = ledger()
    still, busy = began(made, "ann", "1"), began(made, "ann", "2")
    busy.moved = 1
    assert made.idle(IDLE_S - 0.1) == []
    assert made.idle(IDLE_S) == [still]
    made.ended(("ann", "1"))
    assert made.idle(2 * IDLE_S - 0.2) == []
    assert made.idle(2 * IDLE_S) == [busy]
