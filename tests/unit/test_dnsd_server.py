"""dnsd.server on real sockets: UDP, TCP, who may ask, and bounds."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from ipaddress import IPv4Network

import pytest
from dnslib import RCODE, DNSRecord

import dnsd.server
from dnsd.answer import Answers
from dnsd.server import Server
from tests.support.dns import catalog, instance, lease, query, told, zone
from ztna.config import Endpoint
from ztna.errors import ZtnaError
from ztna.resolver import Resolver
from ztna.udp import SockAddr

LOOPBACK = (IPv4Network("127.0.0.0/8"),)


def answers(connectors: int = 2) -> Answers:
    services = catalog(*(instance("web", f"c{n}", address=f"192.0.2.{n}") for n in range(connectors)))
    return Answers(zone(services, {"web": lease("10.100.1.2")}), confirmed_at=1_700_000_000.0)


@asynccontextmanager
async def serving(
    allow: tuple[IPv4Network, ...] = LOOPBACK, connectors: int = 2
) -> AsyncIterator[tuple[Server, SockAddr]]:
    server = Server(allow, answers(connectors))
    address = server.listen(Endpoint("127.0.0.1", 0))
    task = asyncio.ensure_future(server.run())
    try:
        yield server, address
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


async def ask_udp(address: SockAddr, *queries: bytes) -> list[bytes]:
    """Send all at once; return as many answers, in the order they came."""
    loop = asyncio.get_running_loop()
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.setblocking(False)
        sock.connect(address)
        for data in queries:
            sock.send(data)
        async with asyncio.timeout(5):
            return [await loop.sock_recv(sock, 65_535) for _ in queries]


async def read_tcp(reader: asyncio.StreamReader) -> bytes:
    async with asyncio.timeout(5):
        (length,) = struct.unpack("!H", await reader.readexactly(2))
        return await reader.readexactly(length)


def framed(data: bytes) -> bytes:
    return struct.pack("!H", len(data)) + data


async def test_a_hundred_queries_at_once_get_their_own_answers() -> None:
    async with serving() as (server, address):
        got = await ask_udp(address, *(query("web.ztna.local", message_id=n) for n in range(100)))
        assert sorted(DNSRecord.parse(data).header.id for data in got) == list(range(100))
        assert {told(DNSRecord.parse(data))[0] for data in got} == {"A 10.100.1.2"}
        assert server.status["udp_received"] == server.status["udp_sent"] == 100


async def test_another_zone_takes_effect_with_the_next_query() -> None:
    async with serving() as (server, address):
        await ask_udp(address, query("web.ztna.local"))
        server.answers = Answers(zone({}, {"web": lease("10.100.9.9")}))
        (got,) = await ask_udp(address, query("web.ztna.local"))
        assert told(DNSRecord.parse(got)) == ["A 10.100.9.9"]


async def test_garbage_is_dropped_and_the_next_query_answered() -> None:
    async with serving() as (_, address), asyncio.timeout(5):
        loop = asyncio.get_running_loop()
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            sock.setblocking(False)
            sock.connect(address)
            for junk in (b"", b"x", b"\xff" * 40, bytes(3000)):
                sock.send(junk)
            sock.send(query("web.ztna.local", message_id=77))
            while (got := await loop.sock_recv(sock, 4096))[:2] != struct.pack("!H", 77):
                assert got[3] & 15 == RCODE.FORMERR


async def test_strangers_are_refused_over_udp_and_closed_over_tcp() -> None:
    async with serving(allow=(IPv4Network("192.0.2.0/24"),)) as (_, address):
        for _ in range(2):
            (got,) = await ask_udp(address, query("web.ztna.local"))
            assert DNSRecord.parse(got).header.rcode == RCODE.REFUSED
        reader, writer = await asyncio.open_connection(*address)
        async with asyncio.timeout(5):
            assert await reader.read() == b""
        writer.close()


async def test_tcp_answers_pipelined_and_split_queries_in_order() -> None:
    async with serving() as (_, address):
        reader, writer = await asyncio.open_connection(*address)
        stream = b"".join(framed(query("web.ztna.local", "SRV", message_id=n)) for n in range(50))
        for at in range(0, len(stream), 37):
            writer.write(stream[at : at + 37])
            await writer.drain()
        assert [DNSRecord.parse(await read_tcp(reader)).header.id for _ in range(50)] == list(range(50))
        writer.close()


async def test_large_sets_are_truncated_over_udp_and_whole_for_the_resolver() -> None:
    async with serving(connectors=200) as (_, address):
        (got,) = await ask_udp(address, query("web.ztna.local", "SRV"))
        assert DNSRecord.parse(got).header.tc == 1
        found = await Resolver([Endpoint(*address)], 5.0).srv("web.ztna.local")
        assert len(found.records) == 200
        assert all(record.addresses for record in found.records)


async def test_the_resolver_reads_freshness() -> None:
    async with serving() as (_, address):
        assert (await Resolver([Endpoint(*address)], 5.0).txt("_fresh.ztna.local")).strings == (
            b"1700000000",
        )


async def test_a_connection_that_sends_no_dns_or_nothing_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dnsd.server, "TCP_IDLE_SECONDS", 0.2)
    async with serving() as (server, address):
        for sent in (framed(b"junk"), b"\xff", b""):
            reader, writer = await asyncio.open_connection(*address)
            writer.write(sent)
            async with asyncio.timeout(5):
                assert await reader.read() == b""
            writer.close()
        assert server.status["tcp_connections"] == 0


async def test_connections_are_bounded_and_the_rest_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dnsd.server, "TCP_CONNECTIONS_MAX", 2)
    async with serving() as (_, address):
        held = []
        for message_id in (1, 2):
            reader, writer = await asyncio.open_connection(*address)
            writer.write(framed(query("web.ztna.local", message_id=message_id)))
            assert (await read_tcp(reader))[:2] == struct.pack("!H", message_id)
            held.append((reader, writer))
        reader, writer = await asyncio.open_connection(*address)
        async with asyncio.timeout(5):
            assert await reader.read() == b""
        writer.close()
        for reader, writer in held:
            writer.write(framed(query("web.ztna.local", message_id=9)))
            assert (await read_tcp(reader))[:2] == b"\0\x09"
            writer.close()


async def test_a_port_that_is_taken_is_named() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ZtnaError, match=str(port)):
            Server(LOOPBACK, answers()).listen(Endpoint("127.0.0.1", port))


async def test_many_sources_are_remembered_only_so_far(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dnsd.server, "SOURCES_REMEMBERED_MAX", 1)
    server = Server(LOOPBACK, answers())
    assert server._allows(socket.inet_aton("127.0.0.1"))
    assert not server._allows(socket.inet_aton("192.0.2.1"))
    assert len(server._is_allowed) == 1
