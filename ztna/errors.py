"""Every error this project raises on purpose: one root, a child per meaning.

Adapters map what the outside world raises into these; nothing else crosses a module's edge.
"""

from __future__ import annotations

from ztna.reasons import Reason


class ZtnaError(Exception):
    """The root. Its text names the thing and says what to do about it."""


class BadName(ZtnaError):
    """A text that is no service name, connector id, zone, session id or address."""


class ProtocolError(ZtnaError):
    """Bytes from a peer that are no message of protocol.md."""


class PacketError(ProtocolError):
    """Bytes that are no whole, unfragmented IPv4 or IPv6 packet we carry."""


class ConfigError(ZtnaError):
    """A configuration that cannot be used; names the path of the key and what was expected."""


class Refused(ZtnaError):
    """Somebody may not have what they asked for; `reason` says why, `detail` names the thing."""

    def __init__(self, reason: Reason, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else str(reason))
        self.reason = reason
        self.detail = detail


class IdentityError(Refused):
    """A certificate (chain) that proves no identity we accept."""


class ConsulError(ZtnaError):
    """The root of what Consul can answer instead of data."""


class ConsulUnavailable(ConsulError):
    """No answer in time, a broken connection, no leader, or a 5xx: worth trying again."""


class ConsulForbidden(ConsulError):
    """403: the token lacks a rule; the text names the rule that is missing."""


class ConsulRejected(ConsulError):
    """Consul understood and said no (400, 404 where data was required, a failed check): not worth retrying."""


class ConsulAclsOff(ConsulRejected):
    """What was asked is about ACLs, and Consul has them off."""


class LeaseError(ZtnaError):
    """The root of what can go wrong with virtual addresses."""


class PoolExhausted(LeaseError):
    """No address is free or past its quarantine; names the service left without."""


class LeaseConflict(LeaseError):
    """Another writer was faster LEASE_CAS_ATTEMPTS times, or the keeper's lock is lost."""


class ResolverUnavailable(ZtnaError):
    """No resolver gave an answer to use in time; names the question and what each one did."""


class CrlUnavailable(ZtnaError):
    """No CRL could be fetched: no answer in time, another status than 200, or too many bytes."""


class LinkError(ZtnaError):
    """A link to the other end that cannot be made or has gone."""
