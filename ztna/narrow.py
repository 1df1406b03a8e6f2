"""Which hosts may be behind a path that swallows full TCP segments without a word (RFC 2923, 2.1).

Nothing tells such a path from a dead one. So a host is under suspicion for a while after a connection to it died, or
hung in its handshake, and connections to it take small segments: where it was something else, that costs little.
"""

from __future__ import annotations

from collections import OrderedDict

NARROW_SECONDS = 300.0
NARROW_HOSTS_MAX = 1024
SEGMENT_BYTES = 1220
"""What fits into IPv6's least MTU of 1280, the narrowest that tunnels have, with either kind of header."""


class NarrowHosts:
    """The hosts under suspicion, by address; times in seconds of one clock."""

    def __init__(self) -> None:
        self._until: OrderedDict[str, float] = OrderedDict()

    def suspect(self, host: str, now: float) -> None:
        """Take small segments to a host from now on, for NARROW_SECONDS."""
        self._until[host] = now + NARROW_SECONDS
        self._until.move_to_end(host)
        if len(self._until) > NARROW_HOSTS_MAX:
            self._until.popitem(last=False)

    def is_suspect(self, host: str, now: float) -> bool:
        """Say whether a host is under suspicion."""
        until = self._until.get(host)
        if until is not None and until <= now:
            del self._until[host]
        return host in self._until
