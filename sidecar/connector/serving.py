"""What agents get from this connector: their sessions, links and the sockets of their TCP flows.

Each new flow is checked against its session, the peer's certificate and the lease; what that comes to is
sidecar.connector.sessions' to decide. Health comes from outside. Source: protocol.md, Opening to Link.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Collection, Sequence

from sidecar.connector.authority import FlowAuthority
from sidecar.connector.backend_tls import BackendTls
from sidecar.connector.datagrams import Datagrams
from sidecar.connector.draining import Drain
from sidecar.connector.flow_log import FlowLog
from sidecar.connector.flows import RelayConnection
from sidecar.connector.fronting import Fronting
from sidecar.connector.leasebook import LeaseBook
from sidecar.connector.links import Links
from sidecar.connector.sessions import Session, Sessions, standing
from sidecar.connector.tcp_flows import TcpFlows
from sidecar.link.budget import Budget
from sidecar.link.control import RelayClient
from sidecar.link.listener import StreamListener
from ztna.credentials import Credentials
from ztna.errors import IdentityError, LinkError, Refused
from ztna.identity import Identity
from ztna.leases import Lease
from ztna.names import ServiceName
from ztna.reasons import Reason
from ztna.telemetry import logger, refused
from ztna.udp import SockAddr
from ztna.wire.control import (
    Accepted,
    Address,
    CandidateAnswer,
    CandidateOffer,
    Carry,
    Closed,
    LeaseRef,
    Offered,
    PeerIdentity,
    StartPunching,
)

STATUS_ENTRIES_MAX = 1000
OFFERS_WAITING_MAX = 1000
CARRYING_MAX = 1000
"""Dials at forwarders under way, each until its TLS handshake is over: no relay can ask for more."""

RENEWED_SECONDS = 2.0
FALLEN_MAX = 4_096
"""Fingerprints of certificates that fell here: a relay with an older CRL may go on to offer their agents' sessions."""

_WHERE = "connector"

_log = logger(__name__)


class Serving:
    """Serves the sessions that relays offer.

    `tasks` owns all that runs; `addresses` gives those of this host's interfaces.
    """

    def __init__(
        self,
        fronting: Fronting,
        credentials: Credentials,
        *,
        leases: LeaseBook,
        backend_tls: BackendTls,
        flows_per_agent: int,
        flows_total: int,
        flow_log: FlowLog,
        addresses: Callable[[], Sequence[str]],
        private_candidates: bool,
        tasks: asyncio.TaskGroup,
    ) -> None:
        self.sessions = Sessions()
        self._drain: Drain | None = None
        self.datagrams = Datagrams(
            fronting,
            self.sessions,
            verdicts=credentials.verdicts,
            flows_per_agent=flows_per_agent,
            flows_total=flows_total,
            flow_log=flow_log,
        )
        self.tcp_flows = TcpFlows(per_agent=flows_per_agent, total=flows_total, log=flow_log)
        self.links = self.datagrams.links = Links(
            self.sessions,
            self._proven,
            receive=self.datagrams.from_link,
            addresses=addresses,
            answer=self._answer_candidates,
            on_stream=lambda stream: self.streams.serve_stream(stream),
            private_candidates=private_candidates,
        )
        authority = FlowAuthority(
            fronting,
            self.sessions,
            leases,
            flows=self.tcp_flows,
            backend_tls=backend_tls,
            verdicts=credentials.verdicts,
            datagrams=self.datagrams,
            denies=self._denies_flows,
        )
        self.streams = StreamListener(credentials, authority, tasks=tasks, budget=Budget())
        self.streams.served.began = authority.began
        self._verdicts = credentials.verdicts
        self._verdicts.on_refused = self.peer_refused
        self._fallen: dict[str, Identity] = {}
        """Agents whose certificates did not stand when last looked at: relays may not have noticed yet."""
        self._fronting = fronting
        self._leases = leases
        self._tasks = tasks
        self._relays: dict[RelayConnection, RelayClient] = {}
        self._offers_waiting = 0
        self._carrying = 0
        self._loop = asyncio.get_running_loop()

    def use_credentials(self, credentials: Credentials) -> None:
        """Prove ourselves with these from now on; what stands keeps what it had."""
        self.streams.credentials = credentials

    def peer_refused(self, identity: Identity, error: IdentityError) -> None:
        """End what was offered for an agent whose certificate does not stand any more."""
        if error.reason in (Reason.REVOKED, Reason.EXPIRED):
            if len(self._fallen) >= FALLEN_MAX:
                del self._fallen[next(iter(self._fallen))]
            self._fallen[identity.fingerprint] = identity
        agent = PeerIdentity(identity.name, identity.fingerprint)
        now = self._loop.time()
        for session in [each for each in self.sessions.live() if each.agent == agent]:
            self._tell_closed(session, error.reason)
            self.sessions.close(*session.key, error.reason, now)
            self._end(session, error.reason)

    # What relays say

    def relay_connected(self, client: RelayClient) -> None:
        """Take sessions from this connection."""
        self._relays[client.connection] = client

    def relay_lost(self, client: RelayClient, reason: Reason) -> None:
        """Detach the sessions of the connection; end them when the relay found something wrong with our certificate."""
        self._relays.pop(client.connection, None)
        if client.is_renewed:
            # The agents have not heard of it yet: what they begin in these sessions meanwhile is good.
            connection = client.connection
            self._loop.call_later(
                RENEWED_SECONDS, lambda: self.sessions.connection_lost(connection, self._loop.time())
            )
            return
        if reason is not Reason.PEER_GONE:
            for session in [each for each in self.sessions.live() if each.key[0] == client.connection]:
                self.sessions.close(*session.key, reason, self._loop.time())
                self._end(session, reason)
        self.sessions.connection_lost(client.connection, self._loop.time())

    def offered(self, client: RelayClient, offer: Offered) -> None:
        """Accept or refuse an offered session, after reading the lease again when the agent's is newer."""
        known = self._leases.lease(offer.service)
        if offer.lease is not None and not offer.v1 and standing(offer.lease, known) == "newer":
            if self._offers_waiting >= OFFERS_WAITING_MAX:
                self._refuse(client, offer, Reason.LIMIT_REACHED)
                return
            self._offers_waiting += 1
            self._tasks.create_task(self._read_and_settle(client, offer, offer.lease), name="read lease")
        else:
            self._settle(client, offer)

    def closed(self, client: RelayClient, message: Closed) -> None:
        """End or detach a session."""
        now = self._loop.time()
        ended = self.sessions.close(client.connection, message.session, message.reason, now)
        if ended is not None:
            self._end(ended, message.reason)

    def carry(self, client: RelayClient, message: Carry) -> None:
        """Dial in where the agent of the session waits. Raises Refused."""
        session = self.sessions.owned(client.connection, message.session)
        if session.forwarder is None:
            raise Refused(Reason.MALFORMED, f"carry for session {message.session}, which has no forwarder")
        if self._carrying >= CARRYING_MAX:
            raise Refused(Reason.LIMIT_REACHED, f"{CARRYING_MAX} dials at forwarders")
        self._carrying += 1
        address = client.dial_at(session.forwarder.address)
        task = self._tasks.create_task(
            self._carry(session, address, message.token), name="dial in at the forwarder"
        )
        task.add_done_callback(self._carried)

    def candidate_offer(self, client: RelayClient, message: CandidateOffer) -> None:
        """Answer with our own candidates. The agent's are probed when the relay says so."""
        session = self.sessions.owned(client.connection, message.session)
        client.send(CandidateAnswer(message.session, self.links.candidates(session)))

    def start_punching(self, client: RelayClient, message: StartPunching) -> None:
        """Probe the agent's candidates after the delay."""
        session = self.sessions.owned(client.connection, message.session)
        self._loop.call_later(message.delay_ms / 1000, self.links.probe, session, message.candidates)

    def _answer_candidates(self, session: Session, candidates: tuple[Address, ...]) -> None:
        client = self._relays.get(session.key[0])
        if client is not None:
            client.send(CandidateAnswer(session.key[1], candidates))

    # What Consul says, and time

    def network_changed(self, held: Collection[str]) -> None:
        """Go on from the addresses that this host holds now."""
        self.links.network_changed()
        self.streams.network_changed(held)

    def lease_changed(self, service: ServiceName, lease: Lease | None) -> None:
        """End the sessions under another lease; established TCP flows may finish."""
        for session in self.sessions.lease_changed(service, lease):
            self._tell_closed(session, Reason.STALE_EPOCH)
            self.datagrams.end_session(session)
            self.links.ended(session)

    def withdraw(self, service: ServiceName) -> None:
        """End the sessions and flows of a service that was removed, whose flows had their time to end."""
        for session in [each for each in self.sessions.live() if each.service == service]:
            self._tell_closed(session, Reason.DRAINING)
            self.sessions.close(*session.key, Reason.DRAINING, self._loop.time())
            self._end(session, Reason.DRAINING)

    def tick(self) -> None:
        """End what has had its time: to be called about once a second."""
        self.datagrams.flows.expire()
        self.tcp_flows.tick()
        expired = self.sessions.expire(self._loop.time())
        for session in expired:
            self._end_datagrams(session, Reason.PEER_GONE)
        self._reset_orphans(expired, Reason.PEER_GONE)
        self.links.tidy()
        self.streams.close_unowned(self.sessions.has_agent, self._loop.time())

    @property
    def is_draining(self) -> bool:
        """Whether it takes no sessions any more."""
        return self._drain is not None

    def begin_drain(self, seconds: float) -> None:
        """Take no more sessions, and flows as Drain says."""
        services = self._fronting.table.services.values()
        self._drain = Drain(
            self._loop.time(),
            seconds,
            {each.service: each.drain_s for each in services if each.drain_s is not None},
            frozenset(session.service for session in self.sessions.live()),
        )

    async def drained(self) -> bool:
        """Let TCP flows finish as the drain that began says; say whether all did."""
        drain, did_all = self._drain, True
        while drain is not None:
            now = self._loop.time()
            running: dict[ServiceName, list[asyncio.Future[bool]]] = {}
            for flow in [each for each in self.streams.served.flows() if not each.finished.done()]:
                if drain.ends_at(flow.opened.service) <= now:
                    did_all = False
                    flow.reset(Reason.DRAINING)
                else:
                    running.setdefault(flow.opened.service, []).append(flow.finished)
            look_at = drain.next_timer(now, running)
            if look_at is None:
                break
            if running:
                await asyncio.wait(itertools.chain(*running.values()), timeout=look_at - now)
            else:
                await asyncio.sleep(look_at - now)
        return did_all

    def _denies_flows(self, service: ServiceName) -> bool:
        return self._drain is not None and self._drain.takes_until(service) <= self._loop.time()

    def close(self) -> None:
        """End everything, telling agents and relays."""
        for session in self.sessions.end_all():
            self._tell_closed(session, Reason.DRAINING)
        self.streams.close(Reason.DRAINING)
        self.links.close(Reason.DRAINING)
        self.datagrams.flows.close()

    def status(self) -> dict[str, object]:
        """Return sessions, flows and links for the admin page, at most STATUS_ENTRIES_MAX of each."""
        sessions = [(each, "live") for each in self.sessions.live()]
        sessions += [(each, "detached") for each in self.sessions.detached()]
        return {
            "sessions_total": len(self.sessions),
            "sessions": [
                {
                    "session": session.key[1],
                    "relay": session.key[0][0],
                    "service": session.service,
                    "agent": session.agent.name,
                    "epoch": session.lease.epoch if session.lease is not None else None,
                    "state": state,
                }
                for session, state in sessions[:STATUS_ENTRIES_MAX]
            ],
            "udp_flows": len(self.datagrams.flows),
            "packet_streams": self.datagrams.streams,
            "tcp_flows": sum(1 for _ in self.streams.served.flows()),
            "links": self.links.status()[:STATUS_ENTRIES_MAX],
        }

    # Sessions

    async def _read_and_settle(self, client: RelayClient, offer: Offered, lease: LeaseRef) -> None:
        connection = client.connection
        try:
            await self._leases.read_again(offer.service, lease.epoch)
        finally:
            self._offers_waiting -= 1
        if connection in self._relays:
            self._settle(client, offer)

    def _settle(self, client: RelayClient, offer: Offered) -> None:
        reason = self._why_not(client, offer)
        if reason is None:
            try:
                session = self.sessions.admit(client.connection, offer)
            except Refused as error:
                reason = error.reason
        if reason is not None:
            self._refuse(client, offer, reason)
            return
        _log.info("session_accepted", session=offer.session, service=offer.service, agent=offer.agent.name)
        self.links.serve(session)
        client.send(Accepted(offer.session))

    def _why_not(self, client: RelayClient, offer: Offered) -> Reason | None:
        if self.is_draining:
            return Reason.DRAINING
        if client.peer is not None and self._verdicts.unknown(client.peer):
            return Reason.POLICY_UNKNOWN
        if (reason := self._fell(offer.agent.fingerprint)) is not None:
            return reason
        services = self._fronting.table.services
        if offer.service not in services:
            return Reason.NO_SUCH_SERVICE
        if offer.v1 and not services[offer.service].allow_v1:
            # The relay reads v1 traffic: only where that was asked for.
            return Reason.NO_GRANT
        if not self._fronting.is_available(offer.service):
            return Reason.NO_HEALTHY_CONNECTOR
        if offer.v1:
            return None
        stands = standing(offer.lease, self._leases.lease(offer.service))
        return {"stale": Reason.STALE_EPOCH, "newer": Reason.POLICY_UNKNOWN, "current": None}[stands]

    def _fell(self, fingerprint: str) -> Reason | None:
        """Return why an agent may not come in by what we saw of its certificate ourselves."""
        fallen = self._fallen.get(fingerprint)
        if fallen is None:
            return None
        try:
            self._verdicts.require(fallen)
        except IdentityError as error:
            return error.reason
        # Our clock was wrong, or the CRL took it back.
        del self._fallen[fingerprint]
        return None

    def _refuse(self, client: RelayClient, offer: Offered, reason: Reason) -> None:
        refused(_WHERE, reason)
        _log.info(
            "session_refused",
            session=offer.session,
            service=offer.service,
            agent=offer.agent.name,
            reason=reason,
        )
        client.send(Closed(offer.session, reason))

    def _end(self, session: Session, reason: Reason) -> None:
        self._end_datagrams(session, reason)
        self.streams.end_session(session.key[1], session.agent.name, reason)
        self._reset_orphans([session], reason)

    def _end_datagrams(self, session: Session, reason: Reason) -> None:
        _log.info("session_ended", session=session.key[1], service=session.service, reason=reason)
        self.datagrams.end_session(session)
        self.links.ended(session)

    def _reset_orphans(self, ended: list[Session], reason: Reason) -> None:
        """Reset TCP flows whose agent has no session for their service any more.

        One that was opened under an earlier session lives on under a newer one of the same agent name.
        """
        gone = {(each.agent.name, each.service) for each in ended}
        gone = {each for each in gone if not self.sessions.has_service(*each)}
        if not gone:
            return
        for flow in list(self.streams.served.flows()):
            if (flow.peer.name, flow.opened.service) in gone:
                flow.reset(reason)

    def _tell_closed(self, session: Session, reason: Reason) -> None:
        client = self._relays.get(session.key[0])
        if client is not None:
            client.send(Closed(session.key[1], reason))

    def _proven(self, session: Session) -> Credentials:
        """Return what we proved ourselves with to the session's relay, whose leaf the agent was told to expect."""
        client = self._relays.get(session.key[0])
        return self.streams.credentials if client is None else client.proven

    # TCP flows

    async def _carry(self, session: Session, address: SockAddr, token: bytes) -> None:
        try:
            await self.streams.carry(address, token, session.key[1])
        except (LinkError, Refused) as error:
            _log.info("carry_failed", session=session.key[1], agent=session.agent.name, error=error)

    def _carried(self, _task: asyncio.Task[None]) -> None:
        self._carrying -= 1
