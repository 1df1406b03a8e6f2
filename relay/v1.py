"""What the datagrams of one `ztna-v1` agent come to: registrations, their answers, and packets of its sessions.

    (none) --0x10, open asked--> asking --opened--> standing, with a session <--opened--+
                                   |  |                  |                              |
                                   |  |                  +--closed--> standing, without-+ asked again: by a
                                   |  +--denied for now------------------^  |                packet, by health,
                                   +--denied for good--> (none), NACK       +--denied-->     ever more rarely
                                                                            standing, without

A client of relay.sessions like any v2 agent: it asks with `open` and hears `opened`, `denied`, `closed` and `health`.
Pure; sends nothing. What stands was ACKed and stays for the life of the connection: whether it may still be used is
asked anew with every session. Source: protocol.md, Datagrams.
"""

from __future__ import annotations

import msgspec

from relay.commands import ConnectionKey, Refusal
from relay.state import Session
from ztna.errors import BadName, ProtocolError, Refused
from ztna.identity import Identity
from ztna.names import ServiceName, SessionId
from ztna.reasons import Reason
from ztna.wire import control, datagram
from ztna.wire.datagram import NackStatus

FEATURES = frozenset({"opened", "denied", "closed", "health", "drain"})
"""What the relay's sessions tell this client."""
SERVICES_PER_AGENT_MAX = 256
ASKS_PER_SECOND_MAX = 256
"""Each one that asks costs an offer to a connector and a line in the log."""
ASK_AGAIN_SECONDS_MIN = 1.0
ASK_AGAIN_SECONDS_MAX = 30.0

_NACKS = {
    Reason.NO_GRANT: NackStatus.NOT_AUTHORISED,
    Reason.NO_SUCH_SERVICE: NackStatus.NO_SUCH_SERVICE,
    Reason.LIMIT_REACHED: NackStatus.LIMIT_REACHED,
}
"""Any other reason passes by itself, and no status says it: the registration stands."""


class Answer(msgspec.Struct, frozen=True):
    """Send the agent a datagram."""

    data: bytes


class Ask(msgspec.Struct, frozen=True):
    """Open a session for the agent."""

    message: control.Open


class PassOn(msgspec.Struct, frozen=True):
    """Take an IP packet to the session's connector."""

    session: SessionId
    packet: bytes


class Leave(msgspec.Struct, frozen=True):
    """End the connection, for the relay is going: nothing softer tells a v1 agent to look for another."""


class Drop(msgspec.Struct, frozen=True):
    """Count what was thrown away."""

    why: str


Command = Answer | Ask | PassOn | Leave | Drop | Refusal


class _Registration(msgspec.Struct):
    service: ServiceName
    stands: bool = False
    session: SessionId | None = None
    request: int | None = None
    """The `open` that is not answered yet."""
    ask_at: float = 0.0
    wait_s: float = ASK_AGAIN_SECONDS_MIN


class Agent:
    """The registrations of one v1 connection. Times in seconds of one monotonic clock."""

    def __init__(self, key: ConnectionKey, identity: Identity) -> None:
        self._key = key
        self._identity = identity
        self._registrations: dict[bytes, _Registration] = {}
        self._asked: dict[int, _Registration] = {}
        self._of_session: dict[SessionId, _Registration] = {}
        self._requests = 0
        self._second = 0.0
        self._asks_left = ASKS_PER_SECOND_MAX

    def datagram(self, data: bytes, now: float) -> list[Command]:
        """Act on what the agent sent."""
        try:
            message = datagram.decode(data)
        except ProtocolError:
            return [Drop("malformed_datagram")]
        match message:
            case datagram.ServicePacket(service, packet):
                return self._packet(self._registrations.get(service), packet, now)
            case datagram.RawPacket(packet):
                return self._packet(self._only(), packet, now)
            case datagram.RegisterAgent(service):
                return self._register(service, now)
            case datagram.RegisterConnector(service):
                return self._register_connector(service, now)
        return [Drop("unexpected_datagram")]

    def told(self, message: control.AnyMessage, now: float) -> list[Command]:
        """Act on what relay.sessions says to this client."""
        match message:
            case control.Opened():
                return self._opened(message)
            case control.Denied():
                return self._denied(message, now)
            case control.Closed():
                registration = self._of_session.pop(message.session)
                registration.session = None
                # One that was ended as idle, or by an operator, begins anew with the agent's next packet.
                is_over = message.reason is Reason.CLOSED_BY_PEER
                return [] if is_over else self._ask_again(registration, now)
            case control.Drain():
                return [Leave()]
            case control.Health(service, "passing"):
                waiting = self._registrations.get(service.encode())
                return [] if waiting is None else self._ask_again(waiting, now)
        return []

    # Registrations.

    def _register(self, service: bytes, now: float) -> list[Command]:
        known = self._registrations.get(service)
        if known is not None:
            # One that is still asked about is answered when that is.
            return [_ack(service), *self._ask_again(known, now)] if known.stands else []
        if not self._may_ask(now):
            return [Drop("registrations_per_second")]
        text = _text(service)
        if not text:
            return self._nack(b"", NackStatus.NOT_UTF8, Reason.MALFORMED)
        if len(self._registrations) >= SERVICES_PER_AGENT_MAX:
            return self._nack(service, NackStatus.LIMIT_REACHED, Reason.LIMIT_REACHED)
        try:
            registration = self._registrations[service] = _Registration(ServiceName(text))
        except BadName:
            # Nothing is called that; as with every name, only who is granted it hears so.
            reason = Reason.NO_SUCH_SERVICE if self._identity.agent.every else Reason.NO_GRANT
            return self._nack(service, _NACKS[reason], reason)
        return self._ask(registration, now)

    def _register_connector(self, service: bytes, now: float) -> list[Command]:
        if not self._may_ask(now):
            return [Drop("registrations_per_second")]
        if not _text(service):
            return self._nack(b"", NackStatus.NOT_UTF8, Reason.MALFORMED)
        return self._nack(service, NackStatus.NEEDS_V2, Reason.NO_GRANT)

    def _opened(self, message: control.Opened) -> list[Command]:
        registration = self._asked.pop(message.request)
        registration.request, registration.session = None, message.session
        registration.wait_s = ASK_AGAIN_SECONDS_MIN
        self._of_session[message.session] = registration
        return self._stand(registration)

    def _denied(self, message: control.Denied, now: float) -> list[Command]:
        registration = self._asked.pop(message.request)
        registration.request = None
        status = _NACKS.get(message.reason)
        if status is not None and not registration.stands:
            del self._registrations[registration.service.encode()]
            return [Answer(datagram.encode(datagram.Nack(status, registration.service.encode())))]
        registration.ask_at = now + registration.wait_s
        registration.wait_s = min(2 * registration.wait_s, ASK_AGAIN_SECONDS_MAX)
        return self._stand(registration)

    def _stand(self, registration: _Registration) -> list[Command]:
        if registration.stands:
            return []
        registration.stands = True
        return [_ack(registration.service.encode())]

    def _nack(self, service: bytes, status: NackStatus, reason: Reason) -> list[Command]:
        nack = Answer(datagram.encode(datagram.Nack(status, service)))
        subject = _text(service) or "a service that is not UTF-8"
        return [nack, Refusal(self._key, self._identity.name, "v1 registration", reason, subject)]

    # Sessions.

    def _ask_again(self, registration: _Registration, now: float) -> list[Command]:
        """Ask for the session of a registration that stands without one, if it is time."""
        if registration.session is not None or registration.request is not None:
            return []
        if now < registration.ask_at or not self._may_ask(now):
            return []
        return self._ask(registration, now)

    def _ask(self, registration: _Registration, now: float) -> list[Command]:
        self._requests += 1
        self._asked[self._requests] = registration
        registration.request, registration.ask_at = self._requests, now + ASK_AGAIN_SECONDS_MIN
        return [Ask(control.Open(self._requests, registration.service))]

    def _may_ask(self, now: float) -> bool:
        """Count one more that may cost an offer or a line in the log."""
        if now - self._second >= 1.0:
            self._second, self._asks_left = now, ASKS_PER_SECOND_MAX
        if self._asks_left == 0:
            return False
        self._asks_left -= 1
        return True

    # Packets.

    def _packet(self, registration: _Registration | None, packet: bytes, now: float) -> list[Command]:
        if registration is None or not registration.stands:
            return [Drop("not_registered")]
        if registration.session is None:
            return [Drop("no_session"), *self._ask_again(registration, now)]
        return [PassOn(registration.session, packet)]

    def _only(self) -> _Registration | None:
        """Return the only registration: a raw packet names no service."""
        return next(iter(self._registrations.values())) if len(self._registrations) == 1 else None


def connector_of(session: Session | None, agent: ConnectionKey) -> ConnectionKey:
    """Return where packets of an agent's session go. Raises Refused unless it is its own and open."""
    if session is None or session.agent != agent or not session.open:
        raise Refused(Reason.NOT_YOUR_SESSION, "a packet for a session that is not this agent's")
    return session.connector


def agent_of(session: Session | None, connector: ConnectionKey) -> ConnectionKey:
    """Return whom a connector's packet of a session is for. Raises Refused unless it serves it and it is open."""
    if session is None or session.connector != connector or not session.open:
        raise Refused(Reason.NOT_YOUR_SESSION, "a packet of a session that is not this connector's")
    return session.agent


def _ack(service: bytes) -> Answer:
    return Answer(datagram.encode(datagram.Ack(service)))


def _text(service: bytes) -> str:
    """Return the service as text, empty when it is empty or not UTF-8."""
    try:
        return service.decode()
    except UnicodeDecodeError:
        return ""
