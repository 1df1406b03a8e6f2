"""What sidecar.agent.sessions remembers of services, flows and sessions.

Pure; holds data and decides nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from sidecar.agent.commands import Session, SessionKey
from ztna.names import ConnectorId, ServiceName
from ztna.reasons import Reason
from ztna.wire.control import LeaseRef


@dataclass(frozen=True, slots=True)
class Idle:
    """No session, and nobody who waits for one, or no relay to ask."""

    name = "idle"


@dataclass(frozen=True, slots=True)
class Opening:
    """A relay was asked."""

    request: int
    relay: str
    lease: LeaseRef
    until: float
    tried: frozenset[str]
    name = "opening"


@dataclass(frozen=True, slots=True)
class Resolving:
    """The lease is read again."""

    until: float
    name = "resolving"


@dataclass(frozen=True, slots=True)
class Ready:
    """The session that new flows get."""

    session: Session
    name = "open"


@dataclass(frozen=True, slots=True)
class BackingOff:
    """Every relay said no, or the session failed again and again: flows fail until then."""

    reason: Reason
    until: float
    name = "denied"


State = Idle | Opening | Resolving | Ready | BackingOff
IDLE = Idle()


@dataclass(slots=True)
class Place:
    """Where flows of one service wait for a session: with any connector, or with the one that has them already."""

    service: ServiceName
    connector: ConnectorId | None = None
    state: State = IDLE
    waiting: dict[int, float] = field(default_factory=dict)  # flow -> deadline
    failures: int = 0


@dataclass(slots=True)
class Service:
    """One service: its lease, and the places where its flows wait; the pinned ones live only while they are needed."""

    name: ServiceName
    lease: LeaseRef
    any: Place
    pinned: dict[ConnectorId, Place] = field(default_factory=dict)

    def places(self) -> tuple[Place, ...]:
        """Return all places."""
        return (self.any, *self.pinned.values())


@dataclass(slots=True)
class Flow:
    """A flow that waits for a session or uses one; `former` are those it moves away from."""

    service: ServiceName
    session: SessionKey | None = None
    former: tuple[SessionKey, ...] = ()
    wait_s: float = 0.0
    attempts: int = 1
    resolved: bool = False
    may_begin_anew: bool = False
    """Whether it may go to another connector once the one that it waits for has gone."""


@dataclass(slots=True)
class Live:
    """A session, how many flows use it, why no new one may, and whether those it has were told to leave."""

    session: Session
    uses: int = 0
    retired: Reason | None = None
    left: bool = False
    runs_out: bool = False
    """Whether only flows that it had already may use it: also to come back to it."""
