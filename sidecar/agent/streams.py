"""TCP flows of local programs: a session, then a carrier (idle, direct, forwarded), then the flow on it.

Moving the bytes is sidecar.link's, choosing the session sidecar.agent.sessions'.
"""

from __future__ import annotations

import asyncio
import secrets
import socket
from collections.abc import Callable

from sidecar.agent.broker import Broker
from sidecar.agent.carriers import Carriers
from sidecar.agent.commands import Cause, Session, SessionKey
from sidecar.agent.listeners import VirtualPort
from sidecar.link.flow import TcpFlow, abort
from sidecar.link.stream import Carrier, FlowRefused
from ztna.errors import IdentityError, LinkError, Refused
from ztna.reasons import Reason
from ztna.telemetry import dropped, logger
from ztna.udp import SockAddr
from ztna.wire.control import Address
from ztna.wire.stream import WINDOW_BYTES_MIN, OpenFrame, OpenStatus

IDLE_VERDICT_SECONDS = 1.0
"""An idle carrier whose path died unseen does not acknowledge OPEN by then: a fresh one is dialled instead."""
FLOW_KEY_BYTES = 16

_CAUSES = {OpenStatus.STALE_EPOCH: Cause.STALE, OpenStatus.DENIED: Cause.DENIED}
_GOING_ON = frozenset({Reason.PEER_GONE, Reason.STALE_EPOCH})
"""Reasons after which established TCP flows may finish (protocol.md, Ending and Epoch)."""
_log = logger(__name__)


class Streams:
    """All TCP flows of an agent."""

    def __init__(
        self,
        broker: Broker,
        carriers: Carriers,
        *,
        tasks: asyncio.TaskGroup,
    ) -> None:
        self._broker = broker
        self._carriers = carriers
        self._tasks = tasks
        self._loop = asyncio.get_running_loop()
        self._running: dict[SessionKey, dict[TcpFlow, VirtualPort]] = {}
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

    def session_ended(self, session: Session, reason: Reason) -> None:
        """End what rides a session: waiting dials, its own idle carriers, and its flows unless they may go on."""
        self._carriers.session_ended(session, reason)
        if reason not in _GOING_ON:
            for flow in tuple(self._running.get(session.key, ())):
                flow.reset(reason)

    @property
    def flows(self) -> int:
        """How many flows run."""
        return sum(map(len, self._running.values()))

    def status(self) -> dict[str, object]:
        """Return what `/status` shows of flows and carriers."""
        return {"flows": self.flows} | self._carriers.status()

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
        while (carrier := self._carriers.take_idle(session)) is not None:
            verdict = self._loop.call_later(IDLE_VERDICT_SECONDS, _close_if_unheard, carrier)
            try:
                return carrier, await self._open_flow(carrier, frame, local)
            except LinkError as error:
                _log.debug("idle_carrier_failed", connector=session.opened.connector_id, detail=error)
            finally:
                verdict.cancel()
        carrier = await self._carriers.dial(session)
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
        if not reusable:
            return
        if carrier.forwarded and self._broker.sessions.session(session.key) is None:
            carrier.close()
        else:
            self._carriers.keep(carrier, session)


def _close_if_unheard(carrier: Carrier) -> None:
    if carrier.unacknowledged_bytes:
        carrier.close(Reason.PEER_GONE)
