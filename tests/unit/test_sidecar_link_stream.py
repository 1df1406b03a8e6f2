"""sidecar.link.stream, .carrier and .flow, and ztna.tls_tcp: real TLS on loopback, both ends and hostile ones."""

import asyncio
import contextlib
import errno
import hashlib
import os
import socket
import ssl
import struct
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import cast

import pytest

from relay.splicer import Splicer
from relay.splicer import listen as listen_tcp
from sidecar.link.carrier import FrameStream
from sidecar.link.chunks import PIECE_BYTES
from sidecar.link.flow import abort, reset_code
from sidecar.link.listener import UNOWNED_SECONDS
from sidecar.link.stream import ALPN, Carrier, FlowRefused, OpenLost
from tests.support.stream_ground import (
    DEADLINE_SECONDS,
    OTHER_SESSION,
    SESSION,
    Ground,
    Program,
    Raw,
    anybody,
    echo,
    hold,
    open_frame,
    refusals,
)
from ztna.config import TlsConfig
from ztna.credentials import Credentials
from ztna.errors import IdentityError, LinkError
from ztna.identity import Identity
from ztna.names import SessionId
from ztna.reasons import Reason
from ztna.tls_tcp import connect, secure
from ztna.wire.stream import (
    WINDOW_BYTES_MIN,
    Ack,
    Data,
    Fin,
    Frame,
    OpenedFrame,
    OpenStatus,
    ResetFrame,
    ResumeFrame,
    encode,
)


@pytest.fixture
async def ground(tmp_path: Path) -> AsyncIterator[Ground]:
    async with asyncio.timeout(60), asyncio.TaskGroup() as tasks:
        ground = Ground(tmp_path, tasks)
        yield ground
        ground.close()


async def test_bytes_go_both_ways_and_the_carrier_is_free_again(ground: Ground) -> None:
    await ground.serve(echo)
    program, carrier, flow = await ground.flow()
    await program.send(b"hello")
    assert await program.read(5) == b"hello"
    assert not carrier.is_idle
    program.end()
    assert await program.read_all() == b""
    assert await flow.finished
    assert carrier.is_idle
    assert (flow.bytes_sent, flow.bytes_received) == (5, 5)
    assert ground.near_budget.used == 0
    again = await ground.program()
    second = await carrier.open(open_frame(), again.near)
    await again.send(b"more")
    again.end()
    assert await again.read_all() == b"more"
    assert await second.finished
    assert ground.far_budget.used == 0
    assert carrier.peer.fingerprint == ground.connector.identity.fingerprint


async def test_fifty_parallel_downloads_arrive_intact(ground: Ground) -> None:
    content = os.urandom(1_000_000)

    async def download(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readexactly(3)
        writer.write(content)
        await writer.drain()
        writer.close()

    await ground.serve(download)

    async def get() -> bytes:
        program, _, flow = await ground.flow()
        await program.send(b"GET")
        got = await program.read_all()
        program.end()
        assert await flow.finished
        return hashlib.sha256(got).digest()

    assert set(await asyncio.gather(*(get() for _ in range(50)))) == {hashlib.sha256(content).digest()}
    assert ground.near_budget.used == ground.far_budget.used == 0


async def test_uploads_and_downloads_at_once_arrive_intact(ground: Ground) -> None:
    await ground.serve(echo)
    content = os.urandom(3_000_000)

    async def bounce() -> None:
        program, _, flow = await ground.flow()

        async def send() -> None:
            for start in range(0, len(content), 70_001):
                await program.send(content[start : start + 70_001])
            program.end()

        _, got = await asyncio.gather(send(), program.read_all())
        assert got == content
        assert await flow.finished

    await asyncio.gather(*(bounce() for _ in range(4)))


async def test_a_reader_that_stops_holds_no_more_than_the_window_and_then_gets_all(ground: Ground) -> None:
    total = 64 * 1024 * 1024
    sent = 0

    async def flood(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal sent
        while sent < total:
            writer.write(bytes(1 << 18))
            sent += 1 << 18
            await writer.drain()
        writer.close()

    await ground.serve(flood)
    program, _, flow = await ground.flow()
    [far] = ground.listener.served.flows()
    previous = -1
    while sent != previous or not far.state.sent_position:
        previous = sent
        await asyncio.sleep(0.3)  # until the flood stands still
    assert sent < total
    window = flow.state.receive_window
    assert 0 < flow.state.received_position - flow.state.delivered_position <= window
    assert far.state.kept_bytes <= window + PIECE_BYTES  # the first may be acknowledged in part
    assert ground.near_budget.used + ground.far_budget.used <= 4 * window
    [writer] = ground.listener._carriers
    # What a full socket took is on its way, not held back until more comes.
    assert writer.frames._tls._tls.getsockopt(socket.IPPROTO_TCP, socket.TCP_CORK) == 0
    got = 0
    while part := await asyncio.get_running_loop().sock_recv(program.sock, 1 << 18):
        got += len(part)
    assert got == total
    program.end()
    assert await flow.finished


async def test_the_program_may_end_its_side_first(ground: Ground) -> None:
    async def answer_after_the_end(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        request = await reader.read()
        writer.write(b"got " + request)
        writer.close()

    await ground.serve(answer_after_the_end)
    program, _, flow = await ground.flow()
    await program.send(b"everything")
    program.end()
    assert await program.read_all() == b"got everything"
    assert await flow.finished


async def test_the_backend_may_end_its_side_first(ground: Ground) -> None:
    received: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()

    async def end_then_listen(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"bye")
        writer.write_eof()
        received.set_result(await reader.read())
        writer.close()

    await ground.serve(end_then_listen)
    program, _, flow = await ground.flow()
    assert await program.read_all() == b"bye"
    await program.send(b"still here")
    program.end()
    assert await received == b"still here"
    assert await flow.finished


async def test_a_reset_of_the_backend_reaches_the_program(ground: Ground) -> None:
    async def reset(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readexactly(1)
        writer.get_extra_info("socket").setsockopt(
            socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0)
        )
        writer.transport.abort()

    await ground.serve(reset)
    program, carrier, flow = await ground.flow()
    await program.send(b"x")
    with pytest.raises(ConnectionResetError):
        await program.read_all()
    assert not await flow.finished
    await carrier.closed
    assert ground.near_budget.used == ground.far_budget.used == 0


async def test_a_reset_of_the_program_reaches_the_backend(ground: Ground) -> None:
    seen: asyncio.Future[str] = asyncio.get_running_loop().create_future()

    async def watch(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await reader.read()
            seen.set_result("end")
        except ConnectionResetError:
            seen.set_result("reset")
        writer.close()

    await ground.serve(watch)
    program, carrier, flow = await ground.flow()
    abort(program.sock)
    assert await seen == "reset"
    assert not await flow.finished
    await carrier.closed


async def test_a_program_that_vanishes_while_the_backend_sends_ends_the_flow(ground: Ground) -> None:
    async def flood(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError):
            while True:
                writer.write(bytes(1 << 16))
                await writer.drain()
        writer.close()

    await ground.serve(flood)
    program, _, flow = await ground.flow()
    program.end()
    await program.read(1000)
    program.sock.close()
    assert not await flow.finished


@pytest.mark.parametrize("status", [status for status in OpenStatus if status is not OpenStatus.OK])
async def test_a_refusal_says_why_and_closes_the_carrier(ground: Ground, status: OpenStatus) -> None:
    ground.refuse = status
    carrier, program = await ground.dial(), await ground.program()
    with pytest.raises(FlowRefused) as caught:
        await carrier.open(open_frame(), program.near)
    assert caught.value.status is status
    await carrier.closed
    assert program.near.fileno() >= 0
    assert ground.near_budget.used == ground.far_budget.used == 0


async def test_an_agent_that_gives_up_stops_the_connectors_dialling(ground: Ground) -> None:
    ground.hang = True
    carrier, program = await ground.dial(), await ground.program()
    opening = asyncio.ensure_future(carrier.open(open_frame(), program.near))
    await ground.opening.wait()
    opening.cancel()
    with pytest.raises(asyncio.CancelledError):
        await opening
    await carrier.closed
    while ground.listener._carriers:
        await asyncio.sleep(0.01)
    assert ground.far_budget.used == ground.near_budget.used == 0


async def test_at_the_budget_an_open_is_denied_at_either_end(ground: Ground) -> None:
    ground.far_budget._process_bytes = 1000
    carrier, program = await ground.dial(), await ground.program()
    with pytest.raises(FlowRefused) as caught:
        await carrier.open(open_frame(), program.near)
    assert caught.value.status is OpenStatus.DENIED
    assert ground.opened == []
    ground.near_budget._process_bytes = 1000
    carrier = await ground.dial()
    with pytest.raises(FlowRefused):
        await carrier.open(open_frame(), program.near)
    assert carrier.is_idle


async def test_a_flow_that_is_known_is_never_dialled_again(ground: Ground) -> None:
    await ground.serve(echo)
    carrier, program = await ground.dial(), await ground.program()
    frame = open_frame()
    flow = await carrier.open(frame, program.near)
    program.end()
    assert await flow.finished
    again = await ground.program()
    with pytest.raises(FlowRefused) as caught:
        await carrier.open(frame, again.near)
    assert caught.value.status is OpenStatus.DENIED
    assert len(ground.opened) == 1


async def test_ending_a_session_resets_its_flows_only(ground: Ground) -> None:
    await ground.serve(echo)
    program, _, flow = await ground.flow()
    other_program, other_carrier = await ground.program(), await ground.dial()
    other = await other_carrier.open(open_frame(OTHER_SESSION), other_program.near)
    ground.listener.end_session(SESSION, "somebody else", Reason.NO_GRANT)
    ground.listener.end_session(SESSION, ground.agent.identity.name, Reason.NO_GRANT)
    assert not await flow.finished
    with pytest.raises(ConnectionResetError):
        await program.read_all()
    await other_program.send(b"x")
    assert await other_program.read(1) == b"x"
    assert not other.finished.done()


async def test_ending_a_session_stops_a_dial_that_it_had_begun(ground: Ground) -> None:
    ground.hang = True
    carrier, program = await ground.dial(), await ground.program()
    opening = asyncio.ensure_future(carrier.open(open_frame(), program.near))
    await ground.opening.wait()
    ground.listener.end_session(SESSION, ground.agent.identity.name, Reason.STALE_EPOCH)
    with pytest.raises(FlowRefused) as caught:
        await opening
    assert caught.value.status is OpenStatus.DENIED
    await asyncio.sleep(0)
    assert ground.far_budget.used == ground.near_budget.used == 0


async def test_closing_the_listener_ends_all(ground: Ground) -> None:
    await ground.serve(echo)
    _, carrier, flow = await ground.flow()
    idle = await ground.dial()
    ground.listener.close()
    assert not await flow.finished
    await carrier.closed
    await idle.closed
    with pytest.raises(LinkError):
        await ground.dial()


# Through a forwarder


class Forwarded:
    """A relay's splicer that lets one pair in for a session."""

    def __init__(self, ground: Ground) -> None:
        self.ground = ground
        self.agent_token, self.connector_token = os.urandom(32), os.urandom(32)
        self.waiting = asyncio.Event()
        self.splicer = Splicer(listen_tcp(("127.0.0.1", 0)), self._waits)
        ground.closing.append(self.splicer.close)
        assert self.splicer.admit_agent(SESSION, self.agent_token)

    def _waits(self, session: SessionId, waiter: int) -> None:
        assert self.splicer.admit_connector(session, waiter, self.connector_token)
        self.waiting.set()

    async def dial(self) -> Carrier:
        async def carry() -> None:
            await self.waiting.wait()
            await self.ground.listener.carry(self.splicer.address, self.connector_token, SESSION)

        carrying = self.ground.tasks.create_task(carry())
        carrier = await Carrier.dial_forwarder(
            self.splicer.address, self.agent_token, self.ground.agent, anybody, budget=self.ground.near_budget
        )
        self.ground.closing.append(carrier.close)
        await carrying
        return carrier


async def test_flows_go_through_a_forwarder_half_close_included(ground: Ground) -> None:
    await ground.serve(echo)
    carrier = await Forwarded(ground).dial()
    content = os.urandom(2_000_000)
    for _ in range(2):
        program = await ground.program()
        flow = await carrier.open(open_frame(), program.near)

        async def send(program: Program = program) -> None:
            await program.send(content)
            program.end()

        _, got = await asyncio.gather(send(), program.read_all())
        assert got == content
        assert await flow.finished
    assert carrier.forwarded


async def test_a_forwarded_carrier_serves_only_its_session(ground: Ground) -> None:
    await ground.serve(echo)
    carrier, program = await Forwarded(ground).dial(), await ground.program()
    before = refusals(Reason.NOT_YOUR_SESSION)
    with pytest.raises(FlowRefused) as caught:
        await carrier.open(open_frame(OTHER_SESSION), program.near)
    assert caught.value.status is OpenStatus.DENIED
    assert ground.opened == []
    assert refusals(Reason.NOT_YOUR_SESSION) == before + 1


async def test_an_idle_forwarded_carrier_ends_with_its_session(ground: Ground) -> None:
    carrier = await Forwarded(ground).dial()
    ground.listener.end_session(SESSION, ground.agent.identity.name, Reason.CLOSED_BY_PEER)
    await carrier.closed


async def test_a_token_that_admits_nobody_is_a_link_error(ground: Ground) -> None:
    forwarded = Forwarded(ground)
    with pytest.raises(LinkError, match="forwarder"):
        await Carrier.dial_forwarder(
            forwarded.splicer.address, os.urandom(32), ground.agent, anybody, budget=ground.near_budget
        )


async def test_a_forwarder_that_talks_nonsense_or_nothing_is_a_link_error(ground: Ground) -> None:
    async def nonsense(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 400 Bad Request\r\n\r\n")

    await ground.serve(nonsense)
    token = os.urandom(32)
    with pytest.raises(LinkError, match="no bound"):
        await Carrier.dial_forwarder(ground.backend, token, ground.agent, anybody, budget=ground.near_budget)
    await ground.serve(hold)
    with pytest.raises(LinkError, match=r"did not bind within 0\.2 s"):
        await Carrier.dial_forwarder(
            ground.backend, token, ground.agent, anybody, budget=ground.near_budget, timeout_s=0.2
        )


# Who is who


async def presented(ground: Ground, tls: TlsConfig | None, alpn: str | None) -> bytes:
    """Connect as a raw TLS client, say an OPEN in the flight of the handshake's end, return what comes back."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    if tls is not None:
        context.load_cert_chain(tls.certificate, tls.key)
    if alpn is not None:
        context.set_alpn_protocols([alpn])
    reader, writer = await asyncio.open_connection(*ground.address, ssl=context)
    writer.write(encode(open_frame()))
    try:
        with contextlib.suppress(ConnectionError, ssl.SSLError):
            return await reader.read()
        return b""
    finally:
        writer.close()


BAD_CLIENTS = (
    "self_signed", "rogue_ca", "rogue_leaf_beside_true_ca", "rogue_leaf_before_true_leaf", "no_sans",
    "foreign_sans", "unknown_san_under_ztna", "wrong_eku", "no_eku", "ca_as_leaf", "expired", "not_yet_valid",
    "no_certificate",
)  # fmt: skip


@pytest.mark.parametrize("kind", BAD_CLIENTS)
async def test_a_bad_agent_is_refused_with_its_reason_before_anything_is_acted_on(
    ground: Ground, kind: str
) -> None:
    bad = ground.pki.bad(["agent.echo-service.ztna"], "client")[kind]
    chain = bad.presented
    tls = None if chain is None else ground.pki.write(chain.chain_pem, chain.key_pem)
    before = refusals(bad.reason)
    assert await presented(ground, tls, ALPN) == b""
    assert refusals(bad.reason) == before + 1
    assert ground.opened == []
    assert not ground.listener._carriers


@pytest.mark.parametrize("kind", [kind for kind in BAD_CLIENTS if kind != "no_certificate"])
async def test_a_bad_connector_is_refused_with_its_reason(ground: Ground, kind: str) -> None:
    bad = ground.pki.bad(["connector.echo-service.ztna", "id.connector-1.ztna"], "server")[kind]
    assert bad.presented is not None
    tls = ground.pki.write(bad.presented.chain_pem, bad.presented.key_pem)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tls.certificate, tls.key)
    context.set_alpn_protocols([ALPN])
    server = await asyncio.start_server(echo, "127.0.0.1", 0, ssl=context)
    ground.closing.append(server.close)
    ground.address = server.sockets[0].getsockname()
    with pytest.raises(IdentityError) as caught:
        await ground.dial()
    assert caught.value.reason is bad.reason


async def test_another_connector_than_was_meant_is_refused(ground: Ground) -> None:
    def check(identity: Identity) -> None:
        raise IdentityError(Reason.NO_GRANT, identity.name)

    before = refusals(Reason.NO_GRANT)
    with pytest.raises(IdentityError):
        await ground.dial(check)
    assert refusals(Reason.NO_GRANT) == before + 1


async def test_an_agents_certificate_is_no_connectors(ground: Ground) -> None:
    ground.connector = Credentials.load(ground.pki.agent())
    ground.make_listener()
    with pytest.raises(IdentityError) as caught:
        await ground.dial()
    assert caught.value.reason is Reason.NO_GRANT


@pytest.mark.parametrize("alpn", [None, "h2", "ztna-link"])
async def test_any_other_alpn_is_closed_unread(ground: Ground, alpn: str | None) -> None:
    assert await presented(ground, ground.pki.agent(), alpn) == b""
    assert ground.opened == []


async def test_a_connector_without_our_alpn_is_closed(ground: Ground) -> None:
    tls = ground.pki.connector()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tls.certificate, tls.key)
    server = await asyncio.start_server(echo, "127.0.0.1", 0, ssl=context)
    ground.closing.append(server.close)
    ground.address = server.sockets[0].getsockname()
    with pytest.raises(LinkError, match="no ALPN"):
        await ground.dial()


async def test_a_listener_that_says_nothing_is_a_link_error_in_time(ground: Ground) -> None:
    silent = socket.create_server(("127.0.0.1", 0))
    ground.sockets.append(silent)
    sock = await connect(silent.getsockname(), 1)
    with pytest.raises(LinkError, match=r"within 0\.2 s"):
        await secure(sock, ground.agent, ALPN, server_side=False, timeout_s=0.2)


async def test_a_connection_that_is_reset_before_tls_is_a_link_error(ground: Ground) -> None:
    listening = socket.create_server(("127.0.0.1", 0))
    ground.sockets.append(listening)
    sock = await connect(listening.getsockname(), 1)
    abort(listening.accept()[0])
    while sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1) != b"\x07":  # TCP_CLOSE
        await asyncio.sleep(0.01)
    with pytest.raises(LinkError, match="before TLS"):
        await secure(sock, ground.agent, ALPN, server_side=False)


@pytest.mark.parametrize("error", [ConnectionResetError, TimeoutError, OSError(errno.EHOSTUNREACH, "no way")])
async def test_an_end_that_an_error_cut_short_is_not_taken_for_a_clean_one(
    ground: Ground, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    stream = await secure(await connect(ground.address, 1), ground.agent, ALPN, server_side=False)
    parted: asyncio.Future[bool] = asyncio.get_running_loop().create_future()

    def broken(*_: object) -> bytes:
        raise error

    monkeypatch.setattr(socket.socket, "recv", broken)
    stream.finish(DEADLINE_SECONDS, parted.set_result)
    async with asyncio.timeout(DEADLINE_SECONDS / 2):
        assert await parted is False


async def test_what_is_no_tls_is_a_link_error(ground: Ground) -> None:
    async def nonsense(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"220 smtp ready\r\n")

    await ground.serve(nonsense)
    ground.address = ground.backend
    with pytest.raises(LinkError, match="TLS handshake failed"):
        await ground.dial()


# Hostile peers that have a good certificate


@pytest.mark.parametrize(
    "frames",
    [
        (Data(b"x"),),
        (Fin(),),
        (Ack(0),),
        (ResetFrame(0),),
        (OpenedFrame(OpenStatus.OK, WINDOW_BYTES_MIN),),
        (b"\xff\x00\x00\x00",),
        (b"\x01\x00\x00\x02{}",),
        (b"\x03\xff\xff\xff",),
        (b"GET / HTTP/1.1\r\n\r\n",),
    ],
)
async def test_frames_without_a_flow_close_that_carrier_only(ground: Ground, frames: tuple[Frame]) -> None:
    await ground.serve(echo)
    program, _, _flow = await ground.flow()
    before = refusals(Reason.MALFORMED)
    raw = await Raw.connect(ground)
    raw.send(*frames)
    assert await raw.closed() == []
    assert refusals(Reason.MALFORMED) == before + 1
    await program.send(b"x")
    assert await program.read(1) == b"x"


@pytest.mark.parametrize(
    "frames",
    [
        (open_frame(),),
        (Ack(1),),
        (Fin(), Fin()),
        (Fin(), Data(b"x")),
        (OpenedFrame(OpenStatus.OK, WINDOW_BYTES_MIN),),
        (ResumeFrame(SESSION, "0" * 32, 1, 0, WINDOW_BYTES_MIN),),
        (b"\x09\x00\x00\x00",),
    ],
)
async def test_wrong_frames_in_a_flow_close_the_carrier_and_reset_the_backend(
    ground: Ground, frames: tuple[Frame]
) -> None:
    lost: asyncio.Future[bool] = asyncio.get_running_loop().create_future()

    async def watch(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while await reader.read(1000):
                pass
            await reader.read(1000)
            writer.write(b"still there?")
            await writer.drain()
            await asyncio.sleep(0)
        except ConnectionError:
            pass
        lost.set_result(True)
        writer.close()

    await ground.serve(watch)
    raw = await Raw.connect(ground)
    assert (await raw.opened()).status is OpenStatus.OK
    raw.send(*frames)
    await raw.closed()
    assert await lost
    assert ground.far_budget.used == 0


async def test_more_than_the_window_closes_the_carrier(ground: Ground) -> None:
    await ground.serve(hold)
    raw = await Raw.connect(ground)
    window = (await raw.opened()).window
    [flow] = ground.listener.served.flows()
    # The kernel takes its share; the rest is held, and one byte more than the window ends it.
    for _ in range(3 * window // 65_536 + 200):
        raw.send(Data(bytes(65_536)))
    await raw.closed()
    assert len(flow._held) == 0
    assert not flow.finished.result()
    assert ground.far_budget.used == 0


async def test_tiny_frames_cost_no_more_than_their_bytes(ground: Ground) -> None:
    await ground.serve(echo)
    raw = await Raw.connect(ground)
    await raw.opened()
    raw.send(b"\x03\x00\x00\x01x" * 20_000, Fin())
    got = b""
    while not isinstance(frame := await raw.next(), Fin):
        if isinstance(frame, Data):
            got += bytes(frame.data)
    assert got == b"x" * 20_000


async def test_data_before_opened_is_malformed_and_a_reset_gives_up(ground: Ground) -> None:
    ground.hang = True
    raw = await Raw.connect(ground)
    raw.send(open_frame(), Data(b"early"))
    assert await raw.closed() == []
    raw = await Raw.connect(ground)
    raw.send(open_frame(), ResetFrame(0))
    assert await raw.closed() == []
    assert ground.far_budget.used == 0


async def test_a_resume_is_answered_with_unknown_flow(ground: Ground) -> None:
    raw = await Raw.connect(ground)
    raw.send(ResumeFrame(SESSION, "0" * 32, 1, 0, WINDOW_BYTES_MIN))
    assert await raw.closed() == [OpenedFrame(OpenStatus.UNKNOWN_FLOW, 0)]


async def test_a_peer_that_opens_nothing_is_closed(ground: Ground) -> None:
    ground.make_listener(first_open_s=0.2)
    raw = await Raw.connect(ground)
    assert await raw.closed() == []


async def test_a_connection_without_handshake_is_closed(ground: Ground) -> None:
    ground.make_listener(first_open_s=0.2)
    reader, writer = await asyncio.open_connection(*ground.address)
    assert await reader.read() == b""
    writer.close()


async def test_an_idle_carrier_is_closed_in_the_end(ground: Ground) -> None:
    ground.make_listener(idle_s=0.2)
    await ground.serve(echo)
    program, carrier, flow = await ground.flow()
    program.end()
    assert await flow.finished
    await carrier.closed


async def test_an_idle_carrier_is_closed_soon_after_its_agents_last_session(ground: Ground) -> None:
    await ground.serve(echo)
    program, carrier, flow = await ground.flow()
    listener, now = ground.listener, 100.0
    listener.close_unowned(lambda agent: False, now)
    listener.close_unowned(lambda agent: False, now + UNOWNED_SECONDS)
    assert not carrier.closed.done(), "a flow runs"
    program.end()
    assert await flow.finished
    async with asyncio.timeout(DEADLINE_SECONDS):
        while next(iter(listener._carriers)).frames.flow is not None:
            await asyncio.sleep(0.01)
    for later, is_owned in ((0.0, False), (1.0, True), (2.0, False), (2.0 + UNOWNED_SECONDS / 2, False)):
        listener.close_unowned(lambda agent, is_owned=is_owned: is_owned, now + later)  # type: ignore[misc]
        assert listener._carriers
    listener.close_unowned(lambda agent: False, now + 2.0 + UNOWNED_SECONDS)
    await carrier.closed


@pytest.mark.parametrize("whose", ["agent", "connector"])
async def test_a_carrier_ends_with_a_certificate_whatever_runs_on_it(ground: Ground, whose: str) -> None:
    """An expired certificate ends what lives under it, with that reason (design.md 5)."""
    soon = datetime.now(UTC) + timedelta(seconds=3)
    role = ["agent.echo-service.ztna"] if whose == "agent" else ["connector.echo-service.ztna", "id.c-1.ztna"]
    short = ground.pki.signed(dns=role, not_after=soon)
    setattr(ground, whose, Credentials.load(ground.pki.write(short.chain_pem, short.key_pem)))
    ground.make_listener()
    await ground.serve(hold)
    before = refusals(Reason.EXPIRED)
    program, carrier, flow = await ground.flow()
    assert await program.read(1) == b"!"
    assert not await flow.finished
    with pytest.raises(ConnectionResetError):
        await program.read(1)
    assert await carrier.closed in (Reason.EXPIRED, Reason.CLOSED_BY_PEER, Reason.PEER_GONE)
    assert refusals(Reason.EXPIRED) >= before + 1


async def test_an_ack_comes_within_a_tenth_of_a_second_and_at_once_for_a_fin(ground: Ground) -> None:
    await ground.serve(hold)
    raw = await Raw.connect(ground)
    await raw.opened()
    assert await raw.next() == Data(b"!")
    raw.send(Data(b"abc"))
    assert await raw.next() == Ack(3)
    raw.send(Data(b"d"), Fin())
    assert await raw.next() == Ack(5)


async def test_an_acknowledged_flow_that_goes_on_is_not_disturbed_by_old_acks(ground: Ground) -> None:
    await ground.serve(echo)
    raw = await Raw.connect(ground)
    await raw.opened()
    raw.send(Data(b"abc"))
    seen: list[Frame | None] = [await raw.next(), await raw.next()]
    assert Data(b"abc") in seen
    raw.send(Ack(3), Ack(3), Ack(2))
    assert await raw.closed() == [ResetFrame(reset_code(Reason.MALFORMED))]


async def test_an_idle_agents_carrier_refuses_what_it_did_not_ask_for(ground: Ground) -> None:
    async def talk(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(encode(OpenedFrame(OpenStatus.OK, WINDOW_BYTES_MIN)))

    server = await asyncio.start_server(talk, "127.0.0.1", 0, ssl=ground.connector.server_context(ALPN))
    ground.closing.append(server.close)
    ground.address = server.sockets[0].getsockname()
    carrier = await ground.dial()
    assert await carrier.closed is Reason.MALFORMED


async def test_a_connector_that_hangs_up_before_opened_is_a_link_error(ground: Ground) -> None:
    async def hang_up(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(1)
        writer.close()

    server = await asyncio.start_server(hang_up, "127.0.0.1", 0, ssl=ground.connector.server_context(ALPN))
    ground.closing.append(server.close)
    ground.address = server.sockets[0].getsockname()
    carrier, program = await ground.dial(), await ground.program()
    with pytest.raises(OpenLost, match="before the answer") as caught:
        await carrier.open(open_frame(), program.near)
    assert caught.value.flow.abandon() is program.near
    assert ground.near_budget.used == 0


def test_reset_codes_are_distinct() -> None:
    codes = {reset_code(reason) for reason in (None, *Reason)}
    assert len(codes) == len(Reason) + 1
    assert max(codes) < 256


async def test_a_blocked_carrier_waits_and_then_goes_on(ground: Ground) -> None:
    """Nothing is lost or reordered when TLS takes frames only in part."""
    await ground.serve(echo)
    program, carrier, flow = await ground.flow()
    frames: FrameStream = carrier._frames
    blocked = 0
    original = frames._tls.write

    def stingy(data: bytes | memoryview) -> int:
        nonlocal blocked
        blocked += 1
        if blocked % 3 == 0:
            frames._tls._await_writable()
            return 0
        return original(data)

    frames._tls.write = stingy  # type: ignore[method-assign]
    content = os.urandom(5_000_000)

    async def send() -> None:
        await program.send(content)
        program.end()

    _, got = await asyncio.gather(send(), program.read_all())
    assert got == content
    assert await flow.finished
    assert blocked > 10


async def test_an_ack_for_the_beginning_of_a_frame_that_is_still_being_written_is_taken(
    ground: Ground,
) -> None:
    ground.far_budget._peer_bytes = 1 << 20  # a small window: ACKs come inside of frames
    await ground.serve(echo)
    program, carrier, flow = await ground.flow()
    stream = carrier._frames._tls
    original = stream.write
    early = 0

    def in_parts(data: bytes | memoryview) -> int:
        nonlocal early
        early += flow._early_ack is not None
        written = original(data[:20_000])
        if written < len(data):
            # Give the other end time to answer before the rest.
            asyncio.get_running_loop().call_later(0.005, stream._await_writable)
        return written

    stream.write = in_parts  # type: ignore[method-assign]
    content = os.urandom(2_000_000)

    async def send() -> None:
        await program.send(content)
        program.end()

    _, got = await asyncio.gather(send(), program.read_all())
    assert got == content
    assert await flow.finished
    assert early > 0


@pytest.mark.parametrize("number", [errno.EMFILE, errno.ECONNABORTED, errno.EPROTO])
async def test_after_a_failed_accept_the_next_carrier_is_taken(ground: Ground, number: int) -> None:
    """What happened to one that waited is no other's business (accept(2)); without descriptors it pauses."""
    await ground.serve(echo)
    real = ground.listener._listening
    assert real is not None
    failures = [OSError(number, os.strerror(number))]

    class Failing:
        def accept(self) -> object:
            if failures:
                raise failures.pop()
            return real.accept()

        def __getattr__(self, name: str) -> object:
            return getattr(real, name)

    ground.listener._listening = cast(socket.socket, Failing())
    program, _, flow = await ground.flow()
    await program.send(b"hello")
    assert await program.read(5) == b"hello"
    program.end()
    assert await flow.finished
    assert not failures
