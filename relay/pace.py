"""How much one connection may ask of the relay: a bucket for each kind of message that costs others something.

What answers the relay's own offers is not counted: the relay set that pace itself. Pure.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum


class Kind(Enum):
    """What is paced: how much at once, and how much a second after that."""

    OPEN = (1_024.0, 256.0)
    """Each may cost an offer to a connector, and a line in the logs. An agent that comes back opens what it had."""
    REGISTER = (4_000.0, 100.0)
    """Services named by `register`: each costs a question to DNS. Twice what one connection may serve."""
    SIGNALING = (4_096.0, 512.0)
    """What is passed on to the other end of a session."""
    CONFLICT = (64.0, 1.0)
    DNS = (2_048.0, 128.0)
    """Questions to DNS: each costs one of the relay's own. An agent that comes back asks for all that it may use."""

    @property
    def burst(self) -> float:
        """How much at once."""
        return self.value[0]

    @property
    def per_second(self) -> float:
        """How much a second after that."""
        return self.value[1]


@dataclass(slots=True)
class Pace:
    """One connection's buckets; they are full at the start."""

    _left: dict[Kind, tuple[float, float]] = field(default_factory=dict)
    """By kind how much is left, and as of when."""

    def allows(self, kind: Kind, now: float, count: int = 1) -> bool:
        """Take so much out of the bucket, or nothing when there is less in it."""
        left, since = self._left.get(kind, (kind.burst, now))
        left = min(kind.burst, left + (now - since) * kind.per_second)
        allowed = count <= left
        self._left[kind] = (left - count if allowed else left, now)
        return allowed
