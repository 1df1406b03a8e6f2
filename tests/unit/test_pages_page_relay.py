"""A relay's page."""

from __future__ import annotations

from typing import Any

from tests.support import statuses
from tests.support.statuses import shown
from ztna.pages import page_relay, seen


def page(**more: Any) -> dict[str, str]:
    told = seen.read(statuses.relay(**more))
    assert isinstance(told, seen.Relay)
    return {id_: shown(section) for id_, section in page_relay.view(told).sections.items()}


def test_it_says_who_is_there_and_what_is_joined() -> None:
    sections = page()
    assert "Relay north" in sections["head"] and "listens at 127.0.0.1:4433" in sections["head"]
    assert "7.8 kB" in sections["sessions"] and "through this relay" in sections["sessions"]
    assert "opening" in sections["sessions"] and "10 s" in sections["sessions"]
    assert "9.9.9" in sections["connections"]
    assert "connector alpha" in sections["connections"] and "silent" in sections["connections"]
    assert "9 days" in sections["connections"] and "12 h" in sections["connections"]
    assert "alpha (weight 1)" in sections["srv"] and "none: no instance passes" in sections["srv"]
    assert "this process" in sections["forwarder"] and "1 pair now" in sections["forwarder"]
    assert ">ago<" in sections["head"]


def test_it_says_what_dns_or_the_kernel_does() -> None:
    forwarder = {"udp": {"forwarding": {"in_use": "kernel", "in_kernel": 3}}}
    sections = page(srv={"failing": "no resolver answers"}, forwarder=forwarder, sessions=[], connections=[])
    assert "no resolver answers" in sections["srv"] and "the kernel" in sections["forwarder"]
    assert "never" in sections["head"] and ">yet<" in sections["head"]
    assert "No session" in sections["sessions"] and "Nobody is connected" in sections["connections"]


def test_a_session_that_has_carried_nothing_says_so() -> None:
    session = {"session": "1", "service": "web", "agent": "a", "connector_id": "c", "path": "new way"}
    assert 'class="figure">–</td>' in page(sessions=[session])["sessions"]
    assert "new way" in page(sessions=[session])["sessions"]
