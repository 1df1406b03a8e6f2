"""A connector's page."""

from __future__ import annotations

from typing import Any

from tests.support import statuses
from tests.support.statuses import route, shown
from ztna.pages import page_connector, seen


def page(**more: Any) -> dict[str, str]:
    told = seen.read(statuses.connector(**more))
    assert isinstance(told, seen.Connector)
    return {id_: shown(section) for id_, section in page_connector.view(told).sections.items()}


def test_it_says_what_it_fronts_and_how_that_is() -> None:
    sections = page()
    assert (
        "Connector alpha" in sections["head"]
        and "1 of 2" in sections["head"]
        and "2 TCP, 1 UDP" in sections["head"]
    )
    assert "tcp 8080" in sections["services"] and "registered" in sections["services"]
    assert "tcp: tcp is critical" in sections["backends"] and "127.0.0.1:5432" in sections["backends"]
    assert "QUIC" in sections["relays"] and "refused" in sections["relays"]
    assert "ztna/agent" in sections["sessions"] and "live" in sections["sessions"]
    assert "direct" in sections["links"] and "spare" in sections["links"]


def test_it_says_why_something_is_not_in_consul() -> None:
    services = {
        "a": route("passing", "b:1", registered=False, refused="permission denied", lease=None),
        "b": route("unknown", "b:2", registered=False, waiting_for_backend=True),
        "c": route("unknown", "b:3", registered=False, backends=[{"backend": "b:3", "ejected": True}]),
    }
    sections = page(services=services, consul={"problem": "no leader"}, relays=[{"name": "n"}])
    for told in ("refused: permission denied", "waits for its backend", "not yet", "no leader"):
        assert told in sections["services"]
    assert "ejected" in sections["backends"] and "not connected" in sections["relays"]


def test_nothing_is_said_to_be_nothing() -> None:
    sections = page(services={}, relays=[], sessions=[], sessions_total=0, links=[])
    for id_ in ("services", "backends", "relays", "sessions", "links"):
        assert 'class="none"' in sections[id_]
