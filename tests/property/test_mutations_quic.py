"""Mutated packets, and mutated frames from an authenticated peer, against a live server: it goes on."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
from aioquic._buffer import Buffer
from aioquic.quic.packet import encode_quic_retry, encode_quic_version_negotiation

from tests.support.certificates import Pki
from tests.support.mutations import MUTATIONS_DEFAULT, mutate, survive
from tests.support.quic_memory import HERE, Bench, sealed
from ztna.errors import ProtocolError
from ztna.reasons import Reason
from ztna.telemetry import REFUSALS

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

FRAMES_PER_MUTATIONS = 500


@pytest.fixture
def pki(tmp_path: Path) -> Pki:
    return Pki(tmp_path)


async def test_packets(pki: Pki, capsys: pytest.CaptureFixture[str]) -> None:
    bench = Bench(pki, half_open_max=20)
    client = bench.connect()
    client.send_datagram_frame(b"hello")
    bench.pump(client)
    corpus = [
        *bench.seen,
        encode_quic_retry(1, b"s" * 20, b"d" * 8, b"o" * 8, b"token"),
        encode_quic_version_negotiation(b"s" * 20, b"d" * 8, [1]),
        b"\x40" + bytes(60),
    ]

    def act(data: bytes) -> None:
        handled = len(bench.handlers[0].datagrams)
        bench.server.packets_received([(data, HERE)])
        bench.sent.clear()
        if len(bench.handlers[0].datagrams) == handled:
            raise ProtocolError("nothing of it was acted on")

    survive(capsys, "quic packets", corpus, act, ProtocolError)
    assert bench.server.half_open <= 20
    assert len(bench.handlers) == 1
    client.send_datagram_frame(b"still there")
    bench.pump(client)
    assert bench.handlers[0].datagrams[-1] == b"still there"


def frames() -> list[bytes]:
    """Payloads of 1-RTT packets, one or more frames each."""

    def frame(*values: int, body: bytes = b"") -> bytes:
        buf = Buffer(capacity=2000)
        for value in values:
            buf.push_uint_var(value)
        buf.push_bytes(body)
        return buf.data

    cid = b"\x41" * 20
    return [
        frame(0x00, 0x01, 0x01),
        frame(0x02, 5, 0, 0, 3) + frame(0x03, 2, 0, 1, 0, 0, 0, 1, 2, 3),
        frame(0x04, 0, 7, 10),
        frame(0x05, 0, 7),
        frame(0x06, 0, 10, body=b"\x04\x00\x00\x06abcdef"),
        frame(0x07, 4, body=b"toke"),
        frame(0x08, 0, body=b"stream to the end"),
        frame(0x0F, 4, 100, 6, body=b"offset") + frame(0x0A, 2, 3, body=b"uni"),
        frame(0x10, 1 << 20) + frame(0x11, 0, 1 << 20) + frame(0x12, 200) + frame(0x13, 200),
        frame(0x14, 5) + frame(0x15, 0, 5) + frame(0x16, 5) + frame(0x17, 5),
        frame(0x18, 1, 0, body=b"\x14" + cid + bytes(16)) + frame(0x18, 2, 1, body=b"\x14" + cid + bytes(16)),
        frame(0x19, 1),
        frame(0x1A, body=b"challeng") + frame(0x1B, body=b"response"),
        frame(0x1C, 1, 6, 3, body=b"bye") + frame(0x1D, 1, 3, body=b"bye"),
        frame(0x1E),
        frame(0x31, 5, body=b"datag") + frame(0x30, body=b"datagram to the end"),
        frame(0x31, 9, body=b"malformed"),
    ]


async def test_frames_of_an_authenticated_peer(pki: Pki, capsys: pytest.CaptureFixture[str]) -> None:
    bench = Bench(pki)
    bystander = bench.connect()
    count = int(os.environ.get("ZTNA_MUTATIONS", MUTATIONS_DEFAULT)) // FRAMES_PER_MUTATIONS
    seed = int(os.environ.get("ZTNA_MUTATION_SEED", time.time_ns() % 2**32))
    with capsys.disabled():
        print(f"\nquic frames: {count} mutations, seed {seed}", flush=True)
    hostile, number, ended = bench.connect(), 1000, 0
    for payload in mutate(seed, frames(), count):
        number += 1
        bench.server.packets_received([(sealed(hostile, payload, number), HERE)])
        bench.sent.clear()
        if bench.handlers[-1].closed is not None:
            ended += 1
            hostile, number = bench.connect(), 1000
    assert ended > count / 1000, "no mutation was malformed"
    assert bench.handlers[0].closed is None
    bystander.send_datagram_frame(b"undisturbed")
    bench.pump(bystander)
    assert bench.handlers[0].datagrams == [b"undisturbed"]
    assert REFUSALS.labels("quic", Reason.MALFORMED.value)._value.get() > 0
    bench.server.close()
