"""Says which flows an agent may have on stream carriers, and dials the backends of TCP (protocol.md, Authority).

Each OPEN and RESUME is checked against its session and the peer's certificate, an OPEN against the lease too.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable

from sidecar.connector.backend_tls import BackendTls
from sidecar.connector.backends import Introduction, dial_tcp
from sidecar.connector.datagrams import Datagrams
from sidecar.connector.fronting import Claim, Fronting
from sidecar.connector.leasebook import LeaseBook
from sidecar.connector.ledger import Key
from sidecar.connector.proxy_protocol import Caller, header
from sidecar.connector.routes import Route
from sidecar.connector.sessions import Session, Sessions, standing
from sidecar.connector.tcp_flows import TcpFlows
from sidecar.link.flow import TcpFlow, abort
from sidecar.link.packet_stream import PacketStream
from sidecar.link.stream import FlowRefused
from ztna.errors import ConfigError, Refused
from ztna.identity import Identity, require_agent
from ztna.names import ServiceName, SessionId
from ztna.reasons import Reason
from ztna.sections import Endpoint
from ztna.telemetry import logger, refused
from ztna.verdicts import Verdicts
from ztna.wire.stream import OpenFrame, OpenStatus, PacketsFrame, ResumeFrame

BACKENDS_TRIED_MAX = 3
"""How many backends of a route are dialled for one flow, as nothing was said to any of them yet."""
DIALLING_SECONDS = 12.0
"""All of that; the agent waits 15 s for OPENED."""

_WHERE = "connector"

_log = logger(__name__)


class FlowAuthority:
    """What sidecar.link.served asks."""

    def __init__(
        self,
        fronting: Fronting,
        sessions: Sessions,
        leases: LeaseBook,
        *,
        flows: TcpFlows,
        backend_tls: BackendTls,
        verdicts: Verdicts,
        datagrams: Datagrams,
        denies: Callable[[ServiceName], bool],
    ) -> None:
        """`datagrams` take what comes in packets; `denies` tells whether we leave and begin no flow of a service."""
        self._fronting = fronting
        self._sessions = sessions
        self._leases = leases
        self._flows = flows
        self._backend_tls = backend_tls
        self._verdicts = verdicts
        self._datagrams = datagrams
        self._denies = denies
        self._claims: dict[Key, Claim] = {}

    async def open(self, peer: Identity, frame: OpenFrame) -> socket.socket:
        """Return a socket connected to the backend of this flow. Raises FlowRefused."""
        session = self._session(peer, frame.session, frame.service)
        if self._denies(frame.service):
            refused(_WHERE, Reason.DRAINING)
            raise FlowRefused(OpenStatus.DENIED, "the connector is draining")
        if frame.service not in self._fronting:
            # Removed: its flows may end, and the agent finds another connector for new ones.
            refused(_WHERE, Reason.DRAINING)
            raise FlowRefused(OpenStatus.DENIED, f"{frame.service} is being removed here")
        await self._check_lease(frame)
        route = self._route_of(frame)
        key = (peer.name, frame.flow)
        self._admit(key, route)
        try:
            sock, claim = await self._dial(route, peer.name, frame)
            if not self._sessions.has_flows(session):
                claim.release()
                abort(sock)
                raise FlowRefused(OpenStatus.DENIED, "the session ended while the backend was dialled")
        except BaseException:
            self._flows.given_up(key)
            raise
        self._claims[key] = claim
        return sock

    def began(self, flow: TcpFlow) -> None:
        """The flow whose backend `open` dialled runs from now on."""
        self._flows.began(flow, self._claims.pop((flow.peer.name, flow.opened.flow)))

    def resume(self, peer: Identity, frame: ResumeFrame, service: ServiceName | None) -> None:
        """Check that the session is live, the peer's and its flow's. Raises FlowRefused.

        The lease may have changed meanwhile: established flows go on under any. A connector that drains lets them.
        """
        self._session(peer, frame.session, service)

    def packets(self, peer: Identity, frame: PacketsFrame) -> PacketStream:
        """Return what takes the packets of the peer's live session. Raises FlowRefused."""
        session = self._session(peer, frame.session, frame.service)
        return self._datagrams.carried_by_stream(session, peer, frame.former)

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

    def _admit(self, key: Key, route: Route) -> None:
        try:
            self._flows.admit(key, route.tcp_idle_s)
        except Refused as error:
            refused(_WHERE, error.reason)
            raise FlowRefused(OpenStatus.DENIED, error.detail) from None

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
        route = self._fronting.table.pick(frame.service, "tcp", frame.destination.port)
        if route is None:
            raise FlowRefused(OpenStatus.REFUSED, f"{frame.service} has no port tcp {frame.destination.port}")
        return route

    async def _dial(self, route: Route, agent: str, frame: OpenFrame) -> tuple[socket.socket, Claim]:
        """Dial the route's backends, the best first, until one answers. Raises FlowRefused, as the last one did."""
        loop, tried = asyncio.get_running_loop(), list[Endpoint]()
        ends_at = loop.time() + DIALLING_SECONDS
        refusal = FlowRefused(OpenStatus.UNREACHABLE, f"{route.service} has no backend")
        while len(tried) < BACKENDS_TRIED_MAX and loop.time() < ends_at:
            claim = self._fronting.choose(route, agent, tried)
            if claim is None:
                break
            try:
                sock = await dial_tcp(
                    claim.backend,
                    min(route.connect_timeout_s, ends_at - loop.time()),
                    self._introduction(claim, agent, frame),
                )
            except FlowRefused as error:
                claim.release()
                if error.status is OpenStatus.DENIED:  # we have no descriptor left: no backend's fault
                    raise
                claim.failed()
                tried.append(claim.backend)
                refusal = error
                _log.info("backend_failed", service=route.service, backend=str(claim.backend), error=error)
            except BaseException:
                claim.release()
                raise
            else:
                claim.succeeded()
                return sock, claim
        raise refusal

    def _introduction(self, claim: Claim, agent: str, frame: OpenFrame) -> Introduction:
        """Return what the backend gets to see first. Raises FlowRefused when that cannot be made."""
        route, tls = claim.route, claim.route.backend_tls
        head, context = b"", None
        if route.proxy_protocol != "none":
            source, destination = frame.source, frame.destination
            caller = Caller(
                (source.ip, source.port), (destination.ip, destination.port), agent, frame.service, frame.flow
            )
            head = header(route.proxy_protocol, caller)
        if tls is not None:
            try:
                context = self._backend_tls.context(tls)
            except ConfigError as error:
                raise FlowRefused(OpenStatus.UNREACHABLE, f"backend_tls.{error}") from None
        return Introduction(head, context, (tls and tls.name) or claim.backend.host)
