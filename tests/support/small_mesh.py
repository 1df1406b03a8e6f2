"""What an agent needs around it, in the test's own process: embedded Consul, a scripted relay, real connectors' ends.

The links, the forwarder, TLS and QUIC are the real ones; the relay and the connectors only do as the test says.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import random
import socket
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from ipaddress import IPv4Address, IPv4Network
from pathlib import Path

from relay.forwarder import Forwarder
from relay.splicer import Splicer
from relay.splicer import listen as listen_tcp
from sidecar.agent.daemon import body
from sidecar.link.budget import Budget
from sidecar.link.carrier import FrameStream
from sidecar.link.known import KnownFlows
from sidecar.link.listener import StreamListener
from sidecar.link.packet import PacketLink
from sidecar.link.packet_stream import PacketStream
from sidecar.link.stream import FlowRefused
from tests.support.certificates import Pki
from tests.support.fake_relay import FakeRelay, RelayPeer
from ztna import udp
from ztna.config import AgentConfig, Config, ConsulConfig, Endpoint
from ztna.consul.client import ConsulClient
from ztna.consul.embedded import EmbeddedConsul
from ztna.errors import LinkError, Refused
from ztna.identity import Identity
from ztna.jsontypes import Binary, Secret, to_json
from ztna.leases import Lease, Port, service_key
from ztna.names import ConnectorId, ServiceName, SessionId
from ztna.packet import build_udp, parse
from ztna.reasons import Reason
from ztna.runtime import Daemon
from ztna.udp import SockAddr
from ztna.wire.control import (
    Address,
    AnyMessage,
    Closed,
    Denied,
    Dial,
    DialToken,
    ForwarderBind,
    Open,
    Opened,
    UnknownMessage,
)
from ztna.wire.stream import OpenFrame, OpenStatus, PacketsFrame, ResumeFrame

WAIT_SECONDS = 15.0
PROBE_KEY = Secret(b"p" * 32)


class SmallConnector:
    """A connector's end of links: TCP goes to `backends`, UDP is answered in capitals."""

    def __init__(self, mesh: SmallMesh, name: str, services: tuple[str, ...]) -> None:
        self.id = ConnectorId(name)
        self.tls = mesh.pki.connector(name, services)
        self.credentials = mesh.pki.credentials(self.tls)
        self.fingerprint = self.credentials.identity.fingerprint
        self.refusing: list[OpenStatus] = []
        self.opens: list[OpenFrame] = []
        self.resumes: list[ResumeFrame] = []
        self.packets: list[bytes] = []
        self.packets_by_stream: list[bytes] = []
        self.asked_for_packets: list[PacketsFrame] = []
        self.backend: SockAddr | None = None
        self.links: list[PacketLink] = []
        self._listener = StreamListener(self.credentials, self, tasks=mesh.tasks, budget=Budget())
        self._mesh = mesh
        self.link_address: Address | None = Address(*self._listener.listen(("127.0.0.1", 0)))
        self.is_dead = False

    def serve(self, bind: ForwarderBind) -> None:
        link = PacketLink.serve(
            bind, PROBE_KEY, self.credentials, admit=lambda identity: None, receive=self._packet
        )
        self.links.append(link)

    async def carry(self, token: bytes, session: SessionId) -> None:
        if not self.is_dead:
            with contextlib.suppress(LinkError, Refused):
                await self._listener.carry(self._mesh.splicer.address, token, session)

    def carriers(self) -> list[FrameStream]:
        """The connector's ends of the stream carriers that stand."""
        return [carrier.frames for carrier in self._listener._carriers]

    def forget(self) -> None:
        """Break every carrier, and know nothing of flows, as after a restart."""
        self._listener.served.known = KnownFlows()
        for frames in self.carriers():
            frames.close(Reason.PEER_GONE)

    def die(self) -> None:
        """Vanish as a killed process does: sockets close, nobody is told by QUIC or the relay."""
        self.is_dead = True
        self._listener.close(Reason.PEER_GONE)
        for link in self.links:
            link.carrying.close()

    def close(self) -> None:
        self._listener.close()
        for link in self.links:
            link.close()

    def resume(self, peer: Identity, frame: ResumeFrame, service: ServiceName | None) -> None:
        self.resumes.append(frame)

    def packets(self, peer: Identity, frame: PacketsFrame) -> PacketStream:
        """Answer packets in capitals, as `_packet`."""

        def receive(data: bytes) -> None:
            self.packets_by_stream.append(data)
            packet = parse(data)
            there, here = (packet.destination, packet.destination_port), (packet.source, packet.source_port)
            stream.send(build_udp(*there, *here, packet.payload.upper()))

        self.asked_for_packets.append(frame)
        stream = PacketStream(receive, lambda: None)
        return stream

    async def open(self, peer: Identity, frame: OpenFrame) -> socket.socket:
        self.opens.append(frame)
        if self.refusing:
            raise FlowRefused(self.refusing.pop(0))
        assert self.backend is not None
        sock = socket.socket()
        sock.setblocking(False)
        await asyncio.get_running_loop().sock_connect(sock, self.backend)
        return sock

    def _packet(self, link: PacketLink, service: ServiceName, data: bytes) -> None:
        self.packets.append(data)
        packet = parse(data)
        there, here = (packet.destination, packet.destination_port), (packet.source, packet.source_port)
        link.send(service, build_udp(*there, *here, packet.payload.upper()))


@dataclass
class SmallMesh:
    """`connectors` are offered in order, the first that is not dead or left out."""

    pki: Pki
    tasks: asyncio.TaskGroup
    relay: FakeRelay
    consul: EmbeddedConsul
    client: ConsulClient
    forwarder: Forwarder
    splicer: Splicer
    pool: IPv4Network
    connectors: list[SmallConnector] = field(default_factory=list)
    heard: list[AnyMessage | UnknownMessage] = field(default_factory=list)
    opens: list[Open] = field(default_factory=list)
    denying: list[Reason] = field(default_factory=list)
    peer: RelayPeer | None = None
    ready: asyncio.Event = field(default_factory=asyncio.Event)
    _sessions: dict[SessionId, SmallConnector] = field(default_factory=dict)
    _numbers: itertools.count[int] = field(default_factory=lambda: itertools.count(1))
    _binds: dict[tuple[int, str], ForwarderBind] = field(default_factory=dict)

    def connector(self, name: str = "c1", services: tuple[str, ...] = ("echo-service",)) -> SmallConnector:
        made = SmallConnector(self, name, services)
        self.connectors.append(made)
        return made

    async def lease(self, service: str, number: int, *ports: Port, epoch: int = 1) -> IPv4Address:
        ip = self.pool[number]
        lease = Lease(ip, epoch, ports)
        await self.client.kv_put(service_key(ServiceName(service)), to_json(lease))
        return ip

    def say(self, message: AnyMessage) -> None:
        assert self.peer is not None
        self.peer.say(message)

    def close_session(self, number: int, reason: Reason) -> None:
        self.say(Closed(SessionId(f"{number:016x}"), reason))

    def restart_relay(self) -> None:
        """End its connection and have its forwarder forget every binding."""
        assert self.peer is not None
        for key in self._binds:
            self.forwarder.remove_link(key)
        self._binds.clear()
        self.peer.connection.close(0, "server shutting down")

    async def run(self) -> None:
        """Do a relay's part for one agent connection after another."""
        while True:
            self.peer = await self.relay.peers.get()
            self.ready.set()
            serving = self.tasks.create_task(self._serve(self.peer))
            await self.peer.connection.closed
            serving.cancel()

    async def _serve(self, peer: RelayPeer) -> None:
        while True:
            message = await peer.messages.get()
            self.heard.append(message)
            if isinstance(message, Open):
                self.opens.append(message)
                peer.say(self._open(peer, message))
            elif isinstance(message, Dial):
                token = Secret(os.urandom(32))
                self.splicer.admit_agent(message.session, token)
                peer.say(DialToken(message.session, token))

    def _open(self, peer: RelayPeer, message: Open) -> AnyMessage:
        if self.denying:
            return Denied(message.request, message.service, self.denying.pop(0))
        if any(each.is_dead and each.id == message.connector_id for each in self.connectors):
            return Denied(message.request, message.service, Reason.PEER_GONE)
        connector = next(
            (
                each
                for each in self.connectors
                if not each.is_dead and message.connector_id in (None, each.id)
            ),
            None,
        )
        if connector is None:
            return Denied(message.request, message.service, Reason.NO_HEALTHY_CONNECTOR)
        session = SessionId(f"{next(self._numbers):016x}")
        self._sessions[session] = connector
        return Opened(
            message.request,
            session,
            message.service,
            connector.id,
            connector.fingerprint,
            connector.link_address,
            self._bind(peer, connector),
            PROBE_KEY,
        )

    def _bind(self, peer: RelayPeer, connector: SmallConnector) -> ForwarderBind:
        key = (id(peer), str(connector.id))
        if key not in self._binds:
            address = Address(*self.forwarder.address)
            ours, theirs = (
                ForwarderBind(address, Binary(os.urandom(16)), Secret(os.urandom(32))) for _ in range(2)
            )
            self.forwarder.add_link(
                key, (bytes(ours.bind_id), ours.bind_secret), (bytes(theirs.bind_id), theirs.bind_secret)
            )
            connector.serve(theirs)
            self._binds[key] = ours
        return self._binds[key]

    def agent_waits(self, session: SessionId, waiter: int) -> None:
        token = os.urandom(32)
        self.splicer.admit_connector(session, waiter, token)
        self.tasks.create_task(self._sessions[session].carry(token, session))


class _Done(Exception):
    pass


@contextlib.asynccontextmanager
async def small_mesh(directory: Path) -> AsyncIterator[SmallMesh]:
    """Start everything but the agent; end it all, whatever happened."""
    pki = Pki(directory)
    relay = FakeRelay(pki)
    consul = await EmbeddedConsul.start()
    forwarder, listener = _forwarder_ports()
    splicer = Splicer(listener, lambda session, waiter: mesh.agent_waits(session, waiter))
    pool = IPv4Network((f"127.{random.randrange(110, 250)}.{random.randrange(256)}.0", 24))
    try:
        async with ConsulClient(ConsulConfig(address=consul.address)) as client:
            try:
                async with asyncio.TaskGroup() as tasks:
                    mesh = SmallMesh(pki, tasks, relay, consul, client, forwarder, splicer, pool)
                    tasks.create_task(mesh.run())
                    yield mesh
                    for connector in mesh.connectors:
                        connector.close()
                    raise _Done
            except* _Done:
                pass
    finally:
        splicer.close()
        forwarder.close()
        relay.close()
        await consul.stop()


@contextlib.asynccontextmanager
async def agent(
    mesh: SmallMesh,
    services: tuple[str, ...] = ("echo-service",),
    *,
    direct: bool = True,
    crl: bool = False,
    **settings: object,
) -> AsyncIterator[Daemon]:
    """Run a whole agent beside the mesh until the block ends; its clean end is part of the test."""
    tls = mesh.pki.agent("agent-1", services)
    own = AgentConfig(
        tls=mesh.pki.with_crl(tls) if crl else tls,
        relays=(mesh.relay.target,),
        pool=mesh.pool,
        direct=direct,
        drain_s=0.5,
        admin=Endpoint("127.0.0.1", 0),
        **settings,
    )
    config = Config(consul=ConsulConfig(address=mesh.consul.address), agent=own)
    async with asyncio.TaskGroup() as tasks:
        daemon = Daemon("agent", config, tasks)
        running = tasks.create_task(body(daemon))
        async with asyncio.timeout(WAIT_SECONDS):
            while not (running.done() or (daemon.readiness.ready and daemon.status_sources)):
                await asyncio.sleep(0.01)
        try:
            yield daemon
        finally:
            daemon.stopping.set()


def _forwarder_ports() -> tuple[Forwarder, socket.socket]:
    """One port number, UDP and TCP."""
    for _ in range(20):
        raw = udp.RawSocket.open(("127.0.0.1", 0))
        # Before there is a forwarder: the loop would go on to watch the descriptor of one whose socket is closed here,
        # and the next socket, which gets that number, would never be heard.
        try:
            listener = listen_tcp(raw.address)
        except Exception:
            raw.close()
        else:
            return Forwarder(raw), listener
    raise AssertionError("no port is free both ways")
