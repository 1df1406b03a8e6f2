"""A daemon's own certificate, key and trust, read from files, and the TLS contexts made of them.

Does not decide who a peer is (ztna.identity does) and does not watch the files (ztna.renewal does).
"""

from __future__ import annotations

import hmac
import os
import ssl
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from ztna import secret_files
from ztna.config import TlsConfig
from ztna.errors import ConfigError, IdentityError
from ztna.identity import Identity, Trust, Usage
from ztna.revocation import MALFORMED, Revocations, unreadable
from ztna.verdicts import Verdicts

PrivateKey = ec.EllipticCurvePrivateKey | ed25519.Ed25519PrivateKey

PEM_BYTES_MAX = 4 * 1024 * 1024
CRL_BYTES_MAX = 16 * 1024 * 1024
"""Some 400,000 revoked certificates."""


@dataclass(frozen=True, slots=True)
class Material:
    """What the files held, read together; `crl` is None when none is configured, empty while it is not fetched yet."""

    certificate: bytes
    key: bytes = field(repr=False)
    ca: bytes
    crl: bytes | None

    @classmethod
    def read(cls, config: TlsConfig) -> Material:
        """Read the files. Raises ConfigError naming the one that cannot be."""
        if config.crl_file is not None and config.crl_url is not None:
            raise ConfigError("tls.crl_url: expected crl_file or crl_url, not both")
        return cls(*read_certificate(config), read_ca(config), read_crl(config))


def read_certificate(config: TlsConfig) -> tuple[bytes, bytes]:
    """Return the content of the certificate's and the key's file. Raises ConfigError."""
    return _read(Path(config.certificate), "certificate"), _read_key(Path(config.key))


def read_ca(config: TlsConfig) -> bytes:
    """Return the CA file's content. Raises ConfigError."""
    return _read(Path(config.ca), "ca")


def read_crl(config: TlsConfig) -> bytes | None:
    """Return the CRL file's content; nothing yet for one that is fetched, None when there shall be none."""
    if config.crl_file is not None:
        return _read(Path(config.crl_file), "crl_file", CRL_BYTES_MAX)
    return b"" if config.crl_url is not None else None


@dataclass(frozen=True, slots=True)
class Credentials:
    """What a daemon shows and whom it believes; `identity` is what its own chain proves to its own trust."""

    material: Material = field(repr=False)
    key: PrivateKey = field(repr=False)
    trust: Trust
    identity: Identity
    verdicts: Verdicts = field(repr=False, compare=False)
    """Whom the daemon believes from now to its end; the same object in all the credentials it ever has."""

    @classmethod
    def load(cls, config: TlsConfig, now: datetime | None = None) -> Credentials:
        """Read the files. Raises ConfigError, naming the file, when they cannot be used together."""
        return cls.of(config, Material.read(config), now=now)

    @classmethod
    def of(
        cls,
        config: TlsConfig,
        material: Material,
        *,
        verdicts: Verdicts | None = None,
        now: datetime | None = None,
    ) -> Credentials:
        """Make credentials of what was read from the configured files; Raises ConfigError as `load`.

        A chain that this daemon's own CA file does not verify is refused at once: no peer would take it. The
        verdicts, when there are some already, are shared and still go by the trust they had.
        """
        trust = _trust(material.ca, Path(config.ca))
        key = _private_key(material.key, Path(config.key))
        chain = _chain(material.certificate, Path(config.certificate))
        if not _belong(chain[0], key):
            raise ConfigError(f"tls.key: {config.key} is not the key of {config.certificate}")
        identity = _own_identity(trust, chain, Path(config.certificate), now or datetime.now(UTC))
        earlier = verdicts.trust.revocations if verdicts is not None else None
        trust = trust.with_revocations(_revocations(material.crl, config, earlier))
        return cls(material, key, trust, identity, verdicts or Verdicts(trust))

    def with_crl(self, config: TlsConfig, crl: bytes | None) -> Credentials:
        """Return the same with another CRL. Raises ConfigError when it is none."""
        trust = self.trust.with_revocations(_revocations(crl, config, self.trust.revocations))
        return replace(self, material=replace(self.material, crl=crl), trust=trust)

    @property
    def chain_pem(self) -> bytes:
        """The own certificates in PEM, leaf first."""
        return self.material.certificate

    def derived_key(self, purpose: str) -> bytes:
        """Return 32 bytes that only who has the private key can make: the same at each start, others per purpose."""
        secret = self.key.private_bytes(Encoding.DER, PrivateFormat.PKCS8, NoEncryption())
        return hmac.digest(secret, b"ztna-mesh " + purpose.encode(), "sha256")

    @property
    def chain(self) -> list[x509.Certificate]:
        """The own certificates, leaf first."""
        return x509.load_pem_x509_certificates(self.chain_pem)

    def server_context(self, alpn: str) -> ssl.SSLContext:
        """Return a context for TLS 1.3 over TCP that demands a certificate of the client."""
        context = self._context(ssl.PROTOCOL_TLS_SERVER, alpn)
        context.num_tickets = 0
        return context

    def client_context(self, alpn: str) -> ssl.SSLContext:
        """Return a context for TLS 1.3 over TCP. Names are ours to check: OpenSSL checks only the chain."""
        return self._context(ssl.PROTOCOL_TLS_CLIENT, alpn)

    def _context(self, protocol: int, alpn: str) -> ssl.SSLContext:
        context = ssl.SSLContext(protocol)
        context.check_hostname = False
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        context.verify_mode = ssl.CERT_REQUIRED
        # From what was read and checked together: the files may be in the middle of a renewal by now.
        key_pem = self.key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        with _memory_file(self.chain_pem + key_pem) as path:
            context.load_cert_chain(path)
        context.load_verify_locations(cadata=self.material.ca.decode("ascii", "ignore"))
        context.set_alpn_protocols([alpn])
        return context


@contextmanager
def _memory_file(content: bytes) -> Iterator[str]:
    """Give a path to the content that is only in memory: OpenSSL takes certificates and keys by path alone."""
    descriptor = os.memfd_create("credentials")
    try:
        os.write(descriptor, content)
        yield f"/proc/self/fd/{descriptor}"
    finally:
        os.close(descriptor)


def _read(path: Path, key: str, bytes_max: int = PEM_BYTES_MAX) -> bytes:
    try:
        with path.open("rb") as file:
            content = file.read(bytes_max + 1)
    except OSError as error:
        raise ConfigError(f"tls.{key}: {path} cannot be read: {error.strerror}") from None
    if len(content) > bytes_max:
        raise ConfigError(f"tls.{key}: {path} has more than {bytes_max} bytes")
    return content


def _read_key(path: Path) -> bytes:
    pem = _read(path, "key")
    try:
        wrong = secret_files.complaint(path)
    except OSError as error:  # taken away meanwhile: it is being renewed
        raise ConfigError(f"tls.key: {path} cannot be read: {error.strerror}") from None
    if wrong:
        raise ConfigError(f"tls.key: {wrong}")
    return pem


def _private_key(pem: bytes, path: Path) -> PrivateKey:
    try:
        key = serialization.load_pem_private_key(pem, None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise ConfigError(
            f"tls.key: {path} is no unencrypted private key in PEM: {unreadable(error)}"
        ) from None
    if not isinstance(key, PrivateKey):
        raise ConfigError(f"tls.key: {path} holds a {type(key).__name__}; expected an EC or Ed25519 key")
    return key


def _belong(leaf: x509.Certificate, key: PrivateKey) -> bool:
    try:
        return leaf.public_key() == key.public_key()
    except MALFORMED:  # a kind of key that nobody here knows
        return False


def _trust(pem: bytes, path: Path) -> Trust:
    try:
        return Trust.from_pem(pem)
    except ConfigError as error:
        raise ConfigError(f"tls.ca: {path}: {error}") from None


def _revocations(
    crl: bytes | None, config: TlsConfig, earlier: Revocations | None = None
) -> Revocations | None:
    """Return what to go by; before the first CRL is fetched nobody can be told to stand."""
    if crl is None:
        return None
    if not crl and config.crl_url is not None:
        return Revocations(())
    try:
        return Revocations.from_bytes(crl, earlier)
    except ConfigError as error:
        where = f"tls.crl_file: {config.crl_file}" if config.crl_file else f"tls.crl_url: {config.crl_url}"
        raise ConfigError(f"{where}: {error}") from None


def _chain(pem: bytes, path: Path) -> Sequence[x509.Certificate]:
    try:
        return x509.load_pem_x509_certificates(pem)
    except MALFORMED as error:
        raise ConfigError(
            f"tls.certificate: {path} holds no certificates in PEM: {unreadable(error)}"
        ) from None


def _own_identity(trust: Trust, chain: Sequence[x509.Certificate], path: Path, now: datetime) -> Identity:
    der = [each.public_bytes(serialization.Encoding.DER) for each in chain]
    usages: tuple[Usage, ...] = ("client", "server")
    failure: IdentityError | None = None
    for usage in usages:
        try:
            return trust.verify(der, usage, now)
        except IdentityError as error:
            failure = failure or error
    raise ConfigError(f"tls.certificate: {path} cannot be used: {failure}")
