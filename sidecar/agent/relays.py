"""Decide which relay is asked first: one that is up, the nearest by measured round trip, and not another each moment.

    down --connected--> up <--heard / silent--> silent --> down
                        up --drain--> draining --> down

Pure; knows no session and no connection.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum

BETTER_RTT_RATIO = 1.5
BETTER_RTT_SECONDS = 0.002
BETTER_FOR_SECONDS = 10.0
"""Another relay is preferred only when it was nearer by this ratio and this much for so long."""


class RelayState(StrEnum):
    """What is known of one relay; the order is that in which they are asked."""

    UP = "up"
    SILENT = "silent"
    """It leaves PINGs unanswered: what rides it goes elsewhere, and it may yet come back."""
    DRAINING = "draining"
    DOWN = "down"


_ASKED = (RelayState.UP, RelayState.SILENT, RelayState.DRAINING)


@dataclass(slots=True)
class _Relay:
    state: RelayState = RelayState.DOWN
    rtt_s: float | None = None


class Relays:
    """All relays of one agent, and which of them is preferred."""

    def __init__(self, names: Iterable[str]) -> None:
        """Take the relays' names, in the order in which they are preferred while nothing is measured."""
        self._relays = {name: _Relay() for name in names}
        self._better_since: tuple[str, float] | None = None
        self.preferred: str | None = None

    @property
    def states(self) -> Mapping[str, RelayState]:
        """Each relay's state."""
        return {name: relay.state for name, relay in self._relays.items()}

    def state(self, name: str) -> RelayState:
        """Return a relay's state; one that was never heard of is down."""
        relay = self._relays.get(name)
        return relay.state if relay is not None else RelayState.DOWN

    def rtt_s(self, name: str) -> float | None:
        """Return the last round trip time of a relay, in seconds."""
        relay = self._relays.get(name)
        return relay.rtt_s if relay is not None else None

    def set(self, name: str, state: RelayState) -> None:
        """Take a relay's new state; one that is new is added last."""
        relay = self._relays.setdefault(name, _Relay())
        relay.state = state
        if state is RelayState.DOWN:
            relay.rtt_s = None
        self._prefer()

    def forget(self, name: str) -> None:
        """Drop a relay that is no longer one of ours."""
        self._relays.pop(name, None)
        self._prefer()

    def measured(self, name: str, rtt_s: float, now: float) -> bool:
        """Take a measured round trip; return whether another relay is preferred from now on."""
        self._relays.setdefault(name, _Relay()).rtt_s = rtt_s
        best, preferred = self._nearest(), self.preferred
        if best is None or preferred is None or not self._is_better(best, preferred):
            self._better_since = None
            return False
        if self._better_since is None or self._better_since[0] != best:
            self._better_since = (best, now)
        if now - self._better_since[1] < BETTER_FOR_SECONDS:
            return False
        self.preferred, self._better_since = best, None
        return True

    def choose(self, tried: Collection[str] = ()) -> str | None:
        """Return the relay to ask next: the preferred one, else the best that was not tried yet."""
        for state in _ASKED:
            found = [name for name, each in self._relays.items() if each.state is state and name not in tried]
            if self.preferred in found:
                return self.preferred
            if found:
                return min(found, key=self._distance)
        return None

    def _prefer(self) -> None:
        """Stay with the preferred relay while it is up."""
        if self.preferred is None or self.state(self.preferred) is not RelayState.UP:
            self.preferred, self._better_since = self._nearest(), None

    def _nearest(self) -> str | None:
        up = [name for name, relay in self._relays.items() if relay.state is RelayState.UP]
        return min(up, key=self._distance, default=None)

    def _distance(self, name: str) -> float:
        """Return what relays are ordered by: those that were not measured yet come last, in their own order."""
        rtt_s = self._relays[name].rtt_s
        return rtt_s if rtt_s is not None else float("inf")

    def _is_better(self, name: str, other: str) -> bool:
        ratio = self._distance(name) * BETTER_RTT_RATIO < self._distance(other)
        return ratio and self._distance(name) + BETTER_RTT_SECONDS < self._distance(other)
