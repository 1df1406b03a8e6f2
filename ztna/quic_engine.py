"""aioquic's QuicConnection with what it lacks: clients are authenticated, credit is bounded, CIDs are ours.

Everything that touches aioquic's private parts is here, each with its reason; the version is pinned for it.
Still a state machine (calls, packets and timers in; packets and events out): no socket, no clock, no task.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import os
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from aioquic import tls
from aioquic._buffer import Buffer
from aioquic.quic.configuration import QuicConfiguration
from aioquic.quic.congestion.base import register_congestion_control
from aioquic.quic.congestion.reno import RenoCongestionControl
from aioquic.quic.connection import (
    CONNECTION_LIMIT_FRAME_CAPACITY,
    MAX_STREAM_DATA_FRAME_CAPACITY,
    QuicConnection,
    QuicConnectionError,
    QuicConnectionId,
    QuicReceiveContext,
)
from aioquic.quic.packet import QuicErrorCode, QuicFrameType, QuicPacketType
from aioquic.quic.packet_builder import QuicDeliveryState, QuicPacketBuilder, QuicSentPacket
from aioquic.quic.recovery import QuicPacketPacer, QuicPacketSpace
from aioquic.quic.stream import QuicStream
from cryptography.hazmat.primitives.serialization import Encoding

from ztna.errors import Refused
from ztna.fair_queue import FairQueue
from ztna.reasons import Reason

CONGESTION_CONTROL = "ztna-reno"
UDP_PAYLOAD_BYTES_MIN = 1200
"""What every path carries (RFC 9000 14)."""
LARGE_LOST_MAX = 6
"""So many larger packets lost in a row, and none that came: the path does not carry them (RFC 8899 4.3)."""
BURST_PACKETS = (2, 16)
"""What the pacer lets go at once: at least, and at most (RFC 9002 7.7), a quarter of the window between them."""
CID_BYTES = 20
RESET_TOKEN_BYTES = 16
DATAGRAM_FRAME_BYTES_MAX = 65536
DATAGRAM_OVERHEAD_BYTES = 24
DATAGRAM_QUEUE_MAX = 1000
STREAM_WINDOW_BYTES = 256 * 1024
CONNECTION_WINDOW_BYTES = 1024 * 1024
CLOSE_PHRASE_BYTES = 160
CRYPTO_BYTES_MAX = 64 * 1024
"""What a peer may say in a handshake: its certificates, six at most, are all that is long."""
CRYPTO_FRAGMENTS_MAX = 64
STREAM_FRAGMENTS_MAX = 256
"""Pieces with gaps between them: one for each packet lost in a window. Each frame costs a look at all of them."""

TRANSPORT_INTERNAL_ERROR = 0x01
TRANSPORT_UNTRUSTED = QuicErrorCode.CRYPTO_ERROR + tls.AlertDescription.unknown_ca

Judge = Callable[[Sequence[bytes], str], None]
"""Takes the presented chain (DER, leaf first) and the ALPN; raises Refused when the peer may not come in."""

# It logs a warning for every malformed packet of any stranger; what matters is counted and logged by us.
logging.getLogger("quic").setLevel(logging.CRITICAL)


def new_cid() -> bytes:
    """Return a connection id of ours: 20 bytes, the first at least 0x40. Source: protocol.md."""
    raw = os.urandom(CID_BYTES)
    return bytes((raw[0] | 0x40,)) + raw[1:]


def reset_token(key: bytes, cid: bytes) -> bytes:
    """Return the stateless reset token of a CID, the same after a restart (RFC 9000 10.3.2)."""
    return hmac.digest(key, b"stateless reset" + cid, hashlib.sha256)[:RESET_TOKEN_BYTES]


def close_code(reason: Reason) -> int:
    """Return the transport close code of a refused handshake. Source: protocol.md, Closes."""
    return TRANSPORT_UNTRUSTED if reason is Reason.UNTRUSTED else TRANSPORT_INTERNAL_ERROR


def close_phrase(error: Refused) -> str:
    """Return the phrase of that close; strangers whose chain did not verify learn nothing but the reason."""
    if error.reason is Reason.NO_CERTIFICATE:
        return "client cert required"
    if error.reason is Reason.UNTRUSTED:
        return str(error.reason)
    return bounded_phrase(str(error))


def bounded_phrase(text: str) -> str:
    """Cut a close phrase so that it fits three times into the smallest packet (one per packet space)."""
    return text.encode()[:CLOSE_PHRASE_BYTES].decode(errors="ignore")


class _Congestion(RenoCongestionControl):
    """aioquic's own, whose window grows only when it is used, and which counts the packets lost for their size."""

    large_lost = 0
    has_carried = False
    _used_at = 0.0

    def on_packet_sent(self, *, packet: QuicSentPacket) -> None:
        super().on_packet_sent(packet=packet)
        if 2 * self.bytes_in_flight >= self.congestion_window:
            assert packet.sent_time is not None
            self._used_at = packet.sent_time

    def on_packet_acked(self, *, now: float, packet: QuicSentPacket) -> None:
        window = self.congestion_window, self._congestion_stash
        super().on_packet_acked(now=now, packet=packet)
        assert packet.sent_time is not None
        if packet.sent_time > self._used_at:
            # RFC 9002 7.8. It would grow as long as the connection lasts, until no loss could tame a burst.
            self.congestion_window, self._congestion_stash = window
        self.has_carried = True
        if packet.sent_bytes > UDP_PAYLOAD_BYTES_MIN:
            self.large_lost = 0

    def on_packets_lost(self, *, now: float, packets: Iterable[QuicSentPacket]) -> None:
        super().on_packets_lost(now=now, packets=packets)
        self._count_large(packets)

    def on_packets_expired(self, *, packets: Iterable[QuicSentPacket]) -> None:
        super().on_packets_expired(packets=packets)
        self._count_large(packets)

    def _count_large(self, packets: Iterable[QuicSentPacket]) -> None:
        self.large_lost += sum(each.sent_bytes > UDP_PAYLOAD_BYTES_MIN for each in packets)


register_congestion_control(CONGESTION_CONTROL, _Congestion)


class _Pacer(QuicPacketPacer):
    """aioquic's own, whose burst stays one on fast paths.

    It bounds the time of a packet from below and not that of a burst: past 16 packets in a microsecond, which a LAN
    reaches, it lets them go one by one, each at the cost of a turn of the loop.
    """

    def update_rate(self, congestion_window: int, smoothed_rtt: float) -> None:
        super().update_rate(congestion_window, smoothed_rtt)
        assert self.packet_time is not None
        least, most = BURST_PACKETS
        packets = max(least, min(congestion_window // 4 // self._max_datagram_size, most))
        self.bucket_max = packets * self.packet_time
        self.bucket_time = min(self.bucket_time, self.bucket_max)


def _flooded(code: QuicErrorCode, frame_type: int, phrase: str) -> QuicConnectionError:
    return QuicConnectionError(error_code=code, frame_type=frame_type, reason_phrase=phrase)


class Engine(QuicConnection):
    """One QUIC connection whose peer is judged before a single 1-RTT packet of it can be read."""

    def __init__(
        self,
        configuration: QuicConfiguration,
        judge: Judge,
        reset_key: bytes,
        *,
        original_cid: bytes | None = None,
        retry_cid: bytes | None = None,
    ) -> None:
        super().__init__(
            configuration=configuration,
            original_destination_connection_id=original_cid,
            retry_source_connection_id=retry_cid,
        )
        self._judge = judge
        self._reset_key = reset_key
        self.held_bytes: dict[int, int] = {}
        self.oversized = 0
        # aioquic's is a deque without a bound, in which one flood goes before everything else.
        self._datagrams = FairQueue(DATAGRAM_QUEUE_MAX)
        pending: Any = self._datagrams
        self._datagrams_pending = pending
        self._loss._pacer = _Pacer(max_datagram_size=configuration.max_datagram_size)
        self._payload_probe = 0
        # aioquic draws random CIDs and tokens; ours must survive a restart and have bit 0x40 set.
        cid = new_cid()
        # RFC 9000 18.2: a client must not send this parameter, and None leaves it out.
        token: Any = None if configuration.is_client else reset_token(reset_key, cid)
        first = QuicConnectionId(cid=cid, sequence_number=0, stateless_reset_token=token, was_sent=True)
        self._host_cids = [first]
        self.host_cid = first.cid
        self._local_initial_source_connection_id = first.cid

    @property
    def local_cids(self) -> list[bytes]:
        """The CIDs at which the peer may reach this connection now."""
        return [each.cid for each in self._host_cids]

    @property
    def is_confirmed(self) -> bool:
        """Whether both ends accepted the other: a server that refuses never sends HANDSHAKE_DONE."""
        return self._handshake_confirmed

    @property
    def close_event(self) -> tuple[int, str] | None:
        """Code and phrase once the connection is closing, by whichever end, else None."""
        event = self._close_event
        return None if event is None else (event.error_code, event.reason_phrase)

    @property
    def rtt_s(self) -> float | None:
        """The smoothed round trip time, once one was measured."""
        return self._loss._rtt_smoothed if self._loss._rtt_initialized else None

    @property
    def idle_until(self) -> float | None:
        """When the connection ends if nothing comes: moved by every packet that decrypts."""
        return self._close_at

    @property
    def is_close_pending(self) -> bool:
        """Whether this end has decided to close and has not yet said so."""
        return self._close_pending

    @property
    def validated_address(self) -> tuple[str, int] | None:
        """Where the peer is, once it has proved it."""
        path = self._network_paths[0]
        return path.addr if path.is_validated else None

    @property
    def datagram_limit(self) -> int:
        """The largest DATAGRAM payload in bytes, 0 when the peer takes none. Source: protocol.md."""
        if not self._remote_max_datagram_frame_size:
            return 0
        fits = self._max_datagram_size - DATAGRAM_OVERHEAD_BYTES - len(self._peer_cid.cid)
        # RFC 9221 3: the peer's limit counts the frame's type and length too.
        return max(0, min(fits, self._remote_max_datagram_frame_size - 3))

    def queue_datagram(self, lane: str, data: bytes) -> bool:
        """Have a DATAGRAM sent in the lane's turn. False when another was given up for it."""
        return self._datagrams.put(lane, data)

    @property
    def unidirectional_streams_blocked(self) -> int:
        """How many unidirectional streams wait until the peer allows more."""
        return len(self._streams_blocked_uni)

    @property
    def bidirectional_streams_left(self) -> int:
        """How many bidirectional streams may be opened now."""
        return self._remote_max_streams_bidi - self._local_next_stream_id_bidi // 4

    @property
    def udp_payload(self) -> int:
        """The largest UDP payload in bytes that is sent now."""
        return self._max_datagram_size

    def use_udp_payload(self, size: int) -> None:
        """Send packets of at most this size from now on."""
        self._max_datagram_size = size
        control: Any = self._loss._cc
        control.large_lost, control.has_carried = 0, False

    @property
    def has_carried(self) -> bool:
        """Whether the peer has acknowledged anything since the size was set."""
        control: Any = self._loss._cc
        return bool(control.has_carried)

    @property
    def is_in_black_hole(self) -> bool:
        """Whether the path carries no packets of the size that is used now, and says nothing about it."""
        control: Any = self._loss._cc
        return self._max_datagram_size > UDP_PAYLOAD_BYTES_MIN and control.large_lost >= LARGE_LOST_MAX

    def path_changed(self, now: float) -> None:
        """Ask for an answer at once: packets take another way now, and what was sent on the old one may be lost.

        Without it the next packet would wait for a timer that has doubled with each loss, or for a full window.
        """
        self._loss._pto_count = 0
        self._loss.reschedule_data(now=now)

    def probe_udp_payload(self, size: int) -> None:
        """Send one packet padded to the size; once it is acknowledged all may be as large (RFC 9000 14.3)."""
        self._payload_probe = size

    def datagrams_to_send(self, now: float) -> list[tuple[bytes, Any]]:
        """Return the packets to send, a size probe among them when one was asked for."""
        packets = super().datagrams_to_send(now)
        if self._payload_probe and self._handshake_confirmed and self._close_event is None:
            packets += self._send_payload_probe(now)
        return packets

    def is_reset(self, packet: bytes) -> bool:
        """Say whether the packet is the peer's stateless reset (RFC 9000 10.3.1); aioquic never looks."""
        token = self._peer_cid.stateless_reset_token
        return bool(token) and hmac.compare_digest(packet[-RESET_TOKEN_BYTES:], token)

    def unsent_bytes(self, stream_id: int) -> int:
        """Return how many bytes of a stream the peer has not acknowledged."""
        stream = self._streams.get(stream_id)
        return 0 if stream is None else len(stream.sender._buffer)

    def is_send_stopped(self, stream_id: int) -> bool:
        """Say whether the peer wants nothing more on a stream (STOP_SENDING)."""
        stream = self._streams.get(stream_id)
        return stream is not None and stream.sender._reset_error_code is not None

    def _initialize(self, peer_cid: bytes) -> None:
        super()._initialize(peer_cid)
        # The one switch that makes a server ask for a certificate; verify_mode is ignored on servers.
        self.tls._request_client_certificate = not self._is_client

    def _update_traffic_key(
        self, direction: tls.Direction, epoch: tls.Epoch, cipher_suite: tls.CipherSuite, secret: bytes
    ) -> None:
        # TLS hands this key over right after the peer's Finished was checked, before a client shows its own
        # certificate and before anything in the same flight could be decrypted: until the identity stands,
        # the peer's DATAGRAMs and streams are so much noise.
        if direction is tls.Direction.DECRYPT and epoch is tls.Epoch.ONE_RTT:
            self._require_identity()
        super()._update_traffic_key(direction, epoch, cipher_suite, secret)

    def _require_identity(self) -> None:
        leaf = self.tls._peer_certificate
        chain = [] if leaf is None else [leaf, *self.tls._peer_certificate_chain]
        try:
            self._judge([each.public_bytes(Encoding.DER) for each in chain], self.tls.alpn_negotiated or "")
        except Refused as error:
            raise QuicConnectionError(
                error_code=close_code(error.reason),
                frame_type=QuicFrameType.CRYPTO,
                reason_phrase=close_phrase(error),
            ) from error

    def _replenish_connection_ids(self) -> None:
        while len(self._host_cids) < min(8, self._remote_active_connection_id_limit):
            cid = new_cid()
            token = reset_token(self._reset_key, cid)
            self._host_cids.append(QuicConnectionId(cid, self._host_cid_seq, token))
            self._host_cid_seq += 1

    def _send_payload_probe(self, now: float) -> list[tuple[bytes, Any]]:
        size, self._payload_probe = self._payload_probe, 0
        path, version = self._network_paths[0], self._version
        # Lost, it counts as congestion like any packet (RFC 9000 14.4 would rather not): once a path, so be it.
        if version is None or not path.is_validated:
            return []
        builder = QuicPacketBuilder(
            host_cid=self.host_cid,
            is_client=self._is_client,
            max_datagram_size=size,
            packet_number=self._packet_number,
            peer_cid=self._peer_cid.cid,
            spin_bit=self._spin_bit,
            version=version,
        )
        builder.start_packet(QuicPacketType.ONE_RTT, self._cryptos[tls.Epoch.ONE_RTT])
        builder.start_frame(QuicFrameType.PING, handler=self._on_payload_probe, handler_args=(size,))
        padding = builder.start_frame(QuicFrameType.PADDING)
        padding.push_bytes(bytes(builder.remaining_buffer_space))
        return self._flush_builder(builder, network_path=path, peer_cid=self._peer_cid.cid, now=now)

    def _on_payload_probe(self, delivery: QuicDeliveryState, size: int) -> None:
        if delivery is QuicDeliveryState.ACKED:
            self._max_datagram_size = max(self._max_datagram_size, size)

    def _handle_crypto_frame(self, context: QuicReceiveContext, frame_type: int, buf: Buffer) -> None:
        # aioquic takes 512 KiB beyond a gap and a TLS message of 16 MiB, from anybody.
        start = buf.tell()
        end = buf.pull_uint_var() + buf.pull_uint_var()
        buf.seek(start)
        if end > CRYPTO_BYTES_MAX:
            raise _flooded(QuicErrorCode.CRYPTO_BUFFER_EXCEEDED, frame_type, "too long a handshake")
        super()._handle_crypto_frame(context, frame_type, buf)
        if len(self._crypto_streams[context.epoch].receiver._ranges) > CRYPTO_FRAGMENTS_MAX:
            raise _flooded(QuicErrorCode.CRYPTO_BUFFER_EXCEEDED, frame_type, "too many fragments")

    def _handle_ping_frame(self, context: QuicReceiveContext, frame_type: int, buf: Buffer) -> None:
        # Of a packet full of PINGs the first says it all; one by one they are the dearest bytes there are.
        rest = buf.data_slice(buf.tell(), buf.capacity)
        buf.seek(buf.tell() + len(rest) - len(rest.lstrip(b"\x01")))
        super()._handle_ping_frame(context, frame_type, buf)

    def _handle_stream_frame(self, context: QuicReceiveContext, frame_type: int, buf: Buffer) -> None:
        start = buf.tell()
        stream_id = buf.pull_uint_var()
        buf.seek(start)
        super()._handle_stream_frame(context, frame_type, buf)
        stream = self._streams.get(stream_id)
        if stream is not None and len(stream.receiver._ranges) > STREAM_FRAGMENTS_MAX:
            raise _flooded(QuicErrorCode.INTERNAL_ERROR, frame_type, "too many fragments")

    def _write_datagram_frame(
        self, builder: QuicPacketBuilder, data: bytes, frame_type: QuicFrameType
    ) -> bool:
        # The peer may have moved to a longer CID since this was queued. Left alone it would block the queue
        # for ever; unwritten, the caller takes it off the queue.
        if len(data) > self._max_datagram_size - DATAGRAM_OVERHEAD_BYTES - len(self._peer_cid.cid):
            self.oversized += 1
            return False
        return super()._write_datagram_frame(builder, data, frame_type)

    def _write_stream_limits(
        self, builder: QuicPacketBuilder, space: QuicPacketSpace, stream: QuicStream
    ) -> None:
        # aioquic doubles the window whenever half of it was received, read or not. Here credit follows what
        # was taken off the stream: delivered, and not held for a reader that paused.
        receiver = stream.receiver
        stream_id = stream.stream_id
        if stream_id is None or not stream.max_stream_data_local or receiver.is_finished:
            return
        taken = receiver.starting_offset() - self.held_bytes.get(stream_id, 0)
        window = self._configuration.max_stream_data
        if taken + window - stream.max_stream_data_local >= window // 2:
            stream.max_stream_data_local = taken + window
        if stream.max_stream_data_local_sent == stream.max_stream_data_local:
            return
        buf = builder.start_frame(
            QuicFrameType.MAX_STREAM_DATA,
            capacity=MAX_STREAM_DATA_FRAME_CAPACITY,
            handler=self._on_max_stream_data_delivery,
            handler_args=(stream,),
        )
        buf.push_uint_var(stream_id)
        buf.push_uint_var(stream.max_stream_data_local)
        stream.max_stream_data_local_sent = stream.max_stream_data_local

    def _write_connection_limits(self, builder: QuicPacketBuilder, space: QuicPacketSpace) -> None:
        self._extend_connection_credit()
        for limit in (self._local_max_data, self._local_max_streams_bidi, self._local_max_streams_uni):
            is_data = limit is self._local_max_data
            if not is_data and limit.sent - limit.used >= limit.value - limit.sent:
                # As aioquic: the peer still has more streams left than the update would grant.
                continue
            if limit.value == limit.sent:
                continue
            buf = builder.start_frame(
                limit.frame_type,
                capacity=CONNECTION_LIMIT_FRAME_CAPACITY,
                handler=self._on_connection_limit_delivery,
                handler_args=(limit,),
            )
            buf.push_uint_var(limit.value)
            limit.sent = limit.value

    def _extend_connection_credit(self) -> None:
        limit, window = self._local_max_data, self._configuration.max_data
        if limit.value - limit.used >= window // 2:
            return
        gaps = sum(
            stream.receiver.highest_offset - stream.receiver.starting_offset()
            for stream in self._streams.values()
            if not stream.receiver.is_finished
        )
        limit.value = max(limit.value, limit.used + window - gaps - sum(self.held_bytes.values()))
