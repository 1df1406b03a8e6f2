"""What an operator decides about sessions: how many there may be, and what becomes of those whose connector leaves DNS.

Pure; relay.sessions goes by it.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from relay.policy import Route
from ztna.names import ConnectorId, ServiceName
from ztna.reasons import Reason

Place = tuple[ServiceName, ConnectorId]
"""A connector as it serves one service."""


class Rules(msgspec.Struct, frozen=True):
    """The limits, and `leaving`: see Leaving."""

    per_identity: int
    per_service: int
    total: int
    leaving: Literal["close", "move"] = "close"
    leave_grace_s: float = 10.0
    """A check that flaps must not cut what works."""


class Leaving:
    """Since when connectors are no longer in a service's SRV records, and what becomes of their sessions.

    After the grace, `close` ends them. `move` has them run out as soon as another connector could have what the agent
    begins next, and spares them until then; both for as long as an answer of DNS may be relied on.
    """

    def __init__(self, rules: Rules) -> None:
        self._rules = rules
        self._since: dict[Place, float] = {}

    def verdict(
        self,
        place: Place,
        routes: tuple[Route, ...] | None,
        elsewhere: bool,
        hold_s: float,
        now: float,
        *,
        withdrew: bool = False,
    ) -> Reason | None:
        """Return why the sessions of a connector must end, None while they may go on.

        `routes` is what DNS says of the service, None when it cannot be relied on; `elsewhere` is whether
        another connector could serve it. One that `withdrew` by itself drains: it gets no session any more, and
        ends those it has, for as long as an answer of DNS may be relied on.
        """
        if routes is None:
            return Reason.POLICY_UNKNOWN
        if any(route.connector_id == place[1] for route in routes):
            self.forget(place)
            return None
        gone_s = now - self._since.setdefault(place, now)
        if gone_s < self._rules.leave_grace_s:
            return None
        if gone_s >= hold_s or (self._rules.leaving == "close" and not withdrew):
            return Reason.NO_HEALTHY_CONNECTOR
        if withdrew:
            return None
        return Reason.DRAINING if elsewhere else None

    def forget(self, place: Place) -> None:
        """Hear that it is back, or has no session left. Harmless when nothing is known of it."""
        self._since.pop(place, None)
