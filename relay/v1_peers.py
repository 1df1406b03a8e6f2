"""The `ztna-v1` legs of the relay: one v1 agent's connection, and its packets to and from the connectors.

What a datagram means is relay.v1's to decide, and who may have a session relay.sessions'. The relay can read what
passes here; `ztna-v2` is sealed. Source: protocol.md, Datagrams.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable, Mapping
from typing import Protocol, assert_never

from relay import v1
from relay.commands import ConnectionKey, Refusal
from relay.peers import WHERE, ControlPeer, ending
from relay.sessions import Sessions
from ztna import quic
from ztna.errors import ProtocolError, Refused
from ztna.names import SessionId
from ztna.reasons import Reason
from ztna.telemetry import FORWARDED_BYTES, Tallied, dropped, refused
from ztna.udp import SockAddr
from ztna.wire import control, datagram

ALPN = "ztna-v1"
UDP_PAYLOAD_BYTES = 1350

PASSED = Tallied(FORWARDED_BYTES.labels("v1"))
"""What went through for agents that speak only `ztna-v1`, in bytes."""


class Owner(Protocol):
    """What a v1 agent's connection asks of the relay."""

    def message_received(self, peer: AgentPeer, message: control.AnyMessage) -> None:
        """Act on a message as if a v2 agent had sent it."""

    def connection_closed(self, peer: AgentPeer, reason: Reason) -> None:
        """Hear that a connection is over."""

    def refusal(self, refusal: Refusal) -> None:
        """Count and log a refusal."""


class AgentPeer:
    """One v1 agent: the handler that ztna.quic calls, and a client of relay.sessions."""

    def __init__(self, owner: Owner, legs: Legs, key: ConnectionKey, connection: quic.Connection) -> None:
        self.key = key
        self.connection = connection
        self._owner = owner
        self._legs = legs
        self._agent = v1.Agent(key, connection.identity)
        self._loop = asyncio.get_running_loop()
        self._ending: Reason | None = None

    def begin(self) -> None:
        """Join the sessions; the agent speaks first."""
        self.connection.use_udp_payload(UDP_PAYLOAD_BYTES)
        self._owner.message_received(self, control.Hello(features=v1.FEATURES))
        self._tell_address()

    def send(self, message: control.AnyMessage) -> None:
        """Take what relay.sessions says to this client."""
        self._carry_out(self._agent.told(message, time.monotonic()))

    def deliver(self, packet: bytes, service: str) -> None:
        """Send a packet that came back, raw."""
        try:
            data = datagram.encode(datagram.RawPacket(packet))
        except ProtocolError:
            dropped(WHERE, "malformed_packet")
            return
        self.connection.send_datagram(data, service)

    def disconnect(self, reason: Reason) -> None:
        """Close the connection for the reason."""
        if self.connection.is_open:
            self._ending = reason
            refused(WHERE, reason)
            self.connection.close(quic.CLOSE_PROTOCOL_ERROR, str(reason))

    def datagram_received(self, data: bytes) -> None:
        """Take what the agent sent."""
        if self.connection.is_open:
            self._carry_out(self._agent.datagram(data, time.monotonic()))

    def stream_data(self, stream_id: int, data: bytes, end: bool) -> None:
        """Count what v1 has no use for."""
        dropped(WHERE, "unexpected_stream")

    def peer_address_changed(self, address: SockAddr) -> None:
        """Tell the agent its new address; authority is the connection's, so nothing else changes."""
        self._tell_address()

    def connection_closed(self, code: int, reason: str) -> None:
        """End what hung on the connection."""
        self._owner.connection_closed(self, self._ending or ending(self.connection, code, reason))

    def _tell_address(self) -> None:
        host, port = self.connection.peer_address
        if ":" not in host:
            # v1 has no layout for an IPv6 address.
            self.connection.send_datagram(datagram.encode(datagram.Qad(host, port)))

    def _carry_out(self, commands: Iterable[v1.Command]) -> None:
        for command in commands:
            match command:
                case v1.Answer(data):
                    self.connection.send_datagram(data)
                case v1.Ask(message):
                    # Not from inside what relay.sessions has just decided: that is carried out first.
                    self._loop.call_soon(self._ask, message)
                case v1.PassOn(session, packet):
                    self._legs.to_connector(self.key, session, packet)
                case v1.Leave():
                    self._ending = Reason.DRAINING
                    self.connection.close(quic.CLOSE_OK, quic.SHUTTING_DOWN)
                case v1.Drop(why):
                    dropped(WHERE, why)
                case Refusal():
                    self._owner.refusal(command)
                case _:
                    assert_never(command)

    def _ask(self, message: control.Open) -> None:
        if self.connection.is_open:
            self._owner.message_received(self, message)


class Legs:
    """Takes packets from v1 agents to connectors and back, each only inside a session that both ends belong to."""

    def __init__(self, sessions: Sessions, peers: Mapping[ConnectionKey, AgentPeer | ControlPeer]) -> None:
        self._sessions = sessions
        self._peers = peers

    def to_connector(self, agent: ConnectionKey, session_id: SessionId, packet: bytes) -> None:
        """Send a v1 agent's packet on to the connector of its session."""
        session = self._sessions.sessions.get(session_id)
        try:
            peer = self._peers.get(v1.connector_of(session, agent))
        except Refused as error:
            refused(WHERE, error.reason)
            return
        assert session is not None
        if peer is None:
            # A relay that stops closes one connection after the other, and tells no session.
            dropped(WHERE, "peer_gone")
            return
        data = datagram.encode(datagram.SessionPacket(session_id, packet))
        session.v1_bytes += len(packet)
        PASSED.count += len(packet)
        peer.connection.send_datagram(data, session.service)

    def to_agent(self, connector: ConnectionKey, data: bytes) -> None:
        """Send what a connector put into a datagram on to the v1 agent of the session that it names."""
        try:
            message = datagram.decode(data)
        except ProtocolError:
            dropped(WHERE, "malformed_datagram")
            return
        if not isinstance(message, datagram.SessionPacket):
            dropped(WHERE, "unexpected_datagram")
            return
        session = self._sessions.sessions.get(message.session)
        try:
            peer = self._peers.get(v1.agent_of(session, connector))
        except Refused as error:
            refused(WHERE, error.reason)
            return
        assert session is not None
        if isinstance(peer, AgentPeer):
            session.v1_bytes += len(message.packet)
            PASSED.count += len(message.packet)
            peer.deliver(message.packet, session.service)
        elif peer is None:
            dropped(WHERE, "peer_gone")
        else:
            refused(WHERE, Reason.NOT_YOUR_SESSION)
