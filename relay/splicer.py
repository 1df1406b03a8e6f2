"""The TCP half of the forwarder: admits connections by token, joins them in pairs, and splices the bytes.

Bytes go from socket to socket through a pipe with splice(2) and are never seen here. Who gets a token is
relay.sessions' decision. Source: protocol.md, Forwarder.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import os
import select
import socket
import struct
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

from ztna.errors import ProtocolError, ZtnaError
from ztna.names import SessionId
from ztna.udp import SockAddr
from ztna.wire import forwarder as wire
from ztna.wire.control import Address

TOKEN_SECONDS = 30.0
BIND_SECONDS = 5.0
CONNECTIONS_MAX = 20_000
UNBOUND_CONNECTIONS_MAX = 2_000
TOKENS_PER_SESSION_MAX = 256
TOKENS_MAX = 100_000
LISTEN_BACKLOG = 1024
ACCEPTS_PER_WAKEUP = 64
ACCEPT_PAUSE_SECONDS = 0.1
EVENTS_PER_WAKEUP = 256
PIPE_BYTES = 1024 * 1024
SPLICES_PER_EVENT = 8
"""After so many rounds a busy direction lets the others go first."""
BULK_BYTES = 2 * 1024 * 1024
BULK_SECONDS = 0.128
"""A direction that moves so much within so little and unanswered is bulk: it moves in ticks, not at each arrival.

Much more than an answer mostly is: the end of what is bulk waits for a tick.
"""
STAY_BULK_BYTES = 64 * 1024
STAY_BULK_SECONDS = 0.016
"""A bulk direction that moves less within so much moves at each arrival again."""
TICK_SECONDS = 0.001
SLOW_TICK_SECONDS = 0.002
"""Between ticks when no direction moved BIG_BATCH_BYTES in the last; the most that a bulk direction waits."""
BIG_BATCH_BYTES = 128 * 1024
"""After moving so much there is likely more: a full pipe must not bound the rate."""
SWEEP_SECONDS = 1.0
DEAD_PEER_MILLISECONDS = 10_000
KEEPALIVE_IDLE_SECONDS = 5
KEEPALIVE_INTERVAL_SECONDS = 2
KEEPALIVE_PROBES = 3

_BULK_EDGES = select.EPOLLOUT | select.EPOLLRDHUP | select.EPOLLET
_EDGES = select.EPOLLIN | _BULK_EDGES
_GONE = select.EPOLLHUP | select.EPOLLERR | select.EPOLLRDHUP
_SPLICE_FLAGS = os.SPLICE_F_NONBLOCK | os.SPLICE_F_MOVE
_ABORT = struct.pack("ii", 1, 0)
_WOULD_BLOCK = -1
_PIPE_SIZE_SET = 1031

T = TypeVar("T")


@dataclass(slots=True)
class _Token:
    """Admits one connection: an agent's, or the connector's that joins `waiting`."""

    session: SessionId
    expires_at: float
    waiting: _Dialled | None = None


@dataclass(slots=True, eq=False)
class _Dialled:
    """A connection that is not bound yet."""

    sock: socket.socket
    deadline: float
    head: bytearray = field(default_factory=bytearray)
    session: SessionId | None = None


class _Direction:
    """One way of a pair: source socket -> pipe -> target socket."""

    __slots__ = (
        "_answered_from",
        "_burst_at",
        "_burst_from",
        "bytes",
        "finished",
        "in_pipe",
        "is_bulk",
        "reader",
        "source",
        "source_ended",
        "target",
        "writer",
    )

    def __init__(self, source: socket.socket, target: socket.socket) -> None:
        self.source, self.target = source, target
        self.reader, self.writer = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        # Beyond the user's soft limit of pipe pages the kernel says EPERM: the default size works too.
        with contextlib.suppress(OSError):
            fcntl.fcntl(self.writer, _PIPE_SIZE_SET, PIPE_BYTES)
        self.in_pipe = self.bytes = 0
        self.source_ended = self.finished = self.is_bulk = False
        self._burst_at = 0.0
        self._burst_from = self._answered_from = 0

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
        return self.bytes - max(self._burst_from, self._answered_from) >= BULK_BYTES

    def answered(self) -> bool:
        """Note that something went the other way; return whether so much went this way before that it may be bulk.

        Two that take turns would wait for a tick at every turn.
        """
        moved, self._answered_from = self.bytes - self._answered_from, self.bytes
        return moved >= BULK_BYTES

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
        count = _splice(self.source.fileno(), self.writer, PIPE_BYTES)
        if count == _WOULD_BLOCK:
            return False
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


class _Pair:
    """Two bound connections of one session."""

    __slots__ = ("agent", "connector", "down", "session", "up")

    def __init__(self, session: SessionId, agent: socket.socket, connector: socket.socket) -> None:
        self.session, self.agent, self.connector = session, agent, connector
        self.up = _Direction(agent, connector)
        try:
            self.down = _Direction(connector, agent)
        except OSError:
            self.up.close()
            raise

    @property
    def finished(self) -> bool:
        return self.up.finished and self.down.finished

    def other(self, direction: _Direction) -> _Direction:
        return self.down if direction is self.up else self.up

    def awaiting(self, fd: int, event: int) -> list[_Direction]:
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


class Splicer:
    """The forwarder's TCP listener on the running loop.

    `on_agent_waiting(session, waiter)` is called when an agent's connection came in with a good token; the
    caller answers with `admit_connector(session, waiter, token)` and tells the connector that token.
    """

    def __init__(self, listener: socket.socket, on_agent_waiting: Callable[[SessionId, int], None]) -> None:
        """Begin to accept on a listening non-blocking socket."""
        self._listener = listener
        self._on_agent_waiting = on_agent_waiting
        self._tokens: dict[bytes, _Token] = {}
        self._tokens_of: defaultdict[SessionId, set[bytes]] = defaultdict(set)
        self._dialled: dict[int, _Dialled] = {}
        self._strangers: dict[int, _Dialled] = {}
        """Of these, the ones that have shown no token yet, the oldest first."""
        self._pairs: dict[int, _Pair] = {}
        self._waiting_of: defaultdict[SessionId, set[_Dialled]] = defaultdict(set)
        self._pairs_of: defaultdict[SessionId, set[_Pair]] = defaultdict(set)
        self._again: set[_Pair] = set()
        self._bulk: dict[_Direction, _Pair] = {}
        self._ticker: asyncio.TimerHandle | None = None
        self.refusals: Counter[str] = Counter()
        """Connections closed unserved, by why: bad_token, late, limit, no_connector, malformed, session_ended."""
        self.bytes = 0
        """Copied by pairs that have ended."""
        self._bytes_of: Counter[SessionId] = Counter()
        """The same of each live session."""
        self.joined = 0
        self._loop = asyncio.get_running_loop()
        # Sockets are registered once, edge-triggered, in an epoll of our own that the loop watches: interest
        # changes only when a direction becomes bulk or is so no longer.
        self._epoll = select.epoll()
        self._loop.add_reader(self._epoll.fileno(), self._events)
        self._resume_accepting()
        self._sweeper = self._loop.call_later(SWEEP_SECONDS, self._sweep)
        self._pause: asyncio.TimerHandle | None = None
        self._closed = False

    @property
    def address(self) -> SockAddr:
        """The bound address."""
        host, port = self._listener.getsockname()[:2]
        return host, port

    def admit_agent(self, session: SessionId, token: bytes) -> bool:
        """Let one connection with the token in within TOKEN_SECONDS; False when there are too many tokens."""
        return self._admit(token, _Token(session, self._loop.time() + TOKEN_SECONDS))

    def admit_connector(self, session: SessionId, waiter: int, token: bytes) -> bool:
        """Let one connection with the token join the waiting one; False when that one has gone."""
        waiting = self._dialled.get(waiter)
        if waiting is None or waiting.session != session:
            return False
        return self._admit(token, _Token(session, waiting.deadline, waiting))

    def end_session(self, session: SessionId) -> None:
        """Void the session's tokens and close its connections."""
        for token in self._tokens_of.pop(session, ()):
            del self._tokens[token]
        for dialled in list(self._waiting_of.get(session, ())):
            self._drop(dialled, "session_ended")
        for pair in list(self._pairs_of.get(session, ())):
            self._end(pair, abort=True)
        self._bytes_of.pop(session, None)

    def bytes_of(self, session: SessionId) -> int:
        """Return how much was copied for a live session, both ways."""
        pairs = self._pairs_of.get(session, ())
        return self._bytes_of[session] + sum(each.up.bytes + each.down.bytes for each in pairs)

    @property
    def pairs(self) -> int:
        """How many pairs of connections are joined."""
        return len(self._pairs) // 2

    def status(self) -> dict[str, object]:
        """Return the counters, for /status."""
        pairs = set(self._pairs.values())
        return {
            "address": f"{self.address[0]}:{self.address[1]}",
            "tokens": len(self._tokens),
            "unbound": len(self._dialled),
            "pairs": len(pairs),
            "joined": self.joined,
            "bytes": self.bytes + sum(each.up.bytes + each.down.bytes for each in pairs),
            "refusals": dict(self.refusals),
        }

    def close(self) -> None:
        """Close everything; harmless twice."""
        if self._closed:
            return
        self._closed = True
        self._sweeper.cancel()
        for timer in (self._pause, self._ticker):
            if timer is not None:
                timer.cancel()
        self._loop.remove_reader(self._listener.fileno())
        self._loop.remove_reader(self._epoll.fileno())
        for dialled in list(self._dialled.values()):
            self._drop(dialled, "session_ended")
        for pair in set(self._pairs.values()):
            self._end(pair, abort=True)
        self._listener.close()
        self._epoll.close()

    def _admit(self, token: bytes, entry: _Token) -> bool:
        ours = self._tokens_of[entry.session]
        if len(ours) >= TOKENS_PER_SESSION_MAX or len(self._tokens) >= TOKENS_MAX:
            self.refusals["limit"] += 1
            return False
        ours.add(token)
        self._tokens[token] = entry
        return True

    def _accept(self) -> None:
        for _ in range(ACCEPTS_PER_WAKEUP):
            try:
                sock, _ = self._listener.accept()
            except (BlockingIOError, ConnectionAbortedError):
                return
            except OSError:
                # EMFILE and the like. Who waits is still there, so an immediate retry would only burn the CPU.
                self.refusals["limit"] += 1
                self._loop.remove_reader(self._listener.fileno())
                self._pause = self._loop.call_later(ACCEPT_PAUSE_SECONDS, self._resume_accepting)
                return
            if not self._make_room():
                self.refusals["limit"] += 1
                sock.close()
                continue
            tune(sock)
            dialled = _Dialled(sock, self._loop.time() + BIND_SECONDS)
            self._dialled[sock.fileno()] = self._strangers[sock.fileno()] = dialled
            self._epoll.register(sock.fileno(), _EDGES)

    def _make_room(self) -> bool:
        """Say whether one more connection may come in, at the cost of the stranger that waited longest if need be.

        Anybody can connect and say nothing; who has a token says it at once, so a flood keeps few of them out.
        """
        if len(self._dialled) + len(self._pairs) >= CONNECTIONS_MAX:
            return False
        if len(self._dialled) < UNBOUND_CONNECTIONS_MAX:
            return True
        oldest = next(iter(self._strangers.values()), None)
        if oldest is not None:
            self._drop(oldest, "limit")
        return oldest is not None

    def _resume_accepting(self) -> None:
        self._loop.add_reader(self._listener.fileno(), self._accept)

    def _events(self) -> None:
        for fd, event in self._epoll.poll(0, EVENTS_PER_WAKEUP):
            pair = self._pairs.get(fd)
            if pair is not None:
                self._pump(pair, *pair.awaiting(fd, event))
                continue
            dialled = self._dialled.get(fd)
            if dialled is not None:
                self._read_head(dialled, event)

    def _read_head(self, dialled: _Dialled, event: int) -> None:
        if dialled.session is not None:
            # It waits for its connector and was told to say nothing before `bound`: left in the kernel.
            if event & _GONE:
                self._drop(dialled, "no_connector")
            return
        while (missing := wire.DIAL_IN_BYTES - len(dialled.head)) > 0:
            try:
                data = dialled.sock.recv(missing)
            except BlockingIOError:
                return
            except OSError:
                data = b""
            if not data:
                self._drop(dialled, "malformed")
                return
            dialled.head += data
        self._present(dialled)

    def _present(self, dialled: _Dialled) -> None:
        try:
            token = wire.parse_dial_in(bytes(dialled.head))
        except ProtocolError:
            self._drop(dialled, "malformed")
            return
        entry = self._take(token)
        if entry is None:
            self._drop(dialled, "bad_token")
        elif entry.expires_at < self._loop.time():
            self._drop(dialled, "late")
        elif entry.waiting is not None:
            self._join(entry.session, entry.waiting, dialled)
        else:
            dialled.session = entry.session
            del self._strangers[dialled.sock.fileno()]
            self._waiting_of[entry.session].add(dialled)
            dialled.deadline = self._loop.time() + BIND_SECONDS
            self._on_agent_waiting(entry.session, dialled.sock.fileno())

    def _take(self, token: bytes) -> _Token | None:
        entry = self._tokens.pop(token, None)
        if entry is not None:
            _discard(self._tokens_of, entry.session, token)
        return entry

    def _join(self, session: SessionId, agent: _Dialled, connector: _Dialled) -> None:
        if self._dialled.get(agent.sock.fileno()) is not agent:
            self._drop(connector, "late")
            return
        try:
            for each in (agent, connector):
                each.sock.send(wire.encode(wire.Bound(wire.NO_NONCE, peer_of(each.sock))))
            pair = _Pair(session, agent.sock, connector.sock)
        except OSError:
            self._drop(agent, "no_connector")
            self._drop(connector, "late")
            return
        for each in (agent, connector):
            self._forget(each)
            self._pairs[each.sock.fileno()] = pair
        self._pairs_of[session].add(pair)
        self.joined += 1
        # What came before the join made its edge already.
        self._pump(pair, pair.up, pair.down)

    def _pump(self, pair: _Pair, *directions: _Direction) -> None:
        more = False
        try:
            for direction in directions:
                before = direction.bytes
                more = direction.pump() or more
                other = pair.other(direction)
                if direction.bytes > before and not other.answered() and other.is_bulk:
                    self._stop_ticks(other)
                    more = other.pump() or more
        except OSError:
            self._end(pair, abort=True)
            return
        if pair.finished:
            self._end(pair, abort=False)
        elif more and pair not in self._again:
            if not self._again:
                self._loop.call_soon(self._pump_again)
            self._again.add(pair)
        else:
            now = self._loop.time()
            for direction in directions:
                if not direction.is_bulk and direction.bursts(now):
                    self._start_ticks(pair, direction)

    def _start_ticks(self, pair: _Pair, direction: _Direction) -> None:
        """Let arrivals gather: each costs a wakeup, and a bulk transfer makes one with every TLS record."""
        direction.is_bulk = True
        self._bulk[direction] = pair
        self._epoll.modify(direction.source.fileno(), _BULK_EDGES)
        if self._ticker is None:
            self._ticker = self._loop.call_later(TICK_SECONDS, self._tick)

    def _stop_ticks(self, direction: _Direction) -> None:
        """Go back to edges; what has arrived already makes one in epoll_ctl(2)."""
        direction.is_bulk = False
        del self._bulk[direction]
        self._epoll.modify(direction.source.fileno(), _EDGES)

    def _tick(self) -> None:
        now, most = self._loop.time(), 0
        for direction, pair in tuple(self._bulk.items()):
            if direction not in self._bulk:
                continue  # its pair ended with the other direction
            try:
                most = max(most, direction.tick())
            except OSError:
                self._end(pair, abort=True)
                continue
            if pair.finished:
                self._end(pair, abort=False)
            elif not direction.stays_bulk(now):
                self._stop_ticks(direction)
                # What is left in the pipe gets its edge only once the target said that it is full.
                self._pump(pair, direction)
        pause = TICK_SECONDS if most >= BIG_BATCH_BYTES else SLOW_TICK_SECONDS
        self._ticker = self._loop.call_later(pause, self._tick) if self._bulk else None

    def _pump_again(self) -> None:
        pairs, self._again = self._again, set()
        for pair in pairs:
            if pair.agent.fileno() >= 0:
                self._pump(pair, pair.up, pair.down)

    def _end(self, pair: _Pair, *, abort: bool) -> None:
        for sock in (pair.agent, pair.connector):
            del self._pairs[sock.fileno()]
            if abort:
                # RST: what the other end missed must not look like a clean end.
                with contextlib.suppress(OSError):
                    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _ABORT)
            sock.close()
        self._again.discard(pair)
        for direction in (pair.up, pair.down):
            self._bulk.pop(direction, None)
        _discard(self._pairs_of, pair.session, pair)
        self.bytes += pair.up.bytes + pair.down.bytes
        self._bytes_of[pair.session] += pair.up.bytes + pair.down.bytes
        pair.close()

    def _drop(self, dialled: _Dialled, why: str) -> None:
        self.refusals[why] += 1
        self._forget(dialled)
        dialled.sock.close()

    def _forget(self, dialled: _Dialled) -> None:
        del self._dialled[dialled.sock.fileno()]
        self._strangers.pop(dialled.sock.fileno(), None)
        if dialled.session is not None:
            _discard(self._waiting_of, dialled.session, dialled)

    def _sweep(self) -> None:
        now = self._loop.time()
        for dialled in [each for each in self._dialled.values() if each.deadline <= now]:
            self._drop(dialled, "late" if dialled.session is None else "no_connector")
        for token in [token for token, each in self._tokens.items() if each.expires_at <= now]:
            self._take(token)
        self._sweeper = self._loop.call_later(SWEEP_SECONDS, self._sweep)


def listen(address: SockAddr) -> socket.socket:
    """Return a non-blocking listening TCP socket. Raises ZtnaError naming an address that cannot be had."""
    host, port = address
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listener = socket.create_server((host, port), family=family, backlog=LISTEN_BACKLOG)
    except OSError as error:
        raise ZtnaError(f"TCP {host}:{port}: {os.strerror(error.errno or 0)}") from error
    listener.setblocking(False)
    return listener


def tune(sock: socket.socket) -> None:
    """Make a spliced socket non-blocking, prompt, and quick to notice a dead peer."""
    sock.setblocking(False)
    for level, option, value in (
        (socket.IPPROTO_TCP, socket.TCP_NODELAY, 1),
        (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
        (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, KEEPALIVE_IDLE_SECONDS),
        (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, KEEPALIVE_INTERVAL_SECONDS),
        (socket.IPPROTO_TCP, socket.TCP_KEEPCNT, KEEPALIVE_PROBES),
        (socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, DEAD_PEER_MILLISECONDS),
    ):
        # The peer may have gone already (EINVAL): reading it will tell.
        with contextlib.suppress(OSError):
            sock.setsockopt(level, option, value)


def peer_of(sock: socket.socket) -> Address:
    """Return whom the socket is connected to. Raises OSError when it is no longer."""
    host, port = sock.getpeername()[:2]
    return Address(host, port)


def _discard(sets: dict[SessionId, set[T]], session: SessionId, member: T) -> None:
    members = sets[session]
    members.discard(member)
    if not members:
        del sets[session]


def _splice(source: int, target: int, count: int) -> int:
    """Return how many bytes moved, 0 at the end of the source, or _WOULD_BLOCK. Raises OSError."""
    try:
        return os.splice(source, target, count, flags=_SPLICE_FLAGS)
    except OSError as error:
        if error.errno == errno.EAGAIN:
            return _WOULD_BLOCK
        raise
