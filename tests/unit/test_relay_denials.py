"""However many denials there are, the lines are few, and their counts add up."""

from __future__ import annotations

import pytest

from relay import denials as module
from relay.denials import INTERVAL_SECONDS, OTHERS, SERVICES_PER_AGENT_MAX, Denials, Fields

FROM = {"agent_address": "192.0.2.1:7"}


def told(lines: list[Fields]) -> int:
    """Return how many denials the lines stand for."""
    return sum(int(str(each.get("count", 1))) for each in lines)


def test_the_first_has_its_line_and_the_others_one_with_their_count() -> None:
    denials = Denials()
    kind = ("agent-a", "web", "no_grant")
    first = denials.note(kind, FROM, 0.0)
    assert first == {"agent": "agent-a", "service": "web", "reason": "no_grant", **FROM}
    for _ in range(99):
        assert denials.note(kind, {"agent_address": "192.0.2.1:8"}, 1.0) is None
    assert denials.note(("agent-b", "web", "no_grant"), FROM, 1.0) is not None
    assert denials.note(("agent-a", "web", "limit_reached"), FROM, 1.0) is not None
    assert denials.over(INTERVAL_SECONDS - 0.1) == []
    assert denials.over(INTERVAL_SECONDS) == [first | {"agent_address": "192.0.2.1:8", "count": 99}]
    assert denials.note(kind, FROM, INTERVAL_SECONDS) == first
    assert denials.over(3 * INTERVAL_SECONDS) == []
    assert not denials._known and not denials._kinds_of


def test_made_up_names_share_a_line() -> None:
    denials = Denials()
    lines = [denials.note(("agent-a", f"name-{each}", "no_grant"), FROM, 0.0) for each in range(1_000)]
    at_once = [each for each in lines if each is not None]
    assert len(at_once) == SERVICES_PER_AGENT_MAX
    (rest,) = denials.over(INTERVAL_SECONDS)
    assert rest["service"] == OTHERS and rest["agent"] == "agent-a"
    assert told([*at_once, rest]) == 1_000


def test_too_many_agents_share_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "KINDS_MAX", 5)
    denials = Denials()
    lines = [denials.note((f"agent-{each}", "web", "no_grant"), FROM, 0.0) for each in range(20)]
    at_once = [each for each in lines if each is not None]
    assert len(at_once) == 5
    (rest,) = denials.over(INTERVAL_SECONDS)
    assert (rest["agent"], rest["service"]) == (OTHERS, OTHERS)
    assert told([*at_once, rest]) == 20
