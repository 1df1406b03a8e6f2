"""One flow's positions, windows and retained bytes, and which flows are known (protocol.md, Link: stream carrier).

Pure: bytes move in sidecar.link.flow, frames in sidecar.link.carrier. A position counts bytes of DATA since the
flow began; FIN counts as one.

        acknowledged            sent                     delivered              received
    ---------+--------- kept ----+--> carrier -->   ---------+------ held --------+--> from the carrier
             |<-- at most the other's window -->|            |<-- at most our window -->|
"""

from __future__ import annotations

from collections import deque

from ztna.errors import ProtocolError

ACK_WINDOW_FRACTION = 4
ACK_DELAY_SECONDS = 0.1
SMALL_PIECE_BYTES = 8 * 1024
REMEMBER_SECONDS = 60.0
REMEMBERED_FLOWS_MAX = 100_000


class FlowState:
    """What one end knows of one flow, both directions."""

    __slots__ = (
        "_ack_step",
        "_fin_delivered",
        "_fin_received",
        "_kept",
        "_kept_from",
        "acknowledged_position",
        "acknowledged_to_peer",
        "delivered_position",
        "fin_is_sent",
        "receive_window",
        "received_position",
        "send_window",
        "sent_position",
    )

    def __init__(self, *, send_window: int, receive_window: int) -> None:
        self.send_window = send_window
        self.receive_window = receive_window
        self.sent_position = 0
        self.acknowledged_position = 0
        self.fin_is_sent = False
        self.received_position = 0
        self.delivered_position = 0
        self.acknowledged_to_peer = 0
        self._fin_received = False
        self._fin_delivered = False
        self._kept: deque[memoryview | bytearray] = deque()
        self._kept_from = 0
        self._ack_step = receive_window // ACK_WINDOW_FRACTION

    # Sending

    @property
    def send_credit(self) -> int:
        """How many bytes of DATA the other end can still take; 0 once FIN was sent."""
        if self.fin_is_sent:
            return 0
        return self.send_window - (self.sent_position - self.acknowledged_position)

    @property
    def kept_bytes(self) -> int:
        """Bytes of DATA kept because no ACK covers the piece that they are in."""
        return self.sent_position - self.fin_is_sent - self._kept_from

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
            piece = kept.popleft()
            self._kept_from += len(piece)
            if isinstance(piece, memoryview):
                freed.append(piece)
        return freed

    def forget(self) -> list[memoryview]:
        """Keep nothing any longer (the flow was reset); return the views that were kept."""
        freed = [piece for piece in self._kept if isinstance(piece, memoryview)]
        self._kept.clear()
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
        """Whether an ACK must go now: a quarter of the window, or the end, was delivered since the last."""
        fresh = self.delivered_position - self.acknowledged_to_peer
        return fresh >= self._ack_step or (self._fin_delivered and fresh > 0)

    @property
    def ack_is_wanted(self) -> bool:
        """Whether an ACK would say anything new: one goes within ACK_DELAY_SECONDS."""
        return self.delivered_position != self.acknowledged_to_peer

    def take_ack(self) -> int:
        """Return the position to acknowledge, and count it as acknowledged."""
        self.acknowledged_to_peer = self.delivered_position
        return self.delivered_position

    # Both

    @property
    def is_complete(self) -> bool:
        """Whether both FINs are acknowledged, so that the connection is free again."""
        return (
            self.fin_is_sent
            and self.acknowledged_position == self.sent_position
            and self._fin_delivered
            and self.acknowledged_to_peer == self.received_position
        )


class KnownFlows:
    """The flows a connector has seen, so that none is dialled twice.

    Finished ones are remembered for at least REMEMBER_SECONDS in two generations; when a generation is full the
    older goes early, which `forgotten_early` counts.
    """

    def __init__(self, limit: int = REMEMBERED_FLOWS_MAX) -> None:
        self._limit = limit
        self._live: set[tuple[str, str]] = set()
        self._newer: set[tuple[str, str]] = set()
        self._older: set[tuple[str, str]] = set()
        self._turned_at = 0.0
        self.forgotten_early = 0

    def begin(self, agent: str, flow: str, now: float) -> bool:
        """Note a new flow of an agent (its verified name); False when it is known already."""
        self._turn(now)
        key = (agent, flow)
        if key in self._live or key in self._newer or key in self._older:
            return False
        self._live.add(key)
        return True

    def finish(self, agent: str, flow: str, now: float) -> None:
        """Note that a flow has ended; it is remembered from now on."""
        self._turn(now)
        self._live.discard((agent, flow))
        if len(self._newer) >= self._limit:
            self.forgotten_early += len(self._older)
            self._older, self._newer, self._turned_at = self._newer, set(), now
        self._newer.add((agent, flow))

    def _turn(self, now: float) -> None:
        age = now - self._turned_at
        if age < REMEMBER_SECONDS:
            return
        self._older = self._newer if age < 2 * REMEMBER_SECONDS else set()
        self._newer = set()
        self._turned_at = now
