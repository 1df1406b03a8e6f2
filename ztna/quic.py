"""The one QUIC driver: servers and clients on a packet path, both ends authenticated, everything bounded.

The owner of a path hands in batches of received packets; each batch ends in one transmission. A `Handler` is
made only after the peer's identity stands. Does not know what datagrams and streams mean. Source: protocol.md.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from ssl import CERT_NONE
from typing import Protocol

from aioquic._buffer import Buffer
from aioquic.quic import events
from aioquic.quic.configuration import SMALLEST_MAX_DATAGRAM_SIZE, QuicConfiguration
from aioquic.quic.packet import (
    QuicFrameType,
    QuicPacketType,
    QuicProtocolVersion,
    encode_quic_retry,
    encode_quic_version_negotiation,
    pull_quic_header,
)
from aioquic.quic.retry import QuicRetryTokenHandler

from ztna.credentials import Credentials
from ztna.errors import LinkError, ProtocolError, Refused
from ztna.identity import Identity, Usage
from ztna.quic_engine import (
    CID_BYTES,
    CONNECTION_WINDOW_BYTES,
    DATAGRAM_FRAME_BYTES_MAX,
    RESET_TOKEN_BYTES,
    STREAM_WINDOW_BYTES,
    TRANSPORT_INTERNAL_ERROR,
    Engine,
    bounded_phrase,
    new_cid,
    reset_token,
)
from ztna.reasons import Reason
from ztna.telemetry import DROPS, logger, refused
from ztna.udp import SockAddr

DATAGRAM_QUEUE_MAX = 1000
STREAM_UNSENT_BYTES_MAX = 1024 * 1024
HANDSHAKE_SECONDS = 10.0
CLOSED_KEPT_SECONDS = 3.0
CLOSE_SLICE_CONNECTIONS = 50
RESETS_PER_SECOND = 200
TIMER_SLACK_SECONDS = 0.0005
TIMER_STEP_SECONDS = 0.000_001
RESET_KEY_BYTES = 32

CLOSE_OK = 0x00
CLOSE_PROTOCOL_ERROR = 0x02
SHUTTING_DOWN = "server shutting down"
STATELESS_RESET = "stateless reset"

_RESET_PACKET_BYTES_MIN = 5 + RESET_TOKEN_BYTES
_RESET_PACKET_BYTES_MAX = 42
_VERSIONS = [QuicProtocolVersion.VERSION_1]

_log = logger(__name__)

Clock = Callable[[], float]
WallClock = Callable[[], datetime]
Packets = list[tuple[bytes, SockAddr]]


class PacketPath(Protocol):
    """What carries the packets: a UdpSocket, or a link's path switch."""

    def send(self, packets: Sequence[tuple[bytes, SockAddr]]) -> None:
        """Send without waiting; what cannot be sent is lost."""


class Handler(Protocol):
    """What a connection's owner makes of it. A ProtocolError it raises closes the connection with 0x02."""

    def datagram_received(self, data: bytes) -> None:
        """Take one DATAGRAM."""

    def stream_data(self, stream_id: int, data: bytes, end: bool) -> None:
        """Take the next bytes of a stream."""

    def peer_address_changed(self, address: SockAddr) -> None:
        """Hear that the peer has moved and proved its new address."""

    def connection_closed(self, code: int, reason: str) -> None:
        """Hear once that the connection is over, by whichever end."""


@dataclass(frozen=True, slots=True)
class Settings:
    """How an endpoint behaves. `where` labels its metrics and log lines; sizes are in bytes."""

    alpn: tuple[str, ...]
    udp_payload: int
    ping_interval_s: float
    retry: bool = False
    half_open_max: int = 1000
    reset_key: bytes = b""
    idle_timeout_s: float = 30.0
    stream_window: int = STREAM_WINDOW_BYTES
    connection_window: int = CONNECTION_WINDOW_BYTES
    where: str = "quic"


def _wall_clock() -> datetime:
    return datetime.now(UTC)


class Connection:
    """One connection of an endpoint. `identity`, `alpn` and `peer_address` hold once a handler was made."""

    identity: Identity
    alpn: str

    def __init__(self, endpoint: _Endpoint, engine: Engine, address: SockAddr) -> None:
        self.peer_address = address
        self.closed: asyncio.Future[tuple[int, str]] = endpoint.loop.create_future()
        self.confirmed: asyncio.Future[None] = endpoint.loop.create_future()
        self.refusal: Refused | None = None
        self._endpoint = endpoint
        self._engine = engine
        self._handler: Handler | None = None
        self._ended: tuple[int, str] | None = None
        self._outgoing: Packets = []
        self._farewell: Packets = []
        self._late_packets = 0
        self._paused: set[int] = set()
        self._held: dict[int, bytearray] = {}
        self._held_ends: set[int] = set()
        self._timer: asyncio.Handle | None = None
        self._timer_at = float("inf")
        self._not_before = 0.0
        now = endpoint.clock()
        self.heard_at = now
        """When the peer's last genuine packet came, in seconds of the endpoint's clock."""
        self._handshake_until = now + HANDSHAKE_SECONDS
        self._tick_at = now + endpoint.settings.ping_interval_s

    def __repr__(self) -> str:
        name = self.identity.name if self._handler else "?"
        return f"<Connection {name} at {self.peer_address[0]}:{self.peer_address[1]}>"

    @property
    def is_open(self) -> bool:
        """Whether it can still send."""
        return self._ended is None and self._engine.close_event is None

    @property
    def datagram_limit(self) -> int:
        """The largest datagram in bytes that fits a packet now."""
        return self._engine.datagram_limit

    def send_datagram(self, data: bytes) -> bool:
        """Queue a datagram. False, and counted, when it is too large or an older one was dropped for it."""
        if not self.is_open:
            return False
        where = self._endpoint.settings.where
        if len(data) > self._engine.datagram_limit:
            DROPS.labels(where, "datagram_too_large").inc()
            return False
        overflow = self._engine.datagrams_queued >= DATAGRAM_QUEUE_MAX
        if overflow:
            self._engine.drop_oldest_datagram()
            DROPS.labels(where, "datagram_queue_full").inc()
        self._engine.send_datagram_frame(data)
        self._endpoint.touch(self)
        return not overflow

    @property
    def blocked_streams(self) -> int:
        """How many unidirectional streams wait until the peer allows more: the owner bounds them."""
        return self._engine.unidirectional_streams_blocked

    def open_stream(self, unidirectional: bool = False) -> int:
        """Return the id of a new stream; it exists for the peer from its first data."""
        stream_id = self._engine.get_next_available_stream_id(is_unidirectional=unidirectional)
        self._engine.send_stream_data(stream_id, b"")
        return stream_id

    def send_stream(self, stream_id: int, data: bytes, end: bool = False) -> bool:
        """Queue bytes on a stream. False, and nothing queued, past STREAM_UNSENT_BYTES_MAX unacknowledged."""
        if not self.is_open:
            return False
        if self._engine.is_send_stopped(stream_id):
            return False
        if self._engine.unsent_bytes(stream_id) + len(data) > STREAM_UNSENT_BYTES_MAX:
            DROPS.labels(self._endpoint.settings.where, "stream_buffer_full").inc()
            return False
        self._engine.send_stream_data(stream_id, data, end)
        self._endpoint.touch(self)
        return True

    def pause_stream(self, stream_id: int) -> None:
        """Hold what arrives on a stream and give the peer no more credit for it: at most a window is held."""
        self._paused.add(stream_id)

    def resume_stream(self, stream_id: int) -> None:
        """Deliver what was held, soon, and go on."""
        self._paused.discard(stream_id)
        self._endpoint.touch(self)

    def close(self, code: int = CLOSE_OK, reason: str = "") -> None:
        """Close with an application code, after what was queued has had its chance."""
        if self.is_open:
            self._flush_engine()
            self._engine.close(error_code=code, reason_phrase=bounded_phrase(reason))
            self._endpoint.touch(self)

    # For the endpoint.

    def receive(self, data: bytes, address: SockAddr, now: float) -> None:
        """Take one packet; what follows from it happens in `settle`."""
        if self._ended is not None:
            self._answer_late()
            return
        if self._engine.close_event is not None:
            return
        if not data[0] & 0x80 and self._engine.is_reset(data):
            self._end(CLOSE_OK, STATELESS_RESET)
            return
        idle_until = self._engine.idle_until
        try:
            self._engine.receive_datagram(data, address, now)
        except Exception as error:
            # aioquic lets a few malformed inputs out as assertions and lookups; the peer that sent one is gone.
            self._fail(error)
        if self._engine.idle_until != idle_until:
            # Only a packet that was genuine moves it: what a stranger sends says nothing of the peer.
            self.heard_at = now

    def settle(self) -> Packets:
        """Act on what was received and return the packets to send."""
        if self._ended is None:
            self._act()
            sent = self._flush_engine()
            closing = self._engine.close_event
            if closing is None:
                self._arm()
            elif self._ended is None:
                # Once a close is pending the engine sends nothing but that.
                self._farewell = sent
                self._end(*closing)
        packets, self._outgoing = self._outgoing, []
        return packets

    def judge(self, chain: Sequence[bytes], alpn: str) -> None:
        """Decide on the peer; raises Refused. Called by the engine before it can read any 1-RTT packet."""
        try:
            self.identity = self._endpoint.judge(chain, alpn)
            self.alpn = alpn
        except Refused as error:
            self.refusal = error
            refused(self._endpoint.settings.where, error.reason)
            raise

    def _now(self) -> float:
        return max(self._endpoint.clock(), self._not_before)

    def _flush_engine(self) -> Packets:
        try:
            sent = self._engine.datagrams_to_send(self._now())
        except Exception as error:
            # As in `receive`: what a peer can provoke in aioquic costs that peer its connection, nothing else.
            self._count_failure(error)
            self._end(TRANSPORT_INTERNAL_ERROR, "engine failed")
            return []
        self._outgoing += sent
        return sent

    def _act(self) -> None:
        # What came before the peer's own close still counts; after a close of ours nothing does.
        while (event := self._engine.next_event()) is not None and not self._engine.is_close_pending:
            self._guard(partial(self._act_on, event))
        for stream_id in [each for each in self._held if each not in self._paused]:
            self._guard(partial(self._release, stream_id))
        if self._engine.is_confirmed and not self.confirmed.done() and self.is_open:
            self.confirmed.set_result(None)
        self._follow_address()

    def _guard(self, action: Callable[[], None]) -> None:
        """Do something with the peer's input; what its owner calls malformed ends the connection."""
        try:
            action()
        except ProtocolError as error:
            refused(self._endpoint.settings.where, Reason.MALFORMED)
            self.close(CLOSE_PROTOCOL_ERROR, str(error))

    def _act_on(self, event: events.QuicEvent) -> None:
        if isinstance(event, events.HandshakeCompleted):
            self._handler = self._endpoint.established(self)
        elif isinstance(event, events.ConnectionIdIssued):
            self._endpoint.cid_issued(event.connection_id, self)
        elif isinstance(event, events.ConnectionIdRetired):
            self._endpoint.cid_retired(event.connection_id)
        elif self._handler is None:
            # Nothing of a peer is acted on before its identity stands (design.md 2.3).
            return
        elif isinstance(event, events.DatagramFrameReceived):
            self._handler.datagram_received(event.data)
        elif isinstance(event, events.StreamDataReceived):
            self._stream_event(event)
        elif isinstance(event, events.StreamReset | events.StopSendingReceived):
            raise ProtocolError(f"stream {event.stream_id} reset, which no protocol here does")

    def _stream_event(self, event: events.StreamDataReceived) -> None:
        stream_id = event.stream_id
        if stream_id not in self._paused and stream_id not in self._held:
            self._deliver(stream_id, event.data, event.end_stream)
            return
        held = self._held.setdefault(stream_id, bytearray())
        held += event.data
        self._engine.held_bytes[stream_id] = len(held)
        if event.end_stream:
            self._held_ends.add(stream_id)

    def _release(self, stream_id: int) -> None:
        held = self._held.pop(stream_id)
        self._engine.held_bytes.pop(stream_id, None)
        end = stream_id in self._held_ends
        self._held_ends.discard(stream_id)
        if self.is_open:
            self._deliver(stream_id, bytes(held), end)

    def _deliver(self, stream_id: int, data: bytes, end: bool) -> None:
        if self._handler is not None:
            self._handler.stream_data(stream_id, data, end)

    def _follow_address(self) -> None:
        if self._handler is None or not self.is_open:
            return
        address = self._engine.validated_address
        if address is not None and address != self.peer_address:
            self.peer_address = address
            self._handler.peer_address_changed(address)

    def _answer_late(self) -> None:
        # RFC 9000 10.2.1: a closing endpoint repeats its close, ever more rarely.
        self._late_packets += 1
        if self._late_packets & (self._late_packets - 1) == 0:
            self._outgoing += self._farewell

    def _fail(self, error: Exception) -> None:
        self._count_failure(error)
        self._engine.close(error_code=TRANSPORT_INTERNAL_ERROR, frame_type=QuicFrameType.PADDING)

    def _count_failure(self, error: Exception) -> None:
        where = self._endpoint.settings.where
        DROPS.labels(where, "malformed").inc()
        _log.warning(
            "malformed_packet", where=where, peer=repr(self), error=f"{type(error).__name__}: {error}"
        )

    def _end(self, code: int, reason: str) -> None:
        self._ended = (code, reason)
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._held.clear()
        self._held_ends.clear()
        self._endpoint.ended(self, was_open=self._handler is not None, code=code, reason=reason)
        if not self.confirmed.done():
            self.confirmed.cancel()
        self.closed.set_result((code, reason))
        if self._handler is not None:
            self._handler.connection_closed(code, reason)

    def _arm(self) -> None:
        engine_at = self._engine.get_timer()
        at = self._tick_at if engine_at is None else min(engine_at, self._tick_at)
        if self._handler is None:
            at = min(at, self._handshake_until)
        if self._timer is not None:
            if self._timer_at <= at:
                return
            self._timer.cancel()
        self._timer_at = at
        # uvloop's timers tick in milliseconds and aioquic's pacer asks for less: round up to now, not to the
        # next tick, or the timer and not the CPU caps a flow.
        delay = at - self._endpoint.clock()
        loop = self._endpoint.loop
        soon = delay <= TIMER_SLACK_SECONDS
        self._timer = loop.call_soon(self._on_timer) if soon else loop.call_later(delay, self._on_timer)

    def _on_timer(self) -> None:
        self._timer = None
        if self._ended is not None:
            return
        now = self._now()
        engine_at = self._engine.get_timer()
        if engine_at is not None and engine_at <= now + TIMER_SLACK_SECONDS:
            # At exactly get_timer() the timer may not clear: step past it.
            now = self._not_before = max(now, engine_at + TIMER_STEP_SECONDS)
            self._engine.handle_timer(now)
        if self._handler is None and now >= self._handshake_until:
            self._engine.close(TRANSPORT_INTERNAL_ERROR, QuicFrameType.PADDING, "handshake took too long")
        if now >= self._tick_at:
            self._tick(now)
        self._endpoint.touch(self)

    def _tick(self, now: float) -> None:
        self._tick_at = now + self._endpoint.settings.ping_interval_s
        if self._handler is None:
            return
        self._engine.send_ping(0)
        if not self.identity.valid_at(self._endpoint.wall()):
            refused(self._endpoint.settings.where, Reason.EXPIRED)
            self._engine.close(TRANSPORT_INTERNAL_ERROR, QuicFrameType.PADDING, str(Reason.EXPIRED))


class _Endpoint:
    """What servers and clients share: connections that have something to do, and one send for all of them."""

    def __init__(
        self,
        path: PacketPath,
        credentials: Credentials,
        settings: Settings,
        factory: Callable[[Connection], Handler],
        clock: Clock,
        wall: WallClock,
    ) -> None:
        self.loop = asyncio.get_running_loop()
        self.settings = settings
        self.clock = clock
        self.wall = wall
        self.credentials = credentials
        self._path = path
        self._factory = factory
        self._dirty: dict[Connection, None] = {}
        self._flush_handle: asyncio.Handle | None = None
        self._flushing = False
        self._reset_key = settings.reset_key or os.urandom(RESET_KEY_BYTES)

    def touch(self, connection: Connection) -> None:
        """Have the connection settled before the loop waits again."""
        self._dirty[connection] = None
        if self._flush_handle is None and not self._flushing:
            self._flush_handle = self.loop.call_soon(self._flush)

    def judge(self, chain: Sequence[bytes], alpn: str) -> Identity:
        """Return the peer's identity or raise Refused."""
        raise NotImplementedError

    def established(self, connection: Connection) -> Handler:
        """Make the handler of a connection whose identity stands."""
        host, port = connection.peer_address
        _log.info(
            "connection_opened",
            where=self.settings.where,
            peer=connection.identity.name,
            address=f"{host}:{port}",
            alpn=connection.alpn,
        )
        return self._factory(connection)

    def ended(self, connection: Connection, *, was_open: bool, code: int, reason: str) -> None:
        """Log the end of a connection."""
        host, port = connection.peer_address
        _log.info(
            "connection_ended" if was_open else "connection_refused",
            where=self.settings.where,
            peer=connection.identity.name if was_open else "",
            address=f"{host}:{port}",
            code=code,
            reason=reason,
            detail=connection.refusal.detail if connection.refusal else "",
        )

    def cid_issued(self, cid: bytes, connection: Connection) -> None:
        """Hear that the peer was told another CID."""

    def cid_retired(self, cid: bytes) -> None:
        """Hear that the peer will not use a CID again."""

    def _flush(self) -> None:
        if self._flushing:
            # A handler came back in here: the round that goes on takes everything along.
            return
        self._flushing = True
        packets: Packets = []
        try:
            while self._dirty:
                connection = next(iter(self._dirty))
                del self._dirty[connection]
                packets += connection.settle()
        finally:
            self._flushing = False
            if self._flush_handle is not None:
                self._flush_handle.cancel()
            self._flush_handle = self.loop.call_soon(self._flush) if self._dirty else None
            if packets:
                self._path.send(packets)

    def _configuration(self, *, is_client: bool, server_name: str | None = None) -> QuicConfiguration:
        chain = self.credentials.chain
        settings = self.settings
        return QuicConfiguration(
            alpn_protocols=list(settings.alpn),
            connection_id_length=CID_BYTES,
            idle_timeout=settings.idle_timeout_s,
            is_client=is_client,
            max_data=settings.connection_window,
            max_stream_data=settings.stream_window,
            max_datagram_size=settings.udp_payload,
            max_datagram_frame_size=DATAGRAM_FRAME_BYTES_MAX,
            certificate=chain[0],
            certificate_chain=chain[1:],
            private_key=self.credentials.key,
            server_name=server_name,
            supported_versions=list(_VERSIONS),
            # Left to aioquic this trusts public roots and ignores clients: Trust judges both ends instead.
            verify_mode=CERT_NONE,
        )


class Server(_Endpoint):
    """Accepts connections on a path. No tickets, no 0-RTT: every client shows its certificate every time."""

    def __init__(
        self,
        path: PacketPath,
        credentials: Credentials,
        settings: Settings,
        *,
        admit: Callable[[Identity, str], None],
        factory: Callable[[Connection], Handler],
        clock: Clock = time.monotonic,
        wall: WallClock = _wall_clock,
    ) -> None:
        """`admit(identity, alpn)` raises Refused for a peer that verified but may not come in here."""
        super().__init__(path, credentials, settings, factory, clock, wall)
        self._admit = admit
        self._routes: dict[bytes, Connection] = {}
        self._cids: dict[Connection, set[bytes]] = {}
        self._open: dict[Connection, None] = {}
        self._half_open = 0
        self._buried: deque[tuple[float, Connection]] = deque()
        self._burial_timer: asyncio.Handle | None = None
        self._retry = QuicRetryTokenHandler() if settings.retry else None
        self._accepting = True
        self._resets_left = RESETS_PER_SECOND
        self._resets_second = 0
        self._config = self._configuration(is_client=False)

    @property
    def connections(self) -> tuple[Connection, ...]:
        """The connections whose identity stands."""
        return tuple(self._open)

    @property
    def half_open(self) -> int:
        """How many handshakes are going on."""
        return self._half_open

    def use_credentials(self, credentials: Credentials) -> None:
        """Show and believe these from the next connection on; existing ones stay."""
        self.credentials = credentials
        self._config = self._configuration(is_client=False)

    def packets_received(self, packets: Sequence[tuple[bytes, SockAddr]]) -> None:
        """Take a batch of packets and answer with one transmission."""
        now = self.clock()
        for data, address in packets:
            connection = self._route(data, address)
            if connection is not None:
                connection.receive(data, address, now)
                self._dirty[connection] = None
        self._flush()

    async def close_all(self, code: int = CLOSE_OK, reason: str = SHUTTING_DOWN) -> None:
        """Accept nobody any more and close every connection, a slice at a time so that the loop stays alive."""
        self._accepting = False
        connections = list(self._cids)
        for start in range(0, len(connections), CLOSE_SLICE_CONNECTIONS):
            for connection in connections[start : start + CLOSE_SLICE_CONNECTIONS]:
                connection.close(code, reason)
            self._flush()
            await asyncio.sleep(0)

    def close(self) -> None:
        """Close every connection at once and forget them; the path stays the owner's."""
        self._accepting = False
        for connection in list(self._cids):
            connection.close(CLOSE_OK, SHUTTING_DOWN)
        self._flush()
        if self._burial_timer is not None:
            self._burial_timer.cancel()
            self._burial_timer = None
        self._buried.clear()
        self._routes.clear()
        self._cids.clear()

    def judge(self, chain: Sequence[bytes], alpn: str) -> Identity:
        """Verify a client's chain and ask the owner whether it may come in."""
        identity = _verify(self.credentials, chain, "client", self.wall())
        self._admit(identity, alpn)
        return identity

    def established(self, connection: Connection) -> Handler:
        """Count the connection as open and make its handler."""
        self._half_open -= 1
        self._open[connection] = None
        return super().established(connection)

    def ended(self, connection: Connection, *, was_open: bool, code: int, reason: str) -> None:
        """Keep its CIDs for a moment, for packets that are still under way, then forget them."""
        if connection in self._open:
            del self._open[connection]
        else:
            self._half_open -= 1
        super().ended(connection, was_open=was_open, code=code, reason=reason)
        self._buried.append((self.clock() + CLOSED_KEPT_SECONDS, connection))
        if self._burial_timer is None:
            self._burial_timer = self.loop.call_later(CLOSED_KEPT_SECONDS, self._bury)

    def cid_issued(self, cid: bytes, connection: Connection) -> None:
        """Route another CID to the connection."""
        self._routes[cid] = connection
        self._cids[connection].add(cid)

    def cid_retired(self, cid: bytes) -> None:
        """Stop routing a CID."""
        connection = self._routes.pop(cid, None)
        if connection is not None:
            self._cids[connection].discard(cid)

    def _bury(self) -> None:
        self._burial_timer = None
        now = self.clock()
        while self._buried and self._buried[0][0] <= now + TIMER_SLACK_SECONDS:
            _, connection = self._buried.popleft()
            for cid in self._cids.pop(connection, ()):
                self._routes.pop(cid, None)
        if self._buried:
            self._burial_timer = self.loop.call_later(max(0.0, self._buried[0][0] - now), self._bury)

    def _route(self, data: bytes, address: SockAddr) -> Connection | None:
        if len(data) < 1 + CID_BYTES:
            return self._dropped("too_short")
        if data[0] & 0x80:
            connection = self._routes.get(data[6 : 6 + data[5]])
            return connection or self._accept(data, address)
        cid = data[1 : 1 + CID_BYTES]
        connection = self._routes.get(cid)
        if connection is None:
            self._send_reset(cid, len(data), address)
        return connection

    def _accept(self, data: bytes, address: SockAddr) -> Connection | None:
        if len(data) < SMALLEST_MAX_DATAGRAM_SIZE:
            return self._dropped("unknown_cid")
        try:
            header = pull_quic_header(Buffer(data=data), host_cid_length=CID_BYTES)
        except ValueError:
            return self._dropped("malformed")
        if header.version is None or header.packet_type is QuicPacketType.VERSION_NEGOTIATION:
            return self._dropped("malformed")
        if header.version not in _VERSIONS:
            offer = encode_quic_version_negotiation(
                header.destination_cid, header.source_cid, list(_VERSIONS)
            )
            self._path.send([(offer, address)])
            return None
        if header.packet_type is not QuicPacketType.INITIAL:
            return self._dropped("unknown_cid")
        if not self._accepting or self._half_open >= self.settings.half_open_max:
            refused(self.settings.where, Reason.LIMIT_REACHED if self._accepting else Reason.DRAINING)
            return None
        original, retried = header.destination_cid, None
        if self._retry is not None:
            if not header.token:
                self._send_retry(header.version, header.destination_cid, header.source_cid, address)
                return None
            try:
                original = self._retry.validate_token(
                    address=address,
                    destination_cid=header.destination_cid,
                    token=header.token,
                    now=self.clock(),
                )
            except ValueError:
                return self._dropped("bad_retry_token")
            retried = header.destination_cid
        return self._create(header.destination_cid, original, retried, address)

    def _create(self, cid: bytes, original: bytes, retried: bytes | None, address: SockAddr) -> Connection:
        connection: Connection

        def judge(chain: Sequence[bytes], alpn: str) -> None:
            connection.judge(chain, alpn)

        engine = Engine(self._config, judge, self._reset_key, original_cid=original, retry_cid=retried)
        connection = Connection(self, engine, address)
        self._half_open += 1
        self._cids[connection] = {cid, *engine.local_cids}
        for each in self._cids[connection]:
            self._routes[each] = connection
        return connection

    def _send_retry(self, version: int, original: bytes, peer_cid: bytes, address: SockAddr) -> None:
        assert self._retry is not None
        cid = new_cid()
        token = self._retry.create_token(
            address=address,
            original_destination_connection_id=original,
            retry_source_connection_id=cid,
            now=self.clock(),
        )
        self._path.send([(encode_quic_retry(version, cid, peer_cid, original, token), address)])

    def _send_reset(self, cid: bytes, received_bytes: int, address: SockAddr) -> None:
        second = int(self.clock())
        if second != self._resets_second:
            self._resets_second, self._resets_left = second, RESETS_PER_SECOND
        # RFC 9000 10.3.3: smaller than what it answers, so that two endpoints cannot keep each other busy.
        size = min(received_bytes - 1, _RESET_PACKET_BYTES_MAX)
        if size < _RESET_PACKET_BYTES_MIN or self._resets_left == 0:
            self._dropped("unknown_cid")
            return
        self._resets_left -= 1
        noise = os.urandom(size - RESET_TOKEN_BYTES)
        packet = bytes((noise[0] & 0x3F | 0x40,)) + noise[1:] + reset_token(self._reset_key, cid)
        DROPS.labels(self.settings.where, "unknown_cid").inc()
        self._path.send([(packet, address)])

    def _dropped(self, why: str) -> Connection | None:
        DROPS.labels(self.settings.where, why).inc()
        return None


class Client(_Endpoint):
    """One connection to a server on a path."""

    def __init__(
        self,
        path: PacketPath,
        address: SockAddr,
        server_name: str,
        credentials: Credentials,
        settings: Settings,
        *,
        check: Callable[[Identity], None],
        factory: Callable[[Connection], Handler],
        clock: Clock = time.monotonic,
        wall: WallClock = _wall_clock,
    ) -> None:
        """`check(identity)` raises Refused for a server that verified but is not the one that was meant."""
        super().__init__(path, credentials, settings, factory, clock, wall)
        self._address = address
        self._server_name = server_name
        self._check = check
        self._connection: Connection | None = None

    @property
    def connection(self) -> Connection | None:
        """The connection, once `connect` was called."""
        return self._connection

    async def connect(self, timeout_s: float) -> Connection:
        """Connect and return when both ends have accepted each other.

        Raises Refused (IdentityError for a bad certificate) when the server is not to be trusted, and LinkError
        when it refused us, does not answer within `timeout_s`, or the connection broke.
        """
        if self._connection is not None:
            raise LinkError(f"{self._server_name}: a client connects once")
        connection = self._connection = self._start()
        try:
            async with asyncio.timeout(timeout_s):
                await asyncio.wait(
                    (connection.confirmed, connection.closed), return_when=asyncio.FIRST_COMPLETED
                )
        except TimeoutError:
            connection.close()
            raise LinkError(f"{self._target} does not answer ({timeout_s:g} s)") from None
        except asyncio.CancelledError:
            connection.close()
            raise
        if connection.refusal is not None:
            raise connection.refusal
        if connection.closed.done():
            code, reason = connection.closed.result()
            raise LinkError(f"{self._target} closed the connection: {reason or f'code 0x{code:x}'}")
        return connection

    def packets_received(self, packets: Sequence[tuple[bytes, SockAddr]]) -> None:
        """Take a batch of packets and answer with one transmission."""
        if self._connection is None:
            return
        now = self.clock()
        for data, address in packets:
            if data:
                self._connection.receive(data, address, now)
        self._dirty[self._connection] = None
        self._flush()

    def close(self, code: int = CLOSE_OK, reason: str = "") -> None:
        """Close the connection, if any, at once; the path stays the owner's."""
        if self._connection is not None:
            self._connection.close(code, reason)
            self._flush()

    def judge(self, chain: Sequence[bytes], alpn: str) -> Identity:
        """Verify the server's chain and ask the owner whether it is the one that was meant."""
        identity = _verify(self.credentials, chain, "server", self.wall())
        self._check(identity)
        return identity

    @property
    def _target(self) -> str:
        return f"{self._server_name} at {self._address[0]}:{self._address[1]}"

    def _start(self) -> Connection:
        connection: Connection

        def judge(chain: Sequence[bytes], alpn: str) -> None:
            connection.judge(chain, alpn)

        config = self._configuration(is_client=True, server_name=self._server_name)
        engine = Engine(config, judge, self._reset_key)
        connection = Connection(self, engine, self._address)
        engine.connect(self._address, self.clock())
        self.touch(connection)
        return connection


def _verify(credentials: Credentials, chain: Sequence[bytes], usage: Usage, now: datetime) -> Identity:
    return credentials.trust.verify(chain, usage, now)
