"""A dnsd's page."""

from __future__ import annotations

from typing import Any

from tests.support import statuses
from tests.support.statuses import shown
from ztna.pages import page_dnsd, seen


def read(**more: Any) -> seen.Dnsd:
    told = seen.read(statuses.dnsd(**more))
    assert isinstance(told, seen.Dnsd)
    return told


def page(earlier: seen.Dnsd | None = None, **more: Any) -> dict[str, str]:
    return {id_: shown(section) for id_, section in page_dnsd.view(read(**more), earlier).sections.items()}


def test_it_says_which_names_there_are_and_how_the_pool_is() -> None:
    sections = page()
    assert "dnsd, ztna.local" in sections["head"] and "stale" not in sections["head"]
    assert "web.ztna.local" in sections["services"] and "10.100.0.2" in sections["services"]
    assert "alpha: critical" in sections["services"] and "problem" not in sections["services"]
    assert "2 leased, 1 resting, 97 free of 100" in sections["leases"] and 'value="3"' in sections["leases"]
    assert " pinned" in sections["leases"] and "rests" in sections["leases"] and "1 h" in sections["leases"]
    assert "keeps the leases" in sections["head"] and "certificate" not in sections


def test_queries_are_told_by_the_second() -> None:
    assert "2.0/s" in page()["head"]  # 150 in the 75 s since the start
    earlier = read(uptime_s=70.0, dns={"udp_received": 100})
    assert "10/s" in page(earlier)["head"]
    assert "2.0/s" in page(read(uptime_s=70.0, pid=8))["head"]  # another process
    assert "2.0/s" in page(read())["head"]  # no time has passed
    assert "0/s" in page(read(uptime_s=70.0, dns={"udp_received": 999}))["head"]
    assert "–" in page(uptime_s=0.0)["queries"]


def test_it_says_what_is_wrong() -> None:
    sections = page(
        dns={"stale": True, "unreadable": {"ztna/vip/x": "no JSON"}},
        keeper={"elected": True, "trouble": "no session", "problems": {"web": "pool exhausted"}},
        names={"services": [{"service": "web", "problem": "instances disagree"}, {"service": "odd"}]},
    )
    assert "names are stale" in sections["head"]
    assert "web: pool exhausted; ztna/vip/x cannot be read: no JSON; no session" in sections["services"]
    assert "instances disagree" in sections["services"] and "no address yet" in sections["services"]


def test_one_that_is_not_the_keeper_says_so() -> None:
    sections = page(keeper={"elected": False}, pool={}, leases={})
    assert "another does" in sections["head"] and "Another dnsd is the keeper" in sections["leases"]
    assert "The keeper has the list" in sections["leases"]
    assert "No address was ever leased" in page(leases={})["leases"]


def test_an_instance_without_a_connector_is_called_by_its_id() -> None:
    instances = [{"id": "web-1", "connector": None, "status": "passing"}]
    assert (
        "web-1: passing" in page(names={"services": [{"service": "web", "instances": instances}]})["services"]
    )
