"""ztna.cli.status: what is printed of what daemons say. That they say it tests/e2e/test_troubleshooting.py proves."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from rich.console import Console

from tests.unit.test_cli_completing import answering
from ztna.admin import serving
from ztna.cli.status import UNREADABLE, Seen, look, show
from ztna.config import Config, Endpoint
from ztna.runtime import Daemon

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


def test_a_terminal_obeys_nothing_that_others_had_a_hand_in() -> None:
    told = {"checks": [{"kind": "script", "target": "a:1", "output": "\x1b]0;title\x07"}], "ejected": False}
    status = STATUS | {
        "readiness": {"ready": True, "awaiting": {"consul": "\x1b[2J"}, "warnings": {"services": "\x1b[31m"}},
        "connector": {"services": {"web": {"backends": [told]}}},
    }
    console = Console(width=200)
    with console.capture() as captured:
        show(console, [Seen("connector", "127.0.0.1:9433", status), Seen("relay", "a:1", error="\x1b[1m")])
    text = captured.get()
    assert "\x1b" not in text
    for escaped in (r"\x1b]0;title", r"\x1b[2J", r"\x1b[31m", r"\x1b[1m"):
        assert escaped in text, escaped


async def test_a_daemon_that_listens_everywhere_is_asked_at_loopback() -> None:
    daemon = Daemon("relay", Config(), asyncio.TaskGroup())
    async with serving(daemon, Endpoint("0.0.0.0", 0), None):
        seen = await asyncio.to_thread(look, "relay", f"0.0.0.0:{daemon.admin_address[1]}")
    assert seen.error is None and seen.status is not None and seen.is_ready


async def test_an_admin_port_that_does_not_tell_says_why() -> None:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        body = b'{"error": "not for you"}'
        writer.write(b"HTTP/1.1 403 Forbidden\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    async with server:
        port = server.sockets[0].getsockname()[1]
        seen = await asyncio.to_thread(look, "relay", f"127.0.0.1:{port}")
    assert seen.error == "not for you" and not seen.is_ready


@pytest.mark.parametrize(
    "status",
    [{"readiness": {}}, {"readiness": 5}, {"readiness": STATUS["readiness"]}, STATUS | {"sessions": 5}],
)
def test_a_state_that_cannot_be_shown_is_told_and_not_fatal(status: object) -> None:
    with answering(json.dumps(status).encode()) as address:
        seen = look("relay", address)
    assert seen.error == UNREADABLE and not seen.is_ready
