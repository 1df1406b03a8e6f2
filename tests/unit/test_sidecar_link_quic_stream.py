"""sidecar.link.quic_stream: TCP flows on streams of a packet link, through the real forwarder on loopback."""

from __future__ import annotations

import asyncio
import hashlib
import os
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from relay.forwarder import Forwarder
from sidecar.link import listener as listener_module
from sidecar.link.packet import PacketLink
from sidecar.link.quic_stream import UNSENT_BYTES_MAX
from sidecar.link.stream import Carrier, OpenLost
from tests.support.stream_ground import (
    BUFFER_BYTES,
    DEADLINE_SECONDS,
    SESSION,
    Ground,
    Program,
    anybody,
    echo,
    hold,
    open_frame,
)
from ztna.errors import LinkError
from ztna.jsontypes import Binary, Secret
from ztna.names import ServiceName
from ztna.reasons import Reason
from ztna.udp_bulk import BulkSocket
from ztna.wire.control import Address, ForwarderBind
from ztna.wire.stream import WINDOW_BYTES_MAX

PROBE_KEY = Secret(b"p" * 32)
PIECE_BYTES = 256 * 1024
SLACK_BYTES = 4 * 2 * BUFFER_BYTES + PIECE_BYTES
"""What the kernel may hold beside the windows: two local connections with two buffers each, and a piece."""


class Link:
    """A packet link whose connector's end serves the flows of a Ground."""

    def __init__(self, ground: Ground, far: PacketLink, near: PacketLink, forwarder: Forwarder) -> None:
        self.ground, self.far, self.near, self.forwarder = ground, far, near, forwarder

    def carrier(self) -> Carrier:
        return Carrier.over_link(self.near.open_stream(), budget=self.ground.near_budget)

    async def flow(self) -> tuple[Program, Carrier]:
        program, carrier = await self.ground.program(), self.carrier()
        await carrier.open(open_frame(), program.near)
        return program, carrier


@pytest.fixture
async def link(tmp_path: Path) -> AsyncIterator[Link]:
    async with asyncio.timeout(60), asyncio.TaskGroup() as tasks:
        ground = Ground(tmp_path, tasks)
        forwarder = Forwarder(BulkSocket.open(("127.0.0.1", 0)))
        address = Address(*forwarder.address)
        binds = [ForwarderBind(address, Binary(os.urandom(16)), Secret(os.urandom(32))) for _ in range(2)]
        agent, connector = ((bytes(each.bind_id), each.bind_secret) for each in binds)
        forwarder.add_link("link", agent, connector)
        far = PacketLink.serve(
            binds[1],
            PROBE_KEY,
            ground.connector,
            admit=anybody,
            receive=lambda *_: None,
            on_stream=ground.listener.serve_stream,
        )
        near = await PacketLink.dial(
            binds[0],
            PROBE_KEY,
            ground.agent,
            check=anybody,
            receive=lambda *_: None,
            timeout_s=DEADLINE_SECONDS,
        )
        yield Link(ground, far, near, forwarder)
        ground.close()
        near.close()
        far.close()
        forwarder.close()


async def test_bytes_go_both_ways_and_the_carrier_is_free_again(link: Link) -> None:
    await link.ground.serve(echo)
    program, carrier = await link.flow()
    assert not carrier.is_tcp and not carrier.forwarded
    content = os.urandom(2_000_000)
    sending = asyncio.ensure_future(program.send(content))
    got = await program.read(len(content))
    await sending
    assert hashlib.sha256(got).digest() == hashlib.sha256(content).digest()
    program.end()
    assert await program.read_all() == b""
    async with asyncio.timeout(DEADLINE_SECONDS):
        while not carrier.is_idle:
            await asyncio.sleep(0.01)
    again = await link.ground.program()
    await carrier.open(open_frame(), again.near)
    await again.send(b"more")
    again.end()
    assert await again.read_all() == b"more"


async def test_several_flows_beside_each_other(link: Link) -> None:
    await link.ground.serve(echo)

    async def one(number: int) -> bool:
        program, _ = await link.flow()
        said = bytes((number,)) * 100_000
        sending = asyncio.ensure_future(program.send(said))
        got = await program.read(len(said))
        await sending
        program.end()
        return got == said

    assert all(await asyncio.gather(*map(one, range(10))))


async def test_a_reader_that_stops_stops_the_writer(link: Link) -> None:
    """QUIC's credit follows what was read here; what bounds the writer is the flow's window."""
    await link.ground.serve(hold)
    program, _ = await link.flow()
    assert await program.read(1) == b"!"
    sent = 0
    piece = bytes(PIECE_BYTES)
    while sent <= WINDOW_BYTES_MAX + UNSENT_BYTES_MAX + SLACK_BYTES:
        try:
            async with asyncio.timeout(1.0):
                await program.send(piece)
        except TimeoutError:
            break
        sent += len(piece)
    assert sent < WINDOW_BYTES_MAX + UNSENT_BYTES_MAX + SLACK_BYTES
    other, _ = await link.flow()
    assert await other.read(1) == b"!", "and stops nobody else"


async def test_a_flow_changes_the_kind_of_carrier_by_resume(link: Link) -> None:
    """From TCP to the packet link when TCP breaks, and back when the link does: no byte is lost."""
    ground = link.ground
    await ground.serve(echo)
    program, carrier, flow = await ground.flow()
    await program.send(b"one")
    assert await program.read(3) == b"one"
    carrier.close(Reason.PEER_GONE)
    await program.send(b"two")
    over_link = link.carrier()
    await over_link.resume(flow, SESSION, 1)
    assert await program.read(3) == b"two"
    over_link.close(Reason.PEER_GONE)
    await program.send(b"three")
    await (await ground.dial()).resume(flow, SESSION, 2)
    assert await program.read(5) == b"three"
    program.end()
    assert await program.read_all() == b""


async def test_when_the_link_breaks_its_flows_are_detached(link: Link) -> None:
    await link.ground.serve(echo)
    program, carrier = await link.flow()
    await program.send(b"one")
    assert await program.read(3) == b"one"
    link.near.close(Reason.PEER_GONE)
    assert await asyncio.wait_for(carrier.closed, DEADLINE_SECONDS) is Reason.PEER_GONE
    with pytest.raises(LinkError):
        link.near.open_stream()


async def test_a_stream_that_is_refused_ends_at_the_agent(
    link: Link, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(listener_module, "CARRIERS_MAX", 0)
    await link.ground.serve(echo)
    program = await link.ground.program()
    with pytest.raises(OpenLost):
        await link.carrier().open(open_frame(), program.near)


async def test_a_connector_opens_none(link: Link) -> None:
    """Only an agent opens streams: one who gets one closes the link."""
    stream = link.far.open_stream()
    stream.start(lambda: None, lambda: None, lambda error: None)
    stream.write(b"hello")
    assert await asyncio.wait_for(link.near.closed, DEADLINE_SECONDS)


async def test_proof_of_life(link: Link) -> None:
    await link.near.prove(DEADLINE_SECONDS)
    link.forwarder.remove_link("link")
    with pytest.raises(LinkError, match="nothing came back"):
        await link.near.prove(0.3)
    assert link.near.send(ServiceName("echo-service"), b"E" * 20), "and packets still try"


async def test_as_many_streams_as_the_peer_allows(link: Link) -> None:
    await link.ground.serve(hold)
    streams = []
    with pytest.raises(LinkError, match="as many streams"):
        while True:
            streams.append(link.near.open_stream())
            streams[-1].write(b"")
    assert len(streams) == 128
