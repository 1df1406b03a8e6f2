"""ztna.cli.status: what is printed of what daemons say. That they say it tests/e2e/test_troubleshooting.py proves."""

from __future__ import annotations

from typing import Any

from rich.console import Console

from ztna.cli.status import Seen, show

STATUS = {"readiness": {"ready": True, "awaiting": {}, "warnings": {}}, "version": "0.1.0", "uptime_s": 61}


def shown(links: list[dict[str, Any]]) -> str:
    console = Console(width=200)
    with console.capture() as captured:
        show(console, [Seen("agent", "127.0.0.1:9434", STATUS | {"agent": {"links": links}})])
    return captured.get()


def link(*candidates: dict[str, Any]) -> dict[str, Any]:
    return {"connector": "alpha", "path": "direct", "relay": "edge", "rtt_ms": 0.4, "candidates": candidates}


def test_direct_paths_that_were_tried_are_told_with_state_and_round_trip() -> None:
    text = shown(
        [
            link(
                {"address": "192.0.2.7:4000", "state": "carries", "rtt_ms": 0.3},
                {"address": "[2600::1]:4001", "state": "resting", "rtt_ms": None},
            )
        ]
    )
    assert "192.0.2.7:4000 carries 0.3 ms, [2600::1]:4001 resting" in text


def test_links_that_tried_none_have_no_such_column() -> None:
    assert "direct paths" not in shown([link()])
