"""Connections to the forwarder's TCP port that are not bound yet, and what admits them.

Holds them and says which must go for another; closes none.
"""

from __future__ import annotations

import socket
from collections import defaultdict
from dataclasses import dataclass, field

from ztna.names import SessionId

STRANGERS_PER_SOURCE_MAX = 256
"""Connections of one source (an IPv4 address, an IPv6 /64) that have shown no token yet."""


@dataclass(slots=True)
class Token:
    """Admits one connection: an agent's, or the connector's that joins `waiting`."""

    session: SessionId
    expires_at: float
    waiting: Dialled | None = None


@dataclass(slots=True, eq=False)
class Dialled:
    """A connection that is not bound yet."""

    sock: socket.socket
    source: str
    deadline: float
    head: bytearray = field(default_factory=bytearray)
    session: SessionId | None = None


class Strangers:
    """Connections that have shown no token yet, the oldest first.

    Anybody can connect and say nothing; who has a token says it at once. So a newcomer takes the place of the one
    that waited longest, and one source's flood costs that source's own strangers only.
    """

    def __init__(self) -> None:
        self._all: dict[Dialled, None] = {}
        self._of: defaultdict[str, dict[Dialled, None]] = defaultdict(dict)

    def add(self, dialled: Dialled) -> None:
        """Take a newcomer in."""
        self._all[dialled] = self._of[dialled.source][dialled] = None

    def discard(self, dialled: Dialled) -> None:
        """Forget one that showed a token or went; harmless when it is not there."""
        if dialled in self._all:
            del self._all[dialled]
            own = self._of[dialled.source]
            del own[dialled]
            if not own:
                del self._of[dialled.source]

    def oldest(self) -> Dialled | None:
        """Return the one that waited longest."""
        return next(iter(self._all), None)

    def oldest_of_full(self, source: str) -> Dialled | None:
        """Return the one that must go before another comes from the source; None when there is room."""
        own = self._of.get(source, {})
        return next(iter(own)) if len(own) >= STRANGERS_PER_SOURCE_MAX else None
