"""Whatever changes at once is told in bounded pieces, by what it is when its turn comes, and never twice the same."""

from __future__ import annotations

from relay.telling import LOOKS_PER_PIECE, MESSAGES_PER_PIECE, HealthNews
from tests.support.identities import identity
from ztna.names import ServiceName

WEB, DB = ServiceName("web"), ServiceName("db")
MANY = [ServiceName(f"service-{number}") for number in range(1_000)]


def passing(_: ServiceName) -> str:
    return "passing"


def pieces(news: HealthNews, state: str = "passing") -> list[list[tuple[int, ServiceName, str]]]:
    out = []
    while news.is_due:
        out.append(news.piece(lambda _: state))
    return out


def test_a_newcomer_is_told_of_what_it_may_use() -> None:
    news = HealthNews()
    news.listen(1, identity(agent=["web"]), {WEB, DB})
    news.listen(2, identity(agent=["*"]), {WEB, DB})
    news.listen(3, identity(connector=["web"]), {WEB, DB})
    assert news.piece(passing) == [(1, WEB, "passing"), (2, DB, "passing"), (2, WEB, "passing")]
    assert not news.is_due and news.piece(passing) == []


def test_a_change_is_told_once_to_those_who_may_know() -> None:
    news = HealthNews()
    news.listen(1, identity(agent=["web"]), ())
    news.listen(2, identity(agent=["db"]), ())
    news.changed([WEB])
    news.changed([WEB, DB])
    assert news.piece(passing) == [(1, WEB, "passing"), (2, DB, "passing")]
    news.changed([WEB])
    assert news.piece(passing) == []
    news.changed([WEB])
    assert news.piece(lambda _: "critical") == [(1, WEB, "critical")]


def test_much_is_told_in_pieces_peer_by_peer() -> None:
    news = HealthNews()
    for key in range(20):
        news.listen(key, identity(agent=["*"]), ())
    assert pieces(news) == [[]]
    news.changed(MANY)
    told = pieces(news)
    assert max(map(len, told)) == MESSAGES_PER_PIECE
    flat = [each for piece in told for each in piece]
    assert len(flat) == len(set(flat)) == 20 * 1_000
    assert [key for key, _, _ in flat] == sorted(key for key, _, _ in flat), "a peer's share packets"
    # Looking at what needs no telling is bounded too.
    news.changed(MANY)
    assert len(pieces(news)) >= 20 * 1_000 // LOOKS_PER_PIECE


def test_what_changes_meanwhile_is_told_as_it_is_then_and_who_left_is_not() -> None:
    news = HealthNews()
    for key in (1, 2, 3):
        news.listen(key, identity(agent=["*"]), ())
    news.changed(MANY)
    first = news.piece(passing)
    assert {key for key, _, _ in first} == {1}
    news.left(2)
    news.left(2)
    news.changed(MANY)
    last: dict[tuple[int, ServiceName], str] = {(key, service): how for key, service, how in first}
    for piece in pieces(news, "critical"):
        last |= {(key, service): how for key, service, how in piece}
    assert set(last.values()) == {"critical"}
    assert {key for key, _ in last} == {1, 3}


def test_who_leaves_in_the_middle_of_being_told_is_told_no_more() -> None:
    news = HealthNews()
    news.listen(1, identity(agent=["*"]), MANY)
    assert len(news.piece(passing)) == MESSAGES_PER_PIECE
    news.left(1)
    assert pieces(news) == [[]]
