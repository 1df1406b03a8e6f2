"""`ztna dns` on a host's file system of the test's own, and `ztna doctor dns` on real sockets."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

import ztna.cli.doctor
from dnsd.answer import Answers
from dnsd.server import Server
from tests.support.dns import zone
from tests.unit.test_dnsd_server import LOOPBACK
from ztna.cli.main import cli
from ztna.config import Endpoint
from ztna.system_dns import DNSMASQ_FILE, MARK, RESOLV_CONF


def run(*arguments: str, answer: str = "") -> Result:
    return CliRunner().invoke(cli, arguments, input=answer)


@pytest.fixture
def host(tmp_path: Path) -> Path:
    """A host with dnsmasq."""
    (tmp_path / "etc/dnsmasq.d").mkdir(parents=True)
    (tmp_path / RESOLV_CONF).write_text("nameserver 127.0.0.1\n")
    return tmp_path


def test_it_is_shown_asked_installed_and_taken_back(host: Path) -> None:
    root = f"--root={host}"
    assert run("dns", "status", root).exit_code == 1
    declined = run("dns", "install", root, answer="n\n")
    assert declined.exit_code == 1 and "server=/ztna.local/127.0.0.1#5533" in declined.output
    assert not (host / DNSMASQ_FILE).exists()
    assert run("dns", "install", root, "--server=127.0.0.1:53", answer="y\n").exit_code == 0
    assert (host / DNSMASQ_FILE).read_text().startswith(MARK)
    assert "Nothing to change" in run("dns", "install", root, "--server=127.0.0.1:53").output
    told = json.loads(run("dns", "status", root, "--json").output)
    assert told == {"resolver": "dnsmasq", "installed": ["dnsmasq"], "nameservers": ["127.0.0.1"]}
    assert "installed for: dnsmasq" in run("dns", "status", root).output
    assert run("dns", "uninstall", root, "--yes").exit_code == 0
    assert not (host / DNSMASQ_FILE).exists()
    assert "Nothing to change" in run("dns", "uninstall", root, "--yes").output


def test_what_cannot_be_installed_is_one_line_that_says_why(host: Path) -> None:
    (host / RESOLV_CONF).unlink()
    (host / RESOLV_CONF).symlink_to("/run/elsewhere")
    linked = run("dns", "install", f"--root={host}", "--how=resolv.conf", "--yes")
    assert "is a link" in str(linked.exception)
    assert "expected host:port" in run("dns", "install", f"--root={host}", "--server=nowhere").output
    (host / "etc/systemd").write_text("no directory")
    blocked = run("dns", "install", f"--root={host}", "--how=systemd-resolved", "--yes")
    assert "etc/systemd" in str(blocked.exception)


async def doctor(
    monkeypatch: pytest.MonkeyPatch, host: Path, through: Callable[[Endpoint], Endpoint]
) -> dict[str, str]:
    """Run the doctor against a dnsd of ours and the resolver that `through` names."""
    monkeypatch.setattr(ztna.cli.doctor, "ANSWER_SECONDS", 0.5)
    server = Server(LOOPBACK, Answers(zone({}, {}), confirmed_at=1_700_000_000.0))
    address = Endpoint(*server.listen(Endpoint("127.0.0.1", 0)))
    task = asyncio.ensure_future(server.run())
    try:
        arguments = ["doctor", "dns", f"--server={address}", f"--resolver={through(address)}", "--json"]
        result = await asyncio.to_thread(run, *arguments, f"--root={host}")
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
    told: dict[str, str] = json.loads(result.output)
    assert (result.exit_code == 0) == (told["verdict"] == "fine")
    return told


async def test_the_doctor_finds_a_host_that_asks_dnsd(monkeypatch: pytest.MonkeyPatch, host: Path) -> None:
    assert (await doctor(monkeypatch, host, lambda dnsd: dnsd))["verdict"] == "fine"


async def test_the_doctor_finds_a_resolver_that_does_not_answer(
    monkeypatch: pytest.MonkeyPatch, host: Path
) -> None:
    told = await doctor(monkeypatch, host, lambda _: Endpoint("127.0.0.1", 1))
    assert told["verdict"] == "timing_out"


def test_the_doctor_finds_no_dnsd(monkeypatch: pytest.MonkeyPatch, host: Path) -> None:
    monkeypatch.setattr(ztna.cli.doctor, "ANSWER_SECONDS", 0.2)
    (host / RESOLV_CONF).write_text("nameserver 127.0.0.9\n")
    result = run("doctor", "dns", "--server=127.0.0.1:1", f"--root={host}")
    assert result.exit_code == 1 and result.output.startswith("dnsd_silent: ")
