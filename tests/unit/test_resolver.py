"""ztna.resolver against DNS servers of our own on loopback."""

from __future__ import annotations

import asyncio
import socket
import struct
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import cast

import pytest
from dnslib import EDNS0, RCODE, RR, DNSRecord

from tests.support.consul import free_ports
from ztna.config import Endpoint
from ztna.errors import ResolverUnavailable
from ztna.resolver import Resolver, SrvRecord
from ztna.sections import Server

Reply = Callable[[DNSRecord], list[bytes]]

WEB = "web.ztna.local 5 SRV 0 1 4435 c1.connector.ztna.local"
C1 = "c1.connector.ztna.local 3 A 192.0.2.1"


class _Server(asyncio.DatagramProtocol):
    def __init__(self, reply: Reply) -> None:
        self.reply = reply
        self.asked: list[str] = []

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.DatagramTransport", transport)

    def datagram_received(self, data: bytes, addr: tuple[str, int]) -> None:
        query = DNSRecord.parse(data)
        self.asked.append(f"{query.q.qname} {query.q.qtype}")
        for packet in self.reply(query):
            self.transport.sendto(packet, addr)


@asynccontextmanager
async def server(reply: Reply, tcp: Reply | None = None) -> AsyncIterator[tuple[Endpoint, _Server]]:
    loop = asyncio.get_running_loop()
    protocol = _Server(reply)
    [port] = free_ports(1)  # for UDP and TCP
    transport, _ = await loop.create_datagram_endpoint(lambda: protocol, local_addr=("127.0.0.1", port))

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        (length,) = struct.unpack("!H", await reader.readexactly(2))
        assert tcp is not None
        for packet in tcp(DNSRecord.parse(await reader.readexactly(length))):
            writer.write(struct.pack("!H", len(packet)) + packet)
        writer.close()

    listener = await asyncio.start_server(answer, "127.0.0.1", port) if tcp else None
    try:
        yield Endpoint("127.0.0.1", port), protocol
    finally:
        transport.close()
        if listener:
            listener.close()


def reply_with(
    query: DNSRecord, *, answers: str = "", auth: str = "", extra: str = "", **header: int
) -> DNSRecord:
    reply = DNSRecord(dnslib_header(query, **header), q=query.q)
    for add, text in ((reply.add_answer, answers), (reply.add_auth, auth), (reply.add_ar, extra)):
        if text:
            add(*RR.fromZone(text))
    return reply


def dnslib_header(query: DNSRecord, **header: int):  # type: ignore[no-untyped-def]
    from dnslib import DNSHeader

    return DNSHeader(id=query.header.id, bitmap=0, qr=1, aa=1, **header)


def closed_port() -> Endpoint:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as held:
        held.bind(("127.0.0.1", 0))
        return Endpoint("127.0.0.1", held.getsockname()[1])


async def test_srv_records_come_with_the_addresses_of_the_additional_section() -> None:
    async with server(lambda q: [reply_with(q, answers=WEB, extra=C1).pack()]) as (endpoint, protocol):
        answer = await Resolver([endpoint], 2.0).srv("Web.ztna.local")
    assert answer.records == (SrvRecord(0, 1, 4435, "c1.connector.ztna.local", ("192.0.2.1",)),)
    assert (answer.ttl_s, answer.negative, answer.stale) == (3, False, False)
    assert len(protocol.asked) == 1


async def test_addresses_that_were_left_out_are_asked_for() -> None:
    def reply(query: DNSRecord) -> list[bytes]:
        return [reply_with(query, answers=WEB if query.q.qtype == 33 else C1).pack()]

    async with server(reply) as (endpoint, _):
        answer = await Resolver([endpoint], 2.0).srv("web.ztna.local")
    assert answer.records[0].addresses == ("192.0.2.1",)


async def test_an_address_nobody_tells_leaves_the_record_without() -> None:
    def reply(query: DNSRecord) -> list[bytes]:
        if query.q.qtype == 33:
            return [reply_with(query, answers=WEB).pack()]
        return [reply_with(query, rcode=RCODE.SERVFAIL).pack()]

    async with server(reply) as (endpoint, _):
        answer = await Resolver([endpoint], 2.0).srv("web.ztna.local")
    assert answer.records == (SrvRecord(0, 1, 4435, "c1.connector.ztna.local"),)


@pytest.mark.parametrize("code", [RCODE.NOERROR, RCODE.NXDOMAIN])
async def test_negative_answers_last_as_the_soa_says(code: int) -> None:
    soa = "ztna.local 10 SOA ns.ztna.local h.ztna.local 1 2 3 4 7"
    async with server(lambda q: [reply_with(q, auth=soa, rcode=code).pack()]) as (endpoint, _):
        answer = await Resolver([endpoint], 2.0).srv("web.ztna.local")
    assert (answer.records, answer.negative, answer.ttl_s) == ((), True, 7)


async def test_a_stale_answer_says_so() -> None:
    def reply(query: DNSRecord) -> list[bytes]:
        stale = reply_with(query, answers=WEB, extra=C1)
        from dnslib import EDNSOption

        stale.add_ar(EDNS0(udp_len=1232, opts=[EDNSOption(15, b"\0\3")]))
        return [stale.pack()]

    async with server(reply) as (endpoint, _):
        assert (await Resolver([endpoint], 2.0).srv("web.ztna.local")).stale


async def test_a_dead_and_a_failing_server_are_passed_over_and_the_good_one_remembered() -> None:
    async with (
        server(lambda q: [reply_with(q, rcode=RCODE.SERVFAIL).pack()]) as (failing, failing_protocol),
        server(lambda q: [reply_with(q, answers=WEB, extra=C1).pack()]) as (good, _),
    ):
        resolver = Resolver([closed_port(), failing, good], 5.0)
        assert not (await resolver.srv("web.ztna.local")).negative
        assert not (await resolver.srv("web.ztna.local")).negative
    assert len(failing_protocol.asked) == 1


async def test_a_silent_server_costs_only_its_share_of_the_time() -> None:
    async with (
        server(lambda q: []) as (silent, _),
        server(lambda q: [reply_with(q, answers=WEB, extra=C1).pack()]) as (good, _),
    ):
        assert (await Resolver([silent, good], 0.8).srv("web.ztna.local")).records


async def test_when_none_answers_the_error_names_the_question_and_each_server() -> None:
    endpoint = closed_port()
    with pytest.raises(ResolverUnavailable, match=rf"SRV of web.ztna.local.*{endpoint}"):
        await Resolver([endpoint], 1.0).srv("web.ztna.local")
    with pytest.raises(ResolverUnavailable, match="none is configured"):
        await Resolver([], 1.0).srv("web.ztna.local")


async def test_answers_to_other_questions_and_garbage_are_counted_and_waited_past() -> None:
    def reply(query: DNSRecord) -> list[bytes]:
        good = reply_with(query, answers=WEB, extra=C1).pack()
        other = DNSRecord.question("other.ztna.local", "SRV")
        other.header.id = query.header.id
        other.header.qr = 1
        return [b"garbage", bytes([good[0] ^ 1]) + good[1:], other.pack(), query.pack(), good]

    async with server(reply) as (endpoint, _):
        resolver = Resolver([endpoint], 2.0)
        assert (await resolver.srv("web.ztna.local")).records
    assert resolver.malformed == 4


async def test_a_truncated_answer_is_asked_for_over_tcp() -> None:
    async with server(
        lambda q: [reply_with(q, tc=1).pack()], tcp=lambda q: [reply_with(q, answers=WEB, extra=C1).pack()]
    ) as (endpoint, _):
        assert len((await Resolver([endpoint], 2.0).srv("web.ztna.local")).records) == 1


async def test_a_stale_answer_is_used_only_when_no_server_knows_better() -> None:
    from dnslib import EDNSOption

    def stale(query: DNSRecord) -> list[bytes]:
        answer = reply_with(query, answers=WEB.replace("4435", "1111"), extra=C1)
        answer.add_ar(EDNS0(udp_len=1232, opts=[EDNSOption(15, b"\0\3")]))
        return [answer.pack()]

    async with (
        server(stale) as (old, old_protocol),
        server(lambda q: [reply_with(q, answers=WEB, extra=C1).pack()]) as (good, _),
    ):
        resolver = Resolver([old, good], 5.0)
        for _ in range(2):
            answer = await resolver.srv("web.ztna.local")
            assert (answer.records[0].port, answer.stale) == (4435, False)
        assert len(old_protocol.asked) == 1, "the one that knows is asked first from then on"
        for servers in ([old], [old, closed_port()]):
            answer = await Resolver(servers, 5.0).srv("web.ztna.local")
            assert (answer.records[0].port, answer.stale) == (1111, True)


async def test_a_unix_socket_is_asked_like_any_other(tmp_path: Path) -> None:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        (length,) = struct.unpack("!H", await reader.readexactly(2))
        packet = reply_with(DNSRecord.parse(await reader.readexactly(length)), answers=WEB, extra=C1).pack()
        writer.write(struct.pack("!H", len(packet)) + packet)
        writer.close()

    path = str(tmp_path / "dns.sock")
    listener = await asyncio.start_unix_server(answer, path)
    missing = Server(str(tmp_path / "nobody.sock"), 0)
    assert (await Resolver([missing, Server(path, 0)], 5.0).srv("web.ztna.local")).records
    listener.close()
    with pytest.raises(ResolverUnavailable, match=r"unix:.*nobody\.sock"):
        await Resolver([missing], 1.0).srv("web.ztna.local")


async def test_a_server_that_truncates_tcp_too_or_hangs_up_has_not_answered() -> None:
    truncated: Reply = lambda q: [reply_with(q, tc=1).pack()]  # noqa: E731
    for tcp in (truncated, lambda q: []):
        async with server(truncated, tcp=tcp) as (endpoint, _):
            with pytest.raises(ResolverUnavailable):
                await Resolver([endpoint], 2.0).srv("web.ztna.local")


async def test_txt_strings_and_their_absence() -> None:
    def reply(query: DNSRecord) -> list[bytes]:
        fresh = str(query.q.qname) == "_fresh.ztna.local."
        return [reply_with(query, answers='_fresh.ztna.local 1 TXT "1700000000"' if fresh else "").pack()]

    async with server(reply) as (endpoint, _):
        resolver = Resolver([endpoint], 2.0)
        assert (await resolver.txt("_fresh.ztna.local")).strings == (b"1700000000",)
        assert (await resolver.txt("other.ztna.local")).strings == ()
