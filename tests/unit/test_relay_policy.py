"""Grant, SRV record and live connection: all three, in that order."""

from __future__ import annotations

from collections import Counter

import pytest

from relay import policy
from relay.policy import Route, SrvEntry, SrvTable
from tests.support.identities import identity
from ztna.errors import Refused
from ztna.names import ConnectorId, ServiceName, Zone
from ztna.reasons import Reason

WEB, DB = ServiceName("web"), ServiceName("db")
X, Y = ConnectorId("con-x"), ConnectorId("con-y")
NOW, HOLD_S = 1000.0, 60.0
AGENT = identity(agent=["web"])


def table(*routes: Route, answered_at: float = NOW, fresh_at: float | None = NOW) -> SrvTable:
    fresh = {} if fresh_at is None else {"": fresh_at}
    return SrvTable({WEB: SrvEntry(routes, answered_at)}, fresh, HOLD_S)


def first(bound: int) -> int:
    return 0


def decide(live: dict[ConnectorId, int], srv: SrvTable, **changes: object) -> list[int] | Reason:
    arguments = {"identity": AGENT, "service": WEB, "wanted": None} | changes
    try:
        return policy.candidates(**arguments, live=live, table=srv, now=NOW, draw=first, load=Counter())  # type: ignore[arg-type]
    except Refused as error:
        return error.reason


def test_all_three_make_a_candidate() -> None:
    assert decide({X: 1}, table(Route(0, 1, X))) == [1]


def test_the_grant_is_asked_first_alike_for_every_name() -> None:
    for live, srv in (({X: 1}, table(Route(0, 1, X))), ({}, policy.EMPTY_TABLE)):
        assert decide(live, srv, identity=identity(agent=["db"])) is Reason.NO_GRANT


def test_a_name_that_nobody_registered_is_no_service() -> None:
    assert decide({}, policy.EMPTY_TABLE) is Reason.NO_SUCH_SERVICE


@pytest.mark.parametrize(
    "srv",
    [
        policy.EMPTY_TABLE,
        table(Route(0, 1, X), fresh_at=None),
        SrvTable({WEB: SrvEntry((Route(0, 1, X),), NOW, "stuck")}, {"": NOW}, HOLD_S),
        table(Route(0, 1, X), fresh_at=NOW - HOLD_S - 1),
        table(Route(0, 1, X), answered_at=NOW - HOLD_S - 1),
    ],
    ids=["unanswered", "freshness unknown", "another confirmed", "catalog too old", "answer too old"],
)
def test_what_is_not_known_is_not_permitted(srv: SrvTable) -> None:
    assert decide({X: 1}, srv) is Reason.POLICY_UNKNOWN


@pytest.mark.parametrize(
    ("live", "srv", "wanted"),
    [
        ({X: 1}, table(), None),
        ({X: 1}, table(Route(0, 1, Y)), None),
        ({}, table(Route(0, 1, X)), None),
        ({X: 1}, table(Route(0, 1, X)), Y),
    ],
    ids=["no record", "record of another", "record without a connection", "another was wanted"],
)
def test_nobody_healthy(live: dict[ConnectorId, int], srv: SrvTable, wanted: ConnectorId | None) -> None:
    assert decide(live, srv, wanted=wanted) is Reason.NO_HEALTHY_CONNECTOR


def test_a_wanted_connector_is_the_only_candidate() -> None:
    assert decide({X: 1, Y: 2}, table(Route(0, 1, X), Route(0, 1, Y)), wanted=Y) == [2]


def test_priorities_come_first_and_weights_share() -> None:
    routes = [Route(1, 1, ConnectorId("backup")), Route(0, 1, X), Route(0, 3, Y)]
    loads = Counter[ConnectorId]()
    firsts = Counter(policy.ordered(routes, lambda bound, n=n: n % bound, loads)[0] for n in range(5 * 7))
    assert firsts.keys() == {X, Y} and firsts[Y] > firsts[X]
    assert policy.ordered(routes, first, loads)[-1] == "backup"
    assert policy.ordered([Route(0, 1, X), Route(0, 2, X)], first, loads) == [X]


@pytest.mark.parametrize(
    ("weights", "sessions", "expected"),
    [
        ((1, 1), (5, 3), Y),
        ((1, 1), (3, 5), X),
        ((4, 1), (5, 3), X),
        ((0, 1), (1, 9), Y),
        ((1, 0), (9, 1), X),
        ((0, 0), (2, 1), Y),
    ],
    ids=["the less loaded", "it already is", "for its weight", "0 last", "0 last resort", "all 0"],
)
def test_of_two_the_less_loaded_for_its_weight(
    weights: tuple[int, int], sessions: tuple[int, int], expected: ConnectorId
) -> None:
    routes = [Route(0, weights[0], X), Route(0, weights[1], Y), Route(1, 9, ConnectorId("backup"))]
    loads = dict(zip((X, Y, ConnectorId("backup")), (*sessions, 0), strict=True))
    for draw in (first, lambda bound: bound - 1):
        ordered = policy.ordered(routes, draw, loads)
        assert ordered[0] == expected and ordered[2] == "backup"


def test_load_does_not_reach_over_priorities() -> None:
    routes = [Route(0, 1, X), Route(1, 1, Y)]
    assert policy.ordered(routes, first, {X: 100, Y: 0}) == [X, Y]


def test_only_targets_that_name_connectors_become_routes() -> None:
    records = [
        (1, 5, "con-y.connector.ztna.local"),
        (0, 1, "con-x.connector.ztna.local"),
        (0, 1, "web.ztna.local"),
        (0, 1, "a.b.connector.ztna.local"),
        (0, 1, "con-z.connector.other.local"),
    ]
    assert policy.routes_of(records, Zone("ztna.local")) == (Route(0, 1, X), Route(1, 5, Y))


def test_health_in_words() -> None:
    srv = table(Route(0, 1, X))
    assert policy.health(WEB, {X}, srv, NOW) == "passing"
    assert policy.health(WEB, {Y}, srv, NOW) == "critical"
    assert policy.health(DB, {X}, srv, NOW) == "unknown"
