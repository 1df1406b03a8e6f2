"""The relay's sessions: who opened them, who serves them, and whose messages about them count.

Pure: events with `now` in, commands (relay.commands) out; random bytes come from the function passed in. A
session belongs to two connection objects and to nobody else (design.md 2.4); connections are opaque keys. How an `open`
gets its session is in relay.opening, what all this is about in relay.holdings. Does not know how a connection or a
forwarder works. Source: protocol.md, Control stream.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable

from relay import policy
from relay.admission import registration_refusal
from relay.commands import (
    AdmitAgent,
    AdmitConnector,
    AskDns,
    Command,
    ConnectionKey,
    Event,
    Refusal,
    Send,
    SendHealth,
)
from relay.holdings import Holdings, type_of
from relay.opening import BY_RELAY, Opening
from relay.ownership import AboutSession, Signaling, owns
from relay.pace import Kind
from relay.rules import Rules
from relay.state import Peer, Session
from relay.telling import HealthNews
from ztna.errors import ProtocolError
from ztna.identity import Identity
from ztna.jsontypes import Secret
from ztna.names import ConnectorId, ServiceName, SessionId
from ztna.reasons import Reason
from ztna.wire import control
from ztna.wire.control import Address, AnyMessage
from ztna.wire.forwarder import TOKEN_BYTES

CONFLICTS_PER_CONNECTION_MAX = 16
V1_IDLE_SECONDS = 300.0
"""A session of a v1 agent without a packet for so long ends; the agents of v2 end their own unused ones."""
BY_OPERATOR = "operator"
"""Who ended a session that neither of its ends, nor the relay (relay.opening.BY_RELAY), did."""


class Sessions:
    """All connections, registrations and sessions of one relay."""

    def __init__(self, rules: Rules, random: Callable[[int], bytes], software: str = "") -> None:
        """`random(n)` returns n unpredictable bytes; `software` is the release to name to peers."""
        self._greeting = control.Hello(software=control.Software(software))
        self._known_fresh: frozenset[str] = frozenset()
        self._held = Holdings(rules, random)
        self._opening = Opening(self._held)
        self._news = HealthNews()

    # What others read.

    @property
    def services(self) -> frozenset[ServiceName]:
        """The services that a granted connector has registered."""
        return self._held.serving.services

    @property
    def looked_up(self) -> frozenset[ServiceName]:
        """The only names to look up (design.md 2.2): these, and those that sessions of a withdrawn one go on for."""
        return self.services | {service for service, _ in self._held.book.routed}

    @property
    def peers(self) -> dict[ConnectionKey, Peer]:
        """The live connections, to be read only."""
        return self._held.peers

    @property
    def sessions(self) -> dict[SessionId, Session]:
        """The sessions, to be read only."""
        return self._held.book.live

    def next_timer(self) -> float | None:
        """Return when `tick` has something to do, besides its once a second."""
        return self._opening.next_timer()

    # Events.

    def connected(
        self, key: ConnectionKey, identity: Identity, forwarder: Address | None, *, datagrams: bool = True
    ) -> list[Command]:
        """Take a new connection; a v1 agent knows no `forwarder`, and one over TLS takes no `datagrams`."""
        self._held.peers[key] = Peer(key, identity, forwarder, takes_datagrams=datagrams)
        return []

    def disconnected(self, key: ConnectionKey, reason: Reason, now: float) -> list[Command]:
        """Forget a connection; `peer_gone` when it went without a word. Its sessions end."""
        peer = self._held.peers.pop(key)
        self._news.left(key)
        out: list[Command] = []
        self._opening.left(key)
        for service in peer.services:
            assert peer.connector_id is not None
            self._held.serving.remove(key, peer.connector_id, service)
        for session_id in sorted(peer.sessions):
            session = self._held.book.live[session_id]
            if session.connector == key and not session.open:
                session.attempt.refusal = session.attempt.refusal or Reason.NO_HEALTHY_CONNECTOR
                self._held.end(session, reason, peer.identity.name, now, out)
                if session.agent in self._held.peers:
                    self._opening.offer_next(session.agent, session.attempt, now, out)
                continue
            other = session.agent if session.connector == key else session.connector
            self._held.end(session, reason, peer.identity.name, now, out)
            self._held.send(other, control.Closed(session_id, reason), out)
        self._news.changed(peer.services)
        return out

    def silence(self, key: ConnectionKey, gone: bool, heard_at: float, now: float) -> list[Command]:
        """Hear when a peer's last packet came, and whether that is too long ago: call it every second.

        A connector that left an offer unanswered is offered nothing until a packet comes from it; one that is
        gone loses its sessions, though its connection may yet come back.
        """
        peer, out = self._held.peers[key], list[Command]()
        if not gone and peer.silent_since is not None and heard_at > peer.silent_since:
            peer.silent_since = None
        if gone and peer.services and peer.silent_since is None:
            peer.silent_since = now
            for session_id in sorted(peer.sessions):
                session = self._held.book.live[session_id]
                if session.connector == key and session.open:
                    self._held.cut(session, Reason.PEER_GONE, peer.identity.name, now, out)
        return out

    def unvouched(self, keys: Collection[ConnectionKey]) -> None:
        """Open no session for or with these connections, and with all others: CRLs do not tell if they stand."""
        self._opening.unvouched(keys)

    def drain(self, deadline_s: float, others: tuple[str, ...]) -> list[Command]:
        """Open nothing any more, and tell everybody, with the names of other relays."""
        self._opening.drain()
        out: list[Command] = []
        for key in self._held.peers:
            self._held.send(key, control.Drain(deadline_s, others), out)
        return out

    def abandon(self, now: float) -> list[Command]:
        """Tell the operator of the sessions that end with this relay; their flows may go on over another one."""
        out: list[Command] = []
        for session in self._held.book.live.values():
            self._held.tell_end(session, Reason.DRAINING, BY_RELAY, now, out)
        return out

    def policy_changed(self, table: policy.SrvTable, now: float) -> list[Command]:
        """Go by a newer snapshot of the SRV records."""
        changed = {
            service
            for service in self._held.table.entries.keys() | table.entries.keys()
            if _routes(self._held.table, service) != _routes(table, service)
        }
        self._held.table = table
        out: list[Command] = []
        self._opening.look_again(now, out)
        self._news.changed(changed | self._freshness_changed(now))
        return out

    def agent_waiting(self, session_id: SessionId, waiter: int) -> list[Command]:
        """An agent's TCP connection waits at the forwarder: have its connector dial in."""
        session = self._held.book.live.get(session_id)
        if session is None or not session.open:
            return []
        carry = control.Carry(session_id, Secret(self._held.random(TOKEN_BYTES)))
        return [AdmitConnector(session.connector, waiter, carry)]

    def close(self, session_id: SessionId, now: float) -> list[Command]:
        """End a session because an operator says so; nothing happens when it is not open any more."""
        session, out = self._held.book.live.get(session_id), list[Command]()
        if session is not None and session.open:
            self._held.cut(session, Reason.CLOSED_BY_PEER, BY_OPERATOR, now, out)
        return out

    def tick(self, now: float) -> list[Command]:
        """Do what time asks for; call it at `next_timer` and once a second."""
        out: list[Command] = []
        self._opening.tick(now, out)
        self._news.changed(self._freshness_changed(now))
        for service, connector_id in list(self._held.book.routed):
            self._hold(service, connector_id, now, out)
        self._end_idle(now, out)
        self._held.book.forget_ended(now)
        return out

    @property
    def has_news(self) -> bool:
        """Whether agents are to be told of services' health: call `tell` soon then, each time in a turn of its own."""
        return self._news.is_due

    def tell(self, now: float) -> list[Command]:
        """Tell agents of services' health, a bounded piece at a time."""
        by_peer: dict[ConnectionKey, list[control.Health]] = {}
        for key, service, state in self._news.piece(
            lambda service: policy.health(service, self._held.serving.live(service), self._held.table, now)
        ):
            by_peer.setdefault(key, []).append(control.Health(service, state))
        return [SendHealth(key, tuple(news)) for key, news in by_peer.items()]

    def message(self, key: ConnectionKey, message: AnyMessage, now: float) -> list[Command]:
        """Act on a message. Raises ProtocolError for one that a peer never sends, or sends before `hello`."""
        peer = self._held.peers[key]
        out: list[Command] = []
        if peer.features is None or isinstance(message, control.Hello):
            self._hello(peer, message, now, out)
            return out
        match message:
            case control.Register():
                self._register(peer, message, now, out)
            case control.Open() if not peer.pace.allows(Kind.OPEN, now):
                self._held.deny(key, message, Reason.LIMIT_REACHED, out)
            case control.Open():
                self._opening.begin(key, message, now, out)
            case control.Conflict():
                self._conflict(peer, message, now, out)
            case control.DnsQuery():
                out.append(AskDns(key, message, peer.pace.allows(Kind.DNS, now)))
            case _ if isinstance(message, AboutSession):
                self._about_session(peer, message, now, out)
            case _:
                raise ProtocolError(f"{type_of(message)} is for the relay to send")
        return out

    # Connections.

    def _hello(self, peer: Peer, message: AnyMessage, now: float, out: list[Command]) -> None:
        if not isinstance(message, control.Hello) or peer.features is not None:
            raise ProtocolError(f"{type_of(message)}: expected hello first, and once")
        if message.version != control.PROTOCOL_VERSION:
            raise ProtocolError(f"hello: version {message.version}, expected {control.PROTOCOL_VERSION}")
        peer.features, peer.software = message.features & control.FEATURES, message.software
        out.append(Send(peer.key, self._greeting))
        if "health" in peer.features:
            self._news.listen(peer.key, peer.identity, self._known_services())

    def _register(self, peer: Peer, message: control.Register, now: float, out: list[Command]) -> None:
        if peer.connector_id not in (None, message.connector_id):
            raise ProtocolError("register: a connection has one connector id")
        peer.software = message.software or peer.software
        self._withdraw(peer, message.withdrawn, now, out)
        accepted: set[ServiceName] = set()
        paced = peer.pace.allows(Kind.REGISTER, now, len(message.services))
        for offering in message.services:
            reason = registration_refusal(
                peer.identity, message.connector_id, offering.name, len(peer.services)
            )
            if not paced:
                reason = Reason.LIMIT_REACHED
            if reason is not None:
                self._held.send(peer.key, control.Refused(offering.name, reason), out)
                self._held.refuse(peer, "register", reason, f"{offering.name} as {message.connector_id}", out)
                continue
            peer.services.add(offering.name)
            accepted.add(offering.name)
            self._held.send(peer.key, control.Registered(offering.name), out)
        if accepted:
            peer.connector_id, peer.link_address = message.connector_id, message.link_address
            for service in sorted(accepted):
                if self._held.serving.add(peer.key, message.connector_id, service):
                    fields = {"connector_id": message.connector_id, "service": service}
                    out.append(Event("connector_id_twice", fields | {"newer": peer.identity.name}))
            self._news.changed(accepted)

    def _withdraw(self, peer: Peer, services: Iterable[ServiceName], now: float, out: list[Command]) -> None:
        """Offer the connection no new session of these; those it has go on, and are the connector's to end.

        Agents that could have another connector begin nothing more there: it denies what is new soon.
        """
        withdrawn = peer.services.intersection(services)
        if peer.connector_id is None or not withdrawn:
            return
        for service in sorted(withdrawn):
            peer.services.discard(service)
            self._held.serving.remove(peer.key, peer.connector_id, service)
            if self._held.serving.live(service):
                for session_id in sorted(self._held.book.routed.get((service, peer.connector_id), ())):
                    session = self._held.book.live[session_id]
                    # A newer connection with this id (its next process, or another certificate) may serve on.
                    if session.connector == peer.key:
                        self._runs_out(session, out)
        self._news.changed(withdrawn)

    def _conflict(self, peer: Peer, message: control.Conflict, now: float, out: list[Command]) -> None:
        if not peer.pace.allows(Kind.CONFLICT, now):
            self._held.refuse(peer, "conflict", Reason.LIMIT_REACHED, message.cidr, out)
            return
        if not message.with_:
            # It is over (ztna.wire.control.Conflict).
            if peer.conflicts.pop(message.cidr, None) is not None:
                out.append(Event("conflict_over", {"agent": peer.identity.name, "cidr": message.cidr}))
            return
        full = len(peer.conflicts) >= CONFLICTS_PER_CONNECTION_MAX and message.cidr not in peer.conflicts
        if full or not peer.identity.agent:
            reason = Reason.LIMIT_REACHED if full else Reason.NO_GRANT
            self._held.refuse(peer, "conflict", reason, message.cidr, out)
            return
        peer.conflicts[message.cidr] = message
        fields = {"agent": peer.identity.name, "cidr": message.cidr, "with": message.with_}
        out.append(Event("conflict", fields))

    # Messages about a session.

    def _about_session(
        self,
        peer: Peer,
        message: AboutSession,
        now: float,
        out: list[Command],
    ) -> None:
        session = self._held.book.live.get(message.session)
        if session is None or not owns(peer.key, session, message):
            self._not_yours(peer, message, session, out)
            return
        if isinstance(message, Signaling) and not peer.pace.allows(Kind.SIGNALING, now):
            self._held.refuse(peer, type_of(message), Reason.LIMIT_REACHED, session.id, out)
            return
        match message:
            case control.Accepted():
                self._opening.accepted(session, now, out)
            case control.Closed():
                self._closed(peer, session, message.reason, now, out)
            case control.Dial():
                token = control.DialToken(session.id, Secret(self._held.random(TOKEN_BYTES)))
                out.append(AdmitAgent(peer.key, token, session.agent_name, session.link))
            case control.CandidateOffer():
                session.candidates = message.candidates
                self._held.send(session.connector, message, out)
            case control.CandidateAnswer():
                self._answered(session, message, out)
            case _:
                session.path = "direct" if message.success else "forwarded"
                other = session.connector if peer.key == session.agent else session.agent
                self._held.send(other, message, out)

    def _not_yours(
        self, peer: Peer, message: AboutSession, session: Session | None, out: list[Command]
    ) -> None:
        session_id = message.session
        owners: tuple[str, ...] = ()
        if session is not None:
            owners = tuple(self._held.peers[each].identity.name for each in session.link)
        elif self._held.book.ended_lately(session_id, peer.key):
            # It crossed the session's end on its way: no offence, and nothing to do.
            return
        out.append(
            Refusal(
                peer.key, peer.identity.name, type_of(message), Reason.NOT_YOUR_SESSION, session_id, owners
            )
        )

    def _closed(self, peer: Peer, session: Session, reason: Reason, now: float, out: list[Command]) -> None:
        if not session.open:
            self._opening.give_up(session, reason, now, out)
            return
        # Only the relay sees a connection go without a word; nobody else may keep flows alive by saying so.
        told = Reason.CLOSED_BY_PEER if reason is Reason.PEER_GONE else reason
        other = session.connector if peer.key == session.agent else session.agent
        self._held.end(session, told, peer.identity.name, now, out)
        self._held.send(other, control.Closed(session.id, told), out)

    def _answered(self, session: Session, message: control.CandidateAnswer, out: list[Command]) -> None:
        self._held.send(session.agent, message, out)
        if session.candidates is not None:
            self._held.send(session.agent, control.StartPunching(session.id, message.candidates), out)
            self._held.send(session.connector, control.StartPunching(session.id, session.candidates), out)

    # Ending.

    def _hold(self, service: ServiceName, connector_id: ConnectorId, now: float, out: list[Command]) -> None:
        """End the sessions with one connector of a service when DNS no longer permits them, or have them run out."""
        place, routes = (service, connector_id), self._held.table.routes(service, now)
        live = self._held.serving.live(service)
        elsewhere = any(route.connector_id in live for route in routes or ())
        withdrew = connector_id not in live
        reason = self._held.leaving.verdict(
            place, routes, elsewhere, self._held.table.hold_s, now, withdrew=withdrew
        )
        if reason is not None:
            for session_id in sorted(self._held.book.routed[place]):
                session = self._held.book.live[session_id]
                if reason is not Reason.DRAINING or not self._runs_out(session, out):
                    self._held.cut(session, reason, BY_RELAY, now, out)

    def _runs_out(self, session: Session, out: list[Command]) -> bool:
        """Have its agent begin nothing more on the session; False for an agent that cannot be told so."""
        features = self._held.peers[session.agent].features or ()
        if not session.open or "retired" not in features:
            return False
        if not session.retired:
            session.retired = True
            self._held.send(session.agent, control.Retired(session.id), out)
        return True

    def _end_idle(self, now: float, out: list[Command]) -> None:
        for session_id in sorted(self._held.of_v1):
            session = self._held.book.live[session_id]
            if session.v1_bytes != session.v1_bytes_seen:
                session.v1_bytes_seen, session.v1_used_at = session.v1_bytes, now
            elif now - session.v1_used_at >= V1_IDLE_SECONDS:
                self._held.cut(session, Reason.CLOSED_BY_PEER, BY_RELAY, now, out)

    # Small things.

    def _freshness_changed(self, now: float) -> set[ServiceName]:
        """Return all services when a source of the table has just become too old to go by, or good again."""
        fresh = self._held.table.fresh_sources(now)
        if fresh == self._known_fresh:
            return set()
        self._known_fresh = fresh
        return self._known_services()

    def _known_services(self) -> set[ServiceName]:
        return {*self._held.serving.services, *self._held.table.entries}


def _routes(table: policy.SrvTable, service: ServiceName) -> tuple[policy.Route, ...] | None:
    entry = table.entries.get(service)
    return None if entry is None else entry.routes
