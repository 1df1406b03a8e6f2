"""ztna.wire.datagram: protocol.md's vectors, and each way to be malformed."""

from __future__ import annotations

import pytest

from ztna.errors import ProtocolError
from ztna.names import SessionId
from ztna.wire.datagram import (
    Ack,
    Datagram,
    Nack,
    NackStatus,
    Qad,
    RawPacket,
    RegisterAgent,
    RegisterConnector,
    ServicePacket,
    SessionPacket,
    decode,
    encode,
    service_packet,
    split_service_packet,
)

SESSION = SessionId("0001020304050607")

VECTORS: list[tuple[Datagram, str]] = [
    (Qad("203.0.113.5", 54321), "01 cb007105 d431"),
    (Qad("2001:db8::1", 4433), "01 20010db8000000000000000000000001 1151"),
    (RegisterAgent(b"web"), "10 03 776562"),
    (RegisterConnector(b""), "11 00"),
    (Ack(b"test-service"), "12000c746573742d73657276696365"),
    (Nack(NackStatus.NOT_UTF8, b""), "13 01 00"),
    (Nack(NackStatus.LIMIT_REACHED, b"a"), "13 05 01 61"),
    (ServicePacket(b"web", b"E..."), "2f 03 776562 452e2e2e"),
    (SessionPacket(SESSION, b"E"), "2e 0001020304050607 45"),
    (RawPacket(b"\x45rest"), "45 72657374"),
    (RawPacket(b"\x6f"), "6f"),
]


@pytest.mark.parametrize(("datagram", "octets"), VECTORS, ids=lambda value: str(value)[:40])
def test_vectors(datagram: Datagram, octets: str) -> None:
    assert encode(datagram) == bytes.fromhex(octets)
    assert decode(bytes.fromhex(octets)) == datagram


@pytest.mark.parametrize(
    "octets",
    [
        "", "00", "02", "14", "44", "50", "5f", "70", "ff",  # no such type
        "01", "01 cb007105 d4", "01 cb007105 d431 00",  # QAD of another length
        "10", "10 03 7765", "11 01",  # truncated registrations
        "12", "12 01 00", "12 00", "12 00 02 61", "12 00 01 61 62",  # ACK
        "13", "13 00 00", "13 06 00", "13 01", "13 01 01", "13 01 00 00",  # NACK
        "2f", "2f 00", "2f 00 45 45", "2f 03 776562", "2f 03 7765", "2f 01 61",  # no service or no packet
        "2e", "2e 00010203040506", "2e 0001020304050607",  # no session or no packet
    ],
)  # fmt: skip
def test_malformed(octets: str) -> None:
    with pytest.raises(ProtocolError):
        decode(bytes.fromhex(octets))


def test_trailing_bytes_of_a_registration_are_ignored() -> None:
    assert decode(bytes.fromhex("10 01 61 ffff")) == RegisterAgent(b"a")
    assert decode(bytes.fromhex("11 01 61 ffff")) == RegisterConnector(b"a")


def test_a_registration_may_carry_what_is_no_utf8_so_that_it_can_be_refused() -> None:
    assert decode(b"\x10\x01\xff") == RegisterAgent(b"\xff")


def test_the_longest_service_is_255_bytes() -> None:
    assert split_service_packet(service_packet(b"s" * 255, b"E")) == (b"s" * 255, b"E")
    for service in (b"", b"s" * 256):
        with pytest.raises(ProtocolError):
            service_packet(service, b"E")
    with pytest.raises(ProtocolError):
        encode(RegisterAgent(b"s" * 256))


@pytest.mark.parametrize("packet", [b"", b"\x44", b"\x50", b"\x70"])
def test_a_raw_packet_begins_as_an_ip_packet(packet: bytes) -> None:
    with pytest.raises(ProtocolError):
        encode(RawPacket(packet))


def test_split_refuses_other_datagrams() -> None:
    with pytest.raises(ProtocolError):
        split_service_packet(b"\x2e\x01aEEE")
