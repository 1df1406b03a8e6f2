"""The IP packets of one session on a stream carrier, where UDP is blocked: datagrams still, lost rather than late.

The same at agent and connector. Whose packets may pass was decided when the carrier began to carry them; what they are
is the owner's. Source: docs/blocked.md.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import Protocol

from sidecar.link.flow import reset_code
from ztna.errors import ProtocolError
from ztna.reasons import Reason
from ztna.telemetry import dropped
from ztna.wire.stream import (
    IP_PACKET_BYTES_MAX,
    IP_PACKET_BYTES_MIN,
    Frame,
    PacketFrame,
    ResetFrame,
    encode,
)

WAITING_PACKETS_MAX = 1000
WAITING_BYTES_MAX = 1024 * 1024
"""What waits for a carrier that is slower than those who send; the oldest goes for the newest."""

_WHERE = "packet_stream"


class PacketCarrier(Protocol):
    """What it needs of the connection that carries it."""

    @property
    def is_blocked(self) -> bool:
        """Whether earlier bytes still wait to be written."""

    def send(self, frame: bytes) -> None:
        """Write a frame."""

    def flow_ended(self, *, reusable: bool) -> None:
        """It is over: close."""


class PacketStream:
    """One end. `receive(packet)` is called for each packet, `ended()` once when the carrier is lost or closed."""

    def __init__(self, receive: Callable[[bytes], None], ended: Callable[[], None]) -> None:
        self._receive = receive
        self._ended = ended
        self._carrier: PacketCarrier | None = None
        self._is_over = False
        self._waiting: deque[bytes] = deque()
        self._waiting_bytes = 0

    @property
    def is_open(self) -> bool:
        """Whether packets can be sent."""
        return self._carrier is not None

    def attach(self, carrier: PacketCarrier) -> None:
        """Begin on a carrier."""
        self._carrier = carrier

    def send(self, packet: bytes) -> bool:
        """Send one IP packet; False when one was lost here (counted): closed, of no good size, or too much waits."""
        carrier = self._carrier
        if carrier is None:
            dropped(_WHERE, "not_connected")
            return False
        if not IP_PACKET_BYTES_MIN <= len(packet) <= IP_PACKET_BYTES_MAX:
            dropped(_WHERE, "malformed")
            return False
        frame = encode(PacketFrame(packet))
        if not carrier.is_blocked:
            carrier.send(frame)
            return True
        return self._wait(frame)

    def reset(self, reason: Reason | None = None) -> None:
        """Say that it is over, and close; again is harmless."""
        carrier = self._carrier
        if carrier is not None:
            carrier.send(encode(ResetFrame(reset_code(reason))))
            self._end()
            carrier.flow_ended(reusable=False)

    # From the carrier

    def data_received(self, pieces: Sequence[bytes | memoryview]) -> None:
        """Refuse DATA: this is no flow."""
        raise ProtocolError("DATA among packets")

    def frame_received(self, frame: Frame) -> None:
        """Take a packet, or the end. Raises ProtocolError for anything else."""
        match frame:
            case PacketFrame(packet):
                self._receive(packet)
            case ResetFrame():
                carrier = self._carrier
                self._end()
                if carrier is not None:
                    carrier.flow_ended(reusable=False)
            case _:
                raise ProtocolError(f"{type(frame).__name__} among packets")

    def data_written(self) -> None:
        """Nothing: packets are no pieces."""

    def carrier_writable(self) -> None:
        """Send what waits, as far as it goes."""
        while self._waiting and self._carrier is not None and not self._carrier.is_blocked:
            frame = self._waiting.popleft()
            self._waiting_bytes -= len(frame)
            self._carrier.send(frame)

    def carrier_lost(self) -> None:
        """Be over."""
        self._end()

    def _wait(self, frame: bytes) -> bool:
        self._waiting.append(frame)
        self._waiting_bytes += len(frame)
        lost = 0
        while len(self._waiting) > WAITING_PACKETS_MAX or self._waiting_bytes > WAITING_BYTES_MAX:
            self._waiting_bytes -= len(self._waiting.popleft())
            lost += 1
        if lost:
            dropped(_WHERE, "queue_full", lost)
        return not lost

    def _end(self) -> None:
        self._carrier = None
        self._waiting.clear()
        self._waiting_bytes = 0
        if not self._is_over:
            self._is_over = True
            self._ended()
