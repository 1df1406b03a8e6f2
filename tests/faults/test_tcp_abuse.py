"""Abuse of TCP: the forwarder's port by anybody, a connector's carriers by an agent with a good certificate."""

from __future__ import annotations

import asyncio
import contextlib
import os
import resource
import secrets
import socket
import struct
import time
from collections.abc import AsyncIterator
from ipaddress import IPv4Address
from pathlib import Path

import pytest

from relay import dialled
from relay import splicer as module
from relay.dialled import STRANGERS_PER_SOURCE_MAX, Owner
from relay.splicer import BIND_SECONDS, STRANGERS_MAX, Splicer, listen
from sidecar.link.budget import PEER_BYTES, Budget
from sidecar.link.listener import StreamListener
from sidecar.link.stream import ALPN, FlowRefused
from tests.support.certificates import Pki
from tests.support.namespaces import Host, network
from ztna.identity import Identity
from ztna.names import ServiceName, SessionId
from ztna.wire import forwarder as wire
from ztna.wire.control import Address, LeaseRef
from ztna.wire.stream import (
    WINDOW_BYTES_MAX,
    Data,
    Frame,
    FrameReader,
    OpenedFrame,
    OpenFrame,
    OpenStatus,
    ResumeFrame,
    encode,
)

SESSION, OTHER = SessionId("1" * 16), SessionId("2" * 16)
WAIT_SECONDS = 30.0
CROWD = 10_000
CROWD_SOURCES = 100
Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]


class Port:
    """The forwarder's TCP port; every agent that waits gets its connector at once."""

    def __init__(self, listener: socket.socket) -> None:
        self.splicer = Splicer(listener, self._waiting)
        self.tokens: asyncio.Queue[bytes] = asyncio.Queue()

    def _waiting(self, session: SessionId, waiter: int) -> None:
        token = os.urandom(32)
        assert self.splicer.admit_connector(session, waiter, token)
        self.tokens.put_nowait(token)

    async def dial(self, first: bytes = b"", source: str = "127.0.0.1") -> Streams:
        reader, writer = await asyncio.open_connection(*self.splicer.address, local_addr=(source, 0))
        writer.write(first)
        return reader, writer

    async def pair(self, session: SessionId = SESSION, owner: Owner | None = None) -> tuple[Streams, Streams]:
        """Be an honest agent and its connector."""
        token = os.urandom(32)
        assert self.splicer.admit_agent(session, token, owner)
        async with asyncio.timeout(WAIT_SECONDS):
            agent = await self.dial(wire.dial_in(token))
            connector = await self.dial(wire.dial_in(await self.tokens.get()))
            for reader, _ in (agent, connector):
                assert isinstance(wire.decode(await reader.readexactly(wire.BOUND_V4_BYTES)), wire.Bound)
        return agent, connector

    async def works(self, pair: tuple[Streams, Streams]) -> None:
        """Both ways, bytes get through."""
        (near, near_out), (far, far_out) = pair
        async with asyncio.timeout(WAIT_SECONDS):
            for out, reader in ((near_out, far), (far_out, near)):
                data = os.urandom(1000)
                out.write(data)
                assert await reader.readexactly(len(data)) == data


@pytest.fixture
async def port() -> AsyncIterator[Port]:
    port = Port(listen(("127.0.0.1", 0)))
    yield port
    port.splicer.close()


async def closed_without_a_byte(reader: asyncio.StreamReader) -> None:
    async with asyncio.timeout(WAIT_SECONDS):
        with contextlib.suppress(ConnectionError):
            assert await reader.read() == b""


async def test_a_bind_that_dribbles_in_is_closed_in_time(port: Port) -> None:
    """A byte now and then buys no time: 5 s from the first one on, and nothing is ever answered."""
    token = os.urandom(32)
    assert port.splicer.admit_agent(SESSION, token)
    reader, writer = await port.dial()
    started = time.monotonic()
    closing = asyncio.create_task(closed_without_a_byte(reader))
    for each in wire.dial_in(token)[:-1]:
        writer.write(bytes([each]))
        if (await asyncio.wait((closing,), timeout=0.5))[0]:
            break
    await closing
    assert time.monotonic() - started > BIND_SECONDS - 1
    assert port.splicer.refusals == {"late": 1}
    await port.works(await port.pair())


async def test_ten_thousand_that_say_nothing_keep_nobody_out(port: Port) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(hard, 2 * CROWD + 4096)), hard))
    crowd: list[socket.socket] = []
    before = await port.pair(OTHER)
    try:
        for number in range(CROWD):
            sock = socket.socket()
            sock.setblocking(False)
            sock.bind((f"127.0.1.{1 + number % CROWD_SOURCES}", 0))
            with contextlib.suppress(BlockingIOError):
                sock.connect(port.splicer.address)
            crowd.append(sock)
            if number % 50 == 0:
                await asyncio.sleep(0)
            if number % (CROWD // 10) == CROWD // 20:
                await port.works(await port.pair())
            status = port.splicer.status()
            assert isinstance(status["unbound"], int) and status["unbound"] <= STRANGERS_MAX
        await port.works(before)
        assert port.splicer.refusals["limit"] + port.splicer.refusals["late"] > CROWD - 2 * STRANGERS_MAX
    finally:
        for sock in crowd:
            sock.close()
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    async with asyncio.timeout(WAIT_SECONDS):
        while port.splicer.status()["unbound"]:
            await asyncio.sleep(0.05)
    assert not port.splicer._strangers._all and not port.splicer._strangers._of


async def test_one_sources_flood_costs_that_source_only(port: Port) -> None:
    other = await port.dial(source="127.0.0.9")
    flood = [await port.dial(source="127.0.0.7") for _ in range(STRANGERS_PER_SOURCE_MAX + 20)]
    async with asyncio.timeout(WAIT_SECONDS):
        while port.splicer.refusals["source_limit"] < 20:
            await asyncio.sleep(0.01)
    for reader, _ in flood[:20]:
        await closed_without_a_byte(reader)
    assert not flood[20][0].at_eof() and not other[0].at_eof(), "the oldest of that source went, and no other"
    assert port.splicer.refusals == {"source_limit": 20}
    await port.works(await port.pair())
    for _, writer in (*flood, other):
        writer.close()


async def test_tokens_are_neither_guessed_nor_used_twice(port: Port) -> None:
    pair = await port.pair()
    token = os.urandom(32)
    assert port.splicer.admit_agent(SESSION, token)
    for guess in (*(os.urandom(32) for _ in range(200)), bytes(32), token[:31] + bytes([token[31] ^ 1])):
        reader, writer = await port.dial(wire.dial_in(guess))
        await closed_without_a_byte(reader)
        writer.close()
    assert port.splicer.refusals == {"bad_token": 202}
    agent, agent_out = await port.dial(wire.dial_in(token))
    carried = await asyncio.wait_for(port.tokens.get(), WAIT_SECONDS)
    again, writer = await port.dial(wire.dial_in(token))
    await closed_without_a_byte(again)
    writer.close()
    _, connector_out = await port.dial(wire.dial_in(carried))
    async with asyncio.timeout(WAIT_SECONDS):
        assert isinstance(wire.decode(await agent.readexactly(wire.BOUND_V4_BYTES)), wire.Bound)
    third, writer = await port.dial(wire.dial_in(carried))
    await closed_without_a_byte(third)
    writer.close()
    assert port.splicer.refusals == {"bad_token": 204}
    await port.works(pair)
    unused = os.urandom(32)
    assert port.splicer.admit_agent(SESSION, unused)
    port.splicer.end_session(SESSION)
    reader, writer = await port.dial(wire.dial_in(unused))
    await closed_without_a_byte(reader)
    for each in (writer, agent_out, connector_out, pair[0][1], pair[1][1]):
        each.close()


async def test_a_session_has_so_many_tokens_and_no_more(port: Port) -> None:
    tokens = [os.urandom(32) for _ in range(dialled.TOKENS_PER_SESSION_MAX + 1)]
    assert [port.splicer.admit_agent(SESSION, each) for each in tokens].count(False) == 1
    assert port.splicer.admit_agent(OTHER, os.urandom(32))
    port.splicer.end_session(SESSION)
    assert port.splicer.status()["tokens"] == 1


async def test_an_agent_has_so_many_waiting_over_all_its_sessions_and_others_theirs(port: Port) -> None:
    flooder, victim = Owner("flooder", "link 1"), Owner("victim", "link 2")
    port.splicer._on_agent_waiting = lambda session, waiter: None  # connectors that never dial in
    sessions = [SessionId(f"{number:016x}") for number in range(8)]
    waiting: list[Streams] = []
    held = 0
    while held < dialled.HELD_PER_AGENT_MAX:
        token = os.urandom(32)
        assert port.splicer.admit_agent(sessions[held % 8], token, flooder)
        held += 1
        if held % 2:
            waiting.append(await port.dial(wire.dial_in(token)))
    async with asyncio.timeout(WAIT_SECONDS):
        while port.splicer.status()["waiting"] != len(waiting):
            await asyncio.sleep(0.01)
    # Used or not, under whichever session: no more of either kind.
    for session in sessions:
        assert not port.splicer.admit_agent(session, os.urandom(32), flooder)
    assert port.splicer.refusals == {"limit": len(sessions)}
    port.splicer._on_agent_waiting = port._waiting
    await port.works(await port.pair(OTHER, victim))
    # What ends makes room again.
    waiting[0][1].close()
    async with asyncio.timeout(WAIT_SECONDS):
        while not port.splicer.admit_agent(sessions[0], os.urandom(32), flooder):
            await asyncio.sleep(0.01)
    for _, writer in waiting:
        writer.close()


async def test_waiting_connections_are_bounded_in_all(port: Port, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dialled, "WAITERS_MAX", 3)
    port.splicer._on_agent_waiting = lambda session, waiter: None
    tokens = [os.urandom(32) for _ in range(4)]
    assert all(port.splicer.admit_agent(SESSION, each, Owner(each, each)) for each in tokens)
    waiting = [await port.dial(wire.dial_in(each)) for each in tokens[:3]]
    async with asyncio.timeout(WAIT_SECONDS):
        while port.splicer.status()["waiting"] != 3:
            await asyncio.sleep(0.01)
    reader, writer = await port.dial(wire.dial_in(tokens[3]))
    await closed_without_a_byte(reader)
    assert not port.splicer.admit_agent(OTHER, os.urandom(32))
    assert port.splicer.refusals == {"limit": 2}
    port.splicer.end_session(SESSION)
    assert port.splicer.status()["waiting"] == 0
    port.splicer._on_agent_waiting = port._waiting
    await port.works(await port.pair(OTHER))
    for each in (writer, *(out for _, out in waiting)):
        each.close()


# Half-open, between hosts


def _syn(source: str, target: str, port: int, source_port: int) -> bytes:
    """Return a TCP SYN (RFC 9293 3.1) for a raw socket that makes the IP header's checksum itself."""
    tcp = struct.pack(">HHIIBBHHH", source_port, port, 1, 0, 5 << 4, 2, 65535, 0, 0)
    pseudo = socket.inet_aton(source) + socket.inet_aton(target) + struct.pack(">BBH", 0, 6, len(tcp))
    total = sum(struct.unpack(f">{(len(pseudo) + len(tcp)) // 2}H", pseudo + tcp))
    total = (total & 0xFFFF) + (total >> 16)
    checksum = ~((total & 0xFFFF) + (total >> 16)) & 0xFFFF
    tcp = tcp[:16] + struct.pack(">H", checksum) + tcp[18:]
    addresses = socket.inet_aton(source) + socket.inet_aton(target)
    return struct.pack(">BBHHHBBH", 0x45, 0, 20 + len(tcp), 0, 0, 64, 6, 0) + addresses + tcp


def on_host(host: Host) -> Port:
    sock = host.socket()
    sock.bind((host.address, 0))
    sock.listen(module.LISTEN_BACKLOG)
    sock.setblocking(False)
    return Port(sock)


async def dial_from(host: Host, port: Port, first: bytes) -> Streams:
    sock = host.socket()
    sock.setblocking(False)
    await asyncio.get_running_loop().sock_connect(sock, port.splicer.address)
    reader, writer = await asyncio.open_connection(sock=sock)
    writer.write(first)
    return reader, writer


async def pair_between(left: Host, right: Host, port: Port) -> tuple[Streams, Streams]:
    token = os.urandom(32)
    assert port.splicer.admit_agent(SESSION, token)
    async with asyncio.timeout(WAIT_SECONDS):
        agent = await dial_from(left, port, wire.dial_in(token))
        connector = await dial_from(right, port, wire.dial_in(await port.tokens.get()))
        for reader, _ in (agent, connector):
            await reader.readexactly(wire.BOUND_V4_BYTES)
    return agent, connector


@pytest.mark.namespaces
async def test_a_flood_of_syns_keeps_nobody_out() -> None:
    """From addresses that never answer, many more than the backlog: the kernel sends cookies, we hold nothing."""
    with network("relay", "left", "right") as net:
        relay, left, right = net.hosts["relay"], net.hosts["left"], net.hosts["right"]
        port = on_host(relay)
        with left.socket(socket.SOCK_RAW, protocol=socket.IPPROTO_RAW) as raw:
            number = port.splicer.address[1]
            for each in range(8 * module.LISTEN_BACKLOG):
                source = f"10.91.0.{100 + each % 100}"
                raw.sendto(_syn(source, relay.address, number, 1024 + each // 100), (relay.address, 0))
            await port.works(await pair_between(left, right, port))
        assert port.splicer.status()["unbound"] == 0
        port.splicer.close()


@pytest.mark.namespaces
async def test_a_peer_that_vanishes_is_noticed_and_the_other_one_told() -> None:
    """Half-open: no FIN ever comes. The kernel gives up after about 10 s, and the pair ends with a reset."""
    with network("relay", "left", "right") as net:
        relay, left, right = net.hosts["relay"], net.hosts["left"], net.hosts["right"]
        port = on_host(relay)
        pair = await pair_between(left, right, port)
        await port.works(pair)
        with left.dropping("meta l4proto tcp"):
            with pytest.raises(ConnectionResetError):
                await asyncio.wait_for(pair[1][0].read(1), 2 * WAIT_SECONDS)
            assert port.splicer.status()["pairs"] == 0
        port.splicer.close()


# Agents with a good certificate


class Connector:
    """A connector's stream carriers before a backend that sends without end."""

    def __init__(self, directory: Path, tasks: asyncio.TaskGroup) -> None:
        self.pki = Pki(directory)
        self.budget = Budget()
        self.dialled = 0
        self.listener = StreamListener(
            self.pki.credentials(self.pki.connector()), self, tasks=tasks, budget=self.budget
        )
        self.address = self.listener.listen(("127.0.0.1", 0))

    async def start(self) -> None:
        self._server = await asyncio.start_server(self._pour, "127.0.0.1", 0)

    async def _pour(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError):
            while True:
                writer.write(bytes(1 << 16))
                await writer.drain()

    async def open(self, peer: Identity, frame: OpenFrame) -> socket.socket:
        """Dial the backend."""
        self.dialled += 1
        sock = socket.socket()
        sock.setblocking(False)
        await asyncio.get_running_loop().sock_connect(sock, self._server.sockets[0].getsockname())
        return sock

    def resume(self, peer: Identity, frame: ResumeFrame, service: ServiceName | None) -> None:
        """Nobody resumes here."""
        raise FlowRefused(OpenStatus.DENIED)

    async def agent(self, name: str) -> HostileAgent:
        context = self.pki.credentials(self.pki.agent(name)).client_context(ALPN)
        return HostileAgent(*await asyncio.open_connection(*self.address, ssl=context))

    def close(self) -> None:
        self.listener.close()
        self._server.close()


class HostileAgent:
    """Speaks frames as it likes on one carrier."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer
        self._frames = FrameReader()
        self._got: list[Frame] = []

    async def open(self, window: int = WINDOW_BYTES_MAX) -> OpenStatus:
        address = Address("127.0.0.1", 80)
        service, lease = ServiceName("echo-service"), LeaseRef(IPv4Address("127.0.0.1"), 1)
        frame = OpenFrame(SESSION, secrets.token_hex(16), service, lease, address, address, window)
        self.writer.write(encode(frame))
        while True:
            answer = await self.next()
            if isinstance(answer, OpenedFrame):
                return answer.status

    async def next(self) -> Frame:
        async with asyncio.timeout(WAIT_SECONDS):
            while not self._got:
                data = await self.reader.read(1 << 16)
                assert data, "closed"
                self._got += self._frames.feed(data)
            return self._got.pop(0)

    async def read_for(self, seconds: float) -> int:
        """Read what comes and never acknowledge it; return how much DATA that was."""
        got = 0
        with contextlib.suppress(TimeoutError, AssertionError):
            async with asyncio.timeout(seconds):
                while True:
                    frame = await self.next()
                    got += len(frame.data) if isinstance(frame, Data) else 0
        return got

    def drop(self) -> None:
        """Go without a word."""
        self.writer.transport.abort()


@pytest.fixture
async def connector(tmp_path: Path) -> AsyncIterator[Connector]:
    async with asyncio.timeout(120), asyncio.TaskGroup() as tasks:
        made = Connector(tmp_path, tasks)
        await made.start()
        yield made
        made.close()


async def test_windows_that_are_never_acknowledged_cost_a_peer_its_budget_and_others_nothing(
    connector: Connector,
) -> None:
    """Forty flows with the largest window, all read and none acknowledged: 64 MiB at most are kept for that peer."""
    agents = [await connector.agent("greedy") for _ in range(40)]
    statuses = [await each.open() for each in agents]
    assert OpenStatus.OK in statuses
    got = await asyncio.gather(*(each.read_for(3.0) for each in agents))
    assert 0 < sum(got) <= PEER_BYTES
    assert all(each <= WINDOW_BYTES_MAX for each in got)
    assert connector.budget.used_by("greedy") <= PEER_BYTES
    honest = await connector.agent("honest")
    assert await honest.open() is OpenStatus.OK
    assert await honest.read_for(0.5) > 0
    for each in (*agents, honest):
        each.drop()


async def test_open_and_drop_again_and_again_stays_within_the_budget(connector: Connector) -> None:
    """Each OPEN is dialled once; what its flow keeps counts for its peer until it is gone, and ends at the limit."""
    most = 0
    denied = 0
    for _ in range(60):
        agents = [await connector.agent("greedy") for _ in range(5)]
        for each in agents:
            denied += await each.open() is OpenStatus.DENIED
        for each in agents:
            each.drop()
        most = max(most, connector.budget.used_by("greedy"))
    assert most <= PEER_BYTES
    assert connector.dialled + denied == 300, "an OPEN never dials twice"
    honest = await connector.agent("honest")
    assert await honest.open() is OpenStatus.OK
    assert await honest.read_for(0.5) > 0
    honest.drop()
