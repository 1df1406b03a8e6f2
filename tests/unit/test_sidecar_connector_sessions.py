from __future__ import annotations

from ipaddress import IPv4Address

import msgspec
import pytest

from sidecar.connector import sessions as module
from sidecar.connector.flows import RelayConnection
from sidecar.connector.sessions import DETACHED_SECONDS, Sessions, standing
from ztna.errors import Refused
from ztna.leases import Lease
from ztna.names import ServiceName, SessionId
from ztna.reasons import Reason
from ztna.wire.control import Address, Binary, ForwarderBind, LeaseRef, Offered, PeerIdentity, Secret

IP, OTHER_IP = IPv4Address("10.100.0.2"), IPv4Address("10.100.0.3")
WEB, DB = ServiceName("web"), ServiceName("db")
RELAY, OTHER_RELAY = ("relay-1", 1), ("relay-2", 2)
FIRST, SECOND = SessionId("0" * 16), SessionId("1" * 16)
ANN = PeerIdentity("ann", "a" * 64)


def offer(
    session: SessionId = FIRST,
    service: ServiceName = WEB,
    *,
    bind_id: bytes | None = b"b" * 16,
    lease: LeaseRef | None = LeaseRef(IP, 7),  # noqa: B008
    v1: bool = False,
) -> Offered:
    forwarder = None
    if bind_id is not None:
        forwarder = ForwarderBind(Address("192.0.2.1", 4434), Binary(bind_id), Secret(b"s" * 32))
    return Offered(session, service, ANN, lease, forwarder, Secret(b"p" * 32), v1)


def refusal(sessions: Sessions, connection: RelayConnection, offered: Offered) -> Reason:
    with pytest.raises(Refused) as refused:
        sessions.admit(connection, offered)
    return refused.value.reason


@pytest.mark.parametrize(
    ("asked", "known", "found"),
    [
        (None, Lease(IP, 7), "stale"),
        (LeaseRef(IP, 7), None, "newer"),
        (LeaseRef(IP, 8), Lease(IP, 7), "newer"),
        (LeaseRef(IP, 6), Lease(IP, 7), "stale"),
        (LeaseRef(OTHER_IP, 7), Lease(IP, 7), "stale"),
        (LeaseRef(IP, 7), Lease(IP, 7), "current"),
    ],
)
def test_standing(asked: LeaseRef | None, known: Lease | None, found: str) -> None:
    assert standing(asked, known) == found


def test_admits_once_and_with_a_lease() -> None:
    sessions = Sessions()
    session = sessions.admit(RELAY, offer())
    assert sessions.live() == [session] and sessions.is_live(session)
    assert refusal(sessions, RELAY, offer()) is Reason.MALFORMED
    assert refusal(sessions, RELAY, offer(SECOND, lease=None)) is Reason.STALE_EPOCH
    # Another relay may draw the same id: it is another session.
    sessions.admit(OTHER_RELAY, offer())
    assert len(sessions) == 2


def test_a_v1_session_has_neither_lease_nor_link() -> None:
    sessions = Sessions()
    assert refusal(sessions, RELAY, offer(v1=True)) is Reason.MALFORMED
    session = sessions.admit(RELAY, offer(v1=True, bind_id=None))
    assert (session.lease, session.bind) == (None, None)
    # It opens no sealed flow, and no lease ends it.
    with pytest.raises(Refused) as refused:
        sessions.authorised(FIRST, WEB, ANN.name, ANN.fingerprint)
    assert refused.value.reason is Reason.NOT_YOUR_SESSION
    assert sessions.lease_changed(WEB, Lease(OTHER_IP, 9)) == []
    assert sessions.owned(RELAY, FIRST) is session


def test_a_detached_session_is_not_offered_again() -> None:
    sessions = Sessions()
    sessions.admit(RELAY, offer())
    sessions.close(RELAY, FIRST, Reason.PEER_GONE, 0.0)
    assert refusal(sessions, RELAY, offer()) is Reason.MALFORMED


def test_admits_up_to_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SESSIONS_MAX", 1)
    sessions = Sessions()
    sessions.admit(RELAY, offer())
    assert refusal(sessions, RELAY, offer(SECOND)) is Reason.LIMIT_REACHED


def test_admits_up_to_a_limit_of_links(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LINKS_MAX", 1)
    sessions = Sessions()
    sessions.admit(RELAY, offer())
    sessions.admit(RELAY, offer(SECOND, DB))  # on the same link
    sessions.admit(RELAY, offer(SessionId("2" * 16), bind_id=None))
    with pytest.raises(Refused) as refused:
        sessions.admit(RELAY, offer(SessionId("3" * 16), bind_id=b"o" * 16))
    assert refused.value.reason is Reason.LIMIT_REACHED
    assert len(sessions) == 3


def test_only_the_relay_connection_that_offered_it_owns_a_session() -> None:
    sessions = Sessions()
    session = sessions.admit(RELAY, offer())
    assert sessions.owned(RELAY, FIRST) is session
    for connection in (OTHER_RELAY, ("relay-1", 2)):
        with pytest.raises(Refused) as refused:
            sessions.close(connection, FIRST, Reason.CLOSED_BY_PEER, 0.0)
        assert refused.value.reason is Reason.NOT_YOUR_SESSION
    assert sessions.is_live(session)


def test_an_open_needs_its_very_session() -> None:
    sessions = Sessions()
    session = sessions.admit(RELAY, offer())
    assert sessions.authorised(FIRST, WEB, "ann", "a" * 64) is session
    for session_id, service, agent, fingerprint in (
        (SECOND, WEB, "ann", "a" * 64),
        (FIRST, DB, "ann", "a" * 64),
        (FIRST, WEB, "bob", "a" * 64),
        (FIRST, WEB, "ann", "b" * 64),
    ):
        with pytest.raises(Refused) as refused:
            sessions.authorised(session_id, service, agent, fingerprint)
        assert refused.value.reason is Reason.NOT_YOUR_SESSION
    assert sessions.has_service("ann", WEB) and not sessions.has_service("ann", DB)


def test_a_link_carries_the_services_of_its_sessions() -> None:
    sessions = Sessions()
    first = sessions.admit(RELAY, offer())
    second = sessions.admit(RELAY, offer(SECOND, DB))
    loose = sessions.admit(RELAY, offer(SessionId("2" * 16), bind_id=None))
    bind = first.bind
    assert bind is not None and bind == second.bind and loose.bind is None
    assert sessions.carried(bind, WEB) is first and sessions.carried(bind, DB) is second
    assert sessions.carried((OTHER_RELAY, bind[1]), WEB) is None
    assert sessions.close(RELAY, FIRST, Reason.CLOSED_BY_PEER, 0.0) is first
    assert sessions.carried(bind, WEB) is None and sessions.bind_in_use(bind)
    assert sessions.close(RELAY, loose.key[1], Reason.CLOSED_BY_PEER, 0.0) is loose
    assert sessions.close(RELAY, SECOND, Reason.CLOSED_BY_PEER, 0.0) is second
    assert not sessions.bind_in_use(bind)


def test_a_newer_session_keeps_the_link_when_the_older_ends() -> None:
    sessions = Sessions()
    older = sessions.admit(RELAY, offer())
    newer = sessions.admit(RELAY, offer(SECOND))
    assert older.bind is not None
    sessions.close(RELAY, FIRST, Reason.CLOSED_BY_PEER, 0.0)
    assert sessions.carried(older.bind, WEB) is newer


def test_an_older_session_keeps_the_link_when_the_newer_ends() -> None:
    sessions = Sessions()
    older, newer = sessions.admit(RELAY, offer()), sessions.admit(RELAY, offer(SECOND))
    bind = older.bind
    assert bind is not None and sessions.sharing(bind, WEB) == (newer, older)
    sessions.close(RELAY, SECOND, Reason.PEER_GONE, 0.0)
    assert sessions.carried(bind, WEB) is older, "the one that lives"
    sessions.close(RELAY, FIRST, Reason.PEER_GONE, 0.0)
    assert sessions.carried(bind, WEB) is newer
    assert sessions.expire(DETACHED_SECONDS) == [newer, older]
    assert not sessions.sharing(bind, WEB) and not sessions.bind_in_use(bind)
    older, newer = sessions.admit(RELAY, offer()), sessions.admit(RELAY, offer(SECOND))
    sessions.close(RELAY, SECOND, Reason.CLOSED_BY_PEER, 0.0)
    assert sessions.carried(bind, WEB) is older


def test_peer_gone_detaches_for_a_while() -> None:
    sessions = Sessions()
    session = sessions.admit(RELAY, offer())
    assert sessions.close(RELAY, FIRST, Reason.PEER_GONE, 100.0) is None
    assert session.bind is not None
    assert not sessions.is_live(session) and sessions.carried(session.bind, WEB) is session
    assert sessions.has_flows(session)
    assert sessions.detached() == [session] and sessions.live() == []
    assert sessions.expire(100.0 + DETACHED_SECONDS - 1) == []
    assert sessions.expire(100.0 + DETACHED_SECONDS) == [session]
    assert len(sessions) == 0


def test_a_lost_relay_connection_detaches_its_own_sessions_alone() -> None:
    sessions = Sessions()
    mine = sessions.admit(RELAY, offer())
    other = sessions.admit(OTHER_RELAY, offer())
    sessions.connection_lost(RELAY, 0.0)
    assert sessions.detached() == [mine] and sessions.live() == [other]
    assert sessions.has_service("ann", WEB) and sessions.has_agent("ann")
    assert sessions.authorised(FIRST, WEB, "ann", "a" * 64) is other
    sessions.connection_lost(OTHER_RELAY, 0.0)
    assert not sessions.has_service("ann", WEB) and not sessions.has_agent("ann")


def test_a_changed_lease_ends_the_sessions_under_the_old_one() -> None:
    sessions = Sessions()
    old = sessions.admit(RELAY, offer())
    current = sessions.admit(RELAY, offer(SECOND, lease=LeaseRef(OTHER_IP, 8)))
    db = sessions.admit(RELAY, offer(SessionId("2" * 16), DB))
    detached = sessions.admit(OTHER_RELAY, offer())
    sessions.connection_lost(OTHER_RELAY, 0.0)
    assert sessions.lease_changed(WEB, Lease(OTHER_IP, 8)) == [old, detached]
    assert sessions.live() == [current, db]
    assert sessions.lease_changed(DB, None) == [db]
    # A lease that was restored from a backup.
    assert sessions.lease_changed(WEB, Lease(OTHER_IP, 7)) == [current]
    assert sessions.end_all() == []


def test_an_agent_takes_along_only_its_own_of_the_same_service_and_lease() -> None:
    sessions = Sessions()
    third, fourth, fifth = (SessionId(digit * 16) for digit in "234")
    before = sessions.admit(RELAY, offer(FIRST))
    sessions.connection_lost(RELAY, 0.0)
    now = sessions.admit(OTHER_RELAY, offer(SECOND))
    sessions.admit(OTHER_RELAY, offer(third, DB))
    sessions.admit(OTHER_RELAY, offer(fourth, lease=LeaseRef(IP, 8)))
    stranger = msgspec.structs.replace(offer(fifth), agent=PeerIdentity("bob", "b" * 64))
    sessions.admit(OTHER_RELAY, stranger)
    named = (FIRST, SECOND, third, fourth, fifth, SessionId("9" * 16))
    assert sessions.former(now, named) == [before]
    assert sessions.former(now, ()) == []


def test_whether_a_relay_connection_brought_any_that_lives() -> None:
    sessions = Sessions()
    sessions.admit(RELAY, offer())
    assert sessions.has_any(RELAY) and not sessions.has_any(OTHER_RELAY)
    sessions.connection_lost(RELAY, 0.0)
    assert not sessions.has_any(RELAY)
