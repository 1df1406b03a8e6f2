"""All that a relay holds: connections, registrations, sessions; how the ends are told, and what an end undoes.

Pure; the one place where a session ends, so that it leaves all tables at once. Who may have one is decided in
relay.opening, whose messages about one count in relay.sessions.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from relay import policy
from relay.book import SessionBook
from relay.commands import Command, ConnectionKey, Refusal, Send, Told
from relay.registrations import Registrations
from relay.rules import Leaving, Rules
from relay.state import Peer, Session
from ztna.names import SessionId
from ztna.reasons import Reason
from ztna.wire import control
from ztna.wire.control import AnyMessage


class Holdings:
    """To be changed by relay.sessions and relay.opening alone. What is to be told is added to `out`."""

    def __init__(self, rules: Rules, random: Callable[[int], bytes]) -> None:
        """`random(n)` returns n unpredictable bytes."""
        self.rules, self.random = rules, random
        self.table = policy.EMPTY_TABLE
        self.peers: dict[ConnectionKey, Peer] = {}
        self.serving = Registrations()
        self.book = SessionBook(random)
        self.leaving = Leaving(rules)
        self.offers: dict[SessionId, float] = {}
        """Sessions that were offered and not accepted yet, and until when: the first first."""
        self.of_v1: set[SessionId] = set()
        """Open sessions of v1 agents."""

    def send(self, key: ConnectionKey, message: AnyMessage, out: list[Command]) -> None:
        """Send a message to a connection that is there and knows its type."""
        peer = self.peers.get(key)
        if peer is not None and peer.features is not None and type_of(message) in peer.features:
            out.append(Send(key, message))

    def refuse(self, peer: Peer, about: str, reason: Reason, subject: str, out: list[Command]) -> None:
        """Tell the operator that a peer was refused something."""
        out.append(Refusal(peer.key, peer.identity.name, about, reason, subject))

    def deny(self, key: ConnectionKey, request: control.Open, reason: Reason, out: list[Command]) -> None:
        """Tell an agent that it gets no session, and why."""
        self.send(key, control.Denied(request.request, request.service, reason), out)
        self.refuse(self.peers[key], "open", reason, request.service, out)

    def cut(self, session: Session, reason: Reason, by: str, now: float, out: list[Command]) -> None:
        """End a session and tell both ends; who still waits for it is denied."""
        self.end(session, reason, by, now, out)
        self.send(session.connector, control.Closed(session.id, reason), out)
        if session.open:
            self.send(session.agent, control.Closed(session.id, reason), out)
        else:
            self.deny(session.agent, session.attempt.request, reason, out)

    def end(self, session: Session, reason: Reason, by: str, now: float, out: list[Command]) -> None:
        """Take a session out of all tables; `by` says who ended it."""
        self.tell_end(session, reason, by, now, out)
        out += self.book.remove(session, now)
        for end in session.link:
            peer = self.peers.get(end)
            if peer is not None:
                peer.sessions.discard(session.id)
        self.offers.pop(session.id, None)
        self.of_v1.discard(session.id)
        place = (session.service, session.connector_id)
        if place not in self.book.routed:
            self.leaving.forget(place)

    def tell_end(self, session: Session, reason: Reason, by: str, now: float, out: list[Command]) -> None:
        """Tell the operator that a session ends, if it was open."""
        if session.opened_at is not None:
            seconds = round(now - session.opened_at, 1)
            self.tell("session_closed", session, {"reason": reason, "by": by, "seconds": seconds}, out)

    def tell(
        self,
        event: Literal["session_opened", "session_closed"],
        session: Session,
        more: dict[str, str | float],
        out: list[Command],
    ) -> None:
        """Tell the operator of a session, with more fields."""
        fields: dict[str, str | float] = {
            "session": session.id,
            "service": session.service,
            "agent": session.agent_name,
            "connector_id": session.connector_id,
        }
        began_at = session.attempt.began_at
        took = (session.opened_at or began_at) - began_at
        known = fields | more
        out.append(Told(event, session.id, session.link, session.path, session.v1_bytes, known, took))


def type_of(message: AnyMessage) -> str:
    """Return the type that a message carries on the wire."""
    return str(message.__struct_config__.tag)
