"""Two spliced TCP connections: bytes go from socket to socket through a pipe with splice(2), and are never seen here.

Moves what can be moved when told to; when that is, relay.splicer decides.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import select
import socket
import sys
import termios
from collections.abc import Hashable

from relay.metering import Meter
from ztna.names import SessionId
from ztna.stall import Stall, Verdict
from ztna.tls_tcp import delivery

PIPE_BYTES = 1024 * 1024
SPLICES_PER_EVENT = 8
"""After so many rounds a busy direction lets the others go first."""
BULK_BYTES = 2 * 1024 * 1024
BULK_SECONDS = 0.128
"""A direction that moves so much within so little is bulk: it moves in ticks, not at each arrival.

Much more than an answer mostly is: the end of what is bulk waits for a tick.
"""
TURNS_MAX = 4
"""So many answers running that came when nothing waited: the two take turns, and each turn waits for a tick.

Those to one tick count once. One may come by chance right after a tick; the acknowledgements of a link come while
more is on its way.
"""
REST_SECONDS = 1.0
"""What two take turns with is not bulk for so long."""
STAY_BULK_BYTES = 64 * 1024
STAY_BULK_SECONDS = 0.016
"""A bulk direction that moves less within so much moves at each arrival again."""
BIG_BATCH_BYTES = 128 * 1024
"""After moving so much there is likely more: a full pipe must not bound the rate."""

_GONE = select.EPOLLHUP | select.EPOLLERR | select.EPOLLRDHUP
_SPLICE_FLAGS = os.SPLICE_F_NONBLOCK | os.SPLICE_F_MOVE
_WOULD_BLOCK = -1
_PIPE_SIZE_SET = 1031


class Direction:
    """One way of a pair: source socket -> pipe -> target socket."""

    __slots__ = (
        "_burst_at",
        "_burst_from",
        "_rests_until",
        "_turned_at",
        "_turns",
        "bytes",
        "finished",
        "held",
        "in_pipe",
        "is_bulk",
        "meter",
        "reader",
        "source",
        "source_ended",
        "target",
        "writer",
    )

    def __init__(self, source: socket.socket, target: socket.socket, meter: Meter | None = None) -> None:
        """`meter` says how much may come out of the source."""
        self.source, self.target, self.meter = source, target, meter
        self.reader, self.writer = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        # Beyond the user's soft limit of pipe pages the kernel says EPERM: the default size works too.
        with contextlib.suppress(OSError):
            fcntl.fcntl(self.writer, _PIPE_SIZE_SET, PIPE_BYTES)
        self.in_pipe = self.bytes = 0
        self.source_ended = self.finished = self.is_bulk = False
        self.held = False
        """Whether the meter let nothing more out of the source the last time."""
        self._burst_at = self._rests_until = 0.0
        self._burst_from = self._turned_at = self._turns = 0

    def pump(self) -> bool:
        """Move what can be moved; True when there is more to do at once. Raises OSError when a side broke."""
        for _ in range(SPLICES_PER_EVENT):
            if self.finished:
                return False
            if not self.in_pipe and not self._fill():
                return False
            if self.in_pipe and not self._drain():
                return False
            self._look_at_end()
        return not self.finished

    def tick(self) -> int:
        """Move what is there, and return how much that was. Raises OSError when a side broke."""
        before = self.bytes
        if (self.in_pipe or self._fill()) and self.in_pipe:
            self._drain()
        self._look_at_end()
        if self.bytes - before >= BIG_BATCH_BYTES:
            self.pump()
        return self.bytes - before

    def stays_bulk(self, now: float) -> bool:
        """Whether STAY_BULK_BYTES went through within the last STAY_BULK_SECONDS; to be asked after each tick."""
        if now - self._burst_at <= STAY_BULK_SECONDS:
            return True
        moved, self._burst_at, self._burst_from = self.bytes - self._burst_from, now, self.bytes
        return moved >= STAY_BULK_BYTES

    def bursts(self, now: float) -> bool:
        """Whether BULK_BYTES went through within BULK_SECONDS; to be asked after each pump."""
        if now - self._burst_at > BULK_SECONDS:
            self._burst_at, self._burst_from = now, self.bytes
        return self.bytes - self._burst_from >= BULK_BYTES and now >= self._rests_until

    def is_in_turns(self, now: float) -> bool:
        """Whether the two take turns; to be asked when something went the other way while this one is bulk."""
        if self.bytes == self._turned_at:
            return False  # another answer to the same
        self._turned_at = self.bytes
        self._turns = 0 if self.in_pipe or _waiting_bytes(self.source) else self._turns + 1
        if self._turns < TURNS_MAX:
            return False
        self._turns, self._rests_until = 0, now + REST_SECONDS
        return True

    def close(self) -> None:
        os.close(self.reader)
        os.close(self.writer)

    def _look_at_end(self) -> None:
        if self.source_ended and not self.in_pipe and not self.finished:
            self.finished = True
            self.target.shutdown(socket.SHUT_WR)

    def _fill(self) -> bool:
        if self.source_ended:
            return True
        room = PIPE_BYTES if self.meter is None else min(PIPE_BYTES, self.meter.left)
        self.held = room <= 0
        if self.held:
            return False
        count = _splice(self.source.fileno(), self.writer, room)
        if count == _WOULD_BLOCK:
            return False
        if self.meter is not None:
            self.meter.left -= count
        self.in_pipe += count
        self.source_ended = count == 0
        return True

    def _drain(self) -> bool:
        count = _splice(self.reader, self.target.fileno(), self.in_pipe)
        if count == _WOULD_BLOCK:
            return False
        self.in_pipe -= count
        self.bytes += count
        return True


class Pair:
    """Two bound connections of one session."""

    __slots__ = ("_seen_bytes", "_stalls", "agent", "charged", "connector", "down", "link", "session", "up")

    def __init__(
        self,
        session: SessionId,
        agent: socket.socket,
        connector: socket.socket,
        link: Hashable = None,
        meters: tuple[Meter | None, Meter | None] = (None, None),
        now: float = 0.0,
    ) -> None:
        self.session, self.link, self.agent, self.connector = session, link, agent, connector
        self.charged = 0
        """How many of its bytes were taken off its link's quota."""
        self.up = Direction(agent, connector, meters[0])
        try:
            self.down = Direction(connector, agent, meters[1])
        except OSError:
            self.up.close()
            raise
        self._seen_bytes = 0
        self._stalls = ((agent, Stall(now)), (connector, Stall(now)))

    def is_cut(self, now: float) -> bool:
        """Say whether the way to one of the two is dead, by ztna.stall; to be asked each LOOK_SECONDS.

        Nobody is asked after here, which takes sealed bytes: the ends do that. Raises OSError.
        """
        moved = self.bytes
        if moved == self._seen_bytes and all(stall.is_settled for _, stall in self._stalls):
            return False
        self._seen_bytes = moved
        return any(stall.look(now, 0, *delivery(sock)) is Verdict.DEAD for sock, stall in self._stalls)

    @property
    def finished(self) -> bool:
        return self.up.finished and self.down.finished

    @property
    def bytes(self) -> int:
        """How much was copied, both ways."""
        return self.up.bytes + self.down.bytes

    def other(self, direction: Direction) -> Direction:
        return self.down if direction is self.up else self.up

    def awaiting(self, fd: int, event: int) -> list[Direction]:
        """Return the directions that an event of one of the sockets may move on."""
        onward, back = (self.up, self.down) if fd == self.agent.fileno() else (self.down, self.up)
        if event & _GONE:
            return [onward, back]
        directions = [onward] if event & select.EPOLLIN else []
        if back.in_pipe and event & select.EPOLLOUT:
            directions.append(back)
        return directions

    def close(self) -> None:
        self.up.close()
        self.down.close()


def _waiting_bytes(sock: socket.socket) -> int:
    """Return how many received bytes nobody has taken yet."""
    raw = fcntl.ioctl(sock.fileno(), termios.FIONREAD, bytes(4))
    return int.from_bytes(raw, sys.byteorder)


def _splice(source: int, target: int, count: int) -> int:
    """Return how many bytes moved, 0 at the end of the source, or _WOULD_BLOCK. Raises OSError."""
    try:
        return os.splice(source, target, count, flags=_SPLICE_FLAGS)
    except OSError as error:
        if error.errno == errno.EAGAIN:
            return _WOULD_BLOCK
        raise
