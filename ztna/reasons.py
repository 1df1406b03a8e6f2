"""The one closed list of refusal reasons: wire code, log field, metric label and CLI text alike."""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from types import MappingProxyType


class Reason(StrEnum):
    """Why something was refused or ended. Source: protocol.md, Control stream."""

    NO_CERTIFICATE = "no_certificate"
    UNTRUSTED = "untrusted"
    EXPIRED = "expired"
    REVOKED = "revoked"
    NO_GRANT = "no_grant"
    NO_SUCH_SERVICE = "no_such_service"
    NO_HEALTHY_CONNECTOR = "no_healthy_connector"
    STALE_EPOCH = "stale_epoch"
    NOT_YOUR_SESSION = "not_your_session"
    LIMIT_REACHED = "limit_reached"
    POLICY_UNKNOWN = "policy_unknown"
    DRAINING = "draining"
    PEER_GONE = "peer_gone"
    CLOSED_BY_PEER = "closed_by_peer"
    MALFORMED = "malformed"


MEANINGS: Mapping[Reason, str] = MappingProxyType(
    {
        Reason.NO_CERTIFICATE: "a peer showed no certificate",
        Reason.UNTRUSTED: "a certificate leads to no authority that is believed, or cannot be read",
        Reason.EXPIRED: "a certificate of the chain is not valid at this time",
        Reason.REVOKED: "a certificate of the chain is on the CRL of its issuer",
        Reason.NO_GRANT: "a certificate lacks the service, the role or name that is needed; or a local user may not",
        Reason.NO_SUCH_SERVICE: "no connector has registered the service, or DNS knows no such name",
        Reason.NO_HEALTHY_CONNECTOR: "connectors serve the service, but none that is well and connected here",
        Reason.STALE_EPOCH: "the address that was called belonged to the service under an earlier lease",
        Reason.NOT_YOUR_SESSION: "a message or flow is about a session of somebody else; it changed nothing",
        Reason.LIMIT_REACHED: "a bound is reached: sessions, flows, connections, bytes or questions",
        Reason.POLICY_UNKNOWN: "what decides is out of reach: DNS, the lease, or a CRL of today",
        Reason.DRAINING: "the relay or connector is going down, or the service is being taken away",
        Reason.PEER_GONE: "the other end went without a word",
        Reason.CLOSED_BY_PEER: "the other end, or an operator, ended it",
        Reason.MALFORMED: "what came is no message of ours, or not one for this moment",
    }
)
"""What has happened, in a sentence; ztna.remedies says what to do."""
