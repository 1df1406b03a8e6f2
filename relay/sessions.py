"""The relay's sessions: who opened them, who serves them, and whose messages about them count.

Pure: events with `now` in, commands (relay.commands) out; random bytes come from the function passed in. A
session belongs to two connection objects and to nobody else (design.md 2.4); connections are opaque keys.
Does not know how a connection or a forwarder works. Source: protocol.md, Control stream.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from typing import Literal

from relay import policy
from relay.admission import registration_refusal
from relay.book import SessionBook
from relay.commands import (
    AdmitAgent,
    AdmitConnector,
    AskDns,
    BindTicket,
    Command,
    ConnectionKey,
    Event,
    Refusal,
    Send,
    SendHealth,
    Told,
)
from relay.ownership import AboutSession, Signaling, owns
from relay.pace import Kind
from relay.registrations import Registrations
from relay.rules import Leaving, Rules
from relay.state import Attempt, Peer, Session
from relay.telling import HealthNews
from ztna.errors import ProtocolError, Refused
from ztna.identity import Identity
from ztna.jsontypes import Binary, Secret
from ztna.names import SESSION_ID_BYTES, ConnectorId, ServiceName, SessionId
from ztna.reasons import Reason
from ztna.wire import control
from ztna.wire.control import Address, AnyMessage, ForwarderBind
from ztna.wire.forwarder import TOKEN_BYTES

ACCEPT_SECONDS = 1.0
"""How long one connector may think about an offer."""
PARK_SECONDS = 1.0
"""How long an `open` waits for the first SRV answer of a service that was only just registered."""
PARKED_MAX = 1_000
CONFLICTS_PER_CONNECTION_MAX = 16
V1_IDLE_SECONDS = 300.0
"""A session of a v1 agent without a packet for so long ends; the agents of v2 end their own unused ones."""
BY_RELAY, BY_OPERATOR = "relay", "operator"
"""Who ended a session that neither of its ends did."""


class Sessions:
    """All connections, registrations and sessions of one relay."""

    def __init__(self, rules: Rules, random: Callable[[int], bytes], software: str = "") -> None:
        """`random(n)` returns n unpredictable bytes; `software` is the release to name to peers."""
        self._rules, self._random = rules, random
        self._greeting = control.Hello(software=software)
        self._table = policy.EMPTY_TABLE
        self._known_fresh: frozenset[str] = frozenset()
        self._draining = False
        self._peers: dict[ConnectionKey, Peer] = {}
        self._serving = Registrations()
        self._book = SessionBook(random)
        self._news = HealthNews()
        self._offers: dict[SessionId, float] = {}
        self._parked: list[tuple[ConnectionKey, Attempt]] = []
        self._leaving = Leaving(rules)
        self._of_v1: set[SessionId] = set()
        self._unvouched: frozenset[ConnectionKey] = frozenset()

    # What others read.

    @property
    def services(self) -> frozenset[ServiceName]:
        """The services that a granted connector has registered."""
        return self._serving.services

    @property
    def looked_up(self) -> frozenset[ServiceName]:
        """The only names to look up (design.md 2.2): these, and those that sessions of a withdrawn one go on for."""
        return self.services | {service for service, _ in self._book.routed}

    @property
    def peers(self) -> dict[ConnectionKey, Peer]:
        """The live connections, to be read only."""
        return self._peers

    @property
    def sessions(self) -> dict[SessionId, Session]:
        """The sessions, to be read only."""
        return self._book.live

    def next_timer(self) -> float | None:
        """Return when `tick` has something to do, besides its once a second."""
        times = [*list(self._offers.values())[:1], *(attempt.park_until for _, attempt in self._parked[:1])]
        return min(times, default=None)

    # Events.

    def connected(
        self, key: ConnectionKey, identity: Identity, forwarder: Address | None, *, datagrams: bool = True
    ) -> list[Command]:
        """Take a new connection; a v1 agent knows no `forwarder`, and one over TLS takes no `datagrams`."""
        self._peers[key] = Peer(key, identity, forwarder, takes_datagrams=datagrams)
        return []

    def disconnected(self, key: ConnectionKey, reason: Reason, now: float) -> list[Command]:
        """Forget a connection; `peer_gone` when it went without a word. Its sessions end."""
        peer = self._peers.pop(key)
        self._news.left(key)
        out: list[Command] = []
        self._parked = [each for each in self._parked if each[0] != key]
        for service in peer.services:
            assert peer.connector_id is not None
            self._serving.remove(key, peer.connector_id, service)
        for session_id in sorted(peer.sessions):
            session = self._book.live[session_id]
            if session.connector == key and not session.open:
                session.attempt.refusal = session.attempt.refusal or Reason.NO_HEALTHY_CONNECTOR
                self._end(session, reason, peer.identity.name, now, out)
                if session.agent in self._peers:
                    self._offer_next(session.agent, session.attempt, now, out)
                continue
            other = session.agent if session.connector == key else session.connector
            self._end(session, reason, peer.identity.name, now, out)
            self._send(other, control.Closed(session_id, reason), out)
        self._news.changed(peer.services)
        return out

    def silence(self, key: ConnectionKey, gone: bool, heard_at: float, now: float) -> list[Command]:
        """Hear when a peer's last packet came, and whether that is too long ago: call it every second.

        A connector that left an offer unanswered is offered nothing until a packet comes from it; one that is
        gone loses its sessions, though its connection may yet come back.
        """
        peer, out = self._peers[key], list[Command]()
        if not gone and peer.silent_since is not None and heard_at > peer.silent_since:
            peer.silent_since = None
        if gone and peer.services and peer.silent_since is None:
            peer.silent_since = now
            for session_id in sorted(peer.sessions):
                session = self._book.live[session_id]
                if session.connector == key and session.open:
                    self._cut(session, Reason.PEER_GONE, peer.identity.name, now, out)
        return out

    def unvouched(self, keys: Collection[ConnectionKey]) -> None:
        """Open no session for or with these connections, and with all others: CRLs do not tell if they stand."""
        self._unvouched = frozenset(keys)

    def drain(self, deadline_s: float, others: tuple[str, ...]) -> list[Command]:
        """Open nothing any more, and tell everybody, with the names of other relays."""
        self._draining = True
        out: list[Command] = []
        for key in self._peers:
            self._send(key, control.Drain(deadline_s, others), out)
        return out

    def abandon(self, now: float) -> list[Command]:
        """Tell the operator of the sessions that end with this relay; their flows may go on over another one."""
        out: list[Command] = []
        for session in self._book.live.values():
            self._tell_end(session, Reason.DRAINING, BY_RELAY, now, out)
        return out

    def policy_changed(self, table: policy.SrvTable, now: float) -> list[Command]:
        """Go by a newer snapshot of the SRV records."""
        changed = {
            service
            for service in self._table.entries.keys() | table.entries.keys()
            if _routes(self._table, service) != _routes(table, service)
        }
        self._table = table
        out: list[Command] = []
        parked, self._parked = self._parked, []
        for key, attempt in parked:
            self._begin(key, attempt, now, out)
        self._news.changed(changed | self._freshness_changed(now))
        return out

    def agent_waiting(self, session_id: SessionId, waiter: int) -> list[Command]:
        """An agent's TCP connection waits at the forwarder: have its connector dial in."""
        session = self._book.live.get(session_id)
        if session is None or not session.open:
            return []
        carry = control.Carry(session_id, Secret(self._random(TOKEN_BYTES)))
        return [AdmitConnector(session.connector, waiter, carry)]

    def close(self, session_id: SessionId, now: float) -> list[Command]:
        """End a session because an operator says so; nothing happens when it is not open any more."""
        session, out = self._book.live.get(session_id), list[Command]()
        if session is not None and session.open:
            self._cut(session, Reason.CLOSED_BY_PEER, BY_OPERATOR, now, out)
        return out

    def tick(self, now: float) -> list[Command]:
        """Do what time asks for; call it at `next_timer` and once a second."""
        out: list[Command] = []
        for session_id in [each for each, deadline in self._offers.items() if deadline <= now]:
            self._silence(self._book.live[session_id], now, out)
        parked, self._parked = self._parked, []
        for key, attempt in parked:
            self._begin(key, attempt, now, out)
        self._news.changed(self._freshness_changed(now))
        for service, connector_id in list(self._book.routed):
            self._hold(service, connector_id, now, out)
        self._end_idle(now, out)
        self._book.forget_ended(now)
        return out

    @property
    def has_news(self) -> bool:
        """Whether agents are to be told of services' health: call `tell` soon then, each time in a turn of its own."""
        return self._news.is_due

    def tell(self, now: float) -> list[Command]:
        """Tell agents of services' health, a bounded piece at a time."""
        by_peer: dict[ConnectionKey, list[control.Health]] = {}
        for key, service, state in self._news.piece(
            lambda service: policy.health(service, self._serving.live(service), self._table, now)
        ):
            by_peer.setdefault(key, []).append(control.Health(service, state))
        return [SendHealth(key, tuple(news)) for key, news in by_peer.items()]

    def message(self, key: ConnectionKey, message: AnyMessage, now: float) -> list[Command]:
        """Act on a message. Raises ProtocolError for one that a peer never sends, or sends before `hello`."""
        peer = self._peers[key]
        out: list[Command] = []
        if peer.features is None or isinstance(message, control.Hello):
            self._hello(peer, message, now, out)
            return out
        match message:
            case control.Register():
                self._register(peer, message, now, out)
            case control.Open() if not peer.pace.allows(Kind.OPEN, now):
                self._deny(key, message, Reason.LIMIT_REACHED, out)
            case control.Open():
                self._begin(key, Attempt(message, park_until=now + PARK_SECONDS), now, out)
            case control.Conflict():
                self._conflict(peer, message, now, out)
            case control.DnsQuery():
                out.append(AskDns(key, message, peer.pace.allows(Kind.DNS, now)))
            case _ if isinstance(message, AboutSession):
                self._about_session(peer, message, now, out)
            case _:
                raise ProtocolError(f"{_type(message)} is for the relay to send")
        return out

    # Connections.

    def _hello(self, peer: Peer, message: AnyMessage, now: float, out: list[Command]) -> None:
        if not isinstance(message, control.Hello) or peer.features is not None:
            raise ProtocolError(f"{_type(message)}: expected hello first, and once")
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
                self._send(peer.key, control.Refused(offering.name, reason), out)
                self._refuse(peer, "register", reason, f"{offering.name} as {message.connector_id}", out)
                continue
            peer.services.add(offering.name)
            accepted.add(offering.name)
            self._send(peer.key, control.Registered(offering.name), out)
        if accepted:
            peer.connector_id, peer.link_address = message.connector_id, message.link_address
            for service in sorted(accepted):
                if self._serving.add(peer.key, message.connector_id, service):
                    fields = {"connector_id": message.connector_id, "service": service}
                    out.append(Event("connector_id_twice", fields | {"newer": peer.identity.name}))
            self._news.changed(accepted)

    def _withdraw(self, peer: Peer, services: Iterable[ServiceName], now: float, out: list[Command]) -> None:
        """Offer the connection no new session of these; those it has go on, and are the connector's to end."""
        withdrawn = peer.services.intersection(services)
        if peer.connector_id is None or not withdrawn:
            return
        for service in sorted(withdrawn):
            peer.services.discard(service)
            self._serving.remove(peer.key, peer.connector_id, service)
        self._news.changed(withdrawn)

    def _conflict(self, peer: Peer, message: control.Conflict, now: float, out: list[Command]) -> None:
        if not peer.pace.allows(Kind.CONFLICT, now):
            self._refuse(peer, "conflict", Reason.LIMIT_REACHED, message.cidr, out)
            return
        if not message.with_:
            # It is over (ztna.wire.control.Conflict).
            if peer.conflicts.pop(message.cidr, None) is not None:
                out.append(Event("conflict_over", {"agent": peer.identity.name, "cidr": message.cidr}))
            return
        full = len(peer.conflicts) >= CONFLICTS_PER_CONNECTION_MAX and message.cidr not in peer.conflicts
        if full or not peer.identity.agent:
            reason = Reason.LIMIT_REACHED if full else Reason.NO_GRANT
            self._refuse(peer, "conflict", reason, message.cidr, out)
            return
        peer.conflicts[message.cidr] = message
        fields = {"agent": peer.identity.name, "cidr": message.cidr, "with": message.with_}
        out.append(Event("conflict", fields))

    # Opening.

    def _begin(self, key: ConnectionKey, attempt: Attempt, now: float, out: list[Command]) -> None:
        service = attempt.request.service
        unanswered = service in self._serving and service not in self._table.entries
        may_use = self._peers[key].identity.may_use(service)
        if may_use and unanswered and now < attempt.park_until and len(self._parked) < PARKED_MAX:
            self._parked.append((key, attempt))
            return
        self._offer_next(key, attempt, now, out)

    def _offer_next(self, key: ConnectionKey, attempt: Attempt, now: float, out: list[Command]) -> None:
        request = attempt.request
        try:
            chosen = self._choose(self._peers[key], attempt, now)
        except Refused as error:
            self._deny(key, request, error.reason, out)
            return
        attempt.tried.add(chosen)
        self._offer(key, self._peers[chosen], attempt, now, out)

    def _deny(self, key: ConnectionKey, request: control.Open, reason: Reason, out: list[Command]) -> None:
        self._send(key, control.Denied(request.request, request.service, reason), out)
        self._refuse(self._peers[key], "open", reason, request.service, out)

    def _choose(self, agent: Peer, attempt: Attempt, now: float) -> ConnectionKey:
        """Return the connector connection to offer to next. Raises Refused when there is none left."""
        request = attempt.request
        live = self._serving.live(request.service)
        ordered = policy.candidates(
            agent.identity,
            request.service,
            request.connector_id,
            live,
            self._table,
            now,
            self._draw,
            {key: len(self._peers[key].sessions) for key in live.values()},
        )
        if self._draining:
            raise Refused(Reason.DRAINING, "this relay is stopping")
        if agent.key in self._unvouched:
            raise Refused(Reason.POLICY_UNKNOWN, f"{agent.identity.name}: no CRL of today")
        if full := self._book.full(agent.identity.name, request.service, self._rules):
            raise Refused(Reason.LIMIT_REACHED, full)
        for key in ordered:
            if key in self._unvouched:
                attempt.refusal = attempt.refusal or Reason.POLICY_UNKNOWN
            elif self._peers[key].silent_since is not None:
                if request.connector_id is not None:
                    # Who wants none but this one wants to know whether it lives: a flow may have begun there.
                    attempt.refusal = attempt.refusal or Reason.PEER_GONE
            elif key not in attempt.tried and (self._peers[key].takes_datagrams or not agent.v1):
                return key
        raise Refused(attempt.refusal or Reason.NO_HEALTHY_CONNECTOR, request.service)

    def _offer(
        self, key: ConnectionKey, connector: Peer, attempt: Attempt, now: float, out: list[Command]
    ) -> None:
        assert connector.connector_id is not None
        request, agent = attempt.request, self._peers[key]
        session_id = SessionId.from_bytes(self._random(SESSION_ID_BYTES))
        session = Session(
            session_id,
            request.service,
            key,
            connector.key,
            connector.connector_id,
            agent.identity.name,
            attempt,
            path="v1" if agent.v1 else None,
        )
        out += self._book.add(session, forwarded=not agent.v1)
        link = self._book.links.get(session.link)
        agent.sessions.add(session_id)
        connector.sessions.add(session_id)
        self._offers[session_id] = now + ACCEPT_SECONDS
        offered = control.Offered(
            session=session_id,
            service=request.service,
            agent=control.PeerIdentity(agent.identity.name, agent.identity.fingerprint),
            lease=request.lease,
            forwarder=_bind(connector.forwarder, link.connector if link else None),
            probe_key=link.probe_key if link else Secret(),
            v1=agent.v1,
        )
        self._send(connector.key, offered, out)

    def _silence(self, session: Session, now: float, out: list[Command]) -> None:
        connector = self._peers[session.connector]
        connector.silent_since = now
        fields = {"connector": connector.identity.name, "service": session.service}
        out.append(Event("connector_silent", fields))
        self._give_up(session, None, now, out)

    def _give_up(self, session: Session, reason: Reason | None, now: float, out: list[Command]) -> None:
        """Take an offer back and go on to the next connector."""
        session.attempt.refusal = session.attempt.refusal or reason
        self._end(session, reason or Reason.CLOSED_BY_PEER, BY_RELAY, now, out)
        if reason is None:
            self._send(session.connector, control.Closed(session.id, Reason.CLOSED_BY_PEER), out)
        self._offer_next(session.agent, session.attempt, now, out)

    # Messages about a session.

    def _about_session(
        self,
        peer: Peer,
        message: AboutSession,
        now: float,
        out: list[Command],
    ) -> None:
        session = self._book.live.get(message.session)
        if session is None or not owns(peer.key, session, message):
            self._not_yours(peer, message, session, out)
            return
        if isinstance(message, Signaling) and not peer.pace.allows(Kind.SIGNALING, now):
            self._refuse(peer, _type(message), Reason.LIMIT_REACHED, session.id, out)
            return
        match message:
            case control.Accepted():
                self._accepted(session, now, out)
            case control.Closed():
                self._closed(peer, session, message.reason, now, out)
            case control.Dial():
                token = control.DialToken(session.id, Secret(self._random(TOKEN_BYTES)))
                out.append(AdmitAgent(peer.key, token, session.agent_name, session.link))
            case control.CandidateOffer():
                session.candidates = message.candidates
                self._send(session.connector, message, out)
            case control.CandidateAnswer():
                self._answered(session, message, out)
            case _:
                session.path = "direct" if message.success else "forwarded"
                other = session.connector if peer.key == session.agent else session.agent
                self._send(other, message, out)

    def _not_yours(
        self, peer: Peer, message: AboutSession, session: Session | None, out: list[Command]
    ) -> None:
        session_id = message.session
        owners: tuple[str, ...] = ()
        if session is not None:
            owners = tuple(self._peers[each].identity.name for each in session.link)
        elif self._book.ended_lately(session_id, peer.key):
            # It crossed the session's end on its way: no offence, and nothing to do.
            return
        out.append(
            Refusal(peer.key, peer.identity.name, _type(message), Reason.NOT_YOUR_SESSION, session_id, owners)
        )

    def _accepted(self, session: Session, now: float, out: list[Command]) -> None:
        if session.open:
            return
        session.opened_at = session.v1_used_at = now
        if session.path == "v1":
            self._of_v1.add(session.id)
        del self._offers[session.id]
        agent, connector = self._peers[session.agent], self._peers[session.connector]
        link = self._book.links.get(session.link)
        opened = control.Opened(
            request=session.attempt.request.request,
            session=session.id,
            service=session.service,
            connector_id=session.connector_id,
            fingerprint=connector.identity.fingerprint,
            link_address=connector.link_address,
            forwarder=_bind(agent.forwarder, link.agent if link else None),
            probe_key=link.probe_key if link else Secret(),
        )
        self._send(agent.key, opened, out)
        self._tell("session_opened", session, {"fingerprint": agent.identity.fingerprint}, out)

    def _closed(self, peer: Peer, session: Session, reason: Reason, now: float, out: list[Command]) -> None:
        if not session.open:
            self._give_up(session, reason, now, out)
            return
        # Only the relay sees a connection go without a word; nobody else may keep flows alive by saying so.
        told = Reason.CLOSED_BY_PEER if reason is Reason.PEER_GONE else reason
        other = session.connector if peer.key == session.agent else session.agent
        self._end(session, told, peer.identity.name, now, out)
        self._send(other, control.Closed(session.id, told), out)

    def _answered(self, session: Session, message: control.CandidateAnswer, out: list[Command]) -> None:
        self._send(session.agent, message, out)
        if session.candidates is not None:
            self._send(session.agent, control.StartPunching(session.id, message.candidates), out)
            self._send(session.connector, control.StartPunching(session.id, session.candidates), out)

    # Ending.

    def _hold(self, service: ServiceName, connector_id: ConnectorId, now: float, out: list[Command]) -> None:
        """End the sessions with one connector of a service when DNS no longer permits them, or have them run out."""
        place, routes = (service, connector_id), self._table.routes(service, now)
        live = self._serving.live(service)
        elsewhere = any(route.connector_id in live for route in routes or ())
        withdrew = connector_id not in live
        reason = self._leaving.verdict(place, routes, elsewhere, self._table.hold_s, now, withdrew=withdrew)
        if reason is not None:
            for session_id in sorted(self._book.routed[place]):
                session = self._book.live[session_id]
                if reason is not Reason.DRAINING or not self._runs_out(session, out):
                    self._cut(session, reason, BY_RELAY, now, out)

    def _runs_out(self, session: Session, out: list[Command]) -> bool:
        """Have its agent begin nothing more on the session; False for an agent that cannot be told so."""
        features = self._peers[session.agent].features or ()
        if not session.open or "retired" not in features:
            return False
        if not session.retired:
            session.retired = True
            self._send(session.agent, control.Retired(session.id), out)
        return True

    def _end_idle(self, now: float, out: list[Command]) -> None:
        for session_id in sorted(self._of_v1):
            session = self._book.live[session_id]
            if session.v1_bytes != session.v1_bytes_seen:
                session.v1_bytes_seen, session.v1_used_at = session.v1_bytes, now
            elif now - session.v1_used_at >= V1_IDLE_SECONDS:
                self._cut(session, Reason.CLOSED_BY_PEER, BY_RELAY, now, out)

    def _cut(self, session: Session, reason: Reason, by: str, now: float, out: list[Command]) -> None:
        self._end(session, reason, by, now, out)
        self._send(session.connector, control.Closed(session.id, reason), out)
        if session.open:
            self._send(session.agent, control.Closed(session.id, reason), out)
        else:
            self._deny(session.agent, session.attempt.request, reason, out)

    def _end(self, session: Session, reason: Reason, by: str, now: float, out: list[Command]) -> None:
        self._tell_end(session, reason, by, now, out)
        out += self._book.remove(session, now)
        for end in session.link:
            peer = self._peers.get(end)
            if peer is not None:
                peer.sessions.discard(session.id)
        self._offers.pop(session.id, None)
        self._of_v1.discard(session.id)
        place = (session.service, session.connector_id)
        if place not in self._book.routed:
            self._leaving.forget(place)

    def _tell_end(self, session: Session, reason: Reason, by: str, now: float, out: list[Command]) -> None:
        if session.opened_at is not None:
            seconds = round(now - session.opened_at, 1)
            self._tell("session_closed", session, {"reason": reason, "by": by, "seconds": seconds}, out)

    def _tell(
        self,
        event: Literal["session_opened", "session_closed"],
        session: Session,
        more: dict[str, str | float],
        out: list[Command],
    ) -> None:
        fields: dict[str, str | float] = {
            "session": session.id,
            "service": session.service,
            "agent": session.agent_name,
            "connector_id": session.connector_id,
        }
        out.append(Told(event, session.id, session.link, session.path, session.v1_bytes, fields | more))

    # Small things.

    def _freshness_changed(self, now: float) -> set[ServiceName]:
        """Return all services when a source of the table has just become too old to go by, or good again."""
        fresh = self._table.fresh_sources(now)
        if fresh == self._known_fresh:
            return set()
        self._known_fresh = fresh
        return self._known_services()

    def _refuse(self, peer: Peer, about: str, reason: Reason, subject: str, out: list[Command]) -> None:
        out.append(Refusal(peer.key, peer.identity.name, about, reason, subject))

    def _draw(self, bound: int) -> int:
        return int.from_bytes(self._random(8)) % bound

    def _known_services(self) -> set[ServiceName]:
        return {*self._serving.services, *self._table.entries}

    def _send(self, key: ConnectionKey, message: AnyMessage, out: list[Command]) -> None:
        peer = self._peers.get(key)
        if peer is not None and peer.features is not None and _type(message) in peer.features:
            out.append(Send(key, message))


def _routes(table: policy.SrvTable, service: ServiceName) -> tuple[policy.Route, ...] | None:
    entry = table.entries.get(service)
    return None if entry is None else entry.routes


def _bind(address: Address | None, ticket: BindTicket | None) -> ForwarderBind | None:
    if address is None or ticket is None:
        return None
    return ForwarderBind(address, Binary(ticket.bind_id), ticket.secret)


def _type(message: AnyMessage) -> str:
    return str(message.__struct_config__.tag)
