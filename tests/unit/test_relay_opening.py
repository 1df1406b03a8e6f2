"""Whom an `open` is offered to, and what is answered in the end."""

from __future__ import annotations

import pytest

from relay import opening as module
from relay.commands import (
    AddLink,
)
from relay.opening import ACCEPT_SECONDS, PARK_SECONDS
from relay.policy import Route
from relay.rules import Rules
from tests.support.relay_world import ALICE, BOB, CANDIDATE, DB, HOLD_S, WEB, World, X, Y, met
from ztna.names import ConnectorId
from ztna.reasons import Reason
from ztna.wire import control


@pytest.fixture
def world() -> World:
    """As in tests.support.relay_world.met."""
    return met()


def test_opening_tells_both_ends_the_same(world: World) -> None:
    world.open()
    offered = world.take(X, control.Offered)
    assert world.quiet(ALICE, Y), "nothing before `accepted`"
    world.say(X, control.Accepted(offered.session))
    opened = world.take(ALICE, control.Opened)
    assert opened.forwarder is not None and offered.forwarder is not None
    (link,) = [each for each in world.commands if isinstance(each, AddLink)]
    assert (link.agent.bind_id, link.agent.secret) == (
        opened.forwarder.bind_id,
        opened.forwarder.bind_secret,
    )
    assert link.connector.bind_id == offered.forwarder.bind_id
    assert opened.probe_key == offered.probe_key and opened.link_address == CANDIDATE
    world.say(X, control.Accepted(offered.session))
    assert world.quiet(ALICE), "a second `accepted` changes nothing"


def test_a_v1_agent_s_session_is_offered_to_nobody_over_tls(world: World) -> None:
    """Its packets could only be handed on as DATAGRAMs."""
    world.join(9, v1=True, agent=("web",))
    world.connector(7, "con-t", tls=True)
    world.srv(WEB, "con-t", "con-x")
    world.open(9)
    assert world.take(X, control.Offered).v1
    world.open(ALICE, wanted="con-t")
    assert not world.take(7, control.Offered).v1


def test_a_connector_may_be_asked_for(world: World) -> None:
    world.open(wanted="con-y")
    world.take(Y, control.Offered)
    world.open(wanted="con-z")
    assert world.denied() is Reason.NO_HEALTHY_CONNECTOR


def test_denials_in_order(world: World) -> None:
    world.agent(9, "db")
    world.open(9, WEB)
    assert world.denied(9) is Reason.NO_GRANT
    world.open(9, DB)
    assert world.denied(9) is Reason.NO_SUCH_SERVICE
    world.srv(WEB, fresh_s_ago=HOLD_S + 1)
    world.open()
    assert world.denied() is Reason.POLICY_UNKNOWN
    world.srv(WEB)
    world.open()
    assert world.denied() is Reason.NO_HEALTHY_CONNECTOR


def test_limits_come_last() -> None:
    world = World(Rules(per_identity=1, per_service=100, total=2))
    for key, name in ((ALICE, "alice"), (5, "alice"), (BOB, "bob"), (6, "carol")):
        world.agent(key, name=name)
    world.connector()
    world.srv(WEB, "con-x")
    session = world.opened()
    world.open(5)
    assert world.denied(5) is Reason.LIMIT_REACHED
    world.opened(BOB)
    world.open(6)
    assert world.denied(6) is Reason.LIMIT_REACHED
    world.say(ALICE, control.Closed(session, Reason.CLOSED_BY_PEER))
    world.opened(6)


def test_one_service_cannot_take_all_sessions() -> None:
    world = World(Rules(per_identity=5, per_service=1, total=5))
    world.agent(ALICE)
    world.connector(X, "con-x", "web", "db")
    world.routes[DB] = (Route(0, 1, ConnectorId("con-x")),)
    world.srv(WEB, "con-x")
    world.opened()
    world.open()
    assert world.denied() is Reason.LIMIT_REACHED
    world.open(ALICE, DB)
    world.take(X, control.Offered)


def test_the_less_loaded_of_two_equals_is_chosen(world: World) -> None:
    world.routes[WEB] = tuple(Route(0, 1, ConnectorId(each)) for each in ("con-x", "con-y"))
    world.table()
    for _ in range(6):
        world.open()
    offers = [
        len([each for each in world.inbox.get(key, []) if isinstance(each, control.Offered)])
        for key in (X, Y)
    ]
    assert offers == [3, 3]


def test_a_draining_relay_opens_nothing(world: World) -> None:
    world.do(world.sessions.drain(25.0, ("west",)))
    assert {key for key in (ALICE, BOB, X, Y) if world.take(key, control.Drain).deadline_s == 25.0} == {
        ALICE,
        BOB,
        X,
        Y,
    }
    world.open()
    assert world.denied() is Reason.DRAINING


def test_an_open_waits_for_the_first_answer_of_a_new_service(world: World) -> None:
    world.connector(9, "con-z", "db")
    world.open(ALICE, DB)
    assert world.quiet(ALICE)
    assert world.sessions.next_timer() == world.now + PARK_SECONDS
    world.tick(PARK_SECONDS / 2)
    assert world.quiet(ALICE)
    world.srv(DB, "con-z")
    world.take(9, control.Offered)


def test_an_open_waits_no_longer_than_told(world: World) -> None:
    world.connector(9, "con-z", "db")
    world.open(ALICE, DB)
    world.tick(PARK_SECONDS)
    assert world.denied() is Reason.POLICY_UNKNOWN


def test_waiting_opens_are_bounded_and_end_with_their_connection(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "PARKED_MAX", 1)
    world.connector(9, "con-z", "db")
    world.open(ALICE, DB)
    world.open(BOB, DB)
    assert world.denied(BOB) is Reason.POLICY_UNKNOWN
    world.do(world.sessions.disconnected(ALICE, Reason.PEER_GONE, world.now))
    world.settle()
    world.srv(DB, "con-z")
    assert world.quiet(9)


def test_silence_moves_on_to_the_next_and_spares_the_silent_one(world: World) -> None:
    world.open()
    first = world.take(X, control.Offered)
    assert world.sessions.next_timer() == world.now + ACCEPT_SECONDS
    world.tick(ACCEPT_SECONDS - 0.1)
    assert world.quiet(Y)
    world.tick(0.2)
    second = world.take(Y, control.Offered)
    assert second.session != first.session
    assert world.take(X, control.Closed).session == first.session
    world.say(X, control.Accepted(first.session))
    assert world.quiet(ALICE) and world.refusals() == [], "too late, but it had been asked"
    world.say(Y, control.Accepted(second.session))
    assert world.take(ALICE, control.Opened).connector_id == "con-y"

    silent_since = world.now
    world.open(BOB)
    world.take(Y, control.Offered)
    world.do(world.sessions.silence(X, False, silent_since - 1, world.now))
    world.open(BOB)
    world.take(Y, control.Offered)
    world.do(world.sessions.silence(X, False, silent_since + 1, world.now))
    world.open(BOB)
    world.take(X, control.Offered)


def test_who_wants_a_silent_connector_and_no_other_is_told_that_it_has_gone(world: World) -> None:
    world.open(ALICE, WEB, "con-x")
    world.take(X, control.Offered)
    world.tick(ACCEPT_SECONDS)
    assert world.denied() is Reason.PEER_GONE
    world.open(ALICE, WEB, "con-x")
    assert world.denied() is Reason.PEER_GONE, "at once while it is silent"
    # It may be there and only unknown here: not the same thing.
    world.open(ALICE, WEB, "con-z")
    assert world.denied() is Reason.NO_HEALTHY_CONNECTOR
    world.do(world.sessions.silence(X, False, world.now + 1, world.now))
    world.open(ALICE, WEB, "con-x")
    world.take(X, control.Offered)


def test_all_silent_is_nobody_healthy(world: World) -> None:
    world.open()
    world.tick(ACCEPT_SECONDS)
    world.tick(ACCEPT_SECONDS)
    assert world.denied() is Reason.NO_HEALTHY_CONNECTOR
    assert not world.sessions.sessions and world.sessions.next_timer() is None


def test_the_first_reason_given_is_told_when_nobody_is_left(world: World) -> None:
    world.open()
    for key, reason in ((X, Reason.STALE_EPOCH), (Y, Reason.LIMIT_REACHED)):
        world.say(key, control.Closed(world.take(key, control.Offered).session, reason))
    assert world.denied() is Reason.STALE_EPOCH


def test_a_connector_that_goes_while_offered_is_passed_over(world: World) -> None:
    world.open()
    world.do(world.sessions.disconnected(X, Reason.PEER_GONE, world.now))
    world.take(Y, control.Offered)
    world.do(world.sessions.disconnected(Y, Reason.PEER_GONE, world.now))
    assert world.denied() is Reason.NO_HEALTHY_CONNECTOR


def test_an_agent_that_goes_takes_its_offers_along(world: World) -> None:
    world.open()
    session = world.take(X, control.Offered).session
    world.do(world.sessions.disconnected(ALICE, Reason.CLOSED_BY_PEER, world.now))
    closed = world.take(X, control.Closed)
    assert (closed.session, closed.reason) == (session, Reason.CLOSED_BY_PEER)
    assert world.sessions.next_timer() is None


def test_nothing_is_opened_for_or_with_those_of_whom_crls_tell_nothing(world: World) -> None:
    for unvouched in ([ALICE], [X, Y]):
        world.sessions.unvouched(unvouched)
        world.open(ALICE)
        assert world.denied(ALICE) is Reason.POLICY_UNKNOWN
    assert world.quiet(X, Y)
    world.sessions.unvouched([X])
    world.open(ALICE)
    world.take(Y, control.Offered)
