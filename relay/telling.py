"""Who is still to be told of which service's health, a bounded piece at a time.

A thousand services may change at once for every agent: what is due is told peer by peer, so that what one is told
shares packets, and by what the state is when its turn comes. Pure; what the state is relay.policy says.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator

from relay.commands import ConnectionKey
from ztna.identity import Identity
from ztna.names import ServiceName

LOOKS_PER_PIECE = 2_000
MESSAGES_PER_PIECE = 250
"""A few milliseconds of the loop's time, with what it costs to encode and to queue them."""

News = tuple[ConnectionKey, ServiceName, str]
Pairs = Iterator[tuple[ConnectionKey, ServiceName]]


class HealthNews:
    """What each listener was told, and what is due."""

    def __init__(self) -> None:
        self._identities: dict[ConnectionKey, Identity] = {}
        self._told: dict[ConnectionKey, dict[ServiceName, str]] = {}
        self._changed: dict[ServiceName, None] = {}
        self._due: deque[Pairs] = deque()

    @property
    def is_due(self) -> bool:
        """Whether `piece` has something to do."""
        return bool(self._due or self._changed)

    def listen(self, key: ConnectionKey, identity: Identity, services: Collection[ServiceName]) -> None:
        """Take a new listener, who is told of all services that it may use."""
        if identity.agent:
            self._identities[key], self._told[key] = identity, {}
            self._due.append(self._pairs((key,), frozenset(services)))

    def left(self, key: ConnectionKey) -> None:
        """Forget a listener; harmless for one that never was."""
        self._identities.pop(key, None)
        self._told.pop(key, None)

    def changed(self, services: Iterable[ServiceName]) -> None:
        """Have all who may use these services told of them when they were not told the same before."""
        self._changed |= dict.fromkeys(services)

    def piece(self, state: Callable[[ServiceName], str]) -> list[News]:
        """Return what is to be told now, at most MESSAGES_PER_PIECE; `state` says how a service is."""
        out: list[News] = []
        states: dict[ServiceName, str] = {}
        for _ in range(LOOKS_PER_PIECE):
            pair = self._next() if len(out) < MESSAGES_PER_PIECE else None
            if pair is None:
                break
            key, service = pair
            if service not in states:
                states[service] = state(service)
            told, now = self._told.get(key), states[service]
            if told is not None and told.get(service) != now:
                told[service] = now
                out.append((key, service, now))
        return out

    def _next(self) -> tuple[ConnectionKey, ServiceName] | None:
        while True:
            if not self._due:
                if not self._changed:
                    return None
                services, self._changed = frozenset(self._changed), {}
                self._due.append(self._pairs(tuple(self._identities), services))
            pair = next(self._due[0], None)
            if pair is not None:
                return pair
            self._due.popleft()

    def _pairs(self, keys: Iterable[ConnectionKey], services: frozenset[ServiceName]) -> Pairs:
        for key in keys:
            identity = self._identities.get(key)
            if identity is not None:
                granted = identity.agent
                for service in sorted(services if granted.every else services & granted.services):
                    yield key, service
