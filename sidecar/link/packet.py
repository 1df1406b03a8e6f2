"""The packet carrier of a link: one QUIC connection between an agent and a connector (protocol.md, Link).

Carries IP packets with the name of their service, both ways, and streams that an agent opens where TCP is blocked.
Whether a packet's flow may be is decided by the owner.
Under it is a path switch (sidecar.link.switch) for each relay over which the two ends have a session; QUIC sees none
of that, so that a link outlives its relays. Which of them carries, the agent's end is told and the connector's end
follows.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial

from sidecar.link.patience import patience
from sidecar.link.quic_stream import QuicStream, QuicStreams
from sidecar.link.switch import PathSwitch
from ztna.credentials import Credentials
from ztna.errors import BadName, LinkError, ProtocolError, ZtnaError
from ztna.identity import Identity
from ztna.names import ServiceName
from ztna.quic import CLOSE_OK, HANDSHAKE_SECONDS, Client, Connection, Server, Settings
from ztna.reasons import Reason
from ztna.telemetry import LINK_TALLIES, dropped
from ztna.udp import SockAddr
from ztna.wire.control import Address, ForwarderBind, Secret
from ztna.wire.datagram import SERVICE_BYTES_MAX, service_packet, split_service_packet

ALPN = "ztna-link"
UDP_PAYLOAD_BYTES = 1200
UDP_PAYLOAD_PROBED_BYTES = 1350
PING_INTERVAL_SECONDS = 10.0
DIAL_SECONDS = 5.0
# A link that waits for its agent, or for it to come back, and for nothing else.
WAIT_SECONDS = 30.0
HALF_OPEN_MAX = 4
INTRODUCE_SECONDS = 0.2
PROVE_POLL_SECONDS = 0.05
IP_PACKET_BYTES_MAX = 65_535
MESSAGE_BYTES_MAX = 2 + SERVICE_BYTES_MAX + IP_PACKET_BYTES_MAX
LARGE_PACKETS_WAITING_MAX = 64
SERVICES_CACHED_MAX = 1024

_WHERE = "packet_carrier"
_SENT, _RECEIVED = LINK_TALLIES["packet", "sent"], LINK_TALLIES["packet", "received"]
_SERVER_NAME = "connector.ztna"

Receive = Callable[["PacketLink", ServiceName, bytes], None]
Addresses = Callable[[], Sequence[str]]
Stray = Callable[[bytes], "PacketLink | None"]


class PacketLink:
    """One end of a packet carrier. `closed` tells why it ended; until then `send` may be called."""

    def __init__(
        self,
        bind: ForwarderBind,
        probe_key: Secret,
        receive: Receive,
        *,
        addresses: Addresses,
        allow_private: bool,
    ) -> None:
        loop = asyncio.get_running_loop()
        self.path_changed: Callable[[PacketLink], None] = lambda link: None
        """Called when another path of any way carries from now on."""
        self.candidates_changed: Callable[[PacketLink, bytes], None] = lambda link, bind_id: None
        """Called when the other end is to hear of a way's candidates, as they are others than before."""
        self.closed: asyncio.Future[Reason] = loop.create_future()
        self.established: asyncio.Future[None] = loop.create_future()
        self.sent_bytes = self.received_bytes = 0
        """IP packets with the names of their services, in bytes."""
        self.on_stream: Callable[[QuicStream], None] | None = None
        """Takes the streams that the other end opens; without it there may be none."""
        self._receive = receive
        self._streams: QuicStreams | None = None
        self._connection: Connection | None = None
        self._peer: Identity | None = None
        self._services: dict[bytes, ServiceName] = {}
        self._unanswered_since: float | None = None
        self._endpoint: Client | Server | None = None
        self._wait_timer: asyncio.TimerHandle | None = None
        self._addresses = addresses
        self._allow_private = allow_private
        self._stray: Stray | None = None
        # What QUIC believes in, whatever way the packets take.
        self._address: SockAddr = (bind.address.ip, bind.address.port)
        self._ways: dict[bytes, PathSwitch] = {}
        # Ways on which nothing came yet from the other end: they get copies of what is sent, so that it learns of them.
        self._unheard: set[bytes] = set()
        self._introduce_timer: asyncio.TimerHandle | None = None
        self._carrying = self._add_way(bind, probe_key)

    @classmethod
    async def dial(
        cls,
        bind: ForwarderBind,
        probe_key: Secret,
        credentials: Credentials,
        *,
        check: Callable[[Identity], None],
        receive: Receive,
        timeout_s: float = DIAL_SECONDS,
        addresses: Addresses = tuple,
        allow_private: bool = False,
    ) -> PacketLink:
        """Bind at the forwarder and connect to the connector on its other side (the agent's end).

        `check` raises Refused for a connector that is not the one meant. `timeout_s` is for each sign of progress: a
        long way, or a slow host, is no reason to begin anew, which costs it as much again. `addresses` gives those of
        this host's interfaces. Raises LinkError, Refused.
        """
        try:
            link = cls(bind, probe_key, receive, addresses=addresses, allow_private=allow_private)
        except (ZtnaError, OSError) as error:
            raise LinkError(f"no socket for a packet link through {bind.address}: {error}") from None
        client = link._endpoint = Client(
            _Carrying(link),
            link._address,
            _SERVER_NAME,
            credentials,
            _settings(),
            check=check,
            factory=link._handler,
        )
        try:
            async with patience(timeout_s, partial(_progress, link._carrying, client)):
                # Before the bind the forwarder drops everything, and QUIC would wait out its first timer.
                await asyncio.shield(link._carrying.bound)
                await client.connect(HANDSHAKE_SECONDS)
        except TimeoutError:
            link.close(Reason.PEER_GONE)
            raise LinkError(f"no packet link through {bind.address} within {timeout_s:g} s") from None
        except BaseException:
            link.close(Reason.PEER_GONE)
            raise
        return link

    @classmethod
    def serve(
        cls,
        bind: ForwarderBind,
        probe_key: Secret,
        credentials: Credentials,
        *,
        admit: Callable[[Identity], None],
        receive: Receive,
        addresses: Addresses = tuple,
        allow_private: bool = False,
        stray: Stray | None = None,
        on_stream: Callable[[QuicStream], None] | None = None,
    ) -> PacketLink:
        """Bind at the forwarder and wait for the agent (the connector's end); await `established`.

        `admit` raises Refused for an agent that is not the one meant. When the agent connects again the newer
        connection carries; without any for WAIT_SECONDS the link closes itself. `stray` is asked about packets of a
        connection that is not ours: the link whose it is, having adopted this one, or None.
        """
        link = cls(bind, probe_key, receive, addresses=addresses, allow_private=allow_private)
        link._stray, link.on_stream = stray, on_stream
        link._endpoint = Server(
            _Carrying(link),
            credentials,
            _settings(),
            admit=lambda identity, _alpn: admit(identity),
            factory=link._handler,
        )
        link._wait()
        return link

    @property
    def peer(self) -> Identity:
        """The other end, once established and after it has gone, too. Raises LinkError before."""
        if self._peer is None:
            raise LinkError("the link is not established")
        return self._peer

    @property
    def path(self) -> str:
        """`forwarded` or `direct`: where packets go now."""
        return "direct" if self._carrying.paths.is_direct else "forwarded"

    @property
    def ways(self) -> Mapping[bytes, PathSwitch]:
        """Its ways by bind id, oldest first."""
        return self._ways

    @property
    def carrying(self) -> PathSwitch:
        """The way that carries."""
        return self._carrying

    def add_way(self, bind: ForwarderBind, probe_key: Secret) -> None:
        """Bind at another relay's forwarder too (the agent's end); it may carry once it was heard.

        Raises ZtnaError, OSError.
        """
        if bytes(bind.bind_id) not in self._ways:
            self._unheard.add(self._add_way(bind, probe_key).bind_id)
            if self._introduce_timer is None:
                self._introduce()

    def is_heard(self, bind_id: bytes) -> bool:
        """Say whether the other end was heard on a way."""
        return bind_id in self._ways and bind_id not in self._unheard

    def remove_way(self, bind_id: bytes) -> None:
        """Give a way up, unless it carries."""
        way = self._ways.get(bind_id)
        if way is not None and way is not self._carrying:
            del self._ways[bind_id]
            self._unheard.discard(bind_id)
            way.close()

    def use(self, bind_id: bytes) -> None:
        """Send on this way from now on; what was under way on the old one may be lost."""
        way = self._ways[bind_id]
        if way is not self._carrying:
            self._carrying = way
            self._path_changed(bind_id)

    def knows(self, data: bytes) -> bool:
        """Say whether a packet is of a connection of this link."""
        return isinstance(self._endpoint, Server) and self._endpoint.knows(data)

    def adopt(self, other: PacketLink) -> None:
        """Take over the ways of a link that waits for its agent, who comes with a connection of ours; close it."""
        ways, other._ways = other._ways, {}
        other.close()
        for bind_id, way in ways.items():
            self._ways[bind_id] = way
            way.hand_over(*self._hooks(bind_id))
            self.use(bind_id)  # and let it be heard there; the next packet decides where to stay

    @property
    def rtt_s(self) -> float:
        """The round trip time to the other end in seconds, 0 while none was measured."""
        return (self._connection.rtt_s if self._connection is not None else None) or 0.0

    async def round_trip(self) -> float:
        """Return in how many seconds the other end acknowledges a PING sent now. Raises LinkError."""
        if self._connection is None:
            raise LinkError("the link is not established")
        return await self._connection.round_trip()

    @property
    def unanswered_s(self) -> float:
        """For how many seconds packets were sent and nothing came back, not even QUIC's ACK of one."""
        connection, since = self._connection, self._unanswered_since
        if connection is None or since is None or connection.heard_at >= since:
            return 0.0
        return time.monotonic() - since

    def send(self, service: ServiceName, packet: bytes) -> bool:
        """Send one IP packet of a service; False when it was lost here (counted): closed, or queues full."""
        connection = self._connection
        if connection is None:
            dropped(_WHERE, "not_connected")
            return False
        self._note_sent()
        message = service_packet(service.encode(), packet)
        self.sent_bytes += len(message)
        _SENT.count += len(message)
        if len(message) <= connection.datagram_limit:
            return connection.send_datagram(message, service)
        if connection.blocked_streams >= LARGE_PACKETS_WAITING_MAX:
            dropped(_WHERE, "stream_queue_full")
            return False
        return connection.send_stream(connection.open_stream(unidirectional=True), message, end=True)

    def open_stream(self) -> QuicStream:
        """Open a stream to the other end, for what TCP does elsewhere. Raises LinkError."""
        connection, streams = self._connection, self._streams
        if connection is None or streams is None or not connection.is_open:
            raise LinkError("the packet link is not connected")
        if not connection.has_stream_left:
            raise LinkError("the packet link carries as many streams as it may")
        return streams.open()

    async def prove(self, timeout_s: float) -> None:
        """Wait for a sign of life of the other end. Raises LinkError when none comes in time."""
        asked_at = time.monotonic()
        try:
            async with asyncio.timeout(timeout_s):
                while self._connection is None or self._connection.heard_at < asked_at:
                    if self._connection is not None:
                        self._connection.ping()
                    await asyncio.sleep(PROVE_POLL_SECONDS)
        except TimeoutError:
            raise LinkError(f"nothing came back on the packet link within {timeout_s:g} s") from None

    def _note_sent(self) -> None:
        """Remember since when an answer is due."""
        connection = self._connection
        # Only what decrypted counts as an answer: anybody can send to this socket.
        if connection is not None and (
            self._unanswered_since is None or connection.heard_at >= self._unanswered_since
        ):
            self._unanswered_since = time.monotonic()

    def probe(self, bind_id: bytes, candidates: Iterable[Address]) -> int:
        """Start probing the peer's candidates, which belong to one way; return how many may not be probed."""
        return self._ways[bind_id].probe((each.ip, each.port) for each in candidates)

    def local_candidates(self, bind_id: bytes) -> tuple[Address, ...]:
        """Return at most CANDIDATES_MAX addresses that the peer may try over one way."""
        return self._ways[bind_id].local_candidates()

    def network_changed(self) -> None:
        """This host has other addresses or another way out: find out anew what works."""
        for way in tuple(self._ways.values()):
            way.network_changed()

    def close(self, reason: Reason = Reason.CLOSED_BY_PEER) -> None:
        """Tell the other end and close; again is harmless."""
        if self.closed.done():
            return
        self.closed.set_result(reason)
        self._stop_waiting()
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.close(CLOSE_OK, reason.value)
        if self._endpoint is not None:
            self._endpoint.close()
        if self._introduce_timer is not None:
            self._introduce_timer.cancel()
        for way in self._ways.values():
            way.close()
        self.established.cancel()

    def _handler(self, connection: Connection) -> _LinkHandler:
        older, self._connection = self._connection, connection
        self._peer = connection.identity
        if older is not None:
            older.close(CLOSE_OK, Reason.PEER_GONE.value)
        self._stop_waiting()
        if not self.established.done():
            self.established.set_result(None)
        self._streams = QuicStreams(connection, self._note_sent, self.on_stream)
        return _LinkHandler(self, connection, self._streams)

    def _add_way(self, bind: ForwarderBind, probe_key: Secret) -> PathSwitch:
        bind_id = bytes(bind.bind_id)
        way = self._ways[bind_id] = PathSwitch(
            bind,
            probe_key,
            *self._hooks(bind_id),
            addresses=self._addresses,
            allow_private=self._allow_private,
        )
        return way

    def _hooks(
        self, bind_id: bytes
    ) -> tuple[Callable[[Sequence[tuple[bytes, SockAddr]]], None], Callable[[], None], Callable[[], None]]:
        """Return what a way calls."""
        return (
            partial(self._packets_received, bind_id),
            partial(self._path_changed, bind_id),
            lambda: self.candidates_changed(self, bind_id),
        )

    def _send_packets(self, packets: Sequence[tuple[bytes, SockAddr]]) -> None:
        self._carrying.send(packets)
        for bind_id in self._unheard:
            self._ways[bind_id].send(packets)

    def _introduce(self) -> None:
        """Have something to send while there are ways that were not heard."""
        self._introduce_timer = None
        if self._unheard and self._connection is not None:
            self._connection.ping()
            loop = asyncio.get_running_loop()
            self._introduce_timer = loop.call_later(INTRODUCE_SECONDS, self._introduce)

    def _packets_received(self, bind_id: bytes, packets: Sequence[tuple[bytes, SockAddr]]) -> None:
        endpoint, connection = self._endpoint, self._connection
        if endpoint is None:
            return
        if connection is None and self._stray is not None:
            heir = next(filter(None, map(self._stray, (data for data, _ in packets))), None)
            if heir is not None:
                heir._packets_received(bind_id, packets)
                return
        heard_at = connection.heard_at if connection is not None else 0.0
        if connection is None and isinstance(endpoint, Server):
            self.use(bind_id)  # a handshake is answered where it came from
        endpoint.packets_received([(data, self._address) for data, _ in packets])
        if connection is None or connection is not self._connection or connection.heard_at <= heard_at:
            return
        # What decrypts is the other end's own.
        if isinstance(endpoint, Server):
            self.use(bind_id)  # this is where the agent sends, and so where it can be reached
        elif bind_id in self._unheard:
            self._unheard.discard(bind_id)
            self.path_changed(self)

    def _path_changed(self, bind_id: bytes) -> None:
        if self._carrying.bind_id == bind_id:
            # What the old path owed says nothing of the new one, which may carry less: what fits is found out again.
            self._unanswered_since = None
            if self._connection is not None:
                self._connection.restart_path()
        self.path_changed(self)

    def _message_received(self, message: bytes) -> None:
        self.received_bytes += len(message)
        _RECEIVED.count += len(message)
        try:
            name, packet = split_service_packet(message)
            service = self._services.get(name)
            if service is None:
                service = self._learn(name)
        except (ProtocolError, BadName, UnicodeDecodeError):
            dropped(_WHERE, "malformed")
            return
        self._receive(self, service, packet)

    def _learn(self, name: bytes) -> ServiceName:
        service = ServiceName(name.decode("ascii"))
        if len(self._services) >= SERVICES_CACHED_MAX:
            self._services.clear()
        self._services[name] = service
        return service

    def _connection_lost(self, connection: Connection, reason: Reason) -> None:
        if connection is not self._connection:
            return
        self._connection = None
        if isinstance(self._endpoint, Server):
            self._wait()
        else:
            self.close(reason)

    def _wait(self) -> None:
        self._wait_timer = asyncio.get_running_loop().call_later(WAIT_SECONDS, self.close, Reason.PEER_GONE)

    def _stop_waiting(self) -> None:
        if self._wait_timer is not None:
            self._wait_timer.cancel()
            self._wait_timer = None


class _Carrying:
    """The packet path of a link's QUIC: whichever way carries."""

    def __init__(self, link: PacketLink) -> None:
        self._link = link

    def send(self, packets: Sequence[tuple[bytes, SockAddr]]) -> None:
        self._link._send_packets(packets)


class _LinkHandler:
    """Takes what one QUIC connection of a link brings."""

    def __init__(self, link: PacketLink, connection: Connection, streams: QuicStreams) -> None:
        self._link = link
        self._connection = connection
        self._streams = streams
        self._partial: dict[int, bytearray] = {}

    def datagram_received(self, data: bytes) -> None:
        self._link._message_received(data)

    def stream_data(self, stream_id: int, data: bytes, end: bool) -> None:
        """Hand on what comes on a stream, or collect a packet that was too large for a DATAGRAM.

        Raises ProtocolError for a stream that may not be.
        """
        if not stream_id & 2:  # RFC 9000 2.1: bidirectional
            if not self._streams.knows(stream_id) and not self._streams.may_be_accepted:
                raise ProtocolError("a bidirectional stream on a packet link")
            self._streams.data_received(stream_id, data, end)
            return
        message = self._partial.setdefault(stream_id, bytearray())
        message += data
        if len(message) > MESSAGE_BYTES_MAX:
            raise ProtocolError(f"a packet of more than {MESSAGE_BYTES_MAX} bytes")
        if end:
            del self._partial[stream_id]
            self._link._message_received(bytes(message))

    def peer_address_changed(self, address: tuple[str, int]) -> None:
        """Never: the path switch shows QUIC one address only."""

    def connection_closed(self, code: int, reason: str) -> None:
        self._streams.lost()
        self._link._connection_lost(self._connection, _reason(code, reason))


def _progress(way: PathSwitch, client: Client) -> object:
    return way.bound.done(), client.connection and client.connection.heard_at


def _reason(code: int, phrase: str) -> Reason:
    try:
        return Reason(phrase)
    except ValueError:
        return Reason.CLOSED_BY_PEER if code == CLOSE_OK and phrase else Reason.PEER_GONE


def _settings() -> Settings:
    return Settings(
        alpn=(ALPN,),
        udp_payload=UDP_PAYLOAD_BYTES,
        udp_payload_probe=UDP_PAYLOAD_PROBED_BYTES,
        ping_interval_s=PING_INTERVAL_SECONDS,
        half_open_max=HALF_OPEN_MAX,
        where=_WHERE,
    )
