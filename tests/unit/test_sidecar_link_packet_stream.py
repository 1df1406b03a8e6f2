"""sidecar.link.packet_stream: packets over a carrier that may be slow, and what does not belong among them."""

from __future__ import annotations

import pytest

from sidecar.link import packet_stream
from sidecar.link.packet_stream import PacketStream
from ztna.errors import ProtocolError
from ztna.reasons import Reason
from ztna.telemetry import DROPS
from ztna.wire.stream import Data, Fin, FrameReader, PacketFrame, ResetFrame

FULL = DROPS.labels("packet_stream", "queue_full")._value


def packet(number: int, size: int = 28) -> bytes:
    return number.to_bytes(4, "big") + bytes(size - 4)


class Carrier:
    """What was written, and whether it takes more."""

    def __init__(self) -> None:
        self.is_blocked = False
        self.frames: list[object] = []
        self.ended: list[bool] = []

    def send(self, frame: bytes) -> None:
        self.frames += FrameReader().feed(frame)

    def flow_ended(self, *, reusable: bool) -> None:
        self.ended.append(reusable)


class Rig:
    def __init__(self) -> None:
        self.carrier = Carrier()
        self.received: list[bytes] = []
        self.ends = 0
        self.stream = PacketStream(self.received.append, self._ended)

    def _ended(self) -> None:
        self.ends += 1


@pytest.fixture
def rig() -> Rig:
    made = Rig()
    made.stream.attach(made.carrier)
    return made


def test_packets_both_ways(rig: Rig) -> None:
    assert rig.stream.is_open and rig.stream.send(packet(1))
    assert rig.carrier.frames == [PacketFrame(packet(1))]
    rig.stream.frame_received(PacketFrame(packet(2)))
    assert rig.received == [packet(2)]


def test_what_is_no_packet_is_not_sent(rig: Rig) -> None:
    assert not rig.stream.send(b"") and not rig.stream.send(bytes(65_536))
    assert rig.carrier.frames == []


def test_while_the_carrier_is_blocked_the_newest_wait(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packet_stream, "WAITING_PACKETS_MAX", 3)
    before = FULL.get()
    rig.carrier.is_blocked = True
    assert [rig.stream.send(packet(number)) for number in range(5)] == [True, True, True, False, False]
    assert FULL.get() == before + 2
    rig.stream.carrier_writable()
    assert rig.carrier.frames == []
    rig.carrier.is_blocked = False
    rig.stream.carrier_writable()
    assert rig.carrier.frames == [PacketFrame(packet(number)) for number in (2, 3, 4)]


def test_what_waits_is_bounded_in_bytes_too(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packet_stream, "WAITING_BYTES_MAX", 3000)
    rig.carrier.is_blocked = True
    for number in range(50):
        rig.stream.send(packet(number, 1000))
    rig.carrier.is_blocked = False
    rig.stream.carrier_writable()
    assert rig.carrier.frames == [PacketFrame(packet(number, 1000)) for number in (48, 49)]


def test_a_carrier_that_breaks_ends_it_once(rig: Rig) -> None:
    rig.stream.carrier_lost()
    rig.stream.carrier_lost()
    assert rig.ends == 1 and not rig.stream.is_open and not rig.stream.send(packet(1))


def test_either_end_may_end_it(rig: Rig) -> None:
    rig.stream.reset(Reason.DRAINING)
    rig.stream.reset()
    assert isinstance(rig.carrier.frames[0], ResetFrame) and rig.carrier.ended == [False] and rig.ends == 1
    other = Rig()
    other.stream.attach(other.carrier)
    other.stream.frame_received(ResetFrame(0))
    assert other.carrier.ended == [False] and other.ends == 1 and other.carrier.frames == []
    other.stream.frame_received(ResetFrame(0))
    assert other.ends == 1


def test_nothing_else_belongs_among_packets(rig: Rig) -> None:
    with pytest.raises(ProtocolError):
        rig.stream.data_received([b"x"])
    for frame in (Fin(), Data(b"x")):
        with pytest.raises(ProtocolError):
            rig.stream.frame_received(frame)
    rig.stream.data_written()
    assert rig.stream.is_open
