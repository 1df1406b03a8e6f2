"""What sidecar.agent.sessions is told and what it decides, as values: events in, commands out.

Pure; does nothing itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from ztna.names import ConnectorId, ServiceName, SessionId
from ztna.reasons import Reason
from ztna.wire.control import AnyMessage, Closed, LeaseRef, Open, Opened

SessionKey = tuple[str, SessionId]
"""A relay's name and the session it made: two relays may draw the same id."""


@dataclass(frozen=True, slots=True)
class Session:
    """A session as a relay opened it, under the lease it was asked for with."""

    relay: str
    lease: LeaseRef
    opened: Opened
    since: float

    @property
    def key(self) -> SessionKey:
        """The relay and the id."""
        return (self.relay, self.opened.session)

    @property
    def service(self) -> ServiceName:
        """The one service it carries."""
        return self.opened.service


class Cause(Enum):
    """Why a flow gives its session back."""

    STALE = Reason.STALE_EPOCH
    """The connector knows a newer lease."""
    FAILED = Reason.PEER_GONE
    """The connector cannot be reached, or its link fell silent."""
    DENIED = Reason.CLOSED_BY_PEER
    """The connector does not take the session."""

    @property
    def reason(self) -> Reason:
        """What is said of it on the wire and in logs."""
        return Reason(self.value)


@dataclass(frozen=True, slots=True)
class RelayUp:
    """The control connection to a relay stands."""

    relay: str


@dataclass(frozen=True, slots=True)
class RelayDown:
    """It has gone, and all its sessions with it: by itself, or for what it found wrong with our certificate."""

    relay: str
    reason: Reason = Reason.PEER_GONE


@dataclass(frozen=True, slots=True)
class RelaySilent:
    """It leaves PINGs unanswered; its sessions live, and what rides them should go elsewhere."""

    relay: str


@dataclass(frozen=True, slots=True)
class RelayHeard:
    """A silent relay answered after all."""

    relay: str


@dataclass(frozen=True, slots=True)
class RelayForgotten:
    """It is none of ours any more; it went down before."""

    relay: str


@dataclass(frozen=True, slots=True)
class Measured:
    """A relay's round trip time, in seconds."""

    relay: str
    rtt_s: float


@dataclass(frozen=True, slots=True)
class Received:
    """A relay said something; messages that are none of this module's are ignored."""

    relay: str
    message: AnyMessage


@dataclass(frozen=True, slots=True)
class LeaseIs:
    """A service has this lease now, or none any more."""

    service: ServiceName
    lease: LeaseRef | None


@dataclass(frozen=True, slots=True)
class Want:
    """A new flow needs a session; its number is the caller's and unique while the flow lives."""

    flow: int
    service: ServiceName


@dataclass(frozen=True, slots=True)
class Retry:
    """A flow that was told to proceed could not; it wants another try."""

    flow: int
    cause: Cause


@dataclass(frozen=True, slots=True)
class Move:
    """A running flow needs a session with the connector that has it, by whatever relay, maybe the one it has.

    What it has stays its own until Settle. While that is live the flow waits as long as it takes, else `wait_s`.
    Of a `doubted` session it is not known whether its connector still lives: another is asked for, and the flow fails
    as `no_healthy_connector` as soon as a relay says that the connector has gone without a word.
    """

    flow: int
    connector: ConnectorId
    wait_s: float
    doubted: SessionKey | None = None


@dataclass(frozen=True, slots=True)
class Settle:
    """A flow that moved needs its former sessions no longer."""

    flow: int


@dataclass(frozen=True, slots=True)
class Release:
    """A flow has ended, whatever it was doing."""

    flow: int


@dataclass(frozen=True, slots=True)
class Tick:
    """The time of `next_timer()` has come."""


RelayEvent = RelayUp | RelayDown | RelaySilent | RelayHeard | RelayForgotten | Measured
FlowEvent = Want | Retry | Move | Settle | Release
Event = RelayEvent | FlowEvent | Received | LeaseIs | Tick


@dataclass(frozen=True, slots=True)
class Send:
    """Send a message to a relay."""

    relay: str
    message: Open | Closed


@dataclass(frozen=True, slots=True)
class Proceed:
    """The flow may use the session until it releases it."""

    flow: int
    session: Session


@dataclass(frozen=True, slots=True)
class Fail:
    """There is no session for the flow, which is forgotten: tell the local program at once."""

    flow: int
    reason: Reason


@dataclass(frozen=True, slots=True)
class Ended:
    """A session is no more; what rides it ends as protocol.md, Ending, says for the reason.

    `relay_lost`: only the relay is known to be gone, so that its flows may Move.
    """

    session: Session
    reason: Reason
    relay_lost: bool = False


@dataclass(frozen=True, slots=True)
class Leave:
    """The session's relay drains or is silent, and another is up: what rides the session should Move."""

    session: Session


@dataclass(frozen=True, slots=True)
class RunOut:
    """Its relay wants nothing new on the session: what can begin anew elsewhere should, the rest may finish."""

    session: Session


@dataclass(frozen=True, slots=True)
class ReadLease:
    """Read the service's lease again and answer with LeaseIs."""

    service: ServiceName


Command = Send | Proceed | Fail | Ended | Leave | RunOut | ReadLease


@dataclass(frozen=True, slots=True)
class ServiceView:
    """What `/status` shows of a service."""

    service: ServiceName
    state: str
    session: Session | None
    reason: Reason | None
    waiting: int
