"""Asks upstreams what is not in the zone: one after the other, each with a deadline, over UDP or TCP as we were.

Keeps no answers. Every question has a socket of its own, so that an answer must be for its port as well as its
id (RFC 5452).
"""

from __future__ import annotations

import asyncio
import secrets
import socket
import struct
from collections.abc import Sequence

from dnsd.answer import TCP_PAYLOAD_BYTES, failed, udp_limit
from dnsd.onward import handed_on, is_answer, is_useful, passed_back
from dnsd.query import Query, read
from ztna.config import Endpoint
from ztna.telemetry import DNS_FORWARDED

QUESTIONS_MAX = 512
"""Questions that wait for an upstream at once; more are answered SERVFAIL."""

_LENGTH = struct.Struct("!H")


class Forwarder:
    """Hands questions on, beginning with the upstream that answered last."""

    def __init__(self, upstreams: Sequence[Endpoint], timeout_s: float) -> None:
        """Ask each of the upstreams (numeric hosts, at least one) for at most `timeout_s`."""
        self._upstreams = tuple(upstreams)
        self._timeout_s = timeout_s
        self._first = 0
        self._waiting = 0

    @property
    def waiting(self) -> int:
        """How many questions wait for an upstream."""
        return self._waiting

    async def answer(self, data: bytes, *, over_tcp: bool = False) -> bytes:
        """Return the answer to a query that Answers.answer said is for us: an upstream's, or SERVFAIL."""
        query = read(data)
        if self._waiting >= QUESTIONS_MAX:
            DNS_FORWARDED.labels("too_many").inc()
            return failed(query)
        self._waiting += 1
        try:
            answer = await self._ask_in_turn(query, over_tcp)
        finally:
            self._waiting -= 1
        DNS_FORWARDED.labels("failed" if answer is None else "answered").inc()
        if answer is None:
            return failed(query)
        return passed_back(answer, query, TCP_PAYLOAD_BYTES if over_tcp else udp_limit(query))

    async def _ask_in_turn(self, query: Query, over_tcp: bool) -> bytes | None:
        count = len(self._upstreams)
        for place in range(self._first, self._first + count):
            upstream = self._upstreams[place % count]
            asked = handed_on(query, secrets.randbelow(65_536))
            try:
                async with asyncio.timeout(self._timeout_s):
                    answer = await (_ask_tcp if over_tcp else _ask_udp)(upstream, asked)
            except (OSError, TimeoutError, EOFError):
                continue
            if is_useful(answer):
                self._first = place % count
                return answer
        return None


async def _ask_udp(upstream: Endpoint, asked: bytes) -> bytes:
    loop = asyncio.get_running_loop()
    with socket.socket(_family(upstream), socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
        sock.setblocking(False)
        sock.connect((upstream.host, upstream.port))
        await loop.sock_sendall(sock, asked)
        while True:
            data = await loop.sock_recv(sock, TCP_PAYLOAD_BYTES)
            if is_answer(data, asked):
                return data


async def _ask_tcp(upstream: Endpoint, asked: bytes) -> bytes:
    loop = asyncio.get_running_loop()
    with socket.socket(_family(upstream), socket.SOCK_STREAM | socket.SOCK_CLOEXEC) as sock:
        sock.setblocking(False)
        await loop.sock_connect(sock, (upstream.host, upstream.port))
        await loop.sock_sendall(sock, _LENGTH.pack(len(asked)) + asked)
        (length,) = _LENGTH.unpack(await _read_exactly(sock, _LENGTH.size))
        data = await _read_exactly(sock, length)
        if not is_answer(data, asked):
            raise EOFError("another answer")
        return data


async def _read_exactly(sock: socket.socket, length: int) -> bytes:
    loop = asyncio.get_running_loop()
    received = bytearray()
    while len(received) < length:
        data = await loop.sock_recv(sock, length - len(received))
        if not data:
            raise EOFError("the connection ended")
        received += data
    return bytes(received)


def _family(endpoint: Endpoint) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in endpoint.host else socket.AF_INET
