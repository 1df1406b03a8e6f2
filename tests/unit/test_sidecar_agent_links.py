"""sidecar.agent.links, stream_links: to whom a link that is dialled may be given, what a closed one leaves."""

from __future__ import annotations

import asyncio
from ipaddress import IPv4Address
from types import SimpleNamespace
from typing import Any

import pytest

from sidecar.agent.commands import Session
from sidecar.agent.links import Links, PacketLink
from sidecar.agent.relays import Relays
from sidecar.agent.stream_links import StreamLink, StreamLinks
from tests.support.identities import identity
from ztna.errors import LinkError
from ztna.identity import Identity
from ztna.jsontypes import Binary, Secret
from ztna.names import ConnectorId, ServiceName, SessionId
from ztna.reasons import Reason
from ztna.wire.control import Address, ForwarderBind, LeaseRef, Opened

CONNECTOR = identity("c1", connector=["web-app"], id_name="c1")
BIND = ForwarderBind(Address("198.51.100.1", 4434), Binary(b"b" * 16), Secret(b"s" * 32))
WAIT_SECONDS = 10.0


def session(service: str, number: int) -> Session:
    opened = Opened(
        request=number,
        session=SessionId(f"{number:016x}"),
        service=ServiceName(service),
        connector_id=ConnectorId("c1"),
        fingerprint=CONNECTOR.fingerprint,
        forwarder=BIND,
        probe_key=Secret(b"k" * 32),
    )
    return Session("edge", LeaseRef(IPv4Address("10.100.0.2"), 1), opened, 0.0)


class Standing:
    """A packet link that stands: one way, which is forwarded."""

    path = "forwarded"
    rtt_s = unanswered_s = 0.0

    def __init__(self, peer: Identity) -> None:
        self.peer = peer
        self.carrying = SimpleNamespace(bind_id=bytes(BIND.bind_id), paths=SimpleNamespace(is_direct=False))
        self.ways = {self.carrying.bind_id: self.carrying}
        self.closed: asyncio.Future[Reason] = asyncio.get_running_loop().create_future()
        self.streams = 0

    def is_heard(self, bind_id: bytes) -> bool:
        return True

    def local_candidates(self, bind_id: bytes) -> tuple[Address, ...]:
        return ()

    async def prove(self, timeout_s: float) -> None:
        pass

    def open_stream(self) -> int:
        self.streams += 1
        return self.streams

    def close(self, reason: Reason) -> None:
        if not self.closed.done():
            self.closed.set_result(reason)


async def test_no_stream_is_opened_for_a_service_that_the_connector_may_not_serve(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    dialled, standing = asyncio.Event(), Standing(CONNECTOR)

    async def dial(*_: object, **__: object) -> Any:
        await dialled.wait()
        return standing

    monkeypatch.setattr(PacketLink, "dial", dial)
    async with asyncio.timeout(WAIT_SECONDS), asyncio.TaskGroup() as tasks:
        links = Links(
            lambda relay: SimpleNamespace(identity=identity("alice")),  # type: ignore[arg-type, return-value]
            tasks=tasks,
            relays=Relays(["edge"]),
            send=lambda relay, message: None,
            addresses=tuple,
            direct=False,
            private_candidates=False,
        )
        unfit: list[Session] = []
        links.ready = links.failed = links.doubted = lambda link: None
        links.unfit = unfit.append
        good, bad = session("web-app", 1), session("billing", 2)
        # A relay that was stolen says that this connector serves another service, too, while it is dialled.
        streams = [asyncio.ensure_future(links.stream(each)) for each in (good, bad)]
        await asyncio.sleep(0)
        dialled.set()
        await asyncio.wait(streams)
        assert unfit == [bad]
        assert streams[0].result() and standing.streams == 1
        assert isinstance(streams[1].exception(), LinkError)
        links.close()


class Asking:
    """A carrier on which PACKETS is not answered yet."""

    forwarded = False

    def __init__(self) -> None:
        self.closed: asyncio.Future[Reason] = asyncio.get_running_loop().create_future()
        self.asked = asyncio.Event()

    async def dial(self, session: Session) -> Asking:
        return self

    async def open_packets(self, frame: object, packets: object) -> None:
        self.asked.set()
        await asyncio.Event().wait()

    def close(self, reason: Reason = Reason.CLOSED_BY_PEER) -> None:
        if not self.closed.done():
            self.closed.set_result(reason)


async def test_a_stream_link_that_is_closed_before_its_answer_leaves_no_carrier() -> None:
    carrier = Asking()
    async with asyncio.timeout(WAIT_SECONDS), asyncio.TaskGroup() as tasks:
        streams = StreamLinks(carrier, tasks=tasks)  # type: ignore[arg-type]
        told: list[StreamLink] = []
        streams.ready = streams.failed = told.append
        link = streams.of(session("web-app", 1))
        assert link is not None
        await carrier.asked.wait()
        streams.close(link)
        await carrier.closed
    assert streams.links == () and told == []
