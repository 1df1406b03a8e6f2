"""`ztna ca` as a user types it."""

from __future__ import annotations

import json
import stat
import subprocess
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from tests.support.certificates import Pki
from ztna.ca import Authority
from ztna.cli.ca import ca
from ztna.config import TlsConfig
from ztna.credentials import Credentials
from ztna.errors import IdentityError
from ztna.identity import Grants, Trust
from ztna.names import ServiceName
from ztna.revocation import Revocations


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


def made(tmp_path: Path) -> Path:
    directory = tmp_path / "ca"
    assert run("init", "--ca", directory).exit_code == 0
    return directory


def openssl(*arguments: str | Path) -> None:
    subprocess.run(["openssl", *map(str, arguments)], check=True, capture_output=True, timeout=60)


@pytest.mark.parametrize("key", ["ec", "ed25519"])
def test_a_key_that_openssl_made_is_signed_without_leaving_its_machine(tmp_path: Path, key: str) -> None:
    directory = made(tmp_path)
    key_file, request = tmp_path / "laptop.key", tmp_path / "laptop.csr"
    algorithm = ("EC", "-pkeyopt", "ec_paramgen_curve:P-256") if key == "ec" else ("ed25519",)
    openssl("genpkey", "-algorithm", *algorithm, "-out", key_file)
    key_file.chmod(0o600)
    asked = ("-addext", "subjectAltName=DNS:agent.*.ztna")
    openssl("req", "-new", "-key", key_file, "-subj", "/CN=root", *asked, "-out", request)
    out = tmp_path / "laptop.pem"
    signed = run("sign-csr", "--ca", directory, request, "laptop", "--agent", "web-app", "--out", out)
    assert signed.exit_code == 0, signed.output
    config = TlsConfig(certificate=str(out), key=str(key_file), ca=str(directory / "ca.pem"))
    identity = Credentials.load(config).identity
    assert identity.name == "spiffe://ztna/laptop"
    assert identity.agent == Grants(frozenset({ServiceName("web-app")})), (
        "what the request asks for is no grant"
    )
    again = run("sign-csr", "--ca", directory, request, "laptop", "--agent", "web-app", "--out", out)
    assert again.exit_code == 1 and "not overwritten" in again.output


def test_requests_that_are_none_of_ours_are_not_signed(tmp_path: Path) -> None:
    directory = made(tmp_path)
    weak, request = tmp_path / "weak.key", tmp_path / "weak.csr"
    openssl("genpkey", "-algorithm", "RSA", "-out", weak)
    openssl("req", "-new", "-key", weak, "-subj", "/CN=x", "-out", request)
    refused = run("sign-csr", "--ca", directory, request, "x", "--agent", "web")
    assert refused.exit_code == 1 and "EC or Ed25519" in refused.output
    request.write_text("nothing")
    assert "signing request" in run("sign-csr", "--ca", directory, request, "x", "--agent", "web").output
    bare = run("sign-csr", "--ca", directory, request, "x")
    assert bare.exit_code == 1


def test_a_certificate_is_renewed_in_place_for_the_same_key_and_grants(tmp_path: Path) -> None:
    directory = made(tmp_path)
    issue = ("issue", "--ca", directory, "--out", tmp_path, "--days", "3")
    run(*issue, "edge", "--connector", "web", "--connector-id", "edge--b", "--agent", "db")
    file = tmp_path / "edge.pem"
    config = TlsConfig(certificate=str(file), key=str(tmp_path / "edge.key"), ca=str(directory / "ca.pem"))
    before = Credentials.load(config)
    renewed = run("renew", "--ca", directory, file)
    assert renewed.exit_code == 0, renewed.output
    after = Credentials.load(config)
    assert after.identity.fingerprint != before.identity.fingerprint
    for field in ("name", "agent", "connector", "relay", "id_name"):
        assert getattr(after.identity, field) == getattr(before.identity, field)
    assert abs(after.identity.lifetime - before.identity.lifetime) < timedelta(minutes=1)
    assert run("renew", "--ca", directory, file, "--days", "9").exit_code == 0
    assert Credentials.load(config).identity.lifetime > timedelta(days=8)
    other = Pki(tmp_path / "other").agent()
    refused = run("renew", "--ca", directory, other.certificate)
    assert refused.exit_code == 1 and "not of this CA" in refused.output


def test_renewing_adds_grants_and_takes_none_away(tmp_path: Path) -> None:
    directory = made(tmp_path)
    issue = ("issue", "--ca", directory, "--out", tmp_path)
    run(*issue, "edge", "--connector", "web", "--connector-id", "edge")
    run(*issue, "laptop", "--agent", "web")
    run(*issue, "gate", "--relay", "gate")
    for name, added in (
        ("edge", ("--connector", "db", "--agent", "web")),
        ("laptop", ("--agent", "db", "--agent", "web")),
        ("gate", ("--agent", "web")),
    ):
        done = run("renew", "--ca", directory, tmp_path / f"{name}.pem", *added)
        assert done.exit_code == 0, done.output

    def shown(name: str) -> dict[str, object]:
        return json.loads(run("show", "--ca", directory, "--json", tmp_path / f"{name}.pem").output)

    assert (shown("edge")["connector"], shown("edge")["agent"]) == (["db", "web"], ["web"])
    assert shown("laptop")["agent"] == ["db", "web"]
    assert (shown("gate")["relay"], shown("gate")["agent"]) == ("gate", ["web"])
    assert shown("gate")["accepted_as"] == ["client", "server"]
    refused = run("renew", "--ca", directory, tmp_path / "laptop.pem", "--connector", "web")
    assert refused.exit_code == 1 and "no connector's id" in refused.output
    bad = run("renew", "--ca", directory, tmp_path / "laptop.pem", "--agent", "Not A Name")
    assert bad.exit_code == 1 and shown("laptop")["agent"] == ["db", "web"]


def test_a_revoked_certificate_is_in_the_crl_and_is_not_renewed(tmp_path: Path) -> None:
    directory = made(tmp_path)
    for name in ("good", "bad", "worse"):
        run("issue", "--ca", directory, "--out", tmp_path, name, "--agent", "web")
    good, bad, worse = (tmp_path / f"{name}.pem" for name in ("good", "bad", "worse"))
    assert run("crl", "--ca", directory).exit_code == 0
    revoked = run("revoke", "--ca", directory, bad)
    assert revoked.exit_code == 0 and "Revoked" in revoked.output
    assert run("revoke", "--ca", directory, worse, bad, "--days", "2").exit_code == 0
    assert run("crl", "--ca", directory).exit_code == 0

    file = directory / "crl.pem"
    crl = x509.load_pem_x509_crl(file.read_bytes())
    assert {each.serial_number for each in crl} == {serial(bad), serial(worse)}
    assert crl.extensions.get_extension_for_class(x509.CRLNumber).value.crl_number == 4
    openssl("crl", "-in", file, "-noout", "-CAfile", directory / "intermediate.pem")
    trust = Trust.from_pem((directory / "ca.pem").read_bytes(), Revocations.from_bytes(file.read_bytes()))
    trust.verify(chain(good), "client", datetime.now(UTC))
    for each in (bad, worse):
        with pytest.raises(IdentityError, match="revoked"):
            trust.verify(chain(each), "client", datetime.now(UTC))
    refused = run("renew", "--ca", directory, bad)
    assert refused.exit_code == 1 and "was revoked" in refused.output

    assert run("show", "--ca", directory, good).exit_code == 0
    shown = run("show", "--ca", directory, bad)
    assert shown.exit_code == 1 and f"refused      revoked: {file} has it" in shown.output

    stranger = run("revoke", "--ca", directory, Pki(tmp_path / "other").agent().certificate)
    assert stranger.exit_code == 1 and "not of this CA" in stranger.output
    file.write_bytes(Pki(tmp_path / "another").authority.crl(None))
    assert "not of this CA" in run("crl", "--ca", directory).output
    file.write_bytes(b"junk")
    assert run("crl", "--ca", directory).exit_code == 1
    assert "no CRL" in run("crl", "--ca", directory).output


def serial(file: Path) -> int:
    return x509.load_pem_x509_certificates(file.read_bytes())[0].serial_number


def chain(file: Path) -> list[bytes]:
    return [each.public_bytes(Encoding.DER) for each in x509.load_pem_x509_certificates(file.read_bytes())]


def test_what_cannot_last_as_long_as_was_asked_for_is_told(tmp_path: Path) -> None:
    directory = tmp_path / "ca"
    run("init", "--ca", directory)
    ends = Authority.load(directory).intermediate.not_valid_after_utc
    told = f"is good until {ends:%Y-%m-%d %H:%M} UTC and no longer"
    agent = ("issue", "--ca", directory, "--agent", "web-app", "--out", tmp_path)
    kept, cut = run(*agent, "kept"), run(*agent, "cut", "--days", "3650")
    assert kept.exit_code == cut.exit_code == 0
    assert "no longer" not in kept.output
    assert f"{tmp_path / 'cut.pem'} {told}" in cut.stderr and "ztna ca init" in cut.stderr
    renewed = run("renew", "--ca", directory, tmp_path / "kept.pem", "--days", "3650")
    assert f"{tmp_path / 'kept.pem'} {told}" in renewed.stderr
    crl = run("crl", "--ca", directory, "--days", "3650")
    assert f"{directory / 'crl.pem'}, good until {ends:%Y-%m-%d %H:%M} UTC." in crl.stdout
    assert f"{directory / 'crl.pem'} {told}" in crl.stderr
    key, request = tmp_path / "far.key", tmp_path / "far.csr"
    openssl(
        *["req", "-new", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-subj", "/"],
        *("-keyout", key, "-out", request),
    )
    signed = run(
        *("sign-csr", "--ca", directory, request, "far", "--agent", "web-app"),
        *("--days", "3650", "--out", tmp_path / "far.pem"),
    )
    assert f"{tmp_path / 'far.pem'} {told}" in signed.stderr
