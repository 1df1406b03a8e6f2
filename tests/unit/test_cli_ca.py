"""`ztna ca` as a user types it."""

from __future__ import annotations

import json
import stat
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from tests.support.certificates import Pki
from ztna.cli.ca import ca
from ztna.config import TlsConfig
from ztna.credentials import Credentials


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(ca, [str(each) for each in arguments])


def test_a_newcomer_makes_a_ca_and_a_certificate_that_loads(tmp_path: Path) -> None:
    directory = tmp_path / "ca"
    made = run("init", "--ca", directory, "--name", "Home")
    assert made.exit_code == 0 and "ca.key" in made.output
    issued = run(
        "issue",
        "--ca",
        directory,
        "edge",
        "--connector",
        "web-app",
        "--connector-id",
        "edge--b",
        "--out",
        tmp_path,
    )
    assert issued.exit_code == 0, issued.output
    key = tmp_path / "edge.key"
    assert stat.S_IMODE(key.stat().st_mode) == 0o600
    config = TlsConfig(certificate=str(tmp_path / "edge.pem"), key=str(key), ca=str(directory / "ca.pem"))
    identity = Credentials.load(config).identity
    assert identity.id_name == "edge" and identity.may_serve("web-app")  # type: ignore[arg-type]

    shown = run("show", "--ca", directory, tmp_path / "edge.pem", "--json")
    found = json.loads(shown.output)
    assert shown.exit_code == 0
    assert found["accepted_as"] == ["client", "server"]
    assert found["connector"] == ["web-app"] and found["agent"] == [] and found["id"] == "edge"
    assert "web-app" in run("show", "--ca", directory, tmp_path / "edge.pem").output


def test_a_certificate_of_another_ca_is_shown_as_refused(tmp_path: Path) -> None:
    pki = Pki(tmp_path)
    (tmp_path / "rogue.pem").write_bytes(pki.signed(pki.rogue, dns=["agent.db.ztna"]).chain_pem)
    shown = run("show", "--trust", pki.ca_file, tmp_path / "rogue.pem", "--json")
    assert shown.exit_code == 1
    assert json.loads(shown.output)["refused"][0].startswith("untrusted")


def test_the_wildcard_is_shown(tmp_path: Path) -> None:
    pki = Pki(tmp_path)
    config = pki.agent(services=["*"])
    shown = run("show", "--trust", pki.ca_file, config.certificate, "--json")
    assert json.loads(shown.output)["agent"] == ["*"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["x"], "would grant nothing"),
        (["x", "--agent", "Web"], "service name"),
        (["x", "--connector", "web"], "go together"),
        (["x", "--agent", "web", "--connector-id", "c"], "go together"),
        (["x", "--relay", "a--b"], "relay name"),
        (["../x", "--agent", "web"], "name"),
    ],
)
def test_a_certificate_that_makes_no_sense_is_not_issued(
    tmp_path: Path, arguments: list[str], words: str
) -> None:
    run("init", "--ca", tmp_path / "ca")
    result = run("issue", "--ca", tmp_path / "ca", "--out", tmp_path / "out", *arguments)
    assert result.exit_code == 1 and words in result.output
    assert not list(tmp_path.rglob("x.*"))


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    run("init", "--ca", tmp_path / "ca")
    assert "exists already" in run("init", "--ca", tmp_path / "ca").output
    issue = ("issue", "--ca", tmp_path / "ca", "--out", tmp_path, "x", "--agent", "web")
    assert run(*issue).exit_code == 0
    again = run(*issue)
    assert again.exit_code == 1 and "not overwritten" in again.output


def test_a_missing_ca_says_how_to_make_one(tmp_path: Path) -> None:
    result = run("issue", "--ca", tmp_path / "none", "x", "--agent", "web")
    assert result.exit_code == 1 and "ztna ca init" in result.output


def test_what_is_no_certificate_is_said(tmp_path: Path) -> None:
    (tmp_path / "x.pem").write_text("nothing")
    result = run("show", "--trust", Pki(tmp_path).ca_file, tmp_path / "x.pem")
    assert result.exit_code == 1 and "x.pem" in result.output
