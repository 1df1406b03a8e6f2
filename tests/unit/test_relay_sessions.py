"""Who serves, and whose messages count: events in, commands out."""

from __future__ import annotations

import msgspec
import pytest

from relay import book
from relay import sessions as module
from relay.commands import (
    AddLink,
    AdmitConnector,
    AskDns,
    EndSession,
    Event,
    Refusal,
    RemoveLink,
)
from relay.pace import Kind
from tests.support.relay_world import (
    ALICE,
    BOB,
    CANDIDATE,
    DB,
    HERE,
    HOLD_S,
    RULES,
    WEB,
    World,
    X,
    Y,
    met,
    told,
)
from ztna.errors import ProtocolError
from ztna.names import ConnectorId, ServiceName, SessionId
from ztna.reasons import Reason
from ztna.wire import control


@pytest.fixture
def world() -> World:
    """As in tests.support.relay_world.met."""
    return met()


# Hello.


def test_hello_comes_first_and_once() -> None:
    world = World()
    world.join(ALICE, hello=False, agent=["web"])
    with pytest.raises(ProtocolError, match="hello first"):
        world.say(ALICE, control.Open(1, WEB))
    with pytest.raises(ProtocolError, match="version 1"):
        world.say(ALICE, control.Hello(version=1))
    world.say(ALICE, control.Hello())
    assert world.take(ALICE, control.Hello).version == 2
    with pytest.raises(ProtocolError):
        world.say(ALICE, control.Hello())


def test_releases_are_told_both_ways() -> None:
    world = World(software="0.2.0")
    world.join(ALICE, hello=False, agent=["web"])
    world.say(ALICE, control.Hello(software="0.1.0"))
    assert world.take(ALICE, control.Hello).software == "0.2.0"
    world.join(X, connector=["web"], id_name="con-x")
    assert [each.software for each in world.sessions.peers.values()] == ["0.1.0", ""]
    for said in ("0.3.0", ""):
        world.say(X, control.Register(ConnectorId("con-x"), (), software=said))
        assert world.sessions.peers[X].software == "0.3.0"


def test_what_only_a_relay_sends_is_a_protocol_error(world: World) -> None:
    with pytest.raises(ProtocolError, match="registered"):
        world.say(X, control.Registered(WEB))


# Registering.


def test_registration_is_bounded_by_the_certificate(world: World) -> None:
    world.register(X, "con-x", "db")
    assert world.take(X, control.Refused).reason is Reason.NO_GRANT
    world.register(BOB, "con-x", "web")
    assert world.take(BOB, control.Refused).reason is Reason.NO_GRANT
    assert world.refusals() == [Reason.NO_GRANT] * 2
    assert world.sessions.services == {WEB}


def test_registrations_add_up_and_repeat() -> None:
    world = World()
    world.join(X, connector=["*"], id_name="con-x")
    world.register(X, "con-x", "web")
    world.register(X, "con-x", "web", "db")
    assert world.sessions.services == {WEB, DB}
    assert len([each for each in world.inbox[X] if isinstance(each, control.Registered)]) == 3
    with pytest.raises(ProtocolError, match="one connector id"):
        world.register(X, "con-x--2", "web")


def test_the_newer_of_two_with_one_id_gets_new_sessions_until_it_goes(world: World) -> None:
    kept = world.opened()
    world.connector(9, "con-x")
    (twice,) = [each for each in world.commands if isinstance(each, Event) and "twice" in each.event]
    assert twice.fields["connector_id"] == "con-x"
    world.opened(BOB, 9)
    world.say(ALICE, control.CandidateOffer(kept, ()))
    world.take(X, control.CandidateOffer)
    world.do(world.sessions.disconnected(9, Reason.PEER_GONE, world.now))
    world.opened(BOB, X)


def test_a_service_ends_with_its_last_connector(world: World) -> None:
    for key in (X, Y):
        assert WEB in world.sessions.services
        world.do(world.sessions.disconnected(key, Reason.PEER_GONE, world.now))
    assert not world.sessions.services
    assert world.take(ALICE, control.Health).state == "critical"


# Opening.


def test_a_v1_agent_s_session_says_so_and_has_no_link(world: World) -> None:
    world.join(9, v1=True, agent=("web",))
    world.settle()
    world.open(9)
    offered = world.take(X, control.Offered)
    assert offered.v1 and offered.forwarder is None and offered.probe_key == b""
    world.say(X, control.Accepted(offered.session))
    opened = world.take(9, control.Opened)
    assert opened.session == offered.session and opened.forwarder is None and opened.probe_key == b""
    world.say(X, control.Closed(offered.session, Reason.DRAINING))
    assert world.take(9, control.Closed).reason is Reason.DRAINING
    assert not [each for each in world.commands if isinstance(each, AddLink | RemoveLink)]
    assert world.opened(ALICE) and not world.sessions.sessions.keys() & {offered.session}


def test_a_v1_agent_s_session_ends_when_no_packet_comes_for_long(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "V1_IDLE_SECONDS", HOLD_S / 4)
    world.join(9, v1=True, agent=("web",))
    idle, other = world.opened(9), world.opened(ALICE)
    world.sessions.sessions[idle].v1_bytes += 1
    world.tick(HOLD_S / 4)
    world.tick(HOLD_S / 8)
    assert idle in world.sessions.sessions, "a packet came since it opened"
    world.tick(HOLD_S / 8)
    assert world.take(9, control.Closed).reason is Reason.CLOSED_BY_PEER
    assert world.take(X, control.Closed).session == idle
    assert list(world.sessions.sessions) == [other]


def test_sessions_of_one_pair_share_a_link(world: World) -> None:
    first, second = world.opened(), world.opened()
    assert len([each for each in world.commands if isinstance(each, AddLink)]) == 1
    for session in (first, second):
        assert not [each for each in world.commands if isinstance(each, RemoveLink)]
        world.say(ALICE, control.Closed(session, Reason.CLOSED_BY_PEER))
    assert [each.link for each in world.commands if isinstance(each, RemoveLink)] == [(ALICE, X)]


# Connectors that say nothing, or no.


def test_a_connection_may_serve_itself_and_go() -> None:
    world = World()
    world.join(ALICE, agent=["web"], connector=["web"], id_name="con-x")
    world.register(ALICE, "con-x")
    world.srv(WEB, "con-x")
    world.open()
    world.do(world.sessions.disconnected(ALICE, Reason.PEER_GONE, world.now))
    assert not world.sessions.sessions


def test_a_connector_gone_quiet_loses_its_sessions_but_not_its_connection(world: World) -> None:
    session = world.opened()
    world.open(BOB)
    pending = world.take(X, control.Offered).session
    world.do(world.sessions.silence(ALICE, True, world.now - 9, world.now))
    world.do(world.sessions.silence(X, True, world.now - 5, world.now))
    world.do(world.sessions.silence(X, True, world.now - 6, world.now + 1))
    for key in (ALICE, X):
        closed = world.take(key, control.Closed)
        assert (closed.session, closed.reason) == (session, Reason.PEER_GONE)
    assert list(world.sessions.sessions) == [pending], "an offer has its own clock"
    world.open()
    world.take(Y, control.Offered)


# Ownership.


ABOUT = {
    "accepted": control.Accepted,
    "dial": control.Dial,
    "closed": lambda session: control.Closed(session, Reason.CLOSED_BY_PEER),
    "candidate_offer": lambda session: control.CandidateOffer(session, (CANDIDATE,)),
    "candidate_answer": lambda session: control.CandidateAnswer(session, (CANDIDATE,)),
    "punching_result": lambda session: control.PunchingResult(session, True, CANDIDATE),
}
MAY = {
    ALICE: {"dial", "closed", "candidate_offer", "punching_result"},
    X: {"accepted", "closed", "candidate_answer", "punching_result"},
    BOB: set[str](),
    Y: set[str](),
}


@pytest.mark.parametrize("key", MAY)
@pytest.mark.parametrize("kind", ABOUT)
def test_only_the_owners_speak_about_an_open_session(world: World, key: int, kind: str) -> None:
    session = world.opened()
    world.settle()
    world.say(key, ABOUT[kind](session))
    if kind in MAY[key]:
        assert world.refusals() == []
        return
    (refusal,) = world.commands
    assert isinstance(refusal, Refusal)
    assert (refusal.by, refusal.about, refusal.reason) == (key, kind, Reason.NOT_YOUR_SESSION)
    assert (refusal.subject, refusal.owners) == (session, ("peer-1", "peer-3"))
    assert world.sessions.sessions[session].open


@pytest.mark.parametrize("kind", ABOUT)
def test_an_offered_session_is_the_connectors_alone(world: World, kind: str) -> None:
    world.open()
    session = world.take(X, control.Offered).session
    for key in (ALICE, BOB, Y):
        world.say(key, ABOUT[kind](session))
    assert world.refusals() == [Reason.NOT_YOUR_SESSION] * 3
    assert not world.sessions.sessions[session].open
    world.say(X, control.Accepted(session))
    world.take(ALICE, control.Opened)


def test_an_answer_before_the_session_is_open_is_refused(world: World) -> None:
    world.open()
    session = world.take(X, control.Offered).session
    world.say(X, control.CandidateAnswer(session, ()))
    assert world.refusals() == [Reason.NOT_YOUR_SESSION]


def test_sessions_that_never_were_are_nobodys(world: World) -> None:
    world.say(ALICE, control.Dial(SessionId("f" * 16)))
    assert world.refusals() == [Reason.NOT_YOUR_SESSION]


def test_late_words_of_an_owner_are_no_offence_those_of_others_are(world: World) -> None:
    session = world.opened()
    world.say(ALICE, control.Closed(session, Reason.CLOSED_BY_PEER))
    world.settle()
    world.say(X, control.PunchingResult(session, False))
    assert world.refusals() == []
    world.say(Y, control.PunchingResult(session, False))
    assert world.refusals() == [Reason.NOT_YOUR_SESSION]
    world.tick(book.ENDED_KEPT_SECONDS)
    world.say(X, control.PunchingResult(session, False))
    assert world.refusals() == [Reason.NOT_YOUR_SESSION]


def test_what_is_remembered_of_ended_sessions_is_bounded(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(book, "ENDED_KEPT_MAX", 2)
    for _ in range(4):
        world.say(ALICE, control.Closed(world.opened(), Reason.CLOSED_BY_PEER))
    assert len(world.sessions._held.book._ended) == 2


# What owners say.


def test_signaling_goes_to_the_other_side(world: World) -> None:
    session = world.opened()
    world.say(X, control.CandidateAnswer(session, ()))
    world.take(ALICE, control.CandidateAnswer)
    assert world.quiet(ALICE, X), "no punching without an offer"
    world.say(ALICE, control.CandidateOffer(session, (CANDIDATE,)))
    assert world.take(X, control.CandidateOffer).candidates == (CANDIDATE,)
    world.say(X, control.CandidateAnswer(session, (HERE,)))
    assert world.take(ALICE, control.StartPunching).candidates == (HERE,)
    assert world.take(X, control.StartPunching).candidates == (CANDIDATE,)
    for sender, receiver in ((ALICE, X), (X, ALICE)):
        world.say(sender, control.PunchingResult(session, True, HERE))
        assert world.take(receiver, control.PunchingResult).address == HERE


def test_dialling_needs_two_tokens_that_differ(world: World) -> None:
    session = world.opened()
    world.say(ALICE, control.Dial(session))
    dial = world.take(ALICE, control.DialToken)
    world.do(world.sessions.agent_waiting(session, 17))
    (admit,) = [each for each in world.commands if isinstance(each, AdmitConnector)]
    carry = world.take(X, control.Carry)
    assert (admit.to, admit.waiter, admit.message) == (X, 17, carry)
    assert carry.token != dial.token and len(carry.token) == len(dial.token) == 32


def test_a_waiting_agent_of_no_open_session_is_left_alone(world: World) -> None:
    world.open()
    session = world.take(X, control.Offered).session
    assert world.sessions.agent_waiting(session, 1) == []
    assert world.sessions.agent_waiting(SessionId("f" * 16), 1) == []


@pytest.mark.parametrize(
    ("said", "told"),
    [(Reason.STALE_EPOCH, Reason.STALE_EPOCH), (Reason.PEER_GONE, Reason.CLOSED_BY_PEER)],
)
@pytest.mark.parametrize(("by", "other"), [(ALICE, X), (X, ALICE)])
def test_closing_tells_the_other(world: World, by: int, other: int, said: Reason, told: Reason) -> None:
    session = world.opened()
    world.say(by, control.Closed(session, said))
    assert world.take(other, control.Closed).reason is told
    assert EndSession(session) in world.commands and not world.sessions.sessions


def test_questions_about_names_are_handed_on_in_their_pace(world: World) -> None:
    query = control.DnsQuery(1, control.Binary(bytes(12)))
    told = [world.say(ALICE, query) for _ in range(int(Kind.DNS.burst) + 1)]
    assert told[0] == [AskDns(ALICE, query, in_pace=True)]
    assert told[-2:] == [[AskDns(ALICE, query, in_pace=True)], [AskDns(ALICE, query, in_pace=False)]]
    world.tick(1.0)
    assert world.say(ALICE, query) == [AskDns(ALICE, query, in_pace=True)]


def test_conflicts_are_kept_and_bounded(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CONFLICTS_PER_CONNECTION_MAX", 1)
    world.say(ALICE, control.Conflict("10.0.0.0/8", "eth0"))
    world.say(ALICE, control.Conflict("10.0.0.0/8", "eth1"))
    world.say(ALICE, control.Conflict("10.1.0.0/16", "eth1"))
    world.say(X, control.Conflict("10.0.0.0/8", "eth0"))
    assert world.refusals() == [Reason.LIMIT_REACHED, Reason.NO_GRANT]
    kept = world.sessions.peers[ALICE].conflicts
    assert kept["10.0.0.0/8"].with_ == "eth1"
    world.say(ALICE, control.Conflict("10.0.0.0/8", ""))
    world.say(ALICE, control.Conflict("10.9.0.0/16", ""))
    assert kept == {}, "what is over is forgotten"
    world.say(ALICE, control.Conflict("10.1.0.0/16", "eth1"))
    assert list(kept) == ["10.1.0.0/16"], "and makes room"


# Policy over time.


def test_a_session_outlives_its_record_for_a_moment_only(world: World) -> None:
    session = world.opened()
    world.srv(WEB, "con-y")
    world.tick(1)
    world.srv(WEB, "con-x", "con-y")
    world.tick(RULES.leave_grace_s)
    assert session in world.sessions.sessions, "it came back in time"
    world.srv(WEB, "con-y")
    world.tick()
    assert world.quiet(ALICE, X)
    world.tick(RULES.leave_grace_s)
    for key in (ALICE, X):
        assert world.take(key, control.Closed).reason is Reason.NO_HEALTHY_CONNECTOR


def test_sessions_end_when_nobody_confirms_the_catalog(world: World) -> None:
    world.opened()
    world.open(BOB)
    world.take(X, control.Offered)
    world.tick(0.5)
    world.now += HOLD_S
    world.sessions._held.offers.clear()
    world.tick()
    assert world.take(ALICE, control.Closed).reason is Reason.POLICY_UNKNOWN
    assert world.denied(BOB) is Reason.POLICY_UNKNOWN
    assert world.take(ALICE, control.Health).state == "unknown"
    world.table()
    assert world.take(ALICE, control.Health).state == "passing"


def test_sessions_run_out_once_another_connector_can_have_what_comes_next() -> None:
    world = World(msgspec.structs.replace(RULES, leaving="move"))
    world.agent(ALICE)
    world.connector(X, "con-x")
    world.srv(WEB, "con-x")
    session = world.opened()
    world.srv(WEB)
    world.tick()
    world.tick(RULES.leave_grace_s)
    assert session in world.sessions.sessions, "nowhere to go"
    world.connector(Y, "con-y")
    world.settle()
    world.srv(WEB, "con-y")
    for _ in range(3):
        world.tick()
    assert world.take(ALICE, control.Retired).session == session
    assert world.quiet(ALICE, X), "once, and the session goes on"
    world.opened(ALICE, Y)
    assert session in world.sessions.sessions
    # What runs has as long as an answer of DNS may be relied on, and no longer.
    world.now += HOLD_S
    world.srv(WEB, "con-y")
    world.tick()
    for key in (ALICE, X):
        assert world.take(key, control.Closed) == control.Closed(session, Reason.NO_HEALTHY_CONNECTOR)


def test_sessions_of_agents_that_cannot_have_them_run_out_move_at_once() -> None:
    world = World(msgspec.structs.replace(RULES, leaving="move"))
    world.agent(ALICE, hello=False)
    world.say(ALICE, control.Hello(features=control.FEATURES - {"retired"}))
    world.connector(X, "con-x")
    world.srv(WEB, "con-x")
    session = world.opened()
    world.srv(WEB)
    world.tick()
    world.tick(RULES.leave_grace_s)
    assert session in world.sessions.sessions, "nowhere to go"
    world.connector(Y, "con-y")
    world.srv(WEB, "con-y")
    world.tick()
    for key in (ALICE, X):
        assert world.take(key, control.Closed).reason is Reason.DRAINING
    world.opened(ALICE, Y)


# What an operator sees and does.


@pytest.mark.parametrize(("success", "path"), [(True, "direct"), (False, "forwarded")])
def test_the_path_is_what_the_ends_told(world: World, success: bool, path: str) -> None:
    session = world.opened()
    world.say(X, control.PunchingResult(session, success))
    assert world.sessions.sessions[session].path == path


def test_sessions_that_end_with_the_relay_are_told_to_the_operator_alone(world: World) -> None:
    session = world.opened()
    world.open(BOB)
    world.settle()
    world.do(world.sessions.abandon(world.now))
    (left,) = told(world)
    assert (left.session, left.fields["reason"], left.fields["by"]) == (session, "draining", "relay")
    assert world.quiet(ALICE, X)


def test_an_operator_ends_an_open_session_and_no_other(world: World) -> None:
    session = world.opened()
    world.open(BOB)
    offered = world.take(X, control.Offered).session
    for unknown in (offered, SessionId("f" * 16)):
        assert world.sessions.close(unknown, world.now) == []
    world.do(world.sessions.close(session, world.now))
    for key in (ALICE, X):
        assert world.take(key, control.Closed).reason is Reason.CLOSED_BY_PEER
    assert told(world)[-1].fields["by"] == "operator"


# What one connection may ask.


def test_opens_are_paced(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Kind, "burst", 2.0)
    for _ in range(2):
        world.open(ALICE, DB)
        assert world.denied() is not Reason.LIMIT_REACHED
    world.open(ALICE, DB)
    assert world.denied() is Reason.LIMIT_REACHED
    world.open(BOB)
    world.take(X, control.Offered)


def test_registrations_signaling_and_conflicts_are_paced(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = world.opened()
    monkeypatch.setattr(Kind, "burst", 1.0)
    for _ in range(2):
        world.register(Y, "con-y")
        world.say(X, control.PunchingResult(session, True))
        world.say(BOB, control.Conflict("10.0.0.0/8", "eth0"))
    assert world.take(Y, control.Registered) and world.take(Y, control.Refused).reason is Reason.LIMIT_REACHED
    assert len([each for each in world.inbox[ALICE] if isinstance(each, control.PunchingResult)]) == 1
    assert world.refusals() == [Reason.LIMIT_REACHED] * 3


def test_health_is_told_at_the_start_and_on_change_to_those_who_may_know(world: World) -> None:
    world.agent(9, "db")
    world.agent(10)
    assert world.take(10, control.Health) == control.Health(WEB, "passing")
    assert not [each for each in world.inbox[9] if isinstance(each, control.Health)]
    world.srv(WEB)
    assert world.take(10, control.Health) == control.Health(WEB, "critical")
    world.table()
    assert not [each for each in world.inbox[10] if isinstance(each, control.Health)], "no change"


def test_a_withdrawn_service_gets_no_new_session_and_keeps_those_it_has() -> None:
    world = World()
    world.agent()
    world.connector(X, "con-x", "web", "db")
    world.srv(WEB, "con-x")
    world.srv(DB, "con-x")
    session = world.opened()
    world.settle()
    world.say(X, control.Register(ConnectorId("con-x"), (), CANDIDATE, (WEB, ServiceName("never-had"))))
    assert world.take(ALICE, control.Health) == control.Health(WEB, "critical")
    assert session in world.sessions.sessions
    assert world.sessions.services == {DB}
    world.open()
    assert world.denied() is Reason.NO_HEALTHY_CONNECTOR
    assert world.open(service=DB) and world.take(X, control.Offered).service == DB
    world.say(X, control.Register(ConnectorId("con-x"), (control.Offering(WEB),), CANDIDATE))
    world.open()
    assert world.take(X, control.Offered).service == WEB
    world.do(world.sessions.disconnected(X, Reason.PEER_GONE, world.now))
    assert world.sessions.services == frozenset()


def test_a_withdrawn_service_has_agents_begin_elsewhere_where_they_can() -> None:
    world = World()
    world.agent()
    world.agent(BOB, hello=False)
    world.say(BOB, control.Hello(features=control.FEATURES - {"retired"}))
    world.connector(X, "con-x")
    world.srv(WEB, "con-x")
    session, other = world.opened(), world.opened(BOB)
    world.connector(Y, "con-y")
    world.settle()
    world.say(X, control.Register(ConnectorId("con-x"), (), CANDIDATE, (WEB,)))
    assert world.take(ALICE, control.Retired).session == session
    assert {session, other} <= world.sessions.sessions.keys() and world.quiet(BOB, X)


def test_who_withdraws_retires_none_of_the_sessions_of_a_newer_connection_with_its_id() -> None:
    world = World()
    world.agent()
    world.connector(X, "con-x")
    world.srv(WEB, "con-x")
    old = world.opened()
    world.connector(Y, "con-x")
    new = world.opened(connector=Y)
    world.settle()
    world.say(X, control.Register(ConnectorId("con-x"), (), CANDIDATE, (WEB,)))
    assert world.take(ALICE, control.Retired).session == old
    assert not world.sessions.sessions[new].retired and world.quiet(ALICE)


def test_who_has_registered_nothing_withdraws_nothing() -> None:
    world = World()
    world.agent()
    world.connector(Y, "con-y")
    world.join(X, connector=("web",), id_name="con-x")
    world.settle()
    world.say(X, control.Register(ConnectorId("con-x"), (), CANDIDATE, (WEB,)))
    assert world.sessions.services == {WEB} and world.quiet(X, Y)


def test_the_sessions_of_one_that_drains_outlive_its_leaving_dns(world: World) -> None:
    kept = world.opened()
    world.say(X, control.Register(ConnectorId("con-x"), (), CANDIDATE, (WEB,)))
    world.srv(WEB, "con-y")
    world.tick(RULES.leave_grace_s)
    world.table()
    world.tick(RULES.leave_grace_s)
    assert kept in world.sessions.sessions, "it ends them itself"
    world.do(world.sessions.disconnected(Y, Reason.PEER_GONE, world.now))
    assert (world.sessions.services, world.sessions.looked_up) == (frozenset(), {WEB})
    world.now += HOLD_S
    world.table()
    world.tick()
    assert kept not in world.sessions.sessions
    assert world.take(ALICE, control.Closed).reason is Reason.NO_HEALTHY_CONNECTOR
