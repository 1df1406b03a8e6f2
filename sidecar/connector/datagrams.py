"""IP packets of agents to the UDP and ping flows of backends, and what the backends answer back to the agents.

Each new flow is checked against its session, the peer's certificate and the lease; the address that the agent
called picks a published port here and is where the replies come from. Source: protocol.md, Inner packets.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial

from sidecar.connector.backends import UdpFlows
from sidecar.connector.flow_log import FlowLog
from sidecar.connector.flows import FlowKey, SessionKey
from sidecar.connector.fronting import Fronting
from sidecar.connector.links import Links
from sidecar.connector.routes import ICMP_PORT, Route
from sidecar.connector.sessions import Session, Sessions
from sidecar.link.control import RelayClient
from sidecar.link.packet import PacketLink
from sidecar.link.packet_stream import PacketStream
from ztna.errors import PacketError, Refused
from ztna.identity import Identity, require_agent
from ztna.names import ServiceName, SessionId
from ztna.packet import PROTOCOL_UDP, Packet, Unreachable, echo_reply, icmp_error, parse
from ztna.reasons import Reason
from ztna.telemetry import dropped, refused
from ztna.verdicts import Verdicts

_WHERE = "connector"

Reply = Callable[[bytes], object]


class Datagrams:
    """Passes on what packet links and relays bring; `flows` are the sockets at the backends."""

    def __init__(
        self,
        fronting: Fronting,
        sessions: Sessions,
        *,
        verdicts: Verdicts,
        flows_per_agent: int,
        flows_total: int,
        flow_log: FlowLog,
    ) -> None:
        self.flows = UdpFlows(per_agent=flows_per_agent, total=flows_total, log=flow_log)
        self._fronting = fronting
        fronting.lost = self.flows.leave
        self._sessions = sessions
        self.links: Links
        self._verdicts = verdicts
        self._streams: dict[SessionKey, PacketStream] = {}

    @property
    def streams(self) -> int:
        """How many sessions' packets come on stream carriers."""
        return len(self._streams)

    def carried_by_stream(
        self, session: Session, peer: Identity, former: Iterable[SessionId]
    ) -> PacketStream:
        """Take a session's packets from a stream carrier, and answer there until it ends.

        The flows of `former` sessions of this very agent, which came another way, go on in this one.
        """
        packets = PacketStream(
            partial(self._from_stream, session, peer), lambda: self._stream_ended(session, packets)
        )
        older = self._streams.pop(session.key, None)
        if older is not None:
            older.reset(Reason.PEER_GONE)
        self._streams[session.key] = packets
        for other in self._sessions.former(session, former):
            self._inherit(session, other)
        return packets

    def _from_stream(self, session: Session, peer: Identity, data: bytes) -> None:
        if not self._sessions.has_flows(session):
            refused(_WHERE, Reason.NOT_YOUR_SESSION)
            return
        self._pass_on(session, data, partial(self._open_sealed, session, peer))

    def _stream_ended(self, session: Session, packets: PacketStream) -> None:
        if self._streams.get(session.key) is packets:
            del self._streams[session.key]

    def from_link(self, link: PacketLink, service: ServiceName, data: bytes) -> None:
        """Pass on a packet for a service that came sealed."""
        session = self.links.carried(link, service)
        if session is None:
            refused(_WHERE, Reason.NOT_YOUR_SESSION)
            return
        self._pass_on(session, data, partial(self._open_sealed, session, link.peer))

    def end_session(self, session: Session) -> None:
        """End a session's flows; those whose agent has another session on the same link go on in that one."""
        for heir in self.links.others(session):
            if self._sessions.is_live(heir) and heir.lease == session.lease:
                self._inherit(heir, session)
        self.flows.end_session(session.key)
        packets = self._streams.pop(session.key, None)
        if packets is not None:
            packets.reset(Reason.CLOSED_BY_PEER)

    def _inherit(self, heir: Session, session: Session) -> bool:
        return self.flows.move_session(session.key, heir.key, partial(self._reply_sealed, heir))

    def from_relay(self, client: RelayClient, session_id: SessionId, data: bytes) -> None:
        """Pass on a packet of a v1 agent, which its relay could read. Raises Refused when this is no v1 session."""
        session = self._sessions.owned(client.connection, session_id)
        if not session.v1:
            raise Refused(Reason.NOT_YOUR_SESSION, f"a packet that is not sealed in session {session_id}")
        self._pass_on(session, data, partial(self._open_v1, session, client))

    def _pass_on(
        self, session: Session, data: bytes, begin: Callable[[FlowKey, Packet, bytes], None]
    ) -> None:
        """Send a packet on its flow; `begin` opens one that is new, or raises Refused."""
        try:
            packet = parse(data)
        except PacketError:
            dropped(_WHERE, "malformed_packet")
            return
        if packet.protocol == PROTOCOL_UDP:
            source_port, payload = packet.source_port, packet.payload
        elif packet.is_echo_request:
            source_port, payload = packet.identifier, packet.sequence.to_bytes(2, "big") + packet.payload
        else:
            dropped(_WHERE, "protocol")
            return
        key = FlowKey(
            session.key,
            packet.protocol,
            packet.source,
            source_port,
            packet.destination,
            packet.destination_port,
        )
        if self.flows.send(key, payload, data):
            return
        if self._is_continued(session) and self.flows.send(key, payload, data):
            return
        try:
            if not self._sessions.is_live(session):
                raise Refused(Reason.NOT_YOUR_SESSION, f"a new flow in detached session {session.key[1]}")
            begin(key, packet, data)
        except Refused as error:
            refused(_WHERE, error.reason)
            return
        self.flows.send(key, payload, data)

    def _is_continued(self, session: Session) -> bool:
        """Say whether flows that began in another session, over another relay, were taken into this one just now."""
        others = [other for other in self.links.others(session) if other.lease == session.lease]
        return any(self._inherit(session, other) for other in others)

    def _open_sealed(
        self, session: Session, peer: Identity, key: FlowKey, packet: Packet, data: bytes
    ) -> None:
        require_agent(peer, session.service, session.agent.fingerprint)
        self._verdicts.require(peer)
        if session.lease is None or packet.destination != str(session.lease.ip):
            raise Refused(Reason.STALE_EPOCH, f"{packet.destination} is not the lease of {session.service}")
        reply = partial(self._reply_sealed, session)
        if packet.protocol != PROTOCOL_UDP:
            self._open_ping(session, key, packet, data, reply)
            return
        route = self._fronting.table.pick(session.service, "udp", packet.destination_port)
        self._open(session, route, key, data, reply)

    def _open_ping(self, session: Session, key: FlowKey, packet: Packet, data: bytes, reply: Reply) -> None:
        route = self._fronting.table.pick(session.service, "icmp", ICMP_PORT)
        if route is None:
            reply(icmp_error(data, Unreachable.PROHIBITED))
        elif route.answers_pings:
            reply(echo_reply(packet))
        else:
            self._open(session, route, key, data, reply)

    def _open_v1(
        self, session: Session, client: RelayClient, key: FlowKey, packet: Packet, data: bytes
    ) -> None:
        if packet.protocol != PROTOCOL_UDP:
            dropped(_WHERE, "protocol")
            return
        route = self._fronting.table.pick(session.service, "udp", packet.destination_port)
        if route is not None and not route.allow_v1:
            route = None
        self._open(session, route, key, data, partial(self._reply_v1, session, client))

    def _open(self, session: Session, route: Route | None, key: FlowKey, data: bytes, reply: Reply) -> None:
        """Begin a flow, or answer with an ICMP error where the agent should know."""
        if route is None:
            reply(icmp_error(data, Unreachable.PORT))
            return
        claim = self._fronting.choose(route, session.agent.name)
        address = None if claim is None else self._fronting.address(claim.backend)
        if claim is None or address is None:
            if claim is not None:
                claim.release()
            reply(icmp_error(data, Unreachable.HOST))
            return
        self.flows.open(key, session.agent.name, claim, address, packet=data, reply=reply)

    def _reply_v1(self, session: Session, client: RelayClient, packet: bytes) -> None:
        # A flow that outlives its relay connection has nobody to answer on the next one.
        if client.connection == session.key[0]:
            client.send_packet(session.key[1], session.service, packet)

    def _reply_sealed(self, session: Session, packet: bytes) -> None:
        packets = self._streams.get(session.key)
        link = self.links.of(session)
        if packets is not None and packets.is_open:
            packets.send(packet)
        elif link is not None:
            link.send(session.service, packet)
