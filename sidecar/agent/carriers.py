"""Stream carriers of an agent: dialled directly or through a forwarder, kept while idle, used again.

Where TCP is blocked they are streams of a packet link.

Which flow rides one is sidecar.agent.streams', moving bytes sidecar.link's.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Collection
from contextlib import suppress
from dataclasses import dataclass
from enum import StrEnum
from functools import partial

from sidecar.agent.commands import Session, SessionKey
from sidecar.link.budget import Budget
from sidecar.link.patience import patience
from sidecar.link.quic_stream import QuicStream
from sidecar.link.stream import FORWARDER_BOUND_SECONDS, Carrier
from ztna.credentials import Credentials
from ztna.errors import IdentityError, LinkError
from ztna.identity import Identity, require_connector
from ztna.names import ConnectorId
from ztna.reasons import Reason
from ztna.stall import LOOK_SECONDS
from ztna.telemetry import dropped, logger
from ztna.udp import SockAddr
from ztna.wire.control import Address, Dial, DialToken

IDLE_SECONDS = 60.0
IDLE_PER_CONNECTOR_MAX = 4
ROUTE_MEMORY_SECONDS = 60.0
"""How long it is remembered which way leads to a connector."""
LINK_AFTER_SECONDS = 1.0
"""When a forwarder has not bound by then, a stream of the packet link is made ready beside it."""
LINK_SECONDS = 2.0
"""How long that may take."""
DIAL_TOKEN_SECONDS = 2.0
FORWARDER_SECONDS = 2.0
"""How long a connector may take to dial in. Less than the 5 s a forwarder waits: by then new flows must have
gone to another connector. On a long way it gets some round trips to the relay more."""
FORWARDER_ROUND_TRIPS = 3
DIALS_PER_SESSION_MAX = 128

_log = logger(__name__)


class Way(StrEnum):
    """Which way carriers go to a connector."""

    DIRECT = "direct"
    FORWARDED = "forwarded"
    LINK = "quic"
    """Over the packet link: TCP does not get through."""


@dataclass(frozen=True, slots=True)
class _Route:
    way: Way
    until: float


@dataclass(frozen=True, slots=True, eq=False)
class _Idle:
    carrier: Carrier
    session: SessionKey | None
    """Of a forwarded carrier, the one session it serves; a direct one serves any."""
    timer: asyncio.TimerHandle


class Carriers:
    """All stream carriers of an agent."""

    def __init__(
        self,
        credentials: Callable[[str], Credentials],
        *,
        send: Callable[[str, Dial], object],
        dial_at: Callable[[str, Address], SockAddr],
        over_link: Callable[[Session], Awaitable[QuicStream]],
        is_link_better: Callable[[Session], bool],
        tasks: asyncio.TaskGroup,
        direct: bool,
    ) -> None:
        """`send` puts a message on the control connection to a relay; `direct` allows direct carriers.

        `dial_at` says where to dial in for a relay's forwarder; `over_link` opens a stream of a session's packet link,
        or raises LinkError; `is_link_better` says whether that comes before the forwarder. `tasks` owns what finds out
        whether TCP gets through again.

        `credentials` are those that a relay's sessions were opened with: the connector expects that very leaf.
        """
        self._credentials = credentials
        self._send = send
        self._dial_at = dial_at
        self._over_link = over_link
        self._is_link_better = is_link_better
        self._tasks = tasks
        self._probing: set[ConnectorId] = set()
        self._direct = direct
        self._budget = Budget()
        self._loop = asyncio.get_running_loop()
        self._idle: dict[ConnectorId, deque[_Idle]] = {}
        self._routes: dict[ConnectorId, _Route] = {}
        self._tokens: dict[SessionKey, deque[asyncio.Future[bytes]]] = {}
        self._carriers: dict[Carrier, str] = {}  # and which leaf of ours each was shown
        self._looking: asyncio.TimerHandle | None = None

    def dial_token(self, relay: str, message: DialToken) -> None:
        """Give the token to whoever asked first for that session; one that nobody waits for lapses."""
        waiting = self._tokens.get((relay, message.session), ())
        for answer in waiting:
            if not answer.done():
                answer.set_result(message.token)
                return
        dropped("agent_dial_token", "unexpected")

    def session_ended(self, session: Session, reason: Reason) -> None:
        """End the dials that wait for a session, and its own idle carriers."""
        for answer in tuple(self._tokens.get(session.key, ())):
            if not answer.done():
                answer.set_exception(LinkError(f"the session ended: {reason}"))
        for idle in tuple(self._idle.get(session.opened.connector_id, ())):
            if idle.session == session.key:
                idle.carrier.close(reason)

    def status(self) -> dict[str, object]:
        """Return by connector how many carriers are idle and which way they go."""
        now = self._loop.time()
        return {
            "carriers": len(self._carriers),
            "on_links": sum(not carrier.is_tcp for carrier in self._carriers),
            "idle": {connector: len(found) for connector, found in sorted(self._idle.items())},
            "routes": {
                connector: route.way
                for connector, route in sorted(self._routes.items())
                if route.until > now or route.way is Way.LINK
            },
        }

    def close(self) -> None:
        """Close every carrier; flows that run are reset."""
        for carrier in tuple(self._carriers):
            carrier.close(Reason.DRAINING)

    def network_changed(self, held: Collection[str]) -> None:
        """Close those on addresses that this host holds no more, and try again what could not be reached directly."""
        self._routes.clear()
        for carrier in tuple(self._carriers):
            carrier.network_changed(held)

    def take_idle(self, session: Session) -> Carrier | None:
        """Take the carrier that was used last: the others may then grow old and be closed."""
        kept = self._idle.get(session.opened.connector_id, deque())
        for idle in reversed(tuple(kept)):
            if idle.session not in (None, session.key):
                continue
            kept.remove(idle)
            idle.timer.cancel()
            if not self._is_fit(idle.carrier, session) or self._is_detour(idle.carrier, session):
                idle.carrier.close()
                continue
            if idle.carrier.is_idle:
                return idle.carrier
        return None

    def keep(self, carrier: Carrier, session: Session) -> None:
        """Keep a free carrier of a live session for the next flow."""
        if not carrier.is_idle:
            return
        connector = session.opened.connector_id
        kept = self._idle.setdefault(connector, deque())
        timer = self._loop.call_later(IDLE_SECONDS, carrier.close)
        kept.append(_Idle(carrier, session.key if carrier.forwarded else None, timer))
        if len(kept) > IDLE_PER_CONNECTOR_MAX:
            oldest = kept.popleft()
            oldest.timer.cancel()
            oldest.carrier.close()

    def _is_fit(self, carrier: Carrier, session: Session) -> bool:
        """Say whether it stands under the certificates that this session names: either may have been renewed."""
        try:
            _check(session, carrier.peer)
        except IdentityError:
            return False
        return self._carriers.get(carrier) == self._credentials(session.relay).identity.fingerprint

    def _is_detour(self, carrier: Carrier, session: Session) -> bool:
        """Say whether it goes over the packet link though TCP may get through by now, which the next dial finds out."""
        route = self._route(session.opened.connector_id)
        return not carrier.is_tcp and (route is None or route.way is not Way.LINK)

    async def dial(self, session: Session) -> Carrier:
        """Dial directly, else through the forwarder, else over the packet link. Raises LinkError or IdentityError.

        Where TCP was blocked the packet link comes first, and TCP is tried beside it now and then.
        """
        connector = session.opened.connector_id
        route = self._routes.get(connector)
        if route is not None and route.way is Way.LINK:
            if route.until <= self._loop.time() and connector not in self._probing:
                self._probing.add(connector)
                self._tasks.create_task(self._probe(session), name=f"tcp to {connector}")
            try:
                return await self._dial_link(session)
            except LinkError:
                self._routes.pop(connector, None)
        return await self._dial_tcp(session, or_link=True)

    async def _dial_tcp(self, session: Session, *, or_link: bool) -> Carrier:
        connector = session.opened.connector_id
        route = self._route(connector)
        is_tried = route is None or route.way is not Way.FORWARDED
        if self._direct and session.opened.link_address is not None and is_tried:
            address, own = session.opened.link_address, self._credentials(session.relay)
            try:
                carrier = await Carrier.dial_direct(
                    (address.ip, address.port),
                    own,
                    partial(_check, session),
                    budget=self._budget,
                )
            except (LinkError, IdentityError):
                self._remember(connector, Way.FORWARDED)
                if route is not None and route.way is Way.DIRECT:
                    # It worked a moment ago, so it is rather the connector that has gone than the way to it.
                    raise
            else:
                self._remember(connector, Way.DIRECT)
                return self._track(carrier, connector, own)
        if not or_link:
            return await self._dial_forwarder(session)
        if self._is_link_better(session):
            with suppress(LinkError):
                return await self._dial_link(session)
        return await self._dial_forwarder_or_link(session)

    async def _dial_forwarder_or_link(self, session: Session) -> Carrier:
        """Dial through the forwarder; when nothing comes of that, take the packet link, made ready meanwhile."""
        forwarded = asyncio.ensure_future(self._dial_forwarder(session))
        linked: asyncio.Task[Carrier] | None = None
        taken: asyncio.Task[Carrier] | None = None
        try:
            await asyncio.wait((forwarded,), timeout=LINK_AFTER_SECONDS)
            if not _has_failed(forwarded):
                if not forwarded.done():
                    linked = asyncio.ensure_future(self._dial_link(session))
                    await asyncio.wait((forwarded,))
                if not _has_failed(forwarded):
                    taken = forwarded
                    return forwarded.result()
            linked = linked or asyncio.ensure_future(self._dial_link(session))
            await asyncio.wait((linked,))
            if _has_failed(linked):
                return forwarded.result()  # which raises
            taken = linked
            route = self._route(session.opened.connector_id)
            if route is None or route.way is not Way.LINK:
                connector = session.opened.connector_id
                _log.warning("tcp_blocked", connector=connector, detail=forwarded.exception())
            self._remember(session.opened.connector_id, Way.LINK)
            return linked.result()
        finally:
            for each in (forwarded, linked):
                if each is not None and each is not taken:
                    await _give_up(each)

    async def _dial_link(self, session: Session) -> Carrier:
        """Open a stream of the session's packet link. Raises LinkError."""
        own = self._credentials(session.relay)
        try:
            async with patience(LINK_SECONDS):
                stream = await self._over_link(session)
        except TimeoutError:
            raise LinkError(f"no stream of a packet link within {LINK_SECONDS:g} s") from None
        carrier = Carrier.over_link(stream, budget=self._budget)
        return self._track(carrier, session.opened.connector_id, own)

    async def _probe(self, session: Session) -> None:
        """Find out whether TCP gets through again, for the flows to come."""
        connector = session.opened.connector_id
        try:
            carrier = await self._dial_tcp(session, or_link=False)
        except (LinkError, IdentityError):
            self._remember(connector, Way.LINK)
        else:
            if carrier.forwarded:
                self._remember(connector, Way.FORWARDED)
            _log.info("tcp_carries", connector=connector)
            self.keep(carrier, session)
        finally:
            self._probing.discard(connector)

    async def _dial_forwarder(self, session: Session) -> Carrier:
        forwarder = session.opened.forwarder
        if forwarder is None:
            raise LinkError("the relay offers no forwarder")
        asked_at = self._loop.time()
        token, own = await self._token(session), self._credentials(session.relay)
        round_trips_s = FORWARDER_ROUND_TRIPS * (self._loop.time() - asked_at)
        carrier = await Carrier.dial_forwarder(
            self._dial_at(session.relay, forwarder.address),
            token,
            own,
            partial(_check, session),
            budget=self._budget,
            timeout_s=min(FORWARDER_SECONDS + round_trips_s, FORWARDER_BOUND_SECONDS),
        )
        return self._track(carrier, session.opened.connector_id, own)

    async def _token(self, session: Session) -> bytes:
        """Ask the relay for a dial token and wait for it."""
        waiting = self._tokens.setdefault(session.key, deque())
        if len(waiting) >= DIALS_PER_SESSION_MAX:
            raise LinkError("too many dials wait for a token")
        answer: asyncio.Future[bytes] = self._loop.create_future()
        waiting.append(answer)
        try:
            self._send(session.relay, Dial(session.opened.session))
            async with patience(DIAL_TOKEN_SECONDS):
                return await answer
        except TimeoutError:
            raise LinkError(f"no dial token within {DIAL_TOKEN_SECONDS:g} s") from None
        finally:
            waiting.remove(answer)
            if not waiting:
                self._tokens.pop(session.key, None)

    def _track(self, carrier: Carrier, connector: ConnectorId, own: Credentials) -> Carrier:
        self._carriers[carrier] = own.identity.fingerprint
        carrier.closed.add_done_callback(lambda _: self._forget(carrier, connector))
        if self._looking is None:
            self._looking = self._loop.call_later(LOOK_SECONDS, self._look)
        return carrier

    def _look(self) -> None:
        """Find out, while there are carriers, which of them lead nowhere."""
        now = self._loop.time()
        for carrier in tuple(self._carriers):
            carrier.look(now)
        self._looking = self._loop.call_later(LOOK_SECONDS, self._look) if self._carriers else None

    def _forget(self, carrier: Carrier, connector: ConnectorId) -> None:
        self._carriers.pop(carrier, None)
        kept = self._idle.get(connector, deque())
        for idle in tuple(kept):
            if idle.carrier is carrier:
                idle.timer.cancel()
                kept.remove(idle)
        if not kept:
            self._idle.pop(connector, None)

    def _route(self, connector: ConnectorId) -> _Route | None:
        route = self._routes.get(connector)
        return route if route is not None and route.until > self._loop.time() else None

    def _remember(self, connector: ConnectorId, way: Way) -> None:
        now = self._loop.time()
        if connector not in self._routes:  # one entry a connector that was dialled within the minute
            for old in [each for each, route in self._routes.items() if route.until <= now]:
                del self._routes[old]
        self._routes[connector] = _Route(way, now + ROUTE_MEMORY_SECONDS)


async def _give_up(dialling: asyncio.Task[Carrier]) -> None:
    """End a dial, whatever has become of it by now: nobody waits for it any more."""
    if not dialling.done():
        dialling.cancel()
        await asyncio.wait((dialling,))
    if not dialling.cancelled() and not _has_failed(dialling):
        dialling.result().close()


def _has_failed(dialling: asyncio.Task[Carrier]) -> bool:
    return dialling.done() and (dialling.cancelled() or dialling.exception() is not None)


def _check(session: Session, identity: Identity) -> None:
    opened = session.opened
    require_connector(identity, opened.service, opened.connector_id, opened.fingerprint)
