"""Which connections serve which services: what connectors registered, newest connection last.

Pure; whether one may register a service is relay.admission's verdict, whether it may be used relay.policy's.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field

from relay.commands import ConnectionKey
from ztna.names import ConnectorId, ServiceName


@dataclass(slots=True)
class Registrations:
    """The live registrations of one relay."""

    _serving: defaultdict[ServiceName, dict[ConnectorId, list[ConnectionKey]]] = field(
        default_factory=lambda: defaultdict(dict)
    )

    @property
    def services(self) -> frozenset[ServiceName]:
        """The services that somebody serves."""
        return frozenset(self._serving)

    def __contains__(self, service: ServiceName) -> bool:
        return service in self._serving

    def add(self, key: ConnectionKey, connector_id: ConnectorId, service: ServiceName) -> bool:
        """Note that a connection serves a service; return whether another of that connector id does too.

        The newest connection is the last one, and gets the new sessions.
        """
        keys = self._serving[service].setdefault(connector_id, [])
        if key in keys:
            return False
        keys.append(key)
        return len(keys) > 1

    def remove(self, key: ConnectionKey, connector_id: ConnectorId, service: ServiceName) -> None:
        """Forget one registration that was added."""
        connectors = self._serving[service]
        connectors[connector_id].remove(key)
        if not connectors[connector_id]:
            del connectors[connector_id]
        if not connectors:
            del self._serving[service]

    def live(self, service: ServiceName) -> dict[ConnectorId, ConnectionKey]:
        """Return the newest connection of each connector that serves the service."""
        return {each: keys[-1] for each, keys in self._serving.get(service, {}).items()}
