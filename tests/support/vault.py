"""What Vault's PKI engine gives out for the role of docs/certificates.md, and a stand-in that gives it to Nomad.

Run as a program, `vault.py DIRECTORY`, it answers what Nomad's client asks of a Vault on PORT: whether it is there, a
login by workload identity, the token's renewal, and the role's certificates when they are asked for as it demands.
"""

from __future__ import annotations

import http.server
import json
import sys
import tempfile
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509.oid import AuthorityInformationAccessOID, ExtendedKeyUsageOID, NameOID

from ztna.ca import write_private
from ztna.config import TlsConfig

PORT = 8200
TOKEN = "hvs.of-a-task"
ASKED = {
    "common_name": "rack-7",
    "alt_names": "connector.web-app.ztna,id.rack-7.ztna",
    "exclude_cn_from_sans": "true",
    "ttl": "24h",
}


def issue(directory: Path, key_type: str) -> TlsConfig:
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
    (directory / "rack-7.pem").write_bytes(leaf.public_bytes(pem) + root.public_bytes(pem))
    (directory / "ca.pem").write_bytes(root.public_bytes(pem))
    form = {
        "pkcs8": serialization.PrivateFormat.PKCS8,
        "default": serialization.PrivateFormat.TraditionalOpenSSL,
    }
    private = key.private_bytes(pem, form[key_type], serialization.NoEncryption())
    write_private(directory / "rack-7.key", private)
    return TlsConfig(
        certificate=str(directory / "rack-7.pem"),
        key=str(directory / "rack-7.key"),
        ca=str(directory / "ca.pem"),
    )


class _Vault(http.server.BaseHTTPRequestHandler):
    """What Vault's HTTP API answers at these paths, as far as Nomad reads it."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        if self.path.startswith("/v1/sys/seal-status"):
            self._answer(200, {"initialized": True, "sealed": False, "version": "1.19.0", "type": "shamir"})
        else:
            self._answer(404, {"errors": []})

    def do_PUT(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers.get("Content-Length", 0))) or b"{}")
        match self.path:
            case "/v1/auth/jwt-nomad/login" if asked.get("jwt", "").count(".") == 2:
                self._answer(200, self._auth())
            case "/v1/auth/token/renew-self" if self._is_known():
                self._answer(200, self._auth())
            case "/v1/pki/issue/rack-7" if self._is_known() and asked == ASKED:
                self._answer(200, {"request_id": "1", "lease_duration": 0, "data": issued()})
            case _:
                self._answer(403, {"errors": [f"permission denied: {self.path} {asked}"]})

    def _is_known(self) -> bool:
        return self.headers.get("X-Vault-Token") == TOKEN

    @staticmethod
    def _auth() -> dict[str, Any]:
        return {
            "auth": {"client_token": TOKEN, "policies": ["rack-7"], "lease_duration": 3600, "renewable": True}
        }

    def _answer(self, status: int, body: dict[str, Any]) -> None:
        text = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)


def issued() -> dict[str, Any]:
    """Return a new certificate as `pki/issue` does; its authority is left where the program was told to."""
    with tempfile.TemporaryDirectory() as scratch:
        tls = issue(Path(scratch), "default")
        chain, key = Path(tls.certificate).read_text(), Path(tls.key).read_text()
        (Path(sys.argv[1]) / "ca.pem").write_bytes(Path(tls.ca).read_bytes())
    end = "-----END CERTIFICATE-----"
    leaf, root = (f"{each.strip()}\n{end}" for each in chain.split(end)[:2])
    return {
        "certificate": leaf,
        "issuing_ca": root,
        "ca_chain": [root],
        "private_key": key.strip(),
        "private_key_type": "ec",
        "expiration": int(time.time()) + 24 * 3600,
    }


if __name__ == "__main__":
    http.server.ThreadingHTTPServer(("127.0.0.1", PORT), _Vault).serve_forever()
