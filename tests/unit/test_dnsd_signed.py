"""dnsd.signed behind dnsd.server on real sockets: who may ask and transfer with a key, and without one."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from ipaddress import IPv4Network

import pytest

from dnsd.answer import Answers
from dnsd.server import Server
from dnsd.signed import SecondLook
from dnsd.transfer import Publication
from tests.support.dns import catalog, instance, lease, query, zone
from ztna import tsig
from ztna.config import Endpoint
from ztna.dns import Code, Message, SrvData, Type, decode
from ztna.errors import ResolverUnavailable
from ztna.resolver import Resolver
from ztna.tsig import Key
from ztna.udp import SockAddr

KEY = Key("edge.ztna", "hmac-sha256", b"k" * 32)
LOOPBACK = (IPv4Network("127.0.0.0/8"),)
NOBODY = (IPv4Network("192.0.2.0/24"),)
SERVICES = 600


@asynccontextmanager
async def serving(
    allow: Sequence[IPv4Network] = NOBODY, transfer: Sequence[IPv4Network] = (), instances: int = 2
) -> AsyncIterator[SockAddr]:
    """A server whose one key is KEY; nobody else may do anything unless told so."""
    services = catalog(*(instance("web", f"c{n}", address=f"192.0.2.{n % 250}") for n in range(instances)))
    leases = {f"s{n}": lease(f"10.100.{n // 250}.{n % 250 + 1}") for n in range(SERVICES)}
    publication = Publication()
    state = zone(services, leases)
    publication.publish(state)
    server = Server(allow, Answers(state), SecondLook({KEY.name: KEY}, transfer, publication))
    address = server.listen(Endpoint("127.0.0.1", 0))
    task = asyncio.ensure_future(server.run())
    try:
        yield address
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


async def over_udp(address: SockAddr, data: bytes) -> bytes:
    loop = asyncio.get_running_loop()
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.setblocking(False)
        sock.connect(address)
        sock.send(data)
        async with asyncio.timeout(5):
            return await loop.sock_recv(sock, 65_535)


async def over_tcp(address: SockAddr, data: bytes) -> list[bytes]:
    """Return all answers until the server closes; nothing more is sent."""
    reader, writer = await asyncio.open_connection(*address)
    writer.write(struct.pack("!H", len(data)) + data)
    writer.write_eof()
    found = []
    async with asyncio.timeout(10):
        while head := await reader.read(2):
            (length,) = struct.unpack("!H", head + await reader.readexactly(2 - len(head)))
            found.append(await reader.readexactly(length))
    writer.close()
    return found


def code(data: bytes) -> int:
    return decode(data).code


async def test_a_signed_transfer_comes_whole_and_signed_throughout() -> None:
    async with serving() as address:
        data, asker = tsig.begin(query("ztna.local", "AXFR"), KEY, time.time())
        messages: list[Message] = [
            decode(asker.verify(each, time.time())) for each in await over_tcp(address, data)
        ]
        records = [record for message in messages for record in message.answers]
        assert len(messages) > 1 and records[0] == records[-1] and records[0].type == Type.SOA
        assert sum(record.type == Type.A and record.name.startswith("s") for record in records) == SERVICES


@pytest.mark.parametrize(("transfer", "messages"), [((), 1), (LOOPBACK, 3)])
async def test_an_unsigned_transfer_is_for_those_on_the_list(
    transfer: Sequence[IPv4Network], messages: int
) -> None:
    async with serving(LOOPBACK, transfer) as address:
        answers = await over_tcp(address, query("ztna.local", "AXFR"))
        assert code(answers[0]) == (Code.NOERROR if transfer else Code.REFUSED)
        assert len(answers) >= messages


async def test_a_transfer_over_udp_is_refused() -> None:
    async with serving(LOOPBACK, LOOPBACK) as address:
        assert code(await over_udp(address, query("ztna.local", "AXFR"))) == Code.REFUSED


async def test_who_signs_may_ask_from_anywhere_and_nobody_else() -> None:
    plain = query("web.ztna.local", "SRV")
    async with serving() as address:
        assert code(await over_udp(address, plain)) == Code.REFUSED
        assert [code(each) for each in await over_tcp(address, plain)] == [Code.REFUSED]
        for _ in range(2):
            data, asker = tsig.begin(plain, KEY, time.time())
            answer = decode(asker.verify(await over_udp(address, data), time.time()))
            assert answer.code == Code.NOERROR and isinstance(answer.answers[0].data, SrvData)
        data, asker = tsig.begin(plain, Key(KEY.name, KEY.algorithm, b"x" * 32), time.time())
        refusal = await over_udp(address, data)
        assert refusal[3] & 0xF == 9


async def test_what_is_signed_and_no_query_is_answered_as_unsigned() -> None:
    broken = query("web.ztna.local", "A")[:10] + b"\0\1" + query("web.ztna.local", "A")[12:]
    async with serving(LOOPBACK) as address:
        assert code(await over_udp(address, broken + b"\0\0\xfa\0\xff\0\0\0\0")) == Code.FORMERR


async def test_the_resolver_signs_and_believes_nothing_else() -> None:
    async with serving(instances=60) as address:
        server = Endpoint(*address)
        answer = await Resolver([server], 5.0, KEY).srv("web.ztna.local")
        assert len(answer.records) == 60
        with pytest.raises(ResolverUnavailable, match=r"only an answer whose signature .* it says BADKEY"):
            await Resolver([server], 0.5, Key("other", KEY.algorithm, KEY.secret)).srv("web.ztna.local")
    async with serving(LOOPBACK) as address:
        unsigned = Resolver([Endpoint(*address)], 0.5)
        assert (await unsigned.srv("web.ztna.local")).records
