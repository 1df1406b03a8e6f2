"""The parts of a page: headers that say what is awaited, tables that are bounded and stay tables."""

from __future__ import annotations

import pytest

from tests.support.statuses import certificate, own, shown
from ztna.pages import parts, seen
from ztna.pages.markup import html


def head(**readiness: object) -> str:
    told = seen.read(own("ztna-test", readiness=readiness))
    return html(parts.head(told, "Test", [], "listens somewhere", ""))


def test_a_header_says_whether_it_is_ready_and_what_it_waits_for() -> None:
    ready = head(ready=True)
    assert (
        "</span>Ready</span>" in ready
        and 'role="status"' in ready
        and "<ul" not in ready
        and "<dl" not in ready
    )
    assert "version 0.1.0 · up 1 min · pid 7 · listens somewhere</p>" in ready
    waiting = head(ready=False, awaiting={"catalog": "no leader", "leases": ""})
    assert (
        "Not ready" in waiting and "<li>Waits for catalog: no leader</li><li>Waits for leases</li>" in waiting
    )
    warned = head(ready=True, warnings={"pool": "nearly full"})
    assert "Ready, 1 warning<" in warned and "<li>Warning, pool: nearly full</li>" in warned
    assert "mark fair" in warned
    unreadable = seen.read(own("ztna-relay", sessions=5))
    assert "<li>Only /status has the rest: Expected `array`" in html(parts.head(unreadable, "Test", []))


def test_what_is_waited_for_is_told_in_a_word_too() -> None:
    waiting = {"ready": False, "awaiting": {"a": "", "b": ""}}
    assert parts.waits(seen.read(own("ztna-test", readiness=waiting))) == "waits for a, b"
    assert parts.waits(seen.read(own("ztna-test", readiness={"ready": False}))) == "not ready"


def test_a_table_is_bounded_and_says_what_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts, "ROWS_MAX", 2)
    rows = [(str(n), str(n)) for n in range(3)]
    text = html(parts.table("Things", ("Name", "Count"), rows, "none", figures=("Count",)))
    assert text.count("<tr") == 3 and "and 1 more; /status has them" in text
    assert "<caption>Things</caption>" in text and '<th scope="col" role="columnheader">Name</th>' in text
    assert '<td role="cell" data-label="Count" class="figure">1</td>' in text
    assert "and 7 more" in html(parts.table("Things", ("Name", "Count"), rows[:2], "none", 9))
    assert "more" not in html(parts.table("Things", ("Name", "Count"), rows[:2], "none"))
    assert html(parts.table("Things", ("Name",), [], "Nothing.")) == '<p class="none">Nothing.</p>'


def test_those_in_trouble_come_first_where_not_all_are_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    healths = {"a": "passing", "b": "critical"}
    assert parts.worst_first(healths, healths) == ["a", "b"]
    monkeypatch.setattr(parts, "ROWS_MAX", 1)
    assert parts.worst_first(healths, healths) == ["b"]


def test_the_ending_tells_of_refusals_and_of_the_certificate() -> None:
    plain = shown(*parts.ending(seen.read(own("ztna-test"))).values())
    assert "Nothing was refused or dropped" in plain and "There is none yet." in plain
    told = own(
        "ztna-test",
        counted={"refused": {"relay no_grant": 3}, "dropped": {"dnsd queue": 1200}},
        certificate=certificate("n", expiring=True, broken={"crl": "gone"}, crls=[{}, {}]),
    )
    text = shown(*parts.ending(seen.read(told)).values())
    assert text.index("dnsd queue") < text.index("relay no_grant") and "1,200" in text
    assert "9 days, until 2030-01-02 03:04 UTC" in text and "Not usable: crl" in text and "2 lists" in text
    assert "mark fair" in text


def test_certificates_that_soon_end_are_marked() -> None:
    assert parts.days(9.0) == "9 days"
    assert "mark fair" in html(parts.days(0.5)) and "mark bad" in html(parts.days(-1.0))


def test_small_things() -> None:
    assert parts.since(None) == "never" and parts.since(70.0) == "1 min"
    assert parts.problem("") == [] and "bad" in shown(*parts.problem("gone"))
    assert parts.peer_name("spiffe://ztna/agent") == "ztna/agent"
    assert html(parts.tile("services", "2", "passing")).startswith(
        "<div><dt>services</dt><dd><strong>2</strong>"
    )
