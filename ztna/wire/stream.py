"""The frames of the stream carrier (`ztna-stream`): type, length, body.

    0      1            4
    +------+------------+-----------------+
    | type | length u24 | body            |    source: protocol.md, Link: stream carrier
    +------+------------+-----------------+

    01 OPEN     JSON
    02 OPENED   status(1) | window(4)
    03 DATA     at most 65,536 bytes
    04 FIN      nothing
    05 RESET    reason(1)
    06 ACK      position(8)
    07 RESUME   JSON
    08 RESUMED  received(8) | window(4)
    09 PACKETS  JSON
    0A PACKET   an IP packet

The last two are for where UDP is blocked (docs/blocked.md): a carrier that carries the packets of one session.
Frames only: positions, windows and who may open what are sidecar.link's.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from enum import IntEnum
from typing import Annotated

import msgspec

from ztna.errors import ProtocolError
from ztna.jsontypes import decode_hook, decoding, to_json
from ztna.names import ServiceName, SessionId
from ztna.wire.control import Address, LeaseRef

OPEN = 0x01
OPENED = 0x02
DATA = 0x03
FIN = 0x04
RESET = 0x05
ACK = 0x06
RESUME = 0x07
RESUMED = 0x08
PACKETS = 0x09
PACKET = 0x0A

HEADER_BYTES = 4
DATA_BYTES_MAX = 65_536
JSON_BYTES_MAX = 4_096
WINDOW_BYTES_MIN = 64 * 1024
WINDOW_BYTES_MAX = 4 * 1024 * 1024
IP_PACKET_BYTES_MIN, IP_PACKET_BYTES_MAX = 20, 65_535
FORMER_SESSIONS_MAX = 8

_HEADER = struct.Struct(">I")
_OPENED = struct.Struct(">BI")
_POSITION = struct.Struct(">Q")
_RESUMED = struct.Struct(">QI")
_DATA_TYPE = DATA << 24
_LENGTH_MASK = 0xFFFFFF

FlowId = Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{32}$")]
Window = Annotated[int, msgspec.Meta(ge=WINDOW_BYTES_MIN, le=WINDOW_BYTES_MAX)]
# JSON's integers end at 2**63 - 1 in msgspec's checks; a flow of 8 EiB is not going to miss the rest.
Position = Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]
Attempt = Annotated[int, msgspec.Meta(ge=1, le=2**31 - 1)]

Buffer = bytes | memoryview


class OpenStatus(IntEnum):
    """The answer to OPEN and RESUME."""

    OK = 0
    REFUSED = 1
    UNREACHABLE = 2
    TIMED_OUT = 3
    DENIED = 4
    UNKNOWN_FLOW = 5
    STALE_EPOCH = 6


class OpenFrame(msgspec.Struct, frozen=True):
    """Agent -> connector: connect this flow; `window` in bytes is what the agent takes before an ACK."""

    session: SessionId
    flow: FlowId
    service: ServiceName
    lease: LeaseRef
    source: Address
    destination: Address
    window: Window


class OpenedFrame(msgspec.Struct, frozen=True):
    """Connector -> agent; the window in bytes means something only with OK."""

    status: OpenStatus
    window: int


class Data(msgspec.Struct, frozen=True, gc=False):
    """Bytes of the flow. A slice of what was fed: bytes of bytes, a memoryview of a memoryview."""

    data: Buffer


class Fin(msgspec.Struct, frozen=True):
    """No more DATA this way; counts as one position."""


class ResetFrame(msgspec.Struct, frozen=True):
    """The local TCP was reset; `reason` is one byte, 0 when there is none to tell."""

    reason: int


class Ack(msgspec.Struct, frozen=True):
    """The position handed to the local socket so far."""

    position: int


class ResumeFrame(msgspec.Struct, frozen=True):
    """Agent -> connector on a new connection: go on with a known flow from `received`."""

    session: SessionId
    flow: FlowId
    attempt: Attempt
    received: Position
    window: Window


class ResumedFrame(msgspec.Struct, frozen=True):
    """Connector -> agent: goes on; the agent sends again from `received`."""

    received: int
    window: int


class PacketsFrame(msgspec.Struct, frozen=True):
    """Agent -> connector on a free carrier: from OPENED on it carries the IP packets of this session, both ways.

    `former` are sessions of the same agent and service whose flows go on in this one.
    """

    session: SessionId
    service: ServiceName
    former: Annotated[tuple[SessionId, ...], msgspec.Meta(max_length=FORMER_SESSIONS_MAX)] = ()


class PacketFrame(msgspec.Struct, frozen=True, gc=False):
    """One IP packet of the session."""

    packet: bytes


Frame = (
    OpenFrame
    | OpenedFrame
    | Data
    | Fin
    | ResetFrame
    | Ack
    | ResumeFrame
    | ResumedFrame
    | PacketsFrame
    | PacketFrame
)


def data_header(length: int) -> bytes:
    """Return the 4 bytes before a DATA body of 1 to DATA_BYTES_MAX bytes (hot path, not checked)."""
    return _HEADER.pack(_DATA_TYPE | length)


def encode(frame: Frame) -> bytes:
    """Return the whole frame. Raises ProtocolError for DATA, JSON or a packet over their limits."""
    match frame:
        case Data(data):
            if len(data) > DATA_BYTES_MAX:
                raise ProtocolError(f"DATA of {len(data)} bytes: at most {DATA_BYTES_MAX}")
            return _HEADER.pack(_DATA_TYPE | len(data)) + data
        case Ack(position):
            return _framed(ACK, _POSITION.pack(position))
        case Fin():
            return _framed(FIN, b"")
        case OpenFrame():
            return _framed(OPEN, _json(frame))
        case OpenedFrame(status, window):
            return _framed(OPENED, _OPENED.pack(status, window))
        case ResetFrame(reason):
            return _framed(RESET, bytes((reason,)))
        case ResumeFrame():
            return _framed(RESUME, _json(frame))
        case PacketsFrame():
            return _framed(PACKETS, _json(frame))
        case PacketFrame(packet):
            if not IP_PACKET_BYTES_MIN <= len(packet) <= IP_PACKET_BYTES_MAX:
                raise ProtocolError(f"a packet of {len(packet)} bytes")
            return _framed(PACKET, packet)
        case _:
            return _framed(RESUMED, _RESUMED.pack(frame.received, frame.window))


class FrameReader:
    """Cuts the bytes of one carrier into frames; after a ProtocolError it is of no more use.

    DATA is handed on as it comes, without waiting for its frame's end: frame borders mean nothing to
    the flow, so one DATA frame may come out as several Data and no byte is copied twice. Fed bytes
    give bytes; a fed memoryview gives slices of itself, which the caller must be done with before it
    reads into that memory again. An empty DATA comes out as nothing.
    """

    __slots__ = ("_data_left", "_partial")

    def __init__(self) -> None:
        self._data_left = 0
        self._partial = bytearray()

    def feed(self, data: Buffer) -> list[Frame]:
        """Return what these bytes complete, in order. Raises ProtocolError for what is no frame."""
        frames: list[Frame] = []
        at = 0
        end = len(data)
        while at < end:
            left = self._data_left
            if left:
                stop = at + left if left < end - at else end
                frames.append(Data(data[at:stop]))
                self._data_left = left - (stop - at)
                at = stop
            elif not self._partial and end - at >= HEADER_BYTES and data[at] == DATA:
                self._data_left = _data_length(_HEADER.unpack_from(data, at)[0])
                at += HEADER_BYTES
            else:
                at = self._feed_small(data, at, frames)
        return frames

    def _feed_small(self, data: Buffer, at: int, frames: list[Frame]) -> int:
        """Collect a frame that is not DATA, or a DATA header in pieces; return the offset after it."""
        partial = self._partial
        if len(partial) < HEADER_BYTES:
            start = at
            at = min(len(data), at + HEADER_BYTES - len(partial))
            partial += data[start:at]
            if len(partial) < HEADER_BYTES:
                return at
        (header,) = _HEADER.unpack_from(partial)
        if header >> 24 == DATA:
            self._data_left = _data_length(header)
            partial.clear()
            return at
        missing = HEADER_BYTES + _small_length(header) - len(partial)
        start = at
        at = min(len(data), at + missing)
        partial += data[start:at]
        if at - start == missing:
            frames.append(_READERS[header >> 24](bytes(partial[HEADER_BYTES:])))
            partial.clear()
        return at


def _framed(kind: int, body: bytes) -> bytes:
    return _HEADER.pack(kind << 24 | len(body)) + body


def _json(frame: OpenFrame | ResumeFrame | PacketsFrame) -> bytes:
    body = to_json(frame)
    if len(body) > JSON_BYTES_MAX:
        raise ProtocolError(f"frame of {len(body)} bytes of JSON: at most {JSON_BYTES_MAX}")
    return body


def _data_length(header: int) -> int:
    length = header & _LENGTH_MASK
    if length > DATA_BYTES_MAX:
        raise ProtocolError(f"DATA of {length} bytes: at most {DATA_BYTES_MAX}")
    return length


def _small_length(header: int) -> int:
    kind, length = header >> 24, header & _LENGTH_MASK
    limits = _LENGTHS.get(kind)
    if limits is None:
        raise ProtocolError(f"frame of unknown type 0x{kind:02x}")
    if not limits[0] <= length <= limits[1]:
        raise ProtocolError(f"frame of type 0x{kind:02x} with {length} bytes")
    return length


def _read_opened(body: bytes) -> OpenedFrame:
    status, window = _OPENED.unpack(body)
    if status not in _STATUSES:
        raise ProtocolError(f"OPENED with unknown status 0x{status:02x}")
    if status == OpenStatus.OK:
        _expect_window(window)
    return OpenedFrame(OpenStatus(status), window)


def _read_resumed(body: bytes) -> ResumedFrame:
    received, window = _RESUMED.unpack(body)
    _expect_window(window)
    return ResumedFrame(received, window)


def _expect_window(window: int) -> None:
    if not WINDOW_BYTES_MIN <= window <= WINDOW_BYTES_MAX:
        raise ProtocolError(f"window of {window} bytes: {WINDOW_BYTES_MIN} to {WINDOW_BYTES_MAX}")


_STATUSES = frozenset(OpenStatus)
_OPEN_JSON = msgspec.json.Decoder(OpenFrame, dec_hook=decode_hook)
_RESUME_JSON = msgspec.json.Decoder(ResumeFrame, dec_hook=decode_hook)
_PACKETS_JSON = msgspec.json.Decoder(PacketsFrame, dec_hook=decode_hook)
_LENGTHS = {
    OPEN: (2, JSON_BYTES_MAX),
    OPENED: (_OPENED.size, _OPENED.size),
    FIN: (0, 0),
    RESET: (1, 1),
    ACK: (_POSITION.size, _POSITION.size),
    RESUME: (2, JSON_BYTES_MAX),
    RESUMED: (_RESUMED.size, _RESUMED.size),
    PACKETS: (2, JSON_BYTES_MAX),
    PACKET: (IP_PACKET_BYTES_MIN, IP_PACKET_BYTES_MAX),
}
_READERS: dict[int, Callable[[bytes], Frame]] = {
    OPEN: lambda body: decoding(_OPEN_JSON, body),
    OPENED: _read_opened,
    FIN: lambda body: Fin(),
    RESET: lambda body: ResetFrame(body[0]),
    ACK: lambda body: Ack(*_POSITION.unpack(body)),
    RESUME: lambda body: decoding(_RESUME_JSON, body),
    RESUMED: _read_resumed,
    PACKETS: lambda body: decoding(_PACKETS_JSON, body),
    PACKET: PacketFrame,
}
