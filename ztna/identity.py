"""Who a peer is: the verdict on a presented chain at a given moment, and what its leaf grants (design.md 5).

Pure: `now` is passed in and nothing is read or fetched. What CRLs say is ztna.revocation's.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Literal, TypeVar

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from cryptography.x509.verification import (
    Criticality,
    ExtensionPolicy,
    Policy,
    PolicyBuilder,
    Store,
    VerificationError,
)

from ztna.errors import BadName, ConfigError, IdentityError
from ztna.names import ConnectorId, RelayName, ServiceName, is_label
from ztna.reasons import Reason
from ztna.revocation import MALFORMED, Revocations, unreadable

Usage = Literal["client", "server"]
ExtensionT = TypeVar("ExtensionT", bound=x509.ExtensionType)

PRESENTED_CERTIFICATES_MAX = 6
INTERMEDIATES_MAX = 3
NAME_CHARACTERS_MAX = 255
PROVEN_MAX = 4_096
"""How many chains are remembered as verified: a carrier or a reconnection of a known peer costs no signature check."""
PROVEN_CHAIN_BYTES_MAX = 8_192
"""Larger ones are not remembered, or one who fills his chain up could fill the memory."""

_USAGE_OIDS = {"client": ExtendedKeyUsageOID.CLIENT_AUTH, "server": ExtendedKeyUsageOID.SERVER_AUTH}


@dataclass(frozen=True, slots=True)
class Grants:
    """The services a leaf grants in one role; `every` is the wildcard."""

    services: frozenset[ServiceName] = frozenset()
    every: bool = False

    def allows(self, service: ServiceName) -> bool:
        """Say whether the service is among them."""
        return self.every or service in self.services

    def __bool__(self) -> bool:
        return self.every or bool(self.services)


@dataclass(frozen=True, slots=True)
class Identity:
    """A peer whose leaf's own chain verified. An object that exists was verified for one usage.

    `name` is the SPIFFE URI SAN, else the CN; `fingerprint` the SHA-256 of the leaf's DER in hex; `id_name`
    what `id.<name>.ztna` carries, which connector ids are checked against; `path` is what verified, from the leaf to
    the authority believed, and the dates are those in which all of it is valid.
    """

    name: str
    fingerprint: str
    agent: Grants
    connector: Grants
    relay: str | None
    id_name: str | None
    not_before: datetime
    not_after: datetime
    path: tuple[x509.Certificate, ...] = field(default=(), repr=False, compare=False)

    def may_use(self, service: ServiceName) -> bool:
        """Say whether it may reach the service as an agent."""
        return self.agent.allows(service)

    def may_serve(self, service: ServiceName) -> bool:
        """Say whether it may front the service as a connector."""
        return self.connector.allows(service)

    def carries(self, connector_id: ConnectorId) -> bool:
        """Say whether the leaf carries the name of this connector id."""
        return self.id_name is not None and connector_id.name == self.id_name

    @property
    def lifetime(self) -> timedelta:
        """How long the leaf was made for; CAs above may end it earlier."""
        since = self.path[0].not_valid_before_utc if self.path else self.not_before
        return self.not_after - since

    def valid_at(self, now: datetime) -> bool:
        """Say whether the leaf and all that vouch for it are inside their dates at `now`."""
        return self.not_before <= now <= self.not_after


class Trust:
    """The certificate authorities a daemon believes, and nothing else: never the system's roots."""

    def __init__(
        self, authorities: Sequence[x509.Certificate], revocations: Revocations | None = None
    ) -> None:
        """`revocations` None: no CRL is gone by."""
        if not authorities:
            raise ConfigError("the CA file holds no certificate; expected at least one CA certificate in PEM")
        for authority in authorities:
            if not _is_authority(authority):
                raise ConfigError(
                    f"{_subject(authority)} in the CA file is no CA certificate; put only CAs there"
                )
        self.revocations = revocations
        self._authorities = tuple(authorities)
        self._store = Store(list(authorities))
        self._proven: dict[tuple[Usage, tuple[bytes, ...]], Identity] = {}

    @classmethod
    def from_pem(cls, ca_pem: bytes, revocations: Revocations | None = None) -> Trust:
        """Read a bundle of CA certificates. Raises ConfigError when there is none or one is no CA."""
        try:
            return cls(x509.load_pem_x509_certificates(ca_pem), revocations)
        except MALFORMED as error:
            raise ConfigError(
                f"the CA file cannot be read as PEM certificates: {unreadable(error)}"
            ) from None

    def with_revocations(self, revocations: Revocations | None) -> Trust:
        """Return the same authorities with other CRLs; what verified under them need not be verified again."""
        other = Trust(self._authorities, revocations)
        other._proven = self._proven
        return other

    def verify(self, chain_der: Sequence[bytes], usage: Usage, now: datetime) -> Identity:
        """Return the identity that the chain proves for the usage at `now` (timezone-aware).

        `chain_der` is everything the peer presented, its leaf first, each certificate in DER. Only the leaf's
        own path counts; the others are material for it and prove nothing themselves. Raises IdentityError
        with no_certificate, untrusted, expired, revoked, policy_unknown when CRLs cannot tell, or no_grant for a leaf
        that is valid but none of ours. Source: design.md 5.
        """
        chain = tuple(chain_der)
        identity = self._proven.get((usage, chain))
        if identity is None or not identity.valid_at(now):
            identity = self._prove(chain, usage, now)
            if sum(map(len, chain)) <= PROVEN_CHAIN_BYTES_MAX:
                self._remember((usage, chain), identity)
        if self.revocations is not None:
            self.revocations.require(identity.path, now)
        return identity

    def judge(self, identity: Identity, now: datetime) -> IdentityError | None:
        """Return why a peer that was let in before may not stay, else None: expired, revoked or untrusted.

        That a CRL is out of date keeps only others from coming in.
        """
        if not identity.valid_at(now):
            return IdentityError(Reason.EXPIRED, f"{identity.name} ({identity.not_after:%Y-%m-%dT%H:%M:%SZ})")
        if self.revocations is not None:
            revoked = self.revocations.revoked(identity.path)
            if revoked is not None:
                return IdentityError(Reason.REVOKED, revoked)
        if identity.path and identity.path[-1] not in self._authorities:
            # Believed by another way, perhaps: a cross-signed authority.
            try:
                self._verify_path(identity.path, now)
            except IdentityError as error:
                return error
        return None

    def unknown(self, path: Sequence[x509.Certificate], now: datetime) -> str | None:
        """Return why nobody whose certificate has this path's issuer can be let in now, else None."""
        return None if self.revocations is None else self.revocations.unknown(path, now)

    def _remember(self, key: tuple[Usage, tuple[bytes, ...]], identity: Identity) -> None:
        if len(self._proven) >= PROVEN_MAX:
            del self._proven[next(iter(self._proven))]
        self._proven[key] = identity

    def _prove(self, chain_der: tuple[bytes, ...], usage: Usage, now: datetime) -> Identity:
        if not chain_der:
            raise IdentityError(Reason.NO_CERTIFICATE, "client cert required" if usage == "client" else "")
        if len(chain_der) > PRESENTED_CERTIFICATES_MAX:
            raise IdentityError(
                Reason.UNTRUSTED,
                f"{len(chain_der)} certificates presented, at most {PRESENTED_CERTIFICATES_MAX}",
            )
        chain = [_parse(der) for der in chain_der]
        try:
            return _identity(self._verify_path(chain, now), usage)
        except MALFORMED as error:
            # cryptography reads extensions lazily, so hostile ones are only noticed here.
            raise IdentityError(Reason.UNTRUSTED, f"malformed certificate: {error}") from None

    def _verify_path(self, chain: Sequence[x509.Certificate], now: datetime) -> list[x509.Certificate]:
        try:
            return self._build_path(chain, now)
        except VerificationError as error:
            detail = self._expiry(chain, now)
            if detail is not None:
                raise IdentityError(Reason.EXPIRED, detail) from None
            raise IdentityError(Reason.UNTRUSTED, f"{_subject(chain[0])}: {error}") from None

    def _build_path(self, chain: Sequence[x509.Certificate], now: datetime) -> list[x509.Certificate]:
        # The leaf's extensions are judged by us: the ready-made policy cannot match `connector.*.ztna` and
        # lets a leaf without EKU pass. CAs need only be CAs: their EKU says nothing about a role here.
        authorities = ExtensionPolicy.permit_all()
        authorities = authorities.require_present(x509.BasicConstraints, Criticality.AGNOSTIC, None)
        authorities = authorities.may_be_present(x509.KeyUsage, Criticality.AGNOSTIC, _require_cert_sign)
        policy = PolicyBuilder().store(self._store).time(now).max_chain_depth(INTERMEDIATES_MAX)
        policy = policy.extension_policies(ca_policy=authorities, ee_policy=ExtensionPolicy.permit_all())
        return policy.build_client_verifier().verify(chain[0], list(chain[1:])).chain

    def _expiry(self, chain: Sequence[x509.Certificate], now: datetime) -> str | None:
        """Return what is out of its dates when that is all that is wrong with the chain, else None.

        Only chooses between two refusals: the leaf's issuer must be trusted now, or have been.
        """
        certificates = [*chain, *self._authorities]
        outside = [each for each in certificates if not _inside_dates(each, now)]
        issuers = [each for each in certificates[1:] if _issued(chain[0], each)] if outside else []
        if not any(self._was_trusted(issuer, chain, now) for issuer in issuers):
            return None
        worst = outside[0]
        if now > worst.not_valid_after_utc:
            return f"{_subject(worst)} expired {worst.not_valid_after_utc:%Y-%m-%dT%H:%M:%SZ}"
        return f"{_subject(worst)} is not valid before {worst.not_valid_before_utc:%Y-%m-%dT%H:%M:%SZ}"

    def _was_trusted(
        self, issuer: x509.Certificate, chain: Sequence[x509.Certificate], now: datetime
    ) -> bool:
        for moment in (now, issuer.not_valid_before_utc, issuer.not_valid_after_utc):
            with suppress(VerificationError):
                self._build_path([issuer, *chain], moment)
                return True
        return False


def require_relay(identity: Identity, name: str) -> None:
    """Raise IdentityError unless the peer is the relay of that name."""
    if identity.relay != name:
        raise IdentityError(Reason.NO_GRANT, f"{identity.name} is not relay.{name}.ztna")


def require_connector(
    identity: Identity, service: ServiceName, connector_id: ConnectorId, fingerprint: str
) -> None:
    """Raise IdentityError unless the peer is that connector, may serve the service and has that very leaf."""
    if not identity.may_serve(service):
        raise IdentityError(Reason.NO_GRANT, f"{identity.name} carries no connector.{service}.ztna")
    if not identity.carries(connector_id):
        raise IdentityError(Reason.NO_GRANT, f"{identity.name} carries no id.{connector_id.name}.ztna")
    _require_fingerprint(identity, fingerprint)


def require_agent(identity: Identity, service: ServiceName, fingerprint: str) -> None:
    """Raise IdentityError unless the peer is an agent that may use the service and has that very leaf."""
    if not identity.may_use(service):
        raise IdentityError(Reason.NO_GRANT, f"{identity.name} carries no agent.{service}.ztna")
    _require_fingerprint(identity, fingerprint)


def _require_fingerprint(identity: Identity, fingerprint: str) -> None:
    if identity.fingerprint != fingerprint:
        raise IdentityError(Reason.NO_GRANT, f"{identity.name} has another certificate than the relay named")


def _identity(path: Sequence[x509.Certificate], usage: Usage) -> Identity:
    leaf = path[0]
    _require_leaf_usage(leaf, usage)
    names = _alternative_names(leaf)
    found = [_grant(name) for name in _under_ztna(names.get_values_for_type(x509.DNSName))]
    relay = _only(leaf, "relay", found)
    id_name = _only(leaf, "id", found)
    agent, connector = _grants("agent", found), _grants("connector", found)
    if not (agent or connector or relay):
        raise IdentityError(Reason.NO_GRANT, f"{_subject(leaf)} carries no ZTNA SAN")
    if id_name is not None and not connector:
        raise IdentityError(
            Reason.NO_GRANT, f"{_subject(leaf)} carries id.{id_name}.ztna but no connector SAN"
        )
    return Identity(
        name=_peer_name(leaf, names.get_values_for_type(x509.UniformResourceIdentifier)),
        fingerprint=leaf.fingerprint(hashes.SHA256()).hex(),
        agent=agent,
        connector=connector,
        relay=relay,
        id_name=id_name,
        not_before=max(each.not_valid_before_utc for each in path),
        not_after=min(each.not_valid_after_utc for each in path),
        path=tuple(path),
    )


def _under_ztna(names: Iterable[str]) -> list[str]:
    lowered = [name.lower() for name in names]
    return [name for name in lowered if name.rstrip(".").rpartition(".")[2] == "ztna"]


def _grant(name: str) -> tuple[str, str]:
    """Return (`agent` | `connector` | `relay` | `id`, the name granted or `*`) of one SAN under `.ztna`."""
    match name.split("."):
        case ["agent" | "connector" as role, "*", "ztna"] | ["*", "agent" | "connector" as role, "ztna"]:
            return role, "*"
        case ["agent" | "connector" | "relay" as role, granted, "ztna"]:
            try:
                return role, RelayName(granted) if role == "relay" else ServiceName(granted)
            except BadName as error:
                raise IdentityError(Reason.NO_GRANT, f"SAN {name}: {error}") from None
        case ["id", label, "ztna"] if is_label(label) and "--" not in label:
            return "id", label
    raise IdentityError(Reason.NO_GRANT, f"SAN {name} is none that may stand under .ztna")


def _grants(role: str, found: Iterable[tuple[str, str]]) -> Grants:
    granted = {value for kind, value in found if kind == role}
    return Grants(frozenset(ServiceName(value) for value in granted if value != "*"), "*" in granted)


def _only(leaf: x509.Certificate, kind: str, found: Iterable[tuple[str, str]]) -> str | None:
    values = sorted({value for each, value in found if each == kind})
    if len(values) > 1:
        raise IdentityError(
            Reason.NO_GRANT, f"{_subject(leaf)} carries more than one {kind} SAN: {', '.join(values)}"
        )
    return values[0] if values else None


def _require_leaf_usage(leaf: x509.Certificate, usage: Usage) -> None:
    if _is_authority(leaf):
        raise IdentityError(Reason.NO_GRANT, f"{_subject(leaf)} is a CA certificate, which is no identity")
    key_usage = _extension(leaf, x509.KeyUsage)
    if key_usage is not None and not key_usage.digital_signature:
        raise IdentityError(Reason.NO_GRANT, f"{_subject(leaf)} may not sign (key usage)")
    extended = _extension(leaf, x509.ExtendedKeyUsage)
    # RFC 5280 4.2.1.12 lets anyExtendedKeyUsage stand for all; here each usage must be named.
    if extended is None or _USAGE_OIDS[usage] not in extended:
        raise IdentityError(Reason.NO_GRANT, f"{_subject(leaf)} lacks extended key usage {usage}Auth")


def _alternative_names(leaf: x509.Certificate) -> x509.SubjectAlternativeName:
    names = _extension(leaf, x509.SubjectAlternativeName)
    if names is None:
        raise IdentityError(Reason.NO_GRANT, f"{_subject(leaf)} carries no ZTNA SAN")
    return names


def _peer_name(leaf: x509.Certificate, uris: Sequence[str]) -> str:
    spiffe = [uri for uri in uris if uri.startswith("spiffe://")]
    common = [str(each.value) for each in leaf.subject.get_attributes_for_oid(NameOID.COMMON_NAME)]
    # A CN must never pass for the SPIFFE name of somebody else.
    candidates = spiffe or [name for name in common if not name.lower().startswith("spiffe:")]
    if len(candidates) != 1 or not 0 < len(candidates[0]) <= NAME_CHARACTERS_MAX:
        raise IdentityError(
            Reason.NO_GRANT, f"{_subject(leaf)} carries no single name (SPIFFE URI SAN or CN)"
        )
    return candidates[0]


def _issued(certificate: x509.Certificate, issuer: x509.Certificate) -> bool:
    try:
        certificate.verify_directly_issued_by(issuer)
    except (ValueError, TypeError, InvalidSignature):
        return False
    return True


def _parse(der: bytes) -> x509.Certificate:
    try:
        return x509.load_der_x509_certificate(der)
    except MALFORMED as error:
        raise IdentityError(Reason.UNTRUSTED, f"malformed certificate: {error}") from None


def _extension(certificate: x509.Certificate, kind: type[ExtensionT]) -> ExtensionT | None:
    try:
        return certificate.extensions.get_extension_for_class(kind).value
    except x509.ExtensionNotFound:
        return None


def _is_authority(certificate: x509.Certificate) -> bool:
    constraints = _extension(certificate, x509.BasicConstraints)
    return constraints is not None and constraints.ca


def _require_cert_sign(_policy: Policy, certificate: x509.Certificate, usage: x509.KeyUsage | None) -> None:
    if usage is not None and not usage.key_cert_sign:
        raise ValueError(f"{_subject(certificate)} may not sign certificates (key usage)")


def _inside_dates(certificate: x509.Certificate, now: datetime) -> bool:
    return certificate.not_valid_before_utc <= now <= certificate.not_valid_after_utc


def _subject(certificate: x509.Certificate) -> str:
    return certificate.subject.rfc4514_string() or "a certificate without subject"
