"""A relay among peers that restart it, churn, do not read and flood: bounded tables, and bystanders that are served."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from aioquic.quic.connection import QuicConnection

from relay.daemon import Relay
from sidecar.link.control import RelayClient
from tests.support.hostile import HostileClient
from tests.support.relay import FREE, SERVICE, WAIT_SECONDS, Peer, RunningRelay, refusals, running_relay
from tests.support.v1_agent import v1_agent
from ztna.config import Endpoint, RelayConfig, RelayTarget
from ztna.names import ServiceName, Zone
from ztna.packet import build_udp
from ztna.quic import Connection
from ztna.reasons import Reason
from ztna.telemetry import DROPS
from ztna.wire import control

CLIENTS = 20
BACK_SECONDS = 20.0
"""What it takes is a reset and a handshake each; the idle timeout alone is 30 s."""
CHURN = 100


@pytest.fixture
async def mesh(tmp_path: Path) -> AsyncIterator[RunningRelay]:
    async with running_relay(tmp_path) as mesh:
        yield mesh


async def until(what: str, holds: Any, seconds: float = WAIT_SECONDS) -> None:
    try:
        async with asyncio.timeout(seconds):
            while not holds():
                await asyncio.sleep(0.01)
    except TimeoutError:
        raise AssertionError(f"never: {what}") from None


def drops(why: str, where: str = "relay") -> float:
    return float(DROPS.labels(where, why)._value.get())


# A relay that comes back


async def test_the_peers_of_a_relay_that_was_killed_are_back_in_seconds(
    mesh: RunningRelay, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It knows nothing of them, but its reset key outlived it: they need not wait until they are idle."""
    monkeypatch.setattr("sidecar.link.pulse.GONE_SECONDS", 120.0)
    listen = Endpoint(*mesh.address)
    target = RelayTarget(address=listen, name="relay-1")
    lost: list[str] = []
    clients = [
        RelayClient(
            target,
            mesh.pki.credentials(mesh.pki.agent(f"agent-{number}")),
            on_message=lambda client, message: None,
            on_connected=lambda client: None,
            on_lost=lambda client, reason: lost.append(reason),
        )
        for number in range(CLIENTS)
    ]
    tasks = [asyncio.ensure_future(client.run()) for client in clients]
    try:
        await until("all connected", lambda: all(client.connected for client in clients))
        # Killed: nobody is told.
        mesh.relay._socket.close()
        mesh.relay.forwarder.close()
        mesh.relay.splicer.close()
        before = [client.connection for client in clients]
        restarted = _again(mesh, listen)
        try:
            running = asyncio.ensure_future(restarted.run())
            await until(
                "all back",
                lambda: all(
                    client.connected and client.connection != earlier
                    for client, earlier in zip(clients, before, strict=True)
                ),
                BACK_SECONDS,
            )
            assert lost.count("stateless reset") == CLIENTS, lost
        finally:
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)
            restarted.close()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _again(mesh: RunningRelay, listen: Endpoint) -> Relay:
    fields = {name: getattr(mesh.config, name) for name in RelayConfig.__struct_fields__}
    again = RelayConfig(**(fields | {"listen": listen, "forwarder": FREE}))
    return Relay(again, Zone("ztna.local"), mesh.pki.credentials(again.tls))


# Churn


async def test_connectors_that_come_and_go_leave_nothing_behind(mesh: RunningRelay) -> None:
    agent = await mesh.agent()
    await mesh.connector("con-x")
    await agent.open_with(*mesh._peers[1:])
    gc.collect()
    credentials = mesh.pki.credentials(mesh.pki.connector("con-y", [SERVICE]))
    for number in range(CHURN):
        peer = await Peer(mesh.address, credentials).connect()
        await peer.serve("con-y")
        agent.say(control.Open(request=1000 + number, service=SERVICE))
        peer.close() if number % 2 else peer.vanish()
        if not number % 2:
            # Who vanished would be idle for 30 s; nobody here waits for that.
            _connections_of(mesh, "con-y")[0].close()
        await until("it left", lambda: not _connections_of(mesh, "con-y"))
    relay = mesh.relay
    assert len(relay.sessions.peers) == 2 == len(relay.server.connections)
    assert relay.sessions.services == {SERVICE}
    assert len(relay.sessions._held.serving.live(SERVICE)) == 1
    assert sum(relay._doorkeeper._names.values()) == 2
    assert len(relay.sessions.sessions) <= CHURN + 1
    relay.server.clock = lambda: time.monotonic() + 60
    relay.server._bury()
    gc.collect()
    # Two of ours, and both ends of them.
    alive = [each for each in gc.get_objects() if isinstance(each, Connection)]
    assert len([each for each in alive if each._endpoint is relay.server]) == 2


def _connections_of(mesh: RunningRelay, id_name: str) -> list[Connection]:
    return [each for each in mesh.relay.server.connections if each.identity.id_name == id_name]


async def test_registering_again_and_again_adds_nothing(mesh: RunningRelay) -> None:
    connector = await mesh.connector("con-x")
    message = control.Register(
        mesh.relay.sessions.peers[1].connector_id,  # type: ignore[arg-type]
        (control.Offering(SERVICE), control.Offering(ServiceName("payroll"))),
    )
    before = refusals(Reason.NO_GRANT)
    for _ in range(500):
        connector.say(message)
        await connector.expect(control.Registered)
    assert refusals(Reason.NO_GRANT) == before + 500
    peer = mesh.relay.sessions.peers[1]
    assert peer.services == {SERVICE}
    assert [len(keys) for keys in mesh.relay.sessions._held.serving._serving[SERVICE].values()] == [1]


# Peers that do not read


async def test_a_peer_that_asks_and_never_reads_is_disconnected(mesh: RunningRelay) -> None:
    """Its answers are bounded, and others do not wait for it."""
    bystander = await mesh.agent("agent-b")
    shown = mesh.pki.signed(cn="mute", dns=[f"agent.{SERVICE}.ztna"])
    async with HostileClient(mesh.address, "ztna-v2", shown) as mute:
        _give_no_credit(mute.quic)
        async with asyncio.timeout(WAIT_SECONDS):
            await mute.confirmed
        question = control.encode(control.Open(1, ServiceName("x" * 60)))
        mute.quic.send_stream_data(0, control.encode(control.Hello()))
        async with asyncio.timeout(60):
            while not mute.closed.done():
                mute.quic.send_stream_data(0, question * 200)
                mute.flush()
                await asyncio.sleep(0.005)
        assert mute.closed.result()[2] == Reason.LIMIT_REACHED
    await bystander.nothing_of(control.Opened)


def _give_no_credit(client: QuicConnection) -> None:
    """Have it take what the first credit allows on its stream and never more."""
    client._write_stream_limits = lambda *_, **__: None  # type: ignore[method-assign]
    client._write_connection_limits = lambda *_, **__: None  # type: ignore[method-assign]


# Peers that flood


async def test_a_v1_agent_that_floods_delays_nobody(mesh: RunningRelay) -> None:
    connector = await mesh.connector("con-x")
    bystander = await mesh.agent("agent-b")
    shown = mesh.pki.signed(cn="flood", dns=[f"agent.{SERVICE}.ztna"])
    async with v1_agent(mesh.address, shown) as agent:
        registering = asyncio.ensure_future(agent.registered(SERVICE.encode()))
        offered = await connector.expect(control.Offered)
        assert offered.v1
        connector.say(control.Accepted(offered.session))
        await registering
        packet = build_udp("192.0.2.1", 1, "10.100.0.1", 7, bytes(1000))
        flooding = asyncio.ensure_future(_flood(agent, packet))
        try:
            for request in range(50):
                bystander.say(control.Open(request=request, service=ServiceName("not-granted")))
                await bystander.expect(control.Denied, request=request)
        finally:
            flooding.cancel()
            await asyncio.gather(flooding, return_exceptions=True)
        [leg] = [each for each in mesh.relay.server.connections if each.identity.id_name == "con-x"]
        assert len(leg._engine._datagrams) <= 1000
        await until("its packets came", lambda: connector.datagrams)
        assert all(
            each[:9] == b"\x2e" + offered.session.to_bytes() for each in connector.datagrams if each[0] != 1
        )


async def _flood(agent: Any, packet: bytes) -> None:
    while True:
        for _ in range(50):
            agent.send_packet(SERVICE.encode(), packet)
        await asyncio.sleep(0)


async def test_whatever_a_v1_agent_sends_it_is_answered_or_counted(mesh: RunningRelay) -> None:
    """Streams, foreign datagrams and half ones: no close, no session, and the next one is answered."""
    shown = mesh.pki.signed(cn="odd", dns=[f"agent.{SERVICE}.ztna"])
    async with v1_agent(mesh.address, shown) as agent:
        before = drops("unexpected_stream"), drops("unexpected_datagram"), drops("malformed_datagram")
        agent.quic.send_stream_data(0, control.encode(control.Hello()))
        agent.quic.send_stream_data(2, b"unidirectional")
        agent.send(bytes.fromhex("01cb007105d431"))
        agent.send(b"\x2e" + bytes(8) + b"packet")
        for data in (b"", b"\x10", b"\x2f\x05ab", b"\xff" * 1000):
            with contextlib.suppress(ValueError):
                agent.send(data)
        agent.send(b"\x10\x00")
        await agent.expect(b"\x13\x01\x00")
        assert drops("unexpected_stream") == before[0] + 2
        assert drops("unexpected_datagram") == before[1] + 2
        assert drops("malformed_datagram") == before[2] + 4
        assert agent.closed is None and mesh.relay.sessions.sessions == {}
