"""Floods against the QUIC driver: strangers leave nothing behind, peers what they may, bystanders notice nothing."""

from __future__ import annotations

import os
import struct
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from aioquic import tls
from aioquic._buffer import Buffer
from aioquic.quic.connection import QuicConnection
from aioquic.quic.packet import QuicPacketType, encode_quic_version_negotiation, pull_quic_header

from tests.support.certificates import Pki
from tests.support.quic_memory import HERE, Bench, sealed
from ztna import quic
from ztna.quic import DATAGRAM_QUEUE_MAX, Packets
from ztna.quic_engine import CRYPTO_BYTES_MAX, CRYPTO_FRAGMENTS_MAX, STREAM_FRAGMENTS_MAX
from ztna.reasons import Reason
from ztna.telemetry import DROPS, REFUSALS

FLOOD_PACKETS = 600
PAYLOAD_BYTES = 1300

CRYPTO_BUFFER_EXCEEDED = 0x0D
CONNECTION_ID_LIMIT_ERROR = 0x09
STREAM_LIMIT_ERROR = 0x04


@pytest.fixture(scope="module")
def pki(tmp_path_factory: pytest.TempPathFactory) -> Pki:
    return Pki(Path(tmp_path_factory.mktemp("pki")))


def frame(*values: int, body: bytes = b"") -> bytes:
    buf = Buffer(capacity=2000)
    for value in values:
        buf.push_uint_var(value)
    buf.push_bytes(body)
    return bytes(buf.data)


def address(number: int) -> tuple[str, int]:
    return f"198.51.{number >> 8 & 0xFF}.{number & 0xFF}", 1024 + number % 60_000


def initials(bench: Bench, count: int) -> Iterator[tuple[bytes, tuple[str, int]]]:
    """First packets of strangers, each from an address of its own."""
    for number in range(count):
        client = bench.begin(address(number))
        yield client.datagrams_to_send(0.0)[0][0], address(number)


def replies(bench: Bench) -> Packets:
    sent, bench.sent = bench.sent, []
    return sent


def drops(where: str, why: str) -> float:
    return float(DROPS.labels(where, why)._value.get())


def still_served(bench: Bench, client: QuicConnection, number: int = 0) -> bool:
    """Whether a bystander is heard."""
    client.send_datagram_frame(b"undisturbed")
    bench.pump(client)
    return bench.handlers[number].datagrams[-1:] == [b"undisturbed"]


# Strangers


async def test_a_flood_of_initials_leaves_nothing_behind(pki: Pki) -> None:
    bench = Bench(pki, retry=True)
    bystander = bench.connect()
    routes = len(bench.server._routes)
    flood = list(initials(bench, 500))
    bench.server.packets_received(flood)
    answers = replies(bench)
    # One Retry each, shorter than what it answers; no state.
    assert len(answers) == len(flood)
    assert all(
        pull_quic_header(Buffer(data=data), 20).packet_type is QuicPacketType.RETRY for data, _ in answers
    )
    assert all(len(data) < 300 for data, _ in answers)
    assert (bench.server.half_open, len(bench.server._routes)) == (0, routes)
    assert still_served(bench, bystander)


async def test_retry_is_asked_for_under_load_even_where_it_is_off(pki: Pki) -> None:
    bench = Bench(pki, retry=False, half_open_max=40)
    bench.server.packets_received(list(initials(bench, 100)))
    # A quarter is let in unproved; from then on a Retry each.
    assert bench.server.half_open == 10
    retries = [
        data
        for data, _ in replies(bench)
        if pull_quic_header(Buffer(data=data), 20).packet_type is QuicPacketType.RETRY
    ]
    assert len(retries) == 90
    # And who proves its address comes in meanwhile.
    assert bench.connect(("203.0.113.9", 4000))


async def test_one_source_that_proves_itself_takes_its_share_and_leaves_the_others_theirs(pki: Pki) -> None:
    bench = Bench(pki, retry=True, half_open_max=40, half_open_per_source=10, where="share")
    bystander = bench.connect()
    before = REFUSALS.labels("share", Reason.LIMIT_REACHED.value)._value.get()
    # Thirty clients of one host, and of one IPv6 network, answer the Retry and never finish.
    for number in range(30):
        for host in ("198.51.100.7", f"2001:db8::{number:x}"):
            client = bench.begin((host, 2000 + number))
            bench.pump(client, (host, 2000 + number))
            bench.server.packets_received(
                [(data, (host, 2000 + number)) for data, _ in client.datagrams_to_send(time.monotonic())]
            )
            replies(bench)
    assert bench.server.half_open == 20
    assert REFUSALS.labels("share", Reason.LIMIT_REACHED.value)._value.get() >= before + 40
    # Everybody else comes in as before.
    for number in range(25):
        assert bench.connect((f"203.0.113.{number}", 4000))
    assert bench.server.half_open == 20
    assert still_served(bench, bystander)


async def test_a_source_that_others_write_on_packets_keeps_its_share(pki: Pki) -> None:
    bench = Bench(pki, retry=False, half_open_max=400, half_open_per_source=20)
    for number in range(100):
        client = bench.begin()
        bench.server.packets_received([(client.datagrams_to_send(0.0)[0][0], ("192.0.2.1", 1024 + number))])
    # A quarter of its share without proof, and then only who gets its packets.
    assert bench.server.half_open == 5
    replies(bench)
    assert bench.connect(("192.0.2.1", 4000))


async def test_nobody_unproved_gets_more_than_three_times_what_it_sent(pki: Pki) -> None:
    clock = [1000.0]
    bench = Bench(pki)
    bench.server.clock = lambda: clock[0]
    [(initial, where)] = initials(bench, 1)
    bench.server.packets_received([(initial, where)])
    # It never answers, and every retransmission is asked for by time.
    for _ in range(200):
        clock[0] += 0.1
        for connection in list(bench.server._cids):
            connection._on_timer()
        bench.server._flush()
    told = sum(len(data) for data, to in replies(bench) if to == where)
    assert 1200 < told <= 3 * len(initial)
    assert bench.server.half_open == 0


async def test_version_negotiation_is_never_answered_and_never_larger(pki: Pki) -> None:
    bench, stranger = Bench(pki, retry=True), address(7)
    offer = encode_quic_version_negotiation(b"s" * 20, b"d" * 8, [1, 2])
    bystander = bench.connect()
    before = len(bench.server._routes)
    for _ in range(100):
        bench.server.packets_received([(offer, stranger), (offer + bytes(1300), stranger)])
    # Also to the CID of somebody who is here.
    known = encode_quic_version_negotiation(b"s" * 8, bystander._peer_cid.cid, [0x0A0A0A0A])
    bench.server.packets_received([(known, stranger), (known + bytes(1300), stranger)])
    assert [data for data, to in replies(bench) if to == stranger] == []
    unknown = bytes.fromhex("c00a0a0a0a08") + b"d" * 8 + b"\x08" + b"s" * 8 + bytes(1200)
    bench.server.packets_received([(unknown, stranger)] * 100)
    offers = [data for data, to in replies(bench) if to == stranger]
    assert len(offers) == 100 and all(len(data) * 10 < len(unknown) for data in offers)
    assert len(bench.server._routes) == before
    assert still_served(bench, bystander)


async def test_resets_are_rationed_and_shorter_than_what_they_answer(pki: Pki) -> None:
    bench = Bench(pki)
    bench.server.clock = lambda: 1000.0
    flood = [(b"\x41" + os.urandom(60), address(number)) for number in range(2000)]
    bench.server.packets_received(flood)
    answers = replies(bench)
    assert len(answers) == quic.RESETS_PER_SECOND
    assert all(len(data) < 61 for data, _ in answers)


def initial_with(bench: Bench, payload: bytes) -> tuple[QuicConnection, Callable[[bytes], bytes]]:
    """Return a client that has spoken first, and what seals more Initial packets of it."""
    client = bench.begin()
    bench.server.packets_received([(client.datagrams_to_send(0.0)[0][0], HERE)])
    number = 100

    def seal(payload: bytes) -> bytes:
        nonlocal number
        number += 1
        payload = payload.ljust(1200, b"\0")
        length = struct.pack(">H", 0x4000 | (2 + len(payload) + 16))
        to = client._peer_cid.cid
        header = b"\xc1\0\0\0\1" + bytes((len(to),)) + to
        header += (
            bytes((len(client.host_cid),)) + client.host_cid + b"\0" + length + struct.pack(">H", number)
        )
        crypto = client._cryptos_initial[1]
        return bytes(crypto.send.encrypt_packet(header, payload, number))

    return client, seal


@pytest.mark.parametrize("kind", ["gap", "long message", "fragments"])
async def test_a_handshake_may_not_be_made_up_of_holes(pki: Pki, kind: str) -> None:
    """CRYPTO floods of a stranger: nothing is set aside for bytes that have not come."""
    bench = Bench(pki)
    _, seal = initial_with(bench, b"")
    [connection] = bench.server._cids
    hello_bytes = connection._engine._crypto_streams[tls.Epoch.INITIAL].receiver.starting_offset()
    packets = []
    if kind == "gap":
        packets = [seal(frame(0x06, CRYPTO_BYTES_MAX, 1, body=b"x"))]
    elif kind == "long message":
        # A TLS message of 16 MiB that comes without a gap, a thousand bytes each.
        data = (b"\x0b\xff\xff\xff" + bytes(CRYPTO_BYTES_MAX))[: CRYPTO_BYTES_MAX + 1000]
        for at in range(0, len(data), 1000):
            piece = data[at : at + 1000]
            packets.append(seal(frame(0x06, hello_bytes + at, len(piece), body=piece)))
    else:
        one_byte_each = [
            frame(0x06, hello_bytes + 10 + 2 * each, 1, body=b"x") for each in range(CRYPTO_FRAGMENTS_MAX + 1)
        ]
        packets = [seal(b"".join(one_byte_each))]
    bench.server.packets_received([(packet, HERE) for packet in packets])
    assert connection._engine.close_event is not None
    assert connection._engine.close_event[0] in (CRYPTO_BUFFER_EXCEEDED, 0x100 + 10)
    assert bench.server.half_open == 0


# Peers that were let in


class Flood:
    """One peer of many that sends whatever frames it likes."""

    def __init__(self, pki: Pki, **changes: object) -> None:
        self.bench = Bench(pki, **changes)
        self.bystander = self.bench.connect(("192.0.2.99", 9))
        self.client = self.bench.connect()
        self.connection = self.bench.handlers[1].connection
        self._number = 1000

    def packet(self, payload: bytes) -> bytes:
        self._number += 1
        return sealed(self.client, payload, self._number)

    def cpu_per_packet(self, payloads: list[bytes]) -> float:
        """Take the packets one by one and return the CPU seconds of each."""
        packets = [(self.packet(payload), HERE) for payload in payloads]
        started = time.process_time()
        for packet in packets:
            self.bench.server.packets_received([packet])
            self.bench.sent.clear()
        return (time.process_time() - started) / len(packets)

    @property
    def closed_with(self) -> int | None:
        event = self.connection._engine.close_event
        return None if event is None else event[0]

    def bystander_is_served(self) -> bool:
        self.bench.sent.clear()
        self.bystander.send_datagram_frame(b"undisturbed")
        self.bench.pump(self.bystander, ("192.0.2.99", 9))
        return self.bench.handlers[0].datagrams == [b"undisturbed"]


def filled(one: Callable[[int], bytes]) -> bytes:
    """Return a packet's worth of frames."""
    payload, number = b"", 0
    while len(payload) + len(one(number)) <= PAYLOAD_BYTES:
        payload += one(number)
        number += 1
    return payload


FLOODS = {
    "PATH_CHALLENGE": lambda at: filled(lambda n: frame(0x1A, body=struct.pack(">Q", at * 1000 + n))),
    "PATH_RESPONSE": lambda at: filled(lambda n: frame(0x1B, body=struct.pack(">Q", at * 1000 + n))),
    "ACK ranges": lambda at: frame(0x02, 10_000, 0, 600, 0, *(0, 0) * 600),
    "ACK frames": lambda at: filled(lambda n: frame(0x02, n % 8, 0, 0, 0)),
    "PING": lambda at: filled(lambda n: frame(0x01)),
    "MAX_STREAMS": lambda at: filled(lambda n: frame(0x12, at * 1000 + n)),
    "MAX_STREAM_DATA": lambda at: filled(lambda n: frame(0x11, 0, at * 1000 + n)),
    "RETIRE_CONNECTION_ID": lambda at: frame(0x19, 1 + at % 6),
    "duplicate CRYPTO": lambda at: filled(lambda n: frame(0x06, 0, 4, body=b"abcd")),
    "STREAM of a byte": lambda at: filled(lambda n: frame(0x0E, 0, at * 300 + n, 1, body=b"x")),
}


@pytest.mark.parametrize("kind", FLOODS)
async def test_a_flood_of_frames_costs_flat_cpu_and_bounded_memory(pki: Pki, kind: str) -> None:
    """The last packets of a flood cost what the first did: nothing has piled up."""
    flood = Flood(pki)
    payloads = [FLOODS[kind](at) for at in range(FLOOD_PACKETS)]
    third = FLOOD_PACKETS // 3
    early = flood.cpu_per_packet(payloads[:third])
    middle = flood.cpu_per_packet(payloads[third : 2 * third])
    late = flood.cpu_per_packet(payloads[2 * third :])
    assert late < 3 * max(early, middle) + 0.001, (early, middle, late)
    engine = flood.connection._engine
    assert all(len(path.remote_challenges) <= 32 for path in engine._network_paths)
    assert len(engine._network_paths) <= 8
    assert all(len(space.ack_queue) <= 64 for space in engine._spaces.values())
    assert len(engine._host_cids) <= 8 and len(flood.bench.server._cids[flood.connection]) <= 20
    assert len(engine._streams) <= 256 and len(engine._events) <= 1
    assert flood.bystander_is_served()


async def test_packet_numbers_with_gaps_keep_a_short_list(pki: Pki) -> None:
    """Each gap is a range to be acknowledged, and this peer never acknowledges our ACKs."""
    flood = Flood(pki)
    costs = []
    for _ in range(3):
        packets = []
        for _ in range(1000):
            flood._number += 1
            packets.append((flood.packet(frame(0x01)), HERE))
        started = time.process_time()
        for packet in packets:
            flood.bench.server.packets_received([packet])
        costs.append(time.process_time() - started)
    assert costs[2] < 3 * costs[1] + 0.1
    assert len(flood.connection._engine._spaces[tls.Epoch.ONE_RTT].ack_queue) <= 64
    assert flood.bystander_is_served()


async def test_a_flood_of_new_connection_ids_ends_that_connection(pki: Pki) -> None:
    flood = Flood(pki)
    for number in range(1, 200):
        cid = b"\x14" + os.urandom(20) + os.urandom(16)
        flood.bench.server.packets_received([(flood.packet(frame(0x18, 100 + number, 0, body=cid)), HERE)])
    assert flood.closed_with == CONNECTION_ID_LIMIT_ERROR
    assert len(flood.connection._engine._peer_cid_available) <= 9
    assert flood.bystander_is_served()


async def test_retiring_what_was_never_used_up_is_bounded_too(pki: Pki) -> None:
    """Each new CID retires all before it, and none of our retirements is acknowledged."""
    flood = Flood(pki)
    for number in range(100, 400):
        cid = b"\x14" + os.urandom(20) + os.urandom(16)
        flood.bench.server.packets_received([(flood.packet(frame(0x18, number, number, body=cid)), HERE)])
        flood.bench.sent.clear()
    assert flood.closed_with in (None, CONNECTION_ID_LIMIT_ERROR)
    assert len(flood.connection._engine._retire_connection_ids) <= 101
    assert flood.bystander_is_served()


async def test_stream_ids_beyond_the_limit_end_that_connection(pki: Pki) -> None:
    flood = Flood(pki)
    flood.bench.server.packets_received([(flood.packet(frame(0x0A, 4 * 100_000, 1, body=b"x")), HERE)])
    assert flood.closed_with == STREAM_LIMIT_ERROR
    assert len(flood.connection._engine._streams) <= 1
    assert flood.bystander_is_served()


async def test_a_stream_of_holes_ends_that_connection(pki: Pki) -> None:
    flood = Flood(pki)
    holes = [frame(0x0E, 0, 10 + 2 * each, 1, body=b"x") for each in range(STREAM_FRAGMENTS_MAX + 1)]
    for at in range(0, len(holes), 100):
        flood.bench.server.packets_received([(flood.packet(b"".join(holes[at : at + 100])), HERE)])
    assert flood.closed_with == 0x01
    assert flood.bystander_is_served()


async def test_packets_from_everywhere_keep_a_short_list_of_paths(pki: Pki) -> None:
    """A peer whose packets come from ever new addresses: each would be probed."""
    flood = Flood(pki)
    for number in range(500):
        flood.bench.server.packets_received([(flood.packet(frame(0x01)), address(number))])
    sent: dict[tuple[str, int], int] = {}
    for data, to in replies(flood.bench):
        sent[to] = sent.get(to, 0) + len(data)
    assert len(flood.connection._engine._network_paths) <= 8
    # And no address that did not prove itself hears more than three times what came from it.
    assert all(size <= 3 * 1300 for to, size in sent.items() if to != HERE)
    assert flood.bystander_is_served()


# Slow peers


async def test_a_flood_to_a_slow_peer_is_bounded_and_fair(pki: Pki) -> None:
    """One service's datagrams are lost from its own share; another's pass, and pass soon."""
    bench = Bench(pki, where="slow")
    client = bench.connect()
    connection = bench.handlers[0].connection
    before = drops("slow", "datagram_queue_full")
    for number in range(20 * DATAGRAM_QUEUE_MAX):
        connection.send_datagram(b"flood %d" % number + bytes(1000), "flooded")
        if number % 1000 == 0:
            connection.send_datagram(b"polite %d" % number, "polite")
    assert len(connection._engine._datagrams) == DATAGRAM_QUEUE_MAX
    assert drops("slow", "datagram_queue_full") - before == 20 * DATAGRAM_QUEUE_MAX + 20 - DATAGRAM_QUEUE_MAX
    heard: list[bytes] = []
    while len([each for each in heard if each.startswith(b"polite")]) < 20:
        connection._endpoint.touch(connection)
        bench.server._flush()
        bench.pump(client)
        while (event := client.next_event()) is not None:
            heard.append(getattr(event, "data", b""))
        assert len(heard) < DATAGRAM_QUEUE_MAX
    # Turn by turn: the polite ones did not wait for the flood to pass.
    assert len(heard) < 200


async def test_refusals_of_a_flood_are_counted(pki: Pki) -> None:
    bench = Bench(pki, retry=False, half_open_max=4, where="capped")
    before = REFUSALS.labels("capped", Reason.LIMIT_REACHED.value)._value.get()
    clients = [bench.begin(address(number)) for number in range(10)]
    for number, client in enumerate(clients):
        bench.server.packets_received([(client.datagrams_to_send(0.0)[0][0], address(number))])
        for data, _ in replies(bench):
            client.receive_datagram(data, address(number), 0.0)
    for number, client in enumerate(clients):
        packets = client.datagrams_to_send(1.0)
        bench.server.packets_received([(data, address(number)) for data, _ in packets])
    assert bench.server.half_open == 4
    assert REFUSALS.labels("capped", Reason.LIMIT_REACHED.value)._value.get() > before


async def test_every_cid_that_is_told_leads_to_the_connection_at_once(pki: Pki) -> None:
    """One that is told and not yet known would be answered with a reset: the peer would be cut off."""
    bench = Bench(pki)
    client = bench.connect()
    told = [client._peer_cid.cid, *(each.cid for each in client._peer_cid_available)]
    assert len(told) > 4
    assert all(cid in bench.server._routes for cid in told)
