"""One peer's connection as the relay sees it: the control stream of `ztna-v2`, over QUIC or TLS, bounded and counted.

The handler that ztna.quic and ztna.tls_control call; what the messages mean is its owner's. Source: protocol.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from relay.commands import ConnectionKey
from relay.ownership import Signaling
from ztna import quic
from ztna.errors import ProtocolError
from ztna.reasons import Reason
from ztna.telemetry import dropped, refused
from ztna.tls_control import TlsConnection
from ztna.udp import SockAddr
from ztna.wire import control, datagram

WHERE = "relay"
CONTROL_STREAM = 0
CONNECTOR_UDP_PAYLOAD_BYTES = 1360
SIGNALING_UNSENT_BYTES_MAX = 256 * 1024
"""Beyond it a peer is passed no more of what others say about paths: they must not be able to fill its stream."""

SIGNALING = Signaling | control.StartPunching


class Owner(Protocol):
    """What a peer's connection asks of the relay."""

    def message_received(self, peer: ControlPeer, message: control.AnyMessage) -> None:
        """Take a whole message of a connection. Raises ProtocolError."""

    def datagram_received(self, peer: ControlPeer, data: bytes) -> None:
        """Take a DATAGRAM of a connection."""

    def connection_closed(self, peer: ControlPeer, reason: Reason) -> None:
        """Hear that a connection is over."""


class ControlPeer:
    """One connection's control stream: the handler that ztna.quic and ztna.tls_control call."""

    def __init__(self, owner: Owner, key: ConnectionKey, connection: quic.Connection | TlsConnection) -> None:
        self.key = key
        self.connection = connection
        self._owner = owner
        self._frames = control.FrameReader()
        self._ending: Reason | None = None
        if isinstance(connection, quic.Connection) and connection.identity.connector:
            connection.use_udp_payload(CONNECTOR_UDP_PAYLOAD_BYTES)

    def send(self, message: control.AnyMessage) -> None:
        """Send a message; a peer that does not read its stream is disconnected, but never for the words of others."""
        others_word = isinstance(message, SIGNALING)
        if others_word and self.connection.unsent_bytes(CONTROL_STREAM) >= SIGNALING_UNSENT_BYTES_MAX:
            dropped(WHERE, "signaling_queue_full")
            return
        sent = self.connection.send_stream(CONTROL_STREAM, control.encode(message))
        if not sent and self.connection.is_open:
            self.disconnect(Reason.LIMIT_REACHED)

    def send_all(self, messages: Sequence[control.AnyMessage]) -> None:
        """Send many messages by one write; otherwise as `send`."""
        sent = self.connection.send_stream(CONTROL_STREAM, b"".join(map(control.encode, messages)))
        if not sent and self.connection.is_open:
            self.disconnect(Reason.LIMIT_REACHED)

    def disconnect(self, reason: Reason) -> None:
        """Close the connection for the reason."""
        if self.connection.is_open:
            self._ending = reason
            refused(WHERE, reason)
            self.connection.close(quic.CLOSE_PROTOCOL_ERROR, str(reason))

    def begin(self) -> None:
        """Say what comes first; the relay knows the connection by now."""
        self.tell_address()

    def tell_address(self) -> None:
        """Tell the peer where it is seen (QAD), unless UDP does not reach it."""
        if isinstance(self.connection, TlsConnection):
            return
        host, port = self.connection.peer_address
        self.connection.send_datagram(datagram.encode(datagram.Qad(host, port)))

    def datagram_received(self, data: bytes) -> None:
        """Hand over a packet of a v1 agent's session, all that peers here may send."""
        self._owner.datagram_received(self, data)

    def stream_data(self, stream_id: int, data: bytes, end: bool) -> None:
        """Take bytes of the control stream, the only one there is."""
        if stream_id != CONTROL_STREAM:
            raise ProtocolError(f"stream {stream_id}: only the control stream 0 is used")
        messages = self._frames.feed(data)
        if unknown := self._frames.take_unknown_fields():
            dropped(WHERE, "unknown_field", unknown)
        for message in messages:
            self.message_received(message)
        if end and self.connection.is_open:
            self.connection.close(quic.CLOSE_OK, "control stream ended")

    def message_received(self, message: control.AnyMessage | control.UnknownMessage) -> None:
        """Take one message."""
        if isinstance(message, control.UnknownMessage):
            dropped(WHERE, "unknown_message")
        elif self.connection.is_open:
            self._owner.message_received(self, message)

    def peer_address_changed(self, address: SockAddr) -> None:
        """Tell the peer its new address; authority is the connection's, so nothing else changes."""
        self.tell_address()
        if isinstance(self.connection, quic.Connection) and not self.connection.identity.connector:
            self.connection.restart_path()

    def connection_closed(self, code: int, reason: str) -> None:
        """End what hung on the connection."""
        self._owner.connection_closed(self, self._ending or ending(self.connection, code, reason))


def ending(connection: quic.Connection | TlsConnection, code: int, reason: str) -> Reason:
    """Return how a connection ended: its certificate does not stand any more, or it went with a word or without."""
    if connection.refusal is not None:
        return connection.refusal.reason
    said_so = code == quic.CLOSE_OK and reason not in (quic.STATELESS_RESET, quic.RENEWED)
    return Reason.CLOSED_BY_PEER if said_so else Reason.PEER_GONE
