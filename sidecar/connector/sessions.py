"""The sessions a connector was offered: who owns each, under which lease, and when its flows end.

    (none) --offered, accepted--> live --connection lost, peer_gone--> detached --DETACHED_SECONDS--> (none)
                                   |                                      |
                                   +--closed, lease changed--> (none) <---+

Pure. Keyed by (relay connection, session): what one relay connection says never touches a session of another.
Source: protocol.md, Ownership, Ending, Epoch.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from sidecar.connector.flows import RelayConnection, SessionKey
from ztna.errors import Refused
from ztna.leases import Lease
from ztna.names import ServiceName, SessionId
from ztna.reasons import Reason
from ztna.wire.control import ForwarderBind, LeaseRef, Offered, PeerIdentity, Secret

SESSIONS_MAX = 20_000
LINKS_MAX = 4_096
"""Each link has a UDP socket: a relay can make this connector open no more of them."""
DETACHED_SECONDS = 30.0

BindKey = tuple[RelayConnection, bytes]
"""A relay connection and a bind id: one link, shared by the sessions of one agent connection."""

Standing = Literal["current", "stale", "newer"]


@dataclass(frozen=True, slots=True)
class Session:
    """A session as it was offered."""

    key: SessionKey
    service: ServiceName
    agent: PeerIdentity
    lease: LeaseRef | None
    """None for a v1 agent: each of its packets names the service, so no address can lead it astray."""
    forwarder: ForwarderBind | None
    probe_key: Secret
    v1: bool = False
    """Whether the relay hands over its packets, which it can read: nothing else may come in such a session."""

    @property
    def bind(self) -> BindKey | None:
        """Which link carries it, None when the relay has no forwarder."""
        return (self.key[0], bytes(self.forwarder.bind_id)) if self.forwarder else None


def standing(asked: LeaseRef | None, known: Lease | None) -> Standing:
    """Compare the lease an agent believes in with the one we know; without a lease it must resolve first."""
    if asked is None:
        return "stale"
    if known is None or asked.epoch > known.epoch:
        return "newer"
    if asked.epoch < known.epoch or asked.ip != known.ip:
        return "stale"
    return "current"


class Sessions:
    """Live and detached sessions."""

    def __init__(self) -> None:
        self._live: dict[SessionKey, Session] = {}
        self._detached: dict[SessionKey, tuple[Session, float]] = {}
        self._by_bind: dict[BindKey, dict[ServiceName, dict[SessionKey, Session]]] = {}
        self._by_id: dict[SessionId, dict[SessionKey, Session]] = {}
        self._services: Counter[tuple[str, ServiceName]] = Counter()
        self._agents: Counter[str] = Counter()

    def __len__(self) -> int:
        return len(self._live) + len(self._detached)

    def live(self) -> list[Session]:
        """Return the live ones."""
        return list(self._live.values())

    def detached(self) -> list[Session]:
        """Return those whose connection has gone and whose flows may still live."""
        return [session for session, _ in self._detached.values()]

    def admit(self, connection: RelayConnection, offer: Offered) -> Session:
        """Add an offered session that was found good and return it.

        Raises Refused for a session that is known already, a sealed one without a lease, a v1 one with a link, and
        at SESSIONS_MAX or LINKS_MAX.
        """
        key = (connection, offer.session)
        if key in self._live or key in self._detached:
            raise Refused(Reason.MALFORMED, f"session {offer.session} was offered twice")
        if offer.v1 and offer.forwarder is not None:
            raise Refused(Reason.MALFORMED, f"session {offer.session} of a v1 agent, which has no link")
        if offer.lease is None and not offer.v1:
            raise Refused(Reason.STALE_EPOCH, f"session {offer.session} names no lease")
        if len(self) >= SESSIONS_MAX:
            raise Refused(Reason.LIMIT_REACHED, f"{SESSIONS_MAX} sessions")
        lease = None if offer.v1 else offer.lease
        session = Session(key, offer.service, offer.agent, lease, offer.forwarder, offer.probe_key, offer.v1)
        if session.bind is not None and session.bind not in self._by_bind and len(self._by_bind) >= LINKS_MAX:
            raise Refused(Reason.LIMIT_REACHED, f"{LINKS_MAX} links")
        self._live[key] = session
        self._by_id.setdefault(offer.session, {})[key] = session
        self._services[session.agent.name, session.service] += 1
        self._agents[session.agent.name] += 1
        if session.bind is not None:
            self._by_bind.setdefault(session.bind, {}).setdefault(session.service, {})[key] = session
        return session

    def owned(self, connection: RelayConnection, session: SessionId) -> Session:
        """Return a live session of this very relay connection. Raises Refused(not_your_session)."""
        found = self._live.get((connection, session))
        if found is None:
            raise Refused(Reason.NOT_YOUR_SESSION, f"session {session} from relay {connection[0]}")
        return found

    def authorised(
        self, session: SessionId, service: ServiceName | None, agent: str, fingerprint: str
    ) -> Session:
        """Return the live session that an OPEN or RESUME names, for the peer that its TLS proved.

        Without a service (that of a flow that nobody knows) it may be for any. Raises Refused(not_your_session) when
        it is not live, was given to another agent or certificate, or is for another service.
        Source: protocol.md, Link: stream carrier, Authority.
        """
        given = PeerIdentity(agent, fingerprint)
        for found in self._by_id.get(session, {}).values():
            if found.agent == given and service in (None, found.service) and not found.v1:
                return found
        raise Refused(Reason.NOT_YOUR_SESSION, f"session {session} for {service} from {agent}")

    def former(self, session: Session, ids: Iterable[SessionId]) -> list[Session]:
        """Return the other sessions with these ids whose flows the agent may take along into this one.

        They are of the same agent, certificate, service and lease, live or detached.
        """
        wanted = frozenset(ids)
        return [
            each
            for each in (*self._live.values(), *self.detached())
            if each.key[1] in wanted
            and each.key != session.key
            and (each.agent, each.service, each.lease) == (session.agent, session.service, session.lease)
        ]

    def has_any(self, connection: RelayConnection) -> bool:
        """Say whether any live session came by this relay connection."""
        return any(key[0] == connection for key in self._live)

    def has_service(self, agent: str, service: ServiceName) -> bool:
        """Say whether the agent of that name has a live session for the service."""
        return (agent, service) in self._services

    def has_agent(self, agent: str) -> bool:
        """Say whether the agent of that name has any live session."""
        return agent in self._agents

    def carried(self, bind: BindKey, service: ServiceName) -> Session | None:
        """Return the session under which this link may carry the service: the newest that lives, else the newest."""
        found = None
        for session in reversed(self._same(bind, service).values()):
            if self.is_live(session):
                return session
            found = found or session
        return found

    def sharing(self, bind: BindKey, service: ServiceName) -> tuple[Session, ...]:
        """Return all sessions, live and detached, for the service on this link, the newest first."""
        return tuple(reversed(self._same(bind, service).values()))

    def _same(self, bind: BindKey, service: ServiceName) -> dict[SessionKey, Session]:
        return self._by_bind.get(bind, {}).get(service, {})

    def is_live(self, session: Session) -> bool:
        """Say whether new flows of it may begin."""
        return session.key in self._live

    def has_flows(self, session: Session) -> bool:
        """Say whether the flows it has may live, be they detached."""
        return session.key in self._live or session.key in self._detached

    def bind_in_use(self, bind: BindKey) -> bool:
        """Say whether any session, live or detached, needs the link."""
        return bind in self._by_bind

    def close(
        self, connection: RelayConnection, session: SessionId, reason: Reason, now: float
    ) -> Session | None:
        """End a live session; with peer_gone it is detached (None), else it is over and returned.

        Raises Refused(not_your_session) as `owned`.
        """
        found = self.owned(connection, session)
        if reason is Reason.PEER_GONE:
            self._detach(found, now)
            return None
        return self._end(found)

    def connection_lost(self, connection: RelayConnection, now: float) -> None:
        """Detach every session that came by this relay connection."""
        for session in [each for each in self._live.values() if each.key[0] == connection]:
            self._detach(session, now)

    def lease_changed(self, service: ServiceName, lease: Lease | None) -> list[Session]:
        """End and return the sessions of the service under another lease; all of them when it has none."""
        other = [
            session
            for session in [*self._live.values(), *self.detached()]
            if session.service == service and not session.v1 and standing(session.lease, lease) != "current"
        ]
        return [self._end(session) for session in other]

    def expire(self, now: float) -> list[Session]:
        """End and return the detached sessions whose time is over."""
        over = [session for session, until in self._detached.values() if now >= until]
        return [self._end(session) for session in over]

    def end_all(self) -> list[Session]:
        """End and return every session."""
        return [self._end(session) for session in [*self._live.values(), *self.detached()]]

    def _detach(self, session: Session, now: float) -> None:
        self._no_longer_live(session)
        self._detached[session.key] = (session, now + DETACHED_SECONDS)

    def _end(self, session: Session) -> Session:
        if self.is_live(session):
            self._no_longer_live(session)
        else:
            del self._detached[session.key]
        if session.bind is not None:
            self._leave_link(session, session.bind)
        return session

    def _leave_link(self, session: Session, bind: BindKey) -> None:
        services = self._by_bind[bind]
        del services[session.service][session.key]
        if not services[session.service]:
            del services[session.service]
        if not services:
            del self._by_bind[bind]

    def _no_longer_live(self, session: Session) -> None:
        del self._live[session.key]
        same_id = self._by_id[session.key[1]]
        del same_id[session.key]
        if not same_id:
            del self._by_id[session.key[1]]
        same = (session.agent.name, session.service)
        self._services[same] -= 1
        if not self._services[same]:
            del self._services[same]
        self._agents[session.agent.name] -= 1
        if not self._agents[session.agent.name]:
            del self._agents[session.agent.name]
