"""What spliced TCP may carry: bytes a second each way of a link, as relay.links has it for UDP.

Pure: `now` is passed in. The quota is relay.links' own, which both share.
"""

from __future__ import annotations

from collections.abc import Hashable

from relay.links import Limits


class Meter:
    """One way of one link: a bucket of bytes that its TCP connections share."""

    __slots__ = ("_burst", "_filled_at", "_rate", "left")

    def __init__(self, rate_bytes_per_s: int, burst_bytes: int, now: float) -> None:
        self._rate, self._burst, self._filled_at = rate_bytes_per_s, burst_bytes, now
        self.left = burst_bytes
        """How much may pass now; who lets something pass takes it off."""

    def refill(self, now: float) -> None:
        """Let more pass, for the time that went by."""
        grant = int((now - self._filled_at) * self._rate)
        if grant > 0:
            # Whole bytes only: what is short of one counts the next time.
            self._filled_at += grant / self._rate
            self.left = min(self._burst, self.left + grant)


class Meters:
    """Both meters of each link that has TCP connections; none where no rate is set."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._of: dict[Hashable, tuple[Meter, Meter]] = {}

    def of(self, link: Hashable, now: float) -> tuple[Meter | None, Meter | None]:
        """Return the meters of a link: of what its agent sends, and of what its connector does."""
        rate, burst = self._limits.rate_bytes_per_s, self._limits.burst_bytes
        if rate is None:
            return None, None
        if link not in self._of:
            self._of[link] = Meter(rate, burst, now), Meter(rate, burst, now)
        return self._of[link]

    def forget(self, link: Hashable) -> None:
        """Hear that a link has ended; harmless when nothing is known of it."""
        self._of.pop(link, None)
