"""sidecar.agent.stub: programs of this host ask, over UDP and TCP, and are answered within bounds."""

from __future__ import annotations

import asyncio
import struct
from collections.abc import AsyncIterator, Collection
from contextlib import asynccontextmanager, suppress
from ipaddress import IPv4Address, IPv6Address, ip_network

import pytest

from sidecar.agent import stub as stub_module
from sidecar.agent.stub import Stub
from ztna.config import Endpoint
from ztna.dns import Code, Message, Record, Type, decode, encode_query, encode_response
from ztna.errors import ResolverUnavailable, ZtnaError
from ztna.names import Zone
from ztna.udp import SockAddr, UdpSocket

NAME = "web-app.ztna.local"
WAIT_SECONDS = 20.0


def is_ours(address: IPv4Address | IPv6Address) -> bool:
    return address in ip_network("10.100.0.0/16")


class Relay:
    def __init__(self) -> None:
        self.asked = 0
        self.away = False
        self.address = "10.100.0.2"
        self.nonsense = b""
        self.let = asyncio.Event()
        self.let.set()
        self.resolved: list[tuple[str, set[IPv4Address]]] = []
        self.learnt = asyncio.Event()
        self.learnt.set()

    async def learn(self, name: str, addresses: Collection[IPv4Address]) -> None:
        self.resolved.append((name, set(addresses)))
        await self.learnt.wait()

    async def exchange(self, query: bytes) -> bytes:
        self.asked += 1
        await self.let.wait()
        if self.away:
            raise ResolverUnavailable("away")
        message = decode(query)
        if self.nonsense:
            return self.nonsense
        record = Record(message.questions[0].name, Type.A, 1, 30, IPv4Address(self.address))
        return encode_response(message, Code.NOERROR, [record])


def bound(relay: Relay) -> Stub:
    """A stub on a port that is free both ways."""
    for _ in range(20):
        with suppress(ZtnaError):
            return Stub(Endpoint("127.0.0.1", 0), Zone("ztna.local"), relay.exchange, is_ours, relay.learn)
    raise AssertionError("no port is free both ways")


@asynccontextmanager
async def serving() -> AsyncIterator[tuple[Stub, Relay]]:
    relay = Relay()
    stub = bound(relay)
    running = asyncio.create_task(stub.run())
    await asyncio.sleep(0.01)
    try:
        yield stub, relay
    finally:
        running.cancel()
        await asyncio.wait([running])


class Program:
    def __init__(self, stub: Stub) -> None:
        self.stub = stub
        self.heard: asyncio.Queue[Message] = asyncio.Queue()
        self.socket = UdpSocket.open(("127.0.0.1", 0), self._received)

    def _received(self, packets: list[tuple[bytes, SockAddr]]) -> None:
        for data, _ in packets:
            self.heard.put_nowait(decode(data))

    async def ask(self, name: str = NAME, number: int = 7) -> Message:
        self.send(encode_query(number, name, Type.A, 1232))
        async with asyncio.timeout(WAIT_SECONDS):
            return await self.heard.get()

    def send(self, data: bytes) -> None:
        self.socket.send([(data, self.stub.address)])


async def test_names_of_the_zone_are_answered_and_kept_as_long_as_they_last() -> None:
    async with serving() as (stub, relay):
        program = Program(stub)
        for number in (7, 8):
            message = await program.ask(number=number)
            assert (message.id, message.code, message.answers[0].data) == (
                number,
                0,
                IPv4Address("10.100.0.2"),
            )
        assert relay.asked == 1 and stub.status()["kept"] == 1
        assert (await program.ask("example.org")).code == Code.REFUSED
        relay.away = True
        assert (await program.ask("db.ztna.local")).code == Code.SERVFAIL
        assert (await program.ask()).code == Code.NOERROR
        program.send(b"nonsense")
        assert (await program.ask("\\046\\255.example")).code == Code.REFUSED
        assert (await program.ask()).code == Code.NOERROR, "it goes on"


async def test_where_a_name_leads_is_heard_once_somebody_is_there() -> None:
    async with serving() as (stub, relay):
        program = Program(stub)
        relay.learnt.clear()
        asking = asyncio.create_task(program.ask())
        async with asyncio.timeout(WAIT_SECONDS):
            while not relay.resolved:
                await asyncio.sleep(0.005)
        assert not asking.done() and stub.status()["kept"] == 0
        relay.learnt.set()
        assert (await asking).answers
        await program.ask()
        relay.address = "192.0.2.1"  # which is left out
        await program.ask("db.ztna.local")
        assert relay.resolved == [(NAME, {IPv4Address("10.100.0.2")})]


async def test_over_tcp_several_on_a_connection_and_nonsense_ends_it() -> None:
    async with serving() as (stub, _):
        reader, writer = await asyncio.open_connection(*stub.address)
        for number in (1, 2):
            query = encode_query(number, NAME, Type.A, 1232)
            writer.write(struct.pack("!H", len(query)) + query)
            (length,) = struct.unpack("!H", await reader.readexactly(2))
            assert decode(await reader.readexactly(length)).id == number
        writer.write(struct.pack("!H", 60_000))
        assert await reader.read() == b""
        writer.close()


async def test_questions_connections_and_what_is_kept_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stub_module, "QUESTIONS_WAITING_MAX", 2)
    monkeypatch.setattr(stub_module, "CONNECTIONS_MAX", 1)
    monkeypatch.setattr(stub_module, "KEPT_MAX", 2)
    async with serving() as (stub, relay):
        relay.let.clear()
        program = Program(stub)
        for number in range(5):
            program.send(encode_query(number, f"a{number}.ztna.local", Type.A, 1232))
        async with asyncio.timeout(WAIT_SECONDS):
            while relay.asked < 2:
                await asyncio.sleep(0.005)
        first, first_writer = await asyncio.open_connection(*stub.address)
        second, second_writer = await asyncio.open_connection(*stub.address)
        assert await second.read() == b"", "one too many"
        relay.let.set()
        async with asyncio.timeout(WAIT_SECONDS):
            assert {(await program.heard.get()).code for _ in range(2)} == {Code.NOERROR}
        assert relay.asked == 2 and not first.at_eof()
        for name in ("b.ztna.local", "c.ztna.local"):
            await program.ask(name)
        assert stub.status()["kept"] == 2
        first_writer.close()
        second_writer.close()


async def test_a_port_that_is_taken_is_named() -> None:
    async with serving() as (stub, relay):
        with pytest.raises(ZtnaError, match=str(stub.address[1])):
            Stub(Endpoint(*stub.address), Zone("ztna.local"), relay.exchange, is_ours)


async def test_a_relay_leads_programs_nowhere_but_to_virtual_addresses() -> None:
    async with serving() as (stub, relay):
        program = Program(stub)
        relay.address = "203.0.113.66"
        told = await program.ask()
        assert (told.code, told.answers) == (Code.NOERROR, ())
        for relay.nonsense in (
            b"x",
            encode_response(decode(encode_query(1, "db.ztna.local", Type.A, 512)), 0),
        ):
            assert (await program.ask("a.ztna.local")).code == Code.SERVFAIL
