"""The trust of this moment and the live peers whose verdicts follow it: who is revoked or expires is told at once.

One for a daemon, shared by all its connections, carriers and links: a change of CA or CRL reaches every one of them,
also those that came under earlier credentials. What a verdict means is ztna.identity's, what ends with it the owner's.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
import time
from collections import deque
from collections.abc import Callable, Sequence
from datetime import UTC, datetime

from cryptography.x509 import Certificate

from ztna.errors import IdentityError, ZtnaError
from ztna.identity import PROVEN_MAX, Identity, Trust, Usage
from ztna.telemetry import logger

TICK_SECONDS = 0.5
JUDGED_PER_TURN = 100
TURN_SECONDS = 0.005
"""Thousands may lose their certificates by one CRL: the loop gets its turns in between."""

_log = logger(__name__)

WallClock = Callable[[], datetime]


def wall_clock() -> datetime:
    """Return the time that certificates are judged by."""
    return datetime.now(UTC)


class Followed:
    """A live peer: `end` is called once when it may not stay, unless `forget` came first."""

    __slots__ = ("_among", "end", "identity")

    def __init__(
        self, identity: Identity, end: Callable[[IdentityError], None], among: dict[Followed, None]
    ) -> None:
        self.identity = identity
        self.end: Callable[[IdentityError], None] | None = end
        self._among = among
        among[self] = None

    def forget(self) -> None:
        """Follow no more; again is harmless."""
        self._among.pop(self, None)
        self.end = None


class Verdicts:
    """Who may come in, and who may stay."""

    def __init__(self, trust: Trust, wall: WallClock = wall_clock) -> None:
        self._trust = trust
        self._wall = wall
        self._followed: dict[Followed, None] = {}
        self._expiries: list[tuple[datetime, int, Followed]] = []
        self._numbers = itertools.count()
        self._pending: deque[Followed] = deque()
        self.on_refused: Callable[[Identity, IdentityError], None] = lambda identity, error: None
        """Called beside a peer's own `end`, for what else hangs on its certificate."""
        self._judged: dict[tuple[str, tuple[Certificate, ...]], IdentityError | None] = {}
        self._ticking: asyncio.TimerHandle | None = None
        self._turn: asyncio.Handle | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    @property
    def trust(self) -> Trust:
        """Whom this daemon believes now."""
        return self._trust

    def verify(self, chain_der: Sequence[bytes], usage: Usage, now: datetime | None = None) -> Identity:
        """Return who a peer is that wants to come in. Raises IdentityError as Trust.verify."""
        return self._trust.verify(chain_der, usage, now or self._wall())

    def require(self, identity: Identity) -> None:
        """Raise IdentityError when a peer that is in may not stay: for each new flow, so it costs a table look-up."""
        error = self._judge(identity, self._wall())
        if error is not None:
            raise error

    @property
    def goes_by_crls(self) -> bool:
        """Whether CRLs are configured, so that `unknown` may have something to say."""
        return self._trust.revocations is not None

    def unknown(self, identity: Identity) -> str | None:
        """Return why CRLs cannot tell whether peers such as this one stand, so that no session may begin, else None."""
        return self._trust.unknown(identity.path, self._wall())

    def follow(self, identity: Identity, end: Callable[[IdentityError], None]) -> Followed:
        """Have `end` called when the peer may not stay any more."""
        loop = asyncio.get_running_loop()
        if loop is not self._loop:
            # Credentials are read before there is a loop, and may outlive one.
            self._loop, self._ticking, self._turn = loop, None, None
        followed = Followed(identity, end, self._followed)
        heapq.heappush(self._expiries, (identity.not_after, next(self._numbers), followed))
        if self._ticking is None:
            self._ticking = loop.call_later(TICK_SECONDS, self._tick)
        if self._judge(identity, self._wall()) is not None:
            # The trust has changed since it was verified, a turn of the loop ago: ended like those before it.
            self._pending.append(followed)
            self._turn = self._turn or loop.call_soon(self._judge_some)
        return followed

    def use(self, trust: Trust) -> None:
        """Go by another trust from now on, for those who come and, a few at a time, for those who are here."""
        self._trust = trust
        self._judged.clear()
        self._pending = deque(self._followed)
        if self._pending and self._turn is None:
            self._turn = asyncio.get_running_loop().call_soon(self._judge_some)

    def _judge(self, identity: Identity, now: datetime) -> IdentityError | None:
        """Return the verdict on a peer: inside its dates of memory, while the trust is the same."""
        if not identity.valid_at(now):
            # Never remembered: a clock that was wrong is set right again.
            return self._trust.judge(identity, now)
        # One leaf may have come by several ways, of which one was revoked.
        key = (identity.fingerprint, identity.path[1:])
        if key not in self._judged:
            if len(self._judged) >= PROVEN_MAX:
                self._judged.clear()
            self._judged[key] = self._trust.judge(identity, now)
        return self._judged[key]

    def _judge_some(self) -> None:
        self._turn = None
        now = self._wall()
        try:
            until = time.monotonic() + TURN_SECONDS
            for _ in range(min(JUDGED_PER_TURN, len(self._pending))):
                if time.monotonic() >= until:
                    break
                followed = self._pending.popleft()
                error = self._judge(followed.identity, now)
                if error is not None:
                    self._end(followed, error)
        finally:
            # Whatever went wrong with one of them, the others are judged.
            if self._pending:
                self._turn = asyncio.get_running_loop().call_soon(self._judge_some)

    def _tick(self) -> None:
        """End those whose time is over; looked at often, as the wall clock may be set."""
        self._ticking = None
        now = self._wall()
        try:
            self._end_expired(now)
        finally:
            self._tick_again(now)

    def _end_expired(self, now: datetime) -> None:
        until = time.monotonic() + TURN_SECONDS
        for _ in range(JUDGED_PER_TURN):
            if not self._expiries or self._expiries[0][0] >= now or time.monotonic() >= until:
                break
            followed = heapq.heappop(self._expiries)[2]
            error = self._trust.judge(followed.identity, now)
            if error is not None:
                self._end(followed, error)

    def _tick_again(self, now: datetime) -> None:
        if len(self._expiries) > 2 * len(self._followed):
            self._expiries = [entry for entry in self._expiries if entry[2] in self._followed]
            heapq.heapify(self._expiries)
        if self._followed:
            is_behind = bool(self._expiries) and self._expiries[0][0] < now
            self._ticking = asyncio.get_running_loop().call_later(
                0 if is_behind else TICK_SECONDS, self._tick
            )

    def _end(self, followed: Followed, error: IdentityError) -> None:
        end = followed.end
        followed.forget()
        if end is None:
            return
        _log.warning("peer_refused", peer=followed.identity.name, reason=error.reason, detail=error.detail)
        try:
            end(error)
            self.on_refused(followed.identity, error)
        except ZtnaError as failure:
            # The others are ended all the same.
            _log.error("peer_not_ended", peer=followed.identity.name, error=failure)
