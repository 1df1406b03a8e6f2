"""What was wrong with the proof of concept that came before, each fault as a test that it would fail.

Every daemon is the real one. More about each, where it is proved in depth: one backend per connector
(tests/unit/test_sidecar_connector_daemon.py), registration (tests/faults/test_bad_certificates.py,
tests/unit/test_relay_daemon.py), candidate answers (tests/unit/test_relay_sessions.py), replies
(tests/e2e/test_two_agents.py), addresses (tests/faults/test_lease_storm.py), health and discovery
(tests/faults/test_backend_and_connector_loss.py).
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.support.relay import refusals
from tests.support.whole_mesh import ECHO, WEB, WholeMesh, ask, route, until, whole_mesh
from ztna.config import ConsulConfig
from ztna.consul.embedded import EmbeddedConsul
from ztna.names import ConnectorId, ServiceName
from ztna.reasons import Reason
from ztna.wire import control

DATABASE = ServiceName("db")
DATAGRAMS = 100


@pytest.fixture
async def mesh(tmp_path: Path) -> AsyncIterator[WholeMesh]:
    consul = await EmbeddedConsul.start()
    try:
        async with whole_mesh(tmp_path, ConsulConfig(address=consul.address)) as mesh:
            yield mesh
    finally:
        await consul.stop()


async def test_one_connector_had_one_backend(mesh: WholeMesh) -> None:
    """Now one process fronts many services, each with its own backend."""
    backends = {service: await mesh.backend(service) for service in (ECHO, WEB, DATABASE)}
    await mesh.connector("rack-1", [route(service, backend) for service, backend in backends.items()])
    await mesh.agent(*backends)
    for service in backends:
        await mesh.served_by(service, "rack-1")
        address = await mesh.virtual_address(service)
        await until_answered(mesh, service, service.encode())
        assert await ask(address, b"hello\n") == service.encode() + b": hello\n"


async def test_any_certificate_could_register_any_service(mesh: WholeMesh) -> None:
    """Now a registration is bounded by the certificate, and DNS must name the connector too."""
    true = await mesh.backend("true")
    await mesh.connector("rack-1", [route(ECHO, true)])
    await mesh.served_by(ECHO, "rack-1")
    before = refusals(Reason.NO_GRANT)
    agent = await mesh.scripted("mallory", ECHO)
    agent.peer.say(control.Register(ConnectorId("rack-1"), (control.Offering(ECHO),)))
    assert (await agent.peer.expect(control.Refused)).reason is Reason.NO_GRANT
    assert refusals(Reason.NO_GRANT) == before + 1
    # Granted the service but named by no SRV record: it may register, and gets no session.
    unnamed = await mesh.scripted_connector("rack-9", ECHO)
    asker = await mesh.scripted("alice", ECHO)
    assert {(await asker.open()).connector_id for _ in range(10)} == {"rack-1"}
    await unnamed.nothing_of(control.Offered)


async def test_a_candidate_answer_was_taken_from_any_connection(mesh: WholeMesh) -> None:
    """Now it counts only from the connector connection that was chosen."""
    backend = await mesh.backend("one")
    await mesh.connector("rack-1", [route(ECHO, backend)])
    await mesh.served_by(ECHO, "rack-1")
    alice, mallory = await mesh.scripted("alice", ECHO), await mesh.scripted("mallory", ECHO)
    other = await mesh.scripted_connector("rack-9", ECHO)
    session = (await alice.open()).session
    before = refusals(Reason.NOT_YOUR_SESSION)
    lie = control.CandidateAnswer(session, (control.Address("192.0.2.66", 666),))
    for peer in (mallory.peer, other, alice.peer):
        peer.say(lie)
        await peer.nothing_of(control.StartPunching)
    assert refusals(Reason.NOT_YOUR_SESSION) == before + 3
    await alice.peer.nothing_of(control.CandidateAnswer)
    alice.peer.say(control.CandidateOffer(session, ()))
    answer = await alice.peer.expect(control.CandidateAnswer)
    assert control.Address("192.0.2.66", 666) not in answer.candidates


async def test_replies_went_to_whichever_flow_came_first(mesh: WholeMesh) -> None:
    """Now two agents with the same inner source address and port each get their own answers."""
    backend = await mesh.backend("one")
    await mesh.connector("rack-1", [route(ECHO, backend), route(ECHO, backend, protocol="udp")])
    await mesh.served_by(ECHO, "rack-1")
    agents = [await mesh.scripted(name, ECHO) for name in ("alice", "bob")]
    links = [await agent.link(await agent.open()) for agent in agents]
    for number in range(DATAGRAMS):
        for name, agent, link in zip((b"alice", b"bob"), agents, links, strict=True):
            await agent.udp(link, b"%s %d" % (name, number))
        for name, agent in zip((b"alice", b"bob"), agents, strict=True):
            async with asyncio.timeout(10):
                packet = await agent.packets.get()
            assert packet.payload == b"one: %s %d" % (name, number)
            assert (packet.destination, packet.destination_port) == ("127.0.0.1", 5555)
    assert all(agent.packets.empty() for agent in agents)


async def test_virtual_addresses_were_typed_by_hand(mesh: WholeMesh) -> None:
    """Now nobody's configuration has one: the keeper leases it, DNS answers it, the agent listens there."""
    backend = await mesh.backend("one")
    await mesh.agent(ECHO)
    await mesh.connector("rack-1", [route(ECHO, backend)])
    address = await mesh.virtual_address(ECHO)
    assert address in mesh.pool
    assert (await mesh.lease(ECHO)).ip == address
    await until_answered(mesh, ECHO, b"one")


async def test_there_was_no_health(mesh: WholeMesh) -> None:
    """Now a dead backend is critical, leaves SRV and is refused with a reason, and comes back by itself."""
    backend = await mesh.backend("one")
    connector = await mesh.connector("rack-1", [route(ECHO, backend)])
    await mesh.served_by(ECHO, "rack-1")
    agent = await mesh.scripted("alice", ECHO)
    await agent.open()
    backend.stop()
    await until("critical", lambda: connector.status("connector")["services"][ECHO]["verdict"] == "critical")
    await mesh.served_by(ECHO)
    assert (await mesh.consul.service_instances(ECHO))[0].status == "critical"
    assert (await agent.denied()).reason is Reason.NO_HEALTHY_CONNECTOR
    await backend.start()
    await mesh.served_by(ECHO, "rack-1")
    await agent.open()


async def test_there_was_no_discovery(mesh: WholeMesh) -> None:
    """Now a service and a second connector that nobody was told of are found, and the first may go."""
    one, two = await mesh.backend("one"), await mesh.backend("two")
    await mesh.agent(ECHO)
    first = await mesh.connector("rack-1", [route(ECHO, one)])
    await until_answered(mesh, ECHO, b"one")
    await mesh.connector("rack-2", [route(ECHO, two)])
    await mesh.served_by(ECHO, "rack-1", "rack-2")
    await first.stop()
    await mesh.served_by(ECHO, "rack-2")
    await until_answered(mesh, ECHO, b"two")


async def until_answered(mesh: WholeMesh, service: ServiceName, label: bytes) -> None:
    """Ask through the agent until that backend answers."""
    address = await mesh.virtual_address(service)
    async with asyncio.timeout(20):
        while await ask(address, b"who\n") != label + b": who\n":
            await asyncio.sleep(0.05)
