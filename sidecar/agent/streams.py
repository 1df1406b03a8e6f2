"""TCP flows of local programs: a session, then a carrier (idle, direct, forwarded), then the flow on it.

Moving the bytes is sidecar.link's, choosing the session sidecar.agent.sessions'.
"""

from __future__ import annotations

import asyncio
import secrets
import socket
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from sidecar.agent.broker import Broker
from sidecar.agent.commands import Cause, Session, SessionKey
from sidecar.agent.listeners import VirtualPort
from sidecar.link.budget import Budget
from sidecar.link.flow import TcpFlow, abort
from sidecar.link.stream import Carrier, FlowRefused
from ztna.credentials import Credentials
from ztna.errors import IdentityError, LinkError, Refused
from ztna.identity import Identity, require_connector
from ztna.names import ConnectorId
from ztna.reasons import Reason
from ztna.telemetry import dropped, logger
from ztna.udp import SockAddr
from ztna.wire.control import Address, Dial, DialToken
from ztna.wire.stream import WINDOW_BYTES_MIN, OpenFrame, OpenStatus

IDLE_SECONDS = 60.0
IDLE_PER_CONNECTOR_MAX = 4
IDLE_VERDICT_SECONDS = 1.0
"""An idle carrier whose path died unseen does not acknowledge OPEN by then: a fresh one is dialled instead."""
ROUTE_MEMORY_SECONDS = 60.0
"""How long it is remembered that a connector can (not) be reached directly."""
DIAL_TOKEN_SECONDS = 2.0
FORWARDER_SECONDS = 2.0
"""How long a connector may take to dial in. Less than the 5 s a forwarder waits: by then new flows must have
gone to another connector."""
DIALS_PER_SESSION_MAX = 128
FLOW_KEY_BYTES = 16

_CAUSES = {OpenStatus.STALE_EPOCH: Cause.STALE, OpenStatus.DENIED: Cause.DENIED}
_GOING_ON = frozenset({Reason.PEER_GONE, Reason.STALE_EPOCH})
"""Reasons after which established TCP flows may finish (protocol.md, Ending and Epoch)."""
_log = logger(__name__)


@dataclass(frozen=True, slots=True)
class _Route:
    direct: bool
    until: float


class Streams:
    """All TCP flows and stream carriers of an agent."""

    def __init__(
        self,
        broker: Broker,
        credentials: Credentials,
        *,
        tasks: asyncio.TaskGroup,
        send: Callable[[str, Dial], object],
        direct: bool,
    ) -> None:
        """`send` puts a message on the control connection to a relay; `direct` allows direct carriers."""
        self.credentials = credentials  # may be replaced; carriers that stand keep theirs
        self._broker = broker
        self._tasks = tasks
        self._send = send
        self._direct = direct
        self._budget = Budget()
        self._loop = asyncio.get_running_loop()
        self._idle: dict[ConnectorId, deque[_Idle]] = {}
        self._routes: dict[ConnectorId, _Route] = {}
        self._tokens: dict[SessionKey, deque[asyncio.Future[bytes]]] = {}
        self._running: dict[SessionKey, dict[TcpFlow, VirtualPort]] = {}
        self._carriers: set[Carrier] = set()
        self.quiet = asyncio.Event()
        """Set while no flow runs."""
        self.quiet.set()

    def accepted(self, at: VirtualPort, local: socket.socket, source: SockAddr) -> None:
        """Take over a connection that a local program made to a virtual address."""
        self._tasks.create_task(self._serve(at, local, source), name=f"tcp flow to {at}")

    def leave(self, is_left: Callable[[VirtualPort], bool]) -> None:
        """Reset the flows at addresses that are no longer this agent's."""
        for running in tuple(self._running.values()):
            for flow in [flow for flow, at in running.items() if is_left(at)]:
                flow.reset(Reason.CLOSED_BY_PEER)

    def dial_token(self, relay: str, message: DialToken) -> None:
        """Give the token to whoever asked first for that session; one that nobody waits for lapses."""
        waiting = self._tokens.get((relay, message.session), ())
        for answer in waiting:
            if not answer.done():
                answer.set_result(message.token)
                return
        dropped("agent_dial_token", "unexpected")

    def session_ended(self, session: Session, reason: Reason) -> None:
        """End what rides a session: waiting dials, its own idle carriers, and its flows unless they may go on."""
        for answer in tuple(self._tokens.get(session.key, ())):
            if not answer.done():
                answer.set_exception(LinkError(f"the session ended: {reason}"))
        for idle in tuple(self._idle.get(session.opened.connector_id, ())):
            if idle.session == session.key:
                idle.carrier.close(reason)
        if reason not in _GOING_ON:
            for flow in tuple(self._running.get(session.key, ())):
                flow.reset(reason)

    @property
    def flows(self) -> int:
        """How many flows run."""
        return sum(map(len, self._running.values()))

    def status(self) -> dict[str, object]:
        """Return what `/status` shows of carriers: by connector, how many are idle and which way they go."""
        now = self._loop.time()
        return {
            "flows": self.flows,
            "carriers": len(self._carriers),
            "idle": {connector: len(found) for connector, found in sorted(self._idle.items())},
            "routes": {
                connector: "direct" if route.direct else "forwarded"
                for connector, route in sorted(self._routes.items())
                if route.until > now
            },
        }

    def close(self) -> None:
        """Reset every flow and close every carrier."""
        for carrier in tuple(self._carriers):
            carrier.close(Reason.DRAINING)

    # --- a flow

    async def _serve(self, at: VirtualPort, local: socket.socket, source: SockAddr) -> None:
        number = self._broker.number()
        try:
            session, carrier, flow = await self._open(number, at, local, source)
        except (Refused, LinkError, FlowRefused) as error:
            _log.debug("flow_refused", service=at.service, source=f"{source[0]}:{source[1]}", detail=error)
            abort(local)
        except BaseException:
            abort(local)
            raise
        else:
            await self._until_finished(session, carrier, flow, at)
        finally:
            self._broker.release(number)

    async def _open(
        self, number: int, at: VirtualPort, local: socket.socket, source: SockAddr
    ) -> tuple[Session, Carrier, TcpFlow]:
        """Open the flow, on another session where that can help. Raises Refused, LinkError or FlowRefused.

        While it is not known what became of an OPEN the flow keeps its key, so that no connector dials twice.
        """
        key = secrets.token_hex(FLOW_KEY_BYTES)
        session = await self._broker.acquire(number, at.service)
        while True:
            frame = OpenFrame(
                session=session.opened.session,
                flow=key,
                service=at.service,
                lease=session.lease,
                source=Address(*source),
                destination=Address(*at.leased),
                window=WINDOW_BYTES_MIN,
            )
            try:
                carrier, flow = await self._open_on(session, frame, local)
            except FlowRefused as error:
                cause = _CAUSES.get(error.status)
                if cause is None:
                    dropped("agent_tcp", error.status.name.lower())
                    raise
                key = secrets.token_hex(FLOW_KEY_BYTES)  # this one has had its answer
                session = await self._broker.reacquire(number, cause)
            except (LinkError, IdentityError) as error:
                _log.info(
                    "connector_failed",
                    service=at.service,
                    connector=session.opened.connector_id,
                    detail=error,
                )
                session = await self._broker.reacquire(number, Cause.FAILED)
            else:
                return session, carrier, flow

    async def _open_on(
        self, session: Session, frame: OpenFrame, local: socket.socket
    ) -> tuple[Carrier, TcpFlow]:
        """Open a flow on an idle carrier, or a fresh one when there is none that still works."""
        while (carrier := self._take_idle(session)) is not None:
            verdict = self._loop.call_later(IDLE_VERDICT_SECONDS, _close_if_unheard, carrier)
            try:
                return carrier, await self._open_flow(carrier, frame, local)
            except LinkError as error:
                _log.debug("idle_carrier_failed", connector=session.opened.connector_id, detail=error)
            finally:
                verdict.cancel()
        carrier = await self._dial(session)
        return carrier, await self._open_flow(carrier, frame, local)

    async def _open_flow(self, carrier: Carrier, frame: OpenFrame, local: socket.socket) -> TcpFlow:
        try:
            return await carrier.open(frame, local)
        except asyncio.CancelledError:
            # The flow may have begun in this very turn; then the socket is its own until the carrier goes.
            carrier.close(Reason.DRAINING)
            raise

    async def _until_finished(
        self, session: Session, carrier: Carrier, flow: TcpFlow, at: VirtualPort
    ) -> None:
        running = self._running.setdefault(session.key, {})
        running[flow] = at
        self.quiet.clear()
        try:
            reusable = await flow.finished
        finally:
            running.pop(flow, None)
            if not running:
                self._running.pop(session.key, None)
            if not self._running:
                self.quiet.set()
        if reusable:
            self._keep(carrier, session)

    # --- carriers

    def _take_idle(self, session: Session) -> Carrier | None:
        """Take the carrier that was used last: the others may then grow old and be closed."""
        kept = self._idle.get(session.opened.connector_id, deque())
        for idle in reversed(tuple(kept)):
            if idle.session not in (None, session.key):
                continue
            kept.remove(idle)
            idle.timer.cancel()
            try:
                _check(session, idle.carrier.peer)
            except IdentityError:
                # It stands under a certificate that this session does not name (it was renewed meanwhile).
                idle.carrier.close()
                continue
            if idle.carrier.is_idle:
                return idle.carrier
        return None

    def _keep(self, carrier: Carrier, session: Session) -> None:
        if not carrier.is_idle:
            return
        if carrier.forwarded and self._broker.sessions.session(session.key) is None:
            carrier.close()
            return
        connector = session.opened.connector_id
        kept = self._idle.setdefault(connector, deque())
        timer = self._loop.call_later(IDLE_SECONDS, carrier.close)
        kept.append(_Idle(carrier, session.key if carrier.forwarded else None, timer))
        if len(kept) > IDLE_PER_CONNECTOR_MAX:
            oldest = kept.popleft()
            oldest.timer.cancel()
            oldest.carrier.close()

    async def _dial(self, session: Session) -> Carrier:
        """Dial directly, else through the forwarder. Raises LinkError or IdentityError."""
        connector = session.opened.connector_id
        route = self._route(connector)
        if self._direct and session.opened.link_address is not None and (route is None or route.direct):
            address = session.opened.link_address
            try:
                carrier = await Carrier.dial_direct(
                    (address.ip, address.port),
                    self.credentials,
                    partial(_check, session),
                    budget=self._budget,
                )
            except (LinkError, IdentityError):
                self._remember(connector, direct=False)
                if route is not None:
                    # It worked a moment ago, so it is rather the connector that has gone than the way to it.
                    raise
            else:
                self._remember(connector, direct=True)
                return self._track(carrier, connector)
        return await self._dial_forwarder(session)

    async def _dial_forwarder(self, session: Session) -> Carrier:
        forwarder = session.opened.forwarder
        if forwarder is None:
            raise LinkError("the relay offers no forwarder")
        token = await self._token(session)
        carrier = await Carrier.dial_forwarder(
            (forwarder.address.ip, forwarder.address.port),
            token,
            self.credentials,
            partial(_check, session),
            budget=self._budget,
            timeout_s=FORWARDER_SECONDS,
        )
        return self._track(carrier, session.opened.connector_id)

    async def _token(self, session: Session) -> bytes:
        """Ask the relay for a dial token and wait for it."""
        waiting = self._tokens.setdefault(session.key, deque())
        if len(waiting) >= DIALS_PER_SESSION_MAX:
            raise LinkError("too many dials wait for a token")
        answer: asyncio.Future[bytes] = self._loop.create_future()
        waiting.append(answer)
        try:
            self._send(session.relay, Dial(session.opened.session))
            async with asyncio.timeout(DIAL_TOKEN_SECONDS):
                return await answer
        except TimeoutError:
            raise LinkError(f"no dial token within {DIAL_TOKEN_SECONDS:g} s") from None
        finally:
            waiting.remove(answer)
            if not waiting:
                self._tokens.pop(session.key, None)

    def _track(self, carrier: Carrier, connector: ConnectorId) -> Carrier:
        self._carriers.add(carrier)
        carrier.closed.add_done_callback(lambda _: self._forget(carrier, connector))
        return carrier

    def _forget(self, carrier: Carrier, connector: ConnectorId) -> None:
        self._carriers.discard(carrier)
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

    def _remember(self, connector: ConnectorId, *, direct: bool) -> None:
        now = self._loop.time()
        if connector not in self._routes:  # one entry a connector that was dialled within the minute
            for old in [each for each, route in self._routes.items() if route.until <= now]:
                del self._routes[old]
        self._routes[connector] = _Route(direct, now + ROUTE_MEMORY_SECONDS)


@dataclass(frozen=True, slots=True, eq=False)
class _Idle:
    carrier: Carrier
    session: SessionKey | None
    """Of a forwarded carrier, the one session it serves; a direct one serves any."""
    timer: asyncio.TimerHandle


def _close_if_unheard(carrier: Carrier) -> None:
    if carrier.unacknowledged_bytes:
        carrier.close(Reason.PEER_GONE)


def _check(session: Session, identity: Identity) -> None:
    opened = session.opened
    require_connector(identity, opened.service, opened.connector_id, opened.fingerprint)
