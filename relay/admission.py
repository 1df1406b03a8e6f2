"""Who may be let in, and what a connector may register: certificates against limits.

Pure. Whether a chain is good at all is ztna.identity's verdict; what may be opened is relay.policy's.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from ztna.errors import Refused
from ztna.identity import Identity
from ztna.names import ConnectorId, ServiceName
from ztna.reasons import Reason

CONNECTIONS_MAX = 20_000
CONNECTIONS_PER_IDENTITY_MAX = 64
"""Replicas may share a certificate, and a renewed one overlaps with the old."""
SERVICES_PER_CONNECTION_MAX = 2_000


@dataclass(slots=True)
class Doorkeeper:
    """Counts who is in; once `draining` nobody else is."""

    draining: bool = False
    _names: Counter[str] = field(default_factory=Counter)
    _total: int = 0

    def admit(self, identity: Identity) -> None:
        """Raise Refused unless this peer may have another connection."""
        if self.draining:
            raise Refused(Reason.DRAINING, "this relay is stopping")
        if not identity.agent and not identity.connector:
            raise Refused(Reason.NO_GRANT, f"{identity.name} is neither an agent nor a connector")
        if self._total >= CONNECTIONS_MAX:
            raise Refused(Reason.LIMIT_REACHED, f"{CONNECTIONS_MAX} connections")
        if self._names[identity.name] >= CONNECTIONS_PER_IDENTITY_MAX:
            raise Refused(
                Reason.LIMIT_REACHED, f"{identity.name} has {CONNECTIONS_PER_IDENTITY_MAX} connections"
            )

    def entered(self, identity: Identity) -> None:
        """Count a connection that was established."""
        self._names[identity.name] += 1
        self._total += 1

    def left(self, identity: Identity) -> None:
        """Count it no longer."""
        self._names[identity.name] -= 1
        if not self._names[identity.name]:
            del self._names[identity.name]
        self._total -= 1


def registration_refusal(
    identity: Identity, connector_id: ConnectorId, service: ServiceName, registered: int
) -> Reason | None:
    """Return why this connector may not register the service, None when it may.

    `registered` is how many services its connection has already. Source: design.md 2.2, 5.
    """
    if not identity.carries(connector_id) or not identity.may_serve(service):
        return Reason.NO_GRANT
    if registered >= SERVICES_PER_CONNECTION_MAX:
        return Reason.LIMIT_REACHED
    return None
