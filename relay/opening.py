"""How an `open` gets its session: offered to one connector after the other, until one has accepted.

Pure; takes time and random bytes, adds commands. Which connectors may be asked, and in what order, is relay.policy's to
decide. Source: protocol.md, Opening.
"""

from __future__ import annotations

from collections.abc import Collection

from relay import policy
from relay.commands import BindTicket, Command, ConnectionKey, Event
from relay.holdings import Holdings
from relay.state import Attempt, Peer, Session
from ztna.errors import Refused
from ztna.jsontypes import Binary, Secret
from ztna.names import SESSION_ID_BYTES, SessionId
from ztna.reasons import Reason
from ztna.wire import control
from ztna.wire.control import Address, ForwarderBind

ACCEPT_SECONDS = 1.0
"""How long one connector may think about an offer."""
PARK_SECONDS = 1.0
"""How long an `open` waits for the first SRV answer of a service that was only just registered."""
PARKED_MAX = 1_000
BY_RELAY = "relay"
"""Who ended a session that neither of its ends did."""


class Opening:
    """The opens under way at one relay."""

    def __init__(self, held: Holdings) -> None:
        self._held = held
        self._draining = False
        self._parked: list[tuple[ConnectionKey, Attempt]] = []
        self._unvouched: frozenset[ConnectionKey] = frozenset()

    def next_timer(self) -> float | None:
        """Return when `tick` has something to do."""
        times = [
            *list(self._held.offers.values())[:1],
            *(attempt.park_until for _, attempt in self._parked[:1]),
        ]
        return min(times, default=None)

    def drain(self) -> None:
        """Open nothing any more."""
        self._draining = True

    def unvouched(self, keys: Collection[ConnectionKey]) -> None:
        """Open no session for or with these connections, and with all others: CRLs do not tell if they stand."""
        self._unvouched = frozenset(keys)

    def left(self, key: ConnectionKey) -> None:
        """Forget what a connection that is gone waited for."""
        self._parked = [each for each in self._parked if each[0] != key]

    def tick(self, now: float, out: list[Command]) -> None:
        """Take back the offers that nobody answered in time, and look at the opens that wait."""
        for session_id in [each for each, deadline in self._held.offers.items() if deadline <= now]:
            self._silence(self._held.book.live[session_id], now, out)
        self.look_again(now, out)

    def look_again(self, now: float, out: list[Command]) -> None:
        """Begin with the opens that wait for an SRV answer: there may be one."""
        parked, self._parked = self._parked, []
        for key, attempt in parked:
            self._begin(key, attempt, now, out)

    def begin(self, key: ConnectionKey, request: control.Open, now: float, out: list[Command]) -> None:
        """Open a session for an agent, or deny it."""
        self._begin(key, Attempt(request, park_until=now + PARK_SECONDS, began_at=now), now, out)

    def _begin(self, key: ConnectionKey, attempt: Attempt, now: float, out: list[Command]) -> None:
        service = attempt.request.service
        unanswered = service in self._held.serving and service not in self._held.table.entries
        may_use = self._held.peers[key].identity.may_use(service)
        if may_use and unanswered and now < attempt.park_until and len(self._parked) < PARKED_MAX:
            self._parked.append((key, attempt))
            return
        self.offer_next(key, attempt, now, out)

    def offer_next(self, key: ConnectionKey, attempt: Attempt, now: float, out: list[Command]) -> None:
        """Offer to the next connector that may have it; when there is none, deny."""
        request = attempt.request
        try:
            chosen = self._choose(self._held.peers[key], attempt, now)
        except Refused as error:
            self._held.deny(key, request, error.reason, out)
            return
        attempt.tried.add(chosen)
        self._offer(key, self._held.peers[chosen], attempt, now, out)

    def _choose(self, agent: Peer, attempt: Attempt, now: float) -> ConnectionKey:
        """Return the connector connection to offer to next. Raises Refused when there is none left."""
        request = attempt.request
        live = self._held.serving.live(request.service)
        ordered = policy.candidates(
            agent.identity,
            request.service,
            request.connector_id,
            live,
            self._held.table,
            now,
            self._draw,
            {key: len(self._held.peers[key].sessions) for key in live.values()},
        )
        if self._draining:
            raise Refused(Reason.DRAINING, "this relay is stopping")
        if agent.key in self._unvouched:
            raise Refused(Reason.POLICY_UNKNOWN, f"{agent.identity.name}: no CRL of today")
        if full := self._held.book.full(agent.identity.name, request.service, self._held.rules):
            raise Refused(Reason.LIMIT_REACHED, full)
        for key in ordered:
            if key in self._unvouched:
                attempt.refusal = attempt.refusal or Reason.POLICY_UNKNOWN
            elif self._held.peers[key].silent_since is not None:
                if request.connector_id is not None:
                    # Who wants none but this one wants to know whether it lives: a flow may have begun there.
                    attempt.refusal = attempt.refusal or Reason.PEER_GONE
            elif key not in attempt.tried and (self._held.peers[key].takes_datagrams or not agent.v1):
                return key
        raise Refused(attempt.refusal or Reason.NO_HEALTHY_CONNECTOR, request.service)

    def _offer(
        self, key: ConnectionKey, connector: Peer, attempt: Attempt, now: float, out: list[Command]
    ) -> None:
        assert connector.connector_id is not None
        request, agent = attempt.request, self._held.peers[key]
        session_id = SessionId.from_bytes(self._held.random(SESSION_ID_BYTES))
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
        out += self._held.book.add(session, forwarded=not agent.v1)
        link = self._held.book.links.get(session.link)
        agent.sessions.add(session_id)
        connector.sessions.add(session_id)
        self._held.offers[session_id] = now + ACCEPT_SECONDS
        offered = control.Offered(
            session=session_id,
            service=request.service,
            agent=control.PeerIdentity(agent.identity.name, agent.identity.fingerprint),
            lease=request.lease,
            forwarder=_bind(connector.forwarder, link.connector if link else None),
            probe_key=link.probe_key if link else Secret(),
            v1=agent.v1,
        )
        self._held.send(connector.key, offered, out)

    def _silence(self, session: Session, now: float, out: list[Command]) -> None:
        connector = self._held.peers[session.connector]
        connector.silent_since = now
        fields = {"connector": connector.identity.name, "service": session.service}
        out.append(Event("connector_silent", fields))
        self.give_up(session, None, now, out)

    def give_up(self, session: Session, reason: Reason | None, now: float, out: list[Command]) -> None:
        """Take an offer back and go on to the next connector."""
        session.attempt.refusal = session.attempt.refusal or reason
        self._held.end(session, reason or Reason.CLOSED_BY_PEER, BY_RELAY, now, out)
        if reason is None:
            self._held.send(session.connector, control.Closed(session.id, Reason.CLOSED_BY_PEER), out)
        self.offer_next(session.agent, session.attempt, now, out)

    def accepted(self, session: Session, now: float, out: list[Command]) -> None:
        """Its connector has accepted an offer: the session is open; harmless twice."""
        if session.open:
            return
        session.opened_at = session.v1_used_at = now
        if session.path == "v1":
            self._held.of_v1.add(session.id)
        del self._held.offers[session.id]
        agent, connector = self._held.peers[session.agent], self._held.peers[session.connector]
        link = self._held.book.links.get(session.link)
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
        self._held.send(agent.key, opened, out)
        self._held.tell("session_opened", session, {"fingerprint": agent.identity.fingerprint}, out)

    def _draw(self, bound: int) -> int:
        return int.from_bytes(self._held.random(8)) % bound


def _bind(address: Address | None, ticket: BindTicket | None) -> ForwarderBind | None:
    if address is None or ticket is None:
        return None
    return ForwarderBind(address, Binary(ticket.bind_id), ticket.secret)
