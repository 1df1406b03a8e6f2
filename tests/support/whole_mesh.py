"""A whole mesh in the test's own process: every daemon's real body, on loopback.

Beside the real agent there is `Scripted`, an agent that speaks with real certificates and real carriers but does
what the test says, lies included; two real agents cannot share the addresses of one host.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from ipaddress import IPv4Address, IPv4Network
from pathlib import Path
from typing import Any

from dnsd import daemon as dnsd
from relay import daemon as relay
from sidecar.agent import daemon as agent
from sidecar.connector import daemon as connector
from sidecar.link.budget import Budget
from sidecar.link.flow import TcpFlow
from sidecar.link.packet import PacketLink
from sidecar.link.stream import Carrier
from tests.support.certificates import Pki
from tests.support.consul import free_ports
from tests.support.relay import Peer
from ztna.config import (
    AgentConfig,
    CheckConfig,
    Config,
    ConnectorConfig,
    ConsulConfig,
    DnsdConfig,
    Endpoint,
    PoolConfig,
    RelayConfig,
    RelayTarget,
    RouteConfig,
    TlsConfig,
)
from ztna.consul.client import ConsulClient
from ztna.jsontypes import from_json
from ztna.leases import Lease, service_key
from ztna.names import ConnectorId, ServiceName, SessionId
from ztna.packet import Packet, build_udp, parse
from ztna.resolver import Resolver
from ztna.runtime import Daemon
from ztna.sections import Server
from ztna.wire import control
from ztna.wire.control import Address, LeaseRef
from ztna.wire.stream import WINDOW_BYTES_MIN, OpenFrame

WAIT_SECONDS = 20.0
FREE = Endpoint("127.0.0.1", 0)
ECHO, WEB = ServiceName("echo-service"), ServiceName("web-app")
PROMPT = CheckConfig(interval_s=0.1, timeout_s=1.0, failures_before_critical=1)


async def until(what: str, found: Callable[[], object], seconds: float = WAIT_SECONDS) -> None:
    """Wait for something that happens elsewhere in this process."""
    try:
        async with asyncio.timeout(seconds):
            while not found():
                await asyncio.sleep(0.01)
    except TimeoutError:
        raise AssertionError(f"never: {what}") from None


class Backend:
    """Answers each TCP line and each datagram with its label and what was said."""

    def __init__(self, label: str) -> None:
        self.label = label.encode()
        self.port = 0
        self._server: asyncio.Server | None = None
        self._udp: asyncio.DatagramTransport | None = None

    async def start(self) -> None:
        """Listen, on the port of the last time."""
        self.port = self.port or free_ports(1)[0]
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", self.port)
        if self._udp is None:
            self._udp, _ = await asyncio.get_running_loop().create_datagram_endpoint(
                lambda: _Echo(self.label), local_addr=("127.0.0.1", self.port)
            )

    def stop(self) -> None:
        """Stop listening on TCP."""
        assert self._server is not None
        self._server.close()

    def close(self) -> None:
        self.stop()
        assert self._udp is not None
        self._udp.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError):
            while line := await reader.readline():
                writer.write(self.label + b": " + line)
                await writer.drain()
        writer.close()


class _Echo(asyncio.DatagramProtocol):
    def __init__(self, label: bytes) -> None:
        self._label = label

    def connection_made(self, transport: Any) -> None:
        self._transport = transport

    def datagram_received(self, data: bytes, address: tuple[str, int]) -> None:
        self._transport.sendto(self._label + b": " + data, address)


class Running:
    """One daemon's body that runs."""

    def __init__(self, daemon: Daemon, body: Callable[[Daemon], Awaitable[None]]) -> None:
        self.daemon = daemon
        self.task = daemon.tasks.create_task(_run(daemon, body), name=daemon.name)

    async def ready(self, seconds: float = WAIT_SECONDS) -> Running:
        await until(f"{self.daemon.name} ready", lambda: self._is_ready, seconds)
        return self

    def status(self, key: str) -> Any:
        return self.daemon.status_sources[key]()

    async def stop(self, seconds: float = WAIT_SECONDS) -> None:
        """End it cleanly."""
        self.daemon.stopping.set()
        async with asyncio.timeout(seconds):
            await self.task

    @property
    def _is_ready(self) -> bool:
        if self.task.done():
            raise AssertionError(f"{self.daemon.name} ended")
        return bool(self.daemon.readiness.ready and self.daemon.status_sources)


class _Ended(Exception):
    pass


async def _run(daemon: Daemon, body: Callable[[Daemon], Awaitable[None]]) -> None:
    """As ztna.runtime: what the body left running ends with it."""
    try:
        async with asyncio.TaskGroup() as tasks:
            daemon.tasks = tasks
            await body(daemon)
            raise _Ended
    except* _Ended:
        pass


class WholeMesh:
    """A Consul, a dnsd and a relay; connectors and agents as the test wants them."""

    def __init__(
        self, directory: Path, tasks: asyncio.TaskGroup, consul: ConsulConfig, client: ConsulClient
    ) -> None:
        self.pki = Pki(directory)
        self.consul = client
        self.dns_socket = directory / "dns.sock"
        self.pool = IPv4Network((f"127.{random.randrange(110, 250)}.{random.randrange(256)}.0", 24))
        self._consul_config = consul
        self._tasks = tasks
        self.connectors: dict[str, Running] = {}
        self._running: list[Running] = []
        self._closing: list[Callable[[], object]] = []
        self.resolver: Resolver
        self.dnsd: Running
        self.relay: Running

    async def start(self, **relay_keys: Any) -> None:
        """Start dnsd and the relay, which asks it over loopback unless it is told another way."""
        dns = _free_port()
        self.dnsd = await self._body(
            "dnsd",
            dnsd.run,
            dnsd=DnsdConfig(listen=dns, socket=str(self.dns_socket), pool=PoolConfig(cidr=self.pool)),
        ).ready()
        self.resolver = Resolver((dns,), 2.0)
        keys = {"resolvers": (Server(dns.host, dns.port),), "drain_s": 0.1} | relay_keys
        own = RelayConfig(name="relay-1", tls=self.pki.relay(), listen=FREE, forwarder=FREE, **keys)
        self.relay = await self._body("relay", relay.run, relay=own).ready()

    @property
    def relay_address(self) -> tuple[str, int]:
        host, _, port = self.relay.status("relay")["address"].rpartition(":")
        return host, int(port)

    async def backend(self, label: str) -> Backend:
        made = Backend(label)
        await made.start()
        self._closing.append(made.close)
        return made

    async def connector(
        self, name: str, routes: Sequence[RouteConfig], *, tls: TlsConfig | None = None, **keys: Any
    ) -> Running:
        """Start a connector; it is ready once Consul and the relay know it."""
        fields: dict[str, Any] = {"drain_s": 0.1} | keys
        own = ConnectorConfig(
            id=ConnectorId(name),
            tls=tls or self.pki.connector(name, sorted({each.service for each in routes})),
            relays=(self._target,),
            routes=tuple(routes),
            link=FREE,
            **fields,
        )
        running = self.connectors[name] = self._body(name, connector.body, connector=own)
        return await running.ready()

    async def agent(self, *services: str, direct: bool = True) -> Running:
        """Start the one real agent."""
        own = AgentConfig(
            tls=self.pki.agent("agent-1", services),
            relays=(self._target,),
            pool=self.pool,
            direct=direct,
            drain_s=0.1,
        )
        return await self._body("agent", agent.body, agent=own).ready()

    async def scripted(self, name: str, *services: str) -> Scripted:
        """Connect an agent that does as it is told."""
        made = Scripted(self, name, services)
        self._closing.append(made.close)
        await made.peer.connect()
        return made

    async def scripted_connector(self, name: str, *services: str) -> Peer:
        """Connect a connector that registers its services at the relay and does as it is told."""
        peer = Peer(self.relay_address, self.pki.credentials(self.pki.connector(name, services)))
        self._closing.append(peer.close)
        await peer.connect()
        await peer.serve(name, *services)
        return peer

    async def lease(self, service: ServiceName) -> Lease:
        """Wait for a service's lease."""
        async with asyncio.timeout(WAIT_SECONDS):
            while (pair := await self.consul.kv_get(service_key(service))) is None:
                await asyncio.sleep(0.02)
        return from_json(pair.value, Lease)

    async def virtual_address(self, service: ServiceName) -> IPv4Address:
        """Ask dnsd for a name until it has an address."""
        async with asyncio.timeout(WAIT_SECONDS):
            while True:
                found = await self.resolver.addresses(f"{service}.ztna.local")
                if found:
                    return IPv4Address(found[0])
                await asyncio.sleep(0.02)

    async def served_by(self, service: ServiceName, *connectors: str) -> None:
        """Wait until the relay has read from DNS that exactly these connectors serve it, and how fresh that is."""

        def named() -> bool:
            srv = self.relay.status("srv")
            entry = srv["services"].get(service)
            return (
                entry is not None
                and srv["fresh_age_s"] is not None
                and sorted(each["id"] for each in entry["connectors"]) == sorted(connectors)
            )

        await until(f"{service} by {connectors}", named)

    async def close(self) -> None:
        """End everything, the newest first."""
        for closing in reversed(self._closing):
            closing()
        for running in reversed(self._running):
            if not running.task.done():
                await running.stop()

    @property
    def _target(self) -> RelayTarget:
        return RelayTarget(address=Endpoint(*self.relay_address), name="relay-1")

    def _body(self, name: str, body: Callable[[Daemon], Awaitable[None]], **section: Any) -> Running:
        config = Config(consul=self._consul_config, **section)
        running = Running(Daemon(name, config, self._tasks), body)
        self._running.append(running)
        return running


class Scripted:
    """An agent's control connection, carriers and packet links, each used as the test says."""

    def __init__(self, mesh: WholeMesh, name: str, services: Sequence[str]) -> None:
        self.credentials = mesh.pki.credentials(mesh.pki.agent(name, services))
        self.peer = Peer(mesh.relay_address, self.credentials)
        self.packets: asyncio.Queue[Packet] = asyncio.Queue()
        self._mesh = mesh
        self._requests = 0
        self._links: list[PacketLink] = []

    async def open(self, service: ServiceName = ECHO) -> control.Opened:
        """Open a session as the service's lease stands."""
        lease = await self._mesh.lease(service)
        self._requests += 1
        self.peer.say(control.Open(self._requests, service, LeaseRef(lease.ip, lease.epoch)))
        answer = await self.peer.expect_one_of(control.Opened, control.Denied, request=self._requests)
        assert isinstance(answer, control.Opened), answer
        return answer

    async def denied(self, service: ServiceName = ECHO) -> control.Denied:
        """Ask for a session that is not given."""
        self._requests += 1
        self.peer.say(control.Open(self._requests, service))
        return await self.peer.expect(control.Denied, request=self._requests)

    async def link(self, opened: control.Opened) -> PacketLink:
        """Dial the session's packet link."""
        assert opened.forwarder is not None
        made = await PacketLink.dial(
            opened.forwarder,
            opened.probe_key,
            self.credentials,
            check=lambda identity: None,
            receive=lambda link, service, packet: self.packets.put_nowait(parse(packet)),
        )
        self._links.append(made)
        return made

    async def carrier(self, opened: control.Opened) -> Carrier:
        """Dial the connector directly."""
        assert opened.link_address is not None
        address = (opened.link_address.ip, opened.link_address.port)
        return await Carrier.dial_direct(
            address, self.credentials, lambda identity: None, budget=Budget(), timeout_s=5.0
        )

    async def forwarded(self, opened: control.Opened) -> Carrier:
        """Dial in at the forwarder, as the relay allows."""
        assert opened.forwarder is not None
        self.peer.say(control.Dial(opened.session))
        token = (await self.peer.expect(control.DialToken, session=opened.session)).token
        address = (opened.forwarder.address.ip, opened.forwarder.address.port)
        return await Carrier.dial_forwarder(
            address, token, self.credentials, lambda identity: None, budget=Budget()
        )

    async def say(self, carrier: Carrier, session: SessionId, line: bytes, **changes: Any) -> bytes:
        """Open a flow of a session, say a line and return the answer. Raises FlowRefused."""
        _, program = await self.begin(carrier, session, **changes)
        with contextlib.closing(program):
            return await ask_on(program, line)

    async def begin(
        self, carrier: Carrier, session: SessionId, **changes: Any
    ) -> tuple[TcpFlow, socket.socket]:
        """Open a flow of a session; return it and its program's end. Raises FlowRefused."""
        service = changes.get("service", ECHO)
        lease = await self._mesh.lease(service)
        fields: dict[str, Any] = {
            "session": session,
            "flow": os.urandom(16).hex(),
            "service": service,
            "lease": LeaseRef(lease.ip, lease.epoch),
            "source": Address("127.0.0.1", 40_000),
            "destination": Address(str(lease.ip), 7007),
            "window": WINDOW_BYTES_MIN,
        }
        near, program = _tcp_pair()
        try:
            return await carrier.open(OpenFrame(**fields | changes), near), program
        except BaseException:
            near.close()
            program.close()
            raise

    async def udp(
        self, link: PacketLink, payload: bytes, source: tuple[str, int] = ("127.0.0.1", 5555)
    ) -> None:
        """Send one datagram of a local program to the service's virtual address."""
        lease = await self._mesh.lease(ECHO)
        link.send(ECHO, build_udp(*source, str(lease.ip), 7007, payload))

    def close(self) -> None:
        for link in self._links:
            link.close()
        self.peer.close()


def route(service: ServiceName, backend: Backend, *, protocol: Any = "tcp", port: int = 7007) -> RouteConfig:
    """A route that notices within a moment whether its backend lives."""
    return RouteConfig(
        service=service,
        backend=Endpoint("127.0.0.1", backend.port),
        port=port,
        protocol=protocol,
        checks=(PROMPT if protocol == "tcp" else CheckConfig(kind="none"),),
    )


async def ask(address: object, line: bytes, port: int = 7007) -> bytes:
    """Connect, say a line and return the answer; nothing when it was refused or cut."""
    try:
        reader, writer = await asyncio.open_connection(str(address), port)
    except ConnectionError:
        return b""
    try:
        writer.write(line)
        async with asyncio.timeout(WAIT_SECONDS):
            return await reader.readline()
    except ConnectionError:
        return b""
    finally:
        writer.close()


async def ask_on(program: socket.socket, line: bytes) -> bytes:
    """Say a line on a connected socket and return the answer."""
    loop = asyncio.get_running_loop()
    async with asyncio.timeout(WAIT_SECONDS):
        await loop.sock_sendall(program, line)
        return await loop.sock_recv(program, 4096)


@contextlib.asynccontextmanager
async def whole_mesh(directory: Path, consul: ConsulConfig, **relay_keys: Any) -> AsyncIterator[WholeMesh]:
    """Run a mesh on a Consul of its own until the block ends; a clean end of every daemon is part of the test."""
    async with ConsulClient(consul) as client, asyncio.TaskGroup() as tasks:
        mesh = WholeMesh(directory, tasks, consul, client)
        try:
            await mesh.start(**relay_keys)
            yield mesh
        finally:
            await mesh.close()


def _free_port() -> Endpoint:
    """A port that is free on TCP and UDP now."""
    while True:
        with socket.create_server(("127.0.0.1", 0)) as tcp, socket.socket(type=socket.SOCK_DGRAM) as udp:
            port = tcp.getsockname()[1]
            with contextlib.suppress(OSError):
                udp.bind(("127.0.0.1", port))
                return Endpoint("127.0.0.1", port)


def _tcp_pair() -> tuple[socket.socket, socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        near = socket.create_connection(server.getsockname())
        far, _address = server.accept()
    near.setblocking(False)
    far.setblocking(False)
    return near, far
