"""The TCP half of the forwarder: admits connections by token, joins them in pairs, and has their bytes spliced.

Its ports take TLS too (a control connection, docs/blocked.md): the first byte tells, and relay.tls_door goes on.

How bytes move is relay.pipes' business, and who gets a token relay.sessions' decision. Source: protocol.md, Forwarder.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import select
import socket
import struct
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Sequence

from relay.dialled import Dialled, Owner, Strangers, Token, Tokens, discard
from relay.links import Limits
from relay.metering import Meters
from relay.pipes import BIG_BATCH_BYTES, Direction, Pair
from ztna.errors import ProtocolError, ZtnaError
from ztna.names import SessionId
from ztna.sources import source_of
from ztna.stall import LOOK_SECONDS
from ztna.telemetry import dropped
from ztna.udp import SockAddr
from ztna.wire import forwarder as wire
from ztna.wire.control import Address

TOKEN_SECONDS = 30.0
BIND_SECONDS = 5.0
CONNECTIONS_MAX = 20_000
STRANGERS_MAX = 2_000
"""Connections that have shown no token yet."""
LISTEN_BACKLOG = 1024
ACCEPTS_PER_WAKEUP = 64
ACCEPT_PAUSE_SECONDS = 0.1
EVENTS_PER_WAKEUP = 256
TICK_SECONDS = 0.002
SLOW_TICK_SECONDS = 0.004
"""Between ticks when no direction moved BIG_BATCH_BYTES in the last; the most that a bulk direction waits."""
HELD_TICK_SECONDS = 0.02
"""How often what a rate holds back is looked at again."""
SWEEP_SECONDS = 1.0
LOOK_PARTS = 10
"""Every pair is looked at each LOOK_SECONDS, a part of them at a time: all 10,000 at once would take 75 ms."""
DEAD_PEER_MILLISECONDS = 10_000
KEEPALIVE_IDLE_SECONDS = 5
KEEPALIVE_INTERVAL_SECONDS = 2
KEEPALIVE_PROBES = 3

_BULK_EDGES = select.EPOLLOUT | select.EPOLLRDHUP | select.EPOLLET
_EDGES = select.EPOLLIN | _BULK_EDGES
_GONE = select.EPOLLHUP | select.EPOLLERR | select.EPOLLRDHUP
_TLS_HANDSHAKE = b"\x16"
"""The first byte of TLS: the content type of its first record (RFC 8446, 5.1)."""
_ABORT = struct.pack("ii", 1, 0)

WHERE = "forwarder_tcp"


class Splicer:
    """The forwarder's TCP listeners on the running loop.

    `on_agent_waiting(session, waiter)` is called when an agent's connection came in with a good token; the
    caller answers with `admit_connector(session, waiter, token)` and tells the connector that token.
    `on_tls(socket, source)` takes over a connection that begins as TLS, unread; without it such are malformed.
    """

    def __init__(
        self,
        listener: socket.socket,
        on_agent_waiting: Callable[[SessionId, int], None],
        limits: Limits | None = None,
        charge: Callable[[Hashable, int], bool] = lambda link, size: True,
        *,
        others: Sequence[socket.socket] = (),
        on_tls: Callable[[socket.socket, str], None] | None = None,
    ) -> None:
        """Begin to accept on listening non-blocking sockets, of which the first is the forwarder's own.

        `charge(link, size)` takes bytes off a link's quota and says whether there is some left.
        """
        self._listener = listener
        self._listeners = (listener, *others)
        self._on_tls = on_tls
        self._on_agent_waiting = on_agent_waiting
        self._charge = charge
        self._meters = Meters(limits or Limits())
        self._has_quota = limits is not None and limits.quota_bytes is not None
        self._tokens = Tokens()
        self._dialled: dict[int, Dialled] = {}
        self._strangers = Strangers()
        self._pairs: dict[int, Pair] = {}
        self._pairs_of: defaultdict[SessionId, set[Pair]] = defaultdict(set)
        self._again: set[Pair] = set()
        self._bulk: dict[Direction, Pair] = {}
        self._ticker: asyncio.TimerHandle | None = None
        self._held: dict[Direction, Pair] = {}
        self._holder: asyncio.TimerHandle | None = None
        self.refusals: Counter[str] = Counter()
        """Connections and dials not served, by why: bad_token, late, limit, source_limit, no_connector, malformed,
        session_ended, link_quota; link_rate, how often a rate held something back; dead_path, pairs cut for that."""
        self.bytes = 0
        """Copied by pairs that have ended."""
        self._bytes_of: Counter[SessionId] = Counter()
        """The same of each live session."""
        self._told: Counter[str] = Counter()
        self.joined = 0
        self._loop = asyncio.get_running_loop()
        # Sockets are registered once, edge-triggered, in an epoll of our own that the loop watches: interest
        # changes only when a direction becomes bulk or is so no longer.
        self._epoll = select.epoll()
        self._loop.add_reader(self._epoll.fileno(), self._events)
        for each in self._listeners:
            self._resume_accepting(each)
        self._sweeper = self._loop.call_later(SWEEP_SECONDS, self._sweep)
        self._looker = self._loop.call_later(LOOK_SECONDS, self._look)
        self._to_look_at: list[list[Pair]] = []
        self._pauses: dict[socket.socket, asyncio.TimerHandle] = {}
        self._closed = False

    @property
    def address(self) -> SockAddr:
        """The bound address."""
        host, port = self._listener.getsockname()[:2]
        return host, port

    def admit_agent(self, session: SessionId, token: bytes, owner: Owner | None = None) -> bool:
        """Let one connection with the token in within TOKEN_SECONDS.

        False when its session or agent has too many tokens and waiting connections, or its link no quota left.
        Without an `owner` the session is bounded and metered by itself.
        """
        owner = owner or Owner(session, session)
        if not self._charge(owner.link, 0):
            self.refusals["link_quota"] += 1
            return False
        return self._admit(token, Token(session, owner, self._loop.time() + TOKEN_SECONDS))

    def admit_connector(self, session: SessionId, waiter: int, token: bytes) -> bool:
        """Let one connection with the token join the waiting one; False when that one has gone."""
        waiting = self._dialled.get(waiter)
        if waiting is None or waiting.session != session:
            return False
        assert waiting.owner is not None
        return self._admit(token, Token(session, waiting.owner, waiting.deadline, waiting))

    def end_session(self, session: SessionId) -> None:
        """Void the session's tokens and close its connections."""
        self._tokens.void_session(session)
        for dialled in self._tokens.waiting(session):
            self._drop(dialled, "session_ended")
        for pair in list(self._pairs_of.get(session, ())):
            self._end(pair, abort=True)
        self._bytes_of.pop(session, None)

    def end_link(self, link: Hashable) -> None:
        """Hear that a link has ended with its last session."""
        self._meters.forget(link)

    def bytes_of(self, session: SessionId) -> int:
        """Return how much was copied for a live session, both ways."""
        return self._bytes_of[session] + sum(each.bytes for each in self._pairs_of.get(session, ()))

    @property
    def pairs(self) -> int:
        """How many pairs of connections are joined."""
        return len(self._pairs) // 2

    @property
    def copied(self) -> int:
        """How many bytes were copied so far, both ways."""
        return self.bytes + sum(each.bytes for each in set(self._pairs.values()))

    def status(self) -> dict[str, object]:
        """Return the counters, for /status."""
        return {
            "address": f"{self.address[0]}:{self.address[1]}",
            "tokens": len(self._tokens),
            "unbound": len(self._dialled),
            "waiting": self._tokens.waiters,
            "pairs": self.pairs,
            "joined": self.joined,
            "bytes": self.copied,
            "held": len(self._held),
            "refusals": dict(self.refusals),
        }

    def close(self) -> None:
        """Close everything; harmless twice."""
        if self._closed:
            return
        self._closed = True
        self._sweeper.cancel()
        self._looker.cancel()
        for timer in (*self._pauses.values(), self._ticker, self._holder):
            if timer is not None:
                timer.cancel()
        for listener in self._listeners:
            self._loop.remove_reader(listener.fileno())
        self._loop.remove_reader(self._epoll.fileno())
        for dialled in list(self._dialled.values()):
            self._drop(dialled, "session_ended")
        for pair in set(self._pairs.values()):
            self._end(pair, abort=True)
        for listener in self._listeners:
            listener.close()
        self._epoll.close()

    def _admit(self, token: bytes, entry: Token) -> bool:
        displaced = self._tokens.displaced
        admitted = self._tokens.add(token, entry)
        if refused := self._tokens.displaced - displaced + (not admitted):
            self.refusals["limit"] += refused
        return admitted

    def _accept(self, listener: socket.socket) -> None:
        for _ in range(ACCEPTS_PER_WAKEUP):
            try:
                sock, address = listener.accept()
            except (BlockingIOError, ConnectionAbortedError):
                return
            except OSError:
                # EMFILE and the like. Who waits is still there, so an immediate retry would only burn the CPU.
                self.refusals["limit"] += 1
                self._loop.remove_reader(listener.fileno())
                pause = self._loop.call_later(ACCEPT_PAUSE_SECONDS, self._resume_accepting, listener)
                self._pauses[listener] = pause
                return
            source = source_of(address[0])
            if not self._make_room(source):
                self.refusals["limit"] += 1
                sock.close()
                continue
            tune(sock)
            dialled = Dialled(sock, source, self._loop.time() + BIND_SECONDS)
            self._dialled[sock.fileno()] = dialled
            self._strangers.add(dialled)
            self._epoll.register(sock.fileno(), _EDGES)

    def _make_room(self, source: str) -> bool:
        """Say whether one more connection may come in, at the cost of the stranger that waited longest if need be."""
        crowding = self._strangers.oldest_of_full(source)
        if crowding is not None:
            self._drop(crowding, "source_limit")
        if len(self._dialled) + len(self._pairs) >= CONNECTIONS_MAX:
            return False
        if len(self._strangers) < STRANGERS_MAX:
            return True
        oldest = self._strangers.oldest()
        if oldest is not None:
            self._drop(oldest, "limit")
        return oldest is not None

    def _resume_accepting(self, listener: socket.socket) -> None:
        self._loop.add_reader(listener.fileno(), self._accept, listener)

    def _events(self) -> None:
        for fd, event in self._epoll.poll(0, EVENTS_PER_WAKEUP):
            pair = self._pairs.get(fd)
            if pair is not None:
                self._pump(pair, *pair.awaiting(fd, event))
                continue
            dialled = self._dialled.get(fd)
            if dialled is not None:
                self._read_head(dialled, event)

    def _read_head(self, dialled: Dialled, event: int) -> None:
        if dialled.session is not None:
            # It waits for its connector and was told to say nothing before `bound`: left in the kernel.
            if event & _GONE:
                self._drop(dialled, "no_connector")
            return
        if not dialled.head and self._on_tls is not None and _begins_as_tls(dialled.sock):
            self._forget(dialled)
            self._epoll.unregister(dialled.sock.fileno())
            self._on_tls(dialled.sock, dialled.source)
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

    def _present(self, dialled: Dialled) -> None:
        try:
            token = wire.parse_dial_in(bytes(dialled.head))
        except ProtocolError:
            self._drop(dialled, "malformed")
            return
        entry = self._tokens.take(token)
        if entry is None:
            self._drop(dialled, "bad_token")
        elif entry.expires_at < self._loop.time():
            self._drop(dialled, "late")
        elif entry.waiting is not None:
            self._join(entry, entry.waiting, dialled)
        elif not self._tokens.wait(dialled, entry):
            self._drop(dialled, "limit")
        else:
            self._strangers.discard(dialled)
            dialled.deadline = self._loop.time() + BIND_SECONDS
            self._on_agent_waiting(entry.session, dialled.sock.fileno())

    def _join(self, entry: Token, agent: Dialled, connector: Dialled) -> None:
        if self._dialled.get(agent.sock.fileno()) is not agent:
            self._drop(connector, "late")
            return
        try:
            for each in (agent, connector):
                each.sock.send(wire.encode(wire.Bound(wire.NO_NONCE, peer_of(each.sock))))
            link = entry.owner.link
            now = self._loop.time()
            pair = Pair(entry.session, agent.sock, connector.sock, link, self._meters.of(link, now), now)
        except OSError:
            self._drop(agent, "no_connector")
            self._drop(connector, "late")
            return
        for each in (agent, connector):
            self._forget(each)
            self._pairs[each.sock.fileno()] = pair
        self._pairs_of[entry.session].add(pair)
        self.joined += 1
        # What came before the join made its edge already.
        self._pump(pair, pair.up, pair.down)

    def _pump(self, pair: Pair, *directions: Direction) -> None:
        more = False
        self._refill(*directions)
        try:
            for direction in directions:
                before = direction.bytes
                more = direction.pump() or more
                other = pair.other(direction)
                if direction.bytes > before and other.is_bulk and other.is_in_turns(self._loop.time()):
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
                if direction.held:
                    self._hold(pair, direction)
                # Two in ticks would see no arrival that tells that they take turns.
                elif not (direction.is_bulk or pair.other(direction).is_bulk) and direction.bursts(now):
                    self._start_ticks(pair, direction)

    def _refill(self, *directions: Direction) -> None:
        for direction in directions:
            if direction.meter is not None:
                direction.meter.refill(self._loop.time())

    def _hold(self, pair: Pair, direction: Direction) -> None:
        """Look again soon at a direction whose rate is used up: nothing else would, as its edge has been."""
        if direction not in self._held:
            self.refusals["link_rate"] += 1
            self._held[direction] = pair
        if self._holder is None:
            self._holder = self._loop.call_later(HELD_TICK_SECONDS, self._release)

    def _release(self) -> None:
        self._holder = None
        for direction, pair in tuple(self._held.items()):
            if direction not in self._held:
                continue  # its pair ended with the other direction
            self._pump(pair, direction)
            if not direction.held:
                self._held.pop(direction, None)
        if self._held:
            # Who comes first may take it all: the next time the others come before it.
            first = next(iter(self._held))
            self._held[first] = self._held.pop(first)
            if self._holder is None:
                self._holder = self._loop.call_later(HELD_TICK_SECONDS, self._release)

    def _start_ticks(self, pair: Pair, direction: Direction) -> None:
        """Let arrivals gather: each costs a wakeup, and a bulk transfer makes one with every TLS record."""
        direction.is_bulk = True
        self._bulk[direction] = pair
        self._epoll.modify(direction.source.fileno(), _BULK_EDGES)
        if self._ticker is None:
            self._ticker = self._loop.call_later(TICK_SECONDS, self._tick)

    def _stop_ticks(self, direction: Direction) -> None:
        """Go back to edges; what has arrived already makes one in epoll_ctl(2)."""
        direction.is_bulk = False
        del self._bulk[direction]
        self._epoll.modify(direction.source.fileno(), _EDGES)

    def _tick(self) -> None:
        now, most = self._loop.time(), 0
        for direction, pair in tuple(self._bulk.items()):
            if direction not in self._bulk:
                continue  # its pair ended with the other direction
            self._refill(direction)
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

    def _end(self, pair: Pair, *, abort: bool) -> None:
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
            self._held.pop(direction, None)
        discard(self._pairs_of, pair.session, pair)
        self._take_off_quota(pair)
        self.bytes += pair.bytes
        self._bytes_of[pair.session] += pair.bytes
        pair.close()

    def _drop(self, dialled: Dialled, why: str) -> None:
        self.refusals[why] += 1
        self._forget(dialled)
        dialled.sock.close()

    def _forget(self, dialled: Dialled) -> None:
        del self._dialled[dialled.sock.fileno()]
        self._strangers.discard(dialled)
        self._tokens.stop_waiting(dialled)

    def _sweep(self) -> None:
        now = self._loop.time()
        for dialled in [each for each in self._dialled.values() if each.deadline <= now]:
            self._drop(dialled, "late" if dialled.session is None else "no_connector")
        self._tokens.void_expired(now)
        for pair in set(self._pairs.values()) if self._has_quota else ():
            if not self._take_off_quota(pair):
                self.refusals["link_quota"] += 1
                self._end(pair, abort=True)
        for why, count in (self.refusals - self._told).items():
            dropped(WHERE, why, count)
        self._told = self.refusals.copy()
        self._sweeper = self._loop.call_later(SWEEP_SECONDS, self._sweep)

    def _look(self) -> None:
        """End the pairs of which one end cannot be reached: the other learns of it by that and goes another way."""
        now = self._loop.time()
        if not self._to_look_at:
            pairs = list(set(self._pairs.values()))
            self._to_look_at = [pairs[part::LOOK_PARTS] for part in range(LOOK_PARTS)]
        for pair in self._to_look_at.pop():
            with contextlib.suppress(OSError):  # which its next splice tells; or it has ended since
                if pair.is_cut(now):
                    self.refusals["dead_path"] += 1
                    self._end(pair, abort=True)
        self._looker = self._loop.call_later(LOOK_SECONDS / LOOK_PARTS, self._look)

    def _take_off_quota(self, pair: Pair) -> bool:
        """Have what it carried since the last time taken off its link's quota; False when that is used up."""
        size, pair.charged = pair.bytes - pair.charged, pair.bytes
        return self._charge(pair.link, size)


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


def _begins_as_tls(sock: socket.socket) -> bool:
    """Look at the first byte, leaving it where it is; what is wrong with a socket its first read tells."""
    try:
        return sock.recv(1, socket.MSG_PEEK) == _TLS_HANDSHAKE
    except OSError:
        return False


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
