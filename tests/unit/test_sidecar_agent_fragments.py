"""Fragments of packets as this host's kernel cuts them, and as nobody should."""

from __future__ import annotations

import random
import struct

import pytest

from sidecar.agent.fragments import BYTES_MAX, PACKETS_MAX, WAIT_SECONDS, Reassembly
from ztna.packet import build_udp, parse

V4 = ("10.100.0.0", 40_000, "10.100.0.2", 7)
V6 = ("fd12::1", 40_000, "fd12::2", 7)
PAYLOAD = bytes(range(256)) * 20
PIECE_BYTES = 1256
NOW = 100.0


def cut(packet: bytes, number: int = 1) -> list[bytes]:
    """Cut a packet into fragments as a host does (RFC 791, 3.2; RFC 8200, 4.5)."""
    header = 20 if packet[0] >> 4 == 4 else 40
    body = packet[header:]
    found = []
    for offset in range(0, len(body), PIECE_BYTES):
        piece = body[offset : offset + PIECE_BYTES]
        found.append(fragment(packet[:header], number, offset, piece, offset + PIECE_BYTES < len(body)))
    return found


def fragment(head: bytes, number: int, offset: int, piece: bytes, has_more: bool) -> bytes:
    if head[0] >> 4 == 4:
        bits = offset // 8 | (0x2000 if has_more else 0)
        length = 20 + len(piece)
        return head[:2] + struct.pack(">HHH", length, number, bits) + head[8:] + piece
    extension = struct.pack(">BBHI", head[6], 0, offset | has_more, number)
    return head[:4] + struct.pack(">HB", 8 + len(piece), 44) + head[7:] + extension + piece


@pytest.mark.parametrize("ends", [V4, V6])
def test_a_packet_is_whole_when_all_is_there_in_any_order(ends: tuple[str, int, str, int]) -> None:
    packet = build_udp(*ends, PAYLOAD)
    for seed in range(5):
        pieces = cut(packet)
        random.Random(seed).shuffle(pieces)
        reassembly = Reassembly()
        *before, last = [reassembly.take(piece, NOW) for piece in pieces]
        assert before == [None] * (len(pieces) - 1)
        assert last is not None
        whole = parse(last)
        assert (whole.payload, whole.source, whole.destination_port) == (PAYLOAD, ends[0], 7)
        assert reassembly.dropped == 0 and reassembly._bytes == 0


@pytest.mark.parametrize(
    "data",
    [b"", b"\x45", build_udp(*V4, b"x"), build_udp(*V6, b"x"), b"\x41" + cut(build_udp(*V4, PAYLOAD))[0][1:]],
)
def test_what_is_no_fragment_is_passed_on(data: bytes) -> None:
    assert Reassembly().take(data, NOW) == data


def test_packets_do_not_mix() -> None:
    one, other = cut(build_udp(*V4, PAYLOAD), 1), cut(build_udp(*V4, bytes(len(PAYLOAD))), 2)
    reassembly = Reassembly()
    found = [reassembly.take(piece, NOW) for pair in zip(one, other, strict=True) for piece in pair]
    assert [parse(each).payload for each in found if each is not None] == [PAYLOAD, bytes(len(PAYLOAD))]


@pytest.mark.parametrize(
    ("offset", "piece", "has_more"),
    [
        (0, b"again" + bytes(3), True),
        (65_528, bytes(64), False),
        (8, b"an earlier end", False),
    ],
)
def test_what_does_not_fit_spoils_its_packet(offset: int, piece: bytes, has_more: bool) -> None:
    packet = build_udp(*V4, PAYLOAD)
    first, *_, last = cut(packet)
    reassembly = Reassembly()
    assert reassembly.take(first, NOW) is None
    assert reassembly.take(last, NOW) is None
    assert reassembly.take(fragment(packet[:20], 1, offset, piece, has_more), NOW) is None
    assert (reassembly.dropped, reassembly._bytes) == (1, 0)


def test_more_than_the_end_allows_spoils_it_too() -> None:
    packet = build_udp(*V4, PAYLOAD)
    reassembly = Reassembly()
    assert reassembly.take(fragment(packet[:20], 1, 8, bytes(8), False), NOW) is None
    assert reassembly.take(fragment(packet[:20], 1, 0, bytes(64), True), NOW) is None
    assert (reassembly.dropped, reassembly._bytes) == (1, 0)


def test_waiting_is_bounded_in_time_and_packets() -> None:
    packet = build_udp(*V4, PAYLOAD)
    reassembly = Reassembly()
    reassembly.take(cut(packet, 0)[0], NOW)
    reassembly.take(cut(packet, 1)[0], NOW + WAIT_SECONDS)
    assert reassembly.dropped == 1
    for number in range(2, PACKETS_MAX + 3):
        reassembly.take(cut(packet, number)[0], NOW + WAIT_SECONDS)
    assert reassembly.dropped == 3


def test_bytes_are_bounded() -> None:
    head = build_udp(*V4, b"")[:20]
    reassembly, size = Reassembly(), 65_000
    for number in range(BYTES_MAX // size + 1):
        assert number <= PACKETS_MAX
        reassembly.take(fragment(head, number, 0, bytes(size), True), NOW)
    assert (reassembly.dropped, reassembly._bytes) == (1, BYTES_MAX // size * size)
