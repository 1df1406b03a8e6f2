"""One TCP flow at one end: bytes between the local socket and its carriers, within windows and budgets.

A flow outlives its carrier: detached it reads nothing, keeps what is unacknowledged, and goes on upon the next.

The same at agent and connector. Positions and windows are sidecar.link.resume's, frames on the wire
sidecar.link.carrier's; who may open a flow is decided before one exists.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
from collections.abc import Sequence
from typing import Protocol

from sidecar.link.budget import Share
from sidecar.link.chunks import DOUBLINGS_MAX, PIECE_BYTES, SPARE, Chunk, framed, pieces_of, rooms
from sidecar.link.known import Complete, Ending, WasReset
from sidecar.link.resume import ACK_DELAY_SECONDS, FlowState
from ztna.errors import ProtocolError
from ztna.identity import Identity
from ztna.reasons import Reason
from ztna.tls_socket import TlsSocket
from ztna.wire.stream import HEADER_BYTES, Ack, Fin, Frame, OpenFrame, ResetFrame, encode

RUN_SECONDS_MAX = 0.1
"""After what took longer to be written, runs begin anew with one frame: our own ACKs, and RESET, wait behind them."""
GATHERED_PIECES_MAX = 64
LOCAL_WRITE_BYTES_MAX = 256 * 1024

_RST = struct.pack("ii", 1, 0)
_REASONS = tuple(Reason)


def reset_code(reason: Reason | None) -> int:
    """Return the byte of RESET: 0 for the local socket's own RST, else which Reason counted from 1."""
    return 0 if reason is None else 1 + _REASONS.index(reason)


def reset_reason(code: int) -> Reason | None:
    """Return what a RESET's byte says, None for the local socket's own RST."""
    return _REASONS[code - 1] if 0 < code <= len(_REASONS) else None


def abort(sock: socket.socket) -> None:
    """Close a TCP socket with a RST."""
    with contextlib.suppress(OSError):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RST)
    sock.close()


class FlowCarrier(Protocol):
    """What a flow needs of the connection that carries it."""

    @property
    def is_blocked(self) -> bool:
        """Whether earlier bytes still wait to be written."""

    def send(self, frame: bytes) -> None:
        """Write a small frame, after whatever waits."""

    def send_data(self, frames: memoryview) -> bool:
        """Write DATA frames while not blocked; False: `data_written` is called once they are wholly written."""

    def flow_ended(self, *, reusable: bool) -> None:
        """The flow is over: be free for the next one, or close once what waits is written."""


class _Nowhere:
    """The carrier of a detached flow: takes nothing."""

    is_blocked = True

    def send(self, frame: bytes) -> None:
        pass

    def send_data(self, frames: memoryview) -> bool:
        raise AssertionError("a detached flow sends nothing")

    def flow_ended(self, *, reusable: bool) -> None:
        pass


_NOWHERE = _Nowhere()


class TcpFlow:
    """A flow, detached at first. `finished` tells whether its last carrier may carry another."""

    def __init__(self, opened: OpenFrame, peer: Identity, share: Share, local: socket.socket) -> None:
        """Take the connected local socket, which is touched only once the flow begins."""
        self.opened = opened
        self.peer = peer
        self.session = opened.session
        self.state = FlowState(receive_window=share.window)
        self.finished: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        self.has_begun = False
        self.owes_reset = False
        """The local program reset it while it was detached: the other end is to be told on the next carrier."""
        self.sent_reset = False
        """It did so on a carrier, which may have died with it."""
        self.bytes_sent = 0
        self.bytes_received = 0
        self._loop = asyncio.get_running_loop()
        self._carrier: FlowCarrier = _NOWHERE
        self._share = share
        self._local = local
        self._local_fd = local.fileno()
        self._tls = local if isinstance(local, TlsSocket) else None
        self._held = bytearray()
        self._in_flight: memoryview | None = None
        self._in_flight_since = 0.0
        self._let_go_bytes = 0
        """What is acknowledged of a buffer that is kept for the rest of it."""
        self._early_ack: int | None = None
        self._ack_timer: asyncio.TimerHandle | None = None
        self._ack_is_late = False
        self._is_reading = False
        self._doublings = 0
        self._is_writing = False
        self._is_over = False
        self._reset_code = 0

    def attach(self, carrier: FlowCarrier, expected: int, window: int, greeting: Frame | None = None) -> None:
        """Begin, or go on, on a carrier whose other end expects that position; `greeting` goes before all else.

        Raises ProtocolError for a position that cannot be; then the flow is as it was.
        """
        self.state.resumed(expected, window)
        self._let_go_bytes = 0
        if not self.has_begun:
            self.has_begun = True
            self._local.setblocking(False)
            self._local.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._carrier = carrier
        if greeting is not None:
            carrier.send(encode(greeting))
        self._acknowledge()
        self._look_at_reading()

    def abandon(self) -> socket.socket:
        """Give the local socket of a flow that never began back, and its memory."""
        self._is_over = True
        self._share.close()
        return self._local

    def reset(self, reason: Reason | None = None) -> None:
        """End the flow at once at both ends: RESET to the other, RST to the local program."""
        if not self._is_over:
            self._reset_code = reset_code(reason)
            if reason is None and self.has_begun:
                self.owes_reset = self._carrier is _NOWHERE
                self.sent_reset = not self.owes_reset
            self._carrier.send(encode(ResetFrame(self._reset_code)))
            self._end(reusable=False)

    def ask(self) -> None:
        """Say again what is acknowledged, so that the other end's host answers if it is there.

        Not once its FIN has come: then it may take the flow for complete by now, and the next one's OPEN is due.
        """
        if not (self._is_over or self._carrier.is_blocked or self.state.has_fin):
            self._send_ack()

    @property
    def ending(self) -> Ending:
        """How a finished flow ended."""
        if self.finished.result():
            return Complete(self.state.sent_position, self.state.received_position)
        return WasReset(self._reset_code)

    # From the carrier

    def data_received(self, pieces: Sequence[bytes | memoryview]) -> None:
        """Hand bytes to the local socket, or hold them. Raises ProtocolError as FlowState does."""
        if self._is_over:
            return
        size = sum(map(len, pieces))
        self.state.received(size)
        self.bytes_received += size
        taken = 0
        if not self._held:
            try:
                taken = self._write_local(pieces)
            except OSError:
                self.reset()
                return
            self.state.delivered(taken)
        if taken < size:
            self._hold(pieces, taken)
        self._acknowledge()

    def frame_received(self, frame: Frame) -> None:
        """Take any other frame of the running flow. Raises ProtocolError for one that does not belong."""
        if self._is_over:
            return
        if isinstance(frame, Ack):
            self._acknowledged(frame.position)
        elif isinstance(frame, Fin):
            self.state.fin_received()
            self._finish_local()
        elif isinstance(frame, ResetFrame):
            self._reset_code = frame.reason
            self._end(reusable=False)
        else:
            raise ProtocolError(f"{type(frame).__name__} inside a flow")

    def data_written(self) -> None:
        """The DATA frames that were given to a blocked carrier are written."""
        if not self._is_over:
            if self._loop.time() - self._in_flight_since > RUN_SECONDS_MAX:
                self._doublings = 0
            self._settle_in_flight()

    def carrier_writable(self) -> None:
        """Nothing waits in the carrier any more."""
        if not self._is_over:
            self._acknowledge()
        if not self._is_over and not self._is_reading:
            # Most likely there is something: trying costs less than asking the selector first.
            self._local_readable()

    def carrier_lost(self) -> None:
        """The carrier broke: be detached. Nothing of this shows to the local program."""
        if self._is_over:
            return
        self._carrier = _NOWHERE
        # Part of what was in flight may have arrived: it counts as sent now, and the other end says from where on.
        self._settle_in_flight()
        self._look_at_reading()

    def _settle_in_flight(self) -> None:
        frames, self._in_flight = self._in_flight, None
        if frames is None:
            return
        self._keep(frames)
        self._count_kept()
        early, self._early_ack = self._early_ack, None
        if early is not None:
            self._acknowledged(early)

    def _acknowledged(self, position: int) -> None:
        in_flight = sum(map(len, pieces_of(self._in_flight))) if self._in_flight is not None else 0
        if 0 < position - self.state.sent_position <= in_flight:
            # DATA is handed on as it comes, so the other end may acknowledge the beginning of a frame whose end
            # is not written yet. It counts once the frame is: until then its bytes cannot be let go.
            self._early_ack = max(position, self._early_ack or 0)
            return
        self._recycle(self.state.acknowledged(position))
        self._count_kept()
        if self.state.is_complete:
            self._end(reusable=True)
        else:
            self._look_at_reading()

    # Local socket -> carrier

    def _look_at_reading(self) -> None:
        """Read the local socket exactly while its bytes have somewhere to go, and nothing is owed before them."""
        state = self.state
        if state.is_owing:
            self._send_owed()
        wanted = not (self._is_over or state.fin_is_sent or self._carrier.is_blocked or state.is_owing)
        if wanted:
            wanted = state.send_credit > 0
            if wanted and self._share.room() == 0:
                wanted = False
                self._share.wait(self._look_at_reading)
        if wanted != self._is_reading:
            self._is_reading = wanted
            if wanted:
                self._loop.add_reader(self._local_fd, self._local_readable)
            else:
                self._loop.remove_reader(self._local_fd)
        if wanted and self._tls is not None and self._tls.has_more:
            self._loop.call_soon(self._local_has_more)

    def _local_has_more(self) -> None:
        """Read what was decrypted already, and so makes nothing readable."""
        if self._is_reading and self._tls is not None and self._tls.has_more:
            self._local_readable()

    def _send_owed(self) -> None:
        """Send again what the last carrier lost. It is counted as kept all the while."""
        state = self.state
        while state.is_owing and not (self._is_over or self._carrier.is_blocked):
            room = min(state.send_credit, PIECE_BYTES)
            if state.owed_bytes and room <= 0:
                return
            chunk = SPARE[0].take()
            size = state.take_owed(memoryview(chunk)[HEADER_BYTES : HEADER_BYTES + max(0, room)])
            if not size:
                SPARE[0].give(chunk)
                self._send_fin()
            elif not self._send_chunk(chunk, size):
                return

    def _local_readable(self) -> None:
        if self.state.is_owing:
            self._look_at_reading()
            return
        state, share = self.state, self._share
        room = min(state.send_credit, share.room())
        if room > 0:
            self._read_local(room)
        if not self._is_over:
            self._count_kept()
        self._look_at_reading()

    def _read_local(self, room: int) -> None:
        """Carry one read of at most `room` bytes."""
        doublings = self._doublings
        while doublings and room < PIECE_BYTES << doublings:
            doublings -= 1
        spare, most = SPARE[doublings], min(room, PIECE_BYTES << doublings)
        chunk = spare.take()
        try:
            size = self._local.recvmsg_into(rooms(chunk, most))[0]
        except BlockingIOError:
            spare.give(chunk)
            return
        except OSError:
            spare.give(chunk)
            self.reset()
            return
        if size == most:
            self._doublings = min(DOUBLINGS_MAX, self._doublings + 1)
        elif 2 * size < most:
            self._doublings = max(0, doublings - 1)
        if size:
            self.bytes_sent += size
            self._send_chunk(chunk, size)
        else:
            spare.give(chunk)
            self._send_fin()

    def _send_chunk(self, chunk: Chunk, size: int) -> bool:
        """Send so many bytes of DATA; return whether they are written, else they are in flight."""
        frames = framed(chunk, size)
        if 2 * len(frames) < len(chunk):
            # As a copy, so that what waits and is kept is not mostly empty chunk.
            frames = memoryview(bytes(frames))
            chunk.spare.give(chunk)
        if self._carrier.send_data(frames):
            self._keep(frames)
            return True
        self._in_flight, self._in_flight_since = frames, self._loop.time()
        self._count_kept()
        return False

    def _send_fin(self) -> None:
        self.state.fin_sent()
        self._carrier.send(encode(Fin()))

    def _keep(self, frames: memoryview) -> None:
        """Keep written DATA until its ACK; only now, so that no ACK can free what is still being written."""
        kept = sum(map(self.state.sent, pieces_of(frames)))
        if isinstance(frames.obj, Chunk):
            frames.obj.kept = kept

    def _count_kept(self) -> None:
        """Tell the budget what waits for its ACK, what is yet to be written and what lies beside both in a chunk."""
        in_flight = len(self._in_flight) if self._in_flight is not None else 0
        self._share.keep(self.state.kept_bytes + in_flight + self._let_go_bytes)

    # Carrier -> local socket

    def _write_local(self, pieces: Sequence[bytes | memoryview]) -> int:
        try:
            if len(pieces) == 1:
                return self._local.send(pieces[0])
            if len(pieces) <= GATHERED_PIECES_MAX:
                return self._local.sendmsg(pieces)
            return self._local.send(b"".join(pieces))
        except BlockingIOError:
            return 0

    def _hold(self, pieces: Sequence[bytes | memoryview], skip: int) -> None:
        for piece in pieces:
            if skip < len(piece):
                self._held += piece[skip:]
                skip = 0
            else:
                skip -= len(piece)
        if not self._is_writing:
            self._is_writing = True
            self._loop.add_writer(self._local_fd, self._local_writable)

    def _local_writable(self) -> None:
        try:
            with memoryview(self._held) as view:
                taken = self._write_local((view[:LOCAL_WRITE_BYTES_MAX],))
        except OSError:
            self.reset()
            return
        del self._held[:taken]
        self.state.delivered(taken)
        if not self._held:
            self._is_writing = False
            self._loop.remove_writer(self._local_fd)
        self._finish_local()
        self._acknowledge()

    def _finish_local(self) -> None:
        if self._is_over or not self.state.fin_is_due:
            return
        # A local program that has gone is noticed at the next read or write; here it cannot be told any more.
        with contextlib.suppress(OSError):
            self._local.shutdown(socket.SHUT_WR)
        self.state.fin_delivered()
        self._acknowledge()

    def _acknowledge(self) -> None:
        """Send an ACK when one is due, or soon when one is wanted; while the carrier is blocked, after that."""
        state = self.state
        if self._is_over or self._carrier is _NOWHERE or not state.ack_is_wanted:
            return
        if not (state.ack_is_due or self._ack_is_late):
            if self._ack_timer is None:
                self._ack_timer = self._loop.call_later(ACK_DELAY_SECONDS, self._ack_delay_over)
        elif not self._carrier.is_blocked:
            self._send_ack()

    def _ack_delay_over(self) -> None:
        self._ack_timer = None
        self._ack_is_late = self.state.ack_is_wanted
        self._acknowledge()

    def _send_ack(self) -> None:
        self._ack_is_late = False
        self._carrier.send(encode(Ack(self.state.take_ack())))
        if self.state.is_complete:
            self._end(reusable=True)

    # The end

    def _end(self, *, reusable: bool) -> None:
        self._is_over = True
        if self._ack_timer is not None:
            self._ack_timer.cancel()
        if self._is_reading:
            self._is_reading = False
            self._loop.remove_reader(self._local_fd)
        if self._is_writing:
            self._loop.remove_writer(self._local_fd)
        if reusable or self.state.is_delivered:
            self._local.close()
        else:
            abort(self._local)
        self._held = bytearray()
        self._recycle(self.state.forget())
        self._share.close()
        if not self.finished.done():
            self.finished.set_result(reusable)
        self._carrier.flow_ended(reusable=reusable)

    def _recycle(self, pieces: Sequence[memoryview]) -> None:
        for piece in pieces:
            chunk = piece.obj
            if not isinstance(chunk, Chunk):
                self._let_go_bytes = 0
                continue
            chunk.kept -= 1
            if chunk.kept:
                self._let_go_bytes += len(piece)
            else:
                self._let_go_bytes = 0
                chunk.spare.give(chunk)
