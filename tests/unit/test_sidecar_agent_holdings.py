"""sidecar.agent.holdings: what the end of a session undoes, by hand-held time."""

from __future__ import annotations

from sidecar.agent.asking import BACKOFF_FIRST_SECONDS, BACKOFF_MAX_SECONDS
from sidecar.agent.commands import (
    Cause,
    Ended,
    LeaseIs,
    Move,
    Proceed,
    ReadLease,
    Release,
    Retry,
    RunOut,
    Want,
)
from sidecar.agent.sessions import (
    SESSION_IDLE_SECONDS,
    STEADY_SECONDS,
)
from tests.support.agent_world import (
    C1,
    NEWER,
    OTHER,
    PRINT,
    WEB,
    ask,
    carrying,
    close,
    ready,
    sid,
)
from ztna.reasons import Reason
from ztna.wire.control import (
    Closed,
    Opened,
    Retired,
)


class TestRunningOut:
    """A relay wants nothing new on a session; what runs on it may finish."""

    def test_new_flows_have_another_session_and_those_that_run_keep_theirs(self) -> None:
        agent, session = carrying()
        assert agent.says(Retired(sid(1))) == [RunOut(session)]
        assert agent(Want(2, WEB)) == [ask(2)]
        (proceed,) = agent.says(Opened(2, sid(2), WEB, OTHER, PRINT))
        assert isinstance(proceed, Proceed) and proceed.session != session
        # One whose carrier breaks comes back to it, as no relay gives another one with that connector.
        assert agent(Move(1, C1, 30.0)) == [Proceed(1, session)]
        assert agent(Want(3, WEB)) == [Proceed(3, proceed.session)]
        assert agent.says(Retired(sid(1))) == [RunOut(session)]
        assert agent(Release(1)) == [close(1, Reason.DRAINING), Ended(session, Reason.DRAINING)]

    def test_one_that_nobody_uses_ends(self) -> None:
        agent, session = carrying()
        agent(Release(1))
        assert agent.says(Retired(sid(1))) == [close(1, Reason.DRAINING), Ended(session, Reason.DRAINING)]
        assert agent.says(Retired(sid(1))) == [] and agent.sessions.unexpected == 1


class TestClosing:
    def test_a_closed_session_is_replaced_by_the_next_flow(self) -> None:
        agent, session = carrying()
        message = Closed(sid(1), Reason.PEER_GONE)
        assert agent.says(message) == [Ended(session, Reason.PEER_GONE)]
        assert agent(Want(2, WEB)) == [ask(2)]
        assert agent.says(message) == []
        assert agent.sessions.unexpected == 1

    def test_a_flow_of_a_closed_session_may_retry(self) -> None:
        agent, _ = carrying()
        agent.says(Closed(sid(1), Reason.PEER_GONE))
        assert agent(Retry(1, Cause.FAILED)) == [ask(2)]

    def test_after_stale_epoch_the_lease_is_read_before_anybody_is_asked(self) -> None:
        agent, session = carrying()
        assert agent.says(Closed(sid(1), Reason.STALE_EPOCH)) == [
            Ended(session, Reason.STALE_EPOCH),
            ReadLease(WEB),
        ]
        assert agent(Want(2, WEB)) == []
        assert agent(LeaseIs(WEB, NEWER)) == [ask(2, lease=NEWER)]

    def test_a_retired_session_that_is_closed_concerns_nobody_else(self) -> None:
        agent, session = carrying()
        agent(LeaseIs(WEB, NEWER))
        assert agent.says(Closed(sid(1), Reason.STALE_EPOCH)) == [Ended(session, Reason.STALE_EPOCH)]
        agent, session = carrying()
        agent(LeaseIs(WEB, None))
        assert agent.says(Closed(sid(1), Reason.STALE_EPOCH)) == [Ended(session, Reason.STALE_EPOCH)]

    def test_an_unused_session_is_closed_after_a_while(self) -> None:
        agent, session = carrying()
        assert agent.after(SESSION_IDLE_SECONDS * 2) == []
        agent(Release(1))
        assert agent.sessions.next_timer() == agent.now + SESSION_IDLE_SECONDS
        assert agent.after(SESSION_IDLE_SECONDS - 1) == []
        assert agent.after(1) == [
            close(1, Reason.CLOSED_BY_PEER),
            Ended(session, Reason.CLOSED_BY_PEER),
        ]
        assert agent.state() == "idle"

    def test_a_steady_session_forgives_earlier_failures(self) -> None:
        agent = ready()
        agent(Want(1, WEB))
        for request in (1, 2, 3):
            agent.denied(request, Reason.NO_SUCH_SERVICE)
            agent.now += BACKOFF_MAX_SECONDS
            agent(Want(request + 1, WEB))
        agent.opened(4, 1)
        agent.now += STEADY_SECONDS
        agent.says(Closed(sid(1), Reason.PEER_GONE))
        agent(Want(9, WEB))
        agent.denied(5, Reason.NO_SUCH_SERVICE)
        agent.now += BACKOFF_FIRST_SECONDS
        assert agent(Want(10, WEB)) == [ask(6)]
