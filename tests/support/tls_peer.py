"""A peer that speaks `ztna-v2` over TLS to a running relay, and can lie about everything."""

from __future__ import annotations

import asyncio
import socket
from typing import TypeVar

from ztna.credentials import Credentials
from ztna.tls_control import ALPN, TlsConnection
from ztna.tls_tcp import connect, secure
from ztna.wire import control

WAIT_SECONDS = 15.0
RECEIVE_BUFFER_BYTES = 256 * 1024

Message = TypeVar("Message", bound=control.Message)


class TlsPeer:
    """One connection to the relay. Messages wait in `inbox` until they are expected."""

    def __init__(self, connection: TlsConnection) -> None:
        self.connection = connection
        self.inbox: list[control.AnyMessage | control.UnknownMessage] = []
        self.ended: tuple[int, str] | None = None
        self._heard = asyncio.Event()
        connection.start(self)

    @classmethod
    async def dial(cls, address: tuple[str, int], credentials: Credentials, alpn: str = ALPN) -> TlsPeer:
        """Do the handshake and say nothing."""
        sock: socket.socket = await connect(address, WAIT_SECONDS)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, RECEIVE_BUFFER_BYTES)
        return cls(TlsConnection(await secure(sock, credentials, alpn, server_side=False), "test"))

    @classmethod
    async def connect(cls, address: tuple[str, int], credentials: Credentials) -> TlsPeer:
        """Connect and exchange hellos."""
        self = await cls.dial(address, credentials)
        self.say(control.Hello())
        await self.expect(control.Hello)
        return self

    def say(self, message: control.AnyMessage) -> None:
        self.say_bytes(control.encode(message))

    def say_bytes(self, data: bytes) -> None:
        assert self.connection.send_stream(0, data)

    async def expect(self, kind: type[Message]) -> Message:
        """Take the first message of the type out of the inbox, waiting for it."""
        async with asyncio.timeout(WAIT_SECONDS):
            while True:
                for message in self.inbox:
                    if isinstance(message, kind):
                        self.inbox.remove(message)
                        return message
                assert self.ended is None, f"{self.ended} while {kind.__name__} was expected"
                self._heard.clear()
                await self._heard.wait()

    async def closed(self, reason: str | None = None) -> tuple[int, str]:
        """Wait for the end, whose phrase must be this one if one is given."""
        async with asyncio.timeout(WAIT_SECONDS):
            while self.ended is None:
                self._heard.clear()
                await self._heard.wait()
        assert reason is None or self.ended[1] == reason, self.ended
        return self.ended

    def stop_reading(self) -> None:
        """Leave what comes in the kernel."""
        asyncio.get_running_loop().remove_reader(self.connection._tls._fd)

    def vanish(self) -> None:
        """Go without a word."""
        self.connection._tls.close()

    def close(self) -> None:
        self.connection.close()

    def message_received(self, message: control.AnyMessage | control.UnknownMessage) -> None:
        self.inbox.append(message)
        self._heard.set()

    def connection_closed(self, code: int, reason: str) -> None:
        self.ended = (code, reason)
        self._heard.set()
