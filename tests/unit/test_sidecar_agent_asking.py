"""sidecar.agent.asking: how a place gets a session, all transitions by hand-held time."""

from __future__ import annotations

from sidecar.agent.asking import BACKOFF_FIRST_SECONDS, BACKOFF_MAX_SECONDS, OPEN_SECONDS, RESOLVE_SECONDS
from sidecar.agent.commands import (
    Cause,
    Ended,
    Fail,
    LeaseIs,
    Proceed,
    ReadLease,
    RelayUp,
    Release,
    Retry,
    Want,
)
from sidecar.agent.sessions import (
    FLOW_WAIT_SECONDS,
    WAITING_PER_SERVICE_MAX,
)
from tests.support.agent_world import (
    DB,
    LEASE,
    NEWER,
    WEB,
    Agent,
    ask,
    carrying,
    close,
    ready,
    sid,
)
from ztna.reasons import Reason
from ztna.wire.control import (
    Health,
    Hello,
)


class TestOpening:
    def test_the_first_flow_opens_and_those_that_came_meanwhile_share(self) -> None:
        agent = ready()
        assert agent(Want(1, WEB)) == [ask(1)]
        assert agent(Want(2, WEB)) == []
        assert agent.state() == "opening"
        first, second = agent.opened(1, 5)
        assert isinstance(first, Proceed) and isinstance(second, Proceed)
        assert (first.flow, second.flow) == (1, 2)
        assert first.session is second.session
        assert first.session.key == ("r1", sid(5))
        assert agent(Want(3, WEB)) == [Proceed(3, first.session)]
        assert agent.sessions.session(("r1", sid(5))) is first.session
        assert agent.sessions.session(("r2", sid(5))) is None
        assert agent.sessions.sessions == (first.session,)

    def test_an_unknown_service_fails_at_once(self) -> None:
        assert ready()(Want(1, DB)) == [Fail(1, Reason.NO_SUCH_SERVICE)]

    def test_flows_in_total_are_bounded(self) -> None:
        agent = ready(flows_max=1)
        agent(Want(1, WEB))
        assert agent(Want(2, WEB)) == [Fail(2, Reason.LIMIT_REACHED)]
        agent(Release(1))
        assert agent(Want(3, WEB)) == []

    def test_waiting_flows_of_a_service_are_bounded(self) -> None:
        agent = ready()
        for number in range(WAITING_PER_SERVICE_MAX):
            agent(Want(number, WEB))
        assert agent(Want(9999, WEB)) == [Fail(9999, Reason.LIMIT_REACHED)]

    def test_without_a_relay_it_waits_until_one_comes(self) -> None:
        agent = Agent()
        agent(LeaseIs(WEB, LEASE))
        assert agent(Want(1, WEB)) == []
        assert agent.sessions.relays.states == {"r1": "down"}
        assert agent(RelayUp("r1")) == [ask(1)]
        assert agent.sessions.relays.states == {"r1": "up"}

    def test_without_a_relay_a_flow_fails_at_its_deadline(self) -> None:
        agent = Agent()
        agent(LeaseIs(WEB, LEASE))
        agent(Want(1, WEB))
        agent.now += 1
        agent(Want(2, WEB))
        assert agent.sessions.next_timer() == 100.0 + FLOW_WAIT_SECONDS
        assert agent.after(FLOW_WAIT_SECONDS - 1) == [Fail(1, Reason.PEER_GONE)]
        assert agent.sessions.next_timer() == 101.0 + FLOW_WAIT_SECONDS
        assert agent.after(1) == [Fail(2, Reason.PEER_GONE)]
        assert agent.sessions.next_timer() is None

    def test_a_flow_that_left_while_waiting_is_not_told(self) -> None:
        agent = ready()
        agent(Want(1, WEB))
        assert agent(Release(1)) == []
        assert agent(Release(1)) == []
        assert agent.sessions.next_timer() == agent.now + OPEN_SECONDS
        assert agent.opened(1, 5) == []
        assert agent.state() == "open"

    def test_an_answer_that_nobody_waits_for_is_given_back(self) -> None:
        agent = ready()
        assert agent.opened(1, 5) == [close(5, Reason.CLOSED_BY_PEER)]
        assert agent.opened(1, 6, DB) == [close(6, Reason.CLOSED_BY_PEER)]
        agent(Want(1, WEB))
        assert agent.opened(2, 7) == [close(7, Reason.CLOSED_BY_PEER)]
        assert agent.opened(1, 8, relay="r2") == [close(8, Reason.CLOSED_BY_PEER, "r2")]
        assert agent.sessions.unexpected == 4

    def test_an_answer_that_repeats_a_live_session_changes_nothing(self) -> None:
        agent, session = carrying(5)
        assert agent.opened(1, 5) == []
        assert agent.sessions.unexpected == 1
        assert agent(Want(2, WEB)) == [Proceed(2, session)]

    def test_messages_of_others_are_left_alone(self) -> None:
        agent = ready()
        assert agent.says(Hello()) == []
        assert agent.sessions.unexpected == 0


class TestDenial:
    def test_all_who_wait_are_told_and_so_are_those_who_come_soon(self) -> None:
        agent = ready()
        agent(Want(1, WEB))
        agent(Want(2, WEB))
        reason = Reason.NO_HEALTHY_CONNECTOR
        assert agent.denied(1, reason) == [Fail(1, reason), Fail(2, reason)]
        assert agent(Want(3, WEB)) == [Fail(3, reason)]
        view = agent.sessions.views()[0]
        assert (view.state, view.reason, view.session, view.waiting) == ("denied", reason, None, 0)
        agent.now += BACKOFF_FIRST_SECONDS
        assert agent(Want(4, WEB)) == [ask(2)]

    def test_the_pause_doubles_to_a_bound(self) -> None:
        agent = ready()
        pause = BACKOFF_FIRST_SECONDS
        for request in range(1, 20):
            assert agent(Want(request, WEB)) == [ask(request)]
            agent.denied(request, Reason.NO_SUCH_SERVICE)
            agent.now += pause - 0.01
            assert agent(Want(1000 + request, WEB)) == [Fail(1000 + request, Reason.NO_SUCH_SERVICE)]
            agent.now += 0.02
            pause = min(pause * 2, BACKOFF_MAX_SECONDS)

    def test_news_of_a_healthy_connector_ends_the_pause(self) -> None:
        agent = ready()
        agent(Want(1, WEB))
        agent.denied(1, Reason.NO_HEALTHY_CONNECTOR)
        agent.says(Health(WEB, "critical"))
        assert agent.state() == "denied"
        agent.says(Health(DB, "passing"))
        assert agent.state() == "denied"
        agent.says(Health(WEB, "passing"))
        assert agent.state() == "idle"
        assert agent(Want(2, WEB)) == [ask(2)]
        agent.says(Health(WEB, "passing"))
        assert agent.state() == "opening"

    def test_an_unasked_denial_is_counted(self) -> None:
        agent = ready()
        agent.denied(1, Reason.NO_GRANT)
        agent(Want(1, WEB))
        assert agent.denied(9, Reason.NO_GRANT) == []
        assert agent.sessions.unexpected == 2
        assert agent.state() == "opening"

    def test_the_next_relay_is_asked_before_giving_up(self) -> None:
        agent = ready("r1", "r2")
        assert agent(Want(1, WEB)) == [ask(1)]
        assert agent.denied(1, Reason.POLICY_UNKNOWN) == [ask(2, "r2")]
        assert agent.denied(1, Reason.POLICY_UNKNOWN) == []
        reason = Reason.NO_SUCH_SERVICE
        assert agent.denied(2, reason, "r2") == [Fail(1, reason)]

    def test_a_missing_grant_is_final(self) -> None:
        agent = ready("r1", "r2")
        agent(Want(1, WEB))
        assert agent.denied(1, Reason.NO_GRANT) == [Fail(1, Reason.NO_GRANT)]

    def test_a_silent_relay_is_passed_over(self) -> None:
        agent = ready("r1", "r2")
        agent(Want(1, WEB))
        assert agent.sessions.next_timer() == agent.now + OPEN_SECONDS
        assert agent.after(OPEN_SECONDS - 1) == []
        agent(Want(2, WEB))
        assert agent.after(1) == [Fail(1, Reason.PEER_GONE), ask(2, "r2")]
        (proceed,) = agent.opened(2, 5, relay="r2")
        assert isinstance(proceed, Proceed) and proceed.flow == 2

    def test_a_lone_silent_relay_is_policy_unknown(self) -> None:
        agent = ready()
        agent(Want(1, WEB))
        agent.after(OPEN_SECONDS - 1)
        agent(Want(2, WEB))
        assert agent.after(1) == [Fail(1, Reason.PEER_GONE), Fail(2, Reason.POLICY_UNKNOWN)]


class TestEpochs:
    def test_stale_at_the_flow_reads_the_lease_and_asks_again(self) -> None:
        agent, session = carrying()
        reason = Reason.STALE_EPOCH
        assert agent(Retry(1, Cause.STALE)) == [close(1, reason), Ended(session, reason), ReadLease(WEB)]
        assert agent.sessions.next_timer() == agent.now + RESOLVE_SECONDS
        assert agent(LeaseIs(WEB, NEWER)) == [ask(2, lease=NEWER)]
        (proceed,) = agent.opened(2, 2)
        assert isinstance(proceed, Proceed) and proceed.session.lease == NEWER

    def test_once_per_flow(self) -> None:
        agent, _ = carrying()
        agent(Retry(1, Cause.STALE))
        agent(LeaseIs(WEB, NEWER))
        (proceed,) = agent.opened(2, 2)
        assert isinstance(proceed, Proceed)
        reason = Reason.STALE_EPOCH
        assert agent(Retry(1, Cause.STALE)) == [
            close(2, reason),
            Ended(proceed.session, reason),
            Fail(1, reason),
        ]

    def test_stale_at_the_relay_resolves_once_for_each_flow_that_waits(self) -> None:
        agent = ready()
        agent(Want(1, WEB))
        assert agent.denied(1, Reason.STALE_EPOCH) == [ReadLease(WEB)]
        agent(Want(2, WEB))
        assert agent(LeaseIs(WEB, LEASE)) == [ask(2)]
        assert agent.denied(2, Reason.STALE_EPOCH) == [Fail(1, Reason.STALE_EPOCH), ReadLease(WEB)]
        agent(LeaseIs(WEB, LEASE))
        assert agent.denied(3, Reason.STALE_EPOCH) == [Fail(2, Reason.STALE_EPOCH)]
        assert agent.state() == "denied"

    def test_a_lease_that_cannot_be_read_fails_the_flow(self) -> None:
        agent = ready()
        agent(Want(1, WEB))
        agent.denied(1, Reason.STALE_EPOCH)
        assert agent.after(RESOLVE_SECONDS) == [Fail(1, Reason.STALE_EPOCH)]

    def test_a_new_lease_retires_the_session(self) -> None:
        agent, session = carrying()
        assert agent(LeaseIs(WEB, LEASE)) == []
        assert agent(LeaseIs(WEB, NEWER)) == []
        assert agent(Want(2, WEB)) == [ask(2, lease=NEWER)]
        assert agent(Release(1)) == [
            close(1, Reason.STALE_EPOCH),
            Ended(session, Reason.STALE_EPOCH),
        ]

    def test_an_answer_for_the_old_lease_is_given_back(self) -> None:
        agent = ready()
        agent(Want(1, WEB))
        agent(LeaseIs(WEB, NEWER))
        assert agent.opened(1, 5) == [close(5, Reason.STALE_EPOCH), ask(2, lease=NEWER)]

    def test_a_service_that_vanishes_fails_what_waits(self) -> None:
        agent = ready()
        agent(Want(1, WEB))
        assert agent(LeaseIs(WEB, None)) == [Fail(1, Reason.NO_SUCH_SERVICE)]
        assert agent(LeaseIs(WEB, None)) == []
        assert agent.sessions.views() == ()

    def test_a_service_that_vanishes_ends_its_unused_session(self) -> None:
        agent, session = carrying()
        agent(Release(1))
        reason = Reason.CLOSED_BY_PEER
        assert agent(LeaseIs(WEB, None)) == [close(1, reason), Ended(session, reason)]

    def test_its_flows_may_finish(self) -> None:
        agent, session = carrying()
        assert agent(LeaseIs(WEB, None)) == []
        reason = Reason.CLOSED_BY_PEER
        assert agent(Release(1)) == [close(1, reason), Ended(session, reason)]
