"""One end of a TCP flow: bytes to send, bytes heard, and sidecar.link.resume between them and the frames."""

from __future__ import annotations

from collections.abc import Callable

from sidecar.link.resume import ACK_DELAY_SECONDS, FlowState
from tests.sim.weather import World
from ztna.wire.stream import WINDOW_BYTES_MIN, Ack, Data, Fin, Frame, encode

PIECE_BYTES = 9_000


class Half:
    """`heard` is all that its program got so far; an echo sends each of it back, and its end too."""

    def __init__(self, world: World, content: bytes | None) -> None:
        self._world = world
        self.state = FlowState(receive_window=WINDOW_BYTES_MIN)
        self.heard = bytearray()
        self._is_echo = content is None
        self._pending = bytearray(content or b"")
        self._may_end = content is not None
        self._send: Callable[[bytes], object] | None = None
        self._ack_is_planned = False

    def ride(self, send: Callable[[bytes], object], expected: int, window: int) -> None:
        """Go on upon a new carrier. Raises ProtocolError for what the other end cannot expect."""
        self.state.resumed(expected, window)
        self._send = send
        self.move()

    def stop(self) -> None:
        """Send nothing for now: there is no carrier."""
        self._send = None

    def take(self, frame: Frame) -> None:
        """Take a frame of the other end in. Raises ProtocolError."""
        match frame:
            case Data(data):
                self.state.received(len(data))
                self.heard += data
                self.state.delivered(len(data))
                if self._is_echo:
                    self._pending += data
            case Fin():
                self.state.fin_received()
                if self.state.fin_is_due:
                    self.state.fin_delivered()
                    self._may_end = True
            case Ack(position):
                self.state.acknowledged(position)
            case _:
                raise AssertionError(f"{frame} is none of a running flow")
        self.move()

    def move(self) -> None:
        """Send what may be sent: what is owed first, then anew, the end, and what is to be acknowledged."""
        if self._send is None:
            return
        state = self.state
        while state.owed_bytes:
            buffer = bytearray(min(state.owed_bytes, PIECE_BYTES))
            size = state.take_owed(memoryview(buffer))
            self._give(bytes(buffer[:size]))
        while self._pending and state.send_credit > 0:
            size = min(len(self._pending), state.send_credit, PIECE_BYTES)
            piece, self._pending = bytes(self._pending[:size]), self._pending[size:]
            self._give(piece)
        if self._may_end and not self._pending and not state.fin_is_sent:
            self._send(encode(Fin()))
            state.fin_sent()
        if state.ack_is_due:
            self._acknowledge()
        elif state.ack_is_wanted and not self._ack_is_planned:
            self._ack_is_planned = True
            self._world.after(ACK_DELAY_SECONDS, self._acknowledge_late)

    def _give(self, piece: bytes) -> None:
        assert self._send is not None
        self._send(encode(Data(piece)))
        self.state.sent(memoryview(piece))

    def _acknowledge(self) -> None:
        if self._send is not None and self.state.ack_is_wanted:
            self._send(encode(Ack(self.state.take_ack())))

    def _acknowledge_late(self) -> None:
        self._ack_is_planned = False
        self._acknowledge()
