"""One stream carrier: a TLS connection, or a packet link's stream, that speaks frames and carries one flow at a time.

Frames in and out, blocking and closing; what is inside a flow is sidecar.link.flow's, how carriers come to be
sidecar.link.stream's.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Sequence
from ipaddress import ip_address
from typing import Protocol

from sidecar.link.flow import TcpFlow
from sidecar.link.packet_stream import PacketStream
from sidecar.link.quic_stream import QuicStream
from ztna.errors import IdentityError, ProtocolError
from ztna.identity import Identity
from ztna.reasons import Reason
from ztna.stall import Stall, Verdict
from ztna.telemetry import LINK_TALLIES, logger, refused
from ztna.tls_tcp import RECORD_BYTES, Delivery, SockAddr
from ztna.wire.stream import Data, Frame, FrameReader, encode

READ_BYTES_PER_TURN = 16 * RECORD_BYTES
FINISH_SECONDS = 2.0
PACKETS_UNSENT_BYTES = 64 * 1024
"""What the kernel keeps of packets that were not sent yet."""

BREAKING = frozenset({Reason.PEER_GONE, Reason.CLOSED_BY_PEER})
"""Ends of a connection that say nothing about its flow."""
_WHERE = "stream_carrier"

_log = logger(__name__)

# One for the whole process: what is read is handed on or copied before the next read.
_SCRATCH = memoryview(bytearray(READ_BYTES_PER_TURN))


class ByteStream(Protocol):
    """What frames ride: a TlsStream, or a stream of a packet link."""

    identity: Identity
    peer_address: SockAddr
    own_address: SockAddr
    is_ended: bool

    def start(
        self,
        on_readable: Callable[[], None],
        on_writable: Callable[[], None],
        on_refused: Callable[[IdentityError], None],
    ) -> None:
        """Begin to call."""

    def read_into(self, buffer: memoryview) -> int:
        """Fill the buffer with what is there. Raises OSError."""

    def write(self, data: bytes | memoryview) -> int:
        """Write what fits. Raises OSError."""

    @property
    def unacknowledged_bytes(self) -> int:
        """How many written bytes the other end's host has not acknowledged."""

    def delivery(self) -> Delivery:
        """How the other end's host takes what is sent to it. Raises OSError."""

    def give_up(self) -> None:
        """Take the way for dead."""

    def limit_unsent(self, size: int) -> None:
        """Bound what is taken and not sent."""

    def close(self) -> None:
        """Close at once."""

    def finish(self, patience_s: float, parted: Callable[[bool], None]) -> None:
        """Close once what was written has arrived; `parted` hears whether the other end said the same in time."""


class Carried(Protocol):
    """What a carrier carries: a TCP flow, or the packets of a session."""

    def data_received(self, pieces: Sequence[bytes | memoryview]) -> None:
        """Take DATA. Raises ProtocolError."""

    def frame_received(self, frame: Frame) -> None:
        """Take any other frame. Raises ProtocolError."""

    def data_written(self) -> None:
        """The DATA that waited is written."""

    def carrier_writable(self) -> None:
        """Nothing waits in the carrier any more."""

    def carrier_lost(self) -> None:
        """The carrier broke."""

    def reset(self, reason: Reason | None = None) -> None:
        """End at once, and say so."""


class FrameStream:
    """Frames over a byte stream. `on_frame` gets what comes while no flow runs; `on_closed` the reason of the end."""

    def __init__(
        self, tls: ByteStream, on_frame: Callable[[Frame], None], on_closed: Callable[[Reason], None]
    ) -> None:
        self.peer: Identity = tls.identity
        self.peer_address: SockAddr = tls.peer_address
        self.own_address: SockAddr = tls.own_address
        self.flow: Carried | None = None
        self.is_closed = False
        self._tls = tls
        self._is_tcp = not isinstance(tls, QuicStream)
        carrier = "stream" if self._is_tcp else "packet"
        self._sent, self._received = LINK_TALLIES[carrier, "sent"], LINK_TALLIES[carrier, "received"]
        self._reader = FrameReader()
        # The first may be half written: TLS wants the same bytes again. True marks DATA frames of the flow.
        self._unsent: list[tuple[memoryview, bool]] = []
        self._is_finishing = False
        self._stall = Stall(asyncio.get_running_loop().time())
        self._received_bytes = self._sent_bytes = 0
        self._seen_bytes = 0
        self._end_reason = Reason.CLOSED_BY_PEER
        self._on_frame = on_frame
        self._on_closed = on_closed
        self.farewell: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        """Whether the other end has had all that was sent and closed too; known a while after the end."""

    def start(self) -> None:
        """Begin to read; it ends when the peer's certificate does, whatever runs on it."""
        self._tls.start(self._readable, self._writable, self._refused)

    def network_changed(self, held: Collection[str]) -> None:
        """Close when it stands on an address that this host holds no more: nothing can reach it there.

        No address at all: nobody knows which there are.
        """
        host = self.own_address[0]
        if held and host not in held and not ip_address(host).is_loopback:
            self.close(Reason.PEER_GONE)

    def look(self, now: float) -> None:
        """Close when the way is dead, by ztna.stall; call it each LOOK_SECONDS while something is carried.

        Of a stream of a packet link that minds the way itself.
        """
        if not self._is_tcp:
            return
        moved = self._received_bytes + self._sent_bytes
        # While something waits nothing is settled: OpenSSL tells of a long write only once all of it is sent.
        if self.is_closed or (moved == self._seen_bytes and self._stall.is_settled and not self._unsent):
            return
        self._seen_bytes = moved
        try:
            verdict = self._stall.look(now, self._received_bytes, *self._tls.delivery())
        except OSError:
            return  # which the next read tells
        if verdict is Verdict.DEAD:
            _log.info("carrier_dead", peer=self.peer.name, address=self.peer_address[0])
            self._tls.give_up()
            self.close(Reason.PEER_GONE)
        elif verdict is Verdict.ASK and isinstance(self.flow, TcpFlow):
            self.flow.ask()

    @property
    def unacknowledged_bytes(self) -> int:
        """How many written bytes the other end's kernel has not acknowledged."""
        return self._tls.unacknowledged_bytes

    @property
    def is_blocked(self) -> bool:
        """Whether earlier bytes still wait to be written."""
        return bool(self._unsent)

    def send(self, frame: bytes) -> None:
        """Write a frame, after whatever waits. A broken connection shows later, as its end."""
        self._send(memoryview(frame), is_data=False)

    def send_data(self, frames: memoryview) -> bool:
        """Write the flow's DATA frames; False: they wait, and the flow is told when they are written."""
        return self._send(frames, is_data=True)

    def carry(self, flow: TcpFlow, expected: int, window: int, greeting: Frame | None = None) -> None:
        """Carry a flow from now on; as TcpFlow.attach. Raises ProtocolError as that, and carries nothing then."""
        self.flow = flow
        try:
            flow.attach(self, expected, window, greeting)
        except ProtocolError:
            self.flow = None
            raise

    def carry_packets(self, packets: PacketStream, greeting: Frame | None = None) -> None:
        """Carry a session's packets from now on, and nothing else."""
        self.flow = packets
        # The queue is ours, where the oldest can be given up, and not the kernel's.
        self._tls.limit_unsent(PACKETS_UNSENT_BYTES)
        if greeting is not None:
            self.send(encode(greeting))
        packets.attach(self)

    def flow_ended(self, *, reusable: bool) -> None:
        """Be free for the next flow, or close once what waits is written."""
        self.flow = None
        if not reusable:
            self.finish(self._end_reason)

    def finish(self, reason: Reason) -> None:
        """Close once what waits is written, so that the peer can read it."""
        if self.is_closed or self._is_finishing:
            return
        self._is_finishing = True
        self._end_reason = reason
        if self._unsent:
            asyncio.get_running_loop().call_later(FINISH_SECONDS, self.close, reason)
        else:
            self._finished(reason)

    def close(self, reason: Reason) -> None:
        """Close at once. A flow that runs is detached when the connection broke, and else reset for that reason."""
        if self.is_closed:
            return
        if self.flow is not None and reason not in BREAKING:
            self._end_reason = reason
            self.flow.reset(reason)  # which closes this once RESET is written
            return
        self.is_closed = True
        self._tls.close()
        self._parted(False)
        self._ended(reason)

    def _finished(self, reason: Reason) -> None:
        self.is_closed = True
        self._tls.finish(FINISH_SECONDS, self._parted)
        self._ended(reason)

    def _parted(self, clean: bool) -> None:
        if not self.farewell.done():
            self.farewell.set_result(clean)

    def _refused(self, error: IdentityError) -> None:
        refused(_WHERE, error.reason)
        self.close(error.reason)

    def _ended(self, reason: Reason) -> None:
        self._unsent.clear()
        flow, self.flow = self.flow, None
        if flow is not None:
            flow.carrier_lost()
        self._on_closed(reason)

    def _send(self, frame: memoryview, *, is_data: bool) -> bool:
        if self.is_closed or self._is_finishing:
            return False
        written = 0
        if not self._unsent:
            try:
                written = self._tls.write(frame)
            except OSError:
                # Found out in the middle of somebody's turn; told in a turn of its own, and blocked until then.
                asyncio.get_running_loop().call_soon(self.close, Reason.PEER_GONE)
                self._is_finishing = True
            self._sent.count += written
            self._sent_bytes += written
            if written == len(frame):
                return True
        self._unsent.append((frame[written:], is_data))
        return False

    def _writable(self) -> None:
        unsent = self._unsent
        while unsent:
            rest, is_data = unsent[0]
            try:
                written = self._tls.write(rest)
            except OSError:
                self.close(Reason.PEER_GONE)
                return
            self._sent.count += written
            self._sent_bytes += written
            if written < len(rest):
                unsent[0] = (rest[written:], is_data)
                return
            unsent.pop(0)
            if is_data and self.flow is not None:
                self.flow.data_written()
        if self._is_finishing:
            self._finished(self._end_reason)
        elif self.flow is not None:
            self.flow.carrier_writable()

    def _readable(self) -> None:
        if self.is_closed:
            return
        try:
            size = self._tls.read_into(_SCRATCH)
            self._received.count += size
            self._received_bytes += size
            if size and not self._is_finishing:
                self._dispatch(self._reader.feed(_SCRATCH[:size]))
        except ProtocolError as error:
            _log.warning("carrier_malformed", peer=self.peer.name, detail=error)
            self.close(Reason.MALFORMED)
        except OSError:
            self.close(Reason.PEER_GONE)
        else:
            if self._tls.is_ended:
                self.close(Reason.CLOSED_BY_PEER)

    def _dispatch(self, frames: list[Frame]) -> None:
        pieces: list[bytes | memoryview] = []
        for frame in frames:
            if isinstance(frame, Data):
                pieces.append(frame.data)
                continue
            if pieces:
                self._data(pieces)
                pieces = []
            self._other(frame)
        if pieces:
            self._data(pieces)

    def _data(self, pieces: list[bytes | memoryview]) -> None:
        if self.is_closed or self._is_finishing:
            return
        if self.flow is None:
            raise ProtocolError("DATA without a flow")
        self.flow.data_received(pieces)

    def _other(self, frame: Frame) -> None:
        if self.is_closed or self._is_finishing:
            return
        if self.flow is None:
            self._on_frame(frame)
        else:
            self.flow.frame_received(frame)
