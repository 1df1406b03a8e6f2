"""What counts as one source of strangers, and how much of what is bounded one source may hold.

Pure; what is held, and what becomes of who may not, is the owner's.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable
from ipaddress import ip_network

PROOF_SHARE = 4
"""With a quarter under way, of all or of one source, newcomers have to prove an address first (RFC 9000 8.1.2)."""


def source_of(host: str) -> str:
    """Return what counts as one source: an IPv4 address, or the /64 that one IPv6 host has to itself."""
    return host if ":" not in host else str(ip_network((host.partition("%")[0], 64), strict=False))


class HalfOpen:
    """Handshakes under way, by who makes them: at most so many in all, and so many of one source."""

    def __init__(self, total: int, per_source: int) -> None:
        self._total, self._per_source = total, per_source
        self._source: dict[Hashable, str] = {}
        self._of: Counter[str] = Counter()

    def __len__(self) -> int:
        return len(self._source)

    def __contains__(self, who: Hashable) -> bool:
        return who in self._source

    def full(self, source: str) -> bool:
        """Say whether another one of the source would be too many."""
        return len(self._source) >= self._total or self._of[source] >= self._per_source

    def wants_proof(self, source: str) -> bool:
        """Say whether the next one of the source has to prove its address: anybody can write another's on a packet."""
        return (
            len(self._source) * PROOF_SHARE >= self._total
            or self._of[source] * PROOF_SHARE >= self._per_source
        )

    def begin(self, who: Hashable, source: str) -> None:
        """Count one more."""
        self._source[who] = source
        self._of[source] += 1

    def end(self, who: Hashable) -> None:
        """Count one less; harmless when it is not under way."""
        source = self._source.pop(who, None)
        if source is None:
            return
        self._of[source] -= 1
        if not self._of[source]:
            del self._of[source]
