"""`ztna services` as a user types it, against a connector's API that says what the test wants."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from ztna.cli.services import services

SHOWN: dict[str, Any] = {
    "service": "web",
    "from": "api",
    "shadowed": [],
    "problem": None,
    "fronted": True,
    "ports": ["tcp:80"],
    "verdict": "passing",
    "output": "connected",
    "registered": True,
}


class Connector(HTTPServer):
    """Answers on a unix socket, and keeps what it was asked."""

    address_family = socket.AF_UNIX

    def __init__(self, path: str) -> None:
        self.asked: list[tuple[str, str, Any]] = []
        self.answer: tuple[int, Any] = (200, SHOWN)
        super().__init__(path, _Handler)  # type: ignore[arg-type]

    def server_bind(self) -> None:
        self.socket.bind(self.server_address)
        self.server_name, self.server_port = "connector", 0


class _Handler(BaseHTTPRequestHandler):
    server: Connector

    def answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.server.asked.append((self.command, self.path, json.loads(body) if body else None))
        status, answer = self.server.answer
        self.send_response(status)
        self.end_headers()
        self.wfile.write(json.dumps(answer).encode())

    do_GET = do_PUT = do_DELETE = answer

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def connector(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Connector]:
    monkeypatch.chdir(tmp_path)
    with Connector("api.sock") as made:
        thread = threading.Thread(target=made.serve_forever, args=(0.01,))
        thread.start()
        yield made
        made.shutdown()
        thread.join()


def run(*arguments: str) -> Result:
    return CliRunner().invoke(
        services, [arguments[0], "--api", "api.sock", *arguments[1:]], terminal_width=200
    )


def test_adds_what_the_flags_say(connector: Connector) -> None:
    done = run(
        "add", "web", "--port", "80", "--backend", "127.0.0.1:8080", "--check", "http,path=/up,interval_s=2"
    )
    assert (done.exit_code, done.output) == (0, "web added\n")
    route = {"port": 80, "protocol": "tcp", "backend": "127.0.0.1:8080"}
    checks = [{"kind": "http", "path": "/up", "interval_s": 2}]
    assert connector.asked == [("PUT", "/v1/services/web", {"routes": [route | {"checks": checks}]})]
    run("add", "web", "--port", "53", "--protocol", "udp", "--backend", "a:1", "--backend", "b:1")
    assert connector.asked[1][2] == {
        "routes": [{"port": 53, "protocol": "udp", "backends": [{"address": "a:1"}, {"address": "b:1"}]}]
    }


def test_adds_what_a_file_says(connector: Connector, tmp_path: Path) -> None:
    (tmp_path / "web.yaml").write_text("routes: [{port: 80, backend: 'srv://_web._tcp.example'}]")
    connector.answer = (
        200,
        SHOWN | {"shadowed": ["consul"], "problem": "srv://_web._tcp.example: not asked yet"},
    )
    done = run("add", "web", "--routes", "web.yaml")
    assert done.output == (
        "web added: srv://_web._tcp.example: not asked yet; also defined by consul, which does not count\n"
    )
    assert connector.asked[0][2] == {"routes": [{"port": 80, "backend": "srv://_web._tcp.example"}]}
    assert json.loads(run("add", "web", "--routes", "web.yaml", "--json").output)["service"] == "web"
    (tmp_path / "web.yaml").write_text("[")
    broken = run("add", "web", "--routes", "web.yaml")
    assert broken.exit_code == 2 and "web.yaml, line 2" in broken.output


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("add", "web"), "expected --port and --backend, or --routes FILE"),
        (("add", "Web", "--port", "80", "--backend", "a:1"), "Web"),
        (
            ("add", "web", "--port", "80", "--backend", "a:1", "--check", "ttl,30"),
            "expected KEY=VALUE, got '30'",
        ),
        (
            ("add", "web", "--port", "80", "--backend", "a:1", "--check", "http,path=["),
            "expected a value after path=, got '['",
        ),
        (("check", "web"), "expected --pass, --warn or --fail"),
    ],
)
def test_wrong_usage_has_status_2(connector: Connector, arguments: tuple[str, ...], said: str) -> None:
    done = run(*arguments)
    assert done.exit_code == 2 and said in done.output
    assert connector.asked == []


def test_the_configuration_says_where_the_api_is(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("connector: {id: a, tls: {certificate: a, key: a, ca: a}}")
    done = CliRunner().invoke(services, ["list", "--config", str(file)])
    assert done.exit_code == 2 and "has no connector.api" in done.output
    done = CliRunner().invoke(services, ["list", "--config", str(tmp_path / "none.yaml")])
    assert done.exit_code == 2 and "none.yaml" in done.output


def test_lists_for_people_and_for_programs(connector: Connector) -> None:
    connector.answer = 200, {"services": [SHOWN]}
    done = run("list")
    assert done.exit_code == 0
    for text in ("web", "api", "tcp:80", "passing", "yes"):
        assert text in done.output
    assert json.loads(run("list", "--json").output) == [SHOWN]
    bad = {"service": "pay", "from": "a.yaml", "shadowed": [], "fronted": False, "ports": ["tcp:1"]}
    connector.answer = 200, {"services": [SHOWN, bad | {"problem": "[red]no\x1b[2J"}]}
    done = run("list")
    assert done.exit_code == 1 and "not fronted" in done.output and "\x1b[2J" not in done.output
    assert "[red]no" in done.output.replace("\n", "")


def test_removes_and_checks(connector: Connector) -> None:
    connector.answer = 200, {"removed": "web"}
    assert run("remove", "web").output == "web removed\n"
    connector.answer = 200, {"service": "web", "status": "warning"}
    assert run("check", "web", "--warn", "--output", "3 of 4").output == "web is warning\n"
    assert connector.asked[1:] == [
        ("PUT", "/v1/services/web/check", {"status": "warning", "output": "3 of 4"}),
    ]
    assert json.loads(run("check", "web", "--fail", "--json").output) == {
        "service": "web",
        "status": "warning",
    }


def test_a_refusal_is_the_connectors_own_words(connector: Connector) -> None:
    connector.answer = 409, {"error": "web comes from a.yaml: remove it there", "reason": None}
    done = run("remove", "web")
    assert str(done.exception) == "connector at ./api.sock: web comes from a.yaml: remove it there"
    connector.answer = 200, "nonsense"
    assert "connector at ./api.sock" in str(run("remove", "web").exception)
