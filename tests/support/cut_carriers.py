"""Carriers in memory that break after so many bytes: both real ends of the stream carrier, no TLS and no network.

The programs at either end are real sockets, as flows read and write those.
"""

from __future__ import annotations

import asyncio
import random
import secrets
import socket
from collections.abc import Callable
from dataclasses import dataclass, field
from ipaddress import IPv4Address
from typing import Any, cast

from sidecar.link.budget import Budget
from sidecar.link.flow import TcpFlow, abort
from sidecar.link.listener import StreamListener, _Accepted
from sidecar.link.stream import Carrier, FlowRefused, OpenLost
from tests.support.identities import identity
from ztna.credentials import Credentials
from ztna.errors import IdentityError, LinkError
from ztna.identity import Identity
from ztna.names import ServiceName, SessionId
from ztna.tls_tcp import SockAddr, TlsStream
from ztna.wire.control import Address, LeaseRef
from ztna.wire.stream import WINDOW_BYTES_MIN, OpenFrame, OpenStatus, ResumeFrame

SESSION = SessionId("00000000000000aa")
WAIT_SECONDS = 20.0
UP, DOWN = 0, 1
"""Agent to connector, and back."""


@dataclass(frozen=True)
class Cut:
    """Break once so many bytes went that way; those after them are lost though they could be written."""

    way: int
    after: int


@dataclass
class Wire:
    """One connection, both ways."""

    cut: Cut | None
    chance: random.Random
    carried: list[int] = field(default_factory=lambda: [0, 0])
    is_broken: bool = False

    def __post_init__(self) -> None:
        self.ends = (MemoryTls(self, UP, "connector"), MemoryTls(self, DOWN, "agent"))

    def carry(self, way: int, data: bytes) -> None:
        if self.is_broken:
            return
        if self.cut is not None and self.cut.way == way:
            left = self.cut.after - self.carried[way]
            self.is_broken = len(data) > left
            data = data[:left]
        self.carried[way] += len(data)
        self.ends[1 - way].arrived(data)
        if self.is_broken:
            for end in self.ends:
                end.arrived(b"")


class MemoryTls:
    """What a FrameStream needs of a TlsStream; writes are short now and then, as the wire's chance wants it."""

    peer_address: SockAddr = ("192.0.2.1", 1)
    own_address: SockAddr = ("192.0.2.2", 2)
    unacknowledged_bytes = 0

    def __init__(self, wire: Wire, way: int, peer: str) -> None:
        self.identity = identity(peer)
        self.is_ended = False
        self._wire = wire
        self._way = way
        self._arrived = bytearray()
        self._on_readable: Callable[[], None] | None = None
        self._is_waking = False
        self._loop = asyncio.get_running_loop()

    def start(
        self,
        on_readable: Callable[[], None],
        on_writable: Callable[[], None],
        on_refused: Callable[[IdentityError], None],
    ) -> None:
        self._on_readable, self._on_writable = on_readable, on_writable
        self._wake()

    def arrived(self, data: bytes) -> None:
        self._arrived += data
        self._wake()

    def read_into(self, buffer: memoryview) -> int:
        size = min(len(buffer), len(self._arrived))
        buffer[:size] = self._arrived[:size]
        del self._arrived[:size]
        self.is_ended = self._wire.is_broken and not self._arrived
        return size

    def write(self, data: bytes | memoryview) -> int:
        size = len(data) if self._wire.chance.random() < 0.7 else self._wire.chance.randint(0, len(data))
        self._wire.carry(self._way, bytes(data[:size]))
        if size < len(data):
            self._loop.call_soon(self._writable)
        return size

    def close(self) -> None:
        self._on_readable = None
        if not self._wire.is_broken:
            self._wire.is_broken = True
            self._wire.ends[1 - self._way].arrived(b"")

    def finish(self, patience_s: float, parted: Callable[[bool], None]) -> None:
        clean = not self._wire.is_broken
        self.close()
        parted(clean)

    def _wake(self) -> None:
        if not self._is_waking:
            self._is_waking = True
            self._loop.call_soon(self._readable)

    def _readable(self) -> None:
        self._is_waking = False
        if self._on_readable is not None:
            self._on_readable()

    def _writable(self) -> None:
        if self._on_readable is not None:
            self._on_writable()


class Program:
    """A program at one end of a flow: what it has to say, when it ends its side, and what it heard."""

    def __init__(
        self, content: bytes, *, answers_last: bool = False, resets_after: int | None = None
    ) -> None:
        self.near, self.sock = socket.socketpair()
        if self.near.family != socket.AF_INET:  # TCP options are set on it
            self.near.close()
            self.sock.close()
            with socket.create_server(("127.0.0.1", 0)) as server:
                self.sock = socket.create_connection(server.getsockname())
                self.near, _ = server.accept()
        self.near.setblocking(False)
        self.sock.setblocking(False)
        self.content = content
        self.heard = bytearray()
        self.was_reset = False
        self._heard_all = asyncio.Event()
        self._answers_last = answers_last
        self._resets_after = resets_after

    async def run(self) -> None:
        """Say and hear everything, or break off with a RST where the test wants it."""
        try:
            await asyncio.gather(self._say(), self._hear())
        except ConnectionError:
            self.was_reset = True
        finally:
            self.sock.close()

    async def _say(self) -> None:
        loop = asyncio.get_running_loop()
        if self._answers_last:
            await self._heard_all.wait()
        if self._resets_after is not None:
            await loop.sock_sendall(self.sock, self.content[: self._resets_after])
            await asyncio.sleep(0)
            abort(self.sock)
            raise ConnectionResetError
        await loop.sock_sendall(self.sock, self.content)
        self.sock.shutdown(socket.SHUT_WR)

    async def _hear(self) -> None:
        while part := await asyncio.get_running_loop().sock_recv(self.sock, 1 << 16):
            self.heard += part
        self._heard_all.set()


class Meadow:
    """An agent and a connector, and wires between them, one after the other."""

    def __init__(
        self,
        tasks: asyncio.TaskGroup,
        local: Program,
        backend: Program,
        cuts: list[Cut],
        *,
        seed: int = 0,
        peer_bytes: int = 1 << 20,
    ) -> None:
        self.local, self.backend = local, backend
        self.dials = 0
        self.carried: list[list[int]] = []
        self.reopened = 0
        self._cuts = list(cuts)
        self._chance = random.Random(seed)
        self._near, self.far = Budget(peer_bytes=peer_bytes), Budget(peer_bytes=peer_bytes)
        self.listener = StreamListener(cast(Credentials, None), self, tasks=tasks, budget=self.far)

    async def open(self, peer: Identity, frame: OpenFrame) -> socket.socket:
        self.dials += 1
        await asyncio.sleep(0)
        return self.backend.near

    def resume(self, peer: Identity, frame: ResumeFrame, service: ServiceName | None) -> None:
        assert frame.session == SESSION

    def wire(self) -> Carrier:
        """Return the agent's end of a fresh wire, which breaks as the next cut says."""
        wire = Wire(self._cuts.pop(0) if self._cuts else None, self._chance)
        self.carried.append(wire.carried)
        agent, connector = (cast(TlsStream, cast(Any, end)) for end in wire.ends)
        self.listener._carriers.add(_Accepted(self.listener, connector, None, WAIT_SECONDS))
        return Carrier(agent, self._near, forwarded=False)

    async def run(self) -> TcpFlow:
        """Carry the flow to its end, as an agent does; the cuts come in the middle."""
        while True:
            carrier = self.wire()
            try:
                flow = await carrier.open(_open_frame(), self.local.near)
            except OpenLost as lost:
                flow = lost.flow
            try:
                await self._until_finished(flow, carrier)
            except FlowRefused as error:
                assert error.status is OpenStatus.UNKNOWN_FLOW and not flow.has_begun
                flow.abandon()
                self.reopened += 1
            else:
                return flow

    async def _until_finished(self, flow: TcpFlow, carrier: Carrier) -> None:
        attempt = 0
        while not flow.finished.done():
            await asyncio.wait({flow.finished, carrier.closed}, return_when=asyncio.FIRST_COMPLETED)
            if flow.finished.done():
                return
            attempt += 1
            carrier = self.wire()
            try:
                await carrier.resume(flow, SESSION, attempt)
            except LinkError:
                continue


async def carried(local: Program, backend: Program, cuts: list[Cut], **settings: int) -> Meadow:
    """Have the two programs talk over wires with these cuts, until both are through."""
    async with asyncio.timeout(WAIT_SECONDS), asyncio.TaskGroup() as tasks:
        meadow = Meadow(tasks, local, backend, cuts, **settings)
        running = asyncio.gather(local.run(), backend.run())
        flow = await meadow.run()
        for served in meadow.listener.served.flows():
            # What only waits for a last ACK would do so for half a minute.
            if served.state.is_delivered or not flow.finished.result():
                served.reset()
        await running
        meadow.listener.close()
    return meadow


def _open_frame() -> OpenFrame:
    address = Address("127.0.0.1", 80)
    lease = LeaseRef(IPv4Address("127.0.0.1"), 1)
    return OpenFrame(
        SESSION, secrets.token_hex(16), ServiceName("s"), lease, address, address, WINDOW_BYTES_MIN
    )
