"""Whether to take the keeper's lock, wait, or unseat a holder that has gone silent.

Consul lets a session live up to twice its TTL. The holder therefore writes the lock's key every
BEAT_SECONDS, and a rival that has seen nothing written for SILENCE_SECONDS ends the holder's session. That
is safe at any time, because every transaction of a keeper checks its session. Pure; Consul is asked by
dnsd.keeping.
"""

from __future__ import annotations

from enum import Enum, auto

from ztna.catalog import KvPair

BEAT_SECONDS = 2.5
LOOK_SECONDS = 1.0
SILENCE_SECONDS = 9.0
"""With LOOK_SECONDS and what Consul takes, another keeper is at work within 15 s."""


class Step(Enum):
    """What to do after a look at the lock."""

    ACQUIRE = auto()
    WAIT = auto()
    UNSEAT = auto()


class Rival:
    """Watches a lock that somebody else holds; times are of a monotonic clock, in seconds."""

    def __init__(self) -> None:
        self._seen: tuple[str, int] | None = None
        self._since = 0.0

    def look(self, pair: KvPair | None, now: float) -> Step:
        """Judge a consistent read of the lock's key."""
        if pair is None or pair.session is None:
            self._seen = None
            return Step.ACQUIRE
        seen = (pair.session, pair.modify_index)
        if seen != self._seen:
            self._seen, self._since = seen, now
        return Step.UNSEAT if now - self._since >= SILENCE_SECONDS else Step.WAIT

    def lose_sight(self) -> None:
        """Start over: Consul could not be read, so perhaps the holder could not write either."""
        self._seen = None
