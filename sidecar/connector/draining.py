"""When a connector that leaves takes no more flows of a service, and when it ends those that run.

    SIGTERM --handover--> no new flows --drain_s of the service--> reset       all of it within connector.drain_s

Relays tell agents to begin elsewhere during the handover; what they begin here until then is good. It is part of the
time to drain and adds nothing to it. Pure: times are seconds of one clock.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from ztna.names import ServiceName

HANDOVER_SECONDS = 1.0
"""How long after SIGTERM flows may still be begun."""


@dataclass(frozen=True, slots=True)
class Drain:
    """A drain that began at `began`, of `seconds`, or what a service has of its `own` if that is less.

    `offered` are the services that agents have sessions for: with none there is nobody to hand over.
    """

    began: float
    seconds: float
    own: Mapping[ServiceName, float]
    offered: frozenset[ServiceName]

    def ends_at(self, service: ServiceName) -> float:
        """Return when flows of the service are reset."""
        return self.began + min(self.seconds, self.own.get(service, self.seconds))

    def takes_until(self, service: ServiceName) -> float:
        """Return when flows of the service are begun here no more."""
        return min(self.began + HANDOVER_SECONDS, self.ends_at(service))

    def next_timer(self, now: float, running: Iterable[ServiceName]) -> float | None:
        """Return when to look again while flows of these services run; None: nothing runs, and nothing can begin."""
        moments = {self.ends_at(service) for service in running}
        moments |= {at for service in self.offered if (at := self.takes_until(service)) > now}
        return min(moments, default=None)
