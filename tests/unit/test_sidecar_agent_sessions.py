"""sidecar.agent.sessions: which session carries each flow, all transitions by hand-held time."""

from __future__ import annotations

import pytest

from sidecar.agent import asking as asking_module
from sidecar.agent.asking import BACKOFF_FIRST_SECONDS
from sidecar.agent.commands import (
    Cause,
    Ended,
    Fail,
    LeaseIs,
    Leave,
    Measured,
    Move,
    Proceed,
    ReadLease,
    RelayDown,
    RelayForgotten,
    RelayHeard,
    RelaySilent,
    RelayUp,
    Release,
    Retry,
    Send,
    Settle,
    Want,
)
from sidecar.agent.relays import BETTER_FOR_SECONDS
from sidecar.agent.sessions import (
    STEADY_SECONDS,
)
from tests.support.agent_world import (
    C1,
    DB,
    LEASE,
    NEWER,
    OTHER,
    WEB,
    Agent,
    ask,
    carrying,
    close,
    pinned,
    ready,
    sid,
)
from ztna.reasons import Reason
from ztna.wire.control import (
    Closed,
    Drain,
    Health,
    Open,
    Retired,
)


class TestRelays:
    def test_what_a_relay_finds_wrong_with_our_certificate_ends_its_sessions_for_that(self) -> None:
        agent, session = carrying()
        assert agent(RelayDown("r1", Reason.REVOKED)) == [Ended(session, Reason.REVOKED)]

    def test_a_lost_relay_takes_its_sessions_along(self) -> None:
        agent, session = carrying()
        assert agent(RelayDown("r1")) == [Ended(session, Reason.PEER_GONE, relay_lost=True)]
        assert agent(Release(1)) == []
        assert agent(Want(2, WEB)) == []
        assert agent(RelayUp("r1")) == [ask(2)]

    def test_only_its_own(self) -> None:
        agent = ready("r1", "r2")
        agent(LeaseIs(DB, LEASE))
        agent(Want(1, WEB))
        agent.opened(1, 5)
        assert agent(RelayDown("r2")) == []
        agent(RelayUp("r2"))
        agent(Want(2, DB))
        (ended, again) = agent(RelayDown("r1"))
        assert isinstance(ended, Ended)
        assert again == Send("r2", Open(3, DB, LEASE))
        assert agent(RelayDown("r1")) == []
        assert agent.state(DB) == "opening"

    def test_a_draining_relay_gets_new_sessions_only_when_there_is_no_other(self) -> None:
        agent = ready("r1", "r2")
        agent.says(Drain(25.0))
        assert agent(Want(1, WEB)) == [ask(1, "r2")]
        assert agent.denied(1, Reason.LIMIT_REACHED, "r2") == [ask(2)]
        assert agent.sessions.relays.states == {"r1": "draining", "r2": "up"}
        agent(RelayDown("r1"))
        agent(RelayUp("r1"))
        assert agent.sessions.relays.state("r1") == "up"

    def test_a_silent_relay_is_left_while_another_is_up(self) -> None:
        agent = ready("r1", "r2")
        agent(Want(1, WEB))
        (first,) = agent.opened(1, 1)
        assert isinstance(first, Proceed)
        assert agent(RelaySilent("r1")) == [Leave(first.session)]
        assert agent(RelaySilent("r1")) == []
        assert agent(Want(2, WEB)) == [ask(2, "r2")], "and new flows are elsewhere at once"
        assert agent(RelayHeard("r1")) == []
        assert agent.sessions.relays.state("r1") == "up"
        assert agent(Release(1)) == [close(1, Reason.PEER_GONE), Ended(first.session, Reason.PEER_GONE)]

    def test_the_only_relay_is_not_left(self) -> None:
        agent, session = carrying()
        assert agent(RelaySilent("r1")) == []
        assert agent(Want(2, WEB)) == [Proceed(2, session)]
        assert agent(RelayHeard("r1")) == []

    def test_it_is_left_as_soon_as_another_comes(self) -> None:
        agent = Agent("r1", "r2")
        agent(RelayUp("r1"))
        agent(LeaseIs(WEB, LEASE))
        agent(Want(1, WEB))
        (first,) = agent.opened(1, 1)
        assert isinstance(first, Proceed)
        assert agent.says(Drain(25.0)) == []
        assert agent(RelayHeard("r1")) == [], "it drains, heard or not"
        assert agent.sessions.relays.state("r1") == "draining"
        assert agent(RelayUp("r2")) == [Leave(first.session)]

    def test_a_session_that_nobody_uses_is_closed_as_its_relay_drains(self) -> None:
        agent = ready("r1", "r2")
        agent(Want(1, WEB))
        (first,) = agent.opened(1, 1)
        assert isinstance(first, Proceed)
        agent(Release(1))
        reason = Reason.DRAINING
        assert agent.says(Drain(25.0)) == [
            Leave(first.session),
            close(1, reason),
            Ended(first.session, reason),
        ]

    def test_a_retired_session_is_left_too(self) -> None:
        agent = ready("r1", "r2")
        agent(Want(1, WEB))
        (first,) = agent.opened(1, 1)
        assert isinstance(first, Proceed)
        agent(LeaseIs(WEB, NEWER))
        assert agent(RelaySilent("r1")) == [Leave(first.session)]

    def test_what_a_silent_relay_was_asked_another_is_asked(self) -> None:
        agent = ready("r1", "r2")
        agent(Want(1, WEB))
        assert agent(RelaySilent("r1")) == [ask(2, "r2")]
        assert agent.opened(1, 1) == [close(1, Reason.CLOSED_BY_PEER)]
        assert agent(RelaySilent("r1")) == [], "the other one has it already"

    def test_new_flows_go_over_to_a_relay_that_is_much_nearer(self) -> None:
        agent = ready("r1", "r2")
        agent(LeaseIs(DB, LEASE))
        agent(Want(1, WEB))
        (first,) = agent.opened(1, 1)
        assert isinstance(first, Proceed)
        agent(Want(2, DB))
        agent.denied(2, Reason.LIMIT_REACHED)
        (other,) = agent.opened(3, 2, DB, relay="r2")
        assert isinstance(other, Proceed)
        agent(Measured("r1", 0.050))
        assert agent(Measured("r2", 0.005)) == []
        agent.now += BETTER_FOR_SECONDS
        assert agent(Measured("r2", 0.005)) == []
        assert agent(Want(3, WEB)) == [ask(4, "r2")]
        assert agent(Want(4, DB)) == [Proceed(4, other.session)], "that one was there already"
        reason = Reason.CLOSED_BY_PEER
        assert agent(Release(1)) == [close(1, reason), Ended(first.session, reason)]
        (third,) = agent.opened(4, 3, relay="r2")
        assert isinstance(third, Proceed) and agent.sessions.is_used("r2")
        agent(RelayDown("r2"))
        assert not agent.sessions.is_used("r2")
        agent(RelayForgotten("r2"))
        assert agent.sessions.relays.states == {"r1": "up"}


class TestMove:
    """A running flow gets a session with its own connector again."""

    def test_after_the_loss_of_its_relay(self) -> None:
        agent = ready("r1", "r2")
        agent(Want(1, WEB))
        agent.opened(1, 1)
        agent(RelayDown("r1"))
        assert agent(Move(1, C1, 30.0)) == [pinned(2, "r2")]
        (proceed,) = agent.opened(2, 2, relay="r2")
        assert isinstance(proceed, Proceed) and proceed.session.key == ("r2", sid(2))
        assert agent(Settle(1)) == []
        assert agent(Want(2, WEB)) == [Proceed(2, proceed.session)], "new flows share what is there"
        assert agent(Move(2, C1, 30.0)) == [Proceed(2, proceed.session)]
        assert agent(Settle(9)) == []

    def test_it_keeps_what_it_has_until_it_settles(self) -> None:
        agent = ready("r1", "r2")
        agent(Want(1, WEB))
        (first,) = agent.opened(1, 1)
        assert isinstance(first, Proceed)
        agent(RelaySilent("r1"))
        agent(Move(1, C1, 30.0))
        (second,) = agent.opened(2, 2, relay="r2")
        assert isinstance(second, Proceed)
        reason = Reason.PEER_GONE
        assert agent(Settle(1)) == [close(1, reason), Ended(first.session, reason)]
        agent(RelayHeard("r1"))
        agent(RelaySilent("r2"))
        agent(Move(1, C1, 30.0))
        agent.opened(3, 3)
        assert agent(Release(1)) == [close(2, reason, "r2"), Ended(second.session, reason)]

    def test_only_with_its_own_connector(self) -> None:
        agent, session = carrying()
        assert agent(Want(2, WEB)) == [Proceed(2, session)]
        assert agent(Move(2, OTHER, 30.0)) == [pinned(2, connector=OTHER)]
        assert agent.opened(2, 2) == [close(2, Reason.CLOSED_BY_PEER)]
        agent(Release(2))
        assert agent.sessions.session(("r1", sid(2))) is None

    def test_it_waits_for_a_connector_that_is_not_back_yet(self) -> None:
        agent, _ = carrying()
        agent(RelayDown("r1"))
        assert agent(Move(1, C1, 30.0)) == []
        assert agent(RelayUp("r1")) == [pinned(2)]
        assert agent.denied(2, Reason.NO_HEALTHY_CONNECTOR) == []
        assert agent.sessions.views()[0].waiting == 1
        assert agent.sessions.next_timer() == agent.now + BACKOFF_FIRST_SECONDS
        assert agent.after(BACKOFF_FIRST_SECONDS) == [pinned(3)]
        agent.denied(3, Reason.NO_SUCH_SERVICE)
        assert agent.says(Health(WEB, "passing")) == [pinned(4)]
        (proceed,) = agent.opened(4, 4)
        assert isinstance(proceed, Proceed)

    def test_a_doubted_session_is_not_used_again_and_another_one_is_asked_for(self) -> None:
        agent, session = carrying()
        assert agent(Move(1, C1, 30.0, session.key)) == [pinned(2)]
        (proceed,) = agent.opened(2, 2)
        assert isinstance(proceed, Proceed) and proceed.session.key == ("r1", sid(2))
        # The next try goes on with that one.
        assert agent(Move(1, C1, 30.0, session.key)) == [proceed]
        assert agent(Settle(1)) == [close(1, Reason.PEER_GONE), Ended(session, Reason.PEER_GONE)]

    @pytest.mark.parametrize("said", ["denied", "closed"])
    def test_who_may_begin_anew_does_so_once_a_relay_says_that_the_connector_has_gone(
        self, said: str
    ) -> None:
        agent, session = carrying()
        assert agent(Want(2, WEB)) == [Proceed(2, session)]
        agent(Move(1, C1, 30.0, session.key))
        assert agent(Move(2, C1, 30.0)) == []
        failed = Fail(1, Reason.NO_HEALTHY_CONNECTOR)
        if said == "denied":
            assert agent.denied(2, Reason.PEER_GONE) == [failed]
        else:
            # The relay has missed the connector by now, and knows nothing of it any more.
            agent.says(Closed(sid(1), Reason.PEER_GONE))
            assert agent.denied(2, Reason.NO_HEALTHY_CONNECTOR) == [failed]
        assert agent.sessions.views()[0].waiting == 1, "who was carried there waits on"
        assert agent(Want(1, WEB)) == [ask(3)]

    def test_a_connector_that_is_only_unknown_to_the_relay_has_not_gone(self) -> None:
        agent, session = carrying()
        agent(RelayDown("r1"))
        agent(RelayUp("r1"))
        assert agent(Move(1, C1, 30.0, session.key)) == [pinned(2)]
        assert agent.denied(2, Reason.NO_HEALTHY_CONNECTOR) == []
        assert agent.sessions.views()[0].waiting == 1

    def test_a_connector_that_came_back_has_not_gone(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(asking_module, "GONE_KEPT_MAX", 1)
        agent, _ = carrying()
        agent.says(Closed(sid(1), Reason.PEER_GONE))
        assert list(agent.sessions._asking._gone) == [C1]
        agent(Want(2, WEB))
        (proceed,) = agent.opened(2, 2)
        assert isinstance(proceed, Proceed) and not agent.sessions._asking._gone
        agent.sessions._asking.note_gone(OTHER)
        agent.says(Closed(sid(2), Reason.PEER_GONE))
        assert list(agent.sessions._asking._gone) == [C1], "the last ones are kept"

    def test_but_not_for_ever(self) -> None:
        agent, _ = carrying()
        agent(RelayDown("r1"))
        agent(Move(1, C1, 30.0))
        assert agent.sessions.next_timer() == agent.now + 30.0
        assert agent.after(30.0) == [Fail(1, Reason.PEER_GONE)]
        assert agent(Move(1, C1, 30.0)) == [Fail(1, Reason.NO_SUCH_SERVICE)], "it is forgotten"

    def test_not_while_what_it_has_still_lives(self) -> None:
        agent = ready("r1", "r2")
        agent(Want(1, WEB))
        agent.opened(1, 1)
        agent.says(Drain(25.0))
        assert agent(Move(1, C1, 5.0)) == [pinned(2, "r2")]
        assert agent.denied(2, Reason.NO_HEALTHY_CONNECTOR, "r2") == [pinned(3)]
        assert agent.denied(3, Reason.DRAINING) == []
        for _ in range(3):
            assert Fail(1, Reason.PEER_GONE) not in agent.after(5.0)
        agent(RelayDown("r1"))
        assert Fail(1, Reason.PEER_GONE) in agent.after(5.0)

    def test_a_missing_grant_is_final_here_too(self) -> None:
        agent, _ = carrying()
        agent(RelayDown("r1"))
        agent(Move(1, C1, 30.0))
        agent(RelayUp("r1"))
        assert agent.denied(2, Reason.NO_GRANT) == [Fail(1, Reason.NO_GRANT)]

    def test_a_stale_lease_is_resolved_as_often_as_it_takes(self) -> None:
        agent, _ = carrying()
        agent(RelayDown("r1"))
        agent(RelayUp("r1"))
        assert agent(Move(1, C1, 30.0)) == [pinned(2)]
        for request in (2, 3):
            assert agent.denied(request, Reason.STALE_EPOCH) == [ReadLease(WEB)]
            assert agent(LeaseIs(WEB, LEASE)) == [pinned(request + 1)]

    def test_a_new_lease_that_comes_meanwhile(self) -> None:
        agent, _ = carrying()
        agent(RelayDown("r1"))
        agent(RelayUp("r1"))
        agent(Move(1, C1, 30.0))
        agent(LeaseIs(WEB, NEWER))
        again = Send("r1", Open(3, WEB, NEWER, C1))
        assert agent.opened(2, 2) == [close(2, Reason.STALE_EPOCH), again]

    def test_a_flow_that_left_is_waited_for_by_nobody(self) -> None:
        agent, _ = carrying()
        agent(RelayDown("r1"))
        agent(Move(1, C1, 30.0))
        agent(Move(1, OTHER, 30.0))
        agent(Release(1))
        assert agent(RelayUp("r1")) == []
        assert agent.sessions.next_timer() is None

    def test_a_service_that_vanished(self) -> None:
        agent, _ = carrying()
        agent(RelayDown("r1"))
        agent(Move(1, C1, 30.0))
        assert agent(LeaseIs(WEB, None)) == [Fail(1, Reason.NO_SUCH_SERVICE)]
        assert agent.sessions.next_timer() is None


class TestRetry:
    def test_a_failed_connector_is_left_for_another_session(self) -> None:
        agent, session = carrying()
        reason = Reason.PEER_GONE
        assert agent(Retry(1, Cause.FAILED)) == [close(1, reason), Ended(session, reason), ask(2)]

    def test_its_other_flows_go_on_and_the_last_one_ends_it(self) -> None:
        agent, session = carrying()
        agent(Want(2, WEB))
        assert agent(Retry(1, Cause.FAILED)) == [ask(2)]
        assert agent.sessions.session(session.key) is session
        (proceed,) = agent.opened(2, 2)
        assert isinstance(proceed, Proceed)
        assert agent(Retry(2, Cause.FAILED)) == [
            close(1, Reason.PEER_GONE),
            Ended(session, Reason.PEER_GONE),
            Proceed(2, proceed.session),
        ]

    def test_a_flow_outlives_some_more_sessions_that_end_under_it(self) -> None:
        """As when certificates are renewed at both ends, one after the other."""
        agent, _ = carrying()
        for number in range(1, 4):
            agent.says(Closed(sid(number), Reason.PEER_GONE))
            assert agent(Retry(1, Cause.FAILED)) == [ask(number + 1)]
            agent.opened(number + 1, number + 1)
        agent.says(Closed(sid(4), Reason.PEER_GONE))
        assert agent(Retry(1, Cause.FAILED)) == [Fail(1, Reason.PEER_GONE)]

    def test_a_flow_has_two_attempts(self) -> None:
        agent, _ = carrying()
        agent(Retry(1, Cause.FAILED))
        (proceed,) = agent.opened(2, 2)
        assert isinstance(proceed, Proceed)
        assert agent(Retry(1, Cause.FAILED)) == [
            close(2, Reason.PEER_GONE),
            Ended(proceed.session, Reason.PEER_GONE),
            Fail(1, Reason.PEER_GONE),
        ]
        assert agent.state() == "denied"
        assert agent(Want(2, WEB)) == [Fail(2, Reason.PEER_GONE)]

    def test_a_steady_session_that_fails_costs_no_pause(self) -> None:
        agent, _ = carrying()
        agent(Retry(1, Cause.FAILED))
        agent.opened(2, 2)
        agent.now += STEADY_SECONDS
        agent(Retry(1, Cause.FAILED))
        assert agent.state() == "idle"

    def test_a_retry_of_a_flow_that_failed_meanwhile_fails(self) -> None:
        """Its asker may not have heard, and would wait for ever."""
        agent, session = carrying()
        agent(RelayDown("r1"))
        agent(Move(1, session.opened.connector_id, 3.0))
        assert agent.after(3.0) == [Fail(1, Reason.PEER_GONE)]
        assert agent(Retry(1, Cause.FAILED)) == [Fail(1, Reason.PEER_GONE)]

    def test_a_retry_of_what_waits_is_nothing(self) -> None:
        agent = ready()
        agent(Want(1, WEB))
        assert agent(Retry(1, Cause.FAILED)) == []

    def test_a_retry_for_a_service_that_vanished_fails(self) -> None:
        agent, session = carrying()
        agent(LeaseIs(WEB, None))
        assert agent(Retry(1, Cause.FAILED)) == [
            close(1, Reason.CLOSED_BY_PEER),
            Ended(session, Reason.CLOSED_BY_PEER),
            Fail(1, Reason.PEER_GONE),
        ]

    def test_a_fresh_denial_is_about_the_flow_alone(self) -> None:
        agent, session = carrying()
        assert agent(Retry(1, Cause.DENIED)) == [Fail(1, Reason.CLOSED_BY_PEER)]
        assert agent(Want(2, WEB)) == [Proceed(2, session)]

    def test_a_fresh_denial_by_a_connector_that_leaves_says_nothing_of_the_flow(self) -> None:
        agent, session = carrying()
        agent.says(Retired(sid(1)))
        assert agent(Retry(1, Cause.DENIED)) == [
            close(1, Reason.DRAINING),
            Ended(session, Reason.DRAINING),
            ask(2),
        ]

    def test_a_late_denial_is_a_connector_that_forgot_the_session(self) -> None:
        agent, session = carrying()
        agent.now += STEADY_SECONDS
        reason = Reason.CLOSED_BY_PEER
        assert agent(Retry(1, Cause.DENIED)) == [close(1, reason), Ended(session, reason), ask(2)]

    def test_a_denial_on_a_session_that_is_gone_is_tried_once_more(self) -> None:
        agent, _ = carrying()
        agent.says(Closed(sid(1), Reason.PEER_GONE))
        assert agent(Retry(1, Cause.DENIED)) == [ask(2)]


@pytest.mark.parametrize("cause", list(Cause))
def test_every_cause_has_a_reason(cause: Cause) -> None:
    assert cause.reason in Reason
