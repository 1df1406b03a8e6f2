"""Agents that speak `ztna-v1` against the real relay and a real connector: the bytes, and who is kept from whom."""

from __future__ import annotations

import asyncio
import contextlib
import os
import struct
from collections.abc import AsyncIterator, Callable
from ipaddress import IPv4Address
from pathlib import Path

import msgspec
import pytest

from tests.support.certificates import CLIENT, Presented
from tests.support.relay import refusals, running_relay
from tests.support.v1_agent import INNER, TYPED_BY_HAND, V1Agent, ask_all, v1_agent
from tests.support.whole_mesh import ECHO, WEB, WholeMesh, route, until, whole_mesh
from ztna.config import ConsulConfig, RouteConfig
from ztna.consul.embedded import EmbeddedConsul
from ztna.packet import PROTOCOL_ICMP, Packet, build_udp, parse
from ztna.reasons import Reason
from ztna.telemetry import DROPS
from ztna.wire import control

DATAGRAMS = 1000
WAIT_SECONDS = 60.0
AGAIN_SECONDS = 2.0
ECHO_ID, WEB_ID = ECHO.encode(), WEB.encode()


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that is busy makes no connector look silent, which would be answered otherwise."""
    monkeypatch.setattr("relay.opening.ACCEPT_SECONDS", 30.0)


@pytest.fixture
async def bare_mesh(tmp_path: Path) -> AsyncIterator[WholeMesh]:
    consul = await EmbeddedConsul.start()
    try:
        async with whole_mesh(tmp_path, ConsulConfig(address=consul.address)) as mesh:
            yield mesh
    finally:
        await consul.stop()


@pytest.fixture
async def routes(bare_mesh: WholeMesh) -> list[RouteConfig]:
    """One service that takes v1 agents, one that does not."""
    open_, sealed = [route(each, await bare_mesh.backend(each), protocol="udp") for each in (ECHO, WEB)]
    return [msgspec.structs.replace(open_, allow_v1=True), sealed]


@pytest.fixture
async def mesh(bare_mesh: WholeMesh, routes: list[RouteConfig]) -> WholeMesh:
    await bare_mesh.connector("rack-1", routes)
    for service in (ECHO, WEB):
        await bare_mesh.served_by(service, "rack-1")
    return bare_mesh


def shown(mesh: WholeMesh, name: str, *services: str) -> Presented:
    """A certificate that grants an agent these services."""
    return mesh.pki.signed(cn=name, dns=[f"agent.{each}.ztna" for each in services], eku=(CLIENT,))


@contextlib.asynccontextmanager
async def agent(mesh: WholeMesh, name: str, *services: str) -> AsyncIterator[V1Agent]:
    async with v1_agent(mesh.relay_address, shown(mesh, name, *(services or (ECHO,)))) as made:
        yield made


def question(payload: bytes, to: tuple[str, int] = TYPED_BY_HAND) -> bytes:
    return build_udp(*INNER, *to, payload)


async def answered(agent: V1Agent) -> Packet:
    return parse(await agent.packet())


async def ask(agent: V1Agent, payload: bytes) -> Packet:
    """Send a question in a service's packet, as often as it takes, and return the first answer to it.

    A connector that is slow for a moment is passed over, and what was sent then is lost as datagrams may be.
    """
    return await ask_with(lambda: agent.send_packet(ECHO_ID, question(payload)), agent, payload)


async def ask_with(send: Callable[[], None], agent: V1Agent, payload: bytes) -> Packet:
    """The same with a way of sending of its own."""
    async with asyncio.timeout(WAIT_SECONDS):
        while True:
            send()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(AGAIN_SECONDS):
                    while True:
                        packet = await answered(agent)
                        # An answer to an earlier question that was asked twice is nothing new.
                        if packet.payload.endswith(payload) or packet.protocol == PROTOCOL_ICMP:
                            return packet


def drops(why: str) -> float:
    return float(DROPS.labels("relay", why)._value.get())


# The bytes


async def test_the_vectors(mesh: WholeMesh) -> None:
    async with agent(mesh, "alice") as alice:
        host, port = alice.address
        assert alice.control[0] == b"\x01" + IPv4Address(host).packed + struct.pack(">H", port)
        alice.register(ECHO_ID)
        await alice.expect(bytes.fromhex("12000c") + ECHO_ID)
        # Repeats are ACKed again, and trailing bytes ignored.
        alice.send(bytes.fromhex("100c") + ECHO_ID + b"trailing")
        await alice.expect(bytes.fromhex("12000c") + ECHO_ID)
        reply = await ask(alice, b"hello")
        assert reply.payload == ECHO_ID + b": hello"
        assert (reply.source, reply.source_port) == TYPED_BY_HAND
        assert (reply.destination, reply.destination_port) == INNER
        # A raw packet is for its only service.
        raw = question(b"raw", ("10.100.0.9", 7007))
        assert (await ask_with(lambda: alice.send(raw), alice, b"raw")).source == "10.100.0.9"


async def test_an_agent_that_moved_is_told_so_and_goes_on(mesh: WholeMesh) -> None:
    """Its authority is its connection's, not its address's."""
    async with agent(mesh, "alice") as alice:
        await alice.registered(ECHO_ID)
        await alice.move()
        host, port = alice.address
        alice.send_packet(ECHO_ID, question(b"from elsewhere"))
        await alice.expect(b"\x01" + IPv4Address(host).packed + struct.pack(">H", port))
        assert (await ask(alice, b"and on")).payload == ECHO_ID + b": and on"


async def test_packets_are_as_large_as_v1_agents_take(mesh: WholeMesh) -> None:
    """UDP payloads of 1350: the largest DATAGRAM that an agent may send is answered with one as large."""
    async with agent(mesh, "alice") as alice:
        await alice.registered(ECHO_ID)
        head_bytes = 2 + len(ECHO_ID) + len(question(b""))
        payload = os.urandom(1350 - 24 - 20 - head_bytes)
        reply = await ask(alice, payload)
        assert reply.payload == ECHO_ID + b": " + payload
        assert len(question(reply.payload)) == 1306
        assert 1340 <= alice.largest_packet <= 1350


# Who is kept from whom


async def test_two_agents_with_one_inner_address_and_port(mesh: WholeMesh) -> None:
    async with agent(mesh, "alice") as alice, agent(mesh, "bob") as bob:
        await alice.registered(ECHO_ID)
        await bob.registered(ECHO_ID)
        of_alice, of_bob = await asyncio.gather(
            ask_all(alice, ECHO_ID, b"alice", DATAGRAMS), ask_all(bob, ECHO_ID, b"bob", DATAGRAMS)
        )
    for name, answers in ((b"alice", of_alice), (b"bob", of_bob)):
        assert {question for question, _ in answers} == {b"%s %d" % (name, n) for n in range(DATAGRAMS)}
        assert all(answer == ECHO_ID + b": " + question for question, answer in answers)


async def test_sealed_agents_and_v1_agents_share_a_service(mesh: WholeMesh) -> None:
    carol = await mesh.scripted("carol", ECHO)
    link = await carol.link(await carol.open())
    async with agent(mesh, "alice") as alice:
        await alice.registered(ECHO_ID)
        for number in range(50):
            await carol.udp(link, b"carol %d" % number, INNER)
            said = b"alice %d." % number
            assert (await ask(alice, said)).payload == ECHO_ID + b": " + said
            async with asyncio.timeout(10):
                assert (await carol.packets.get()).payload == ECHO_ID + b": carol %d" % number


# What is refused


async def test_without_a_certificate_or_a_ztna_san_nobody_comes_in(mesh: WholeMesh) -> None:
    async with v1_agent(mesh.relay_address, None) as nobody:
        assert nobody.closed == (0x01, "client cert required")
        assert nobody.control == []
    async with v1_agent(mesh.relay_address, mesh.pki.signed(cn="x", eku=(CLIENT,))) as stranger:
        assert stranger.closed is not None
        assert "carries no ZTNA SAN" in stranger.closed[1]
        assert stranger.control == []


async def test_the_five_statuses_of_a_nack(mesh: WholeMesh) -> None:
    async with agent(mesh, "alice", ECHO, WEB, "nowhere") as alice:
        alice.send(b"\x10\x02\xff\xfe")
        await alice.expect(b"\x13\x01\x00")
        alice.send(b"\x10\x00")
        await alice.expect(b"\x13\x01\x00")
        alice.register(b"payroll")
        await alice.expect(b"\x13\x02\x07payroll")
        alice.register(ECHO_ID, kind=0x11)
        await alice.expect(b"\x13\x03\x0c" + ECHO_ID)
        alice.register(b"nowhere")
        await alice.expect(b"\x13\x04\x07nowhere")
        # Granted and served, but not to who cannot seal what it says.
        alice.register(WEB_ID)
        await alice.expect(bytes((0x13, 2, len(WEB_ID))) + WEB_ID)
    many = [f"s{number}" for number in range(300)]
    async with agent(mesh, "bob", *many) as bob:
        for each in many:
            bob.register(each.encode())
        # None is there: 04, but past so many a second they are dropped unread.
        await bob.until(lambda: len([each for each in bob.control if each[0] == 0x13]) >= 250)
        assert {each[1] for each in bob.control if each[0] == 0x13} == {4}


async def test_status_05_when_the_identity_has_its_sessions(tmp_path: Path) -> None:
    async with running_relay(tmp_path, sessions_per_identity=1) as relay:
        services = (ECHO, WEB)
        connector = await relay.connector("con-x", services)
        presented = relay.pki.signed(cn="alice", dns=[f"agent.{each}.ztna" for each in services])
        async with v1_agent(relay.address, presented) as alice:
            alice.register(ECHO_ID)
            connector.say(control.Accepted((await connector.expect(control.Offered)).session))
            await alice.expect(bytes((0x12, 0, len(ECHO_ID))) + ECHO_ID)
            alice.register(WEB_ID)
            await alice.expect(bytes((0x13, 5, len(WEB_ID))) + WEB_ID)
            # What stood, stands.
            alice.register(ECHO_ID)
            await alice.expect(bytes((0x12, 0, len(ECHO_ID))) + ECHO_ID)


async def test_packets_without_a_registration_go_nowhere(mesh: WholeMesh) -> None:
    async with agent(mesh, "alice") as alice:
        before = drops("not_registered")
        alice.send_packet(ECHO_ID, question(b"unasked"))
        alice.send(question(b"raw and unasked"))
        await alice.registered(ECHO_ID)
        assert drops("not_registered") == before + 2
        assert (await ask(alice, b"now it is")).payload == ECHO_ID + b": now it is"


async def test_truncated_ones_are_counted_and_change_nothing(mesh: WholeMesh) -> None:
    async with agent(mesh, "alice") as alice:
        before = drops("malformed_datagram")
        for raw in (b"\x10", b"\x10\x09abc", b"\x11", b"\x2f", b"\x2f\x0cshort", b"\x99"):
            alice.send(raw)
        await alice.registered(ECHO_ID)
        assert drops("malformed_datagram") == before + 6


async def test_a_port_that_is_not_published_is_answered_with_icmp(mesh: WholeMesh) -> None:
    async with agent(mesh, "alice") as alice:
        await alice.registered(ECHO_ID)
        unpublished = question(b"x", (TYPED_BY_HAND[0], 9))
        error = await ask_with(lambda: alice.send_packet(ECHO_ID, unpublished), alice, b"x")
        assert (error.icmp_type, error.icmp_code) == (3, 3)
        assert (error.source, error.destination) == (TYPED_BY_HAND[0], INNER[0])


# Sessions


def packet_for(session: str, packet: bytes) -> bytes:
    return b"\x2e" + bytes.fromhex(session) + packet


async def test_a_connector_s_packet_reaches_the_agent_of_its_own_sessions_only(mesh: WholeMesh) -> None:
    """A second connector, in possession of the session's id, can say nothing into it."""
    liar = await mesh.scripted_connector("rack-9", WEB)
    async with agent(mesh, "alice") as alice:
        await alice.registered(ECHO_ID)
        [session] = [each["session"] for each in mesh.relay.status("sessions") if each["agent"] == "alice"]
        before = refusals(Reason.NOT_YOUR_SESSION)
        liar.connection.send_datagram(packet_for(session, question(b"injected")))
        liar.connection.send_datagram(packet_for("00" * 8, question(b"injected")))
        await until("both refused", lambda: refusals(Reason.NOT_YOUR_SESSION) == before + 2)
        assert (await ask(alice, b"true")).payload == ECHO_ID + b": true"
        assert not [each for each in alice.packets if b"injected" in each]


async def test_the_agent_s_session_comes_back_with_its_connector(
    mesh: WholeMesh, routes: list[RouteConfig]
) -> None:
    """It need not register again: what stood, stands."""
    async with agent(mesh, "alice") as alice:
        await alice.registered(ECHO_ID)
        await mesh.connectors["rack-1"].stop()
        await mesh.connector("rack-1", routes)
        assert (await ask(alice, b"again")).payload == ECHO_ID + b": again"


async def test_a_relay_that_stops_says_goodbye_at_once(tmp_path: Path) -> None:
    """A v1 agent understands no `drain`, so it is closed first, and holds nothing up."""
    async with running_relay(tmp_path) as relay:
        connector = await relay.connector("con-x", (ECHO,))
        presented = relay.pki.signed(cn="alice", dns=[f"agent.{ECHO}.ztna"])
        async with v1_agent(relay.address, presented) as alice:
            alice.register(ECHO_ID)
            connector.say(control.Accepted((await connector.expect(control.Offered)).session))
            await alice.expect(bytes((0x12, 0, len(ECHO_ID))) + ECHO_ID)
            async with asyncio.timeout(30):
                await relay.relay.drain(300.0)
            await alice.until(lambda: alice.closed)
            assert alice.closed == (0x00, "server shutting down")
            assert (await connector.expect(control.Closed)).reason is Reason.DRAINING


async def test_a_session_ends_with_the_agent_s_connection(mesh: WholeMesh) -> None:
    async with agent(mesh, "alice") as alice:
        await alice.registered(ECHO_ID)
        assert [each["agent"] for each in mesh.relay.status("sessions")] == ["alice"]
    await until("no session", lambda: mesh.relay.status("sessions") == [])
