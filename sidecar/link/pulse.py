"""Decide when a relay is asked for a sign of life, and what its silence means.

    up --no answer to a PING for VERDICT_SECONDS--> silent --GONE_SECONDS--> gone
       <-----------------------anything genuine----

Silent is a suspicion that costs little to act on (what rides the relay goes elsewhere) and nothing to take back; gone
ends the connection. Pure: `now` and `heard_at` are seconds of one clock. Source: protocol.md, Every QUIC leg.
"""

from __future__ import annotations

from enum import StrEnum

PING_SECONDS = 3.0
BUSY_PING_SECONDS = 0.5
"""While flows depend on the relay: with VERDICT_SECONDS it is missed soon enough to be replaced within 2 s."""
VERDICT_SECONDS = 0.75
PING_AGAIN_SECONDS = 0.25
"""A PING, or its answer, that got lost must not look like silence."""
GONE_SECONDS = 3.0
STALL_SECONDS = 0.25
"""A step that comes so much too late was held up here, and its answer may wait unread: that time does not count."""


class Life(StrEnum):
    """What is known of the other end."""

    UP = "up"
    SILENT = "silent"
    GONE = "gone"


class Pulse:
    """The signs of life of one connection. `life` is the verdict of the last `step`."""

    def __init__(self, now: float) -> None:
        self.life = Life.UP
        self._heard_at = now
        self._pinged_at = now
        self._stepped_at = now
        self._asked_at: float | None = None

    def step(self, heard_at: float, now: float, *, busy: bool) -> bool:
        """Take the time of the last genuine packet, judge, and return whether to send a PING now."""
        if heard_at > self._heard_at:
            self._heard_at, self._asked_at = heard_at, None
        elif self._asked_at is not None and now - self._stepped_at > PING_AGAIN_SECONDS + STALL_SECONDS:
            self._asked_at += now - self._stepped_at - PING_AGAIN_SECONDS
        self._stepped_at = now
        self.life = self._judge(now)
        if now < self.next_timer(busy=busy):
            return False
        self._pinged_at = now
        if self._asked_at is None:
            self._asked_at = now
        return True

    def next_timer(self, *, busy: bool) -> float:
        """Return when to `step` next."""
        if self._asked_at is not None:
            return self._pinged_at + PING_AGAIN_SECONDS
        return self._pinged_at + (BUSY_PING_SECONDS if busy else PING_SECONDS)

    def _judge(self, now: float) -> Life:
        if self._asked_at is None:
            return Life.UP
        if now - self._asked_at >= GONE_SECONDS:
            return Life.GONE
        return Life.SILENT if now - self._asked_at >= VERDICT_SECONDS else Life.UP
