"""A session is in every index or in none, and its link lives as long as the last session on it."""

from __future__ import annotations

import pytest

from relay import book as module
from relay.book import ENDED_KEPT_SECONDS, SessionBook
from relay.commands import AddLink, EndSession, RemoveLink
from relay.state import Attempt, Session
from ztna.names import ConnectorId, ServiceName, SessionId
from ztna.wire import control

WEB = ServiceName("web")
AGENT, CONNECTOR, STRANGER = 1, 2, 3


def session(number: int) -> Session:
    attempt = Attempt(control.Open(number, WEB))
    return Session(SessionId(f"{number:016x}"), WEB, AGENT, CONNECTOR, ConnectorId("con"), "alice", attempt)


def test_a_link_comes_with_its_first_session_and_goes_with_its_last() -> None:
    book = SessionBook(bytes)
    first, second, v1 = session(1), session(2), session(3)
    assert [type(each) for each in book.add(first, forwarded=True)] == [AddLink]
    assert book.add(second, forwarded=True) == []
    assert book.remove(first, 0.0) == [EndSession(first.id)]
    assert book.remove(second, 0.0) == [EndSession(second.id), RemoveLink(second.link)]
    assert book.add(v1, forwarded=False) == []
    assert book.remove(v1, 0.0) == [EndSession(v1.id)]
    assert not (book.live or book.links or book.routed or book.of_name)


def test_what_ended_is_remembered_for_its_own_connections_and_not_for_ever(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "ENDED_KEPT_MAX", 2)
    book = SessionBook(bytes)
    for number in (1, 2, 3):
        book.add(session(number), forwarded=False)
        book.remove(session(number), float(number))
    assert not book.ended_lately(session(1).id, AGENT), "the bound"
    assert book.ended_lately(session(2).id, AGENT)
    assert not book.ended_lately(session(2).id, STRANGER)
    book.forget_ended(2.0 + ENDED_KEPT_SECONDS)
    assert not book.ended_lately(session(2).id, AGENT)
    assert book.ended_lately(session(3).id, CONNECTOR)
