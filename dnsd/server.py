"""DNS over UDP and TCP on one port, for those on the allow list. What is answered is dnsd.answer's.

UDP is served in batches straight from the socket; over TCP (RFC 7766) connections are bounded, may be idle
only so long, and may send many queries without waiting for the answers.
"""

from __future__ import annotations

import asyncio
import socket
import struct
from collections.abc import Mapping, Sequence
from ipaddress import IPv4Address, IPv4Network

from dnsd.answer import Answers, prohibited
from ztna.config import Endpoint
from ztna.reasons import Reason
from ztna.runtime import bind_error
from ztna.telemetry import DNS_CONNECTIONS, DNS_QUERIES, DROPS, REFUSALS, logger
from ztna.udp import BATCH_PACKETS, RawAddress, RawSocket, SockAddr

BATCHES_PER_WAKEUP = 8
TCP_CONNECTIONS_MAX = 256
TCP_BACKLOG = 128
TCP_IDLE_SECONDS = 10.0
TCP_SEND_SECONDS = 10.0
TCP_READ_BYTES = 65_536
ACCEPT_RETRY_SECONDS = 0.1
SOURCES_REMEMBERED_MAX = 65_536
BIND_ATTEMPTS = 16
"""How often another free port is tried when port 0 was asked for and TCP does not get UDP's."""

_LENGTH = struct.Struct("!H")
_log = logger(__name__)


class Server:
    """Answers from `answers`, which its owner replaces whenever the zone changes."""

    def __init__(self, allow: Sequence[IPv4Network], answers: Answers) -> None:
        self.answers = answers
        self._allow = tuple(allow)
        self._is_allowed: dict[bytes, bool] = {}
        self._udp: RawSocket
        self._tcp: socket.socket
        self._connections: set[socket.socket] = set()
        self._counted = 0
        self._udp_queries = DNS_QUERIES.labels("udp")
        self._tcp_queries = DNS_QUERIES.labels("tcp")
        self._refusals = REFUSALS.labels("dnsd", Reason.NO_GRANT.value)
        self._no_answer = DROPS.labels("dnsd", "no_dns_query")
        self._too_many = DROPS.labels("dnsd", "too_many_tcp_connections")

    def listen(self, endpoint: Endpoint) -> SockAddr:
        """Bind UDP and TCP to the same port; port 0 takes a free one. Raises ZtnaError naming a taken port."""
        for attempt in range(BIND_ATTEMPTS):
            self._udp = RawSocket.open((endpoint.host, endpoint.port))
            host, port = self._udp.address
            try:
                self._tcp = _listen_tcp(Endpoint(host, port))
            except OSError as error:
                self._udp.close()
                if endpoint.port or attempt == BIND_ATTEMPTS - 1:
                    raise bind_error(endpoint, error) from None
            else:
                break
        return host, port

    async def run(self) -> None:
        """Serve until cancelled; then everything is closed."""
        loop = asyncio.get_running_loop()
        loop.add_reader(self._udp.fileno(), self._readable)
        try:
            async with asyncio.TaskGroup() as tasks:
                while True:
                    try:
                        sock, (host, *_) = await loop.sock_accept(self._tcp)
                    except OSError as error:
                        # That one went away again, or files have run out: neither may end the others.
                        _log.warning("accept_failed", error=error)
                        await asyncio.sleep(ACCEPT_RETRY_SECONDS)
                        continue
                    if self._admits(sock, host):
                        tasks.create_task(self._serve_connection(sock), name="dns-tcp")
        finally:
            loop.remove_reader(self._udp.fileno())
            self._udp.close()
            self._tcp.close()

    def count(self) -> None:
        """Bring the metrics up to date: the hot path counts in plain numbers."""
        self._udp_queries.inc(self._udp.received - self._counted)
        self._counted = self._udp.received

    @property
    def status(self) -> Mapping[str, int]:
        """Counts for /status."""
        return {
            "udp_received": self._udp.received,
            "udp_sent": self._udp.sent,
            "udp_dropped": self._udp.dropped,
            "tcp_connections": len(self._connections),
            "answers_ready": len(self.answers.ready),
        }

    # UDP

    def _readable(self) -> None:
        for _ in range(BATCHES_PER_WAKEUP):
            # The zone may change between two batches, so `ready` is looked up for each.
            count = self._udp.reply(self.answers.ready, self._is_allowed, self._answer_udp)
            if count < BATCH_PACKETS:
                return

    def _answer_udp(self, data: bytes, source: RawAddress) -> bytes | None:
        """Answer what was not asked before, or by somebody who is seen for the first time or may not ask."""
        if self._allows(source[4:8]):
            answer = self.answers.answer(data)
        else:
            self._refusals.inc()
            answer = prohibited(data)
        if answer is None:
            self._no_answer.inc()
        return answer

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
        if not self._allows(socket.inet_aton(host)):
            self._refusals.inc()
        elif len(self._connections) >= TCP_CONNECTIONS_MAX:
            self._too_many.inc()
        else:
            sock.setblocking(False)
            self._connections.add(sock)
            DNS_CONNECTIONS.set(len(self._connections))
            return True
        sock.close()
        return False

    async def _serve_connection(self, sock: socket.socket) -> None:
        try:
            await self._serve_queries(sock)
        except (OSError, TimeoutError):
            # The client went away, or was idle for too long: that is how every such connection ends.
            pass
        finally:
            self._connections.discard(sock)
            DNS_CONNECTIONS.set(len(self._connections))
            sock.close()

    async def _serve_queries(self, sock: socket.socket) -> None:
        """Answer query after query in order, each read's worth in one write."""
        loop = asyncio.get_running_loop()
        received = bytearray()
        while True:
            async with asyncio.timeout(TCP_IDLE_SECONDS):
                data = await loop.sock_recv(sock, TCP_READ_BYTES)
            if not data:
                return
            received += data
            answers = bytearray()
            for query in _take_queries(received):
                self._tcp_queries.inc()
                answer = self.answers.answer(query, over_tcp=True)
                if answer is None:
                    # Who sends no DNS over a connection of its own gets nothing more (RFC 7766 8).
                    self._no_answer.inc()
                    return
                answers += _LENGTH.pack(len(answer)) + answer
            if answers:
                async with asyncio.timeout(TCP_SEND_SECONDS):
                    await loop.sock_sendall(sock, answers)


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


def _listen_tcp(endpoint: Endpoint) -> socket.socket:
    sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        sock.setblocking(False)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind((endpoint.host, endpoint.port))
        sock.listen(TCP_BACKLOG)
    except OSError:
        sock.close()
        raise
    return sock
