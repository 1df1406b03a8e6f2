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
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import msgspec

from sidecar.link.patience import patience
from sidecar.link.pulse import BUSY_PING_SECONDS, GONE_SECONDS, PING_SECONDS, Life, Pulse
from ztna.config import Endpoint, RelayTarget
from ztna.credentials import Credentials
from ztna.errors import LinkError, ProtocolError, Refused
from ztna.identity import Identity, require_relay
from ztna.names import ServiceName, SessionId
from ztna.quic import (
    CLOSE_OK,
    CLOSE_PROTOCOL_ERROR,
    HANDSHAKE_SECONDS,
    RENEWED,
    Client,
    Connection,
    Settings,
)
from ztna.quic_engine import close_code
from ztna.reasons import Reason
from ztna.telemetry import dropped, logger, refused
from ztna.udp import SockAddr, UdpSocket
from ztna.verdicts import wall_clock
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
"""How long a relay may be silent amid a handshake: a busy one, to whom many come back at once, is waited for longer."""
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

RENEW_PART = 0.2
RENEW_LEFT_MAX = timedelta(hours=1)
"""A relay whose certificate has less left is connected to again: it may show a newer one."""
RENEW_RETRY_SECONDS_MIN = 1.0
RENEW_RETRY_SECONDS_MAX = 60.0
RENEW_TRIES = 20
"""Over what is left, so that thousands of agents do not come back each second for an hour."""

_numbers = itertools.count(1)


class RelayClient:
    """Keeps one connection to one relay while `run` runs.

    `on_connected(client)` is called after the hellos, `on_message(client, message)` for every message after
    them, `on_packet(client, session, packet)` for every packet of a v1 session (connectors),
    `on_lost(client, reason)` once for each on_connected, `on_pulse(client)` between them whenever there may be news
    of `life` and `rtt_s`. When the own certificate was renewed, or the relay's is about to expire, another connection
    is made before the one that stands is given up (on_lost, then on_connected).
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
        self.proven = credentials
        """What we proved ourselves with on the connection that stands: sessions opened on it know no other."""
        self.observed: SockAddr | None = None
        self.problem: str | None = "not yet connected"
        self._credentials = credentials
        self._on_message = on_message
        self._on_connected = on_connected
        self._on_lost = on_lost
        self._on_packet = on_packet
        self._on_pulse = on_pulse
        self._is_busy = is_busy
        self.life = Life.UP
        self.rtt_s: float | None = None
        self.is_renewed = False
        """Whether `on_lost` is about a connection that another one takes the place of."""
        self.lost_by = Reason.PEER_GONE
        """Why the last connection ended: what the relay said of our certificate, else that it is gone."""
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

    @property
    def peer(self) -> Identity | None:
        """The relay, while connected."""
        return None if self._control is None else self._control.peer

    def send(self, message: AnyMessage) -> bool:
        """Send a message; False when not connected or the relay's features lack its type.

        A relay that does not take what it is sent is dropped and connected to again. Raises ProtocolError for a
        message that is too large for a frame.
        """
        return self._control is not None and self._control.send(message)

    def send_packet(self, session: SessionId, service: ServiceName, packet: bytes) -> bool:
        """Send an IP packet of a v1 session; False when it was lost here: not connected, too large, queue full."""
        return self._control is not None and self._control.send_packet(session, service, packet)

    def use_credentials(self, credentials: Credentials) -> None:
        """Prove ourselves with these from now on, on another connection if the certificate is another."""
        self._credentials = credentials
        if self._control is None or _same_leaf(credentials, self.proven):
            self.proven = credentials

    def network_changed(self) -> None:
        """Let the relay know where we are now: it answers where the last packet came from."""
        if self._control is not None:
            self._control.ping()

    async def run(self) -> None:
        """Connect, stay, and connect again, until cancelled; then close."""
        failures = 0
        while True:
            try:
                standing: _Dialled | None = await self._dial(None)
                while standing is not None:
                    standing = await self._stay(standing)
                failures = 0
            except (LinkError, Refused) as error:
                failures += 1
                self._failed(str(error))
            await asyncio.sleep(_backoff(failures))

    async def _dial(self, before: Identity | None) -> _Dialled:
        """Connect and exchange hellos, upon which it takes the place of the connection before, of that relay's leaf.

        Raises LinkError or Refused.
        """
        address, hosts = await _resolve(self.target.address)
        credentials = self._credentials
        controls: list[_Control] = []
        client: Client | None = None

        def received(packets: list[tuple[bytes, SockAddr]]) -> None:
            if client is not None:
                client.packets_received(packets)

        def make(connection: Connection) -> _Control:
            controls.append(_Control(self, connection, next(_numbers), credentials, hosts))
            return controls[0]

        path = UdpSocket.open(("::" if ":" in address[0] else "0.0.0.0", 0), received)
        try:
            client = Client(
                path,
                address,
                f"relay.{self.target.name}.ztna",
                credentials,
                _settings(credentials.identity),
                check=self._check,
                factory=make,
            )
            connection = await self._connect(client)
            is_same = before is not None and before.fingerprint == connection.identity.fingerprint
            if is_same and _same_leaf(credentials, self.proven):
                raise LinkError(f"relay {self.target.name} was not renewed yet")
            await self._greet(connection, controls[0])
        except BaseException:
            if client is not None:
                client.close()
            path.close()
            raise
        return _Dialled(client, path, connection, controls[0])

    async def _connect(self, client: Client) -> Connection:
        try:
            async with patience(CONNECT_SECONDS, lambda: client.connection and client.connection.heard_at):
                return await client.connect(HANDSHAKE_SECONDS)
        except TimeoutError:
            raise LinkError(f"relay {self.target.name} does not answer ({CONNECT_SECONDS:g} s)") from None

    async def _greet(self, connection: Connection, control: _Control) -> None:
        control.greet()
        with suppress(TimeoutError):
            async with asyncio.timeout(HELLO_SECONDS):
                await asyncio.wait((control.greeted, connection.closed), return_when=asyncio.FIRST_COMPLETED)
        if not control.greeted.done():
            raise LinkError(_ending(connection) or f"relay {self.target.name} said no hello")

    async def _stay(self, standing: _Dialled) -> _Dialled | None:
        """Keep a connection until it ends (None) or another one has taken its place."""
        connection = standing.connection
        renewing: asyncio.Task[_Dialled] | None = None
        pulse = Pulse(time.monotonic())
        # Not two at once: a flow that is being opened finds its session gone at each.
        renew_at = time.monotonic() + random.uniform(1.0, 2.0) * RENEW_RETRY_SECONDS_MIN
        try:
            while not connection.closed.done():
                now = time.monotonic()
                left = self._beat(connection, pulse, now)
                if renewing is None and now >= renew_at and self._must_renew(standing):
                    renewing = asyncio.ensure_future(self._dial(connection.identity))
                waited: set[asyncio.Future[Any]] = {connection.closed}
                if renewing is not None:
                    waited.add(renewing)
                await asyncio.wait(waited, timeout=left, return_when=asyncio.FIRST_COMPLETED)
                if renewing is not None and renewing.done():
                    newer, renewing = self._renewed(renewing), None
                    if newer is not None:
                        return newer
                    renew_at = time.monotonic() + _renew_pause(connection.identity)
            return None if renewing is None else await renewing
        finally:
            if self._control is standing.control:
                self.lost_by = _judgement(connection)
                self._lose(_ending(connection) or "closed by us")
                standing.close("")
            else:
                standing.close(RENEWED)
            if renewing is not None and not renewing.done():
                renewing.cancel()
                await asyncio.wait((renewing,))

    def _beat(self, connection: Connection, pulse: Pulse, now: float) -> float:
        """Look whether the relay lives, and return when to look again, in seconds. Raises LinkError when it is gone."""
        busy = self._is_busy(self)
        if pulse.step(connection.heard_at, now, busy=busy):
            connection.ping()
        if pulse.life is Life.GONE:
            connection.close(CLOSE_OK, "peer_gone")
            raise LinkError(f"silent for {GONE_SECONDS:g} s")
        self.life, self.rtt_s = pulse.life, connection.rtt_s
        self._on_pulse(self)
        return min(LOOK_SECONDS, max(0.0, pulse.next_timer(busy=busy) - time.monotonic()))

    def _must_renew(self, standing: _Dialled) -> bool:
        """Say whether the connection proves one end with a certificate that is not, or not much longer, the one."""
        if not _same_leaf(self._credentials, standing.control.credentials):
            return True
        relay = standing.connection.identity
        return relay.not_after - wall_clock() < min(relay.lifetime * RENEW_PART, RENEW_LEFT_MAX)

    def _renewed(self, renewing: asyncio.Task[_Dialled]) -> _Dialled | None:
        try:
            return renewing.result()
        except (LinkError, Refused) as error:
            _log.warning("relay_not_renewed", relay=self.target.name, error=error)
            return None

    def greeted(self, control: _Control) -> None:
        """Take the control stream into use, in place of the one before (called by the connection's handler)."""
        if self._control is not None:
            self.lost_by = Reason.PEER_GONE
            self.is_renewed = True
            self._lose(RENEWED)
            self.is_renewed = False
        self._control = control
        self._number, self._hosts, self.proven = control.number, control.hosts, control.credentials
        self.problem = None
        self.life, self.rtt_s = Life.UP, None
        self._on_connected(self)

    def received(self, control: _Control, message: AnyMessage) -> None:
        """Pass a message on (called by the connection's handler)."""
        if control is not self._control:
            return  # of sessions that were given up with its connection
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

    def packet_received(self, control: _Control, session: SessionId, packet: bytes) -> None:
        """Pass an IP packet of a v1 session on (called by the connection's handler)."""
        if self._on_packet is None or control is not self._control:
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


@dataclass(frozen=True, slots=True)
class _Dialled:
    """A connection with all that hangs on it."""

    client: Client
    path: UdpSocket
    connection: Connection
    control: _Control

    def close(self, reason: str) -> None:
        self.client.close(CLOSE_OK, reason)
        self.path.close()


class _Control:
    """The handler of one connection: frames of stream 0, and the QAD datagrams."""

    def __init__(
        self,
        client: RelayClient,
        connection: Connection,
        number: int,
        credentials: Credentials,
        hosts: frozenset[str],
    ) -> None:
        self.peer = connection.identity
        self.number = number
        self.credentials = credentials
        self.hosts = hosts
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

    def ping(self) -> None:
        self._connection.ping()

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
            self._client.packet_received(self, message.session, message.packet)
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
            self._client.received(self, message)
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


def _renew_pause(relay: Identity) -> float:
    left_s = (relay.not_after - wall_clock()).total_seconds()
    return random.uniform(0.5, 1.0) * min(
        RENEW_RETRY_SECONDS_MAX, max(RENEW_RETRY_SECONDS_MIN, left_s / RENEW_TRIES)
    )


def _same_leaf(one: Credentials, other: Credentials) -> bool:
    return one.identity.fingerprint == other.identity.fingerprint


def _judgement(connection: Connection) -> Reason:
    """Return what the relay found wrong with our certificate, when that is why it closed the connection."""
    if connection.closed.done() and connection.refusal is None:
        code, phrase = connection.closed.result()
        for reason in (Reason.REVOKED, Reason.EXPIRED, Reason.UNTRUSTED):
            if (code, phrase) == (close_code(reason), str(reason)):
                return reason
    return Reason.PEER_GONE


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
