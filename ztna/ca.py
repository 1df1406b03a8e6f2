"""A certificate authority in a directory: a root, an intermediate that signs, and the leaves of design.md 5.

The root's key is only used to sign the intermediate and may be moved away afterwards. Does not judge
certificates: ztna.identity does.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Literal

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.hazmat.primitives.asymmetric.types import CertificateIssuerPublicKeyTypes
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from ztna.errors import ConfigError
from ztna.names import ConnectorId, ServiceName, is_label
from ztna.revocation import MALFORMED, unreadable

KeyKind = Literal["ec", "ed25519"]
LeafKey = ec.EllipticCurvePrivateKey | ed25519.Ed25519PrivateKey
LeafPublicKey = ec.EllipticCurvePublicKey | ed25519.Ed25519PublicKey

ROOT_DAYS = 3650
INTERMEDIATE_DAYS = 1825
LEAF_DAYS = 90
CRL_DAYS = 7
BACKDATE = timedelta(minutes=5)
TRUST_DOMAIN = "ztna"
EVERY = "*"

ROOT_CERTIFICATE = "ca.pem"
ROOT_KEY = "ca.key"
INTERMEDIATE_CERTIFICATE = "intermediate.pem"
INTERMEDIATE_KEY = "intermediate.key"
CRL = "crl.pem"

_PEER_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")


@dataclass(frozen=True, slots=True)
class Authority:
    """The signing half of a CA: the root's certificate, and the intermediate with its key."""

    root: x509.Certificate
    intermediate: x509.Certificate
    key: ec.EllipticCurvePrivateKey

    @classmethod
    def create(cls, directory: Path, name: str, *, now: datetime | None = None) -> Authority:
        """Make a root and an intermediate and write them: `ca.pem`, `ca.key`, `intermediate.pem`, `.key`.

        Raises ConfigError when the directory already holds a CA. Keys are written with mode 0600.
        """
        for file in (ROOT_CERTIFICATE, ROOT_KEY, INTERMEDIATE_CERTIFICATE, INTERMEDIATE_KEY):
            if (directory / file).exists():
                raise ConfigError(f"{directory / file} exists already; choose another directory for a new CA")
        moment = now or datetime.now(UTC)
        root_key = ec.generate_private_key(ec.SECP256R1())
        root = _authority(name, root_key, None, root_key, moment, ROOT_DAYS, 1)
        key = ec.generate_private_key(ec.SECP256R1())
        intermediate = _authority(f"{name} intermediate", key, root, root_key, moment, INTERMEDIATE_DAYS, 0)
        try:
            directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"{directory} cannot be made: {error.strerror}") from None
        write_private(directory / ROOT_KEY, _key_pem(root_key))
        write_private(directory / INTERMEDIATE_KEY, _key_pem(key))
        (directory / ROOT_CERTIFICATE).write_bytes(_pem(root))
        (directory / INTERMEDIATE_CERTIFICATE).write_bytes(_pem(intermediate))
        return cls(root, intermediate, key)

    @classmethod
    def load(cls, directory: Path) -> Authority:
        """Read a CA that `create` wrote; the root's key may be gone. Raises ConfigError."""
        try:
            root = x509.load_pem_x509_certificate((directory / ROOT_CERTIFICATE).read_bytes())
            intermediate = x509.load_pem_x509_certificate((directory / INTERMEDIATE_CERTIFICATE).read_bytes())
            key = serialization.load_pem_private_key((directory / INTERMEDIATE_KEY).read_bytes(), None)
        except FileNotFoundError as error:
            raise ConfigError(
                f"no CA in {directory}: no {error.filename}; `ztna ca init` makes one"
            ) from None
        except OSError as error:
            raise ConfigError(f"{error.filename} cannot be read: {error.strerror}") from None
        except (ValueError, TypeError) as error:
            raise ConfigError(f"no CA to be read in {directory}: {unreadable(error)}") from None
        if not isinstance(key, ec.EllipticCurvePrivateKey) or key.public_key() != intermediate.public_key():
            raise ConfigError(f"{directory / INTERMEDIATE_KEY} is not the key of {INTERMEDIATE_CERTIFICATE}")
        return cls(root, intermediate, key)

    @property
    def ca_pem(self) -> bytes:
        """The root's certificate: what every daemon trusts."""
        return _pem(self.root)

    def issue(
        self,
        name: str,
        *,
        agent: Sequence[str] = (),
        connector: Sequence[str] = (),
        relay: str | None = None,
        connector_id: str | None = None,
        days: float = LEAF_DAYS,
        key: KeyKind = "ec",
        now: datetime | None = None,
    ) -> tuple[bytes, bytes]:
        """Return a leaf's chain (leaf, intermediate) and its key, both PEM.

        `agent` and `connector` are the services granted, `*` for all; a connector needs `connector_id`, of
        which the certificate carries the part before `--`. Raises ConfigError, or BadName for a bad service.
        """
        names = _alternative_names(name, agent, connector, relay, connector_id)
        private = (
            ec.generate_private_key(ec.SECP256R1()) if key == "ec" else ed25519.Ed25519PrivateKey.generate()
        )
        usages = _extended_usages(bool(agent), bool(connector), relay is not None)
        return self._sign(name, names, usages, private.public_key(), days, now), _key_pem(private)

    def sign_request(
        self,
        request_pem: bytes,
        name: str,
        *,
        agent: Sequence[str] = (),
        connector: Sequence[str] = (),
        relay: str | None = None,
        connector_id: str | None = None,
        days: float = LEAF_DAYS,
        now: datetime | None = None,
    ) -> bytes:
        """Return the chain of a leaf for the key of a certificate signing request (PEM).

        What it grants is said here, as for `issue`: nothing that a request asks for is taken over. Raises ConfigError.
        """
        try:
            request = x509.load_pem_x509_csr(request_pem)
        except ValueError as error:
            raise ConfigError(f"no certificate signing request in PEM: {unreadable(error)}") from None
        if not request.is_signature_valid:
            raise ConfigError("the signing request is not signed with its own key")
        public = _leaf_key(request.public_key())
        names = _alternative_names(name, agent, connector, relay, connector_id)
        usages = _extended_usages(bool(agent), bool(connector), relay is not None)
        return self._sign(name, names, usages, public, days, now)

    def renew(
        self,
        chain_pem: bytes,
        *,
        agent: Sequence[str] = (),
        connector: Sequence[str] = (),
        days: float | None = None,
        now: datetime | None = None,
    ) -> bytes:
        """Return a new chain for a leaf of this CA: same key and name, its grants and those given; as long as before.

        Raises ConfigError for a leaf of another CA, or a connector grant for one without a connector's id.
        """
        leaf = leaf_of(chain_pem)
        if not self.issued(leaf):
            raise ConfigError("the certificate is not of this CA")
        names = list(leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value)
        usages = list(leaf.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value)
        if connector and not any(str(each.value).startswith("id.") for each in names):
            raise ConfigError("the certificate has no connector's id: issue a new one with --connector-id")
        further = [x509.DNSName(each) for each in _grant_names(agent, connector)]
        names += [each for each in further if each not in names]
        usages += [
            each for each in _extended_usages(bool(agent), bool(connector), False) if each not in usages
        ]
        common = leaf.subject.get_attributes_for_oid(NameOID.COMMON_NAME)[0].value
        lifetime = leaf.not_valid_after_utc - leaf.not_valid_before_utc - BACKDATE
        wanted = days if days is not None else lifetime / timedelta(days=1)
        return self._sign(str(common), names, usages, _leaf_key(leaf.public_key()), wanted, now)

    def issued(self, leaf: x509.Certificate) -> bool:
        """Say whether this CA signed the certificate."""
        try:
            leaf.verify_directly_issued_by(self.intermediate)
        except (ValueError, TypeError, InvalidSignature):
            return False
        return True

    def crl(
        self,
        before_pem: bytes | None,
        revoke: Sequence[x509.Certificate] = (),
        *,
        days: float = CRL_DAYS,
        now: datetime | None = None,
    ) -> bytes:
        """Return a new CRL (PEM): what the one before had and what is revoked now. Raises ConfigError."""
        moment = now or datetime.now(UTC)
        until = min(moment + timedelta(days=days), self.intermediate.not_valid_after_utc)
        builder = x509.CertificateRevocationListBuilder(issuer_name=self.intermediate.subject)
        builder = builder.last_update(moment - BACKDATE).next_update(until)
        serials: set[int] = set()
        number = 0
        if before_pem is not None:
            before = self._own_crl(before_pem)
            number = before.extensions.get_extension_for_class(x509.CRLNumber).value.crl_number
            for entry in before:
                serials.add(entry.serial_number)
                builder = builder.add_revoked_certificate(entry)
        for leaf in revoke:
            if not self.issued(leaf):
                raise ConfigError(f"certificate {leaf.serial_number:x} is not of this CA")
            if leaf.serial_number not in serials:
                serials.add(leaf.serial_number)
                builder = builder.add_revoked_certificate(_revoked(leaf.serial_number, moment))
        builder = builder.add_extension(x509.CRLNumber(number + 1), critical=False)
        authority = x509.AuthorityKeyIdentifier.from_issuer_public_key(self.key.public_key())
        builder = builder.add_extension(authority, critical=False)
        return builder.sign(self.key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)

    def _own_crl(self, pem: bytes) -> x509.CertificateRevocationList:
        try:
            found = x509.load_pem_x509_crl(pem)
        except ValueError as error:
            raise ConfigError(f"no CRL in PEM: {unreadable(error)}") from None
        if not found.is_signature_valid(self.key.public_key()):
            raise ConfigError("the CRL is not of this CA")
        return found

    def _sign(
        self,
        name: str,
        names: Sequence[x509.GeneralName],
        usages: Sequence[x509.ObjectIdentifier],
        public: LeafPublicKey,
        days: float,
        now: datetime | None,
    ) -> bytes:
        moment = now or datetime.now(UTC)
        until = min(moment + timedelta(days=days), self.intermediate.not_valid_after_utc)
        builder = _builder(name, self.intermediate.subject, public, self.key, moment, until)
        builder = builder.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        builder = builder.add_extension(_key_usage(ca=False), critical=True)
        builder = builder.add_extension(x509.ExtendedKeyUsage(usages), critical=False)
        builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
        return _pem(builder.sign(self.key, hashes.SHA256())) + _pem(self.intermediate)


def write_private(path: Path, data: bytes) -> None:
    """Write a file that only its owner may read (0600 from its first moment); it must not exist yet."""
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        raise ConfigError(f"{path} exists already and is not overwritten") from None
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {error.strerror}") from None
    with os.fdopen(descriptor, "wb") as file:
        file.write(data)


def replace_file(path: Path, data: bytes) -> None:
    """Write a file in one step, so that who reads it meanwhile has the old one or the new."""
    fresh = path.with_name(f".{path.name}.new")
    fresh.write_bytes(data)
    if path.exists():
        fresh.chmod(path.stat().st_mode & 0o777)
    fresh.replace(path)


def leaf_of(chain_pem: bytes) -> x509.Certificate:
    """Return the leaf of a chain in PEM. Raises ConfigError."""
    return certificates_of(chain_pem)[0]


def certificates_of(chain_pem: bytes) -> list[x509.Certificate]:
    """Return the certificates of a chain in PEM, one at least. Raises ConfigError."""
    try:
        return x509.load_pem_x509_certificates(chain_pem)
    except MALFORMED as error:
        raise ConfigError(f"no certificate in PEM: {unreadable(error)}") from None


def _leaf_key(public: object) -> LeafPublicKey:
    if not isinstance(public, LeafPublicKey):
        raise ConfigError(f"the key is a {type(public).__name__}; expected an EC or Ed25519 key")
    return public


def _revoked(serial: int, now: datetime) -> x509.RevokedCertificate:
    return x509.RevokedCertificateBuilder().serial_number(serial).revocation_date(now).build()


def _alternative_names(
    name: str,
    agent: Sequence[str],
    connector: Sequence[str],
    relay: str | None,
    connector_id: str | None,
) -> list[x509.GeneralName]:
    if _PEER_NAME.fullmatch(name) is None:
        raise ConfigError(f"name {name!r}: expected 1 to 63 letters, digits, dots, hyphens and underscores")
    if not (agent or connector or relay):
        raise ConfigError(
            f"certificate {name!r} would grant nothing: give it an agent, connector or relay grant"
        )
    if bool(connector) != (connector_id is not None):
        raise ConfigError(f"certificate {name!r}: connector grants and a connector id go together")
    names = _grant_names(agent, connector)
    if relay is not None:
        if not is_label(relay) or "--" in relay:
            raise ConfigError(f"relay name {relay!r}: expected one lower-case label without `--`")
        names.append(f"relay.{relay}.ztna")
    if connector_id is not None:
        names.append(f"id.{ConnectorId(connector_id).name}.ztna")
    uri = x509.UniformResourceIdentifier(f"spiffe://{TRUST_DOMAIN}/{name}")
    return [*(x509.DNSName(each) for each in names), uri]


def _grant_names(agent: Sequence[str], connector: Sequence[str]) -> list[str]:
    names = [f"agent.{_granted(service)}.ztna" for service in agent]
    return names + [f"connector.{_granted(service)}.ztna" for service in connector]


def _granted(service: str) -> str:
    return EVERY if service == EVERY else ServiceName(service)


def _extended_usages(agent: bool, connector: bool, relay: bool) -> list[x509.ObjectIdentifier]:
    usages = []
    if agent or connector:
        usages.append(ExtendedKeyUsageOID.CLIENT_AUTH)
    if relay or connector:
        usages.append(ExtendedKeyUsageOID.SERVER_AUTH)
    return usages


def _authority(
    name: str,
    key: ec.EllipticCurvePrivateKey,
    issuer: x509.Certificate | None,
    issuer_key: ec.EllipticCurvePrivateKey,
    now: datetime,
    days: int,
    path_length: int,
) -> x509.Certificate:
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    until = now + timedelta(days=days)
    builder = _builder(name, issuer.subject if issuer else subject, key.public_key(), issuer_key, now, until)
    builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=path_length), critical=True)
    builder = builder.add_extension(_key_usage(ca=True), critical=True)
    return builder.sign(issuer_key, hashes.SHA256())


def _builder(
    name: str,
    issuer: x509.Name,
    public: CertificateIssuerPublicKeyTypes,
    issuer_key: ec.EllipticCurvePrivateKey,
    now: datetime,
    until: datetime,
) -> x509.CertificateBuilder:
    builder = x509.CertificateBuilder(
        issuer_name=issuer,
        subject_name=x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)]),
        public_key=public,
        serial_number=x509.random_serial_number(),
    )
    builder = builder.not_valid_before(now - BACKDATE).not_valid_after(until)
    builder = builder.add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
    authority = x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_key.public_key())
    return builder.add_extension(authority, critical=False)


def _key_usage(*, ca: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not ca,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=ca,
        crl_sign=ca,
        encipher_only=False,
        decipher_only=False,
    )


def _pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.PEM)


def _key_pem(key: LeafKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
