"""How many answers a source may have in a second (response rate limiting), as token buckets.

Pure: the time is passed in. Spoofed queries make a server answer somebody who never asked; past the limit that
somebody hears little.
"""

from __future__ import annotations

SOURCES_MAX = 65_536
"""Sources remembered; reaching it forgets them all, which errs towards answering."""
BURST_SECONDS = 2.0
"""A source that was silent may have this many seconds' worth at once."""


class Limiter:
    """One bucket for each source address."""

    def __init__(self, per_second: float) -> None:
        self._per_second = per_second
        self._burst = per_second * BURST_SECONDS
        self._buckets: dict[bytes, tuple[float, float]] = {}
        self._refused = 0

    def takes(self, source: bytes, now: float) -> bool:
        """Say whether one more answer to `source` is within the limit at `now` (seconds), and count it."""
        tokens, then = self._buckets.get(source, (self._burst, now))
        tokens = min(self._burst, tokens + (now - then) * self._per_second)
        if source not in self._buckets and len(self._buckets) >= SOURCES_MAX:
            self._buckets.clear()
        self._buckets[source] = (tokens - 1 if tokens >= 1 else tokens, now)
        return tokens >= 1

    def slips(self) -> bool:
        """Say whether to tell the source of a refused answer to come by TCP: every other time."""
        self._refused += 1
        return self._refused % 2 == 1
