"""An agent's page."""

from __future__ import annotations

from typing import Any

from tests.support import statuses
from tests.support.statuses import shown
from ztna.pages import page_agent, seen


def read(status: object) -> seen.Agent:
    told = seen.read(status)
    assert isinstance(told, seen.Agent)
    return told


def page(**more: Any) -> dict[str, str]:
    told = read(statuses.agent(**more))
    return {id_: shown(section) for id_, section in page_agent.view(told).sections.items()}


def test_it_says_what_it_reaches_and_by_which_path() -> None:
    sections = page()
    assert "Agent ztna/agent" in sections["head"] and "pool 10.100.0.0/16" in sections["head"]
    assert (
        "2.2 ms" in sections["head"] and "1 TCP, 3 UDP" in sections["head"] and ">north<" in sections["head"]
    )
    assert "denied: no_grant" in sections["services"] and "10.100.0.2" in sections["services"]
    assert "Not listened at tcp 10.100.0.3:8080" in sections["services"]
    assert (
        "12 ms" in sections["links"]
        and "2.0 MB" in sections["links"]
        and "10.0.0.9:4435 valid" in sections["links"]
    )
    assert "1 stream carrier: to alpha forwarded, to beta direct" in sections["flows"]
    assert "north (nearest)" in sections["relays"] and "no answer" in sections["relays"]


def test_one_that_has_nothing_yet_says_so() -> None:
    nothing: dict[str, Any] = {"relays": [], "services": [], "held_ports": {}, "sessions": [], "links": []}
    sections = page(streams={}, **nothing)
    assert "none is up" in sections["head"] and "0 stream carriers<" in sections["flows"]
    for id_ in ("services", "links", "flows", "relays"):
        assert 'class="none"' in sections[id_]
    assert page_agent.view(read(statuses.agent() | {"certificate": None})).title == "Agent"


def test_a_link_that_is_relayed_and_a_relay_without_words_are_shown() -> None:
    sections = page(
        links=[{"connector": "alpha", "path": "forwarded"}], relays=[{"relay": "r", "state": "silent"}]
    )
    assert "forwarded" in sections["links"] and "silent" in sections["relays"]
