"""A daemon's own certificate, key and trust, read from files, and the TLS contexts made of them.

Does not decide who a peer is (ztna.identity does) and does not watch the files: whoever reloads loads again.
"""

from __future__ import annotations

import hmac
import os
import ssl
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from ztna.config import TlsConfig
from ztna.errors import ConfigError, IdentityError
from ztna.identity import Identity, Trust, Usage

PrivateKey = ec.EllipticCurvePrivateKey | ed25519.Ed25519PrivateKey


@dataclass(frozen=True, slots=True)
class Credentials:
    """What a daemon shows and whom it believes; `identity` is what its own chain proves to its own trust."""

    chain_pem: bytes
    key: PrivateKey = field(repr=False)
    trust: Trust
    identity: Identity
    certificate_file: Path
    key_file: Path
    ca_file: Path
    ca_pem: bytes = field(repr=False)

    @classmethod
    def load(cls, config: TlsConfig, now: datetime | None = None) -> Credentials:
        """Read the three files. Raises ConfigError, naming the file, when they cannot be used together.

        A chain that this daemon's own CA file does not verify is refused at once: no peer would take it.
        """
        certificate_file, key_file, ca_file = Path(config.certificate), Path(config.key), Path(config.ca)
        chain_pem = _read(certificate_file, "certificate")
        ca_pem = _read(ca_file, "ca")
        trust = Trust.from_pem(ca_pem)
        key = _private_key(key_file)
        chain = _chain(chain_pem, certificate_file)
        if chain[0].public_key() != key.public_key():
            raise ConfigError(f"tls.key: {key_file} is not the key of {certificate_file}")
        identity = _own_identity(trust, chain, certificate_file, now or datetime.now(UTC))
        return cls(chain_pem, key, trust, identity, certificate_file, key_file, ca_file, ca_pem)

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
        context.load_verify_locations(cadata=self.ca_pem.decode("ascii", "ignore"))
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


def _read(path: Path, key: str) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(f"tls.{key}: {path} cannot be read: {error.strerror}") from None


def _private_key(path: Path) -> PrivateKey:
    pem = _read(path, "key")
    mode = stat.S_IMODE(path.stat().st_mode)
    if mode not in (0o600, 0o400):
        raise ConfigError(f"tls.key: {path} has mode {mode:04o}, expected 0600 or 0400: chmod 600 it")
    try:
        key = serialization.load_pem_private_key(pem, None)
    except (ValueError, TypeError) as error:
        raise ConfigError(f"tls.key: {path} is no unencrypted private key in PEM: {error}") from None
    if not isinstance(key, PrivateKey):
        raise ConfigError(f"tls.key: {path} holds a {type(key).__name__}; expected an EC or Ed25519 key")
    return key


def _chain(pem: bytes, path: Path) -> Sequence[x509.Certificate]:
    try:
        return x509.load_pem_x509_certificates(pem)
    except ValueError as error:
        raise ConfigError(f"tls.certificate: {path} holds no certificates in PEM: {error}") from None


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
