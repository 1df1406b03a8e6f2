"""Certificates for tests, made in milliseconds: good ones by ztna.ca, and every bad one to be refused."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import MappingProxyType

import msgspec
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from ztna.ca import Authority, replace_file, write_private
from ztna.config import TlsConfig
from ztna.credentials import Credentials
from ztna.reasons import Reason

CLIENT = ExtendedKeyUsageOID.CLIENT_AUTH
SERVER = ExtendedKeyUsageOID.SERVER_AUTH
BOTH = (CLIENT, SERVER)
DAY = timedelta(days=1)
BAD_CHAINS = (
    "self_signed",
    "rogue_ca",
    "rogue_leaf_beside_true_ca",
    "rogue_leaf_before_true_leaf",
    "no_sans",
    "foreign_sans",
    "unknown_san_under_ztna",
    "wrong_eku",
    "no_eku",
    "ca_as_leaf",
    "expired",
    "not_yet_valid",
)


@dataclass(frozen=True)
class Presented:
    """A chain and the key of its leaf, as a peer presents them."""

    chain: tuple[x509.Certificate, ...]
    key: ec.EllipticCurvePrivateKey | ed25519.Ed25519PrivateKey

    @classmethod
    def load(cls, chain: str, key: str) -> Presented:
        """Read a chain and its key, as files have them."""
        private = serialization.load_pem_private_key(Path(key).read_bytes(), None)
        assert isinstance(private, ec.EllipticCurvePrivateKey | ed25519.Ed25519PrivateKey)
        return cls(tuple(x509.load_pem_x509_certificates(Path(chain).read_bytes())), private)

    @property
    def der(self) -> list[bytes]:
        return [each.public_bytes(serialization.Encoding.DER) for each in self.chain]

    @property
    def chain_pem(self) -> bytes:
        return b"".join(each.public_bytes(serialization.Encoding.PEM) for each in self.chain)

    @property
    def key_pem(self) -> bytes:
        return self.key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )


@dataclass(frozen=True)
class Bad:
    """A chain to be refused already by the handshake, and with which reason."""

    presented: Presented | None
    reason: Reason


def forge(
    issuer: tuple[x509.Certificate, ec.EllipticCurvePrivateKey] | None,
    *,
    dns: Sequence[str] = (),
    uris: Sequence[str] = (),
    cn: str = "forged",
    eku: Sequence[x509.ObjectIdentifier] = BOTH,
    not_before: datetime | None = None,
    not_after: datetime | None = None,
    ca: bool = False,
    key_usage: bool = True,
    path_length: int | None = None,
    constraints: x509.NameConstraints | None = None,
    digital_signature: bool = True,
    cert_sign: bool = True,
    extra: x509.ExtensionType | None = None,
) -> tuple[x509.Certificate, ec.EllipticCurvePrivateKey]:
    """Make any certificate, sensible or not; without an issuer it signs itself."""
    now = datetime.now(UTC)
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, cn)] if cn else [])
    signer = issuer[1] if issuer else key
    builder = x509.CertificateBuilder(
        issuer_name=issuer[0].subject if issuer else subject,
        subject_name=subject,
        public_key=key.public_key(),
        serial_number=x509.random_serial_number(),
        not_valid_before=not_before or now - DAY,
        not_valid_after=not_after or now + DAY,
    )
    builder = builder.add_extension(x509.BasicConstraints(ca, path_length), critical=True)
    builder = builder.add_extension(
        x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False
    )
    identifier = x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.public_key())
    builder = builder.add_extension(identifier, critical=False)
    if key_usage:
        flags = (digital_signature, False, False, False, False, ca and cert_sign, ca, False, False)
        builder = builder.add_extension(x509.KeyUsage(*flags), critical=True)
    if eku:
        builder = builder.add_extension(x509.ExtendedKeyUsage(list(eku)), critical=False)
    if constraints:
        builder = builder.add_extension(constraints, critical=True)
    if extra:
        builder = builder.add_extension(extra, critical=False)
    if dns or uris:
        names: list[x509.GeneralName] = [x509.DNSName(each) for each in dns]
        names += [x509.UniformResourceIdentifier(each) for each in uris]
        builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
    return builder.sign(signer, hashes.SHA256()), key


class Pki:
    """One true CA and one rogue CA in a directory, and certificates of both."""

    BAD_NAMES = MappingProxyType({"server": BAD_CHAINS, "client": (*BAD_CHAINS, "no_certificate")})

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.authority = Authority.create(directory / "ca", "Test CA")
        self.rogue = Authority.create(directory / "rogue", "Rogue CA")
        self._numbers = itertools.count()

    @property
    def ca_file(self) -> Path:
        return self.directory / "ca" / "ca.pem"

    @property
    def crl_file(self) -> Path:
        return self.directory / "crl.pem"

    def write(self, chain_pem: bytes, key_pem: bytes) -> TlsConfig:
        """Write a chain and its key to files of their own."""
        number = next(self._numbers)
        certificate, key = self.directory / f"{number}.pem", self.directory / f"{number}.key"
        certificate.write_bytes(chain_pem)
        write_private(key, key_pem)
        return TlsConfig(certificate=str(certificate), key=str(key), ca=str(self.ca_file))

    def agent(self, name: str = "agent-1", services: Sequence[str] = ("echo-service",)) -> TlsConfig:
        return self.write(*self.authority.issue(name, agent=services))

    def connector(
        self, connector_id: str = "connector-1", services: Sequence[str] = ("echo-service",), name: str = ""
    ) -> TlsConfig:
        chain = self.authority.issue(name or connector_id, connector=services, connector_id=connector_id)
        return self.write(*chain)

    def relay(self, name: str = "relay-1") -> TlsConfig:
        return self.write(*self.authority.issue(name, relay=name))

    def with_crl(self, config: TlsConfig) -> TlsConfig:
        """Have it go by the CRL that `revoke` writes."""
        if not self.crl_file.exists():
            self.revoke()
        return msgspec.structs.replace(config, crl_file=str(self.crl_file))

    def revoke(self, *configs: TlsConfig, until: datetime | None = None) -> None:
        """Write the CRL anew, with these certificates and all before them."""
        days = (until - datetime.now(UTC)) / DAY if until is not None else 1.0
        leaves = [x509.load_pem_x509_certificates(Path(each.certificate).read_bytes())[0] for each in configs]
        before = self.crl_file.read_bytes() if self.crl_file.exists() else None
        replace_file(self.crl_file, self.authority.crl(before, leaves, days=days))

    def credentials(self, config: TlsConfig) -> Credentials:
        return Credentials.load(config)

    def signed(self, authority: Authority | None = None, **extensions: object) -> Presented:
        """Forge a leaf under the CA's intermediate; `extensions` as forge takes them."""
        signer = authority or self.authority
        leaf, key = forge((signer.intermediate, signer.key), **extensions)  # type: ignore[arg-type]
        return Presented((leaf, signer.intermediate), key)

    def bad(self, dns: Sequence[str], usage: str) -> dict[str, Bad]:
        """Return every chain that a handshake must refuse, by name, with SANs that would grant `dns`.

        `usage` is how the peer presents it: `client` or `server`. Source: design.md 5.
        """
        own, other = (CLIENT, SERVER) if usage == "client" else (SERVER, CLIENT)
        now = datetime.now(UTC)
        lone, lone_key = forge(None, dns=dns)
        rogue = self.signed(self.rogue, dns=dns)
        beside = (rogue.chain[0], self.authority.intermediate, self.authority.root)
        true_leaf, _ = forge((self.authority.intermediate, self.authority.key), dns=dns)
        chains = {
            "self_signed": Bad(Presented((lone,), lone_key), Reason.UNTRUSTED),
            "rogue_ca": Bad(rogue, Reason.UNTRUSTED),
            "rogue_leaf_beside_true_ca": Bad(Presented(beside, rogue.key), Reason.UNTRUSTED),
            "rogue_leaf_before_true_leaf": Bad(
                Presented((rogue.chain[0], true_leaf, *beside[1:]), rogue.key), Reason.UNTRUSTED
            ),
            "no_sans": Bad(self.signed(eku=(own,)), Reason.NO_GRANT),
            "foreign_sans": Bad(self.signed(dns=["www.example.org"], eku=(own,)), Reason.NO_GRANT),
            "unknown_san_under_ztna": Bad(self.signed(dns=[*dns, "admin.ztna"]), Reason.NO_GRANT),
            "wrong_eku": Bad(self.signed(dns=dns, eku=(other,)), Reason.NO_GRANT),
            "no_eku": Bad(self.signed(dns=dns, eku=()), Reason.NO_GRANT),
            "ca_as_leaf": Bad(self.signed(dns=dns, ca=True), Reason.NO_GRANT),
            "expired": Bad(
                self.signed(dns=dns, not_before=now - 2 * DAY, not_after=now - DAY), Reason.EXPIRED
            ),
            "not_yet_valid": Bad(
                self.signed(dns=dns, not_before=now + DAY, not_after=now + 2 * DAY), Reason.EXPIRED
            ),
        }
        if usage == "client":
            chains["no_certificate"] = Bad(None, Reason.NO_CERTIFICATE)
        assert tuple(chains) == self.BAD_NAMES[usage]
        return chains
