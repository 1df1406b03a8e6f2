"""Both ends of stream carriers with real TLS on loopback: an agent and its programs, a connector and a backend."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import socket
from collections.abc import Awaitable, Callable
from ipaddress import IPv4Address
from pathlib import Path

from sidecar.link.budget import Budget
from sidecar.link.flow import TcpFlow
from sidecar.link.listener import StreamListener
from sidecar.link.stream import ALPN, Carrier, FlowRefused
from tests.support.certificates import Pki
from ztna.credentials import Credentials
from ztna.identity import Identity
from ztna.names import ServiceName, SessionId
from ztna.reasons import Reason
from ztna.telemetry import REFUSALS
from ztna.wire.control import Address, LeaseRef
from ztna.wire.stream import (
    WINDOW_BYTES_MIN,
    Frame,
    FrameReader,
    OpenedFrame,
    OpenFrame,
    OpenStatus,
    ResumeFrame,
    encode,
)

DEADLINE_SECONDS = 20
BUFFER_BYTES = 256 * 1024
"""Each buffer of a local socket; the kernel doubles it, and without it takes as much as its host allows."""
SESSION = SessionId("00000000000000aa")
OTHER_SESSION = SessionId("00000000000000bb")

Backend = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


def anybody(_identity: Identity) -> None:
    """Let everybody in whose certificate verified."""


def open_frame(session: SessionId = SESSION, flow: str = "") -> OpenFrame:
    source, destination = Address("127.0.0.1", 40000), Address("127.100.0.2", 80)
    return OpenFrame(
        session,
        flow or secrets.token_hex(16),
        ServiceName("echo-service"),
        LeaseRef(IPv4Address("127.100.0.2"), 1),
        source,
        destination,
        WINDOW_BYTES_MIN,
    )


def _bounded(sock: socket.socket) -> socket.socket:
    for option in (socket.SO_RCVBUF, socket.SO_SNDBUF):
        sock.setsockopt(socket.SOL_SOCKET, option, BUFFER_BYTES)
    return sock


def _listening() -> socket.socket:
    return _bounded(socket.create_server(("127.0.0.1", 0), backlog=128))


def refusals(reason: Reason) -> float:
    value: float = REFUSALS.labels("stream_carrier", reason.value)._value.get()
    return value


class Program:
    """The local program's end of a flow: an asyncio stream whose other end the agent was given."""

    def __init__(self, near: socket.socket, sock: socket.socket) -> None:
        self.near, self.sock = near, sock
        sock.setblocking(False)
        self._loop = asyncio.get_running_loop()

    async def send(self, data: bytes) -> None:
        await self._loop.sock_sendall(self.sock, data)

    async def read_all(self) -> bytes:
        parts = []
        while part := await self._loop.sock_recv(self.sock, 1 << 18):
            parts.append(part)
        return b"".join(parts)

    async def read(self, size: int) -> bytes:
        got = b""
        while len(got) < size:
            part = await self._loop.sock_recv(self.sock, size - len(got))
            assert part, "the end came early"
            got += part
        return got

    def end(self) -> None:
        self.sock.shutdown(socket.SHUT_WR)


class Ground:
    """A connector's listener before one backend, an agent's credentials, and programs to send through them."""

    def __init__(self, directory: Path, tasks: asyncio.TaskGroup) -> None:
        self.tasks = tasks
        self.pki = Pki(directory)
        self.agent = Credentials.load(self.pki.agent())
        self.connector = Credentials.load(self.pki.connector())
        self.near_budget, self.far_budget = Budget(), Budget()
        self.opened: list[OpenFrame] = []
        self.resumed: list[tuple[ResumeFrame, ServiceName | None]] = []
        self.opening = asyncio.Event()
        self.release = asyncio.Event()
        self.refuse: OpenStatus | None = None
        self.hang = False
        self.backend = ("127.0.0.1", 0)
        self.closing: list[Callable[[], None]] = []
        self.sockets: list[socket.socket] = []
        self.programs = _listening()
        self.sockets.append(self.programs)
        self.programs.setblocking(False)
        self.listener = self.make_listener()

    def make_listener(self, **settings: float) -> StreamListener:
        listener = StreamListener(self.connector, self, tasks=self.tasks, budget=self.far_budget, **settings)
        self.address = listener.listen(("127.0.0.1", 0))
        self.closing.append(listener.close)
        return listener

    async def open(self, _peer: Identity, frame: OpenFrame) -> socket.socket:
        self.opened.append(frame)
        self.opening.set()
        if self.hang:
            await self.release.wait()
        if self.refuse is not None:
            raise FlowRefused(self.refuse)
        sock = _bounded(socket.socket())
        sock.setblocking(False)
        await asyncio.get_running_loop().sock_connect(sock, self.backend)
        return sock

    def resume(self, _peer: Identity, frame: ResumeFrame, service: ServiceName | None) -> None:
        self.resumed.append((frame, service))
        if self.refuse is not None:
            raise FlowRefused(self.refuse)

    async def serve(self, backend: Backend) -> None:
        async def served(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            # asyncio forgets a transport that reads nothing, and its task with it.
            self.closing.append(writer.transport.abort)
            await backend(reader, writer)

        server = await asyncio.start_server(served, sock=_listening())
        self.closing.append(server.close)
        self.backend = server.sockets[0].getsockname()

    async def program(self) -> Program:
        loop = asyncio.get_running_loop()
        sock = _bounded(socket.socket())
        sock.setblocking(False)
        await loop.sock_connect(sock, self.programs.getsockname())
        near, _ = await loop.sock_accept(self.programs)
        self.sockets += (sock, near)
        return Program(near, sock)

    async def dial(self, check: Callable[[Identity], None] = anybody) -> Carrier:
        carrier = await Carrier.dial_direct(
            self.address, self.agent, check, budget=self.near_budget, timeout_s=DEADLINE_SECONDS
        )
        self.closing.append(carrier.close)
        return carrier

    async def flow(self) -> tuple[Program, Carrier, TcpFlow]:
        carrier, program = await self.dial(), await self.program()
        return program, carrier, await carrier.open(open_frame(), program.near)

    def close(self) -> None:
        for close in reversed(self.closing):
            close()
        for sock in self.sockets:
            sock.close()


async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Echo until the end, then end."""
    with contextlib.suppress(ConnectionError):
        while data := await reader.read(1 << 16):
            writer.write(data)
            await writer.drain()
    writer.close()


async def hold(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Say one byte, then wait for the end without reading."""
    writer.write(b"!")
    with contextlib.suppress(ConnectionError):
        await writer.wait_closed()


class Raw:
    """A peer that speaks frames as it likes."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer
        self._frames = FrameReader()
        self._got: list[Frame] = []

    @classmethod
    async def connect(cls, ground: Ground, agent: Credentials | None = None) -> Raw:
        context = (agent or ground.agent).client_context(ALPN)
        return cls(*await asyncio.open_connection(*ground.address, ssl=context))

    def send(self, *frames: Frame | bytes) -> None:
        self._writer.write(b"".join(each if isinstance(each, bytes) else encode(each) for each in frames))

    async def next(self) -> Frame | None:
        while not self._got:
            try:
                data = await self._reader.read(1 << 16)
            except ConnectionError:
                return None
            if not data:
                return None
            self._got += self._frames.feed(data)
        return self._got.pop(0)

    def drop(self) -> None:
        """Break the connection."""
        self._writer.transport.abort()

    async def until(self, wanted: Frame) -> list[Frame]:
        """Read up to a frame and return what came before it."""
        before: list[Frame] = []
        while (frame := await self.next()) != wanted:
            assert frame is not None, before
            before.append(frame)
        return before

    async def closed(self) -> list[Frame]:
        frames = []
        while (frame := await self.next()) is not None:
            frames.append(frame)
        self._writer.close()
        return frames

    async def opened(self) -> OpenedFrame:
        self.send(open_frame())
        frame = await self.next()
        assert isinstance(frame, OpenedFrame)
        return frame
