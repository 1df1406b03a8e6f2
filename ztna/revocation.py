"""Which certificates their issuers took back: revocation lists (CRLs, RFC 5280 5), and what they say of a path.

Pure: `now` is passed in; reading, fetching and renewing the lists is ztna.renewal's. No OCSP, no delta or partial
lists: whatever narrows a list down is a critical extension (RFC 5280 5.2), and a list that has one is refused.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from itertools import pairwise

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.types import CertificatePublicKeyTypes
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from ztna.errors import ConfigError, IdentityError
from ztna.reasons import Reason

LISTS_MAX = 64
STANDING_MAX = 10_000
"""Chains of issuers of which it is remembered until when their lists tell: asked for every peer each second."""
NEVER = datetime.min.replace(tzinfo=UTC)

MALFORMED = (
    ValueError,
    x509.InvalidVersion,
    x509.DuplicateExtension,
    x509.UnsupportedGeneralNameType,
    UnsupportedAlgorithm,
)
"""All that `cryptography` raises for certificates and CRLs that it cannot read; they have no root of their own."""


def unreadable(error: Exception) -> str:
    """Return what is wrong with a file, without the link to questions and answers that `cryptography` adds."""
    return str(error).partition(" See http")[0]


_PEM_BEGIN, _PEM_END = b"-----BEGIN X509 CRL-----", b"-----END X509 CRL-----"


@dataclass(frozen=True, slots=True)
class RevocationList:
    """One CRL; whether its signature is the issuer's is found out when the issuer is known."""

    crl: x509.CertificateRevocationList = field(repr=False)
    issuer: x509.Name
    next_update: datetime
    serials: frozenset[int] = field(repr=False)

    @classmethod
    def of(cls, crl: x509.CertificateRevocationList) -> RevocationList:
        """Take a parsed CRL. Raises ConfigError for one that does not say all there is to say."""
        issuer = crl.issuer.rfc4514_string()
        for extension in crl.extensions:
            if extension.critical:
                raise ConfigError(
                    f"the CRL of {issuer} has the critical extension {extension.oid.dotted_string}; "
                    "expected a complete CRL, neither a delta nor a partial one"
                )
        if crl.next_update_utc is None:
            raise ConfigError(
                f"the CRL of {issuer} has no nextUpdate, so nobody can tell when it is out of date"
            )
        return cls(crl, crl.issuer, crl.next_update_utc, frozenset(each.serial_number for each in crl))


class Revocations:
    """The CRLs a daemon goes by, all read together."""

    def __init__(self, lists: Iterable[RevocationList], earlier: Revocations | None = None) -> None:
        """Of an issuer what `earlier` went by still counts where it is newer: an old list gives nobody back."""
        self.lists = tuple(lists)
        self._of_issuer: dict[bytes, RevocationList | None] = {}
        self._standing: dict[tuple[x509.Certificate, ...], tuple[datetime | None, str]] = {}
        self._kept: dict[bytes, RevocationList] = {}
        if earlier is not None:
            found = list(earlier._of_issuer.items())
            self._kept = earlier._kept | {key: each for key, each in found if each is not None}

    @classmethod
    def from_bytes(cls, data: bytes, earlier: Revocations | None = None) -> Revocations:
        """Read CRLs in PEM, one after the other, or one in DER. Raises ConfigError."""
        try:
            if _PEM_END not in data:
                parsed = [x509.load_der_x509_crl(data)]
            else:
                *pems, rest = data.split(_PEM_END)
                if _PEM_BEGIN in rest:
                    raise ConfigError("the last CRL is cut off")
                if len(pems) > LISTS_MAX:
                    raise ConfigError(f"{len(pems)} CRLs in one place, at most {LISTS_MAX}")
                parsed = [x509.load_pem_x509_crl(pem + _PEM_END) for pem in pems]
            return cls([RevocationList.of(each) for each in parsed], earlier)
        except MALFORMED as error:
            raise ConfigError(f"no CRL in PEM or DER: {unreadable(error)}") from None

    @property
    def next_update(self) -> datetime | None:
        """When the first of the lists is out of date; None without any."""
        return min((each.next_update for each in self.lists), default=None)

    def revoked(self, path: Sequence[x509.Certificate]) -> str | None:
        """Return which certificate of a verified path (leaf first, root last) its issuer took back, else None.

        What a list revokes stays revoked when the list is out of date.
        """
        for certificate, issuer in pairwise(path):
            found = self._list_of(issuer)
            if found is not None and certificate.serial_number in found.serials:
                return (
                    f"{certificate.subject.rfc4514_string()} was revoked by {found.issuer.rfc4514_string()}"
                )
        return None

    def unknown(self, path: Sequence[x509.Certificate], now: datetime) -> str | None:
        """Return why it cannot be told at `now` whether a path stands, else None.

        The leaf's issuer must have a list here; of CAs above (offline roots seldom write lists) what is here counts.
        """
        issuers = tuple(path[1:])
        if issuers not in self._standing:
            if len(self._standing) >= STANDING_MAX:
                self._standing.clear()
            self._standing[issuers] = self._first_to_go(issuers)
        until, why = self._standing[issuers]
        return why if until is not None and until <= now else None

    def _first_to_go(self, issuers: Sequence[x509.Certificate]) -> tuple[datetime | None, str]:
        """Return until when these issuers' lists tell, None for ever, and what is missing from then on."""
        until, why = None, ""
        for number, issuer in enumerate(issuers):
            found = self._list_of(issuer)
            if found is None and number == 0:
                return NEVER, f"no CRL of {issuer.subject.rfc4514_string()} is at hand"
            if found is not None and (until is None or found.next_update < until):
                until, why = found.next_update, f"the CRL of {found.issuer.rfc4514_string()} is out of date"
        return until, why

    def require(self, path: Sequence[x509.Certificate], now: datetime) -> None:
        """Raise IdentityError with revoked, or policy_unknown when that cannot be told, for a path to be let in."""
        revoked = self.revoked(path)
        if revoked is not None:
            raise IdentityError(Reason.REVOKED, revoked)
        unknown = self.unknown(path, now)
        if unknown is not None:
            raise IdentityError(Reason.POLICY_UNKNOWN, unknown)

    def _list_of(self, issuer: x509.Certificate) -> RevocationList | None:
        """Return the newest list that this issuer signed, of these and of those before."""
        public = issuer.public_key()
        spki = public.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
        key = issuer.subject.public_bytes() + spki
        if key not in self._of_issuer:
            signed = [each for each in self.lists if each.issuer == issuer.subject and _signed(each, public)]
            signed += [self._kept[key]] if key in self._kept else []
            self._of_issuer[key] = max(signed, key=lambda each: each.crl.last_update_utc, default=None)
        return self._of_issuer[key]


def _signed(found: RevocationList, public: CertificatePublicKeyTypes) -> bool:
    try:
        return found.crl.is_signature_valid(public)  # type: ignore[arg-type]
    except TypeError:  # a kind of key that signs nothing
        return False
