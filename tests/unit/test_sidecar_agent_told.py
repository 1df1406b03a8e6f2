from __future__ import annotations

import pytest

from sidecar.agent import told
from sidecar.agent.told import HealthBook, Told
from ztna.names import ServiceName

WEB, DB = ServiceName("web"), ServiceName("db")


def test_nothing_is_known_of_what_nobody_spoke_of() -> None:
    book = HealthBook()
    assert book.heard("a", WEB, "passing", 1.0)
    assert book.of(DB) is None


def test_since_is_when_it_changed_not_when_it_was_said_again() -> None:
    book = HealthBook()
    book.heard("a", WEB, "critical", 1.0)
    book.heard("a", WEB, "critical", 2.0)
    assert book.of(WEB) == Told("critical", 1.0)
    book.heard("a", WEB, "passing", 3.0)
    assert book.of(WEB) == Told("passing", 3.0)


def test_the_best_word_counts_as_a_flow_may_go_by_any_relay() -> None:
    book = HealthBook()
    book.heard("a", WEB, "unknown", 1.0)
    book.heard("b", WEB, "critical", 2.0)
    assert book.of(WEB) == Told("critical", 2.0)
    book.heard("c", WEB, "passing", 3.0)
    assert book.of(WEB) == Told("passing", 3.0)


def test_a_lost_relay_takes_its_word_with_it() -> None:
    book = HealthBook()
    book.heard("a", WEB, "passing", 1.0)
    book.heard("b", WEB, "critical", 2.0)
    book.lost("a")
    book.lost("a")
    assert book.of(WEB) == Told("critical", 2.0)
    book.lost("b")
    assert book.of(WEB) is None


def test_what_a_relay_can_make_us_keep_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(told, "SERVICES_PER_RELAY_MAX", 1)
    book = HealthBook()
    assert book.heard("a", WEB, "passing", 1.0)
    assert not book.heard("a", DB, "passing", 1.0)
    assert book.heard("a", WEB, "critical", 2.0), "what is known may change"
    assert book.of(DB) is None
