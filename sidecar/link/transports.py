"""Decide over what a relay is spoken to: QUIC where UDP gets through, else TLS over TCP, and QUIC again once it may.

    quic --silent, TLS answers--> tls --a probe of QUIC answers--> quic

Pure: `now` is seconds of one clock. Connects nothing.
"""

from __future__ import annotations

from enum import StrEnum

from sidecar.link.pulse import Life

HEAD_START_SECONDS = 1.0
"""How long nothing may come by UDP before TLS is tried beside it."""
HEAD_START_BLOCKED_SECONDS = 0.2
"""The same where UDP was blocked a moment ago."""
RESCUE_RETRY_SECONDS = 1.0
PROBE_SECONDS = 5.0
PROBE_SECONDS_MAX = 60.0
STEADY_SECONDS = 30.0
"""QUIC that lasts less long than this after TLS was no improvement: it is probed half as often the next time."""


class Transport(StrEnum):
    """What carries a control connection."""

    QUIC = "quic"
    TLS = "tls"


class Transports:
    """What is known of the ways to one relay."""

    def __init__(self) -> None:
        self.current: Transport | None = None
        """What carries now or, while nothing does, what carried last."""
        self._since = 0.0
        self._probe_s = PROBE_SECONDS
        self._next_at = 0.0

    @property
    def head_start_s(self) -> float:
        """How long QUIC is tried alone when there is no connection."""
        return HEAD_START_BLOCKED_SECONDS if self.current is Transport.TLS else HEAD_START_SECONDS

    def connected(self, transport: Transport, now: float) -> None:
        """Take what carries from now on."""
        if (self.current, transport) == (Transport.QUIC, Transport.TLS):
            is_steady = now - self._since >= STEADY_SECONDS
            self._probe_s = PROBE_SECONDS if is_steady else min(2 * self._probe_s, PROBE_SECONDS_MAX)
        self.current, self._since = transport, now
        self._next_at = now + self._probe_s if transport is Transport.TLS else now

    def failed(self, now: float) -> None:
        """Hear that the other one did not get through either."""
        self._next_at = now + (self._probe_s if self.current is Transport.TLS else RESCUE_RETRY_SECONDS)

    def wanted(self, life: Life, now: float) -> Transport | None:
        """Return what to try beside the connection that stands, None when it is well as it is."""
        if now < self._next_at:
            return None
        if self.current is Transport.TLS:
            return Transport.QUIC
        return Transport.TLS if life is Life.SILENT else None
