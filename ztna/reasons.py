"""The one closed list of refusal reasons: wire code, log field, metric label and CLI text alike."""

from __future__ import annotations

from enum import StrEnum


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
