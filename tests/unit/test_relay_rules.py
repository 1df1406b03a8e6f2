"""What becomes of sessions whose connector has left the SRV records."""

from __future__ import annotations

import pytest

from relay.policy import Route
from relay.rules import Leaving, Rules
from ztna.names import ConnectorId, ServiceName
from ztna.reasons import Reason

X, Y = ConnectorId("con-x"), ConnectorId("con-y")
PLACE = (ServiceName("web"), X)
LISTED, OTHER = (Route(0, 1, X),), (Route(0, 1, Y),)
HOLD_S, GRACE_S = 600.0, 10.0


def leaving(how: str) -> Leaving:
    return Leaving(Rules(1, 1, 1, how, GRACE_S))  # type: ignore[arg-type]


def test_what_dns_cannot_be_relied_on_for_ends_at_once() -> None:
    assert leaving("move").verdict(PLACE, None, True, HOLD_S, 0.0) is Reason.POLICY_UNKNOWN


def test_who_comes_back_in_time_starts_anew() -> None:
    left = leaving("close")
    assert left.verdict(PLACE, OTHER, True, HOLD_S, 0.0) is None
    assert left.verdict(PLACE, LISTED, True, HOLD_S, GRACE_S) is None
    assert left.verdict(PLACE, OTHER, True, HOLD_S, GRACE_S) is None
    assert left.verdict(PLACE, OTHER, True, HOLD_S, 2 * GRACE_S) is Reason.NO_HEALTHY_CONNECTOR


def test_moving_waits_for_a_place_to_go_but_not_for_ever() -> None:
    left = leaving("move")
    assert left.verdict(PLACE, (), False, HOLD_S, 0.0) is None
    assert left.verdict(PLACE, (), False, HOLD_S, HOLD_S - 1) is None
    assert left.verdict(PLACE, OTHER, True, HOLD_S, HOLD_S - 1) is Reason.DRAINING
    assert left.verdict(PLACE, (), False, HOLD_S, HOLD_S) is Reason.NO_HEALTHY_CONNECTOR


@pytest.mark.parametrize("how", ["close", "move"])
def test_one_that_withdrew_ends_its_sessions_itself_for_as_long_as_dns_may_be_relied_on(how: str) -> None:
    left = leaving(how)
    assert left.verdict(PLACE, OTHER, True, HOLD_S, 0.0, withdrew=True) is None
    assert left.verdict(PLACE, OTHER, True, HOLD_S, HOLD_S - 1, withdrew=True) is None
    assert left.verdict(PLACE, OTHER, True, HOLD_S, HOLD_S, withdrew=True) is Reason.NO_HEALTHY_CONNECTOR
