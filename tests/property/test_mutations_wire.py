"""A million mutations of each codec's messages: a value or a typed error, never anything else."""

from __future__ import annotations

import pytest

from tests.support import messages
from tests.support.mutations import mutate, survive
from ztna import packet
from ztna.errors import PacketError, ProtocolError
from ztna.wire import control, datagram, forwarder, stream

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


def test_datagrams(capsys: pytest.CaptureFixture[str]) -> None:
    survive(capsys, "datagram", messages.DATAGRAMS, datagram.decode, ProtocolError)


def test_forwarder_packets(capsys: pytest.CaptureFixture[str]) -> None:
    survive(capsys, "forwarder", messages.FORWARDER_PACKETS, forwarder.decode, ProtocolError)


def test_inner_packets(capsys: pytest.CaptureFixture[str]) -> None:
    survive(capsys, "packet", messages.PACKETS, packet.parse, PacketError)


def test_control_frames(capsys: pytest.CaptureFixture[str]) -> None:
    def act(data: bytes) -> None:
        control.FrameReader().feed(data)

    survive(capsys, "control", messages.CONTROL_FRAMES, act, ProtocolError)


def test_stream_frames(capsys: pytest.CaptureFixture[str]) -> None:
    pairs = [first + second for first in messages.STREAM_FRAMES for second in messages.STREAM_FRAMES]

    def act(data: bytes) -> None:
        reader = stream.FrameReader()
        half = len(data) // 2
        reader.feed(data[:half])
        reader.feed(data[half:])

    survive(capsys, "stream", pairs, act, ProtocolError)


def test_a_seed_gives_the_same_mutations_again() -> None:
    assert list(mutate(17, messages.DATAGRAMS, 1000)) == list(mutate(17, messages.DATAGRAMS, 1000))
    assert list(mutate(17, messages.DATAGRAMS, 1000)) != list(mutate(18, messages.DATAGRAMS, 1000))
