"""The packet links of a connector: one for each agent process, over every relay that offered its sessions.

A binding at a relay's forwarder is served as soon as a session needs it. When the agent comes there with a connection
that stands already over another relay, the two are one link from then on, and it lives as long as any relay does. What
travels on a link is sidecar.connector.datagrams'.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Sequence
from functools import partial

from sidecar.connector.sessions import BindKey, Session, Sessions
from sidecar.link.packet import PacketLink
from sidecar.link.quic_stream import QuicStream
from ztna.credentials import Credentials
from ztna.errors import LinkError, Refused, ZtnaError
from ztna.identity import Identity, require_agent
from ztna.names import ServiceName
from ztna.reasons import Reason
from ztna.telemetry import logger
from ztna.wire.control import Address, Candidates, PeerIdentity

LINK_RETRY_SECONDS = 1.0

_log = logger(__name__)

Receive = Callable[[PacketLink, ServiceName, bytes], None]


class Links:
    """All packet links, by each of their bindings."""

    def __init__(
        self,
        sessions: Sessions,
        credentials: Callable[[Session], Credentials],
        *,
        receive: Receive,
        addresses: Callable[[], Sequence[str]],
        answer: Callable[[Session, tuple[Address, ...]], None],
        on_stream: Callable[[QuicStream], None],
        private_candidates: bool,
    ) -> None:
        """`credentials` are those that the agent of a session was told to expect.

        `addresses` gives those of this host's interfaces; `answer` tells an agent that offered its candidates ours,
        when they are others than before. `on_stream` takes the streams that agents open.
        """
        self._credentials = credentials
        self._sessions = sessions
        self._receive = receive
        self._addresses = addresses
        self._answer = answer
        self._on_stream = on_stream
        self._private = private_candidates
        self._offered: dict[BindKey, Session] = {}
        self._links: dict[BindKey, PacketLink] = {}
        self._binds: dict[PacketLink, dict[BindKey, Session]] = {}
        self._of_agent: dict[PeerIdentity, set[PacketLink]] = {}
        self._is_closed = False

    def serve(self, session: Session) -> None:
        """See to it that the session's binding is served, until no session needs it."""
        bind = session.bind
        if bind is None or bind in self._links or self._is_closed or not self._sessions.bind_in_use(bind):
            return
        assert session.forwarder is not None
        try:
            link = PacketLink.serve(
                session.forwarder,
                session.probe_key,
                self._credentials(session),
                admit=partial(_admit, session),
                receive=self._receive,
                addresses=self._addresses,
                allow_private=self._private,
                stray=partial(self._adopted, session),
                on_stream=self._on_stream,
            )
        except (ZtnaError, OSError) as error:
            _log.error("link_failed", agent=session.agent.name, error=error)
            asyncio.get_running_loop().call_later(LINK_RETRY_SECONDS, self.serve, session)
            return
        self._add(link, bind, session)

    def of(self, session: Session) -> PacketLink | None:
        """Return the link that carries the session."""
        return self._links.get(session.bind) if session.bind is not None else None

    def carried(self, link: PacketLink, service: ServiceName) -> Session | None:
        """Return the session under which a link may carry a service: one that lives, the newest, if there is any."""
        found = None
        for bind in reversed(self._binds.get(link, ())):
            session = self._sessions.carried(bind, service)
            if session is not None and self._sessions.is_live(session):
                return session
            found = found or session
        return found

    def others(self, session: Session) -> Iterator[Session]:
        """Yield the other sessions, live and detached, by which its link carries the same service."""
        link = self.of(session)
        for bind in self._binds[link] if link is not None else ():
            for other in self._sessions.sharing(bind, session.service):
                if other is not session:
                    yield other

    def candidates(self, session: Session) -> tuple[Address, ...]:
        """Return the addresses that the session's agent may try, who offered its own in that session."""
        link = self.of(session)
        if link is None or session.bind is None:
            return ()
        self._offered[session.bind] = session
        return link.local_candidates(session.bind[1])

    def network_changed(self) -> None:
        """Find out anew on every link what works."""
        for link in tuple(self._binds):
            link.network_changed()

    def probe(self, session: Session, candidates: Candidates) -> None:
        """Probe the agent's candidates."""
        link = self.of(session)
        if link is not None and session.bind is not None:
            link.probe(session.bind[1], candidates)

    def ended(self, session: Session) -> None:
        """Close what was there for a session alone."""
        link = self.of(session)
        if link is not None:
            self._drop_unused(link)

    def tidy(self) -> None:
        """Close what no session needs any more: to be called about once a second."""
        for link in tuple(self._binds):
            self._drop_unused(link)

    def close(self, reason: Reason) -> None:
        """Close every link for good."""
        self._is_closed = True
        for link in tuple(self._binds):
            link.close(reason)

    def status(self) -> list[dict[str, object]]:
        """Return what the admin page shows, a line for each binding."""
        return [
            {
                "relay": bind[0][0],
                "agent": _peer_name(link),
                "path": link.path if link.carrying.bind_id == bind[1] else "spare",
            }
            for bind, link in self._links.items()
        ]

    def _drop_unused(self, link: PacketLink) -> None:
        """Close the ways that no session needs, and the link with the last; one that carries stays till it is left."""
        binds = self._binds[link]
        unused = [bind for bind in binds if not self._sessions.bind_in_use(bind)]
        if len(unused) == len(binds):
            link.close()
            return
        for bind in unused:
            if link.carrying.bind_id != bind[1]:
                link.remove_way(bind[1])
                del binds[bind], self._links[bind]
                self._offered.pop(bind, None)

    def _add(self, link: PacketLink, bind: BindKey, session: Session) -> None:
        self._links[bind] = link
        self._binds.setdefault(link, {})[bind] = session
        self._of_agent.setdefault(session.agent, set()).add(link)
        link.candidates_changed = self._candidates_changed
        link.closed.add_done_callback(lambda _: self._closed(link, bind, session))

    def _closed(self, link: PacketLink, bind: BindKey, session: Session) -> None:
        """Forget a link that is over, and serve what still needs it anew."""
        self._binds.pop(link, None)
        same = self._of_agent.get(session.agent, set())
        same.discard(link)
        if not same:
            self._of_agent.pop(session.agent, None)
        if self._links.get(bind) is link:
            del self._links[bind]
            self._offered.pop(bind, None)
            self.serve(session)

    def _candidates_changed(self, link: PacketLink, bind_id: bytes) -> None:
        for bind in self._binds.get(link, ()):
            session = self._offered.get(bind)
            if bind[1] == bind_id and session is not None and self._sessions.is_live(session):
                self._answer(session, link.local_candidates(bind_id))

    def _adopted(self, session: Session, data: bytes) -> PacketLink | None:
        """Return the link whose connection a packet belongs to, which came by a binding of the same agent."""
        assert session.bind is not None
        waiting = self._links.get(session.bind)
        for link in self._of_agent.get(session.agent, ()):
            if link is not waiting and waiting is not None and link.knows(data):
                for bind, served in self._binds.pop(waiting).items():
                    self._add(link, bind, served)
                link.adopt(waiting)
                _log.info("link_joined", agent=session.agent.name, relay=session.bind[0][0])
                return link
        return None


def _admit(session: Session, identity: Identity) -> None:
    if identity.name != session.agent.name:
        raise Refused(Reason.NOT_YOUR_SESSION, f"{identity.name} on the link of {session.agent.name}")
    require_agent(identity, session.service, session.agent.fingerprint)


def _peer_name(link: PacketLink) -> str | None:
    try:
        return link.peer.name
    except LinkError:
        return None
