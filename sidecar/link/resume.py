"""One flow's positions, windows and retained bytes, whatever carries it (protocol.md, Link: stream carrier).

Pure: bytes move in sidecar.link.flow, frames in sidecar.link.carrier. A position counts bytes of DATA since the
flow began; FIN counts as one. OPENED and RESUMED begin alike: the other end says which position it expects, and gets
everything from there on.

        acknowledged            sent                     delivered              received
    ---------+--------- kept ----+--> carrier -->   ---------+------ held --------+--> from the carrier
             |<-- at most the other's window -->|            |<-- at most our window -->|

On a new carrier what the other end did not get goes back from `kept` to `owed`, and is sent again before anything
new. Only what a carrier took whole is kept and can be acknowledged: an ACK, true or not, never frees bytes that are
yet to be written.
"""

from __future__ import annotations

from ztna.errors import ProtocolError

ACK_WINDOW_FRACTION = 4
ACK_DELAY_SECONDS = 0.1
SMALL_PIECE_BYTES = 8 * 1024


class FlowState:
    """What one end knows of one flow, both directions."""

    __slots__ = (
        "_ack_may_be_lost",
        "_ack_step",
        "_expected",
        "_fin_delivered",
        "_fin_is_owed",
        "_fin_received",
        "_kept",
        "_kept_from",
        "_owed",
        "acknowledged_position",
        "acknowledged_to_peer",
        "delivered_position",
        "fin_is_sent",
        "owed_bytes",
        "receive_window",
        "received_position",
        "send_window",
        "sent_position",
    )

    def __init__(self, *, receive_window: int) -> None:
        """Begin with nothing; nothing may be sent before `resumed` told the other's window. In bytes."""
        self.send_window = 0
        self.receive_window = receive_window
        self.sent_position = 0
        self.acknowledged_position = 0
        self.fin_is_sent = False
        self.received_position = 0
        self.delivered_position = 0
        self.acknowledged_to_peer = 0
        self._fin_received = False
        self._fin_delivered = False
        # Lists, though they go at the front: of a few hundred pieces at most, and empty deques are 1.2 KB an idle flow.
        self._kept: list[memoryview | bytearray] = []
        self._kept_from = 0
        self._ack_step = receive_window // ACK_WINDOW_FRACTION
        self._ack_may_be_lost = False
        self._expected = 0
        self._owed: list[memoryview] = []
        self.owed_bytes = 0
        self._fin_is_owed = False

    def resumed(self, expected: int, window: int) -> None:
        """Go on upon a new carrier whose other end expects that position and has that window, in bytes.

        Raises ProtocolError, and changes nothing, for a position below an earlier one or the last ACK, or above
        what was sent.
        """
        lowest = max(self.acknowledged_position, self._expected)
        if not lowest <= expected <= self.sent_position:
            raise ProtocolError(f"resumed at {expected}: expected {lowest} to {self.sent_position}")
        self.send_window = window
        self._expected = expected
        self._ack_may_be_lost = self.acknowledged_to_peer > 0
        self._fin_is_owed |= self.fin_is_sent and expected < self.sent_position
        self.fin_is_sent &= not self._fin_is_owed
        at = self._kept_from
        again: list[memoryview] = []
        for piece in self._kept:
            if at + len(piece) > expected:
                # As a copy: the last byte of a large buffer would hold all of it, for as long as the other end likes.
                again.append(memoryview(bytes(piece[max(0, expected - at) :])))
            at += len(piece)
        self._kept.clear()
        self._kept_from = self.sent_position = expected
        self._kept_from -= self.fin_is_sent
        self._owed = again + self._owed
        self.owed_bytes = sum(map(len, self._owed))

    # Sending

    @property
    def is_owing(self) -> bool:
        """Whether something must be sent again before anything new."""
        return bool(self._owed) or self._fin_is_owed

    def take_owed(self, buffer: memoryview) -> int:
        """Fill the buffer with what is owed, return how much that is. 0: only FIN is owed still."""
        size = 0
        while self._owed and size < len(buffer):
            piece = self._owed.pop(0)
            part = piece[: len(buffer) - size]
            buffer[size : size + len(part)] = part
            size += len(part)
            if len(part) < len(piece):
                self._owed.insert(0, piece[len(part) :])
        self.owed_bytes -= size
        return size

    @property
    def send_credit(self) -> int:
        """How many bytes of DATA the other end can still take; 0 once FIN was sent."""
        if self.fin_is_sent:
            return 0
        return self.send_window - (self.sent_position - self.acknowledged_position)

    @property
    def kept_bytes(self) -> int:
        """Bytes of DATA kept because no ACK covers the piece that they are in, those that are owed too."""
        return self.sent_position - self.fin_is_sent - self._kept_from + self.owed_bytes

    def sent(self, piece: memoryview) -> bool:
        """Note a piece of DATA that was wholly given to the carrier, and keep it until it is acknowledged.

        Returns whether the view itself is kept: then nobody may change what it shows until `acknowledged`
        returns it. Small pieces are copied together instead, so that a window of single bytes stays small.
        """
        self.sent_position += len(piece)
        if len(piece) >= SMALL_PIECE_BYTES:
            self._kept.append(piece)
            return True
        last = self._kept[-1] if self._kept else None
        if isinstance(last, bytearray) and len(last) < SMALL_PIECE_BYTES:
            last += piece
        else:
            self._kept.append(bytearray(piece))
        return False

    def fin_sent(self) -> None:
        """Note that FIN was given to the carrier."""
        self.fin_is_sent = True
        self._fin_is_owed = False
        self.sent_position += 1

    def acknowledged(self, position: int) -> list[memoryview]:
        """Take an ACK in; return the views that are kept no longer.

        Raises ProtocolError for a position that was never sent or lies below an earlier ACK.
        """
        if not self.acknowledged_position <= position <= self.sent_position:
            raise ProtocolError(
                f"ACK of position {position}: expected {self.acknowledged_position} to {self.sent_position}"
            )
        self.acknowledged_position = position
        freed: list[memoryview] = []
        kept = self._kept
        while kept and self._kept_from + len(kept[0]) <= position:
            piece = kept.pop(0)
            self._kept_from += len(piece)
            if isinstance(piece, memoryview):
                freed.append(piece)
        return freed

    def forget(self) -> list[memoryview]:
        """Keep nothing any longer (the flow was reset); return the views that were kept."""
        freed = [piece for piece in self._kept if isinstance(piece, memoryview)]
        self._kept.clear()
        self._owed.clear()
        self.owed_bytes = 0
        self._kept_from = self.sent_position - self.fin_is_sent
        return freed

    # Receiving

    def received(self, size: int) -> None:
        """Take DATA in. Raises ProtocolError after a FIN, and for more than our window."""
        if self._fin_received:
            raise ProtocolError("DATA after FIN")
        self.received_position += size
        if self.received_position - self.delivered_position > self.receive_window:
            raise ProtocolError(f"more DATA than the window of {self.receive_window} bytes")

    def fin_received(self) -> None:
        """Take FIN in. Raises ProtocolError for a second one."""
        if self._fin_received:
            raise ProtocolError("a second FIN")
        self._fin_received = True
        self.received_position += 1

    def delivered(self, size: int) -> None:
        """Note that the local socket took bytes."""
        self.delivered_position += size

    @property
    def has_fin(self) -> bool:
        """Whether the other end has said that nothing more comes."""
        return self._fin_received

    @property
    def fin_is_due(self) -> bool:
        """Whether the local socket has had all bytes and waits for the end of them."""
        return (
            self._fin_received
            and not self._fin_delivered
            and self.delivered_position == self.received_position - 1
        )

    def fin_delivered(self) -> None:
        """Note that the local socket was told the end."""
        self._fin_delivered = True
        self.delivered_position += 1

    @property
    def ack_is_due(self) -> bool:
        """Whether an ACK must go now: a quarter of the window, or the end, was delivered since the last.

        And once on each new carrier: the last one may have been lost with the old.
        """
        if self._ack_may_be_lost:
            return True
        fresh = self.delivered_position - self.acknowledged_to_peer
        return fresh >= self._ack_step or (self._fin_delivered and fresh > 0)

    @property
    def ack_is_wanted(self) -> bool:
        """Whether an ACK would say anything new: one goes within ACK_DELAY_SECONDS."""
        return self._ack_may_be_lost or self.delivered_position != self.acknowledged_to_peer

    def take_ack(self) -> int:
        """Return the position to acknowledge, and count it as acknowledged."""
        self.acknowledged_to_peer = self.delivered_position
        self._ack_may_be_lost = False
        return self.delivered_position

    # Both

    @property
    def is_delivered(self) -> bool:
        """Whether the local socket gave and got everything: it is closed then and not cut."""
        return (self.fin_is_sent or self._fin_is_owed) and self._fin_delivered

    @property
    def is_complete(self) -> bool:
        """Whether both FINs are acknowledged, so that the connection is free again."""
        return (
            self.fin_is_sent
            and self.acknowledged_position == self.sent_position
            and self._fin_delivered
            and self.acknowledged_to_peer == self.received_position
            and not self._ack_may_be_lost
        )
