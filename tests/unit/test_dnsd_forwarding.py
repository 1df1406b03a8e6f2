"""dnsd.forwarding: names outside of the zone, from other servers on real sockets."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from dnslib import RCODE, DNSRecord

import dnsd.forwarding
from dnsd.answer import Answers, Options
from dnsd.forwarding import Forwarder
from dnsd.server import Server
from dnsd.zone import Settings
from tests.support.consul import free_ports
from tests.support.dns import POOL, catalog, instance, lease, query, told, with_opt, zone
from tests.unit.test_dnsd_server import LOOPBACK, ask_udp, framed, read_tcp
from ztna.config import Endpoint
from ztna.names import Zone

EXAMPLE = zone(
    catalog(*(instance("big", f"c{n}") for n in range(90))),
    {"www": lease("203.0.113.1")},
    Settings(Zone("example.com"), POOL, 5, 10),
)
OURS = zone({}, {"web": lease("10.100.1.2")})


@asynccontextmanager
async def serving(server: Server) -> AsyncIterator[Endpoint]:
    address = server.listen(Endpoint("127.0.0.1", 0))
    task = asyncio.ensure_future(server.run())
    try:
        yield Endpoint(*address)
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


@asynccontextmanager
async def forwarding(*before: Endpoint, timeout_s: float = 1.0) -> AsyncIterator[Endpoint]:
    """A server of `ztna.local` whose upstreams are `before` and one that knows `example.com`."""
    async with serving(Server(LOOPBACK, Answers(EXAMPLE))) as upstream:
        options = Options(forwards=True, bounds=OURS)
        forwarder = Forwarder((*before, upstream), timeout_s)
        async with serving(Server(LOOPBACK, Answers(OURS, options=options), forwarder=forwarder)) as ours:
            yield ours


async def ask(server: Endpoint, data: bytes) -> DNSRecord:
    (got,) = await ask_udp((server.host, server.port), data)
    return DNSRecord.parse(got)


async def test_what_is_not_ours_is_asked_of_the_upstream_over_both_transports() -> None:
    async with forwarding() as server:
        got = await ask(server, query("WWW.example.COM", message_id=9))
        assert (told(got), got.header.id, str(got.q.qname)) == (["A 203.0.113.1"], 9, "WWW.example.COM.")
        assert (await ask(server, query("nobody.example.com"))).header.rcode == RCODE.NXDOMAIN
        assert told(await ask(server, query("web.ztna.local"))) == ["A 10.100.1.2"]
        cut = await ask(server, query("big.example.com", "SRV"))
        assert (cut.header.tc, cut.rr) == (1, [])
        reader, writer = await asyncio.open_connection(server.host, server.port)
        for name, kind in (("big.example.com", "SRV"), ("web.ztna.local", "A")):
            writer.write(framed(query(name, kind)))
        counts = [len(DNSRecord.parse(await read_tcp(reader)).rr) for _ in range(2)]
        assert counts == [90, 1]
        writer.close()


async def test_the_next_upstream_is_asked_and_remembered() -> None:
    (nobody,) = free_ports(1)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as silent:
        silent.bind(("127.0.0.1", 0))
        dead = [Endpoint("127.0.0.1", nobody), Endpoint(*silent.getsockname())]
        async with (
            serving(Server(LOOPBACK, Answers(None))) as troubled,
            forwarding(*dead, troubled, timeout_s=0.3) as server,
        ):
            assert told(await ask(server, query("www.example.com"))) == ["A 203.0.113.1"]
            silent.setblocking(False)
            silent.recv(512)
            assert told(await ask(server, query("www.example.com"))) == ["A 203.0.113.1"]
            with pytest.raises(BlockingIOError):
                silent.recv(512)


async def test_when_nobody_answers_it_is_servfail_and_why() -> None:
    (nobody,) = free_ports(1)
    forwarder = Forwarder([Endpoint("127.0.0.1", nobody), Endpoint("::1", nobody)], 0.3)
    for over_tcp in (False, True):
        answer = await forwarder.answer(with_opt(query("www.example.com")), over_tcp=over_tcp)
        assert answer[3] & 15 == RCODE.SERVFAIL
        assert answer.endswith(struct.pack("!HHH", 15, 2, 22))
    assert forwarder.waiting == 0


async def test_a_forged_answer_is_not_taken() -> None:
    """The first answers have another id or question; the right one comes last."""
    loop = asyncio.get_running_loop()
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as upstream:
        upstream.bind(("127.0.0.1", 0))
        upstream.setblocking(False)
        asking = asyncio.ensure_future(
            Forwarder([Endpoint(*upstream.getsockname())], 5.0).answer(query("www.example.com"))
        )
        async with asyncio.timeout(5):
            asked, source = await loop.sock_recvfrom(upstream, 512)
        right = Answers(EXAMPLE).answer(asked) or b""
        for forged in (bytes((asked[0] ^ 1,)) + right[1:], right.replace(b"www", b"xxx"), b"x", right):
            upstream.sendto(forged, source)
        assert told(DNSRecord.parse(await asking)) == ["A 203.0.113.1"]


@pytest.mark.parametrize("sent", [b"", b"\0", struct.pack("!H", 12) + bytes(12)])
async def test_an_upstream_that_breaks_off_or_says_something_else_over_tcp(sent: bytes) -> None:
    async def serve(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(sent)
        writer.close()

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as upstream:
        endpoint = Endpoint(*upstream.sockets[0].getsockname())
        answer = await Forwarder([endpoint], 1.0).answer(query("www.example.com"), over_tcp=True)
        assert answer[3] & 15 == RCODE.SERVFAIL


async def test_questions_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dnsd.forwarding, "QUESTIONS_MAX", 1)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as silent:
        silent.bind(("127.0.0.1", 0))
        forwarder = Forwarder([Endpoint(*silent.getsockname())], 0.2)
        first = asyncio.ensure_future(forwarder.answer(query("www.example.com")))
        while not forwarder.waiting:
            await asyncio.sleep(0)
        assert (await forwarder.answer(query("www.example.com")))[3] & 15 == RCODE.SERVFAIL
        assert not first.done()
        assert (await first)[3] & 15 == RCODE.SERVFAIL
