"""sidecar.connector.links: what an agent hears of candidates. Links themselves are proved with their ends running."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from sidecar.connector.links import Links
from sidecar.connector.sessions import Session, Sessions
from sidecar.link.packet import PacketLink
from tests.support.forwarded import LinkGround
from tests.unit.test_sidecar_connector_sessions import ANN, IP, RELAY, WEB
from ztna.names import ServiceName, SessionId
from ztna.reasons import Reason
from ztna.wire.control import Address, LeaseRef, Offered

DEADLINE_SECONDS = 10
SESSION = SessionId("0" * 16)


class Ground(LinkGround):
    """A connector's links with one session, and what they answered."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        self.addresses: list[str] = ["8.8.8.8"]
        self.answers: asyncio.Queue[tuple[Session, tuple[Address, ...]]] = asyncio.Queue()
        self.sessions = Sessions()
        credentials = self.pki.credentials(self.pki.connector())
        self.links = Links(
            self.sessions,
            lambda session: credentials,
            receive=self.take,
            addresses=lambda: self.addresses,
            answer=lambda session, candidates: self.answers.put_nowait((session, candidates)),
            on_stream=lambda stream: stream.close(),
            private_candidates=False,
        )
        offer = Offered(SESSION, WEB, ANN, LeaseRef(IP, 7), self.connector_bind, self.PROBE_KEY)
        self.session = self.sessions.admit(RELAY, offer)
        self.links.serve(self.session)

    def take(self, link: PacketLink, service: ServiceName, packet: bytes) -> None:
        raise AssertionError("nobody sends here")

    async def bound(self) -> PacketLink:
        link = self.links.of(self.session)
        assert link is not None
        async with asyncio.timeout(DEADLINE_SECONDS):
            await link.carrying.bound
        return link

    def close(self) -> None:
        self.links.close(Reason.DRAINING)
        super().close()


@pytest.fixture
async def ground(tmp_path: Path) -> AsyncIterator[Ground]:
    made = Ground(tmp_path)
    yield made
    made.close()


async def test_an_agent_that_offered_hears_of_other_candidates(ground: Ground) -> None:
    link = await ground.bound()
    (first,) = ground.links.candidates(ground.session)
    assert first.ip == "8.8.8.8"
    ground.addresses[:] = ["8.8.4.4"]
    ground.links.network_changed()
    async with asyncio.timeout(DEADLINE_SECONDS):
        session, (second,) = await ground.answers.get()
    assert session is ground.session
    assert second == Address("8.8.4.4", first.port), "it is the socket that it was"
    assert link.path == "forwarded"


async def test_an_agent_that_offered_nothing_hears_nothing(ground: Ground) -> None:
    link = await ground.bound()
    ground.links._candidates_changed(link, link.carrying.bind_id)
    assert ground.answers.empty()


async def test_nor_one_whose_session_is_over(ground: Ground) -> None:
    link = await ground.bound()
    ground.links.candidates(ground.session)
    ground.sessions.close(RELAY, SESSION, Reason.PEER_GONE, 0.0)
    ground.links._candidates_changed(link, link.carrying.bind_id)
    assert ground.answers.empty()
