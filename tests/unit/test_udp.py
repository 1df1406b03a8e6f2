"""Batched UDP over real loopback sockets."""

from __future__ import annotations

import asyncio
import socket

import pytest

from ztna import udp
from ztna.errors import ZtnaError
from ztna.udp_bulk import PAYLOAD_BYTES_MAX

DEADLINE_S = 5


class Inbox:
    def __init__(self) -> None:
        self.packets: list[tuple[bytes, udp.SockAddr]] = []
        self.arrived = asyncio.Event()

    def __call__(self, batch: list[tuple[bytes, udp.SockAddr]]) -> None:
        self.packets += batch
        self.arrived.set()

    async def has(self, count: int) -> None:
        async with asyncio.timeout(DEADLINE_S):
            while len(self.packets) < count:
                self.arrived.clear()
                await self.arrived.wait()


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
async def test_packets_arrive_in_order_with_their_source(host: str) -> None:
    inbox = Inbox()
    receiver = udp.UdpSocket.open((host, 0), inbox)
    sender = udp.UdpSocket.open((host, 0), Inbox())
    sent = [(bytes([i]) * (i + 1), receiver.address) for i in range(200)]
    sender.send(sent)
    await inbox.has(200)
    assert inbox.packets == [(data, sender.address) for data, _ in sent]
    receiver.close()
    sender.close()
    sender.close()
    sender.send(sent)


async def test_an_unreachable_destination_does_not_stop_the_rest() -> None:
    inbox = Inbox()
    receiver = udp.UdpSocket.open(("127.0.0.1", 0), inbox)
    sender = udp.UdpSocket.open(("127.0.0.1", 0), Inbox())
    # EINVAL: loopback cannot send to a foreign network's address from 127.0.0.1.
    sender.send([(b"a", receiver.address), (b"b", ("192.0.2.1", 9)), (b"c", receiver.address)])
    await inbox.has(2)
    assert [data for data, _ in inbox.packets] == [b"a", b"c"]
    assert sender.counters["dropped"] == 1
    receiver.close()
    sender.close()


async def test_large_payloads_pass_whole() -> None:
    inbox = Inbox()
    receiver, sender = (
        udp.UdpSocket.open(("127.0.0.1", 0), inbox),
        udp.UdpSocket.open(("127.0.0.1", 0), Inbox()),
    )
    largest = bytes(PAYLOAD_BYTES_MAX)
    sender.send(
        [(largest, receiver.address)] * 10 + [(largest + b"x", receiver.address), (b"", receiver.address)]
    )
    await inbox.has(11)
    assert [data for data, _ in inbox.packets] == [largest] * 10 + [b""]
    assert sender.counters == {"received": 0, "sent": 11, "dropped": 1}
    receiver.close()
    sender.close()


async def test_the_other_family_is_dropped_and_counted() -> None:
    sender = udp.UdpSocket.open(("127.0.0.1", 0), Inbox())
    sender.send([(b"x", ("::1", 9))])
    assert sender.counters["dropped"] == 1
    sender.close()


async def test_a_taken_port_is_named() -> None:
    first = udp.UdpSocket.open(("127.0.0.1", 0), Inbox())
    with pytest.raises(ZtnaError, match=rf"127\.0\.0\.1:{first.address[1]}"):
        udp.UdpSocket.open(first.address, Inbox())
    first.close()


@pytest.mark.parametrize("address", [("127.0.0.1", 1), ("2001:db8::1", 65535)])
def test_raw_addresses_round_trip(address: udp.SockAddr) -> None:
    assert udp.decode_address(udp.encode_address(address)) == address


@pytest.mark.parametrize("address", [("localhost", 1), ("127.0.0.1", 70000), ("a:b", 1)])
def test_a_name_is_no_raw_address(address: udp.SockAddr) -> None:
    with pytest.raises(ZtnaError):
        udp.encode_address(address)


def test_raw_sockets_answer_a_batch_without_reading_addresses() -> None:
    server = udp.RawSocket.open(("127.0.0.1", 0))
    plain = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    plain.bind(("127.0.0.1", 0))
    plain.settimeout(DEADLINE_S)
    for i in range(3):
        plain.sendto(b"%d" % i, server.address)
    server.send([(data + b"!", source) for data, source in server.receive()])
    assert sorted(plain.recv(100) for _ in range(3)) == [b"0!", b"1!", b"2!"]
    assert server.receive() == []
    plain.close()
    server.close()


def test_replies_go_out_of_the_slots_their_packets_came_in() -> None:
    server = udp.RawSocket.open(("127.0.0.1", 0))
    plain = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    plain.bind(("127.0.0.1", 0))
    plain.settimeout(DEADLINE_S)
    asked: list[tuple[bytes, udp.SockAddr]] = []

    def otherwise(data: bytes, source: udp.RawAddress) -> bytes | None:
        asked.append((data, udp.decode_address(source)))
        return {b"3-quiet": None, b"4-long": b"4" * 3000, b"5-odd": b"5" * (udp.SLOT_BYTES + 1)}.get(
            data, data[:1]
        )

    packets = [b"1-known", b"2-other", b"3-quiet", b"4-long", b"5-odd", b"6-known", b"", b"7" * 5000]
    for packet in packets:
        plain.sendto(packet, server.address)
    ready = {b"known": b"-yes"}
    received = [server.reply(ready, {b"\x7f\0\0\1": True}, otherwise)]
    while sum(received) < len(packets):
        received.append(server.reply(ready, {b"\x7f\0\0\1": True}, otherwise))
    long, odd = b"4" * 3000, b"5" * (udp.SLOT_BYTES + 1)
    answers = sorted(plain.recv(9000) for _ in range(5))
    assert answers == sorted([b"1--yes", b"2", long, odd, b"6--yes"])
    assert [data for data, _ in asked] == [b"2-other", b"3-quiet", b"4-long", b"5-odd", b""]
    assert {source for _, source in asked} == {plain.getsockname()}
    assert (server.received, server.sent, server.truncated, server.dropped) == (8, 5, 1, 0)
    plain.close()
    server.close()


def test_a_reply_knows_no_host_but_those_that_are_true() -> None:
    server = udp.RawSocket.open(("127.0.0.1", 0))
    plain = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    plain.settimeout(DEADLINE_S)
    for known in ({}, {b"\x7f\0\0\1": False}):
        plain.sendto(b"12known", server.address)
        while not server.reply({b"known": b"told"}, known, lambda data, source: b"no"):
            pass
        assert plain.recv(100) == b"no"
    plain.close()
    server.close()
