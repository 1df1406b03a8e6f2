"""`ztna sessions` and the audit log of a real relay: who is there, ending one, rotating the log, and the admin page."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from ipaddress import IPv4Network
from pathlib import Path
from typing import Any

import pytest

from tests.support.lab import Daemon, Lab, http_get, lab, tcp_route, until
from ztna.config import Endpoint

pytestmark = [pytest.mark.namespaces, pytest.mark.slow]

HTTP_PORT, COUNTING_PORT, SPEAKING_PORT, UDP_PORT = 18080, 18081, 18082, 18007
ZTNA = Path(sys.executable).with_name("ztna")


class Mesh:
    """One service, and an agent whose only way to it is through the relay."""

    def __init__(self, made: Lab) -> None:
        self.lab = made
        core = made.host("core")
        ports = (
            "--http",
            HTTP_PORT,
            "--counting",
            COUNTING_PORT,
            "--speaking",
            SPEAKING_PORT,
            "--udp",
            UDP_PORT,
        )
        made.python("backends", core, "-m", "tests.support.backends", *map(str, ports))
        self.dnsd = made.dnsd(listen=Endpoint("0.0.0.0", 5533), allow=(IPv4Network("0.0.0.0/0"),))
        self.socket, self.audit = made.directory / "relay.sock", made.directory / "audit.log"
        self.relay: Daemon = made.relay(admin_socket=str(self.socket), audit_log=str(self.audit))
        self.connector = made.connector(
            "alpha", [tcp_route("counting", Endpoint("127.0.0.1", COUNTING_PORT), 9001)]
        )
        self.agent = made.agent("laptop", ["counting"], host="laptop", mode="listen")
        for daemon in (self.dnsd, self.relay, self.connector, self.agent):
            daemon.wait_ready()
        self.vip = made.address("counting", "laptop", server=core.address)
        # A name has its address before its connector passes, and a flow that is refused is not tried again.
        until("it is served", lambda: self.relay.status()["srv"]["services"]["counting"]["connectors"])

    def connect(self) -> socket.socket:
        """Open a flow that carries its first bytes."""
        connection = self.lab.host("laptop").socket()
        connection.settimeout(60)
        connection.connect((self.vip, 9001))
        connection.sendall(b"x" * 1000)
        return connection

    def ztna(self, *arguments: str) -> tuple[int, str]:
        argv = [str(ZTNA), "sessions", *arguments, "--relay", str(self.socket)]
        done = subprocess.run(argv, capture_output=True, text=True, timeout=60)
        return done.returncode, done.stdout + done.stderr

    def sessions(self) -> list[dict[str, Any]]:
        code, text = self.ztna("list", "--json")
        assert code == 0, text
        found: list[dict[str, Any]] = json.loads(text)
        return [each for each in found if each["open"]]

    def lines(self, path: Path) -> list[dict[str, Any]]:
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


@pytest.fixture
def mesh() -> Iterator[Mesh]:
    with lab("core", "laptop") as made, made.host("laptop").dropping("tcp dport 4435"):
        made.start_consul("newest")
        yield Mesh(made)


def test_a_session_is_seen_ended_and_audited(mesh: Mesh) -> None:
    with mesh.connect() as connection:
        until("its bytes are seen", lambda: any(each["bytes"] > 1000 for each in mesh.sessions()))
        (seen,) = mesh.sessions()
        assert (seen["service"], seen["connector_id"], seen["path"]) == ("counting", "alpha", "forwarded")
        code, said = mesh.ztna("close", seen["session"])
        assert code == 0, said
        with pytest.raises(ConnectionResetError):
            connection.recv(1)
    assert mesh.ztna("close", seen["session"])[0] == 1
    until("audited", lambda: [each["event"] for each in mesh.lines(mesh.audit)][-1:] == ["session_closed"])
    opened, closed = mesh.lines(mesh.audit)[-2:]
    assert opened["session"] == closed["session"] == seen["session"]
    assert (closed["by"], closed["reason"], closed["bytes"] > 1000) == ("operator", "closed_by_peer", True)
    assert mesh.audit.stat().st_mode & 0o777 == 0o600 == mesh.socket.stat().st_mode & 0o777

    # Rotated as logrotate does it.
    rotated = mesh.audit.rename(mesh.audit.with_suffix(".1"))
    before = len(mesh.lines(rotated))
    mesh.relay.signal(signal.SIGHUP)
    until("a new file", mesh.audit.exists)
    with mesh.connect():
        until(
            "audited anew", lambda: [each["event"] for each in mesh.lines(mesh.audit)] == ["session_opened"]
        )
    assert len(mesh.lines(rotated)) == before

    # A disk that is full, for as long as it is.
    mesh.audit.unlink()
    Path(mesh.audit).symlink_to("/dev/full")
    mesh.relay.signal(signal.SIGHUP)
    until("refused", lambda: bool(mesh.relay.events("reload_failed")))
    assert "regular file" in mesh.relay.events("reload_failed")[-1]["error"]
    assert mesh.relay.ready(), "it goes on with the file that it had"


def test_the_page_is_for_the_host_itself(mesh: Mesh) -> None:
    code, text = mesh.relay.get("/")
    assert code == 200
    for heading in ("Sessions", "Connections", "Services by DNS", "Certificate"):
        assert f">{heading}</h2>" in text, heading
    assert http_get(mesh.relay.host, f"http://127.0.0.1:{mesh.relay.admin_port}/metrics")[0] == 200
    until("counted", lambda: mesh.relay.metric("ztna_relay_live", what="connections") == 2)


def test_status_tells_what_a_relay_holds(mesh: Mesh) -> None:
    """Who is connected and for how long their certificates last, what DNS said and when, which tasks run."""
    with mesh.connect():
        until("a session", mesh.sessions)
        status = mesh.relay.status()
    connections = {each["peer"].rpartition("/")[2]: each for each in status["connections"]}
    assert {name: each["services"] for name, each in connections.items()} == {
        "alpha": ["counting"],
        "laptop": [],
    }
    assert all(each["sessions"] == 1 and not each["silent"] for each in connections.values())
    # Leaves of a lab last two days.
    assert all(1.5 < each["certificate_days"] <= 2 for each in connections.values())
    assert 1.5 < status["certificate"]["days_left"] <= 2 and not status["certificate"]["expiring"]
    srv = status["srv"]
    assert [each["id"] for each in srv["services"]["counting"]["connectors"]] == ["alpha"]
    assert 0 <= srv["services"]["counting"]["age_s"] < 60 and 0 <= srv["fresh_age_s"] < 60
    assert {"srv", "relay", "certificates"} <= set(status["tasks"])
    assert status["sessions"][0]["agent"].endswith("/laptop")
