"""What CRLs say of a path: revoked stays revoked, unknown keeps out, and only an issuer's own list counts."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, x25519

from tests.support.certificates import DAY, Pki, Presented, forge
from ztna import revocation
from ztna.errors import ConfigError, IdentityError
from ztna.identity import Trust
from ztna.reasons import Reason
from ztna.revocation import Revocations

NOW = datetime.now(UTC) + timedelta(hours=1)
"""When the paths are judged: later than any certificate here is made, however long other tests take before."""


@pytest.fixture
def pki(tmp_path: Path) -> Pki:
    return Pki(tmp_path)


def path_of(pki: Pki, presented: Presented) -> tuple[x509.Certificate, ...]:
    return Trust.from_pem(pki.ca_file.read_bytes()).verify(presented.der, "client", NOW).path


def crl(
    issuer: x509.Certificate,
    key: ec.EllipticCurvePrivateKey,
    *serials: int,
    until: datetime | None = None,
    since: datetime | None = None,
    extension: x509.ExtensionType | None = None,
) -> bytes:
    builder = x509.CertificateRevocationListBuilder(issuer_name=issuer.subject)
    builder = builder.last_update(since or NOW - DAY).next_update(until or NOW + DAY)
    for serial in serials:
        entry = x509.RevokedCertificateBuilder().serial_number(serial).revocation_date(NOW - DAY).build()
        builder = builder.add_revoked_certificate(entry)
    if extension is not None:
        builder = builder.add_extension(extension, critical=True)
    return builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)


def reason_of(
    revocations: Revocations, path: tuple[x509.Certificate, ...], now: datetime = NOW
) -> Reason | None:
    try:
        revocations.require(path, now)
    except IdentityError as error:
        return error.reason
    return None


def test_a_list_revokes_its_issuers_leaves_and_no_others(pki: Pki) -> None:
    good, bad = (path_of(pki, pki.signed(dns=["agent.db.ztna"])) for _ in range(2))
    authority = pki.authority
    revocations = Revocations.from_bytes(crl(authority.intermediate, authority.key, bad[0].serial_number))
    assert reason_of(revocations, good) is None
    assert reason_of(revocations, bad) is Reason.REVOKED
    assert revocations.revoked(good) is None
    assert str(bad[0].subject.rfc4514_string()) in str(revocations.revoked(bad))


def test_a_revoked_intermediate_takes_its_leaves_with_it(pki: Pki, tmp_path: Path) -> None:
    path = path_of(pki, pki.signed(dns=["agent.db.ztna"]))
    root_key = serialization.load_pem_private_key((tmp_path / "ca" / "ca.key").read_bytes(), None)
    assert isinstance(root_key, ec.EllipticCurvePrivateKey)
    leaves = crl(pki.authority.intermediate, pki.authority.key)
    above = crl(pki.authority.root, root_key, pki.authority.intermediate.serial_number)
    assert reason_of(Revocations.from_bytes(leaves + above), path) is Reason.REVOKED
    stale = crl(pki.authority.root, root_key, until=NOW - timedelta(minutes=1))
    assert reason_of(Revocations.from_bytes(leaves + stale), path) is Reason.POLICY_UNKNOWN


def test_without_a_list_of_the_leafs_issuer_nothing_is_known(pki: Pki) -> None:
    path = path_of(pki, pki.signed(dns=["agent.db.ztna"]))
    rogue = pki.rogue
    assert reason_of(Revocations(()), path) is Reason.POLICY_UNKNOWN
    for other in (crl(rogue.intermediate, rogue.key), crl(pki.authority.intermediate, rogue.key)):
        revocations = Revocations.from_bytes(other)
        assert reason_of(revocations, path) is Reason.POLICY_UNKNOWN
        assert "no CRL of" in str(revocations.unknown(path, NOW))


def test_a_list_out_of_date_keeps_out_but_still_revokes(pki: Pki) -> None:
    good, bad = (path_of(pki, pki.signed(dns=["agent.db.ztna"])) for _ in range(2))
    authority = pki.authority
    until = NOW + timedelta(hours=1)
    revocations = Revocations.from_bytes(
        crl(authority.intermediate, authority.key, bad[0].serial_number, until=until)
    )
    assert reason_of(revocations, good, until - timedelta(seconds=1)) is None
    assert reason_of(revocations, good, until) is Reason.POLICY_UNKNOWN
    assert reason_of(revocations, bad, until) is Reason.REVOKED
    assert revocations.next_update is not None and abs(revocations.next_update - until) < timedelta(seconds=1)
    assert Revocations(()).next_update is None


def test_of_two_lists_of_an_issuer_the_newest_counts(pki: Pki) -> None:
    path = path_of(pki, pki.signed(dns=["agent.db.ztna"]))
    authority = pki.authority
    old = crl(authority.intermediate, authority.key, since=NOW - 2 * DAY)
    new = crl(authority.intermediate, authority.key, path[0].serial_number)
    assert reason_of(Revocations.from_bytes(old + new), path) is Reason.REVOKED
    assert reason_of(Revocations.from_bytes(new + old), path) is Reason.REVOKED


def test_a_list_that_is_missing_now_counts_until_it_is_out_of_date_and_then_closes_the_door(pki: Pki) -> None:
    path = path_of(pki, pki.signed(dns=["agent.db.ztna"]))
    until = NOW + timedelta(hours=1)
    before = Revocations.from_bytes(crl(pki.authority.intermediate, pki.authority.key, until=until))
    assert before.unknown(path, NOW) is None
    # By mistake another CA's list takes its place, and that one is good for long.
    mistaken = Revocations.from_bytes(crl(pki.rogue.intermediate, pki.rogue.key, until=NOW + DAY), before)
    assert mistaken.next_update is not None and mistaken.next_update > until
    assert mistaken.unknown(path, until - timedelta(seconds=1)) is None
    assert "out of date" in str(mistaken.unknown(path, until))


def test_until_when_lists_tell_is_remembered_within_bounds(pki: Pki, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(revocation, "STANDING_MAX", 1)
    path = path_of(pki, pki.signed(dns=["agent.db.ztna"]))
    revocations = Revocations.from_bytes(crl(pki.authority.intermediate, pki.authority.key))
    for _ in range(2):
        assert revocations.unknown(path, NOW) is None
        assert "no CRL of" in str(revocations.unknown((path[0], pki.rogue.intermediate), NOW))
        assert len(revocations._standing) == 1


def test_der_and_pem_are_read(pki: Pki) -> None:
    pem = crl(pki.authority.intermediate, pki.authority.key)
    der = x509.load_pem_x509_crl(pem).public_bytes(serialization.Encoding.DER)
    assert Revocations.from_bytes(der).lists[0].issuer == Revocations.from_bytes(pem).lists[0].issuer


@pytest.mark.parametrize("data", [b"", b"junk", b"-----BEGIN X509 CRL-----\nAAAA\n-----END X509 CRL-----\n"])
def test_what_is_no_list_is_refused(data: bytes) -> None:
    with pytest.raises(ConfigError, match="no CRL"):
        Revocations.from_bytes(data)


def test_a_partial_list_and_too_many_lists_are_refused(pki: Pki, monkeypatch: pytest.MonkeyPatch) -> None:
    authority = pki.authority
    delta = crl(authority.intermediate, authority.key, extension=x509.DeltaCRLIndicator(1))
    with pytest.raises(ConfigError, match="complete"):
        Revocations.from_bytes(delta)
    monkeypatch.setattr(revocation, "LISTS_MAX", 1)
    with pytest.raises(ConfigError, match="at most 1"):
        Revocations.from_bytes(2 * crl(authority.intermediate, authority.key))


def test_a_list_that_never_ends_is_refused(pki: Pki, tmp_path: Path) -> None:
    class Endless:
        issuer = pki.authority.intermediate.subject
        extensions: tuple[object, ...] = ()
        next_update_utc = None

    with pytest.raises(ConfigError, match="nextUpdate"):
        revocation.RevocationList.of(Endless())  # type: ignore[arg-type]


def test_an_issuer_whose_key_cannot_sign_has_no_list(pki: Pki) -> None:
    subject = pki.authority.intermediate.subject
    odd = (
        x509.CertificateBuilder(subject, subject, x25519.X25519PrivateKey.generate().public_key(), 1, NOW, NOW + DAY)
        .sign(pki.authority.key, hashes.SHA256())
    )  # fmt: skip
    leaf, _ = forge((pki.authority.intermediate, pki.authority.key))
    revocations = Revocations.from_bytes(crl(pki.authority.intermediate, pki.authority.key))
    assert "no CRL of" in str(revocations.unknown((leaf, odd), NOW))
    other = ed25519.Ed25519PrivateKey.generate().public_key()
    strange = x509.CertificateBuilder(subject, subject, other, 2, NOW, NOW + DAY).sign(
        pki.authority.key, hashes.SHA256()
    )
    assert "no CRL of" in str(revocations.unknown((leaf, strange), NOW))


def test_an_older_list_takes_nothing_back(pki: Pki) -> None:
    """Who repeats to a daemon what was true before somebody was revoked gives that one nothing."""
    issuer, key = pki.authority.intermediate, pki.authority.key
    bad = pki.signed(dns=["agent.db.ztna"])
    path = path_of(pki, bad)
    older = crl(issuer, key, since=NOW - 2 * DAY)
    newer = Revocations.from_bytes(crl(issuer, key, bad.chain[0].serial_number))
    assert reason_of(newer, path) is Reason.REVOKED
    replayed = Revocations.from_bytes(older, newer)
    again = Revocations.from_bytes(older, replayed)
    assert reason_of(replayed, path) is reason_of(again, path) is Reason.REVOKED
    assert reason_of(Revocations((), again), path) is Reason.REVOKED
    newest = Revocations.from_bytes(crl(issuer, key, since=NOW - DAY / 2), again)
    assert reason_of(newest, path) is None, "its issuer took that back"
    forged = crl(issuer, pki.rogue.key, since=NOW)
    assert reason_of(Revocations.from_bytes(forged, newer), path) is Reason.REVOKED


def test_a_list_of_another_version_is_refused(pki: Pki) -> None:
    pem = crl(pki.authority.intermediate, pki.authority.key)
    der = x509.load_pem_x509_crl(pem).public_bytes(serialization.Encoding.DER)
    with pytest.raises(ConfigError, match="not a valid CRL version"):
        Revocations.from_bytes(der.replace(b"\x02\x01\x01", b"\x02\x01\x05", 1))


def test_a_file_that_is_cut_off_is_refused(pki: Pki) -> None:
    pem = crl(pki.authority.intermediate, pki.authority.key)
    with pytest.raises(ConfigError, match="cut off"):
        Revocations.from_bytes(pem + pem[:-40])
