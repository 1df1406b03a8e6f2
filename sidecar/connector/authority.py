"""Says which TCP flows an agent may have at this connector, and dials their backends (protocol.md, Authority).

Each OPEN and RESUME is checked against its session and the peer's certificate, an OPEN against the lease too.
"""

from __future__ import annotations

import socket
from collections.abc import Callable

from sidecar.connector.backends import dial_tcp
from sidecar.connector.leasebook import LeaseBook
from sidecar.connector.routes import Route, RouteTable
from sidecar.connector.sessions import Session, Sessions, standing
from sidecar.link.flow import abort
from sidecar.link.stream import FlowRefused
from ztna.errors import Refused
from ztna.identity import Identity, require_agent
from ztna.names import ServiceName, SessionId
from ztna.reasons import Reason
from ztna.telemetry import logger, refused
from ztna.verdicts import Verdicts
from ztna.wire.stream import OpenFrame, OpenStatus, ResumeFrame

_WHERE = "connector"

_log = logger(__name__)


class FlowAuthority:
    """What sidecar.link.served asks."""

    def __init__(
        self,
        routes: RouteTable,
        sessions: Sessions,
        leases: LeaseBook,
        *,
        verdicts: Verdicts,
        is_draining: Callable[[], bool],
    ) -> None:
        self._routes = routes
        self._sessions = sessions
        self._leases = leases
        self._verdicts = verdicts
        self._is_draining = is_draining

    async def open(self, peer: Identity, frame: OpenFrame) -> socket.socket:
        """Return a socket connected to the backend of this flow. Raises FlowRefused."""
        session = self._session(peer, frame.session, frame.service)
        if self._is_draining():
            refused(_WHERE, Reason.DRAINING)
            raise FlowRefused(OpenStatus.DENIED, "the connector is draining")
        await self._check_lease(frame)
        route = self._route_of(frame)
        sock = await dial_tcp(route.backend, route.connect_timeout_s)
        if not self._sessions.has_flows(session):
            abort(sock)
            raise FlowRefused(OpenStatus.DENIED, "the session ended while the backend was dialled")
        return sock

    def resume(self, peer: Identity, frame: ResumeFrame, service: ServiceName | None) -> None:
        """Check that the session is live, the peer's and its flow's. Raises FlowRefused.

        The lease may have changed meanwhile: established flows go on under any. A connector that drains lets them.
        """
        self._session(peer, frame.session, service)

    def _session(self, peer: Identity, session: SessionId, service: ServiceName | None) -> Session:
        try:
            found = self._sessions.authorised(session, service, peer.name, peer.fingerprint)
            require_agent(peer, found.service, found.agent.fingerprint)
            self._verdicts.require(peer)
        except Refused as error:
            refused(_WHERE, error.reason)
            _log.warning("flow_refused", agent=peer.name, service=service, reason=error.reason)
            raise FlowRefused(OpenStatus.DENIED, error.detail) from None
        return found

    async def _check_lease(self, frame: OpenFrame) -> None:
        known = self._leases.lease(frame.service)
        if standing(frame.lease, known) == "newer":
            known = await self._leases.read_again(frame.service, frame.lease.epoch)
        stands = standing(frame.lease, known)
        if stands == "newer":
            refused(_WHERE, Reason.POLICY_UNKNOWN)
            raise FlowRefused(OpenStatus.DENIED, f"the lease of {frame.service} is not known here yet")
        if stands == "stale" or frame.destination.ip != str(frame.lease.ip):
            refused(_WHERE, Reason.STALE_EPOCH)
            raise FlowRefused(OpenStatus.STALE_EPOCH, f"{frame.service} has another lease")

    def _route_of(self, frame: OpenFrame) -> Route:
        route = self._routes.pick(frame.service, "tcp", frame.destination.port)
        if route is None:
            raise FlowRefused(OpenStatus.REFUSED, f"{frame.service} has no port tcp {frame.destination.port}")
        return route
