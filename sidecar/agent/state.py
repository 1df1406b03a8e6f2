"""What sidecar.agent.sessions remembers of services, flows and sessions.

Pure; holds data and decides nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from sidecar.agent.commands import Session, SessionKey
from ztna.names import ServiceName
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
class Service:
    """One service: its lease, its state and the flows that wait."""

    name: ServiceName
    lease: LeaseRef
    state: State = IDLE
    waiting: dict[int, float] = field(default_factory=dict)  # flow -> deadline, oldest first
    failures: int = 0


@dataclass(slots=True)
class Flow:
    """A flow that waits for a session or uses one."""

    service: ServiceName
    session: SessionKey | None = None
    attempts: int = 1
    resolved: bool = False


@dataclass(slots=True)
class Live:
    """A session, how many flows use it, and why no new one may."""

    session: Session
    uses: int = 0
    retired: Reason | None = None
