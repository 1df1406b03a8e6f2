"""The tables of relay.sessions: live sessions by what is asked of them, their links, and those that ended lately.

Pure, and decides nothing: it keeps the indexes alike, so that a session is in all of them or in none.
"""

from __future__ import annotations

from collections import Counter, OrderedDict, defaultdict
from collections.abc import Callable, Hashable
from typing import TypeVar

from relay.commands import AddLink, BindTicket, Command, ConnectionKey, EndSession, LinkKey, RemoveLink
from relay.rules import Rules
from relay.state import Link, Session
from ztna.jsontypes import Secret
from ztna.names import ConnectorId, ServiceName, SessionId
from ztna.wire.forwarder import BIND_ID_BYTES

ENDED_KEPT_SECONDS = 30.0
ENDED_KEPT_MAX = 20_000
SECRET_BYTES = 32

Route = tuple[ServiceName, ConnectorId]
T = TypeVar("T", bound=Hashable)


class SessionBook:
    """All sessions of one relay. Those inside are to be read only."""

    def __init__(self, random: Callable[[int], bytes]) -> None:
        """`random(n)` returns n unpredictable bytes."""
        self._random = random
        self.live: dict[SessionId, Session] = {}
        self.links: dict[LinkKey, Link] = {}
        self.routed: defaultdict[Route, set[SessionId]] = defaultdict(set)
        self.of_name: Counter[str] = Counter()
        self.of_service: Counter[ServiceName] = Counter()
        self._ended: OrderedDict[SessionId, tuple[float, LinkKey]] = OrderedDict()

    def add(self, session: Session, forwarded: bool) -> list[Command]:
        """Take a new session in; one that is `forwarded` joins the link of its two connections."""
        self.live[session.id] = session
        self.routed[session.service, session.connector_id].add(session.id)
        self.of_name[session.agent_name] += 1
        self.of_service[session.service] += 1
        return self._join_link(session) if forwarded else []

    def remove(self, session: Session, now: float) -> list[Command]:
        """Forget a session, and its link when it was the last one there."""
        del self.live[session.id]
        route = (session.service, session.connector_id)
        self.routed[route].discard(session.id)
        if not self.routed[route]:
            del self.routed[route]
        _take_one(self.of_name, session.agent_name)
        _take_one(self.of_service, session.service)
        self._ended[session.id] = (now + ENDED_KEPT_SECONDS, session.link)
        if len(self._ended) > ENDED_KEPT_MAX:
            self._ended.popitem(last=False)
        return [EndSession(session.id), *self._leave_link(session)]

    def full(self, agent_name: str, service: ServiceName, rules: Rules) -> str:
        """Return which limit another session would go beyond, empty when none."""
        if self.of_name[agent_name] >= rules.per_identity:
            return f"{rules.per_identity} sessions of {agent_name}"
        if self.of_service[service] >= rules.per_service:
            return f"{rules.per_service} sessions of {service}"
        return f"{rules.total} sessions" if len(self.live) >= rules.total else ""

    def ended_lately(self, session_id: SessionId, key: ConnectionKey) -> bool:
        """Say whether a session of this connection ended so lately that a message may have crossed its end."""
        ended = self._ended.get(session_id)
        return ended is not None and key in ended[1]

    def forget_ended(self, now: float) -> None:
        """Drop what ended long enough ago."""
        while self._ended and next(iter(self._ended.values()))[0] <= now:
            self._ended.popitem(last=False)

    def _join_link(self, session: Session) -> list[Command]:
        link = self.links.get(session.link)
        if link is not None:
            link.sessions.add(session.id)
            return []
        link = Link(self._ticket(), self._ticket(), Secret(self._random(SECRET_BYTES)), {session.id})
        self.links[session.link] = link
        peers = session.agent_name, session.connector_id
        return [AddLink(session.link, link.agent, link.connector, peers)]

    def _leave_link(self, session: Session) -> list[Command]:
        link = self.links.get(session.link)
        if link is None:
            return []
        link.sessions.discard(session.id)
        if link.sessions:
            return []
        del self.links[session.link]
        return [RemoveLink(session.link)]

    def _ticket(self) -> BindTicket:
        return BindTicket(self._random(BIND_ID_BYTES), Secret(self._random(SECRET_BYTES)))


def _take_one(counts: Counter[T], key: T) -> None:
    counts[key] -= 1
    if not counts[key]:
        del counts[key]
