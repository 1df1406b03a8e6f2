"""A session is its owners' alone, end to end: real dnsd, relay and connector, and agents that lie.

What the relay refuses about sessions message by message, binds and TCP tokens are in tests/unit/test_relay_daemon.py.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from sidecar.link.stream import FlowRefused
from tests.support.consul import ConsulUnderTest
from tests.support.whole_mesh import ECHO, WEB, Scripted, WholeMesh, ask_on, route, until, whole_mesh
from ztna.errors import LinkError
from ztna.names import SessionId
from ztna.packet import build_udp
from ztna.reasons import Reason
from ztna.telemetry import REFUSALS
from ztna.wire import control
from ztna.wire.control import Opened
from ztna.wire.stream import OpenStatus


@pytest.fixture
async def mesh(tmp_path: Path, own_consul: ConsulUnderTest) -> AsyncIterator[WholeMesh]:
    """One connector with two services, TCP and UDP."""
    async with whole_mesh(tmp_path, own_consul.config()) as mesh:
        echo, web = await mesh.backend("echo"), await mesh.backend("web")
        await mesh.connector(
            "rack-1", [route(ECHO, echo), route(ECHO, echo, protocol="udp"), route(WEB, web)]
        )
        await mesh.served_by(ECHO, "rack-1")
        await mesh.served_by(WEB, "rack-1")
        yield mesh


def refusals(where: str, reason: Reason = Reason.NOT_YOUR_SESSION) -> float:
    return float(REFUSALS.labels(where, reason.value)._value.get())


async def denied(agent: Scripted, opened: Opened, session: Opened, **changes: object) -> None:
    """Say OPEN under a session that is not for this: DENIED, counted."""
    before = refusals("connector")
    carrier = await agent.carrier(opened)
    with pytest.raises(FlowRefused) as refused:
        await agent.say(carrier, session.session, b"let me in\n", **changes)
    assert refused.value.status is OpenStatus.DENIED
    assert refusals("connector") == before + 1


async def test_an_open_under_another_agents_session(mesh: WholeMesh) -> None:
    alice, mallory = await mesh.scripted("alice", ECHO, WEB), await mesh.scripted("mallory", ECHO, WEB)
    hers, his = await alice.open(), await mallory.open()
    await denied(mallory, his, hers)
    assert await alice.say(await alice.carrier(hers), hers.session, b"hello\n") == b"echo: hello\n"
    assert await mallory.say(await mallory.carrier(his), his.session, b"hello\n") == b"echo: hello\n"


async def test_an_open_for_another_service(mesh: WholeMesh) -> None:
    alice = await mesh.scripted("alice", ECHO, WEB)
    for_echo = await alice.open(ECHO)
    await denied(alice, for_echo, for_echo, service=WEB)
    for_web = await alice.open(WEB)
    await denied(alice, for_echo, for_web, service=ECHO)
    carrier = await alice.carrier(for_web)
    assert await alice.say(carrier, for_web.session, b"hello\n", service=WEB) == b"web: hello\n"


async def test_an_open_under_a_session_that_has_ended(mesh: WholeMesh) -> None:
    alice = await mesh.scripted("alice", ECHO)
    opened = await alice.open()
    alice.peer.say(control.Closed(opened.session, Reason.CLOSED_BY_PEER))
    assert mesh.relay.status("sessions")
    await until("ended", lambda: not mesh.connectors["rack-1"].status("connector")["sessions_total"])
    await denied(alice, opened, opened)


async def test_a_link_with_a_stolen_ticket(mesh: WholeMesh) -> None:
    """Bind id, secret and probe key of another do not help: the connector wants that agent's certificate."""
    alice, mallory = await mesh.scripted("alice", ECHO), await mesh.scripted("mallory", ECHO)
    hers = await alice.open()
    before = refusals("packet_carrier")
    with pytest.raises(LinkError, match="not_your_session"):
        await mallory.link(hers)
    assert refusals("packet_carrier") == before + 1
    link = await alice.link(hers)
    await alice.udp(link, b"hello")
    assert (await alice.packets.get()).payload == b"echo: hello"


async def test_a_packet_for_a_service_without_session_on_a_good_link(mesh: WholeMesh) -> None:
    alice = await mesh.scripted("alice", ECHO, WEB)
    link = await alice.link(await alice.open())
    before = refusals("connector")
    web = await mesh.lease(WEB)
    link.send(WEB, build_udp("127.0.0.1", 5555, str(web.ip), 7007, b"let me in"))
    link.send(ECHO, build_udp("127.0.0.1", 5555, str(web.ip), 7007, b"by its address"))
    await until("refused", lambda: refusals("connector") == before + 1)
    await until("refused", lambda: refusals("connector", Reason.STALE_EPOCH) >= 1)
    await alice.udp(link, b"hello")
    assert (await alice.packets.get()).payload == b"echo: hello"
    assert alice.packets.empty()


async def test_a_forwarded_carrier_of_another_session(mesh: WholeMesh) -> None:
    """What the relay carried for one session serves no other, even of the same agent."""
    alice = await mesh.scripted("alice", ECHO, WEB)
    for_echo, for_web = await alice.open(ECHO), await alice.open(WEB)
    before = refusals("stream_carrier")
    carrier = await alice.forwarded(for_echo)
    with pytest.raises(FlowRefused) as refused:
        await alice.say(carrier, for_web.session, b"let me in\n", service=WEB)
    assert refused.value.status is OpenStatus.DENIED
    assert refusals("stream_carrier") == before + 1
    assert await alice.say(await alice.forwarded(for_echo), for_echo.session, b"hello\n") == b"echo: hello\n"


async def test_a_resume_by_another_agent_under_a_wrong_session_or_twice(mesh: WholeMesh) -> None:
    alice, bob = await mesh.scripted("alice", ECHO, WEB), await mesh.scripted("bob", ECHO)
    for_echo, for_web, bobs = await alice.open(ECHO), await alice.open(WEB), await bob.open(ECHO)
    carrier = await alice.carrier(for_echo)
    flow, program = await alice.begin(carrier, for_echo.session)
    assert await ask_on(program, b"before\n") == b"echo: before\n"
    carrier.close(Reason.PEER_GONE)
    wrong = (
        (bob, bobs.session, OpenStatus.UNKNOWN_FLOW),  # it is none of his, so there is none
        (bob, for_echo.session, OpenStatus.DENIED),
        (alice, bobs.session, OpenStatus.DENIED),
        (alice, for_web.session, OpenStatus.DENIED),
        (alice, SessionId("f" * 16), OpenStatus.DENIED),
    )
    for agent, session, status in wrong:
        with pytest.raises(FlowRefused) as refused:
            await (await agent.carrier(for_echo)).resume(flow, session, 9)
        assert refused.value.status is status
    again = await alice.open(ECHO)
    await (await alice.carrier(again)).resume(flow, again.session, 2)
    for attempt in (1, 2):
        with pytest.raises(FlowRefused) as refused:
            await (await alice.carrier(again)).resume(flow, again.session, attempt)
        assert refused.value.status is OpenStatus.DENIED
    assert await ask_on(program, b"after\n") == b"echo: after\n"
    program.close()
