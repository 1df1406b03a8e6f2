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
from dnsd.limits import Limiter
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
    allow: tuple[IPv4Network, ...] = LOOPBACK, connectors: int = 2, **chosen: object
) -> AsyncIterator[tuple[Server, SockAddr]]:
    server = Server(allow, answers(connectors), **chosen)  # type: ignore[arg-type]
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


# Bounds


async def test_a_query_that_drips_in_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dnsd.server, "TCP_MESSAGE_SECONDS", 0.5)
    async with serving() as (server, address):
        reader, writer = await asyncio.open_connection(*address)
        slow = framed(query("web.ztna.local"))
        writer.write(slow + slow[:1])
        assert told(DNSRecord.parse(await read_tcp(reader))) == ["A 10.100.1.2"]
        begun = asyncio.get_running_loop().time()
        closed = asyncio.ensure_future(reader.read())
        for byte in slow[1:]:
            writer.write(bytes((byte,)))
            await asyncio.wait([closed], timeout=0.05)
            if closed.done():
                break
        with contextlib.suppress(ConnectionError):
            assert await closed == b""
        assert asyncio.get_running_loop().time() - begun < 1.5
        writer.close()
        async with asyncio.timeout(5):
            while server.status["tcp_connections"]:
                await asyncio.sleep(0.01)


async def test_one_client_cannot_have_all_connections(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dnsd.server, "TCP_CONNECTIONS_PER_CLIENT_MAX", 2)
    async with serving() as (server, address):
        held = [await asyncio.open_connection(*address) for _ in range(2)]
        for _, writer in held:
            writer.write(framed(query("web.ztna.local")))
        for reader, _ in held:
            await read_tcp(reader)
        refused, writer = await asyncio.open_connection(*address)
        async with asyncio.timeout(5):
            assert await refused.read() == b""
        writer.close()
        reader, other = await asyncio.open_connection(*address, local_addr=("127.0.0.2", 0))
        other.write(framed(query("web.ztna.local")))
        assert await read_tcp(reader)
        for writer in (other, *(writer for _, writer in held)):
            writer.close()
        async with asyncio.timeout(5):
            while server.status["tcp_connections"]:
                await asyncio.sleep(0.01)
        assert not server._clients


async def test_a_client_that_asks_without_end_leaves_the_others_their_turn() -> None:
    async with serving(connectors=100) as (_, address):
        reader, writer = await asyncio.open_connection(*address)
        writer.write(framed(query("web.ztna.local", "SRV")) * 1000)
        reading = asyncio.ensure_future(reader.readexactly(200_000))
        async with asyncio.timeout(5):
            (got,) = await ask_udp(address, query("web.ztna.local"))
        assert told(DNSRecord.parse(got)) == ["A 10.100.1.2"]
        async with asyncio.timeout(20):
            await reading
        writer.close()


async def test_what_follows_no_dns_on_a_connection_is_not_read() -> None:
    async with serving() as (_, address):
        reader, writer = await asyncio.open_connection(*address)
        good = framed(query("web.ztna.local"))
        writer.write(good + framed(b"junk") + good)
        assert await read_tcp(reader)
        async with asyncio.timeout(5):
            assert await reader.read() == b""
        writer.close()


async def test_a_source_past_its_limit_hears_little_and_others_all() -> None:
    async with serving(limiter=Limiter(2), limits_loopback=True) as (server, address):
        loop = asyncio.get_running_loop()
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            sock.setblocking(False)
            sock.connect(address)
            for message_id in range(20):
                sock.send(query("web.ztna.local", message_id=message_id))
            got = []
            with contextlib.suppress(TimeoutError):
                while True:
                    async with asyncio.timeout(1):
                        got.append(DNSRecord.parse(await loop.sock_recv(sock, 4096)))
        whole = [record for record in got if record.rr]
        assert 4 <= len(whole) <= 5
        assert {record.header.tc for record in got if not record.rr} == {1}
        assert len(got) - len(whole) in (7, 8)
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as other:
            other.setblocking(False)
            other.bind(("127.0.0.2", 0))
            other.connect(address)
            other.send(query("web.ztna.local"))
            async with asyncio.timeout(5):
                assert DNSRecord.parse(await loop.sock_recv(other, 4096)).rr
        assert server._is_known == {}


async def test_programs_on_this_machine_have_no_limit_unless_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with serving(limiter=Limiter(2)) as (server, address):
        got = await ask_udp(address, *(query("web.ztna.local", message_id=n) for n in range(100)))
        assert all(DNSRecord.parse(data).rr for data in got)
        assert server._is_known == {socket.inet_aton("127.0.0.1"): True}
        monkeypatch.setattr(dnsd.server, "SOURCES_REMEMBERED_MAX", 1)
        assert server._is_within_limit(socket.inet_aton("127.0.0.2"))
        assert len(server._is_known) == 1


def test_strangers_past_their_limit_hear_nothing() -> None:
    server = Server(LOOPBACK, answers(), limiter=Limiter(1))
    stranger = bytes(4) + socket.inet_aton("192.0.2.1") + bytes(8)
    heard = [server._answer_udp(query("web.ztna.local"), stranger) for _ in range(4)]
    assert [answer is not None for answer in heard] == [True, True, False, False]
