"""The table of protocol.md, Ownership, message by message."""

from __future__ import annotations

import pytest

from relay.ownership import AboutSession, owns
from relay.state import Attempt, Session
from ztna.names import ConnectorId, ServiceName, SessionId
from ztna.reasons import Reason
from ztna.wire import control

AGENT, CONNECTOR, STRANGER = 1, 2, 3
WEB = ServiceName("web")
ID = SessionId("00" * 8)


@pytest.mark.parametrize(
    ("message", "before", "after"),
    [
        (control.Accepted(ID), {CONNECTOR}, {CONNECTOR}),
        (control.Dial(ID), set(), {AGENT}),
        (control.CandidateOffer(ID, ()), set(), {AGENT}),
        (control.CandidateAnswer(ID, ()), set(), {CONNECTOR}),
        (control.PunchingResult(ID, True), {CONNECTOR}, {AGENT, CONNECTOR}),
        (control.Closed(ID, Reason.CLOSED_BY_PEER), {CONNECTOR}, {AGENT, CONNECTOR}),
    ],
)
def test_a_message_counts_only_from_whose_it_is(
    message: AboutSession, before: set[int], after: set[int]
) -> None:
    session = Session(ID, WEB, AGENT, CONNECTOR, ConnectorId("con"), "alice", Attempt(control.Open(1, WEB)))
    for session.opened_at, expected in ((None, before), (1.0, after)):
        assert {key for key in (AGENT, CONNECTOR, STRANGER) if owns(key, session, message)} == expected
