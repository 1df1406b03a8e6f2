"""Connections to the forwarder's TCP port that are not bound yet, and what admits them.

Holds them and says who may have more, and which must go for another; closes none.
"""

from __future__ import annotations

import socket
from collections import Counter, defaultdict
from collections.abc import Hashable, Iterator
from dataclasses import dataclass, field
from typing import TypeVar

from ztna.names import SessionId

K = TypeVar("K", bound=Hashable)
T = TypeVar("T", bound=Hashable)

STRANGERS_PER_SOURCE_MAX = 256
"""Connections of one source (an IPv4 address, an IPv6 /64) that have shown no token yet."""
TOKENS_PER_SESSION_MAX = 256
TOKENS_MAX = 100_000
"""Who gets one uses it at once: beyond it the oldest goes, so that who hoards them keeps nobody else out."""
HELD_PER_AGENT_MAX = 512
"""Tokens not used yet, and connections that wait for their connector, of one agent."""
WAITERS_MAX = 4_000
"""Connections of agents that wait for their connector, in all."""


@dataclass(frozen=True, slots=True)
class Owner:
    """Whose a session's connections are: the `agent` by whom they are bounded, the `link` by which metered."""

    agent: Hashable
    link: Hashable


@dataclass(slots=True)
class Token:
    """Admits one connection: an agent's, or the connector's that joins `waiting`."""

    session: SessionId
    owner: Owner
    expires_at: float
    waiting: Dialled | None = None


@dataclass(slots=True, eq=False)
class Dialled:
    """A connection that is not bound yet; `owner` and `session` once an agent's token was shown."""

    sock: socket.socket
    source: str
    deadline: float
    head: bytearray = field(default_factory=bytearray)
    session: SessionId | None = None
    owner: Owner | None = None


class Strangers:
    """Connections that have shown no token yet, the oldest first.

    Anybody can connect and say nothing; who has a token says it at once. So a newcomer takes the place of the one
    that waited longest, and one source's flood costs that source's own strangers only.
    """

    def __init__(self) -> None:
        self._all: dict[Dialled, None] = {}
        self._of: defaultdict[str, dict[Dialled, None]] = defaultdict(dict)

    def __len__(self) -> int:
        return len(self._all)

    def add(self, dialled: Dialled) -> None:
        """Take a newcomer in."""
        self._all[dialled] = self._of[dialled.source][dialled] = None

    def discard(self, dialled: Dialled) -> None:
        """Forget one that showed a token or went; harmless when it is not there."""
        if dialled in self._all:
            del self._all[dialled]
            own = self._of[dialled.source]
            del own[dialled]
            if not own:
                del self._of[dialled.source]

    def oldest(self) -> Dialled | None:
        """Return the one that waited longest."""
        return next(iter(self._all), None)

    def oldest_of_full(self, source: str, most: int = STRANGERS_PER_SOURCE_MAX) -> Dialled | None:
        """Return the one that must go before another comes from the source; None when there is room."""
        own = self._of.get(source, {})
        return next(iter(own)) if len(own) >= most else None


class Tokens:
    """Tokens not used yet by session, and connections of agents that wait: each bounded by agent and in all."""

    def __init__(self) -> None:
        self._tokens: dict[bytes, Token] = {}
        self._of: defaultdict[SessionId, set[bytes]] = defaultdict(set)
        self._waiting: defaultdict[SessionId, set[Dialled]] = defaultdict(set)
        self._waiters = 0
        self._held: Counter[Hashable] = Counter()
        self.displaced = 0
        """How many gave way to newer ones."""

    def __len__(self) -> int:
        return len(self._tokens)

    @property
    def waiters(self) -> int:
        """How many agents' connections wait."""
        return self._waiters

    def full(self, owner: Owner) -> bool:
        """Say whether the agent has all that it may have, or all agents together."""
        return self._waiters >= WAITERS_MAX or self._held[owner.agent] >= HELD_PER_AGENT_MAX

    def add(self, token: bytes, entry: Token) -> bool:
        """Let one connection with the token in; False when its session or agent has too many."""
        own = self._of.get(entry.session, ())
        if len(own) >= TOKENS_PER_SESSION_MAX or (entry.waiting is None and self.full(entry.owner)):
            return False
        if len(self._tokens) >= TOKENS_MAX:
            self.displaced += 1
            self.take(next(iter(self._tokens)))
        self._of[entry.session].add(token)
        self._tokens[token] = entry
        if entry.waiting is None:
            self._held[entry.owner.agent] += 1
        return True

    def take(self, token: bytes) -> Token | None:
        """Return what the token admits, which it does once."""
        entry = self._tokens.pop(token, None)
        if entry is not None:
            discard(self._of, entry.session, token)
            if entry.waiting is None:
                self._let_go(entry.owner)
        return entry

    def void_session(self, session: SessionId) -> None:
        """Forget all tokens of a session."""
        for token in list(self._of.get(session, ())):
            self.take(token)

    def void_expired(self, now: float) -> None:
        """Forget the tokens that nobody used in time."""
        for token in [token for token, each in self._tokens.items() if each.expires_at <= now]:
            self.take(token)

    def wait(self, dialled: Dialled, entry: Token) -> bool:
        """Note that an agent's connection waits, having shown its token; False when too many wait already."""
        if self._waiters >= WAITERS_MAX:
            return False
        dialled.session, dialled.owner = entry.session, entry.owner
        self._waiting[entry.session].add(dialled)
        self._waiters += 1
        self._held[entry.owner.agent] += 1
        return True

    def waiting(self, session: SessionId) -> Iterator[Dialled]:
        """Return the connections that wait for the session's connector."""
        return iter(tuple(self._waiting.get(session, ())))

    def stop_waiting(self, dialled: Dialled) -> None:
        """Note that it was joined or went; harmless for one that does not wait."""
        if dialled.session is not None and dialled.owner is not None:
            discard(self._waiting, dialled.session, dialled)
            self._waiters -= 1
            self._let_go(dialled.owner)

    def _let_go(self, owner: Owner) -> None:
        self._held[owner.agent] -= 1
        if not self._held[owner.agent]:
            del self._held[owner.agent]


def discard(sets: dict[K, set[T]], key: K, member: T) -> None:
    """Take a member out of a set by key, and the set with its last one."""
    members = sets[key]
    members.discard(member)
    if not members:
        del sets[key]
