"""ztna.wire.stream: frames, pieces of frames, and each way to be malformed."""

from __future__ import annotations

import struct
from ipaddress import IPv4Address
from typing import Any

import pytest

from ztna.errors import ProtocolError
from ztna.jsontypes import to_json
from ztna.names import ServiceName, SessionId
from ztna.wire import stream
from ztna.wire.control import Address, LeaseRef
from ztna.wire.stream import (
    DATA_BYTES_MAX,
    WINDOW_BYTES_MAX,
    WINDOW_BYTES_MIN,
    Ack,
    Data,
    Fin,
    Frame,
    FrameReader,
    OpenedFrame,
    OpenFrame,
    OpenStatus,
    PacketFrame,
    PacketsFrame,
    ResetFrame,
    ResumedFrame,
    ResumeFrame,
    data_header,
    encode,
)

FLOW = "0123456789abcdef" * 2
OPEN = OpenFrame(
    SessionId("00010203040506ff"), FLOW, ServiceName("web"), LeaseRef(IPv4Address("10.100.0.2"), 7),
    Address("127.0.0.1", 40000), Address("10.100.0.2", 80), WINDOW_BYTES_MAX,
)  # fmt: skip
RESUME = ResumeFrame(SessionId("00010203040506ff"), FLOW, 1, 2**62, WINDOW_BYTES_MIN)

VECTORS: list[tuple[Frame, bytes]] = [
    (OpenedFrame(OpenStatus.OK, WINDOW_BYTES_MIN), bytes.fromhex("02 000005 00 00010000")),
    (OpenedFrame(OpenStatus.STALE_EPOCH, 0), bytes.fromhex("02 000005 06 00000000")),
    (Data(b"hello"), b"\x03\0\0\x05hello"),
    (Fin(), b"\x04\0\0\0"),
    (ResetFrame(255), b"\x05\0\0\x01\xff"),
    (Ack(2**64 - 1), b"\x06\0\0\x08" + b"\xff" * 8),
    (PacketFrame(b"E" * 20), b"\x0a\0\0\x14" + b"E" * 20),
    (ResumedFrame(1, WINDOW_BYTES_MAX), bytes.fromhex("08 00000c 0000000000000001 00400000")),
]
PACKETS = PacketsFrame(OPEN.session, OPEN.service, (SessionId("f" * 16),))
FRAMES = [OPEN, RESUME, PACKETS, *(frame for frame, _ in VECTORS)]


def raw(kind: int, body: bytes) -> bytes:
    return struct.pack(">I", kind << 24 | len(body)) + body


@pytest.mark.parametrize(("frame", "octets"), VECTORS, ids=lambda value: str(value)[:30])
def test_vectors(frame: Frame, octets: bytes) -> None:
    assert encode(frame) == octets
    assert FrameReader().feed(octets) == [frame]


@pytest.mark.parametrize("frame", [OPEN, RESUME, PACKETS], ids=["open", "resume", "packets"])
def test_json_frames_round_trip(frame: Frame) -> None:
    octets = encode(frame)
    assert octets[4:5] == b"{"
    assert FrameReader().feed(octets) == [frame]


def test_byte_by_byte_everything_comes_out_the_same() -> None:
    octets = b"".join(map(encode, FRAMES))
    reader = FrameReader()
    got = [frame for at in range(len(octets)) for frame in reader.feed(octets[at : at + 1])]
    assert b"".join(bytes(frame.data) for frame in got if isinstance(frame, Data)) == b"hello"
    assert [frame for frame in got if not isinstance(frame, Data)] == [
        frame for frame in FRAMES if not isinstance(frame, Data)
    ]


def test_data_is_handed_on_before_its_frame_is_whole() -> None:
    reader = FrameReader()
    assert reader.feed(data_header(10) + b"01234") == [Data(b"01234")]
    assert reader.feed(b"56789" + encode(Fin())) == [Data(b"56789"), Fin()]


def test_a_fed_memoryview_gives_slices_of_itself() -> None:
    memory = bytearray(encode(Data(b"hello")))
    (frame,) = FrameReader().feed(memoryview(memory))
    assert isinstance(frame, Data)
    memory[4:] = b"HELLO"
    assert bytes(frame.data) == b"HELLO"


def test_an_empty_data_frame_is_nothing() -> None:
    assert FrameReader().feed(data_header(0) + encode(Fin())) == [Fin()]
    assert encode(Data(b"")) == data_header(0)


def test_the_data_header_is_the_encoders() -> None:
    body = bytes(DATA_BYTES_MAX)
    assert data_header(DATA_BYTES_MAX) + body == encode(Data(memoryview(body)))
    assert FrameReader().feed(encode(Data(body))) == [Data(body)]


def open_with(**changes: Any) -> bytes:
    return raw(stream.OPEN, to_json({name: getattr(OPEN, name) for name in OPEN.__struct_fields__} | changes))


def resume_with(**changes: Any) -> bytes:
    return raw(
        stream.RESUME, to_json({name: getattr(RESUME, name) for name in RESUME.__struct_fields__} | changes)
    )


@pytest.mark.parametrize(
    "octets",
    [
        b"\0\0\0\0", b"\x0b\0\0\0", b"\xff\xff\xff\xff", b"\x16\x03\x01\x02",  # no such type, TLS in TLS
        b"\x03\x01\0\x01", b"\x03\xff\xff\xff",  # DATA too long
        b"\x04\0\0\x01", b"\x05\0\0\0", b"\x05\0\0\x02", b"\x06\0\0\x07", b"\x02\0\0\x04", b"\x08\0\0\x0b",
        b"\x09\0\0\0", b"\x0a\0\0\x13", b"\x0a\x01\0\0",  # no packet is so small, or so large
        raw(stream.PACKETS, b"{}"),
        raw(stream.PACKETS, to_json({"session": "1" * 16, "service": "web", "former": ["2" * 16] * 9})),
        b"\x01\0\0\x01", b"\x01\0\x10\x01", b"\x07\xff\xff\xff",  # JSON of impossible length
        raw(stream.OPENED, struct.pack(">BI", 7, WINDOW_BYTES_MIN)),
        raw(stream.OPENED, struct.pack(">BI", 0, WINDOW_BYTES_MIN - 1)),
        raw(stream.OPENED, struct.pack(">BI", 0, WINDOW_BYTES_MAX + 1)),
        raw(stream.RESUMED, struct.pack(">QI", 0, 0)),
        raw(stream.OPEN, b"{}"), raw(stream.OPEN, b"[[[["),
        open_with(window=0), open_with(window=WINDOW_BYTES_MAX + 1), open_with(flow=FLOW.upper()),
        open_with(flow=FLOW[1:]), open_with(session="x"), open_with(service="a.b"), open_with(lease=None),
        open_with(destination="10.0.0.1:80"), open_with(source={"ip": "x", "port": 1}),
        resume_with(attempt=0), resume_with(received=-1), resume_with(received=2**63), resume_with(flow=""),
    ],
)  # fmt: skip
def test_malformed(octets: bytes) -> None:
    with pytest.raises(ProtocolError):
        FrameReader().feed(octets)
    reader = FrameReader()
    with pytest.raises(ProtocolError):
        for at in range(len(octets)):
            reader.feed(octets[at : at + 1])


def test_what_is_too_long_is_not_sent() -> None:
    with pytest.raises(ProtocolError, match="65537"):
        encode(Data(bytes(DATA_BYTES_MAX + 1)))
    with pytest.raises(ProtocolError, match="JSON"):
        encode(
            OpenFrame(
                OPEN.session, "f" * 5000, OPEN.service, OPEN.lease, OPEN.source, OPEN.destination, 65536
            )
        )


@pytest.mark.parametrize("size", [19, 65_536])
def test_a_packet_of_no_good_size_is_not_sent(size: int) -> None:
    with pytest.raises(ProtocolError):
        encode(PacketFrame(bytes(size)))
