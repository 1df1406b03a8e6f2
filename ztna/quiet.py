"""Keeps peers from filling the log: of what repeats, one line an interval, and then how many more there were.

Pure; what is counted in metrics is counted all the same.
"""

from __future__ import annotations

from collections import OrderedDict

INTERVAL_SECONDS = 10.0
KEYS_MAX = 10_000

Key = tuple[str, ...]
"""Who, and what is said of it."""


class Quiet:
    """Counts what was left out, by key."""

    def __init__(self) -> None:
        self._known: OrderedDict[Key, tuple[float, int]] = OrderedDict()
        """By key: when its interval ends, and how many lines were left out so far; the oldest first."""
        self.beyond = 0
        """Left out because there were too many keys at once."""

    def allows(self, key: Key, now: float) -> bool:
        """Say whether a line may be written now; if not it is counted."""
        known = self._known.get(key)
        if known is not None:
            self._known[key] = (known[0], known[1] + 1)
            return False
        if len(self._known) >= KEYS_MAX:
            self.beyond += 1
            return False
        self._known[key] = (now + INTERVAL_SECONDS, 0)
        return True

    def over(self, now: float) -> list[tuple[Key, int]]:
        """Forget the keys whose interval has ended, and return of which of them lines were left out, how many."""
        out = []
        while self._known and next(iter(self._known.values()))[0] <= now:
            key, (_, left_out) = self._known.popitem(last=False)
            if left_out:
                out.append((key, left_out))
        return out
