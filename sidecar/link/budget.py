"""How much memory flows may take: 256 MiB a process, 64 MiB a peer (protocol.md, Link: stream carrier).

Counts only; holds no bytes. A flow's receive window is reserved whole when it opens, as the peer may fill it at any
time, and so is a little for what it keeps unacknowledged, so that every flow can go on. What it keeps beyond that is
counted as it comes, and a flow without room stops reading its local socket.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ztna.wire.stream import WINDOW_BYTES_MAX, WINDOW_BYTES_MIN

PROCESS_BYTES = 256 * 1024 * 1024
PEER_BYTES = 64 * 1024 * 1024
KEPT_FLOOR_BYTES = 16 * 1024
KEPT_FRACTION = 8

# The share of a limit that is in use, in 64ths, below which a new flow gets the window beside it. Few flows are fast,
# many still fit: 2, 15 and 11 flows a peer with these windows, then 380 with the smallest. A process soon gives small
# ones: it has many peers, and room for 2,300 flows. The last eighth is never reserved: it is left for what is kept
# unacknowledged.
_PEER_TIERS = ((8, WINDOW_BYTES_MAX), (23, 1024 * 1024), (26, 256 * 1024), (56, WINDOW_BYTES_MIN))
_PROCESS_TIERS = ((4, WINDOW_BYTES_MAX), (8, 1024 * 1024), (12, 256 * 1024), (56, WINDOW_BYTES_MIN))


class Budget:
    """The counters of one process."""

    def __init__(self, process_bytes: int = PROCESS_BYTES, peer_bytes: int = PEER_BYTES) -> None:
        self._process_bytes = process_bytes
        self._peer_bytes = peer_bytes
        self._peers: dict[str, int] = {}
        self._waiting: dict[Share, Callable[[], None]] = {}
        self.used = 0

    def open(self, peer: str) -> Share | None:
        """Reserve a window for a new flow with a peer (its verified name); None at the limit."""
        used_by_peer = self._peers.get(peer, 0)
        window = min(
            _window(self.used, self._process_bytes, _PROCESS_TIERS),
            _window(used_by_peer, self._peer_bytes, _PEER_TIERS),
        )
        if not window:
            return None
        self._change(peer, window + KEPT_FLOOR_BYTES)
        return Share(self, peer, window)

    def used_by(self, peer: str) -> int:
        """Bytes counted for one peer."""
        return self._peers.get(peer, 0)

    def _free(self, peer: str) -> int:
        return max(0, min(self._process_bytes - self.used, self._peer_bytes - self._peers.get(peer, 0)))

    def _change(self, peer: str, size: int) -> None:
        self.used += size
        used = self._peers.get(peer, 0) + size
        if used:
            self._peers[peer] = used
        else:
            self._peers.pop(peer, None)
        if size < 0 and self._waiting:
            waiting, self._waiting = self._waiting, {}
            for wake in waiting.values():
                wake()


class Share:
    """One flow's part of the budget: its receive `window` in bytes, and what it keeps."""

    __slots__ = ("_budget", "_kept", "_peer", "window")

    def __init__(self, budget: Budget, peer: str, window: int) -> None:
        self._budget = budget
        self._peer = peer
        self._kept = 0
        self.window = window

    def room(self) -> int:
        """How many more bytes the flow may keep unacknowledged now.

        Beyond its floor no flow gets more than an eighth of what is free, so flows that are stuck never take all.
        """
        beyond = max(0, self._kept - KEPT_FLOOR_BYTES)
        fair = (self._budget._free(self._peer) + beyond) // KEPT_FRACTION
        return max(0, KEPT_FLOOR_BYTES + fair - self._kept)

    def keep(self, total: int) -> None:
        """Say how many bytes the flow keeps unacknowledged now."""
        change = max(total, KEPT_FLOOR_BYTES) - max(self._kept, KEPT_FLOOR_BYTES)
        self._kept = total
        if change:
            self._budget._change(self._peer, change)

    def wait(self, wake: Callable[[], None]) -> None:
        """Have `wake` called once when somebody gave something back; it must only look again."""
        self._budget._waiting[self] = wake

    def close(self) -> None:
        """Give everything back; again is harmless."""
        self._budget._waiting.pop(self, None)
        if self.window:
            size, self.window = self.window + max(self._kept, KEPT_FLOOR_BYTES), 0
            self._budget._change(self._peer, -size)


def _window(used: int, limit: int, tiers: Sequence[tuple[int, int]]) -> int:
    for sixty_fourths, window in tiers:
        if used < limit * sixty_fourths // 64 and used + window + KEPT_FLOOR_BYTES <= limit:
            return window
    return 0
