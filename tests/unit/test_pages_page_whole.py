"""The page of a whole mesh."""

from __future__ import annotations

from tests.support import statuses
from tests.support.statuses import shown
from ztna.pages import page_whole, seen

PORTS = {"relay": 1, "dnsd": 2, "connector": 3, "agent": 4}
ADDRESSES = {name: f"http://127.0.0.1:{port}/" for name, port in PORTS.items()}


def page(told: dict[str, seen.Daemon | None], processes: dict[str, str] | None = None) -> dict[str, str]:
    view = page_whole.view(told, ADDRESSES, processes or {"relay": "running"})
    return {id_: shown(section) for id_, section in view.sections.items()}


def test_all_four_are_put_together() -> None:
    sections = page(dict(zip(ADDRESSES, statuses.all_of_them(), strict=True)))
    assert "Everything is ready" in sections["head"] and "1 of 3" in sections["head"]
    assert "127.0.0.1:5432" in sections["services"] and "critical: it is critical" in sections["services"]
    assert "direct, punched UDP" in sections["paths"] and "through a relay, TLS" in sections["paths"]
    assert 'data-label="Relay">–<' in sections["paths"] and 'data-label="Relay">north<' in sections["paths"]
    assert '<a href="http://127.0.0.1:1/">127.0.0.1:1</a>' in sections["daemons"]


def test_who_is_silent_unready_or_ended_is_said() -> None:
    waiting = {"ready": False, "awaiting": {"names": ""}}
    told = {"relay": seen.read(statuses.relay(readiness=waiting)), "dnsd": None}
    sections = page(told, {"dnsd": "ended"})
    assert "dnsd does not answer; relay is not ready; dnsd has ended" in sections["head"]
    assert "no answer" in sections["daemons"] and "waits for names" in sections["daemons"]


def test_nothing_is_said_to_be_nothing() -> None:
    sections = page({})
    for id_ in ("services", "paths", "daemons"):
        assert 'class="none"' in sections[id_]
    unleased = {"services": [{"service": "web"}]}
    assert "no address yet" in page({"dnsd": seen.read(statuses.dnsd(names=unleased))})["services"]
