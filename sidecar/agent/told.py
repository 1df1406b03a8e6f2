"""What relays told of the services' health: the last word of each relay, and the best of them for each service.

Pure. What follows for sessions is sidecar.agent.sessions' to decide; this is for people who look.
"""

from __future__ import annotations

from dataclasses import dataclass

from ztna.names import ServiceName

SERVICES_PER_RELAY_MAX = 20_000
UNKNOWN = "unknown"

_BEST_FIRST = ("passing", "warning", "critical")


@dataclass(frozen=True, slots=True)
class Told:
    """One state and since when it is so, in the seconds of the clock that `heard` was given."""

    state: str
    since: float


class HealthBook:
    """Keeps what was heard. A relay that is lost takes its word with it: nobody stands for it any more."""

    def __init__(self) -> None:
        self._by_relay: dict[str, dict[ServiceName, Told]] = {}

    def heard(self, relay: str, service: ServiceName, state: str, now: float) -> bool:
        """Note a relay's word; say whether there was room for it."""
        services = self._by_relay.setdefault(relay, {})
        known = services.get(service)
        if known is None and len(services) >= SERVICES_PER_RELAY_MAX:
            return False
        if known is None or known.state != state:
            services[service] = Told(state, now)
        return True

    def lost(self, relay: str) -> None:
        """Forget what a relay said."""
        self._by_relay.pop(relay, None)

    def of(self, service: ServiceName) -> Told | None:
        """Return the best that any relay says, as a flow may go by any of them; None when none says anything."""
        told = [services[service] for services in self._by_relay.values() if service in services]
        return min(told, key=lambda each: (_rank(each.state), each.since), default=None)


def _rank(state: str) -> int:
    return _BEST_FIRST.index(state) if state in _BEST_FIRST else len(_BEST_FIRST)
