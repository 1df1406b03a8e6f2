"""When a carrier's path is taken for dead, long before TCP gives it up (TCP_USER_TIMEOUT, 10 s).

Who has sent hears no ACK; who only receives has nothing that could be acknowledged, and so asks once when it falls
silent. To be wrong costs a RESUME and no byte; so that loss alone is seldom taken for death, the time is that of five
transmissions of one segment (RFC 6298, RFC 8985 7). A full peer acknowledges what finds no room.
"""

from __future__ import annotations

from enum import Enum, auto

LOOK_SECONDS = 0.5
STALL_SECONDS = 2.5
STALL_ROUND_TRIPS = 5
"""What a long way has, if that is more."""
QUIET_SECONDS = 0.5


class Verdict(Enum):
    """What is to be done about a carrier."""

    LEAVE = auto()
    ASK = auto()
    """Send something that the other end's host acknowledges."""
    DEAD = auto()


class Stall:
    """One carrier, looked at about each LOOK_SECONDS; times in seconds of one clock."""

    __slots__ = ("_looked_at", "_may_ask", "_quiet_since", "_received", "_waits_since")

    def __init__(self, now: float) -> None:
        self._looked_at = now
        self._received = 0
        self._quiet_since = now
        self._may_ask = False
        self._waits_since: float | None = None

    @property
    def is_settled(self) -> bool:
        """Whether there is nothing to find out before more is sent or received."""
        return self._waits_since is None and not self._may_ask

    def look(self, now: float, received: int, unacknowledged: int, ack_age_s: float, rtt_s: float) -> Verdict:
        """Judge by the bytes received so far, the segments on their way, the last ACK's age, and the round trip."""
        looked_at, self._looked_at = self._looked_at, now
        if received != self._received:
            self._received, self._quiet_since, self._may_ask = received, now, True
        if not unacknowledged:
            self._waits_since = None
        elif self._waits_since is None or ack_age_s <= now - looked_at:
            self._waits_since = now
        elif now - self._waits_since >= max(STALL_SECONDS, STALL_ROUND_TRIPS * rtt_s):
            return Verdict.DEAD
        if self._may_ask and not unacknowledged and now - self._quiet_since >= QUIET_SECONDS:
            self._may_ask = False
            self._waits_since = now  # of what is sent now
            return Verdict.ASK
        return Verdict.LEAVE
