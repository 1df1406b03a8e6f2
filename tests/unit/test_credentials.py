"""Own certificate, key and trust from files: what cannot be used is refused at start, naming the file."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import ssl
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa

from tests.support.certificates import DAY, Pki
from ztna.config import TlsConfig
from ztna.credentials import Credentials
from ztna.errors import ConfigError


@pytest.fixture
def pki(tmp_path: Path) -> Pki:
    return Pki(tmp_path)


def refused(config: TlsConfig) -> str:
    with pytest.raises(ConfigError) as caught:
        Credentials.load(config)
    return str(caught.value)


def test_good_files_load_and_the_key_is_not_printed(pki: Pki) -> None:
    for config in (pki.agent(), pki.connector(), pki.relay()):
        credentials = Credentials.load(config)
        assert len(credentials.chain) == 2
        assert "PrivateKey" not in repr(credentials) and "PRIVATE" not in repr(credentials)
    assert credentials.identity.relay == "relay-1"


def test_a_key_that_others_can_read_is_refused(pki: Pki) -> None:
    config = pki.agent()
    Path(config.key).chmod(0o640)
    assert "0600" in refused(config)
    Path(config.key).chmod(0o400)
    Credentials.load(config)


def test_files_that_do_not_belong_together_are_refused(pki: Pki, tmp_path: Path) -> None:
    one, other = pki.agent(), pki.relay()
    assert "not the key of" in refused(TlsConfig(certificate=one.certificate, key=other.key, ca=one.ca))
    rogue = str(tmp_path / "rogue" / "ca.pem")
    assert "untrusted" in refused(TlsConfig(certificate=one.certificate, key=one.key, ca=rogue))


def test_missing_and_unreadable_files_are_named(pki: Pki, tmp_path: Path) -> None:
    good = pki.agent()
    junk = tmp_path / "junk"
    junk.write_text("junk")
    junk.chmod(0o600)
    for field in ("certificate", "key", "ca"):
        fields = {"certificate": good.certificate, "key": good.key, "ca": good.ca}
        assert "missing" in refused(TlsConfig(**{**fields, field: str(tmp_path / "missing")}))
        refused(TlsConfig(**{**fields, field: str(junk)}))


def test_an_rsa_key_is_refused(pki: Pki, tmp_path: Path) -> None:
    key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    pem = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    file = tmp_path / "rsa.key"
    file.write_bytes(pem)
    file.chmod(0o600)
    good = pki.agent()
    assert "expected an EC or Ed25519" in refused(
        TlsConfig(certificate=good.certificate, key=str(file), ca=good.ca)
    )


def test_an_expired_or_ungranted_certificate_does_not_start(pki: Pki) -> None:
    identity = pki.credentials(pki.agent()).identity
    expired = pki.signed(dns=["agent.db.ztna"], not_after=identity.not_before)
    assert "expired" in refused(pki.write(expired.chain_pem, expired.key_pem))
    bare = pki.signed()
    assert "no ZTNA SAN" in refused(pki.write(bare.chain_pem, bare.key_pem))
    late = pki.agent()
    with pytest.raises(ConfigError, match="expired"):
        Credentials.load(late, now=identity.not_after + DAY)


def test_contexts_are_tls_13_with_certificates_both_ways(pki: Pki) -> None:
    credentials = pki.credentials(pki.connector())
    for context in (credentials.server_context("ztna-stream"), credentials.client_context("ztna-stream")):
        assert context.minimum_version is ssl.TLSVersion.TLSv1_3
        assert context.verify_mode is ssl.CERT_REQUIRED
        assert not context.check_hostname
    assert credentials.server_context("ztna-stream").num_tickets == 0


def test_tls_contexts_are_of_what_was_read_together(pki: Pki) -> None:
    """Files that are being renewed, or are gone, are not looked at again behind the owner's back."""
    config = pki.connector()
    credentials = Credentials.load(config)
    other = pki.agent("somebody-else")
    Path(config.certificate).write_bytes(Path(other.certificate).read_bytes())
    Path(config.key).unlink()
    Path(config.ca).unlink()
    server, client = credentials.server_context("x"), credentials.client_context("x")
    near, far = ssl.MemoryBIO(), ssl.MemoryBIO()
    ends = (server.wrap_bio(near, far, server_side=True), client.wrap_bio(far, near, server_side=False))
    for _ in range(4):
        for end in ends:
            with contextlib.suppress(ssl.SSLWantReadError):
                end.do_handshake()
    shown = ends[1].getpeercert(binary_form=True)
    assert shown is not None
    assert hashlib.sha256(shown).hexdigest() == credentials.identity.fingerprint


def test_a_key_of_an_unknown_kind_is_refused_like_any(pki: Pki) -> None:
    """On a curve that nobody here knows `cryptography` raises what is no ValueError."""
    config = pki.agent()
    p256, unknown = bytes.fromhex("06082a8648ce3d030107"), bytes.fromhex("06082a8648ce3d030104")
    key = Path(config.key)
    private = serialization.load_pem_private_key(key.read_bytes(), None)
    der = private.private_bytes(
        serialization.Encoding.DER, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    good = key.read_bytes()
    body = base64.encodebytes(der.replace(p256, unknown))
    key.write_bytes(b"-----BEGIN PRIVATE KEY-----\n" + body + b"-----END PRIVATE KEY-----\n")
    assert "no unencrypted private key" in refused(config)
    key.write_bytes(good)
    certificate = Path(config.certificate)
    leaf = x509.load_pem_x509_certificate(certificate.read_bytes())
    der = leaf.public_bytes(serialization.Encoding.DER)
    for bad, why in (
        (der.replace(p256, unknown), "is not the key of"),
        (der.replace(b"\xa0\x03\x02\x01\x02", b"\xa0\x03\x02\x01\x07", 1), "holds no certificates"),
    ):
        body = base64.encodebytes(bad)
        certificate.write_bytes(b"-----BEGIN CERTIFICATE-----\n" + body + b"-----END CERTIFICATE-----\n")
        assert why in refused(config)
    Path(config.ca).write_bytes(certificate.read_bytes())
    assert "cannot be read as PEM" in refused(config)
