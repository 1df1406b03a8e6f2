"""Our QUIC endpoints on real loopback sockets, with handlers that remember everything."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from ztna.credentials import Credentials
from ztna.errors import ProtocolError
from ztna.identity import Identity
from ztna.quic import Client, Connection, Server, Settings
from ztna.udp import SockAddr, UdpSocket

DEADLINE_SECONDS = 10.0
ALPN = "ztna-v2"
LOCALHOST: SockAddr = ("127.0.0.1", 0)


class Recorder:
    """A handler that keeps what it heard; `echo` sends it back."""

    def __init__(self, connection: Connection, echo: bool = False) -> None:
        self.connection = connection
        self.echo = echo
        self.datagrams: list[bytes] = []
        self.streams: dict[int, bytearray] = {}
        self.ended_streams: set[int] = set()
        self.addresses: list[SockAddr] = []
        self.closed: tuple[int, str] | None = None
        self.pause_at: int | None = None
        self.heard = asyncio.Event()

    def datagram_received(self, data: bytes) -> None:
        if data == b"malformed":
            raise ProtocolError("no message of ours")
        self.datagrams.append(data)
        self.heard.set()
        if self.echo:
            self.connection.send_datagram(data)

    def stream_data(self, stream_id: int, data: bytes, end: bool) -> None:
        self.streams.setdefault(stream_id, bytearray()).extend(data)
        if end:
            self.ended_streams.add(stream_id)
        if self.pause_at is not None and len(self.streams[stream_id]) >= self.pause_at:
            self.connection.pause_stream(stream_id)
        self.heard.set()
        if self.echo:
            self.connection.send_stream(stream_id, data, end)

    def peer_address_changed(self, address: SockAddr) -> None:
        self.addresses.append(address)
        self.heard.set()

    def connection_closed(self, code: int, reason: str) -> None:
        self.closed = (code, reason)
        self.heard.set()

    async def until(self, holds: Callable[[], Any]) -> None:
        """Wait until something holds, looking again whenever something was heard."""
        async with asyncio.timeout(DEADLINE_SECONDS):
            while not holds():
                self.heard.clear()
                await self.heard.wait()


def settings(**changes: Any) -> Settings:
    """Settings for tests; a reset key that is the same for every server."""
    fields: dict[str, Any] = {
        "alpn": (ALPN,),
        "udp_payload": 1350,
        "ping_interval_s": 3.0,
        "reset_key": b"k" * 32,
    }
    return Settings(**(fields | changes))


class Listening:
    """A server, its socket, and the handlers it made."""

    def __init__(
        self,
        credentials: Credentials,
        config: Settings,
        *,
        admit: Callable[[Identity, str], None] = lambda identity, alpn: None,
        echo: bool = False,
        address: SockAddr = LOCALHOST,
        **clocks: Any,
    ) -> None:
        self.handlers: list[Recorder] = []
        self.socket = UdpSocket.open(address, lambda batch: self.server.packets_received(batch))
        self.server = Server(
            self.socket, credentials, config, admit=admit, factory=self._handler(echo), **clocks
        )

    def _handler(self, echo: bool) -> Callable[[Connection], Recorder]:
        def make(connection: Connection) -> Recorder:
            self.handlers.append(Recorder(connection, echo))
            return self.handlers[-1]

        return make

    @property
    def address(self) -> SockAddr:
        return self.socket.address

    def close(self) -> None:
        self.server.close()
        self.socket.close()


class Dialling:
    """A client, its socket, and the handler it made."""

    def __init__(
        self,
        address: SockAddr,
        credentials: Credentials,
        config: Settings,
        *,
        check: Callable[[Identity], None] = lambda identity: None,
        **clocks: Any,
    ) -> None:
        self.handlers: list[Recorder] = []
        self.socket = UdpSocket.open(LOCALHOST, self._receive)
        self.client = Client(
            self, address, "relay-1", credentials, config, check=check, factory=self._handler, **clocks
        )

    def send(self, packets: Any) -> None:
        self.socket.send(packets)

    def move(self) -> None:
        """Go on from another socket, as after a NAT rebinding."""
        self.socket.close()
        self.socket = UdpSocket.open(LOCALHOST, self._receive)

    def _receive(self, batch: Any) -> None:
        self.client.packets_received(batch)

    def _handler(self, connection: Connection) -> Recorder:
        self.handlers.append(Recorder(connection))
        return self.handlers[-1]

    async def connect(self) -> Recorder:
        await self.client.connect(DEADLINE_SECONDS)
        return self.handlers[0]

    def close(self) -> None:
        self.client.close()
        self.socket.close()
