"""ztna.cli.completing: what a shell is offered; whatever goes wrong, it is nothing, and soon."""

from __future__ import annotations

import http.server
import json
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import click
import pytest

from ztna.cli import completing

STATE = {
    "agent": {
        "services": [{"service": "web-app", "ip": "10.100.0.2"}, {"service": "db", "ip": "10.100.0.3"}]
    },
    "connector": {"services": {"mail": {}}},
    "names": {
        "services": [
            {"service": "leased", "ip": "10.100.0.4"},
            {"service": "new", "ip": None},
            {"service": "db", "ip": None},
        ]
    },
    "sessions": [
        {"session": "00000000000000a1", "agent": "laptop", "service": "web-app"},
        {"session": "00000000000000b2", "agent": "bad\x1b[2Jname", "service": "seen"},
    ],
}


@contextmanager
def answering(body: bytes) -> Iterator[str]:
    """A daemon's admin port that answers everything with the body."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield f"127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


def asked(**params: object) -> click.Context:
    """Return a context as the words before the one that is completed make it."""
    context = click.Context(click.Command("ping"))
    context.params = params
    return context


PARAMETER = click.Argument(["service"])


def test_services_of_all_kinds_of_daemons_are_offered_with_their_address() -> None:
    with answering(json.dumps(STATE).encode()) as address:
        found = completing.services(asked(path=address), PARAMETER, "")
        assert {each.value: each.help for each in found} == {
            "db": "10.100.0.3",
            "leased": "10.100.0.4",
            "mail": "",
            "new": "",
            "seen": "",
            "web-app": "10.100.0.2",
        }
        assert [each.value for each in completing.services(asked(path=address), PARAMETER, "we")] == [
            "web-app"
        ]


def test_sessions_say_whose_they_are_and_no_name_reaches_the_terminal_raw() -> None:
    with answering(json.dumps(STATE).encode()) as address:
        found = completing.sessions(asked(address=address), PARAMETER, "")
    assert {each.value: each.help for each in found} == {
        "00000000000000a1": "laptop web-app",
        "00000000000000b2": None,
    }


@pytest.mark.parametrize(
    "body", [b"", b"<html>", b"[]", b'{"sessions": 5}', b'{"agent": {"services": [{}]}}']
)
def test_an_answer_that_is_none_of_ours_offers_nothing(body: bytes) -> None:
    with answering(body) as address:
        assert completing.services(asked(path=address), PARAMETER, "") == []
        assert completing.sessions(asked(address=address), PARAMETER, "") == []


def test_a_daemon_that_never_answers_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(completing, "ANSWER_SECONDS", 0.05)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        assert completing.services(asked(path=address), PARAMETER, "") == []


def test_a_configuration_says_where_to_ask(tmp_path: Path) -> None:
    with answering(json.dumps(STATE).encode()) as address:
        file = tmp_path / "dnsd.yaml"
        file.write_text(f"dnsd: {{admin: {address}, pool: {{cidr: 127.101.0.0/16}}}}\n")
        assert len(completing.services(asked(file=file), PARAMETER, "")) == 6
