"""When a connector that leaves takes no more flows, and when it ends those it has."""

from __future__ import annotations

from sidecar.connector.draining import HANDOVER_SECONDS, Drain
from ztna.names import ServiceName

WEB, SHORT, LONG = ServiceName("web"), ServiceName("short"), ServiceName("long")
BEGAN = 100.0
HANDED_OVER = BEGAN + HANDOVER_SECONDS


def drain(seconds: float = 25.0, offered: tuple[ServiceName, ...] = (WEB, SHORT, LONG)) -> Drain:
    return Drain(BEGAN, seconds, {SHORT: 0.25, LONG: 60.0}, frozenset(offered))


def test_a_service_has_its_own_time_within_the_connectors() -> None:
    assert [drain().ends_at(each) - BEGAN for each in (WEB, SHORT, LONG)] == [25.0, 0.25, 25.0]


def test_flows_are_taken_during_the_handover_and_never_past_their_end() -> None:
    assert [drain().takes_until(each) for each in (WEB, SHORT, LONG)] == [
        HANDED_OVER,
        BEGAN + 0.25,
        HANDED_OVER,
    ]
    assert drain(0.5).takes_until(WEB) == BEGAN + 0.5


def test_it_waits_for_the_handover_of_what_agents_have_sessions_for() -> None:
    assert drain().next_timer(BEGAN, ()) == BEGAN + 0.25
    assert drain().next_timer(BEGAN + 0.25, ()) == HANDED_OVER
    assert drain().next_timer(HANDED_OVER, ()) is None
    assert drain(offered=(SHORT,)).next_timer(BEGAN + 0.25, ()) is None, "the handover is part of the drain"
    assert drain(0.5).next_timer(BEGAN + 0.5, ()) is None
    assert drain(offered=()).next_timer(BEGAN, ()) is None


def test_it_looks_again_when_the_first_flow_is_due() -> None:
    late = HANDED_OVER + 1.0
    assert drain().next_timer(late, (WEB, LONG)) == BEGAN + 25.0
    assert drain(offered=()).next_timer(BEGAN, (WEB, SHORT)) == BEGAN + 0.25
    assert drain().next_timer(BEGAN, (WEB,)) == BEGAN + 0.25, "for flows that began meanwhile"
