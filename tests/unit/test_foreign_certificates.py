"""Certificates that others make are taken: those of the openssl command line, and as a Vault PKI role issues them."""

from __future__ import annotations

import ssl
import subprocess
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509.oid import AuthorityInformationAccessOID, ExtendedKeyUsageOID, NameOID

from ztna.ca import write_private
from ztna.config import TlsConfig
from ztna.credentials import Credentials
from ztna.errors import IdentityError
from ztna.identity import Identity

CONFIGURATION = """
[ca]
default_ca = mesh
[mesh]
database = index.txt
serial = serial
crlnumber = crlnumber
default_md = sha256
default_crl_days = 1
[root]
basicConstraints = critical, CA:true
keyUsage = critical, keyCertSign, cRLSign
subjectKeyIdentifier = hash
[agent]
basicConstraints = critical, CA:false
keyUsage = critical, digitalSignature
extendedKeyUsage = clientAuth
subjectKeyIdentifier = hash
authorityKeyIdentifier = keyid
subjectAltName = DNS:agent.web-app.ztna, URI:spiffe://example.net/laptop
[connector]
basicConstraints = critical, CA:false
keyUsage = critical, digitalSignature
extendedKeyUsage = clientAuth, serverAuth
subjectKeyIdentifier = hash
authorityKeyIdentifier = keyid
subjectAltName = DNS:connector.web-app.ztna, DNS:id.rack-7.ztna
[relay]
basicConstraints = critical, CA:false
keyUsage = critical, digitalSignature
extendedKeyUsage = serverAuth
subjectKeyIdentifier = hash
authorityKeyIdentifier = keyid
subjectAltName = DNS:relay.edge.ztna
"""


class OpenSsl:
    """A CA that only the openssl command line has touched."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        (directory / "openssl.cnf").write_text(CONFIGURATION)
        (directory / "index.txt").write_text("")
        (directory / "crlnumber").write_text("01\n")
        self._key("ca")
        self.run(
            *("req", "-x509", "-new", "-key", "ca.key", "-subj", "/CN=Example CA", "-days", "30"),
            *("-config", "openssl.cnf", "-extensions", "root", "-out", "ca.pem"),
        )

    def run(self, *arguments: str) -> None:
        done = subprocess.run(
            ["openssl", *arguments], cwd=self.directory, capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 0, done.stderr

    def issue(self, role: str) -> TlsConfig:
        self._key(role)
        self.run("req", "-new", "-key", f"{role}.key", "-subj", f"/CN={role}", "-out", f"{role}.csr")
        self.run(
            *("x509", "-req", "-in", f"{role}.csr", "-CA", "ca.pem", "-CAkey", "ca.key", "-CAcreateserial"),
            *("-days", "7", "-extfile", "openssl.cnf", "-extensions", role, "-out", f"{role}.pem"),
        )
        at = self.directory
        return TlsConfig(
            certificate=str(at / f"{role}.pem"), key=str(at / f"{role}.key"), ca=str(at / "ca.pem")
        )

    def revoke(self, role: str) -> Path:
        authority = ("-config", "openssl.cnf", "-cert", "ca.pem", "-keyfile", "ca.key")
        if role:
            self.run("ca", *authority, "-revoke", f"{role}.pem")
        self.run("ca", *authority, "-gencrl", "-out", "crl.pem")
        return self.directory / "crl.pem"

    def _key(self, name: str) -> None:
        self.run("ecparam", "-name", "prime256v1", "-genkey", "-noout", "-out", f"{name}.key")
        (self.directory / f"{name}.key").chmod(0o600)


def der(config: TlsConfig) -> list[bytes]:
    chain = x509.load_pem_x509_certificates(Path(config.certificate).read_bytes())
    return [each.public_bytes(serialization.Encoding.DER) for each in chain]


def test_certificates_and_crls_of_openssl_are_accepted(tmp_path: Path) -> None:
    authority = OpenSsl(tmp_path)
    agent, connector, relay = (authority.issue(role) for role in ("agent", "connector", "relay"))
    identities = [Credentials.load(each).identity for each in (agent, connector, relay)]
    assert identities[0].name == "spiffe://example.net/laptop" and identities[0].agent.services == {"web-app"}
    assert identities[1].name == "connector" and identities[1].id_name == "rack-7"
    assert identities[2].relay == "edge"

    crl = str(authority.revoke(""))
    strict = TlsConfig(certificate=relay.certificate, key=relay.key, ca=relay.ca, crl_file=crl)
    Credentials.load(strict).verdicts.verify(der(agent), "client")
    authority.revoke("agent")
    verdicts = Credentials.load(strict).verdicts
    verdicts.verify(der(connector), "client")
    with pytest.raises(IdentityError, match="revoked"):
        verdicts.verify(der(agent), "client")


def vault(tmp_path: Path, key_type: str) -> tuple[TlsConfig, Identity]:
    """Issue as a role of Vault's PKI engine does with the settings of docs/certificates.md.

    What is particular to it: an RSA root of Vault's own, key usages of the role's defaults beside the signature, AIA
    and CRL distribution points, NotBefore 30 s ago, `ca_chain` after the certificate.
    """
    now = datetime.now(UTC)
    root_key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    root_name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "example.net")])
    root = (
        x509.CertificateBuilder(root_name, root_name, root_key.public_key(), 7)
        .not_valid_before(now - timedelta(seconds=30))
        .not_valid_after(now + timedelta(days=365))
        .add_extension(x509.KeyUsage(False, False, False, False, False, True, True, False, False), True)
        .add_extension(x509.BasicConstraints(True, None), True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(root_key.public_key()), False)
        .sign(root_key, hashes.SHA256())
    )
    key = ec.generate_private_key(ec.SECP256R1())
    names: list[x509.GeneralName] = [x509.DNSName("connector.web-app.ztna"), x509.DNSName("id.rack-7.ztna")]
    access = x509.AccessDescription(
        AuthorityInformationAccessOID.CA_ISSUERS, x509.UniformResourceIdentifier("http://vault/v1/pki/ca")
    )
    point = x509.DistributionPoint(
        [x509.UniformResourceIdentifier("http://vault/v1/pki/crl")], None, None, None
    )
    usages = [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]
    leaf = (
        x509.CertificateBuilder(root_name, x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "rack-7")]))
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(seconds=30))
        .not_valid_after(now + timedelta(hours=72))
        .add_extension(x509.KeyUsage(True, False, True, False, True, False, False, False, False), True)
        .add_extension(x509.ExtendedKeyUsage(usages), False)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(root_key.public_key()), False)
        .add_extension(x509.AuthorityInformationAccess([access]), False)
        .add_extension(x509.SubjectAlternativeName(names), False)
        .add_extension(x509.CRLDistributionPoints([point]), False)
        .sign(root_key, hashes.SHA256())
    )
    pem = serialization.Encoding.PEM
    (tmp_path / "rack-7.pem").write_bytes(leaf.public_bytes(pem) + root.public_bytes(pem))
    (tmp_path / "ca.pem").write_bytes(root.public_bytes(pem))
    form = {
        "pkcs8": serialization.PrivateFormat.PKCS8,
        "default": serialization.PrivateFormat.TraditionalOpenSSL,
    }
    private = key.private_bytes(pem, form[key_type], serialization.NoEncryption())
    write_private(tmp_path / "rack-7.key", private)
    config = TlsConfig(
        certificate=str(tmp_path / "rack-7.pem"),
        key=str(tmp_path / "rack-7.key"),
        ca=str(tmp_path / "ca.pem"),
    )
    return config, Credentials.load(config).identity


@pytest.mark.parametrize("key_type", ["pkcs8", "default"])
def test_certificates_as_vault_issues_them_are_accepted(tmp_path: Path, key_type: str) -> None:
    config, identity = vault(tmp_path, key_type)
    assert identity.name == "rack-7" and identity.id_name == "rack-7" and identity.may_serve("web-app")  # type: ignore[arg-type]
    verdicts = Credentials.load(config).verdicts
    for usage in ("client", "server"):
        verdicts.verify(der(config), usage)  # type: ignore[arg-type]


def test_key_and_certificates_may_be_one_file_as_a_template_of_nomad_writes_it(tmp_path: Path) -> None:
    config, identity = vault(tmp_path, "default")
    one = tmp_path / "connector.pem"
    write_private(one, b"\n" + Path(config.key).read_bytes() + b"\n" + Path(config.certificate).read_bytes())
    both = TlsConfig(certificate=str(one), key=str(one), ca=config.ca)
    assert Credentials.load(both).identity == identity
    ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(both.certificate, both.key)
