"""One QUIC connection as its owner sees it: what may be sent, what was heard, when it is over.

Drives a ztna.quic_engine.Engine by calls, packets and timers for the endpoint (ztna.quic) that made it. Does not
route packets, does not know the socket, and does not know what datagrams and streams mean.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

from aioquic.quic import events
from aioquic.quic.packet import QuicFrameType

from ztna.errors import LinkError, ProtocolError, Refused
from ztna.identity import Identity
from ztna.quic_engine import (
    CONNECTION_WINDOW_BYTES,
    STREAM_WINDOW_BYTES,
    TRANSPORT_INTERNAL_ERROR,
    UDP_PAYLOAD_BYTES_MIN,
    Engine,
    bounded_phrase,
    close_code,
)
from ztna.reasons import Reason
from ztna.telemetry import DROPS, HANDSHAKES, logger, refused
from ztna.udp import SockAddr
from ztna.verdicts import Followed

STREAM_UNSENT_BYTES_MAX = 1024 * 1024
HANDSHAKE_SECONDS = 10.0
PAYLOAD_PROBES = 3
PAYLOAD_RAISE_SECONDS = 60.0
"""When a path that swallowed large packets, and still did as small ones came through, is asked for them again."""
TIMER_SLACK_SECONDS = 0.0005
TIMER_STEP_SECONDS = 0.000_001
ROUND_TRIPS_WAITING_MAX = 16

CLOSE_OK = 0x00
CLOSE_PROTOCOL_ERROR = 0x02
STATELESS_RESET = "stateless reset"

_log = logger(__name__)

Clock = Callable[[], float]
Packets = list[tuple[bytes, SockAddr]]


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
    """How an endpoint behaves. `where` labels its metrics and log lines; sizes are in bytes.

    `udp_payload_probe`, when set, is a larger UDP payload that is used once a probe of it was acknowledged.
    """

    alpn: tuple[str, ...]
    udp_payload: int
    ping_interval_s: float
    retry: bool = False
    half_open_max: int = 1000
    half_open_per_source: int = 250
    reset_key: bytes = b""
    idle_timeout_s: float = 30.0
    stream_window: int = STREAM_WINDOW_BYTES
    connection_window: int = CONNECTION_WINDOW_BYTES
    where: str = "quic"
    udp_payload_probe: int = 0


class Host(Protocol):
    """What a connection asks of its endpoint."""

    loop: asyncio.AbstractEventLoop
    settings: Settings
    clock: Clock

    def touch(self, connection: Connection) -> None:
        """Have the connection settled before the loop waits again."""

    def judge(self, chain: Sequence[bytes], alpn: str) -> Identity:
        """Return the peer's identity or raise Refused."""

    def established(self, connection: Connection) -> Handler:
        """Make the handler of a connection whose identity stands."""

    def ended(self, connection: Connection, *, was_open: bool, code: int, reason: str) -> None:
        """Hear that the connection is over."""

    def cid_issued(self, cid: bytes, connection: Connection) -> None:
        """Hear that the peer was told another CID."""

    def cid_retired(self, cid: bytes) -> None:
        """Hear that the peer will not use a CID again."""


class Connection:
    """One connection of an endpoint. `identity`, `alpn` and `peer_address` hold once a handler was made."""

    identity: Identity
    alpn: str

    def __init__(self, endpoint: Host, engine: Engine, address: SockAddr) -> None:
        self.peer_address = address
        self.closed: asyncio.Future[tuple[int, str]] = endpoint.loop.create_future()
        self.confirmed: asyncio.Future[None] = endpoint.loop.create_future()
        self.refusal: Refused | None = None
        """Why this end did not let the peer in, or did not let it stay."""
        self.followed: Followed | None = None
        self._endpoint = endpoint
        self._engine = engine
        self._handler: Handler | None = None
        self._began_at = endpoint.clock()
        self._ended: tuple[int, str] | None = None
        self._outgoing: Packets = []
        self._farewell: Packets = []
        self._late_packets = 0
        self._ping_numbers = itertools.count(1)  # 0 is `ping`, which nobody waits for
        self._round_trips: dict[int, asyncio.Future[None]] = {}
        self._paused: set[int] = set()
        self._held: dict[int, bytearray] = {}
        self._held_ends: set[int] = set()
        self._awaiting_room: dict[int, tuple[int, Callable[[], None]]] = {}
        self._timer: asyncio.Handle | None = None
        self._timer_at = float("inf")
        self._timer_due = False
        self._not_before = 0.0
        now = endpoint.clock()
        self.heard_at = now
        """When the peer's last genuine packet came, in seconds of the endpoint's clock."""
        self._handshake_until = now + HANDSHAKE_SECONDS
        self._tick_at = now + endpoint.settings.ping_interval_s
        self._probes_left = PAYLOAD_PROBES
        self._larger = endpoint.settings.udp_payload_probe
        self._raise_at = float("inf")
        self._was_narrow = False

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

    @property
    def udp_payload(self) -> int:
        """The largest UDP payload in bytes that is sent now."""
        return self._engine.udp_payload

    def send_datagram(self, data: bytes, lane: str = "") -> bool:
        """Queue a datagram; lanes take turns. False, and counted, when it is too large or one was given up for it."""
        if not self.is_open:
            return False
        where = self._endpoint.settings.where
        if len(data) > self._engine.datagram_limit:
            DROPS.labels(where, "datagram_too_large").inc()
            return False
        had_room = self._engine.queue_datagram(lane, data)
        if not had_room:
            DROPS.labels(where, "datagram_queue_full").inc()
        self._endpoint.touch(self)
        return had_room

    @property
    def rtt_s(self) -> float | None:
        """The smoothed round trip time in seconds, once one was measured."""
        return self._engine.rtt_s

    def ping(self) -> None:
        """Ask the peer for a sign of life: it acknowledges, and `heard_at` moves."""
        if self.is_open:
            self._engine.send_ping(0)
            self._endpoint.touch(self)

    async def round_trip(self) -> float:
        """Return in how many seconds the peer acknowledges a PING sent now. Raises LinkError when that cannot be."""
        if not self.is_open or len(self._round_trips) >= ROUND_TRIPS_WAITING_MAX:
            raise LinkError("the connection is closed" if not self.is_open else "too many pings wait")
        number = next(self._ping_numbers)
        acknowledged = self._round_trips[number] = self._endpoint.loop.create_future()
        sent_at = self._endpoint.clock()
        self._engine.send_ping(number)
        self._endpoint.touch(self)
        try:
            await acknowledged
        finally:
            self._round_trips.pop(number, None)
        return self._endpoint.clock() - sent_at

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

    def unsent_bytes(self, stream_id: int) -> int:
        """Return how many queued bytes of a stream the peer has not acknowledged."""
        return self._engine.unsent_bytes(stream_id)

    def await_room(self, stream_id: int, size: int, tell: Callable[[], None]) -> None:
        """Have `tell` called once when no more than so many bytes of a stream are unacknowledged."""
        self._awaiting_room[stream_id] = (size, tell)

    @property
    def has_stream_left(self) -> bool:
        """Whether the peer allows another bidirectional stream now."""
        return self._engine.bidirectional_streams_left > 0

    def pause_stream(self, stream_id: int) -> None:
        """Hold what arrives on a stream and give the peer no more credit for it: at most a window is held."""
        self._paused.add(stream_id)

    def resume_stream(self, stream_id: int) -> None:
        """Deliver what was held, soon, and go on."""
        self._paused.discard(stream_id)
        self._endpoint.touch(self)

    def use_udp_payload(self, size: int) -> None:
        """Send packets of at most this size from now on, on a way that carries them as far as is known."""
        self._larger = max(self._larger, size)
        self._engine.use_udp_payload(size)

    def restart_path(self) -> None:
        """Go back to the size every path carries, and probe again: the packets take another way now."""
        self._engine.use_udp_payload(self._endpoint.settings.udp_payload)
        if self.is_open and self._engine.is_confirmed:
            self._engine.path_changed(self._now())
        self._probes_left, self._raise_at = PAYLOAD_PROBES, float("inf")
        self._probe_payload()
        self._endpoint.touch(self)

    def close(self, code: int = CLOSE_OK, reason: str = "") -> None:
        """Close with an application code, after what was queued has had its chance."""
        if self.is_open:
            self._flush_engine()
            self._engine.close(error_code=code, reason_phrase=bounded_phrase(reason))
            self._endpoint.touch(self)

    def refuse(self, error: Refused) -> None:
        """Close as for a peer that is not let in: its certificate does not stand any more."""
        if self.is_open:
            self.refusal = error
            refused(self._endpoint.settings.where, error.reason)
            self._flush_engine()
            self._engine.close(close_code(error.reason), QuicFrameType.PADDING, str(error.reason))
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
        """Act on what was received, and on time, and return the packets to send."""
        if self._timer_due:
            self._timer_due = False
            self._act_on_time()
        if self._ended is None:
            self._act()
            if self._engine.is_in_black_hole:
                self._leave_black_hole()
            elif self._was_narrow and self._engine.has_carried:
                # A path that was dead looked the same: now that it carries anything, it may carry all.
                self._was_narrow, self._probes_left = False, PAYLOAD_PROBES
                self._probe_payload()
            sent = self._flush_engine()
            # The peer may use at once what it was just told: a CID without a route would be answered with a reset.
            self._act_on_events()
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
        HANDSHAKES.labels(self._endpoint.settings.where).observe(self._endpoint.clock() - self._began_at)

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
        self._act_on_events()
        for stream_id in [each for each in self._held if each not in self._paused]:
            self._guard(partial(self._release, stream_id))
        if self._awaiting_room:
            self._tell_room()
        if self._engine.is_confirmed and not self.confirmed.done() and self.is_open:
            self.confirmed.set_result(None)
            self._probe_payload()
        self._follow_address()

    def _tell_room(self) -> None:
        for stream_id, (size, tell) in tuple(self._awaiting_room.items()):
            if self._engine.unsent_bytes(stream_id) <= size:
                del self._awaiting_room[stream_id]
                tell()

    def _act_on_events(self) -> None:
        # What came before the peer's own close still counts; after a close of ours nothing does.
        while (event := self._engine.next_event()) is not None and not self._engine.is_close_pending:
            self._guard(partial(self._act_on, event))

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
        elif isinstance(event, events.PingAcknowledged):
            self._acknowledged(event.uid)
        elif self._handler is None:
            # Nothing of a peer is acted on before its identity stands (design.md 2.3).
            return
        elif isinstance(event, events.DatagramFrameReceived):
            self._handler.datagram_received(event.data)
        elif isinstance(event, events.StreamDataReceived):
            self._stream_event(event)
        elif isinstance(event, events.StreamReset | events.StopSendingReceived):
            raise ProtocolError(f"stream {event.stream_id} reset, which no protocol here does")

    def _acknowledged(self, number: int) -> None:
        waiting = self._round_trips.get(number)
        if waiting is not None and not waiting.done():
            waiting.set_result(None)

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
        for waiting in self._round_trips.values():
            if not waiting.done():
                waiting.set_exception(LinkError(f"the connection ended: {reason}"))
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
        # Thousands may be due at once: what follows is done in `settle`, a slice at a time.
        self._timer = None
        self._timer_due = True
        self._endpoint.touch(self)

    def _act_on_time(self) -> None:
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

    def _leave_black_hole(self) -> None:
        """Send no larger packets than every path carries (RFC 8899 5.3.3).

        Larger ones are tried again once these arrive, and, when they get lost again, much later.
        """
        _log.info("path_narrow", where=self._endpoint.settings.where, udp_payload=self._engine.udp_payload)
        now = self._now()
        self._engine.use_udp_payload(UDP_PAYLOAD_BYTES_MIN)
        self._engine.path_changed(now)
        self._was_narrow, self._probes_left, self._raise_at = True, 0, now + PAYLOAD_RAISE_SECONDS

    def _probe_payload(self) -> None:
        larger = self._larger
        if larger > self._engine.udp_payload and self._probes_left and self._engine.is_confirmed:
            self._probes_left -= 1
            self._engine.probe_udp_payload(larger)

    def _tick(self, now: float) -> None:
        self._tick_at = now + self._endpoint.settings.ping_interval_s
        if self._handler is None:
            return
        self._engine.send_ping(0)
        if now >= self._raise_at:
            self._probes_left, self._raise_at = PAYLOAD_PROBES, float("inf")
        self._probe_payload()
