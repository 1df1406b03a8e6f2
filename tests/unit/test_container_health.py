"""The image's health check: what it asks, and what it makes of the answer."""

from __future__ import annotations

import http.server
import threading
from collections.abc import Iterator

import pytest

from tests.support.consul import free_ports
from ztna.container import health


class _Daemon(http.server.BaseHTTPRequestHandler):
    answer = 200

    def do_GET(self) -> None:
        self.send_response(self.answer if self.path == "/readyz" else 404)
        self.end_headers()
        self.wfile.write(f"asked for {self.path}".encode())

    def log_message(self, format: str, *args: object) -> None:
        """Keep it from stderr."""


@pytest.fixture
def daemon(monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """A daemon's admin port, found at the second of the default ones."""
    monkeypatch.setattr(_Daemon, "answer", 200)
    with http.server.HTTPServer(("127.0.0.1", 0), _Daemon) as server:
        (nobody,) = free_ports(1)
        monkeypatch.setattr(health, "ADMIN_PORTS", (nobody, server.server_port))
        monkeypatch.delenv("READY_AT", raising=False)
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server.server_port
        server.shutdown()
        thread.join()


def test_a_ready_daemon_is_healthy(daemon: int, capsys: pytest.CaptureFixture[str]) -> None:
    assert (health.main(), capsys.readouterr().out) == (0, "asked for /readyz\n")


def test_one_that_awaits_something_is_not_and_says_what(
    daemon: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_Daemon, "answer", 503)
    assert (health.main(), capsys.readouterr().out) == (1, "asked for /readyz\n")


@pytest.mark.parametrize(("path", "status"), [("", 0), ("/readyz", 0), ("/elsewhere", 1)])
def test_another_place_can_be_named(
    daemon: int, path: str, status: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(health, "ADMIN_PORTS", ())
    monkeypatch.setenv("READY_AT", f"127.0.0.1:{daemon}{path}")
    assert health.main() == status


@pytest.mark.parametrize("place", ["9432", "localhost", "localhost:x"])
def test_what_is_no_place_is_refused(
    place: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("READY_AT", place)
    assert (health.main(), capsys.readouterr().out) == (
        1,
        f"READY_AT: expected host:port or host:port/path, got {place!r}\n",
    )


def test_nobody_there_is_unhealthy(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (nobody,) = free_ports(1)
    monkeypatch.setenv("READY_AT", f"127.0.0.1:{nobody}")
    assert health.main() == 1
    assert capsys.readouterr().out == f"no daemon answers at 127.0.0.1:{nobody}\n"
