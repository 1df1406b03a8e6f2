"""`ztna` used wrongly, or where nobody answers: one line says what is wrong and with what; never a traceback."""

from __future__ import annotations

import errno
import os
import shlex
import socketserver
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from tests.unit.test_cli_completing import answering
from ztna.cli import admin
from ztna.cli.main import cli
from ztna.cli.processes import Child
from ztna.errors import ZtnaError

NOT_PEM = "Unable to load PEM file."


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(cli, [str(each) for each in arguments])


def told(*arguments: str | Path) -> tuple[int, str]:
    """Return exit status and words, where ZtnaError is what `main` says in a line of its own."""
    done = run(*arguments)
    if isinstance(done.exception, ZtnaError):
        return 1, str(done.exception)
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    return done.exit_code, done.output.strip().splitlines()[-1]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with an authority, a certificate, and files that are something else."""
    monkeypatch.chdir(tmp_path)
    assert run("ca", "init").exit_code == run("ca", "issue", "laptop", "--agent", "web").exit_code == 0
    for other in ("other", "broken"):
        assert run("ca", "init", "--ca", other).exit_code == 0
    (tmp_path / "broken/crl.pem").write_text("junk")
    (tmp_path / "text").write_text("hello\n")
    (tmp_path / "binary").write_bytes(b"\x7f\x00\xff")
    return tmp_path


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        ("ca init --ca text/ca", 1, "Error: text/ca cannot be made: Not a directory"),
        ("ca init --ca new --name ''", 2, "Error: Invalid value for --name: expected 1 to 64 characters"),
        ("ca revoke laptop.pem --ca other", 1, "Error: laptop.pem: the certificate is not of this CA"),
        ("ca renew laptop.pem --ca other", 1, "Error: laptop.pem: the certificate is not of this CA"),
        ("ca crl --ca broken", 1, f"Error: broken/crl.pem: no CRL in PEM: {NOT_PEM}"),
        ("ca renew laptop.pem --ca broken", 1, "Error: broken/crl.pem: no CRL in PEM or DER: "),
        ("init host --dir we:{ird", 2, "Error: with these options relay would refuse its configuration: "),
        ("ca issue x --agent a --out text/x", 1, "Error: text/x: Not a directory"),
        ("ca issue x --agent a --days 99999999999", 2, "is not in the range 1<=x<=3650."),
        ("ca crl --days 99999999999", 2, "is not in the range 1<=x<=3650."),
        ("ca sign-csr text x --agent a", 1, f"Error: text: no certificate signing request in PEM: {NOT_PEM}"),
        ("ca renew laptop.pem text", 1, f"Error: text: no certificate in PEM: {NOT_PEM}"),
        ("ca revoke laptop.pem text", 1, f"Error: text: no certificate in PEM: {NOT_PEM}"),
        ("ca show text", 1, f"Error: text: no certificate in PEM: {NOT_PEM}"),
        (
            "ca show laptop.pem --trust text",
            1,
            f"Error: text: the CA file cannot be read as PEM certificates: {NOT_PEM}",
        ),
        ("ca crl --ca nowhere", 1, "Error: no CA in nowhere: no nowhere/ca.pem; `ztna ca init` makes one"),
        (
            "up --mode anyip",
            2,
            "Error: --mode anyip takes a --pool outside 127.0.0.0/8, for one 10.100.0.0/16",
        ),
        (
            "up --pool 10.100.0.0/16",
            2,
            "Error: --mode listen takes a --pool inside 127.0.0.0/8, not 10.100.0.0/16",
        ),
        ("up --keep text", 2, "Error: Invalid value for --keep: text: File exists"),
        ("up --keep text/x", 2, "Error: Invalid value for --keep: text/x: Not a directory"),
        ("services add web --routes nowhere", 2, "Error: nowhere: No such file or directory"),
        (
            "services list --api nowhere",
            1,
            "connector at ./nowhere: No such file or directory; does it run, ",
        ),
        ("trace web --agent nowhere", 1, "agent at nowhere: No such file or directory; does it run, and is "),
        ("sessions list --relay 127.0.0.1:1", 1, "relay at 127.0.0.1:1: Connection refused; does it run, "),
        ("sessions list --relay text", 1, "relay at text: Connection refused; does it run, "),
        (
            "leases list --consul http://127.0.0.1:1",
            1,
            " at http://127.0.0.1:1: cannot connect: Connection refused",
        ),
        ("top --once -i 0.2 --config binary", 2, "Error: binary: unacceptable character #x007f: control "),
    ],
)
def test_what_is_wrong_is_said_in_the_last_line(place: Path, arguments: str, status: int, words: str) -> None:
    code, line = told(*shlex.split(arguments))
    assert code == status and words in line, f"{code}: {line}"
    assert "Errno" not in line and "ssl:" not in line and "http.client" not in line


@pytest.fixture
def stranger() -> Iterator[str]:
    """A port where something answers that speaks no HTTP."""

    class Greet(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            self.request.sendall(b"SSH-2.0-other\x1b[2J\r\n")

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Greet) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield f"127.0.0.1:{server.server_address[1]}"
        server.shutdown()
        thread.join()


def test_a_port_of_somebody_else_is_told_as_that(place: Path, stranger: str) -> None:
    (place / "dnsd.yaml").write_text(f"dnsd: {{admin: '{stranger}'}}")
    words = f"{admin.STRANGER}: it speaks no HTTP"
    assert told("sessions", "list", "--relay", stranger) == (1, f"relay at {stranger}: {words}")
    assert told("status", "--config", "dnsd.yaml") == (1, f"dnsd at {stranger}: {words}")
    assert f"{stranger}: {words}" in run("top", "--once", "-i", "0.2", "--config", "dnsd.yaml").output
    with answering(b"<html>a page</html>") as address:
        (place / "dnsd.yaml").write_text(f"dnsd: {{admin: '{address}'}}")
        assert told("sessions", "list", "--relay", address)[1].startswith(
            f"relay at {address}: {admin.STRANGER}"
        )
        assert told("status", "--config", "dnsd.yaml")[1].startswith(f"dnsd at {address}: {admin.STRANGER}")


def test_who_may_not_use_a_socket_is_told_who_may(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_connection: object) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(admin._UnixConnection, "connect", refuse)
    code, line = told("sessions", "close", "00000000000000aa", "--relay", place / "relay.sock")
    assert code == 1 and line.endswith("relay.sock: Permission denied; only who runs it may, or root")


@pytest.mark.parametrize(
    ("number", "said", "advice"),
    [
        (errno.EACCES, "Permission denied", "ports below 1024 take CAP_NET_BIND_SERVICE, or root"),
        (errno.EADDRINUSE, "somebody else has it", "`ss -lntup` shows who has it"),
        (errno.EADDRNOTAVAIL, "Cannot assign requested address", "`ip addr` shows this host's addresses"),
    ],
)
def test_the_doctor_says_of_each_port_why_it_cannot_be_had_and_what_to_do(
    place: Path, monkeypatch: pytest.MonkeyPatch, number: int, said: str, advice: str
) -> None:
    def refuse(_socket: object, _address: object) -> None:
        raise OSError(number, os.strerror(number))

    # Of a process of its own no test could be sure: root may bind anything.
    monkeypatch.setattr("ztna.cli.examine.socket.socket.bind", refuse, raising=False)
    (place / "dnsd.yaml").write_text(
        "consul: {address: '127.0.0.1:1'}\ndnsd: {listen: '127.0.0.1:53', admin: '127.0.0.1:1'}"
    )
    words = run("doctor", "--config", "dnsd.yaml").output
    assert f"dnsd.listen 127.0.0.1:53 (udp): {said}\n        {advice}" in words


async def test_a_program_that_cannot_be_run_is_named(tmp_path: Path) -> None:
    child = Child("agent", [str(tmp_path)], tmp_path / "log")
    with pytest.raises(ZtnaError, match=f"agent: {tmp_path} cannot be run: Permission denied"):
        await child.start()
