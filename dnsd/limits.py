"""How many answers a source may have in a second (response rate limiting), as token buckets.

Pure: the time is passed in, and so is the memory of the buckets, so that several workers can share them. Spoofed
queries make a server answer somebody who never asked; past the limit that somebody hears little.
"""

from __future__ import annotations

BURST_SECONDS = 2.0
"""A source that was silent may have this many seconds' worth at once."""
SOURCES_MAX = 65_536
"""Sources remembered; another one takes the place of one not seen for longer, which errs towards answering."""
PLACES_PER_SOURCE = 4
"""A source's bucket is in one of so many places."""
TABLE_BYTES = SOURCES_MAX * 24

# A bucket is three words: the source (0: nobody's), its tokens, and when they were counted, in seconds.
_WORDS = 3
_TABLE_WORDS = SOURCES_MAX * _WORDS
_MIX = 0x9E37_79B1
"""Spreads neighbouring addresses: 2 ** 32 by the golden ratio (Knuth, 6.4)."""
_PER_PLACE = 2**32 // SOURCES_MAX


class Limiter:
    """One bucket for each source address.

    Two processes that share a table and count the same source at the same moment may lose one of the two.
    """

    def __init__(self, per_second: float, table: memoryview | None = None) -> None:
        """Count in `table`, TABLE_BYTES of zeroes, or in memory of its own."""
        words = memoryview(bytearray(TABLE_BYTES)) if table is None else table
        self._sources, self._numbers = words.cast("Q"), words.cast("d")
        self._per_second = per_second
        self._burst = per_second * BURST_SECONDS
        self._refused = 0

    def takes(self, source: bytes, now: float) -> bool:
        """Say whether one more answer to `source` (4 bytes) is within the limit at `now` (seconds), and count it."""
        key = int.from_bytes(source) + 1
        at = (key * _MIX & 0xFFFF_FFFF) // _PER_PLACE * _WORDS
        sources, numbers = self._sources, self._numbers
        if sources[at] != key:
            at = self._place(key, at)
        tokens = numbers[at + 1] + (now - numbers[at + 2]) * self._per_second
        numbers[at + 2] = now
        if tokens > self._burst:
            tokens = self._burst
        if tokens >= 1:
            numbers[at + 1] = tokens - 1
            return True
        numbers[at + 1] = tokens
        return False

    def slips(self) -> bool:
        """Say whether to tell the source of a refused answer to come by TCP: every other time."""
        self._refused += 1
        return self._refused % 2 == 1

    def _place(self, key: int, first: int) -> int:
        """Return where the source's bucket is; without one, take the bucket of its places longest untouched."""
        sources, numbers = self._sources, self._numbers
        oldest = first
        for place in range(first, first + PLACES_PER_SOURCE * _WORDS, _WORDS):
            at = place % _TABLE_WORDS
            if sources[at] == key:
                return at
            if numbers[at + 2] < numbers[oldest + 2]:
                oldest = at
        sources[oldest], numbers[oldest + 1] = key, self._burst
        return oldest
