"""The whole connector: embedded Consul, a scripted relay, a real forwarder, backends and agents on loopback."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from ipaddress import IPv4Address
from pathlib import Path
from typing import Any

import pytest

from relay.forwarder import Forwarder
from relay.splicer import Splicer
from relay.splicer import listen as listen_tcp
from sidecar.connector import serving
from sidecar.connector.daemon import body
from sidecar.link.budget import Budget
from sidecar.link.packet import PacketLink
from sidecar.link.stream import Carrier, FlowRefused
from tests.support.certificates import Pki
from tests.support.consul import free_ports
from tests.support.fake_relay import FakeRelay, RelayPeer, fake_relay
from ztna import udp
from ztna.config import (
    CheckConfig,
    Config,
    ConnectorConfig,
    ConsulConfig,
    Endpoint,
    RouteConfig,
    TlsConfig,
)
from ztna.consul.client import ConsulClient
from ztna.consul.embedded import EmbeddedConsul
from ztna.credentials import Credentials
from ztna.errors import ConfigError, IdentityError, LinkError, Refused
from ztna.identity import Identity
from ztna.jsontypes import Binary, Secret, to_json
from ztna.leases import Lease, service_key
from ztna.names import ConnectorId, ServiceName, SessionId
from ztna.packet import PROTOCOL_ICMP, Packet, build_echo_request, build_udp, parse
from ztna.reasons import Reason
from ztna.revocation import Revocations
from ztna.runtime import Daemon
from ztna.telemetry import REFUSALS
from ztna.wire.control import (
    Accepted,
    Address,
    CandidateAnswer,
    CandidateOffer,
    Carry,
    Closed,
    Drain,
    ForwarderBind,
    Health,
    LeaseRef,
    Offered,
    PeerIdentity,
    Register,
    StartPunching,
)
from ztna.wire.control import Refused as ServiceRefused
from ztna.wire.stream import WINDOW_BYTES_MIN, OpenFrame, OpenStatus

WAIT_SECONDS = 15.0
ECHO, DOWN = ServiceName("echo-service"), ServiceName("down-service")
PORT = 7
LEASE = Lease(IPv4Address("127.100.0.2"), 7)
CURRENT = LeaseRef(LEASE.ip, LEASE.epoch)
FIRST, SECOND = SessionId("0" * 15 + "1"), SessionId("0" * 15 + "2")


class _Over(Exception):
    """The test is done."""


async def until(what: str, found: Callable[[], object]) -> None:
    try:
        async with asyncio.timeout(WAIT_SECONDS):
            while not found():
                await asyncio.sleep(0.01)
    except TimeoutError:
        raise AssertionError(f"never: {what}") from None


def refusals(reason: Reason) -> float:
    value: float = REFUSALS.labels("connector", reason.value)._value.get()
    return value


@pytest.fixture(scope="module")
def pki(tmp_path_factory: pytest.TempPathFactory) -> Pki:
    return Pki(Path(tmp_path_factory.mktemp("pki")))


class Backends:
    """TCP and UDP echo on one port number; the TCP side can die."""

    def __init__(self) -> None:
        self.server: asyncio.Server | None = None
        self.port = 0
        self._udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._udp.setblocking(False)
        self._writers: set[asyncio.StreamWriter] = set()

    async def start(self) -> None:
        is_first, self.port = not self.port, self.port or free_ports(1)[0]
        self.server = await asyncio.start_server(self._echo, "127.0.0.1", self.port)
        if is_first:
            self._udp.bind(("127.0.0.1", self.port))
            asyncio.get_running_loop().add_reader(self._udp.fileno(), self._echo_datagram)

    def stop(self) -> None:
        if self.server is not None:
            self.server.close()

    def close(self) -> None:
        self.stop()
        for writer in self._writers:
            writer.close()
        asyncio.get_running_loop().remove_reader(self._udp.fileno())
        self._udp.close()

    async def _echo(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.add(writer)
        with contextlib.suppress(ConnectionError):
            while data := await reader.read(65_536):
                writer.write(data)
                await writer.drain()
        writer.close()

    def _echo_datagram(self) -> None:
        with contextlib.suppress(OSError):
            payload, address = self._udp.recvfrom(65_535)
            self._udp.sendto(payload, address)


class Ground:
    """One connector and everything around it."""

    def __init__(
        self, pki: Pki, daemon: Daemon, relay: FakeRelay, consul: ConsulClient, backends: Backends
    ) -> None:
        self.pki = pki
        self.daemon = daemon
        self.relay = relay
        self.consul = consul
        self.backends = backends
        self.agent = pki.credentials(pki.agent("ann", [ECHO, DOWN]))
        self.budget = Budget()
        self.peer: RelayPeer
        self.register: Register

    @property
    def status(self) -> dict[str, Any]:
        found = self.daemon.status_sources["connector"]()
        assert isinstance(found, dict)
        return found

    def verdict(self, service: str = ECHO) -> str:
        return str(self.status["services"][service]["verdict"])

    async def lease(self, lease: Lease = LEASE, service: ServiceName = ECHO) -> None:
        await self.consul.kv_put(service_key(service), to_json(lease))

    async def leased(self, lease: Lease = LEASE) -> None:
        """Write the lease and wait until the connector knows."""
        await self.lease(lease)
        await until("the lease is known", lambda: self.status["services"][ECHO]["lease"] == lease)

    def offer(
        self,
        session: SessionId = FIRST,
        service: ServiceName = ECHO,
        lease: LeaseRef | None = CURRENT,
        *,
        agent: Identity | None = None,
        forwarder: ForwarderBind | None = None,
        v1: bool = False,
    ) -> None:
        identity = agent or self.agent.identity
        self.peer.say(
            Offered(
                session,
                service,
                PeerIdentity(identity.name, identity.fingerprint),
                lease,
                forwarder,
                Secret(b"p" * 32),
                v1,
            )
        )

    async def accepted(self, session: SessionId = FIRST, **offer: Any) -> None:
        self.offer(session, **offer)
        assert await self.peer.heard(Accepted) == Accepted(session)

    async def refused(self, reason: Reason, **offer: Any) -> None:
        self.offer(**offer)
        closed = await self.peer.heard(Closed)
        assert isinstance(closed, Closed) and closed.reason is reason

    def frame(self, session: SessionId = FIRST, **changes: Any) -> OpenFrame:
        fields: dict[str, Any] = {
            "session": session,
            "flow": os.urandom(16).hex(),
            "service": ECHO,
            "lease": CURRENT,
            "source": Address("127.0.0.1", 40_000),
            "destination": Address(str(LEASE.ip), PORT),
            "window": WINDOW_BYTES_MIN,
        }
        return OpenFrame(**fields | changes)

    async def open(self, frame: OpenFrame, credentials: Credentials | None = None) -> socket.socket:
        """Open a flow directly; return the local program's end of it."""
        link = self.register.link_address
        assert link is not None
        carrier = await Carrier.dial_direct(
            (link.ip, link.port),
            credentials or self.agent,
            lambda identity: None,
            budget=self.budget,
            timeout_s=5.0,
        )
        near, program = tcp_pair()
        try:
            await carrier.open(frame, near)
        except BaseException:
            near.close()
            program.close()
            raise
        return program

    async def status_of(self, frame: OpenFrame, credentials: Credentials | None = None) -> OpenStatus:
        with pytest.raises(FlowRefused) as refused:
            await self.open(frame, credentials)
        return refused.value.status


def tcp_pair() -> tuple[socket.socket, socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        near = socket.create_connection(server.getsockname())
        far, _address = server.accept()
    near.setblocking(False)
    far.setblocking(False)
    return near, far


async def says(program: socket.socket, data: bytes) -> bytes:
    loop = asyncio.get_running_loop()
    async with asyncio.timeout(WAIT_SECONDS):
        await loop.sock_sendall(program, data)
        return await loop.sock_recv(program, 1000)


async def ended(program: socket.socket) -> bool:
    with contextlib.suppress(ConnectionResetError):
        async with asyncio.timeout(WAIT_SECONDS):
            return await asyncio.get_running_loop().sock_recv(program, 1000) == b""
    return True


def config(
    tls: TlsConfig, relay: FakeRelay, consul: str, backends: Backends, allow_v1: bool = False, **changes: Any
) -> Config:
    check, unchecked = CheckConfig(interval_s=0.1, timeout_s=1.0), CheckConfig(kind="none")
    alive, dead = Endpoint("127.0.0.1", backends.port), Endpoint("127.0.0.1", 1)
    fields: dict[str, Any] = {
        "id": ConnectorId("connector-1"),
        "tls": tls,
        "relays": (relay.target,),
        "routes": (
            RouteConfig(service=ECHO, backend=alive, port=PORT, checks=(check,)),
            RouteConfig(
                service=ECHO, backend=alive, port=PORT, protocol="udp", checks=(unchecked,), allow_v1=allow_v1
            ),
            RouteConfig(service=ECHO, backend=dead, port=8, checks=(unchecked,)),
            RouteConfig(service=ECHO, backend=dead, port=9, protocol="udp", checks=(unchecked,)),
            RouteConfig(service=DOWN, backend=dead, port=80, checks=(check,)),
        ),
        "link": Endpoint("127.0.0.1", 0),
        "drain_s": 0.3,
    }
    return Config(consul=ConsulConfig(address=consul), connector=ConnectorConfig(**fields | changes))


@asynccontextmanager
async def connector(
    pki: Pki, *, allow_v1: bool = False, crl: bool = False, drain_s: float = 0.3
) -> AsyncIterator[Ground]:
    consul, backends = await EmbeddedConsul.start(), Backends()
    await backends.start()
    try:
        async with (
            fake_relay(pki) as relay,
            ConsulClient(ConsulConfig(address=consul.address)) as client,
            asyncio.TaskGroup() as tasks,
        ):
            tls = pki.connector("connector-1", [ECHO, DOWN])
            if crl:
                pki.revoke()
                tls = pki.with_crl(tls)
            daemon = Daemon(
                "test", config(tls, relay, consul.address, backends, allow_v1, drain_s=drain_s), tasks
            )
            running = tasks.create_task(body(daemon))
            ground = Ground(pki, daemon, relay, client, backends)
            ground.peer = await relay.peer()
            register = await ground.peer.heard(Register)
            assert isinstance(register, Register)
            ground.register = register
            await until("ready", lambda: daemon.readiness.ready)
            await until("passing", lambda: ground.verdict() == "passing")
            yield ground
            daemon.stopping.set()
            async with asyncio.timeout(WAIT_SECONDS):
                await running
            assert await client.agent_services() == {}
            raise _Over
    except* _Over:
        pass
    finally:
        backends.close()
        await consul.stop()


async def test_registers_with_relay_and_consul(pki: Pki) -> None:
    async with connector(pki) as ground:
        register = ground.register
        assert register.connector_id == "connector-1"
        assert {each.name: len(each.ports) for each in register.services} == {ECHO: 4, DOWN: 1}
        assert register.link_address is not None and register.link_address.ip == "127.0.0.1"
        services = await ground.consul.agent_services()
        assert set(services) == {f"{ECHO}@connector-1", f"{DOWN}@connector-1"}
        assert services[f"{ECHO}@connector-1"].port == register.link_address.port
        ground.peer.say(ServiceRefused(DOWN, Reason.NO_GRANT))
        ground.peer.say(Drain(5.0))
        ground.peer.say(Health(ECHO, "passing"))
        await until("the refusal shows", lambda: ground.status["relays"][0]["refused"] == {DOWN: "no_grant"})


async def test_an_agent_whose_certificate_fell_is_refused_for_as_long_as_it_does_not_stand(pki: Pki) -> None:
    """A clock that was days ahead bars nobody once it is right."""
    async with connector(pki) as ground:
        await ground.leased()
        serving = ground.daemon.status_sources["connector"].__self__._serving  # type: ignore[attr-defined]
        expired = replace(ground.agent.identity, not_after=datetime(2020, 1, 1, tzinfo=UTC))
        serving.peer_refused(expired, IdentityError(Reason.EXPIRED, "ann"))
        await ground.refused(Reason.EXPIRED)
        serving.peer_refused(ground.agent.identity, IdentityError(Reason.EXPIRED, "ann"))
        await ground.accepted(SECOND)


async def test_offers(pki: Pki) -> None:
    async with connector(pki) as ground:
        await ground.refused(Reason.POLICY_UNKNOWN)
        ground.offer()
        await ground.lease()  # within the second that the connector reads again
        assert await ground.peer.heard(Accepted) == Accepted(FIRST)
        await ground.refused(Reason.MALFORMED)
        await ground.refused(Reason.STALE_EPOCH, session=SECOND, lease=LeaseRef(LEASE.ip, 6))
        await ground.refused(Reason.STALE_EPOCH, session=SECOND, lease=None)
        await ground.refused(Reason.NO_SUCH_SERVICE, session=SECOND, service=ServiceName("other"))
        await ground.refused(Reason.NO_HEALTHY_CONNECTOR, session=SECOND, service=DOWN)
        await ground.refused(Reason.NO_GRANT, session=SECOND, v1=True)
        assert ground.status["sessions_total"] == 1


async def test_what_is_not_its_session_has_no_effect(pki: Pki) -> None:
    async with connector(pki) as ground:
        await ground.leased()
        await ground.accepted()
        before = refusals(Reason.NOT_YOUR_SESSION)
        ground.peer.say(Closed(SECOND, Reason.CLOSED_BY_PEER))
        ground.peer.say(Carry(SECOND, Secret(b"t" * 32)))
        ground.peer.say(CandidateOffer(SECOND, ()))
        ground.peer.say(StartPunching(SECOND, ()))
        ground.peer.say(CandidateOffer(FIRST, (Address("127.0.0.1", 1),)))
        assert await ground.peer.heard(CandidateAnswer) == CandidateAnswer(FIRST, ())
        assert refusals(Reason.NOT_YOUR_SESSION) == before + 4
        ground.peer.say(Carry(FIRST, Secret(b"t" * 32)))  # no forwarder was offered
        ground.peer.say(StartPunching(FIRST, (), delay_ms=0))
        assert await says(await ground.open(ground.frame()), b"still there") == b"still there"


async def test_tcp_flows_and_why_not(pki: Pki) -> None:
    async with connector(pki) as ground:
        await ground.leased()
        await ground.accepted()
        program = await ground.open(ground.frame())
        assert await says(program, b"hello") == b"hello"
        assert ground.status["tcp_flows"] == 1
        stranger = ground.pki.credentials(ground.pki.agent("bob", [ECHO]))
        for frame, credentials, status in (
            (ground.frame(SECOND), None, OpenStatus.DENIED),
            (ground.frame(service=DOWN), None, OpenStatus.DENIED),
            (ground.frame(), stranger, OpenStatus.DENIED),
            (ground.frame(lease=LeaseRef(LEASE.ip, 6)), None, OpenStatus.STALE_EPOCH),
            (ground.frame(lease=LeaseRef(LEASE.ip, 8)), None, OpenStatus.DENIED),
            (ground.frame(destination=Address("127.0.0.1", PORT)), None, OpenStatus.STALE_EPOCH),
            (ground.frame(destination=Address(str(LEASE.ip), 22)), None, OpenStatus.REFUSED),
            (ground.frame(destination=Address(str(LEASE.ip), 8)), None, OpenStatus.REFUSED),
        ):
            assert await ground.status_of(frame, credentials) is status
        # A session that ends takes its flows along, and nothing new begins under it.
        ground.peer.say(Closed(FIRST, Reason.REVOKED))
        assert await ended(program)
        assert await ground.status_of(ground.frame()) is OpenStatus.DENIED


async def test_dials_in_at_the_forwarder(pki: Pki) -> None:
    async with connector(pki) as ground:
        await ground.leased()

        def waits(session: SessionId, waiter: int) -> None:
            token = os.urandom(32)
            splicer.admit_connector(session, waiter, token)
            ground.peer.say(Carry(session, Secret(token)))

        splicer = Splicer(listen_tcp(("127.0.0.1", 0)), waits)
        bind = ForwarderBind(Address(*splicer.address), Binary(os.urandom(16)), Secret(os.urandom(32)))
        try:
            await ground.accepted(forwarder=bind)
            token = os.urandom(32)
            splicer.admit_agent(FIRST, token)
            carrier = await Carrier.dial_forwarder(
                splicer.address, token, ground.agent, lambda identity: None, budget=ground.budget
            )
            near, program = tcp_pair()
            await carrier.open(ground.frame(), near)
            assert await says(program, b"spliced") == b"spliced"
            # A token that the forwarder does not know: tried, and nothing more.
            ground.peer.say(Carry(FIRST, Secret(b"t" * 32)))
            assert await says(program, b"still spliced") == b"still spliced"
            ground.peer.say(Closed(FIRST, Reason.CLOSED_BY_PEER))
            assert await ended(program)
        finally:
            splicer.close()


async def test_a_relay_makes_it_dial_no_more_than_so_often_at_once(
    pki: Pki, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serving, "CARRYING_MAX", 2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        async with connector(pki) as ground:
            await ground.leased()
            bind = ForwarderBind(
                Address(*silent.getsockname()), Binary(os.urandom(16)), Secret(os.urandom(32))
            )
            await ground.accepted(forwarder=bind)
            before = refusals(Reason.LIMIT_REACHED)
            for number in range(5):
                ground.peer.say(Carry(FIRST, Secret(bytes([number]) * 32)))
            await until("refused", lambda: refusals(Reason.LIMIT_REACHED) == before + 3)


async def test_a_peer_that_is_gone_leaves_its_flows_alone(pki: Pki) -> None:
    async with connector(pki) as ground:
        await ground.leased()
        await ground.accepted()
        program = await ground.open(ground.frame())
        ground.peer.connection.close(0, "server shutting down")
        ground.peer = await ground.relay.peer()
        await ground.peer.heard(Register)
        assert [each["state"] for each in ground.status["sessions"]] == ["detached"]
        assert await says(program, b"direct") == b"direct"
        assert await ground.status_of(ground.frame()) is OpenStatus.DENIED
        # The agent comes back too; its new session ends later, and with it what it had opened before.
        await ground.accepted(SECOND)
        ground.peer.say(Closed(SECOND, Reason.CLOSED_BY_PEER))
        assert await ended(program)


async def test_another_lease_ends_the_sessions_and_not_the_tcp_flows(pki: Pki) -> None:
    async with connector(pki) as ground:
        await ground.leased()
        await ground.accepted()
        program = await ground.open(ground.frame())
        moved = Lease(IPv4Address("127.100.0.3"), 8)
        await ground.lease(moved)
        assert await ground.peer.heard(Closed) == Closed(FIRST, Reason.STALE_EPOCH)
        assert await says(program, b"may finish") == b"may finish"
        await ground.accepted(SECOND, lease=LeaseRef(moved.ip, moved.epoch))
        async with asyncio.timeout(WAIT_SECONDS):
            while True:
                virtual = (await ground.consul.agent_services())[f"{ECHO}@connector-1"].tagged_addresses
                if "virtual" in virtual and virtual["virtual"].address == str(moved.ip):
                    break
                await asyncio.sleep(0.01)


async def test_health_follows_the_backend(pki: Pki) -> None:
    async with connector(pki) as ground:
        await ground.leased()
        ground.backends.stop()
        await until("critical", lambda: ground.verdict() == "critical")

        async def consul_says(status: str) -> None:
            async with asyncio.timeout(WAIT_SECONDS):
                while [each.status for each in await ground.consul.service_instances(ECHO)] != [status]:
                    await asyncio.sleep(0.01)

        await consul_says("critical")
        await ground.refused(Reason.NO_HEALTHY_CONNECTOR)
        await ground.backends.start()
        await consul_says("passing")
        await ground.accepted()


class UdpAgent:
    """An agent on a packet link through a real forwarder."""

    def __init__(self, ground: Ground) -> None:
        self.forwarder = Forwarder(udp.RawSocket.open(("127.0.0.1", 0)))
        self.packets: asyncio.Queue[Packet] = asyncio.Queue()
        self._ground = ground
        address = Address(*self.forwarder.address)
        self.near, self.far = (
            ForwarderBind(address, Binary(os.urandom(16)), Secret(os.urandom(32))) for _ in range(2)
        )
        self.forwarder.add_link(
            "link",
            (bytes(self.near.bind_id), self.near.bind_secret),
            (bytes(self.far.bind_id), self.far.bind_secret),
        )
        self.link: PacketLink

    async def dial(self, credentials: Credentials | None = None) -> None:
        self.link = await PacketLink.dial(
            self.near,
            Secret(b"p" * 32),
            credentials or self._ground.agent,
            check=lambda identity: None,
            receive=lambda link, service, packet: self.packets.put_nowait(parse(packet)),
        )

    def send(
        self, payload: bytes, *, port: int = PORT, to: str = str(LEASE.ip), service: ServiceName = ECHO
    ) -> None:
        self.link.send(service, build_udp("127.0.0.1", 40_000, to, port, payload))

    async def packet(self) -> Packet:
        async with asyncio.timeout(WAIT_SECONDS):
            return await self.packets.get()

    async def echo(self, payload: bytes) -> None:
        self.send(payload)
        reply = await self.packet()
        assert (reply.payload, reply.source, reply.source_port) == (payload, str(LEASE.ip), PORT)


@asynccontextmanager
async def udp_agent(ground: Ground, session: SessionId = FIRST) -> AsyncIterator[UdpAgent]:
    agent = UdpAgent(ground)
    await ground.accepted(session, forwarder=agent.far)
    await agent.dial()
    try:
        yield agent
    finally:
        agent.link.close()
        agent.forwarder.close()


async def test_udp_flows(pki: Pki) -> None:
    async with connector(pki) as ground:
        await ground.leased()
        async with udp_agent(ground) as agent:
            for number in range(20):
                await agent.echo(b"datagram %d" % number)
            assert ground.status["udp_flows"] == 1
            assert ground.status["links"] == [
                {"relay": "relay-1", "agent": "spiffe://ztna/ann", "path": "forwarded"}
            ]
            # Whatever must not pass: another service, another address, no packet, pings that no route takes.
            agent.send(b"x", service=DOWN)
            agent.send(b"x", to="127.100.0.9")
            agent.link.send(ECHO, b"no packet")
            agent.link.send(ECHO, build_echo_request("127.0.0.1", str(LEASE.ip), 1, 1, b""))
            error = await agent.packet()
            assert (error.protocol, error.icmp_type, error.icmp_code) == (PROTOCOL_ICMP, 3, 13)
            await agent.echo(b"and on")
            assert ground.status["udp_flows"] == 1
            for port in (10, 9):  # not published; a backend that is not there
                agent.send(b"x", port=port)
                error = await agent.packet()
                assert (error.protocol, error.icmp_type, error.icmp_code) == (PROTOCOL_ICMP, 3, 3)


class V1Legs:
    """The relay's end of what v1 agents send: packets in sessions, not sealed."""

    def __init__(self, ground: Ground) -> None:
        self._ground = ground

    def send(self, session: SessionId, payload: bytes, port: int = PORT, to: str = "10.9.9.9") -> None:
        packet = build_udp("192.0.2.1", 40_000, to, port, payload)
        self.send_packet(session, packet)

    def send_packet(self, session: SessionId, packet: bytes) -> None:
        self._ground.peer.connection.send_datagram(b"\x2e" + session.to_bytes() + packet)

    async def packet(self, session: SessionId) -> Packet:
        async with asyncio.timeout(WAIT_SECONDS):
            data = await self._ground.peer.datagrams.get()
        assert data[:9] == b"\x2e" + session.to_bytes()
        return parse(data[9:])

    async def echo(self, session: SessionId, payload: bytes) -> None:
        self.send(session, payload)
        reply = await self.packet(session)
        assert (reply.payload, reply.source, reply.source_port) == (payload, "10.9.9.9", PORT)


async def test_v1_sessions_need_no_lease_and_no_link(pki: Pki) -> None:
    async with connector(pki, allow_v1=True) as ground:
        legs = V1Legs(ground)
        await ground.accepted(v1=True, lease=None)
        await ground.accepted(SECOND, v1=True, lease=None)
        for number in range(20):
            await legs.echo(FIRST, b"first %d" % number)
            await legs.echo(SECOND, b"second %d" % number)
        # Two agents with one inner address and port: a flow each.
        assert ground.status["udp_flows"] == 2 and ground.status["links"] == []
        for port in (10, 9):  # not published; published, but not for v1
            legs.send(FIRST, b"x", port=port)
            error = await legs.packet(FIRST)
            assert (error.protocol, error.icmp_type, error.icmp_code) == (PROTOCOL_ICMP, 3, 3)
        legs.send_packet(FIRST, b"no packet")
        await legs.echo(FIRST, b"and on")


async def test_v1_packets_are_taken_in_v1_sessions_only(pki: Pki) -> None:
    async with connector(pki, allow_v1=True) as ground:
        await ground.leased()
        legs = V1Legs(ground)
        await ground.accepted(FIRST)
        await ground.accepted(SECOND, v1=True, lease=None)
        before = refusals(Reason.NOT_YOUR_SESSION)
        legs.send(FIRST, b"forged", to=str(LEASE.ip))
        legs.send(SessionId("f" * 16), b"no such session")
        await legs.echo(SECOND, b"hello")
        assert refusals(Reason.NOT_YOUR_SESSION) == before + 2
        # And nothing else is taken in a v1 session.
        assert await ground.status_of(ground.frame(SECOND)) is OpenStatus.DENIED
        assert await says(await ground.open(ground.frame(FIRST)), b"hi") == b"hi"


async def test_a_v1_session_with_a_link_is_a_lie(pki: Pki) -> None:
    async with connector(pki, allow_v1=True) as ground:
        bind = ForwarderBind(Address("127.0.0.1", 9), Binary(b"b" * 16), Secret(b"s" * 32))
        await ground.refused(Reason.MALFORMED, v1=True, forwarder=bind)


async def test_v1_sessions_outlive_another_lease(pki: Pki) -> None:
    async with connector(pki, allow_v1=True) as ground:
        await ground.leased()
        await ground.accepted(FIRST)
        await ground.accepted(SECOND, v1=True, lease=None)
        await ground.leased(Lease(IPv4Address("127.100.0.3"), 8))
        assert await ground.peer.heard(Closed) == Closed(FIRST, Reason.STALE_EPOCH)
        await V1Legs(ground).echo(SECOND, b"named, not addressed")


async def test_the_end_of_the_last_session_ends_the_link(pki: Pki) -> None:
    async with connector(pki) as ground:
        await ground.leased()
        async with udp_agent(ground) as agent:
            await agent.echo(b"hello")
            ground.peer.say(Closed(FIRST, Reason.CLOSED_BY_PEER))
            async with asyncio.timeout(WAIT_SECONDS):
                await agent.link.closed
            await until(
                "flow and link are gone",
                lambda: not ground.status["links"] and not ground.status["udp_flows"],
            )


async def test_a_flow_goes_on_in_whichever_session_its_link_has_for_the_service(pki: Pki) -> None:
    async with connector(pki) as ground:
        await ground.leased()
        async with udp_agent(ground) as agent:
            await agent.echo(b"in the first")
            await ground.accepted(SECOND, forwarder=agent.far)
            await agent.echo(b"in the newer one")
            assert ground.status["udp_flows"] == 1, "the same flow, and no second one"
            ground.peer.say(Closed(SECOND, Reason.CLOSED_BY_PEER))
            await until("ended", lambda: len(ground.status["sessions"]) == 1)
            await agent.echo(b"in the first again")
            assert ground.status["udp_flows"] == 1 and ground.status["links"]


async def test_a_detached_session_goes_on_but_begins_nothing(pki: Pki) -> None:
    async with connector(pki) as ground:
        await ground.leased()
        async with udp_agent(ground) as agent:
            await agent.echo(b"before")
            ground.peer.say(Closed(FIRST, Reason.PEER_GONE))
            await until("detached", lambda: ground.status["sessions"][0]["state"] == "detached")
            await agent.echo(b"after")
            before = refusals(Reason.NOT_YOUR_SESSION)
            agent.link.send(ECHO, build_udp("127.0.0.1", 40_001, str(LEASE.ip), PORT, b"new"))
            await until("refused", lambda: refusals(Reason.NOT_YOUR_SESSION) == before + 1)


async def test_a_link_is_for_the_agent_of_its_session(pki: Pki) -> None:
    async with connector(pki) as ground:
        await ground.leased()
        agent = UdpAgent(ground)
        try:
            await ground.accepted(forwarder=agent.far)
            with pytest.raises((LinkError, Refused)):
                await agent.dial(pki.credentials(pki.agent("bob", [ECHO])))
            with pytest.raises((LinkError, Refused)):
                await agent.dial(pki.credentials(pki.agent("ann", [ECHO])))
            await agent.dial()
            await agent.echo(b"the right one")
            agent.link.close()
        finally:
            agent.forwarder.close()


async def test_draining_takes_nothing_new_and_tells_everybody(pki: Pki) -> None:
    async with connector(pki) as ground:
        await ground.leased()
        await ground.accepted()
        program = await ground.open(ground.frame())
        ground.daemon.stopping.set()
        told = await ground.peer.heard(Register)
        assert isinstance(told, Register)
        assert told.services == () and set(told.withdrawn) == {ECHO, "down-service"}, "before anything ends"
        assert await ground.peer.heard(Closed) == Closed(FIRST, Reason.DRAINING)
        assert await ended(program)


async def test_flows_are_taken_until_agents_have_heard_that_it_drains(
    pki: Pki, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sidecar.connector.draining.HANDOVER_SECONDS", 4.0)
    async with connector(pki, drain_s=5.0) as ground:
        await ground.leased()
        await ground.accepted()
        ground.daemon.stopping.set()
        await ground.peer.heard(Register)
        assert await says(await ground.open(ground.frame()), b"begun late") == b"begun late"


async def test_reload_takes_new_certificates(pki: Pki) -> None:
    async with connector(pki) as ground:
        await ground.leased()
        await ground.accepted()
        for reload in ground.daemon.on_reload:
            reload()
        assert await says(await ground.open(ground.frame()), b"hello") == b"hello"


async def test_a_revoked_agent_loses_its_flows_and_sessions_and_gets_no_more(pki: Pki) -> None:
    tls = pki.agent("mallory", [ECHO])
    mallory = pki.credentials(tls)
    async with connector(pki, crl=True) as ground:
        await ground.leased()
        await ground.accepted(agent=mallory.identity)
        await ground.accepted(SECOND)
        program = await ground.open(ground.frame(), mallory)
        other = await ground.open(ground.frame(SECOND))
        assert await says(program, b"hello") == b"hello"
        pki.revoke(tls)
        assert await ended(program)
        assert await ground.peer.heard(Closed) == Closed(FIRST, Reason.REVOKED)
        assert await says(other, b"still here") == b"still here"
        await ground.refused(Reason.REVOKED, session=SessionId("0" * 15 + "3"), agent=mallory.identity)
        with pytest.raises(LinkError):
            await ground.open(ground.frame(), mallory)


async def test_a_flow_is_denied_from_the_moment_that_the_certificate_falls(pki: Pki) -> None:
    """Also on a carrier that stands, before it is that carrier's turn to be ended."""
    tls = pki.agent("mallory", [ECHO])
    mallory = pki.credentials(tls)
    async with connector(pki, crl=True) as ground:
        await ground.leased()
        await ground.accepted(agent=mallory.identity)
        link = ground.register.link_address
        assert link is not None
        carrier = await Carrier.dial_direct(
            (link.ip, link.port), mallory, lambda identity: None, budget=ground.budget, timeout_s=5.0
        )
        near, program = tcp_pair()
        flow = await carrier.open(ground.frame(), near)
        assert await says(program, b"hello") == b"hello"
        program.close()
        async with asyncio.timeout(WAIT_SECONDS):
            assert await flow.finished, "the carrier may carry another"
        renewal = ground.daemon.on_reload[0].__self__  # type: ignore[attr-defined]
        verdicts = renewal.credentials.verdicts
        leaf = mallory.chain[0]
        revoked = Revocations.from_bytes(pki.authority.crl(None, [leaf]))
        verdicts._trust = verdicts.trust.with_revocations(revoked)
        verdicts._judged.clear()
        near, program = tcp_pair()
        with pytest.raises(FlowRefused) as refused, contextlib.closing(near), contextlib.closing(program):
            await carrier.open(ground.frame(), near)
        assert refused.value.status is OpenStatus.DENIED


async def test_a_relay_that_finds_our_certificate_revoked_ends_its_sessions_for_that(pki: Pki) -> None:
    async with connector(pki) as ground:
        await ground.leased()
        await ground.accepted()
        program = await ground.open(ground.frame())
        ground.peer.connection.refuse(IdentityError(Reason.REVOKED))
        assert await ended(program)
        await until("no session is left", lambda: ground.status["sessions_total"] == 0)
        ground.peer = await ground.relay.peer()


async def test_with_a_crl_out_of_date_no_session_begins_and_flows_go_on(pki: Pki) -> None:
    async with connector(pki, crl=True) as ground:
        await ground.leased()
        await ground.accepted()
        program = await ground.open(ground.frame())
        pki.revoke(until=datetime.now(UTC) - timedelta(seconds=1))
        await until("not ready", lambda: "crl" in ground.daemon.readiness.report()["awaiting"])
        await ground.refused(Reason.POLICY_UNKNOWN, session=SECOND)
        assert await says(program, b"still here") == b"still here"
        pki.revoke()
        await until("ready", lambda: ground.daemon.readiness.ready)
        await ground.accepted(SECOND)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"relays": ()}, "at least one relay"),
        ({"routes": ()}, "at least one route"),
        ({"api": "/tmp/api.sock"}, "expected connector.api_state beside it"),
        ({"api_state": "/tmp/state.json"}, "expected connector.api_state beside it"),
        ({"id": ConnectorId("other")}, r"id\.other\.ztna"),
    ],
)
async def test_refuses_to_start(pki: Pki, changes: dict[str, Any], said: str) -> None:
    tls = pki.connector("connector-1", [ECHO, DOWN])
    backends = Backends()
    backends.port = 1
    async with fake_relay(pki) as relay, asyncio.TaskGroup() as tasks:
        with pytest.raises(ConfigError, match=said):
            await body(Daemon("test", config(tls, relay, "http://127.0.0.1:1", backends, **changes), tasks))
