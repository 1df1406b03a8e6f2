"""One `ztna-v2` connection to a relay, kept alive: hello, messages both ways, and again after a loss.

What a message means is the owner's. Connects from a UDP socket of its own each time, and asks the resolver each
time, so that a relay that moved is found. Source: protocol.md, Control stream.
"""

from __future__ import annotations

import asyncio
import itertools
import random
import socket
import time
from collections.abc import Callable
from contextlib import suppress

import msgspec

from sidecar.link.pulse import BUSY_PING_SECONDS, GONE_SECONDS, PING_SECONDS, Life, Pulse
from ztna.config import Endpoint, RelayTarget
from ztna.credentials import Credentials
from ztna.errors import LinkError, ProtocolError, Refused
from ztna.identity import Identity, require_relay
from ztna.names import ServiceName, SessionId
from ztna.quic import CLOSE_OK, CLOSE_PROTOCOL_ERROR, Client, Connection, Settings
from ztna.reasons import Reason
from ztna.telemetry import dropped, logger, refused
from ztna.udp import SockAddr, UdpSocket
from ztna.wire import datagram
from ztna.wire.control import (
    FEATURES,
    PROTOCOL_VERSION,
    AnyMessage,
    FrameReader,
    Hello,
    Offered,
    Opened,
    UnknownMessage,
    encode,
)

ALPN = "ztna-v2"
UDP_PAYLOAD_BYTES = 1200
UDP_PAYLOAD_PROBED_BYTES = 1350
CONNECTOR_UDP_PAYLOAD_BYTES = 1360
CONNECT_SECONDS = 5.0
HELLO_SECONDS = 5.0
LOOK_SECONDS = BUSY_PING_SECONDS
"""How often at least it is looked whether the relay is needed (`is_busy`) and still there."""
BACKOFF_SECONDS_MIN = 0.2
BACKOFF_SECONDS_MAX = 3.0

_CONTROL_STREAM = 0
_WHERE = "relay_client"

_log = logger(__name__)

RelayConnection = tuple[str, int]
"""A relay's name and which connection of this process it is: the same pair never comes again."""

_numbers = itertools.count(1)


class RelayClient:
    """Keeps one connection to one relay while `run` runs.

    `on_connected(client)` is called after the hellos, `on_message(client, message)` for every message after
    them, `on_packet(client, session, packet)` for every packet of a v1 session (connectors),
    `on_lost(client, reason)` once for each on_connected, `on_pulse(client)` between them whenever there may be news
    of `life` and `rtt_s`. `credentials` may be replaced at any time; the connection that stands keeps its own.
    `is_busy` says whether flows depend on the relay, so that its silence must be noticed soon.
    """

    def __init__(
        self,
        target: RelayTarget,
        credentials: Credentials,
        *,
        on_message: Callable[[RelayClient, AnyMessage], None],
        on_connected: Callable[[RelayClient], None],
        on_lost: Callable[[RelayClient, str], None],
        on_packet: Callable[[RelayClient, SessionId, bytes], None] | None = None,
        on_pulse: Callable[[RelayClient], None] = lambda client: None,
        is_busy: Callable[[RelayClient], bool] = lambda client: False,
    ) -> None:
        self.target = target
        self.credentials = credentials
        self.observed: SockAddr | None = None
        self.problem: str | None = "not yet connected"
        self._on_message = on_message
        self._on_connected = on_connected
        self._on_lost = on_lost
        self._on_packet = on_packet
        self._on_pulse = on_pulse
        self._is_busy = is_busy
        self.life = Life.UP
        self.rtt_s: float | None = None
        self._number = 0
        self._hosts: frozenset[str] = frozenset()
        self._control: _Control | None = None

    @property
    def connected(self) -> bool:
        """Whether messages can be sent: connected, and the hellos exchanged."""
        return self._control is not None

    @property
    def connection(self) -> RelayConnection:
        """The connection that stands or, while there is none, the last one."""
        return (self.target.name, self._number)

    def send(self, message: AnyMessage) -> bool:
        """Send a message; False when not connected or the relay's features lack its type.

        A relay that does not take what it is sent is dropped and connected to again. Raises ProtocolError for a
        message that is too large for a frame.
        """
        return self._control is not None and self._control.send(message)

    def send_packet(self, session: SessionId, service: ServiceName, packet: bytes) -> bool:
        """Send an IP packet of a v1 session; False when it was lost here: not connected, too large, queue full."""
        return self._control is not None and self._control.send_packet(session, service, packet)

    async def run(self) -> None:
        """Connect, stay, and connect again, until cancelled; then close."""
        failures = 0
        while True:
            try:
                await self._connect_once()
                failures = 0
            except (LinkError, Refused) as error:
                failures += 1
                self._failed(str(error))
            await asyncio.sleep(_backoff(failures))

    async def _connect_once(self) -> None:
        """Run one connection from dialling to its end; returns only after it had been of use."""
        address, self._hosts = await _resolve(self.target.address)
        self._number = next(_numbers)
        controls: list[_Control] = []
        client: Client | None = None

        def received(packets: list[tuple[bytes, SockAddr]]) -> None:
            if client is not None:
                client.packets_received(packets)

        def make(connection: Connection) -> _Control:
            controls.append(_Control(self, connection))
            return controls[0]

        path = UdpSocket.open(("::" if ":" in address[0] else "0.0.0.0", 0), received)
        try:
            client = Client(
                path,
                address,
                f"relay.{self.target.name}.ztna",
                self.credentials,
                _settings(self.credentials.identity),
                check=self._check,
                factory=make,
            )
            connection = await client.connect(CONNECT_SECONDS)
            await self._converse(connection, controls[0])
        finally:
            if client is not None:
                client.close()
            path.close()

    async def _converse(self, connection: Connection, control: _Control) -> None:
        control.greet()
        with suppress(TimeoutError):
            async with asyncio.timeout(HELLO_SECONDS):
                await asyncio.wait((control.greeted, connection.closed), return_when=asyncio.FIRST_COMPLETED)
        if not control.greeted.done():
            raise LinkError(_ending(connection) or f"relay {self.target.name} said no hello")
        try:
            await self._until_over(connection)
        finally:
            self._lose(_ending(connection) or "closed by us")

    async def _until_over(self, connection: Connection) -> None:
        """Return when the connection has ended; one whose relay is gone without a word is closed."""
        pulse = Pulse(time.monotonic())
        while not connection.closed.done():
            busy = self._is_busy(self)
            if pulse.step(connection.heard_at, time.monotonic(), busy=busy):
                connection.ping()
            if pulse.life is Life.GONE:
                connection.close(CLOSE_OK, "peer_gone")
                raise LinkError(f"silent for {GONE_SECONDS:g} s")
            self.life, self.rtt_s = pulse.life, connection.rtt_s
            self._on_pulse(self)
            left = pulse.next_timer(busy=busy) - time.monotonic()
            await asyncio.wait((connection.closed,), timeout=min(LOOK_SECONDS, max(0.0, left)))

    def greeted(self, control: _Control) -> None:
        """Take the control stream into use (called by the connection's handler)."""
        self._control = control
        self.problem = None
        self.life, self.rtt_s = Life.UP, None
        self._on_connected(self)

    def received(self, message: AnyMessage) -> None:
        """Pass a message on (called by the connection's handler)."""
        self._on_message(self, self._confined(message) if isinstance(message, Offered | Opened) else message)

    def _confined(self, message: Offered | Opened) -> Offered | Opened:
        """Take out a forwarder that is neither on the relay's own host nor among those configured.

        A relay that was stolen must not be able to have us connect or send to any address it likes.
        """
        forwarder = message.forwarder
        if (
            forwarder is None
            or forwarder.address.ip in self._hosts
            or forwarder.address in self.target.forwarders
        ):
            return message
        refused(_WHERE, Reason.UNTRUSTED)
        _log.warning("forwarder_refused", relay=self.target.name, forwarder=forwarder.address)
        return msgspec.structs.replace(message, forwarder=None)

    def packet_received(self, session: SessionId, packet: bytes) -> None:
        """Pass an IP packet of a v1 session on (called by the connection's handler)."""
        if self._on_packet is None:
            dropped(_WHERE, "unexpected_datagram")
        else:
            self._on_packet(self, session, packet)

    def _lose(self, reason: str) -> None:
        self._control = None
        self.problem = reason
        self._on_lost(self, reason)

    def _check(self, identity: Identity) -> None:
        require_relay(identity, self.target.name)

    def _failed(self, problem: str) -> None:
        if problem != self.problem:
            _log.warning(
                "relay_unreachable", relay=self.target.name, address=self.target.address, error=problem
            )
        self.problem = problem


class _Control:
    """The handler of one connection: frames of stream 0, and the QAD datagrams."""

    def __init__(self, client: RelayClient, connection: Connection) -> None:
        self.greeted: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._client = client
        self._connection = connection
        self._reader = FrameReader()
        self._types: frozenset[str] = frozenset()

    def greet(self) -> None:
        """Say our hello, on the first stream a client opens."""
        stream_id = self._connection.open_stream()
        if stream_id != _CONTROL_STREAM:
            raise LinkError(f"the control stream has id {stream_id}, expected {_CONTROL_STREAM}")
        self._connection.send_stream(_CONTROL_STREAM, encode(Hello()))

    def send(self, message: AnyMessage) -> bool:
        kind = message.__struct_config__.tag
        if kind not in self._types:
            dropped(_WHERE, "not_in_features")
            return False
        if self._connection.send_stream(_CONTROL_STREAM, encode(message)):
            return True
        self._connection.close(CLOSE_PROTOCOL_ERROR, "control stream is stuck")
        return False

    def send_packet(self, session: SessionId, service: ServiceName, packet: bytes) -> bool:
        data = datagram.encode(datagram.SessionPacket(session, packet))
        return self._connection.send_datagram(data, service)

    def datagram_received(self, data: bytes) -> None:
        try:
            message = datagram.decode(data)
        except ProtocolError:
            dropped(_WHERE, "malformed_datagram")
            return
        if isinstance(message, datagram.Qad):
            self._client.observed = (message.ip, message.port)
        elif isinstance(message, datagram.SessionPacket) and self.greeted.done():
            self._client.packet_received(message.session, message.packet)
        else:
            dropped(_WHERE, "unexpected_datagram")

    def stream_data(self, stream_id: int, data: bytes, end: bool) -> None:
        if stream_id != _CONTROL_STREAM:
            raise ProtocolError(f"data on stream {stream_id}; the control stream is {_CONTROL_STREAM}")
        for message in self._reader.feed(data):
            self._take(message)
        if end:
            raise ProtocolError("the control stream ended")

    def peer_address_changed(self, address: SockAddr) -> None:
        """Nothing hangs on the relay's address."""

    def connection_closed(self, code: int, reason: str) -> None:
        """RelayClient waits for it on the connection."""

    def _take(self, message: AnyMessage | UnknownMessage) -> None:
        if isinstance(message, UnknownMessage):
            dropped(_WHERE, "unknown_message")
        elif self.greeted.done():
            if isinstance(message, Hello):
                raise ProtocolError("a second hello")
            self._client.received(message)
        else:
            self._hello(message)

    def _hello(self, message: AnyMessage) -> None:
        if not isinstance(message, Hello):
            raise ProtocolError("expected hello first")
        if message.version != PROTOCOL_VERSION:
            raise ProtocolError(f"control version {message.version}, expected {PROTOCOL_VERSION}")
        self._types = message.features & FEATURES
        self.greeted.set_result(None)
        self._client.greeted(self)


def _settings(identity: Identity) -> Settings:
    """Return how to speak to a relay. Source: protocol.md: 1360 bytes between relay and connector, less elsewhere."""
    return Settings(
        alpn=(ALPN,),
        udp_payload=CONNECTOR_UDP_PAYLOAD_BYTES if identity.connector else UDP_PAYLOAD_BYTES,
        udp_payload_probe=UDP_PAYLOAD_PROBED_BYTES,
        ping_interval_s=PING_SECONDS,
        where=_WHERE,
    )


def _ending(connection: Connection) -> str | None:
    if not connection.closed.done():
        return None
    code, reason = connection.closed.result()
    return reason or f"the connection ended with code 0x{code:x}"


def _backoff(failures: int) -> float:
    longest = min(BACKOFF_SECONDS_MAX, BACKOFF_SECONDS_MIN * 2.0 ** min(failures, 8))
    return random.uniform(BACKOFF_SECONDS_MIN / 2, longest)


async def _resolve(endpoint: Endpoint) -> tuple[SockAddr, frozenset[str]]:
    """Return the first address, IPv4 preferred, and every host's. Raises LinkError when there is none."""
    loop = asyncio.get_running_loop()
    try:
        found = await loop.getaddrinfo(endpoint.host, endpoint.port, type=socket.SOCK_DGRAM)
    except OSError as error:
        raise LinkError(f"{endpoint.host}: {error.strerror or error}") from None
    if not found:
        raise LinkError(f"{endpoint.host} has no address")
    family_first = sorted(found, key=lambda entry: entry[0] != socket.AF_INET)
    host, port = family_first[0][4][:2]
    return (str(host), int(port)), frozenset(str(entry[4][0]) for entry in found)
