"""ztna.packet: packets against an independent checksum, and each way to be malformed."""

from __future__ import annotations

import struct
from ipaddress import ip_address

import pytest

from ztna.errors import PacketError
from ztna.packet import (
    PROTOCOL_TCP,
    PROTOCOL_UDP,
    Packet,
    Unreachable,
    build_echo_reply,
    build_echo_request,
    build_udp,
    echo_reply,
    icmp_error,
    parse,
)

A4, B4 = "10.0.0.1", "10.100.0.2"
A6, B6 = "fd00::1", "fd00::6464:2"
PAIRS = [(A4, B4), (A6, B6)]


def ones_complement(data: bytes) -> int:
    """RFC 1071, word by word, unlike the code under test."""
    total = sum(struct.unpack(f">{(len(data) + 1) // 2}H", data + b"\0" * (len(data) % 2)))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return total


def pseudo_header(source: str, destination: str, protocol: int, length: int) -> bytes:
    return ip_address(source).packed + ip_address(destination).packed + struct.pack(">II", length, protocol)


def with_checksum(header: bytes) -> bytes:
    """Return the IPv4 header with its checksum made right."""
    bare = header[:10] + b"\0\0" + header[12:]
    return bare[:10] + struct.pack(">H", 0xFFFF - ones_complement(bare)) + bare[12:]


def ipv4(protocol: int, body: bytes, *, options: bytes = b"", fragment: int = 0, source: str = A4) -> bytes:
    header = struct.pack(
        ">BBHHHBBH4s4s", 0x45 + len(options) // 4, 0, 20 + len(options) + len(body), 0, fragment, 64, protocol, 0,
        ip_address(source).packed, ip_address(B4).packed,
    )  # fmt: skip
    return with_checksum(header + options) + body


def ipv6(protocol: int, body: bytes) -> bytes:
    return struct.pack(
        ">IHBB16s16s", 6 << 28, len(body), protocol, 64, ip_address(A6).packed, ip_address(B6).packed
    ) + body  # fmt: skip


UDP = struct.pack(">HHHH", 1, 2, 12, 0) + b"data"


@pytest.mark.parametrize(("source", "destination"), PAIRS)
@pytest.mark.parametrize("payload", [b"", b"x", b"xy", bytes(1200), bytes(range(256)) * 4 + b"!"])
def test_udp_round_trips_with_right_checksums(source: str, destination: str, payload: bytes) -> None:
    data = build_udp(source, 5353, destination, 53, payload)
    start = 20 if ":" not in source else 40
    version = 4 if start == 20 else 6
    assert parse(data) == Packet(version, source, destination, PROTOCOL_UDP, 5353, 53, payload)
    assert ones_complement(pseudo_header(source, destination, 17, len(data) - start) + data[start:]) == 0xFFFF
    assert data[start + 6 : start + 8] != b"\0\0"
    if version == 4:
        assert ones_complement(data[:20]) == 0xFFFF
        assert (data[6:8], data[8]) == (b"\x40\0", 64)  # DF, TTL


def test_a_zero_udp_checksum_is_sent_as_all_ones() -> None:
    bare = build_udp(A4, 1, B4, 2, b"\0\0")
    (checksum,) = struct.unpack_from(">H", bare, 26)
    assert build_udp(A4, 1, B4, 2, struct.pack(">H", checksum))[26:28] == b"\xff\xff"


@pytest.mark.parametrize(("source", "destination"), PAIRS)
def test_an_echo_is_answered_from_the_address_that_was_asked(source: str, destination: str) -> None:
    request = parse(build_echo_request(source, destination, 7, 8, b"ping!"))
    assert (request.is_echo_request, request.is_echo_reply) == (True, False)
    answer = parse(echo_reply(request))
    assert (answer.is_echo_request, answer.is_echo_reply) == (False, True)
    assert (answer.source, answer.destination) == (destination, source)
    assert (answer.identifier, answer.sequence, answer.payload) == (7, 8, b"ping!")
    with pytest.raises(PacketError):
        echo_reply(answer)


def test_an_all_zero_echo_reply_has_a_checksum_a_kernel_takes() -> None:
    data = build_echo_reply(A4, B4, 0, 0, b"")
    assert ones_complement(data[20:]) == 0xFFFF
    assert parse(data).is_echo_reply


@pytest.mark.parametrize(
    ("kind", "v4", "v6"),
    [
        (Unreachable.NET, (3, 0), (1, 0)),
        (Unreachable.HOST, (3, 1), (1, 3)),
        (Unreachable.PORT, (3, 3), (1, 4)),
        (Unreachable.PROHIBITED, (3, 13), (1, 1)),
        (Unreachable.TOO_BIG, (3, 4), (2, 0)),
    ],
)
def test_errors_quote_the_senders_own_packet(
    kind: Unreachable, v4: tuple[int, int], v6: tuple[int, int]
) -> None:
    for (source, destination), expected in zip(PAIRS, (v4, v6), strict=True):
        original = build_udp(source, 1, destination, 2, b"x" * 64)
        error = parse(icmp_error(original, kind, 1280))
        assert (error.icmp_type, error.icmp_code) == expected
        assert (error.source, error.destination) == (destination, source)
        assert error.payload == original
        assert (error.identifier << 16 | error.sequence) == 1280


@pytest.mark.parametrize(("source", "destination", "limit"), [(A4, B4, 576), (A6, B6, 1280)])
def test_a_long_packet_is_quoted_in_part(source: str, destination: str, limit: int) -> None:
    original = build_udp(source, 1, destination, 2, b"x" * 2000)
    error = icmp_error(original, Unreachable.PORT)
    assert len(error) == limit
    assert original.startswith(parse(error).payload)


@pytest.mark.parametrize(("source", "destination"), PAIRS)
def test_no_error_about_an_error(source: str, destination: str) -> None:
    error = icmp_error(build_udp(source, 1, destination, 2, b""), Unreachable.PORT)
    with pytest.raises(PacketError, match="about an ICMP error"):
        icmp_error(error, Unreachable.PORT)
    icmp_error(build_echo_request(source, destination, 1, 1, b""), Unreachable.HOST)
    icmp_error(ipv4(58, b"\x01") if source == A4 else ipv6(1, b"\x03"), Unreachable.HOST)


def test_other_protocols_are_taken_whole() -> None:
    assert parse(ipv4(PROTOCOL_TCP, b"segment")).payload == b"segment"
    assert parse(ipv6(PROTOCOL_TCP, b"segment")).protocol == PROTOCOL_TCP
    strange = parse(ipv6(1, bytes(8)))
    assert not strange.is_echo_reply


def test_options_are_skipped() -> None:
    assert parse(ipv4(PROTOCOL_UDP, UDP, options=b"\x01" * 8)).payload == b"data"
    assert parse(ipv4(PROTOCOL_UDP, UDP, fragment=0x4000)).payload == b"data"


GOOD = ipv4(PROTOCOL_UDP, UDP)


@pytest.mark.parametrize(
    "data",
    [
        b"", b"\x45", b"\x00" * 40, b"\x55" * 40, GOOD[:19],  # no header
        with_checksum(b"\x44" + GOOD[1:20]) + GOOD[20:], with_checksum(b"\x4f" + GOOD[1:20]) + GOOD[20:],  # IHL
        GOOD[:-1], GOOD + b"\0", with_checksum(GOOD[:2] + b"\0\x14" + GOOD[4:20]) + GOOD[20:],  # total length
        GOOD[:10] + b"\0\0" + GOOD[12:], GOOD[:8] + b"\x3f" + GOOD[9:],  # header checksum
        ipv4(17, UDP, fragment=0x2000), ipv4(17, UDP, fragment=1), ipv4(17, UDP, fragment=0x8000),
        ipv4(17, UDP[:7]), ipv4(17, UDP + b"\0"), ipv4(17, UDP[:-1]),  # UDP
        ipv4(1, b"\x08\0\0\0\0\0\0"), ipv4(1, b"\x08" + bytes(7)),  # ICMP: short, checksum
        b"\x60" * 39, ipv6(17, UDP)[:-1], ipv6(17, UDP) + b"\0", ipv6(17, UDP[:7]),
        ipv6(44, bytes(8)), ipv6(0, bytes(8)), ipv6(60, bytes(8)),  # IPv6 extension headers
        ipv6(58, bytes(8)), ipv6(58, bytes(7)),
    ],
)  # fmt: skip
def test_malformed(data: bytes) -> None:
    with pytest.raises(PacketError):
        parse(data)


def test_a_short_icmpv6_with_a_right_checksum_is_truncated() -> None:
    body = b"\x80\0\0\0"
    folded = ones_complement(pseudo_header(A6, B6, 58, 4) + body)
    with pytest.raises(PacketError, match="truncated"):
        parse(ipv6(58, b"\x80\0" + struct.pack(">H", 0xFFFF - folded)))


def test_a_wrong_udp_checksum_is_left_to_who_receives_it() -> None:
    assert parse(GOOD).payload == b"data"


@pytest.mark.parametrize(("source", "destination"), [(A4, B6), (A6, B4), ("nonsense", B4), (A4, "")])
def test_impossible_addresses(source: str, destination: str) -> None:
    with pytest.raises(PacketError):
        build_udp(source, 1, destination, 2, b"")
    with pytest.raises(PacketError):
        build_echo_request(source, destination, 1, 2, b"")


def test_what_fits_no_packet_is_not_built() -> None:
    with pytest.raises(PacketError):
        build_udp(A4, 1, B4, 2, bytes(65_508))
    assert len(build_udp(A4, 1, B4, 2, bytes(65_507))) == 65_535
    with pytest.raises(PacketError):
        build_echo_reply(A4, B4, 1, 2, bytes(65_508))
