"""dnsd.serving: fresh, stale, not at all, as the names age."""

from __future__ import annotations

import pytest

from dnsd.answer import Answers, Options
from dnsd.serving import STALE_AFTER_SECONDS, STALE_SECONDS_MAX, Age, aged, renewed
from tests.support.dns import ask, lease, query, told, zone
from ztna.dns import Code

NOW = 1_700_000_000.0
ZONE = zone({}, {"web": lease("10.100.1.2")})


@pytest.mark.parametrize(
    ("seconds", "is_live", "bound", "stale", "served"),
    [
        (0, True, 3600.0, False, True),
        (STALE_AFTER_SECONDS, True, 3600.0, False, True),
        (STALE_AFTER_SECONDS + 1, True, 3600.0, True, True),
        (0, False, 3600.0, True, True),
        (3600, True, 3600.0, True, True),
        (3601, True, 3600.0, True, False),
        (STALE_SECONDS_MAX + 1, True, 1e9, True, False),
        (NOW, True, 1e9, True, False),
    ],
)
def test_age(seconds: float, is_live: bool, bound: float, stale: bool, served: bool) -> None:
    age = Age(NOW - seconds, is_live, bound)
    assert (age.is_stale(NOW), age.is_served(NOW)) == (stale, served)


def test_answers_grow_old_and_young_again() -> None:
    answers = renewed(Answers(None), ZONE, Age(NOW, True, 3600.0), Options(), NOW)
    assert told(ask(answers, query("web.ztna.local"))) == ["A 10.100.1.2"]
    assert not aged(answers, Age(NOW, True, 3600.0), NOW + 1)
    assert (answers.confirmed_at, answers.now) == (NOW, NOW + 1)
    assert aged(answers, Age(NOW, True, 3600.0), NOW + 61)
    stale = renewed(answers, ZONE, Age(NOW, True, 3600.0), Options(), NOW + 61)
    assert stale.is_stale and not aged(stale, Age(NOW, True, 3600.0), NOW + 62)
    assert aged(stale, Age(NOW, True, 3600.0), NOW + 3601)
    ended = renewed(stale, ZONE, Age(NOW, True, 3600.0), Options(), NOW + 3601)
    assert ask(ended, query("web.ztna.local")).header.rcode == Code.SERVFAIL
    assert aged(ended, Age(NOW + 3600, True, 3600.0), NOW + 3601)


@pytest.mark.parametrize(("confirmed_at", "why"), [(0.0, 14), (NOW - 86_401, 22)])
def test_why_nothing_is_served(confirmed_at: float, why: int) -> None:
    answers = renewed(Answers(None), ZONE, Age(confirmed_at, False, 86_400.0), Options(), NOW)
    assert answers.zone is None and answers._why_not == why


def test_what_did_not_change_keeps_its_ready_answers() -> None:
    age = Age(NOW, True, 3600.0)
    first = renewed(Answers(None), ZONE, age, Options(), NOW)
    first.answer(query("web.ztna.local"))
    second = renewed(first, ZONE.renumbered(8, 0), age, Options(), NOW)
    assert second.ready and second.ready is first.ready
