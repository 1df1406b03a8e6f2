"""Bulk UDP: runs leave and arrive as one, and nobody can tell."""

from __future__ import annotations

import random

import pytest

from ztna import udp
from ztna.udp_bulk import BulkSocket


@pytest.mark.parametrize("kind", [BulkSocket, udp.RawSocket])
def test_any_mixture_of_sizes_and_destinations_arrives_as_it_was_sent(kind: type[BulkSocket]) -> None:
    """Runs of one size leave as one message each, shorter last segments and many runs among them."""
    sender = BulkSocket.open(("127.0.0.1", 0))
    sinks = [kind.open(("127.0.0.1", 0)) for _ in range(2)]
    draw = random.Random(7)
    expected: list[list[bytes]] = [[], []]
    packets = []
    for number in range(400):
        place = draw.randrange(2)
        size = draw.choice([1200, 1200, 700, 1, 0])
        for _ in range(draw.choice([1, 2, 3, 100]) if number % 10 == 0 else draw.randrange(1, 4)):
            data = draw.randbytes(size)
            expected[place].append(data)
            packets.append((data, udp.encode_address(sinks[place].address)))
    for start in range(0, len(packets), 97):
        sender.send(packets[start : start + 97])
    assert (sender.sent, sender.dropped) == (len(packets), 0)
    for sink, wanted in zip(sinks, expected, strict=True):
        arrived = []
        while batch := sink.receive():
            arrived += [data for data, source in batch]
            assert {udp.decode_address(source) for _, source in batch} == {sender.address}
        assert arrived == wanted
        assert sink.received == len(wanted)
        sink.close()
    sender.close()


def test_what_cannot_be_segmented_goes_packet_by_packet(monkeypatch: pytest.MonkeyPatch) -> None:
    # A control message of a kind that no kernel knows: EINVAL, as from a kernel without UDP_SEGMENT.
    monkeypatch.setattr("ztna.udp_kernel.UDP_SEGMENT", 999)
    sender, sink = BulkSocket.open(("127.0.0.1", 0)), udp.RawSocket.open(("127.0.0.1", 0))
    packets = [(bytes([n]) * 50, udp.encode_address(sink.address)) for n in range(20)]
    for _ in range(2):
        sender.send(packets)
        assert [data for data, _ in sink.receive()] == [data for data, _ in packets]
    assert (sender.sent, sender.dropped, sender._segments_max) == (40, 0, 1)
    nowhere = udp.encode_address(("192.0.2.1", 9))
    sender._segments_max = 64
    sender.send([(b"x", nowhere)] * 3)
    assert (sender.dropped, sender._segments_max) == (3, 64)
    sender.close()
    sink.close()
