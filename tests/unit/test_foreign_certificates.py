"""Certificates that others make are taken: those of the openssl command line, and as a Vault PKI role issues them."""

from __future__ import annotations

import ssl
import subprocess
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization

from tests.support import vault
from ztna.ca import write_private
from ztna.config import TlsConfig
from ztna.credentials import Credentials
from ztna.errors import IdentityError

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


@pytest.mark.parametrize("key_type", ["pkcs8", "default"])
def test_certificates_as_vault_issues_them_are_accepted(tmp_path: Path, key_type: str) -> None:
    config = vault.issue(tmp_path, key_type)
    identity = Credentials.load(config).identity
    assert identity.name == "rack-7" and identity.id_name == "rack-7" and identity.may_serve("web-app")  # type: ignore[arg-type]
    verdicts = Credentials.load(config).verdicts
    for usage in ("client", "server"):
        verdicts.verify(der(config), usage)  # type: ignore[arg-type]


def test_key_and_certificates_may_be_one_file_as_a_template_of_nomad_writes_it(tmp_path: Path) -> None:
    config = vault.issue(tmp_path, "default")
    identity = Credentials.load(config).identity
    one = tmp_path / "connector.pem"
    write_private(one, b"\n" + Path(config.key).read_bytes() + b"\n" + Path(config.certificate).read_bytes())
    both = TlsConfig(certificate=str(one), key=str(one), ca=config.ca)
    assert Credentials.load(both).identity == identity
    ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(both.certificate, both.key)
