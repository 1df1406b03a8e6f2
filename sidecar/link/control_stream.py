"""What is said on one connection to a relay: hello first, then messages both ways, and the packets of v1 sessions.

The handler that ztna.quic and ztna.tls_control call; what a message means is its owner's. Source: protocol.md.
"""

from __future__ import annotations

import asyncio
from importlib.metadata import version
from typing import Protocol

from sidecar.link.transports import Transport
from ztna.credentials import Credentials
from ztna.errors import LinkError, ProtocolError
from ztna.names import ServiceName, SessionId
from ztna.quic import CLOSE_PROTOCOL_ERROR, Connection
from ztna.telemetry import dropped
from ztna.tls_control import TlsConnection
from ztna.udp import SockAddr
from ztna.wire import datagram
from ztna.wire.control import (
    FEATURES,
    PROTOCOL_VERSION,
    AnyMessage,
    FrameReader,
    Hello,
    Software,
    UnknownMessage,
    encode,
)

WHERE = "relay_client"

_CONTROL_STREAM = 0


class Owner(Protocol):
    """What a connection to a relay tells, and whom."""

    observed: SockAddr | None

    def greeted(self, control: Control) -> None:
        """Hear that the hellos are exchanged."""

    def received(self, control: Control, message: AnyMessage) -> None:
        """Take a message."""

    def packet_received(self, control: Control, session: SessionId, packet: bytes) -> None:
        """Take an IP packet of a v1 session."""


class Control:
    """The handler of one connection: frames of stream 0, and the QAD datagrams."""

    def __init__(
        self,
        owner: Owner,
        connection: Connection | TlsConnection,
        number: int,
        credentials: Credentials,
        hosts: frozenset[str],
    ) -> None:
        self.peer = connection.identity
        self.peer_address = connection.peer_address
        self.transport = Transport.TLS if isinstance(connection, TlsConnection) else Transport.QUIC
        self.number = number
        self.credentials = credentials
        self.hosts = hosts
        self.greeted: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._owner = owner
        self._connection = connection
        self._reader = FrameReader()
        self._types: frozenset[str] = frozenset()
        self.software = ""
        """The relay's release, as it says."""

    def greet(self) -> None:
        """Say our hello, on the first stream a client opens."""
        if isinstance(self._connection, Connection):
            stream_id = self._connection.open_stream()
            if stream_id != _CONTROL_STREAM:
                raise LinkError(f"the control stream has id {stream_id}, expected {_CONTROL_STREAM}")
        self._connection.send_stream(_CONTROL_STREAM, encode(Hello(software=Software(version("ztna-mesh")))))

    def send(self, message: AnyMessage) -> bool:
        """Send a message; False when the relay's features lack its type, or it takes nothing more."""
        kind = message.__struct_config__.tag
        if kind not in self._types:
            dropped(WHERE, "not_in_features")
            return False
        if self._connection.send_stream(_CONTROL_STREAM, encode(message)):
            return True
        self._connection.close(CLOSE_PROTOCOL_ERROR, "control stream is stuck")
        return False

    def ping(self) -> None:
        """Ask for a sign of life."""
        self._connection.ping()

    def send_packet(self, session: SessionId, service: ServiceName, packet: bytes) -> bool:
        """Send a packet of a v1 session."""
        data = datagram.encode(datagram.SessionPacket(session, packet))
        return self._connection.send_datagram(data, service)

    def datagram_received(self, data: bytes) -> None:
        """Take the address that the relay sees, or a packet of a v1 session."""
        try:
            message = datagram.decode(data)
        except ProtocolError:
            dropped(WHERE, "malformed_datagram")
            return
        if isinstance(message, datagram.Qad):
            self._owner.observed = (message.ip, message.port)
        elif isinstance(message, datagram.SessionPacket) and self.greeted.done():
            self._owner.packet_received(self, message.session, message.packet)
        else:
            dropped(WHERE, "unexpected_datagram")

    def stream_data(self, stream_id: int, data: bytes, end: bool) -> None:
        """Take bytes of the control stream. Raises ProtocolError for any other."""
        if stream_id != _CONTROL_STREAM:
            raise ProtocolError(f"data on stream {stream_id}; the control stream is {_CONTROL_STREAM}")
        messages = self._reader.feed(data)
        if unknown := self._reader.take_unknown_fields():
            dropped(WHERE, "unknown_field", unknown)
        for message in messages:
            self.message_received(message)
        if end:
            raise ProtocolError("the control stream ended")

    def peer_address_changed(self, address: SockAddr) -> None:
        """Nothing hangs on the relay's address."""

    def connection_closed(self, code: int, reason: str) -> None:
        """The owner waits for it on the connection."""

    def message_received(self, message: AnyMessage | UnknownMessage) -> None:
        """Take one message, the hello first. Raises ProtocolError."""
        if isinstance(message, UnknownMessage):
            dropped(WHERE, "unknown_message")
        elif self.greeted.done():
            if isinstance(message, Hello):
                raise ProtocolError("a second hello")
            self._owner.received(self, message)
        else:
            self._hello(message)

    def _hello(self, message: AnyMessage) -> None:
        if not isinstance(message, Hello):
            raise ProtocolError("expected hello first")
        if message.version != PROTOCOL_VERSION:
            raise ProtocolError(f"control version {message.version}, expected {PROTOCOL_VERSION}")
        self._types = message.features & FEATURES
        self.software = message.software
        self.greeted.set_result(None)
        self._owner.greeted(self)
