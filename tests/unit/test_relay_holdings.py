"""Who is told what, and that an ended session is nowhere any more."""

from __future__ import annotations

import pytest

from relay.commands import (
    EndSession,
    RemoveLink,
)
from relay.opening import ACCEPT_SECONDS
from tests.support.relay_world import ALICE, World, X, met, told
from ztna.reasons import Reason
from ztna.wire import control


@pytest.fixture
def world() -> World:
    """As in tests.support.relay_world.met."""
    return met()


def test_a_type_that_a_peer_does_not_know_is_not_sent(world: World) -> None:
    world.join(9, hello=False, agent=["web"])
    world.say(9, control.Hello(features=frozenset({"open"})))
    world.open(9)
    world.say(X, control.Accepted(world.take(X, control.Offered).session))
    assert [type(each) for each in world.inbox[9]] == [control.Hello]


@pytest.mark.parametrize(("gone", "other"), [(ALICE, X), (X, ALICE)])
def test_a_session_ends_with_either_connection(world: World, gone: int, other: int) -> None:
    session = world.opened()
    world.do(world.sessions.disconnected(gone, Reason.PEER_GONE, world.now))
    assert world.take(other, control.Closed).reason is Reason.PEER_GONE
    assert EndSession(session) in world.commands and RemoveLink((ALICE, X)) in world.commands


def test_each_session_is_told_once_when_it_opens_and_once_when_it_ends(world: World) -> None:
    session = world.opened()
    world.tick(2.5)
    world.say(X, control.PunchingResult(session, True))
    world.say(ALICE, control.Closed(session, Reason.CLOSED_BY_PEER))
    opened, closed = told(world)
    who = {"session": session, "service": "web", "agent": "peer-1", "connector_id": "con-x"}
    assert opened.event == "session_opened" and opened.fields.items() >= who.items()
    assert (closed.event, closed.path) == ("session_closed", "direct")
    assert closed.fields == who | {"reason": "closed_by_peer", "by": "peer-1", "seconds": 2.5}
    assert world.commands.index(closed) < world.commands.index(EndSession(session))


def test_what_was_only_offered_is_told_as_refused_alone(world: World) -> None:
    world.open()
    world.tick(ACCEPT_SECONDS)
    world.tick(ACCEPT_SECONDS)
    assert told(world) == [] and world.refusals() == [Reason.NO_HEALTHY_CONNECTOR]
