"""Ask DNS servers for SRV and TXT records, with failover, a deadline, and TCP when UDP is too small; or a unix socket.

Keeps nothing: who holds answers for their TTL is the caller. Chooses nothing: see ztna.dns.order.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import struct
import time
from collections.abc import Callable, Sequence
from ipaddress import IPv4Address

import msgspec

from ztna import tsig
from ztna.config import Endpoint
from ztna.dns import Code, Message, Record, SoaData, SrvData, Type, decode, encode_query
from ztna.errors import ProtocolError, ResolverUnavailable
from ztna.tsig import Key

UDP_PAYLOAD_BYTES = 1232
"""Fits any path without fragments (DNS flag day 2020)."""

ROUNDS = 2
"""How often each server is tried before the question fails."""

QUERIES_IN_FLIGHT_MAX = 256
TARGETS_ASKED_MAX = 64
"""Addresses of SRV targets that the answer did not bring along, asked for by questions of their own."""

NEGATIVE_TTL_DEFAULT_SECONDS = 5
_LENGTH = struct.Struct("!H")


class SrvRecord(msgspec.Struct, frozen=True, order=True):
    """One SRV record and the addresses of its target, canonical text."""

    priority: int
    weight: int
    port: int
    target: str
    addresses: tuple[str, ...] = ()


class SrvAnswer(msgspec.Struct, frozen=True):
    """What a server said of a name: `negative` is NXDOMAIN or no SRV records, for `ttl_s` seconds.

    `stale` is the server's own word (EDE 3) that it may no longer be so: it renews nothing. `server` gave it.
    """

    records: tuple[SrvRecord, ...]
    ttl_s: int
    negative: bool
    stale: bool
    server: str = ""


class TxtAnswer(msgspec.Struct, frozen=True):
    """The strings of a name's TXT records, in order; none when there are no such records."""

    strings: tuple[bytes, ...]
    ttl_s: int
    stale: bool


class Resolver:
    """Asks the servers in turn, beginning with the one that answered last.

    One that says its answer is stale (EDE 3) is passed over as long as another knows better.
    """

    def __init__(self, servers: Sequence[Endpoint], timeout_s: float, key: Key | None = None) -> None:
        """`timeout_s` bounds a whole question, all servers and rounds together; servers are numeric.

        With a key every question is signed, and only answers that are signed with it too are believed.
        """
        self._key = key
        self._servers = tuple(servers)
        self._timeout_s = timeout_s
        self._first = 0
        self._slots = asyncio.Semaphore(QUERIES_IN_FLIGHT_MAX)
        self.malformed = 0
        """Packets that were no answer to the question asked, for metrics."""

    @property
    def servers(self) -> tuple[str, ...]:
        """Every server's name, as answers and failures have it."""
        return tuple(map(str, self._servers))

    @property
    def first(self) -> str:
        """The server that is asked first."""
        return str(self._servers[self._first])

    def prefer(self, server: str) -> None:
        """Ask this one of `servers` first from now on, until it fails."""
        self._first = self.servers.index(server)

    async def srv(self, name: str) -> SrvAnswer:
        """Return the SRV records of a name with their targets' addresses.

        Addresses come from the additional section, else they are asked for; a target whose address nobody
        tells keeps none. Raises ResolverUnavailable when the SRV records themselves cannot be had.
        """
        message, server = await self._ask(name, Type.SRV)
        services = _data_of(message.answers, name, Type.SRV)
        records = [(data, ttl) for data, ttl in services if isinstance(data, SrvData) and data.target]
        if not records:
            return SrvAnswer((), _negative_ttl(message), negative=True, stale=message.stale, server=server)
        known = _addresses(message.additional)
        missing = sorted({data.target for data, _ in records} - known.keys())[:TARGETS_ASKED_MAX]
        async with asyncio.TaskGroup() as group:
            asked = {target: group.create_task(self._ask_address(target)) for target in missing}
        for target, task in asked.items():
            known[target] = task.result()
        ttls = [ttl for _, ttl in records] + [
            known[data.target][1] for data, _ in records if data.target in known
        ]
        return SrvAnswer(
            tuple(
                SrvRecord(
                    data.priority, data.weight, data.port, data.target, known.get(data.target, ((), 0))[0]
                )
                for data, _ in records
            ),
            min(ttls),
            negative=False,
            stale=message.stale,
            server=server,
        )

    async def txt(self, name: str, server: str = "") -> TxtAnswer:
        """Return the TXT records of a name, or what just one of `servers` says. Raises ResolverUnavailable."""
        message, _ = await self._ask(name, Type.TXT, only=server)
        found = _data_of(message.answers, name, Type.TXT)
        strings = tuple(text for data, _ in found if isinstance(data, tuple) for text in data)
        ttl = min(ttl for _, ttl in found) if found else _negative_ttl(message)
        return TxtAnswer(strings, ttl, stale=message.stale)

    async def addresses(self, name: str) -> tuple[str, ...]:
        """Return the IPv4 addresses of a name; none when there are no such records. Raises ResolverUnavailable."""
        message, _ = await self._ask(name, Type.A)
        return _addresses(message.answers).get(name, ((), 0))[0]

    async def ask(self, name: str, kind: Type) -> Message:
        """Return the first answer that will do to any question. Raises ResolverUnavailable."""
        message, _ = await self._ask(name, kind)
        return message

    async def _ask_address(self, target: str) -> tuple[tuple[str, ...], int]:
        try:
            message, _ = await self._ask(target, Type.A)
        except ResolverUnavailable:
            # The SRV records themselves were answered: they say who may serve, with or without an address.
            return (), NEGATIVE_TTL_DEFAULT_SECONDS
        return _addresses(message.answers).get(target, ((), _negative_ttl(message)))

    async def _ask(self, name: str, kind: Type, only: str = "") -> tuple[Message, str]:
        """Return the first answer that will do, and whose it is."""
        failures: list[str] = []
        stale: tuple[Message, str] | None = None
        async with self._slots:
            first = self._first
            places = [(first + place) % len(self._servers) for place in range(len(self._servers))]
            if only:
                places = [self.servers.index(only)]
            patience_s = self._timeout_s / (ROUNDS * max(1, len(places)))
            for attempt in range(ROUNDS * len(places)):
                if stale is not None and attempt >= len(places):
                    # Every server has had its turn, and none knows better.
                    return stale
                place = places[attempt % len(places)]
                server = self._servers[place]
                disbelieved: list[str] = []
                try:
                    async with asyncio.timeout(patience_s):
                        message = await self._exchange(server, name, kind, disbelieved)
                except TimeoutError:
                    told = f", only {disbelieved[0]}" if disbelieved else ""
                    failures.append(f"{server}: no answer within {patience_s:.1f} s{told}")
                except (OSError, EOFError, ProtocolError) as error:
                    failures.append(f"{server}: {str(error) or type(error).__name__}")
                else:
                    if message.code in (Code.NOERROR, Code.NXDOMAIN):
                        if not message.stale:
                            self._first = self._first if only else place
                            return message, str(server)
                        stale = stale or (message, str(server))
                        continue
                    failures.append(f"{server}: answered with code {message.code}")
        if stale is not None:
            return stale
        raise ResolverUnavailable(
            f"{kind.name} of {name}: no DNS server answered ({'; '.join(failures) or 'none is configured'})"
        )

    async def _exchange(self, server: Endpoint, name: str, kind: Type, disbelieved: list[str]) -> Message:
        if server.is_unix:
            return await self._over_stream(server, name, kind)
        message = await self._over_udp(server, name, kind, disbelieved)
        return await self._over_stream(server, name, kind) if message.truncated else message

    def _signed(self, query: bytes) -> tuple[bytes, Callable[[bytes], bytes]]:
        """Return the query as it is sent, and what takes the signature off its answer or raises ProtocolError."""
        if self._key is None:
            return query, bytes
        data, exchange = tsig.begin(query, self._key, time.time())
        return data, lambda answer: exchange.verify(answer, time.time())

    async def _over_udp(self, server: Endpoint, name: str, kind: Type, disbelieved: list[str]) -> Message:
        message_id = secrets.randbits(16)
        query, unsigned = self._signed(encode_query(message_id, name, kind, UDP_PAYLOAD_BYTES))
        loop = asyncio.get_running_loop()
        # A fresh socket, so a fresh source port, for each question: RFC 5452 9.2.
        transport, answers = await loop.create_datagram_endpoint(
            _Answers, remote_addr=(server.host, server.port)
        )
        try:
            transport.sendto(query)
            while True:
                data = await answers.next()
                try:
                    return _matching(unsigned(data), message_id, name, kind)
                except ProtocolError as error:
                    disbelieved.append(str(error))
                self.malformed += 1
        finally:
            transport.close()

    async def _over_stream(self, server: Endpoint, name: str, kind: Type) -> Message:
        message_id = secrets.randbits(16)
        query, unsigned = self._signed(encode_query(message_id, name, kind, UDP_PAYLOAD_BYTES))
        if server.is_unix:
            reader, writer = await asyncio.open_unix_connection(server.host)
        else:
            reader, writer = await asyncio.open_connection(server.host, server.port)
        try:
            writer.write(_LENGTH.pack(len(query)) + query)
            (length,) = _LENGTH.unpack(await reader.readexactly(_LENGTH.size))
            message = _matching(unsigned(await reader.readexactly(length)), message_id, name, kind)
        finally:
            writer.close()
        if message.truncated:
            raise ProtocolError("a truncated answer over a stream")
        return message


class _Answers(asyncio.DatagramProtocol):
    """The packets and ICMP errors of one question's socket; few are kept, as one is wanted."""

    PACKETS_MAX = 16

    def __init__(self) -> None:
        self._arrived: asyncio.Queue[bytes | OSError] = asyncio.Queue(self.PACKETS_MAX)

    async def next(self) -> bytes:
        """Wait for a packet; raises the OSError that came instead of one."""
        arrived = await self._arrived.get()
        if isinstance(arrived, OSError):
            raise arrived
        return arrived

    def datagram_received(self, data: bytes, addr: object) -> None:
        self._put(data)

    def error_received(self, exc: Exception) -> None:
        self._put(exc if isinstance(exc, OSError) else OSError(str(exc)))

    def _put(self, item: bytes | OSError) -> None:
        with contextlib.suppress(asyncio.QueueFull):
            self._arrived.put_nowait(item)


def _matching(data: bytes, message_id: int, name: str, kind: Type) -> Message:
    """Decode the answer to exactly this question; anything else raises ProtocolError (RFC 5452 9.1)."""
    message = decode(data)
    asked = [(question.name, question.type, question.class_) for question in message.questions]
    if not message.is_response or message.id != message_id or asked != [(name.lower(), kind, 1)]:
        raise ProtocolError("an answer to another question")
    return message


def _data_of(records: Sequence[Record], name: str, kind: Type) -> list[tuple[object, int]]:
    return [
        (record.data, record.ttl_s)
        for record in records
        if record.type == kind and record.name == name.lower()
    ]


def _addresses(records: Sequence[Record]) -> dict[str, tuple[tuple[str, ...], int]]:
    """Return the IPv4 addresses of each name, in order, with the shortest TTL."""
    found: dict[str, tuple[tuple[str, ...], int]] = {}
    for record in records:
        if isinstance(record.data, IPv4Address):
            before, ttl = found.get(record.name, ((), record.ttl_s))
            found[record.name] = ((*before, str(record.data)), min(ttl, record.ttl_s))
    return found


def _negative_ttl(message: Message) -> int:
    """RFC 2308 5: the lesser of the SOA's TTL and its minimum."""
    for record in message.authority:
        if isinstance(record.data, SoaData):
            return min(record.ttl_s, record.data.minimum)
    return NEGATIVE_TTL_DEFAULT_SECONDS
