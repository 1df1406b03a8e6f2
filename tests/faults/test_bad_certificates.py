"""Every certificate that is not good enough, on the relay and on the packet carrier, in both roles.

The stream carrier's are in tests/unit/test_sidecar_link_stream.py; which certificates is tests.support.certificates'.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import pytest
from aioquic.quic.configuration import QuicConfiguration
from aioquic.quic.connection import QuicConnection

from sidecar.link.control import RelayClient
from sidecar.link.packet import ALPN as LINK_ALPN
from sidecar.link.switch import PathSwitch
from tests.support.certificates import Bad, Pki, Presented
from tests.support.forwarded import LinkGround
from tests.support.hostile import HostileClient, HostileServer, client_connection
from tests.support.relay import SERVICE, RunningRelay, running_relay
from ztna.config import Endpoint, RelayTarget
from ztna.errors import IdentityError
from ztna.names import ConnectorId
from ztna.reasons import Reason
from ztna.telemetry import REFUSALS
from ztna.udp import SockAddr
from ztna.wire import control
from ztna.wire.datagram import service_packet

DEADLINE_SECONDS = 10.0
CONTROL_ALPN = "ztna-v2"
AGENT, CONNECTOR = [f"agent.{SERVICE}.ztna"], [f"connector.{SERVICE}.ztna", "id.connector-1.ztna"]
REGISTER = control.Register(ConnectorId("connector-1"), (control.Offering(SERVICE),))
BAD_CLIENTS, BAD_SERVERS = Pki.BAD_NAMES["client"], Pki.BAD_NAMES["server"]


def refusals(where: str, reason: Reason) -> float:
    return float(REFUSALS.labels(where, reason.value)._value.get())


def check_close(close: tuple[int, int | None, str], reason: Reason) -> None:
    """Hold a close to protocol.md, Closes: a transport close with the code and the reason."""
    code, frame_type, phrase = close
    assert frame_type is not None, "a transport close"
    assert code == (0x130 if reason is Reason.UNTRUSTED else 0x01)
    expected = "client cert required" if reason is Reason.NO_CERTIFICATE else str(reason)
    assert phrase == expected or phrase.startswith(f"{expected}: "), phrase


# The relay, and those who connect to it


@pytest.fixture
async def mesh(tmp_path: Path) -> AsyncIterator[RunningRelay]:
    async with running_relay(tmp_path) as running:
        yield running


async def close_of(mesh: RunningRelay, presented: Presented | None) -> tuple[int, int | None, str]:
    """Connect, and say hello and register in the flight that ends the handshake."""
    early = control.encode(control.Hello()) + control.encode(REGISTER)
    async with HostileClient(
        mesh.address, CONTROL_ALPN, presented, datagrams=[b"\x11\x0cecho-service"], streams={0: early}
    ) as hostile:
        async with asyncio.timeout(DEADLINE_SECONDS):
            return await hostile.closed


@pytest.mark.parametrize("name", BAD_CLIENTS)
@pytest.mark.parametrize("role", ["agent", "connector"])
async def test_the_relay_refuses_it_and_registers_nothing(mesh: RunningRelay, name: str, role: str) -> None:
    bad = mesh.pki.bad(AGENT if role == "agent" else CONNECTOR, "client")[name]
    before = refusals("relay", bad.reason)
    check_close(await close_of(mesh, bad.presented), bad.reason)
    assert refusals("relay", bad.reason) == before + 1
    assert not mesh.relay.sessions.services
    assert not mesh.relay.sessions.peers
    assert not mesh.relay.server.connections


async def test_the_same_flight_registers_with_a_good_certificate(mesh: RunningRelay) -> None:
    """What proves that the test above could fail."""
    good = mesh.pki.signed(dns=CONNECTOR)
    early = control.encode(control.Hello()) + control.encode(REGISTER)
    async with HostileClient(mesh.address, CONTROL_ALPN, good, streams={0: early}):
        async with asyncio.timeout(DEADLINE_SECONDS):
            while mesh.relay.sessions.services != {SERVICE}:
                await asyncio.sleep(0.01)


@pytest.mark.parametrize("dns", [AGENT, ["connector.web-app.ztna", "id.connector-1.ztna"]])
async def test_a_certificate_of_another_role_or_service_registers_nothing(
    mesh: RunningRelay, dns: list[str]
) -> None:
    before = refusals("relay", Reason.NO_GRANT)
    early = control.encode(control.Hello()) + control.encode(REGISTER)
    async with HostileClient(
        mesh.address, CONTROL_ALPN, mesh.pki.signed(dns=dns), streams={0: early}
    ) as hostile:
        async with asyncio.timeout(DEADLINE_SECONDS):
            await hostile.confirmed
            while refusals("relay", Reason.NO_GRANT) != before + 1:
                await asyncio.sleep(0.01)
    assert not mesh.relay.sessions.services


@pytest.mark.parametrize("name", BAD_SERVERS)
async def test_agents_and_connectors_refuse_a_relay_with_it(tmp_path: Path, name: str) -> None:
    pki = Pki(tmp_path)
    bad = pki.bad(["relay.relay-1.ztna"], "server")[name]
    assert bad.presented is not None
    connected: list[RelayClient] = []
    before = refusals("relay_client", bad.reason)
    async with HostileServer(
        CONTROL_ALPN, bad.presented, datagrams=[b"\x01\x7f\x00\x00\x01\x00\x07"]
    ) as server:
        client = RelayClient(
            RelayTarget(address=Endpoint(*server.address), name="relay-1"),
            pki.credentials(pki.connector()),
            on_message=lambda client, message: connected.append(client),
            on_connected=connected.append,
            on_lost=lambda client, reason: None,
        )
        running = asyncio.ensure_future(client.run())
        try:
            async with asyncio.timeout(DEADLINE_SECONDS):
                code, _, _ = await server.closed
                while not (client.problem or "").startswith(str(bad.reason)):
                    await asyncio.sleep(0.01)
        finally:
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)
        assert code == (0x130 if bad.reason is Reason.UNTRUSTED else 0x01)
        assert not server.client_chain_shown, "it showed itself to a stranger"
    assert refusals("relay_client", bad.reason) >= before + 1
    assert connected == []
    assert client.observed is None


# The packet carrier, through a real forwarder


class HostileEnd:
    """One end of a link on bare aioquic: shows any chain, and sends packets as early as it can."""

    def __init__(self, bind: control.ForwarderBind, quic: QuicConnection | None) -> None:
        self._switch = PathSwitch(
            bind, LinkGround.PROBE_KEY, self._received, lambda: None, allow_private=False
        )
        self._quic = quic
        self.presented: Presented | None = None
        self.closed: asyncio.Future[tuple[int, int | None, str]] = asyncio.get_running_loop().create_future()
        self._sent_early = False

    @property
    def client_chain_shown(self) -> bool:
        return self._quic is not None and self._quic.tls._peer_certificate is not None

    async def connect(self) -> tuple[int, int | None, str]:
        """Be the client; return how the connector closed."""
        assert self._quic is not None
        async with asyncio.timeout(DEADLINE_SECONDS):
            await self._switch.bound
            self._quic.connect(self._switch.forwarder, time.monotonic())
            self._flush()
            return await self.closed

    def close(self) -> None:
        self._switch.close()

    def _received(self, packets: Sequence[tuple[bytes, SockAddr]]) -> None:
        for data, address in packets:
            if self._quic is None:
                self._quic = self._server(data)
            self._quic.receive_datagram(data, address, time.monotonic())
        assert self._quic is not None
        while self._quic.next_event() is not None:
            pass
        ready = self._quic._handshake_complete or not self._quic._is_client
        if ready and not self._sent_early:
            self._sent_early = True
            self._quic.send_datagram_frame(service_packet(SERVICE.encode(), b"early"))
        self._flush()
        close = self._quic._close_event
        if close is not None and not self.closed.done():
            self.closed.set_result((close.error_code, close.frame_type, close.reason_phrase))

    def _server(self, first: bytes) -> QuicConnection:
        assert self.presented is not None
        return QuicConnection(
            configuration=QuicConfiguration(
                alpn_protocols=[LINK_ALPN],
                connection_id_length=20,
                is_client=False,
                max_datagram_size=1200,
                max_datagram_frame_size=65536,
                certificate=self.presented.chain[0],
                certificate_chain=list(self.presented.chain[1:]),
                private_key=self.presented.key,
            ),
            original_destination_connection_id=first[6 : 6 + first[5]],
        )

    def _flush(self) -> None:
        assert self._quic is not None
        self._switch.send(self._quic.datagrams_to_send(time.monotonic()))


@pytest.fixture
async def ground(tmp_path: Path) -> AsyncIterator[LinkGround]:
    ground = LinkGround(tmp_path)
    yield ground
    ground.close()


async def close_of_link(ground: LinkGround, bad: Bad) -> tuple[int, int | None, str]:
    hostile = HostileEnd(ground.agent_bind, client_connection(LINK_ALPN, bad.presented))
    try:
        return await hostile.connect()
    finally:
        hostile.close()


@pytest.mark.parametrize("name", BAD_CLIENTS)
async def test_a_connector_refuses_an_agent_with_it_on_the_packet_carrier(
    ground: LinkGround, name: str
) -> None:
    bad = ground.pki.bad(AGENT, "client")[name]
    before = refusals("packet_carrier", bad.reason)
    link = ground.serve()
    check_close(await close_of_link(ground, bad), bad.reason)
    assert refusals("packet_carrier", bad.reason) == before + 1
    assert not link.established.done()
    assert ground.received == []


async def test_early_packets_of_a_good_agent_are_taken(ground: LinkGround) -> None:
    """What proves that the test above could fail."""
    link = ground.serve()
    good = Bad(ground.pki.signed(dns=AGENT), Reason.UNTRUSTED)
    hostile = HostileEnd(ground.agent_bind, client_connection(LINK_ALPN, good.presented))
    connecting = asyncio.ensure_future(hostile.connect())
    async with asyncio.timeout(DEADLINE_SECONDS):
        await link.established
        while not ground.received:
            await asyncio.sleep(0.01)
    assert ground.received == [(SERVICE, b"early")]
    link.close(Reason.DRAINING)
    assert (await connecting)[2] == Reason.DRAINING
    hostile.close()


@pytest.mark.parametrize("name", BAD_SERVERS)
async def test_an_agent_refuses_a_connector_with_it_on_the_packet_carrier(
    ground: LinkGround, name: str
) -> None:
    bad = ground.pki.bad(CONNECTOR, "server")[name]
    hostile = HostileEnd(ground.connector_bind, None)
    hostile.presented = bad.presented
    before = refusals("packet_carrier", bad.reason)
    try:
        with pytest.raises(IdentityError) as caught:
            await ground.dial()
        assert caught.value.reason is bad.reason
        async with asyncio.timeout(DEADLINE_SECONDS):
            code, _, _ = await hostile.closed
        assert code == (0x130 if bad.reason is Reason.UNTRUSTED else 0x01)
        assert not hostile.client_chain_shown
    finally:
        hostile.close()
    assert refusals("packet_carrier", bad.reason) == before + 1
    assert ground.received == []
