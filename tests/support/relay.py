"""A running relay, and peers that speak `ztna-v2` to it over real QUIC and can lie about everything."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, TypeVar

from relay.daemon import Relay
from tests.support.certificates import Pki
from tests.support.dns_server import DnsServer
from tests.support.quic import Dialling, settings
from ztna.config import Endpoint, RelayConfig, TlsConfig
from ztna.credentials import Credentials
from ztna.names import ConnectorId, ServiceName, SessionId, Zone
from ztna.reasons import Reason
from ztna.renewal import Renewal
from ztna.runtime import Readiness
from ztna.telemetry import REFUSALS
from ztna.wire import control, forwarder

WAIT_SECONDS = 10.0
SERVICE = ServiceName("echo-service")
FREE = Endpoint("127.0.0.1", 0)

Message = TypeVar("Message", bound=control.Message)


class Peer:
    """One connection to the relay. Messages wait in `inbox` until they are expected."""

    def __init__(self, address: tuple[str, int], credentials: Credentials, **changes: Any) -> None:
        self.credentials = credentials
        self._dialling = Dialling(address, credentials, settings(**changes))
        self._dialling.client._factory = self._made
        self.inbox: list[control.AnyMessage | control.UnknownMessage] = []
        self.datagrams: list[bytes] = []
        self.closed: tuple[int, str] | None = None
        self._reader = control.FrameReader()
        self._heard = asyncio.Event()

    async def connect(self, hello: control.Hello | None = None) -> Peer:
        """Connect and exchange hellos."""
        self.connection = await self._dialling.client.connect(WAIT_SECONDS)
        self.say(hello or control.Hello())
        self.hello = await self.expect(control.Hello)
        return self

    @property
    def fingerprint(self) -> str:
        return self.credentials.identity.fingerprint

    @property
    def name(self) -> str:
        return self.credentials.identity.name

    def say(self, message: control.AnyMessage) -> None:
        self.say_bytes(control.encode(message))

    def say_bytes(self, data: bytes) -> None:
        assert self.connection.send_stream(0, data)

    async def expect(self, kind: type[Message], **fields: object) -> Message:
        """Take the first message of the type with these fields out of the inbox, waiting for it."""
        return await self.expect_one_of(kind, **fields)

    async def expect_one_of(self, *kinds: type[Message], **fields: object) -> Message:
        """Take the first message of one of the types with these fields out of the inbox, waiting for it."""
        async with asyncio.timeout(WAIT_SECONDS):
            while True:
                for message in self.inbox:
                    same = all(getattr(message, name, None) == value for name, value in fields.items())
                    if isinstance(message, kinds) and same:
                        self.inbox.remove(message)
                        return message
                self._heard.clear()
                await self._heard.wait()

    async def expect_close(self) -> tuple[int, str]:
        async with asyncio.timeout(WAIT_SECONDS):
            while self.closed is None:
                self._heard.clear()
                await self._heard.wait()
        return self.closed

    async def expect_datagram(self) -> bytes:
        async with asyncio.timeout(WAIT_SECONDS):
            while not self.datagrams:
                self._heard.clear()
                await self._heard.wait()
        return self.datagrams.pop(0)

    async def nothing_of(self, kind: type[Message]) -> None:
        """Check that no such message came before the answer to a question asked now."""
        self.say(control.Open(request=999_999, service=ServiceName("not-granted-to-anyone")))
        await self.expect(control.Denied, request=999_999)
        assert not [each for each in self.inbox if isinstance(each, kind)], self.inbox

    async def serve(self, connector_id: str, *services: str) -> None:
        """Register, expecting that all is well."""
        offerings = tuple(control.Offering(ServiceName(each)) for each in services or (SERVICE,))
        self.say(control.Register(ConnectorId(connector_id), offerings, control.Address("127.0.0.1", 4435)))
        for each in offerings:
            await self.expect(control.Registered, name=each.name)

    async def open_with(
        self, *connectors: Peer, request: int = 1, service: str = SERVICE
    ) -> tuple[control.Opened, control.Offered, Peer]:
        """Open a session; whichever connector is offered it accepts. Returns also which."""
        self.say(control.Open(request=request, service=ServiceName(service)))
        waits = {asyncio.ensure_future(each.expect(control.Offered)): each for each in connectors}
        done, pending = await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        for each in pending:
            each.cancel()
        first = done.pop()
        connector, offered = waits[first], first.result()
        connector.say(control.Accepted(offered.session))
        return await self.expect(control.Opened, request=request), offered, connector

    def vanish(self) -> None:
        """Go without a word."""
        self._dialling.socket.close()

    def close(self) -> None:
        self._dialling.close()

    def _made(self, connection: object) -> Peer:
        return self

    def datagram_received(self, data: bytes) -> None:
        self.datagrams.append(data)
        self._heard.set()

    def stream_data(self, stream_id: int, data: bytes, end: bool) -> None:
        self.inbox += self._reader.feed(data)
        self._heard.set()

    def peer_address_changed(self, address: tuple[str, int]) -> None:
        pass

    def connection_closed(self, code: int, reason: str) -> None:
        self.closed = (code, reason)
        self._heard.set()


class RunningRelay:
    """A relay in this process with its DNS server."""

    renewal: Renewal

    def __init__(self, pki: Pki, dns: DnsServer, relay: Relay, config: RelayConfig) -> None:
        self.pki, self.dns, self.relay, self.config = pki, dns, relay, config
        self.readiness = Readiness()
        self._peers: list[Peer] = []

    @property
    def address(self) -> tuple[str, int]:
        return self.relay.address

    async def peer(self, tls: TlsConfig, **changes: Any) -> Peer:
        peer = Peer(self.address, self.pki.credentials(tls), **changes)
        self._peers.append(peer)
        return await peer.connect()

    async def agent(self, name: str = "agent-a", services: tuple[str, ...] = (SERVICE,)) -> Peer:
        return await self.peer(self.pki.agent(name, services))

    async def connector(
        self, connector_id: str = "con-x", services: tuple[str, ...] = (SERVICE,), **changes: Any
    ) -> Peer:
        """A connector that has registered its services, with DNS records for them."""
        peer = await self.peer(self.pki.connector(connector_id, services), **changes)
        for service in services:
            self.dns.routes.setdefault(service, []).append((0, 1, connector_id))
        await peer.serve(connector_id, *services)
        return peer

    def close(self) -> None:
        for peer in self._peers:
            peer.close()


class Dialled:
    """A TCP peer of the forwarder."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    @classmethod
    async def dial(cls, mesh: RunningRelay, token: bytes) -> Dialled:
        self = cls(*await asyncio.open_connection(*mesh.relay.splicer.address))
        self.writer.write(forwarder.dial_in(token))
        return self

    async def bound(self) -> None:
        start = await asyncio.wait_for(self.reader.readexactly(13), 8)
        rest = await self.reader.readexactly(forwarder.bound_bytes(start) - 13)
        bound = forwarder.decode(start + rest)
        assert isinstance(bound, forwarder.Bound) and bound.nonce == forwarder.NO_NONCE
        assert bound.address == control.Address(*self.writer.get_extra_info("sockname"))

    async def closed_without_a_byte(self) -> None:
        assert await asyncio.wait_for(self.reader.read(1), 8) == b""
        self.writer.close()


async def token_of(agent: Peer, opened: control.Opened) -> bytes:
    agent.say(control.Dial(opened.session))
    return (await agent.expect(control.DialToken, session=opened.session)).token


@asynccontextmanager
async def running_relay(directory: Path, *, crl: bool = False, **config: Any) -> AsyncIterator[RunningRelay]:
    """Run a relay on free loopback ports; with `crl` it goes by the CRL that its Pki writes."""
    pki = Pki(directory)
    tls = pki.relay("relay-1")
    dns = DnsServer()
    fields: dict[str, Any] = {
        "name": "relay-1",
        "tls": pki.with_crl(tls) if crl else tls,
        "listen": FREE,
        "forwarder": FREE,
        "admin": FREE,
        "resolvers": (await dns.start(),),
    }
    settings_ = RelayConfig(**(fields | config))
    relay = Relay(settings_, Zone("ztna.local"), pki.credentials(settings_.tls))
    running = RunningRelay(pki, dns, relay, settings_)
    renewal = running.renewal = Renewal(
        settings_.tls,
        relay.server.credentials,
        running.readiness,
        check=lambda _: None,
        accept=relay.server.use_credentials,
    )
    task = asyncio.ensure_future(asyncio.gather(relay.run(), renewal.run()))
    try:
        yield running
    finally:
        running.close()
        relay.close()
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        dns.close()


def refusals(reason: Reason, where: str = "relay") -> float:
    """Return how often the reason was counted so far."""
    return float(REFUSALS.labels(where, reason.value)._value.get())


def forged_session(number: int = 1) -> SessionId:
    return SessionId(f"{number:016x}")
