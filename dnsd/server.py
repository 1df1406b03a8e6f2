"""DNS over UDP and TCP on one port, for those on the allow list. What is answered is dnsd.answer's.

UDP is served in batches straight from the socket; over TCP (RFC 7766) connections are bounded, may be idle
only so long, and may send many queries without waiting for the answers. A server without sockets of its own goes
on with connections that others hand over.
"""

from __future__ import annotations

import asyncio
import socket
import struct
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from ipaddress import IPv4Address, IPv4Network

from dnsd.answer import FORWARD, TCP_IDLE_SECONDS, Answers, prohibited
from dnsd.forwarding import Forwarder
from dnsd.limits import Limiter
from dnsd.signed import SecondLook
from dnsd.sockets import Sockets, bind
from dnsd.transfer import Publication
from ztna.config import DnsdConfig, Endpoint
from ztna.reasons import Reason
from ztna.telemetry import DNS_CONNECTIONS, DNS_QUERIES, DROPS, REFUSALS, logger
from ztna.tsig import Key
from ztna.udp import BATCH_PACKETS, RawAddress, RawSocket, SockAddr

BATCHES_PER_WAKEUP = 8
TCP_CONNECTIONS_MAX = 256
TCP_STRANGERS_MAX = 128
"""Connections beyond which only those on the allow list get one; whether others hold a key shows later."""
TCP_CONNECTIONS_PER_CLIENT_MAX = 64
TCP_MESSAGE_SECONDS = 5.0
"""A query that has begun must be whole by then, however slowly its bytes drip."""
TCP_QUERIES_AT_ONCE = 64
"""After so many answers of one connection the others have their turn, and it must take what it asked for."""
TCP_SEND_SECONDS = 10.0
TCP_READ_BYTES = 65_536
TCP_SEND_BYTES = 16_384
"""Answers are written when there are so many bytes of them, or no more queries."""
ACCEPT_RETRY_SECONDS = 0.1
SOURCES_REMEMBERED_MAX = 65_536

_LENGTH = struct.Struct("!H")
_LOOPBACK = 127
_log = logger(__name__)

HandOver = Callable[[socket.socket, str, bytes], Awaitable[None]]
"""Gives somebody else a connection, the host it is from, and what was read of it but not answered."""


class Server:
    """Answers from `answers`, which its owner replaces whenever the zone changes."""

    def __init__(
        self,
        allow: Sequence[IPv4Network],
        answers: Answers,
        second_look: SecondLook | None = None,
        *,
        limiter: Limiter | None = None,
        limits_loopback: bool = False,
        forwarder: Forwarder | None = None,
        hand_over: HandOver | None = None,
    ) -> None:
        """`second_look` has signed queries and transfers, which `allow` does not bind.

        Without a limiter nobody has a limit; a forwarder is needed when the answers' options forward. With
        `hand_over`, connections that ask for a transfer are given away.
        """
        self.answers = answers
        self._second_look = second_look or SecondLook()
        self._allow = tuple(allow)
        self._is_allowed: dict[bytes, bool] = {}
        self._limiter = limiter
        self._limits_loopback = limits_loopback
        # Who gets ready answers without a further look: who may ask, and has no limit.
        self._is_known = self._is_allowed if limiter is None else dict[bytes, bool]()
        self._forwarder = forwarder
        self._hand_over = hand_over
        self._tasks: asyncio.TaskGroup
        self._udp: RawSocket | None = None
        self._tcp: socket.socket
        self._connections: set[socket.socket] = set()
        self._clients: Counter[str] = Counter()
        self._counted = self._counted_not_sent = 0
        self._udp_queries = DNS_QUERIES.labels("udp")
        self._tcp_queries = DNS_QUERIES.labels("tcp")
        self._refusals = REFUSALS.labels("dnsd", Reason.NO_GRANT.value)
        self._no_answer = DROPS.labels("dnsd", "no_dns_query")
        self._not_sent = DROPS.labels("dnsd", "kernel_refused")
        self._over_limit = DROPS.labels("dnsd", "over_rate_limit")
        self._too_many = DROPS.labels("dnsd", "too_many_tcp_connections")

    def listen(self, endpoint: Endpoint) -> SockAddr:
        """Bind UDP and TCP to the same port; port 0 takes a free one. Raises ZtnaError naming a taken port."""
        sockets = bind(endpoint)
        self.take(sockets)
        return sockets.address

    def take(self, sockets: Sockets) -> None:
        """Answer on these; they are closed at the end."""
        self._udp, self._tcp = RawSocket(sockets.udp), sockets.tcp

    async def run(self) -> None:
        """Serve until cancelled; then everything is closed."""
        async with asyncio.TaskGroup() as tasks:
            self._tasks = tasks
            if self._udp is None:
                await asyncio.Event().wait()
            else:
                await self._listen(self._udp, tasks)

    async def _listen(self, udp: RawSocket, tasks: asyncio.TaskGroup) -> None:
        loop = asyncio.get_running_loop()
        try:
            loop.add_reader(udp.fileno(), self._readable, udp)
            while True:
                try:
                    sock, (host, *_) = await loop.sock_accept(self._tcp)
                except OSError as error:
                    # That one went away again, or files have run out: neither may end the others.
                    _log.warning("accept_failed", error=error)
                    await asyncio.sleep(ACCEPT_RETRY_SECONDS)
                    continue
                if self._admits(sock, host):
                    tasks.create_task(self._serve_connection(sock, host, b""), name="dns-tcp")
        finally:
            loop.remove_reader(udp.fileno())
            udp.close()
            self._tcp.close()

    def adopt(self, sock: socket.socket, host: str, received: bytes) -> None:
        """Go on with a connection of which somebody else has read `received`, within our own bounds; only while run."""
        if self._admits(sock, host):
            self._tasks.create_task(self._serve_connection(sock, host, received), name="dns-tcp")

    def count(self) -> None:
        """Bring the metrics up to date: the hot path counts in plain numbers."""
        if self._udp is not None:
            self._udp_queries.inc(self._udp.received - self._counted)
            self._counted = self._udp.received
            self._not_sent.inc(self._udp.dropped - self._counted_not_sent)
            self._counted_not_sent = self._udp.dropped

    @property
    def status(self) -> Mapping[str, int]:
        """Counts for /status."""
        udp = self._udp
        return {
            "udp_received": udp.received if udp else 0,
            "udp_sent": udp.sent if udp else 0,
            "udp_dropped": udp.dropped if udp else 0,
            "tcp_connections": len(self._connections),
            "answers_ready": len(self.answers.ready),
        }

    # UDP

    def _readable(self, udp: RawSocket) -> None:
        for _ in range(BATCHES_PER_WAKEUP):
            # The zone may change between two batches, so `ready` is looked up for each.
            count = udp.reply(self.answers.ready, self._is_known, self._answer_udp)
            if count < BATCH_PACKETS:
                return

    def _answer_udp(self, data: bytes, source: RawAddress) -> bytes | None:
        """Answer what was not asked before, or by somebody who is not known to be free to ask."""
        packed = source[4:8]
        if not self._is_within_limit(packed):
            return self._answer_limited(data, packed)
        if self._is_allowed.get(packed) and (ready := self.answers.ready.get(data[2:])) is not None:
            return data[:2] + ready
        answer = next(self._answers_to(data, packed, over_tcp=False), None)
        if answer is None:
            self._no_answer.inc()
        elif not answer:
            self._tasks.create_task(self._forward(data, source), name="dns-forward")
            return None
        return answer

    async def _forward(self, data: bytes, source: RawAddress) -> None:
        answer = await self._upstream_answer(data, over_tcp=False)
        if self._udp is not None:
            self._udp.send([(answer, source)])

    async def _upstream_answer(self, data: bytes, *, over_tcp: bool) -> bytes:
        assert self._forwarder is not None, "only answers with upstreams say FORWARD"
        return await self._forwarder.answer(data, over_tcp=over_tcp)

    def _is_within_limit(self, packed: bytes) -> bool:
        if self._limiter is None:
            return True
        if packed[0] == _LOOPBACK and not self._limits_loopback:
            if len(self._is_known) >= SOURCES_REMEMBERED_MAX:
                self._is_known.clear()
            self._is_known[packed] = self._allows(packed)
            return True
        return self._limiter.takes(packed, time.monotonic())

    def _answer_limited(self, data: bytes, packed: bytes) -> bytes | None:
        """Say little, or nothing, to a source that has had too many answers; strangers hear nothing."""
        self._over_limit.inc()
        if self._limiter is None or not self._allows(packed):
            return None
        return self.answers.limited(data, packed, slips=self._limiter.slips())

    def _answers_to(self, data: bytes, packed: bytes, *, over_tcp: bool) -> Iterator[bytes]:
        """Return the answers to one query: none to what deserves none, many to a transfer over TCP."""

        def plainly(query: bytes, reserve: int, is_signed: bool) -> bytes | None:
            if not is_signed and not self._allows(packed):
                self._refusals.inc()
                return prohibited(query)
            answer = self.answers.answer(query, over_tcp=over_tcp, reserve=reserve, source=packed)
            # What others say is not ours to sign.
            return prohibited(query) if is_signed and answer == FORWARD else answer

        if self._second_look.wants(data):
            yield from self._second_look.answers(data, packed, plainly, over_tcp=over_tcp)
        elif (answer := plainly(data, 0, False)) is not None:
            yield answer

    def _allows(self, packed: bytes) -> bool:
        allowed = self._is_allowed.get(packed)
        if allowed is None:
            if len(self._is_allowed) >= SOURCES_REMEMBERED_MAX:
                self._is_allowed.clear()
            address = IPv4Address(packed)
            allowed = self._is_allowed[packed] = any(address in network for network in self._allow)
        return allowed

    # TCP

    def _admits(self, sock: socket.socket, host: str) -> bool:
        is_allowed = self._allows(socket.inet_aton(host))
        if not is_allowed and not self._second_look.keys:
            self._refusals.inc()
        elif (
            len(self._connections) >= (TCP_CONNECTIONS_MAX if is_allowed else TCP_STRANGERS_MAX)
            or self._clients[host] >= TCP_CONNECTIONS_PER_CLIENT_MAX
        ):
            self._too_many.inc()
        else:
            sock.setblocking(False)
            self._connections.add(sock)
            self._clients[host] += 1
            DNS_CONNECTIONS.inc()
            return True
        sock.close()
        return False

    async def _serve_connection(self, sock: socket.socket, host: str, received: bytes) -> None:
        try:
            await self._serve_queries(sock, host, bytearray(received))
        except (OSError, TimeoutError):
            # The client went away, or was too slow: that is how every such connection ends.
            pass
        finally:
            self._connections.discard(sock)
            self._clients[host] -= 1
            if not self._clients[host]:
                del self._clients[host]
            DNS_CONNECTIONS.dec()
            sock.close()

    async def _serve_queries(self, sock: socket.socket, host: str, received: bytearray) -> None:
        """Answer query after query in order, a run of them in one write; what has come already is first."""
        loop = asyncio.get_running_loop()
        had_begun = False
        while True:
            queries = _take_queries(received)
            own = self._own(queries)
            for start in range(0, own, TCP_QUERIES_AT_ONCE):
                run = queries[start : min(own, start + TCP_QUERIES_AT_ONCE)]
                if not await self._answer_run(sock, run, socket.inet_aton(host)):
                    return None
                # A client that never stops asking must not keep the others waiting.
                await asyncio.sleep(0)
            if own < len(queries) and self._hand_over is not None:
                rest = b"".join(map(_framed, queries[own:])) + received
                return await self._hand_over(sock, host, rest)
            if queries or not had_begun:
                patience = min(TCP_MESSAGE_SECONDS, TCP_IDLE_SECONDS) if received else TCP_IDLE_SECONDS
                deadline = loop.time() + patience
            async with asyncio.timeout_at(deadline):
                data = await loop.sock_recv(sock, TCP_READ_BYTES)
            if not data:
                return None
            had_begun = bool(received)
            received += data

    def _own(self, queries: Sequence[bytes]) -> int:
        """Return how many of the queries come before the first that another is to answer."""
        if self._hand_over is not None:
            for place, query in enumerate(queries):
                if self._second_look.is_transfer(query):
                    return place
        return len(queries)

    async def _answer_run(self, sock: socket.socket, queries: Sequence[bytes], address: bytes) -> bool:
        """Answer in order; False after what is no DNS: who sends that gets no more (RFC 7766 8)."""
        written = bytearray()
        for query in queries:
            self._tcp_queries.inc()
            is_answered = False
            for answer in self._answers_to(query, address, over_tcp=True):
                is_answered = True
                told = answer or await self._upstream_answer(query, over_tcp=True)
                written += _framed(told)
                if len(written) >= TCP_SEND_BYTES:
                    await _send(sock, written)
            if not is_answered:
                self._no_answer.inc()
                await _send(sock, written)
                return False
        await _send(sock, written)
        return True


def configured(
    config: DnsdConfig,
    keys: Mapping[str, Key],
    publication: Publication,
    *,
    limits: memoryview | None = None,
    hand_over: HandOver | None = None,
) -> Server:
    """Return a server as the configuration wants it, without answers yet; `limits` is memory shared with others."""
    return Server(
        config.allow,
        Answers(None),
        SecondLook(keys, config.transfer.allow, publication),
        limiter=Limiter(config.rate_limit, limits) if config.rate_limit else None,
        limits_loopback=config.rate_limit_loopback,
        forwarder=Forwarder(config.upstreams, config.upstream_timeout_s) if config.upstreams else None,
        hand_over=hand_over,
    )


async def _send(sock: socket.socket, written: bytearray) -> None:
    """Write what is there; a client that does not take it in time is no client any more."""
    async with asyncio.timeout(TCP_SEND_SECONDS):
        await asyncio.get_running_loop().sock_sendall(sock, bytes(written))
    written.clear()
    # A write that need not wait does not let others go on, and a transfer is many of them.
    await asyncio.sleep(0)


def _framed(message: bytes) -> bytes:
    return _LENGTH.pack(len(message)) + message


def _take_queries(received: bytearray) -> list[bytes]:
    """Take the whole messages out of what was received; the last, unfinished one stays."""
    queries: list[bytes] = []
    position = 0
    while len(received) - position >= _LENGTH.size:
        (length,) = _LENGTH.unpack_from(received, position)
        end = position + _LENGTH.size + length
        if end > len(received):
            break
        queries.append(bytes(received[position + _LENGTH.size : end]))
        position = end
    del received[:position]
    return queries
