"""An audit finds what the service knows, and never takes no answer, or half of one, for a good one."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from tests.supply import audit, lock
from tests.supply.audit import Exit
from tests.support.consul import free_ports

Serve = Callable[[int, set[str]], str]


@pytest.fixture
def osv() -> Iterator[Serve]:
    """Yield a function that starts a service with OSV's API: its answer's status, the packages with a hole."""
    servers = []

    def serve(status: int, vulnerable: set[str]) -> str:
        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["package"]["name"]
                hole = {
                    "id": "PYSEC-2026-1",
                    "summary": "a hole",
                    "affected": [
                        {
                            "package": {"name": asked, "ecosystem": "PyPI"},
                            "ranges": [
                                {"type": "ECOSYSTEM", "events": [{"introduced": "0"}, {"fixed": "99.1"}]}
                            ],
                        }
                    ],
                }
                body = json.dumps({"vulns": [hole]} if asked in vulnerable else {}).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: object) -> None:
                """Say nothing."""

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        servers.append((server, thread))
        return f"http://127.0.0.1:{server.server_port}/v1/query"

    yield serve
    for server, thread in servers:
        server.shutdown()
        thread.join()
        server.server_close()


def test_no_hole_in_any_package_is_clean(osv: Serve) -> None:
    end, lines = audit.audit([lock.RUN], osv(200, {"left-pad"}))
    on_linux = [package for package in lock.read(lock.RUN).values() if package.on_linux]
    assert (end, lines) == (Exit.CLEAN, [f"no known vulnerability in {len(on_linux)} packages"])


def test_a_hole_in_a_locked_package_is_found(osv: Serve) -> None:
    end, lines = audit.audit([lock.RUN], osv(200, {"aiohttp"}))
    assert end is Exit.VULNERABLE
    version = lock.read(lock.RUN)["aiohttp"].version
    assert lines[1:] == [f"aiohttp {version}: PYSEC-2026-1, fixed in 99.1"]


def test_a_service_that_fails_has_checked_nothing(osv: Serve) -> None:
    end, lines = audit.audit([lock.BUILD], osv(500, set()))
    assert end is Exit.NOT_CHECKED and "NOT CHECKED" in lines[0]


def test_a_service_out_of_reach_is_told_and_fails_where_ci_is_set(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (nobody,) = free_ports(1)
    monkeypatch.setenv("OSV_URL", f"http://127.0.0.1:{nobody}/v1/query")
    monkeypatch.delenv("CI", raising=False)
    assert audit.main() == 0
    told = capsys.readouterr()
    assert told.out == ""
    assert told.err.startswith("NOT CHECKED, there may be known vulnerabilities: ")
    monkeypatch.setenv("CI", "true")
    assert audit.main() == Exit.NOT_CHECKED


def test_a_hole_fails_wherever_it_is_found(osv: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CI", raising=False)
    for package in ("setuptools", "aioquic", "pytest"):
        monkeypatch.setenv("OSV_URL", osv(200, {package}))
        assert audit.main() == Exit.VULNERABLE


@pytest.fixture
def two(tmp_path: Path) -> Path:
    path = tmp_path / "two.txt"
    path.write_text("one==1\ntwo==2\nthree==3 ; sys_platform == 'win32'\n")
    return path


def test_a_package_without_an_answer_is_not_checked(two: Path) -> None:
    one: dict[str, object] = {"name": "one", "version": "1", "vulns": []}
    for dependencies in ([one], [one, {"name": "two", "skip_reason": "no idea"}]):
        end, lines = audit.judge([two], {"dependencies": dependencies})
        assert (end, lines) == (Exit.NOT_CHECKED, ["NOT CHECKED: two"])


def test_a_hole_weighs_more_than_a_package_without_an_answer(two: Path) -> None:
    one: dict[str, object] = {"name": "one", "version": "1", "vulns": [{"id": "PYSEC-1", "fix_versions": []}]}
    end, lines = audit.judge([two], {"dependencies": [one]})
    assert (end, lines[1]) == (Exit.VULNERABLE, "one 1: PYSEC-1, fixed in no version yet")
