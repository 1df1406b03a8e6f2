"""The TLS door of a running relay, with peers that speak `ztna-v2` over TLS and can lie about everything."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from relay.tls_door import SEND_BUFFER_BYTES
from tests.support.relay import SERVICE, RunningRelay, running_relay
from tests.support.tls_peer import RECEIVE_BUFFER_BYTES, TlsPeer
from ztna import tls_control
from ztna.errors import IdentityError, LinkError
from ztna.names import ServiceName
from ztna.quic_connection import STREAM_UNSENT_BYTES_MAX
from ztna.reasons import Reason
from ztna.telemetry import DROPS
from ztna.wire import control

WAIT_SECONDS = 15.0


@pytest.fixture
async def mesh(tmp_path: Path) -> AsyncIterator[RunningRelay]:
    async with running_relay(tmp_path) as made:
        yield made


async def peer(mesh: RunningRelay, tls: Any = None, address: tuple[str, int] | None = None) -> TlsPeer:
    credentials = mesh.pki.credentials(tls or mesh.pki.agent("agent-t", (SERVICE,)))
    return await TlsPeer.connect(address or mesh.address, credentials)


async def until(condition: Any) -> None:
    async with asyncio.timeout(WAIT_SECONDS):
        while not condition():
            await asyncio.sleep(0.01)


@pytest.mark.parametrize("port", ["control", "forwarder"])
async def test_a_session_between_tls_and_quic(mesh: RunningRelay, port: str) -> None:
    """Either port takes TLS; the relay knows no difference between the two kinds of connection."""
    address = mesh.address if port == "control" else mesh.relay.splicer.address
    connector = await mesh.connector()
    agent = await peer(mesh, address=address)
    agent.say(control.Open(request=1, service=ServiceName(SERVICE)))
    offered = await connector.expect(control.Offered)
    connector.say(control.Accepted(offered.session))
    opened = await agent.expect(control.Opened)
    assert opened.session == offered.session
    agent.say(control.Dial(opened.session))
    token = await agent.expect(control.DialToken)
    assert len(token.token) == control.TOKEN_BYTES
    agent.vanish()
    assert (await connector.expect(control.Closed)).reason is Reason.PEER_GONE


async def test_ownership_is_the_connections(mesh: RunningRelay) -> None:
    connector = await mesh.connector()
    mine, other = await peer(mesh), await peer(mesh)
    mine.say(control.Open(request=1, service=ServiceName(SERVICE)))
    offered = await connector.expect(control.Offered)
    connector.say(control.Accepted(offered.session))
    opened = await mine.expect(control.Opened)
    other.say(control.Dial(opened.session))
    other.say(control.Closed(opened.session, Reason.CLOSED_BY_PEER))
    other.say(control.Open(request=2, service=ServiceName("not-granted")))
    assert (await other.expect(control.Denied)).reason is Reason.NO_GRANT
    mine.say(control.Dial(opened.session))
    assert await mine.expect(control.DialToken)
    assert not [each for each in other.inbox if isinstance(each, control.DialToken)]
    mine.close()
    assert (await connector.expect(control.Closed)).reason is Reason.CLOSED_BY_PEER
    other.close()


async def test_pings_are_answered_and_shown(mesh: RunningRelay) -> None:
    agent = await peer(mesh)
    agent.connection.ping()
    await until(lambda: agent.connection.rtt_s is not None)
    assert 0 < (agent.connection.rtt_s or 0) < 1
    agent.close()
    await until(lambda: not mesh.relay.door.connections)


async def test_fields_that_are_unknown_are_counted(mesh: RunningRelay) -> None:
    unknown = DROPS.labels("relay_tls", "unknown_field")._value
    before = unknown.get()
    agent = await peer(mesh)
    future = b'{"type":"open","request":7,"service":"not-granted","since":1}'
    agent.say_bytes(len(future).to_bytes(4) + future)
    assert (await agent.expect(control.Denied)).request == 7
    assert unknown.get() == before + 1
    agent.close()


async def test_who_says_nothing_has_gone(mesh: RunningRelay, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tls_control, "SILENCE_SECONDS", 0.3)
    agent = await peer(mesh)
    await agent.closed(tls_control.SILENT)
    assert not mesh.relay.peers


async def test_a_renewed_connection_is_not_taken_for_a_farewell(mesh: RunningRelay) -> None:
    connector = await mesh.connector()
    agent = await peer(mesh)
    agent.say(control.Open(request=1, service=ServiceName(SERVICE)))
    offered = await connector.expect(control.Offered)
    connector.say(control.Accepted(offered.session))
    await agent.expect(control.Opened)
    agent.connection.close(0, "certificate renewed")
    assert (await connector.expect(control.Closed)).reason is Reason.PEER_GONE


async def test_draining_lets_nobody_in_and_ends_who_is(mesh: RunningRelay) -> None:
    agent = await peer(mesh)
    await asyncio.wait_for(mesh.relay.drain(1.0), WAIT_SECONDS)
    assert await agent.expect(control.Drain)
    await agent.closed("server shutting down")
    late = await TlsPeer.dial(mesh.address, mesh.pki.credentials(mesh.pki.agent("late", (SERVICE,))))
    await late.closed(str(Reason.DRAINING))


async def test_a_certificate_that_falls_ends_the_connection(tmp_path: Path) -> None:
    async with running_relay(tmp_path, crl=True) as mesh:
        tls = mesh.pki.agent("agent-r", (SERVICE,))
        agent = await peer(mesh, tls)
        mesh.pki.revoke(tls)
        mesh.renewal.reload()
        await agent.closed(str(Reason.REVOKED))
        with pytest.raises((IdentityError, LinkError, AssertionError)):
            await peer(mesh, tls)
        assert not mesh.relay.door.connections


async def test_a_peer_that_reads_nothing_is_bounded_and_goes(mesh: RunningRelay) -> None:
    agent = await peer(mesh)
    agent.stop_reading()
    (connection,) = mesh.relay.door.connections
    message = control.encode(control.Health(ServiceName(SERVICE), "x" * 60_000))
    said = 0
    while connection.send_stream(0, message):
        said += len(message)
        await asyncio.sleep(0)
    assert said < STREAM_UNSENT_BYTES_MAX + 2 * (SEND_BUFFER_BYTES + RECEIVE_BUFFER_BYTES), (
        "ours, the kernel's"
    )
    (relay_peer,) = mesh.relay.peers.values()
    relay_peer.send(control.Health(ServiceName(SERVICE), "x" * 60_000))
    await until(lambda: not mesh.relay.peers)
    agent.vanish()


async def test_without_its_run_the_door_is_shut(tmp_path: Path) -> None:
    async with running_relay(tmp_path) as mesh:
        mesh.relay.door._tasks = None
        reader, writer = await asyncio.open_connection(*mesh.address)
        writer.write(b"\x16\x03\x01")
        assert await asyncio.wait_for(reader.read(), WAIT_SECONDS) == b""
        writer.close()


async def test_wrong_alpn_is_closed_before_reading(mesh: RunningRelay) -> None:
    failed = DROPS.labels("relay_tls", "handshake_failed")._value
    before = failed.get()
    credentials = mesh.pki.credentials(mesh.pki.agent("agent-a", (SERVICE,)))
    for alpn in ("ztna-v1", "ztna-stream", "h2"):
        with contextlib.suppress(LinkError):
            agent = await TlsPeer.dial(mesh.address, credentials, alpn)
            agent.say(control.Hello())
            await agent.closed()
            assert not agent.inbox
    await until(lambda: failed.get() == before + 3)
    assert not mesh.relay.peers


async def test_the_two_kinds_share_the_limits_of_an_identity(
    mesh: RunningRelay, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("relay.admission.CONNECTIONS_PER_IDENTITY_MAX", 2)
    tls = mesh.pki.agent("agent-m", (SERVICE,))
    over_quic = await mesh.peer(tls)
    over_tls = await peer(mesh, tls)
    third = await TlsPeer.dial(mesh.address, mesh.pki.credentials(tls))
    await third.closed(str(Reason.LIMIT_REACHED))
    over_tls.close()
    await until(lambda: len(mesh.relay.peers) == 1)
    again = await peer(mesh, tls)
    for each in (over_quic, again):
        each.close()
