"""A relay for tests of its clients: real QUIC and certificates, hellos, and whatever the test makes it say."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from tests.support.certificates import Pki
from ztna.config import Endpoint, RelayTarget
from ztna.identity import Identity
from ztna.quic import Connection, Server, Settings
from ztna.udp import SockAddr, UdpSocket
from ztna.wire.control import AnyMessage, FrameReader, Hello, UnknownMessage, encode

WAIT_SECONDS = 10.0


class RelayPeer:
    """The relay's end of one connection."""

    def __init__(self, relay: FakeRelay, connection: Connection) -> None:
        self.connection = connection
        self.messages: asyncio.Queue[AnyMessage | UnknownMessage] = asyncio.Queue()
        self.datagrams: asyncio.Queue[bytes] = asyncio.Queue()
        self._relay = relay
        self._reader = FrameReader()

    def say(self, message: AnyMessage) -> None:
        self.connection.send_stream(0, encode(message))

    def say_bytes(self, data: bytes) -> None:
        self.connection.send_stream(0, data)

    async def heard(self, kind: type) -> AnyMessage | UnknownMessage:
        """Return the next message, which must be of that type."""
        async with asyncio.timeout(WAIT_SECONDS):
            message = await self.messages.get()
        assert isinstance(message, kind), message
        return message

    def datagram_received(self, data: bytes) -> None:
        self.datagrams.put_nowait(data)

    def stream_data(self, stream_id: int, data: bytes, end: bool) -> None:
        for message in self._reader.feed(data):
            if isinstance(message, Hello) and self._relay.hello is not None:
                self.say(self._relay.hello)
                self._relay.peers.put_nowait(self)
            else:
                self.messages.put_nowait(message)

    def peer_address_changed(self, address: SockAddr) -> None:
        pass

    def connection_closed(self, code: int, reason: str) -> None:
        pass


class FakeRelay:
    """Accepts every verified client; `peers` has those that said hello, in order."""

    def __init__(self, pki: Pki, name: str = "relay-1", address: SockAddr = ("127.0.0.1", 0)) -> None:
        self.name = name
        self.hello: Hello | None = Hello()
        self.peers: asyncio.Queue[RelayPeer] = asyncio.Queue()
        self._path = UdpSocket.open(address, lambda packets: self.server.packets_received(packets))
        self.server = Server(
            self._path,
            pki.credentials(pki.relay(name)),
            Settings(("ztna-v2",), 1350, 10.0),
            admit=self._admit,
            factory=lambda connection: RelayPeer(self, connection),
        )

    @property
    def target(self) -> RelayTarget:
        return RelayTarget(address=Endpoint(*self._path.address), name=self.name)

    @property
    def address(self) -> SockAddr:
        return self._path.address

    async def peer(self) -> RelayPeer:
        async with asyncio.timeout(WAIT_SECONDS):
            return await self.peers.get()

    def close(self) -> None:
        self.server.close()
        self._path.close()

    def _admit(self, identity: Identity, alpn: str) -> None:
        pass


@asynccontextmanager
async def fake_relay(pki: Pki, name: str = "relay-1") -> AsyncIterator[FakeRelay]:
    relay = FakeRelay(pki, name)
    try:
        yield relay
    finally:
        relay.close()
