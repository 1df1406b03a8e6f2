"""One bidirectional stream of a packet link as a byte stream: TCP flows where only UDP gets through.

What a ztna.tls_tcp.TlsStream is to a stream carrier: the same frames ride it. Does not know them. Flow control is
the frames' own windows; QUIC's credit follows what is read, and what is written is bounded here.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from ztna.errors import IdentityError
from ztna.identity import Identity
from ztna.quic import Connection
from ztna.tls_tcp import Delivery, SockAddr

UNSENT_BYTES_MAX = 256 * 1024
"""Written and not acknowledged; beyond it the stream is blocked until half of that is free."""


class QuicStream:
    """One end of a stream. Its owner is called when it can be read or written, as a TlsStream's."""

    own_address: SockAddr = ("127.0.0.1", 0)
    """None that a change of the network could take away: the link minds that itself."""

    def __init__(self, connection: Connection, stream_id: int, written: Callable[[], None]) -> None:
        """`written` is called with each write."""
        self.identity: Identity = connection.identity
        self.peer_address: SockAddr = connection.peer_address
        self.is_ended = False
        self._connection = connection
        self._stream_id = stream_id
        self._written = written
        self._loop = asyncio.get_running_loop()
        self._received = bytearray()
        self._has_end = False
        self._is_broken = False
        self._is_closed = False
        self._on_readable: Callable[[], None] | None = None
        self._on_writable: Callable[[], None] | None = None
        self._parted: Callable[[bool], None] | None = None
        self._patience: asyncio.TimerHandle | None = None

    def start(
        self,
        on_readable: Callable[[], None],
        on_writable: Callable[[], None],
        on_refused: Callable[[IdentityError], None],
    ) -> None:
        """Begin to call. Whose certificate does not stand any more loses the whole link, and with it this."""
        self._on_readable, self._on_writable = on_readable, on_writable
        self._loop.call_soon(self._tell_readable)

    def read_into(self, buffer: memoryview) -> int:
        """Fill the buffer with what is there and return how much that was. Raises OSError when the link broke."""
        size = min(len(buffer), len(self._received))
        buffer[:size] = self._received[:size]
        del self._received[:size]
        if self._received:
            self._loop.call_soon(self._tell_readable)
        elif self._has_end:
            self.is_ended = True
        elif self._is_broken:
            raise ConnectionResetError("the packet link broke")
        return size

    def write(self, data: bytes | memoryview) -> int:
        """Write what fits and return how much that was; short means: `on_writable` is called, then go on from there.

        Raises OSError when the link broke.
        """
        if self._is_broken or self._is_closed:
            raise ConnectionResetError("the packet link broke")
        size = max(0, min(len(data), UNSENT_BYTES_MAX - self.unacknowledged_bytes))
        if size:
            if not self._connection.send_stream(self._stream_id, bytes(data[:size])):
                raise ConnectionResetError("the packet link is closed")
            self._written()
        if size < len(data):
            self._connection.await_room(self._stream_id, UNSENT_BYTES_MAX // 2, self._tell_writable)
        return size

    @property
    def unacknowledged_bytes(self) -> int:
        """How many written bytes the other end has not acknowledged."""
        return self._connection.unsent_bytes(self._stream_id)

    def delivery(self) -> Delivery:
        """Nothing to worry about: the link minds the way itself."""
        return Delivery(0, 0.0, 0.0)

    def give_up(self) -> None:
        """Nothing, as there is no worry."""

    def limit_unsent(self, size: int) -> None:
        """Nothing: packets have DATAGRAMs here."""

    def close(self) -> None:
        """Close: no more is written, and what comes is thrown away; again is harmless."""
        if not self._is_closed:
            self._is_closed = True
            self._on_readable = self._on_writable = None
            self._received.clear()
            self._connection.send_stream(self._stream_id, b"", end=True)

    def finish(self, patience_s: float, parted: Callable[[bool], None] = lambda clean: None) -> None:
        """Close once what was written has arrived, which QUIC sees to.

        `parted` is called with whether the other end's end came within `patience_s`, so that it has had all there was.
        """
        is_clean = self._has_end
        self.close()
        if is_clean or self._is_broken:
            parted(is_clean)
            return
        self._parted = parted
        self._patience = self._loop.call_later(patience_s, self._part, False)

    def _part(self, clean: bool) -> None:
        parted, self._parted = self._parted, None
        if self._patience is not None:
            self._patience.cancel()
        if parted is not None:
            parted(clean)

    # From the link

    def data_received(self, data: bytes, end: bool) -> None:
        """Take the next bytes."""
        self._has_end = self._has_end or end
        if not self._is_closed:
            self._received += data
            self._tell_readable()
        elif end:
            self._part(True)

    def lost(self) -> None:
        """The link is over."""
        self._is_broken = True
        self._part(False)
        self._loop.call_soon(self._tell_readable)

    def _tell_readable(self) -> None:
        if self._on_readable is not None:
            self._on_readable()

    def _tell_writable(self) -> None:
        if self._on_writable is not None:
            self._on_writable()


class QuicStreams:
    """The streams of one QUIC connection of a link. `accept` takes those that the other end opens, if any may."""

    def __init__(
        self,
        connection: Connection,
        written: Callable[[], None],
        accept: Callable[[QuicStream], None] | None,
    ) -> None:
        self._connection = connection
        self._written = written
        self._accept = accept
        self._streams: dict[int, QuicStream] = {}

    @property
    def may_be_accepted(self) -> bool:
        """Whether the other end may open streams."""
        return self._accept is not None

    def open(self) -> QuicStream:
        """Open one."""
        return self._add(self._connection.open_stream())

    def data_received(self, stream_id: int, data: bytes, end: bool) -> None:
        """Take bytes of a stream, which may be new."""
        stream = self._streams.get(stream_id)
        if stream is None:
            stream = self._add(stream_id)
            assert self._accept is not None
            self._accept(stream)
        if end:
            del self._streams[stream_id]  # nothing comes on it any more
        stream.data_received(data, end)

    def knows(self, stream_id: int) -> bool:
        """Say whether a stream is one of ours."""
        return stream_id in self._streams

    def lost(self) -> None:
        """The connection is over."""
        streams, self._streams = self._streams, {}
        for stream in streams.values():
            stream.lost()

    def _add(self, stream_id: int) -> QuicStream:
        stream = self._streams[stream_id] = QuicStream(self._connection, stream_id, self._written)
        return stream
