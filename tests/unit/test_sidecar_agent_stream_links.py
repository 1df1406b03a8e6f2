"""sidecar.agent.stream_links: a stream carrier for a session's packets, dialled once, retried late, given up."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import cast

import pytest

from sidecar.agent import stream_links
from sidecar.agent.carriers import Carriers
from sidecar.agent.stream_links import StreamLink, StreamLinks
from sidecar.link.packet_stream import PacketCarrier, PacketStream
from tests.unit.test_sidecar_agent_links import session
from ztna.errors import LinkError
from ztna.names import ServiceName, SessionId
from ztna.reasons import Reason
from ztna.wire.stream import FORMER_SESSIONS_MAX, PacketFrame, PacketsFrame, encode

WEB = session("web-app", 1)
DEADLINE_SECONDS = 5.0
PACKET = b"E" + bytes(27)


class Carrier:
    """A carrier that takes everything."""

    forwarded = True
    is_blocked = False

    def __init__(self) -> None:
        self.closed: asyncio.Future[Reason] = asyncio.get_running_loop().create_future()
        self.asked: list[PacketsFrame] = []
        self.sent: list[bytes] = []

    async def open_packets(self, frame: PacketsFrame, packets: PacketStream) -> None:
        self.asked.append(frame)
        packets.attach(cast(PacketCarrier, self))

    def send(self, frame: bytes) -> None:
        self.sent.append(frame)

    def flow_ended(self, *, reusable: bool) -> None:
        self.close()

    def close(self, reason: Reason = Reason.CLOSED_BY_PEER) -> None:
        if not self.closed.done():
            self.closed.set_result(reason)


class Ground:
    """Stream links whose dials wait for `may_dial`, and what their owner heard."""

    def __init__(self, tasks: asyncio.TaskGroup) -> None:
        self.may_dial = asyncio.Event()
        self.may_dial.set()
        self.fails = False
        self.dialled: list[Carrier] = []
        self.links = StreamLinks(cast(Carriers, self), tasks=tasks)
        self.ready: list[StreamLink] = []
        self.failed: list[StreamLink] = []
        self.received: list[tuple[ServiceName, bytes]] = []
        self.heard = asyncio.Event()
        self.links.ready = self._heard(self.ready)
        self.links.failed = self._heard(self.failed)
        self.links.received = lambda link, service, packet: self.received.append((service, packet))

    def _heard(self, found: list[StreamLink]):  # type: ignore[no-untyped-def]
        def hear(link: StreamLink) -> None:
            found.append(link)
            self.heard.set()

        return hear

    async def dial(self, _session: object) -> Carrier:
        await self.may_dial.wait()
        if self.fails:
            raise LinkError("nobody is there")
        self.dialled.append(Carrier())
        return self.dialled[-1]

    async def until_heard(self) -> None:
        async with asyncio.timeout(DEADLINE_SECONDS):
            await self.heard.wait()
        self.heard.clear()


@pytest.fixture
async def ground() -> AsyncIterator[Ground]:
    async with asyncio.timeout(60), asyncio.TaskGroup() as tasks:
        made = Ground(tasks)
        yield made
        made.links.close_all()


async def test_packets_go_once_the_connector_takes_them(ground: Ground) -> None:
    link = ground.links.of(WEB, SessionId("f" * 16))
    assert link is not None and not link.is_ready and not link.carries(WEB)
    assert ground.links.of(WEB) is link, "and it is dialled once"
    assert ground.links.status()[0]["path"] == "dialling"
    await ground.until_heard()
    assert ground.ready == [link] and link.carries(WEB)
    (carrier,) = ground.dialled
    assert carrier.asked == [PacketsFrame(WEB.opened.session, WEB.service, (SessionId("f" * 16),))]
    link.send(WEB.service, PACKET)
    assert carrier.sent == [encode(PacketFrame(PACKET))]
    link.packets.frame_received(PacketFrame(PACKET))
    assert ground.received == [(WEB.service, PACKET)]
    assert ground.links.status()[0]["path"] == "forwarded"


async def test_a_carrier_that_breaks_is_told_and_replaced(ground: Ground) -> None:
    link = ground.links.of(WEB)
    assert link is not None
    await ground.until_heard()
    link.packets.carrier_lost()
    await ground.until_heard()
    assert ground.failed == [link] and link.is_over
    assert ground.links.find(WEB) is None
    assert ground.links.of(WEB) not in (None, link)


async def test_one_that_cannot_be_had_is_not_tried_again_at_once(
    ground: Ground, monkeypatch: pytest.MonkeyPatch
) -> None:
    ground.fails = True
    first = ground.links.of(WEB)
    await ground.until_heard()
    assert ground.failed == [first]
    assert ground.links.of(WEB) is None
    ground.links.session_ended(WEB, Reason.PEER_GONE)
    assert ground.links.of(WEB) is not None, "what is remembered ends with the session"
    await ground.until_heard()
    monkeypatch.setattr(stream_links, "RETRY_SECONDS", 0.0)
    assert ground.links.of(WEB) is not None


async def test_what_is_closed_is_not_told(ground: Ground) -> None:
    ground.may_dial.clear()
    dialling = ground.links.of(WEB)
    assert dialling is not None and dialling.task is not None
    ground.links.session_ended(WEB, Reason.CLOSED_BY_PEER)
    await asyncio.wait((dialling.task,), timeout=DEADLINE_SECONDS)
    assert dialling.task.cancelled()
    ground.may_dial.set()
    standing = ground.links.of(WEB)
    await ground.until_heard()
    assert standing is not None
    ground.links.close(standing)
    async with asyncio.timeout(DEADLINE_SECONDS):
        assert await ground.dialled[-1].closed is Reason.CLOSED_BY_PEER
    assert ground.failed == [] and ground.links.links == ()
    ground.links.close_all()
    assert ground.links.of(WEB) is None, "and no other is dialled"


async def test_only_so_many_sessions_are_followed_and_none_once_it_was_asked(ground: Ground) -> None:
    ground.may_dial.clear()
    for number in range(FORMER_SESSIONS_MAX + 1):
        link = ground.links.of(WEB, SessionId(f"{number:016x}"))
    ground.may_dial.set()
    await ground.until_heard()
    assert link is not None
    assert len(ground.dialled[0].asked[0].former) == FORMER_SESSIONS_MAX
    ground.links.of(WEB, SessionId("e" * 16))
    assert len(link.former) == FORMER_SESSIONS_MAX
