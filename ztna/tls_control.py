"""A control connection over TLS, for where UDP is blocked: what ztna.quic.Connection is to a control stream over QUIC.

Whole messages in, messages out, signs of life, and an end with a code and a phrase as QUIC has; all of it bounded. Does
not know what the messages mean. Source: protocol.md, Control stream; docs/blocked.md.
"""

from __future__ import annotations

import asyncio
import time
from typing import Protocol

from ztna.errors import ProtocolError, Refused
from ztna.identity import Identity
from ztna.quic_connection import CLOSE_OK, CLOSE_PROTOCOL_ERROR, STREAM_UNSENT_BYTES_MAX
from ztna.quic_engine import TRANSPORT_INTERNAL_ERROR, close_code
from ztna.reasons import Reason
from ztna.telemetry import dropped, refused
from ztna.tls_tcp import SockAddr, TlsStream
from ztna.wire.control import (
    PHRASE_CHARACTERS_MAX,
    AnyMessage,
    FrameReader,
    Goodbye,
    LifeMessage,
    Ping,
    Pong,
    UnknownMessage,
    encode,
)

ALPN = "ztna-v2"
READ_BYTES_PER_TURN = 64 * 1024
WRITE_BYTES = 64 * 1024
SILENCE_SECONDS = 10.0
"""Who says nothing for so long has gone: the client's end pings each 3 s."""
FINISH_SECONDS = 2.0
BROKEN = "the connection broke"
SILENT = "silent for too long"

_RTT_WEIGHT = 1 / 8  # as TCP smooths it (RFC 6298, 2.3)

# One for the whole process: what is read is copied before the next read.
_SCRATCH = memoryview(bytearray(READ_BYTES_PER_TURN))


class MessageHandler(Protocol):
    """What a connection's owner makes of it. A ProtocolError it raises closes the connection with 0x02."""

    def message_received(self, message: AnyMessage | UnknownMessage) -> None:
        """Take one message."""

    def connection_closed(self, code: int, reason: str) -> None:
        """Hear once that the connection is over, by whichever end."""


class TlsConnection:
    """One end of a control connection over TLS. `start` begins it."""

    alpn = ALPN

    def __init__(self, tls: TlsStream, where: str) -> None:
        """Take an authenticated stream; `where` labels what is counted."""
        self.identity: Identity = tls.identity
        self.peer_address: SockAddr = tls.peer_address
        self.heard_at = time.monotonic()
        """When the peer was last heard, in seconds of the monotonic clock."""
        self.rtt_s: float | None = None
        self.refusal: Refused | None = None
        """Why this end did not let the peer stay."""
        self._loop = asyncio.get_running_loop()
        self.closed: asyncio.Future[tuple[int, str]] = self._loop.create_future()
        self._tls = tls
        self._where = where
        self._reader = FrameReader()
        self._handler: MessageHandler | None = None
        self._unsent = bytearray()
        self._flush_handle: asyncio.Handle | None = None
        self._silence_timer: asyncio.TimerHandle | None = None
        self._pinged_at: float | None = None
        self._is_ended = False

    def start(self, handler: MessageHandler) -> None:
        """Begin to read; it ends when the peer's certificate does."""
        self._handler = handler
        if self._is_ended:
            return
        self._tls.start(self._readable, self._flush, self.refuse)
        self._mind_silence()

    @property
    def is_open(self) -> bool:
        """Whether it can still send."""
        return not self._is_ended

    def send_stream(self, stream_id: int, data: bytes, end: bool = False) -> bool:
        """Queue a message. False, and nothing queued, past STREAM_UNSENT_BYTES_MAX that the peer does not read."""
        if self._is_ended:
            return False
        if len(self._unsent) + len(data) > STREAM_UNSENT_BYTES_MAX:
            dropped(self._where, "stream_buffer_full")
            return False
        self._unsent += data
        if self._flush_handle is None:
            # Once for all that is said in this turn.
            self._flush_handle = self._loop.call_soon(self._flush)
        return True

    def unsent_bytes(self, stream_id: int) -> int:
        """Return how many queued bytes are not yet written."""
        return len(self._unsent)

    def send_datagram(self, data: bytes, lane: str = "") -> bool:
        """Drop it, counted: there are none over TLS."""
        dropped(self._where, "no_datagrams")
        return False

    def ping(self) -> None:
        """Ask the peer for a sign of life."""
        if self.send_stream(0, encode(Ping())) and self._pinged_at is None:
            self._pinged_at = time.monotonic()

    def close(self, code: int = CLOSE_OK, reason: str = "") -> None:
        """Say goodbye, after what was queued, and close."""
        if self._is_ended:
            return
        self._unsent += encode(Goodbye(code, reason[:PHRASE_CHARACTERS_MAX]))
        self._flush()
        self._end(code, reason)

    def refuse(self, error: Refused) -> None:
        """Close as for a peer that is not let in, or whose certificate does not stand any more."""
        if not self._is_ended:
            self.refusal = error
            refused(self._where, error.reason)
            self.close(close_code(error.reason), str(error.reason))

    def _readable(self) -> None:
        if self._is_ended:
            return
        try:
            size = self._tls.read_into(_SCRATCH)
            if size:
                self.heard_at = time.monotonic()
                messages = self._reader.feed_tls(_SCRATCH[:size])
                if unknown := self._reader.take_unknown_fields():
                    dropped(self._where, "unknown_field", unknown)
                for message in messages:
                    self._take(message)
        except ProtocolError as error:
            refused(self._where, Reason.MALFORMED)
            self.close(CLOSE_PROTOCOL_ERROR, str(error))
        except OSError:
            self._end(TRANSPORT_INTERNAL_ERROR, BROKEN)
        else:
            if self._tls.is_ended:
                self._end(TRANSPORT_INTERNAL_ERROR, BROKEN)

    def _take(self, message: AnyMessage | LifeMessage | UnknownMessage) -> None:
        """Act on one message; after the end nothing of the peer counts."""
        if self._is_ended:
            return
        match message:
            case Ping():
                self._answer()
            case Pong():
                self._answered()
            case Goodbye():
                self._end(message.code, message.reason)
            case _:
                assert self._handler is not None
                self._handler.message_received(message)

    def _answer(self) -> None:
        if not self.send_stream(0, encode(Pong())):
            self.close(CLOSE_PROTOCOL_ERROR, Reason.LIMIT_REACHED)

    def _answered(self) -> None:
        if self._pinged_at is not None:
            # Of several PINGs the first counts: an answer to a later one shows a longer way than there is, at worst.
            measured, self._pinged_at = time.monotonic() - self._pinged_at, None
            before = self.rtt_s if self.rtt_s is not None else measured
            self.rtt_s = before + (measured - before) * _RTT_WEIGHT

    def _flush(self) -> None:
        if self._flush_handle is not None:
            self._flush_handle.cancel()
            self._flush_handle = None
        while self._unsent and not self._is_ended:
            with memoryview(self._unsent) as view, view[:WRITE_BYTES] as piece:
                size = len(piece)
                try:
                    written = self._tls.write(piece)
                except OSError:
                    # Found out in the middle of somebody's turn; told in a turn of its own.
                    self._loop.call_soon(self._end, TRANSPORT_INTERNAL_ERROR, BROKEN)
                    return
            del self._unsent[:written]
            if written < size:
                return

    def _mind_silence(self) -> None:
        left = self.heard_at + SILENCE_SECONDS - time.monotonic()
        if left <= 0:
            self.close(TRANSPORT_INTERNAL_ERROR, SILENT)
        else:
            self._silence_timer = self._loop.call_later(left, self._mind_silence)

    def _end(self, code: int, reason: str) -> None:
        """Be over; the owner hears of it in a turn of its own, as it may have been the one to close."""
        if self._is_ended:
            return
        self._is_ended = True
        if self._silence_timer is not None:
            self._silence_timer.cancel()
        if self._flush_handle is not None:
            self._flush_handle.cancel()
        if self._unsent:
            self._tls.close()  # the peer reads nothing
        else:
            self._tls.finish(FINISH_SECONDS)
        self._unsent = bytearray()
        self._loop.call_soon(self._tell_end, code, reason)

    def _tell_end(self, code: int, reason: str) -> None:
        if not self.closed.done():
            self.closed.set_result((code, reason))
        if self._handler is not None:
            self._handler.connection_closed(code, reason)
