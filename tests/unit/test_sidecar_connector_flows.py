from __future__ import annotations

import pytest

from sidecar.connector.flows import FlowKey, FlowTable, SessionKey
from ztna.errors import Refused
from ztna.names import SessionId
from ztna.reasons import Reason

ONE: SessionKey = (("relay-1", 1), SessionId("0" * 16))
TWO: SessionKey = (("relay-1", 1), SessionId("1" * 16))


def key(session: SessionKey = ONE, port: int = 40_000) -> FlowKey:
    return FlowKey(session, 17, "127.0.0.1", port, "10.100.0.2", 53)


def table(per_agent: int = 2, total: int = 3) -> FlowTable[str]:
    return FlowTable(per_agent=per_agent, total=total)


def test_the_same_tuple_in_two_sessions_is_two_flows() -> None:
    flows = table()
    flows.add(key(ONE), "a", "of a", idle_s=10, now=0)
    flows.add(key(TWO), "b", "of b", idle_s=10, now=0)
    assert flows.use(key(ONE), 1) == "of a"
    assert flows.use(key(TWO), 1) == "of b"
    assert flows.use(key(TWO, port=1), 1) is None
    assert len(flows) == 2


def test_a_key_is_added_once() -> None:
    flows = table()
    flows.add(key(), "a", "first", idle_s=10, now=0)
    with pytest.raises(ValueError, match="in the table"):
        flows.add(key(), "a", "second", idle_s=10, now=0)


def test_an_agent_at_its_limit_loses_what_it_used_longest_ago() -> None:
    flows = table()
    flows.add(key(port=1), "a", "first", idle_s=10, now=0)
    flows.add(key(port=2), "a", "second", idle_s=10, now=0)
    flows.use(key(port=1), 1)
    assert flows.make_room("a") == ["second"]
    assert flows.use(key(port=1), 2) == "first"


def test_a_full_table_trades_only_within_an_agent() -> None:
    flows = table(per_agent=5, total=2)
    assert flows.make_room("a") == []
    flows.add(key(port=1), "a", "first", idle_s=10, now=0)
    flows.add(key(port=2), "a", "second", idle_s=10, now=0)
    with pytest.raises(Refused) as refused:
        flows.make_room("b")
    assert refused.value.reason is Reason.LIMIT_REACHED
    assert flows.make_room("a") == ["first"]


def test_idle_flows_expire_by_their_own_time() -> None:
    flows = table()
    flows.add(key(port=1), "a", "short", idle_s=5, now=0)
    flows.add(key(port=2), "a", "long", idle_s=50, now=0)
    assert flows.expire(4.9) == []
    assert flows.expire(5) == ["short"]
    flows.use(key(port=2), 49)
    assert flows.expire(98) == []
    assert flows.expire(99) == ["long"]
    assert len(flows) == 0


def test_ends_by_session_by_key_and_all() -> None:
    flows = table(per_agent=9, total=9)
    flows.add(key(ONE, 1), "a", "1", idle_s=5, now=0)
    flows.add(key(ONE, 2), "a", "2", idle_s=5, now=0)
    flows.add(key(TWO, 1), "a", "3", idle_s=5, now=0)
    flows.add(key(TWO, 2), "b", "4", idle_s=5, now=0)
    assert flows.end_session(ONE) == ["1", "2"]
    assert flows.discard(key(TWO, 1)) == "3"
    assert flows.discard(key(TWO, 1)) is None
    assert flows.end_all() == ["4"]


def test_the_flows_of_a_session_go_on_in_another() -> None:
    flows = table(per_agent=3)
    for port, value in ((1, "one"), (2, "two")):
        flows.add(key(ONE, port), "laptop", value, idle_s=10, now=5)
    flows.add(key(TWO, 2), "laptop", "other", idle_s=10, now=5)
    moved, ended = flows.move_session(ONE, TWO)
    assert (moved, ended) == ({key(TWO, 1): "one"}, ["two"])
    assert flows.use(key(ONE, 1), 6) is None
    assert flows.use(key(TWO, 2), 6) == "other"
    assert flows.expire(15) == ["one"], "it is as idle as it was"
    assert flows.move_session(ONE, TWO) == ({}, [])
