"""sidecar.link.served, with real carriers: flows that are detached, resumed, remembered; who may, and how many."""

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from sidecar.link import served
from sidecar.link.flow import abort, reset_code
from sidecar.link.stream import ALPN, FlowRefused, OpenLost
from tests.support.stream_ground import OTHER_SESSION, SESSION, Ground, Raw, echo, open_frame, refusals
from ztna.credentials import Credentials
from ztna.errors import LinkError
from ztna.names import ServiceName, SessionId
from ztna.reasons import Reason
from ztna.tls_tcp import Delivery
from ztna.wire.stream import (
    WINDOW_BYTES_MIN,
    Ack,
    Data,
    Fin,
    Frame,
    OpenedFrame,
    OpenStatus,
    ResetFrame,
    ResumedFrame,
    ResumeFrame,
    encode,
)

DENIED = OpenedFrame(OpenStatus.DENIED, 0)
UNKNOWN = OpenedFrame(OpenStatus.UNKNOWN_FLOW, 0)


@pytest.fixture
async def ground(tmp_path: Path) -> AsyncIterator[Ground]:
    async with asyncio.timeout(60), asyncio.TaskGroup() as tasks:
        ground = Ground(tmp_path, tasks)
        await ground.serve(echo)
        yield ground
        ground.close()


def resume(flow: str, attempt: int = 1, received: int = 0, session: SessionId = SESSION) -> ResumeFrame:
    return ResumeFrame(session, flow, attempt, received, WINDOW_BYTES_MIN)


async def until(ground: Ground, flows: int) -> None:
    while len(list(ground.listener.served.flows())) != flows:
        await asyncio.sleep(0.01)


async def detached(ground: Ground) -> None:
    """Wait until no carrier is left."""
    while ground.listener._carriers:
        await asyncio.sleep(0.01)


async def opened(ground: Ground, *frames: Frame) -> tuple[Raw, str]:
    """Open a flow and send frames; return the carrier and the flow's id."""
    raw, frame = await Raw.connect(ground), open_frame()
    raw.send(frame)
    answer = await raw.next()
    assert isinstance(answer, OpenedFrame) and answer.status is OpenStatus.OK
    raw.send(*frames)
    return raw, frame.flow


async def answer(ground: Ground, frame: Frame, agent: Credentials | None = None) -> list[Frame]:
    raw = await Raw.connect(ground, agent)
    raw.send(frame)
    return await raw.closed()


async def test_a_flow_goes_on_upon_another_carrier_after_each_cut(ground: Ground) -> None:
    program, carrier, flow = await ground.flow()
    content = os.urandom(3_000_000)

    async def send() -> None:
        await program.send(content)
        program.end()

    talking = asyncio.gather(send(), program.read_all())
    for attempt in range(1, 6):
        await asyncio.sleep(0.01)
        carrier.close(Reason.PEER_GONE)
        if flow.finished.done():
            break
        carrier = await ground.dial()
        await carrier.resume(flow, OTHER_SESSION, attempt)
        assert flow.session == OTHER_SESSION
    _, got = await talking
    assert got == content
    assert await flow.finished
    assert len(ground.opened) == 1
    assert {service for _, service in ground.resumed} == {ServiceName("echo-service")}


async def test_a_flow_whose_carrier_leads_nowhere_waits_for_another(
    ground: Ground, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The connector finds out by itself, and before its kernel would."""
    program, carrier, flow = await ground.flow()
    await program.send(b"before")
    assert await program.read(6) == b"before"
    (served_flow,) = ground.listener.served.flows()
    monkeypatch.setattr("ztna.tls_tcp.delivery", lambda sock: Delivery(1, 60.0, 0.001))
    await detached(ground)
    assert not served_flow.finished.done()
    monkeypatch.undo()
    carrier.close(Reason.PEER_GONE)
    again = await ground.dial()
    await again.resume(flow, OTHER_SESSION, 1)
    await program.send(b" after")
    assert await program.read(6) == b" after"


async def test_a_session_that_was_resumed_under_is_the_one_whose_end_resets(ground: Ground) -> None:
    program, carrier, flow = await ground.flow()
    carrier.close(Reason.PEER_GONE)
    await (await ground.dial()).resume(flow, OTHER_SESSION, 1)
    ground.listener.end_session(SESSION, ground.agent.identity.name, Reason.CLOSED_BY_PEER)
    await program.send(b"x")
    assert await program.read(1) == b"x"
    ground.listener.end_session(OTHER_SESSION, ground.agent.identity.name, Reason.REVOKED)
    assert not await flow.finished


async def test_the_flow_of_another_agent_is_one_that_nobody_knows(ground: Ground) -> None:
    raw, flow = await opened(ground)
    other = Credentials.load(ground.pki.agent("agent-2"))
    assert await answer(ground, resume(flow), other) == [UNKNOWN]
    raw.send(Data(b"still mine"))
    await raw.until(Data(b"still mine"))


async def test_an_old_attempt_changes_nothing(ground: Ground) -> None:
    first, flow = await opened(ground)
    first.drop()
    second = await Raw.connect(ground)
    second.send(resume(flow, attempt=2))
    assert isinstance(await second.next(), ResumedFrame)
    before = refusals(Reason.MALFORMED)
    for attempt in (1, 2):
        assert await answer(ground, resume(flow, attempt)) == [DENIED]
    assert refusals(Reason.MALFORMED) == before + 2
    second.send(Data(b"hello"))
    await second.until(Data(b"hello"))


async def test_a_new_attempt_drops_the_old_carrier(ground: Ground) -> None:
    first, flow = await opened(ground, Data(b"abc"))
    await first.until(Data(b"abc"))
    second = await Raw.connect(ground)
    second.send(resume(flow, received=1))
    assert isinstance(await second.next(), ResumedFrame)
    await second.until(Data(b"bc"))
    assert ResetFrame(0) not in await first.closed()


@pytest.mark.parametrize(("acknowledged", "received"), [(2, 1), (0, 4)])
async def test_positions_that_cannot_be_reset_the_flow(
    ground: Ground, acknowledged: int, received: int
) -> None:
    raw, flow = await opened(ground, Data(b"abc"))
    await raw.until(Data(b"abc"))
    raw.send(Ack(acknowledged))
    [far] = ground.listener.served.flows()
    while far.state.acknowledged_position != acknowledged:
        await asyncio.sleep(0.01)
    raw.drop()
    await detached(ground)
    malformed = [ResetFrame(reset_code(Reason.MALFORMED))]
    assert await answer(ground, resume(flow, 1, received)) == malformed
    await until(ground, flows=0)
    assert await answer(ground, resume(flow, 2)) == malformed
    assert ground.far_budget.used == 0


async def test_an_open_with_a_detached_flow_dials_nothing(ground: Ground) -> None:
    raw, frame = await Raw.connect(ground), open_frame()
    raw.send(frame)
    await raw.next()
    raw.drop()
    await detached(ground)
    assert await answer(ground, frame) == [DENIED]
    assert len(ground.opened) == 1


async def test_an_open_whose_answer_was_lost_is_resumed_and_dialled_once(ground: Ground) -> None:
    ground.hang = True
    program, carrier = await ground.program(), await ground.dial()
    opening = asyncio.ensure_future(carrier.open(open_frame(), program.near))
    await ground.opening.wait()
    carrier.close(Reason.PEER_GONE)
    with pytest.raises(OpenLost) as caught:
        await opening
    flow = caught.value.flow
    again = await ground.dial()
    resuming = asyncio.ensure_future(again.resume(flow, SESSION, 1))
    while not ground.resumed:
        await asyncio.sleep(0.01)
    ground.release.set()
    await resuming
    await program.send(b"hello")
    program.end()
    assert await program.read_all() == b"hello"
    assert await flow.finished
    assert len(ground.opened) == 1


async def test_an_open_that_was_never_heard_of_may_be_sent_again(ground: Ground) -> None:
    raw = await Raw.connect(ground)
    raw.send(resume("0" * 32))
    assert await raw.closed() == [UNKNOWN]


async def test_what_open_was_refused_with_its_resume_is_told(ground: Ground) -> None:
    ground.refuse = OpenStatus.UNREACHABLE
    frame = open_frame()
    assert await answer(ground, frame) == [OpenedFrame(OpenStatus.UNREACHABLE, 0)]
    ground.refuse = None
    assert await answer(ground, resume(frame.flow)) == [OpenedFrame(OpenStatus.UNREACHABLE, 0)]


async def test_a_flow_that_is_complete_says_so(ground: Ground) -> None:
    raw, flow = await opened(ground, Data(b"abc"), Fin())
    await raw.until(Fin())
    raw.send(Ack(4))
    await until(ground, flows=0)
    raw.drop()
    assert await answer(ground, resume(flow, received=4)) == [ResumedFrame(4, WINDOW_BYTES_MIN), Ack(4)]


async def test_a_flow_that_was_reset_says_so(ground: Ground) -> None:
    raw, flow = await opened(ground)
    raw.send(ResetFrame(7))
    await raw.closed()
    assert await answer(ground, resume(flow)) == [ResetFrame(7)]


async def test_a_detached_flow_ends_with_its_session(ground: Ground) -> None:
    raw, flow = await opened(ground)
    raw.drop()
    await detached(ground)
    ground.listener.end_session(SESSION, ground.agent.identity.name, Reason.REVOKED)
    await until(ground, flows=0)
    assert await answer(ground, resume(flow)) == [ResetFrame(reset_code(Reason.REVOKED))]
    assert ground.far_budget.used == 0


async def test_a_flow_that_nobody_resumes_is_reset(ground: Ground, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(served, "DETACHED_SECONDS", 0.1)
    ended: asyncio.Future[bool] = asyncio.get_running_loop().create_future()

    async def watch(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionResetError):
            await reader.read()
        ended.set_result(isinstance(reader.exception(), ConnectionResetError))
        writer.close()

    await ground.serve(watch)
    raw, flow = await opened(ground)
    raw.drop()
    assert await ended
    assert await answer(ground, resume(flow)) == [ResetFrame(reset_code(Reason.PEER_GONE))]
    assert ground.far_budget.used == 0


async def test_a_dial_that_nobody_waits_for_is_given_up(
    ground: Ground, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(served, "DETACHED_SECONDS", 0.1)
    ground.hang = True
    raw, frame = await Raw.connect(ground), open_frame()
    raw.send(frame)
    await ground.opening.wait()
    raw.drop()
    while ground.far_budget.used:
        await asyncio.sleep(0.01)
    assert await answer(ground, resume(frame.flow)) == [ResetFrame(reset_code(Reason.PEER_GONE))]


async def test_a_backend_that_answers_while_nobody_listens_is_kept(ground: Ground) -> None:
    ground.hang = True
    raw, frame = await Raw.connect(ground), open_frame()
    raw.send(frame)
    await ground.opening.wait()
    raw.drop()
    await detached(ground)
    ground.release.set()
    await until(ground, flows=1)
    again = await Raw.connect(ground)
    again.send(resume(frame.flow), Data(b"hello"))
    assert isinstance(await again.next(), ResumedFrame)
    await again.until(Data(b"hello"))


async def test_who_may_not_resume_is_told_and_the_flow_lives(ground: Ground) -> None:
    raw, flow = await opened(ground)
    raw.drop()
    ground.refuse = OpenStatus.DENIED
    assert await answer(ground, resume(flow)) == [DENIED]
    ground.refuse = None
    again = await Raw.connect(ground)
    again.send(resume(flow))
    assert isinstance(await again.next(), ResumedFrame)


async def test_detached_flows_count_and_no_more_than_the_budget_are_carried(ground: Ground) -> None:
    ground.far_budget._peer_bytes = 4 * 1024 * 1024
    flows = 0
    while True:
        raw, frame = await Raw.connect(ground), open_frame()
        raw.send(frame)
        got = await raw.next()
        raw.drop()
        assert isinstance(got, OpenedFrame)
        if got.status is not OpenStatus.OK:
            break
        flows += 1
    assert got == DENIED
    await detached(ground)
    assert 3 < flows == len(list(ground.listener.served.flows())) <= 64
    assert ground.far_budget.used <= 4 * 1024 * 1024
    assert len(ground.opened) == flows  # the last one's backend was never dialled


async def test_a_reset_of_the_program_while_detached_is_told_on_the_next_carrier(ground: Ground) -> None:
    ended: asyncio.Future[bool] = asyncio.get_running_loop().create_future()

    async def flood(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionResetError):
            while True:
                writer.write(bytes(1 << 16))
                await writer.drain()
        ended.set_result(True)
        writer.close()

    await ground.serve(flood)
    program, carrier, flow = await ground.flow()
    while not flow._held:
        await asyncio.sleep(0.01)
    carrier.close(Reason.PEER_GONE)
    abort(program.sock)
    assert not await flow.finished
    assert flow.owes_reset
    telling = await ground.dial()
    await telling.resume(flow, SESSION, 1)
    await telling.closed
    assert await ended
    assert not flow.owes_reset
    await until(ground, flows=0)


async def test_a_connector_that_resumes_where_it_cannot_be_is_reset(ground: Ground) -> None:
    async def lie(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(1 << 16)
        writer.write(encode(ResumedFrame(5, WINDOW_BYTES_MIN)))
        await reader.read()
        writer.close()

    _, carrier, flow = await ground.flow()
    carrier.close(Reason.PEER_GONE)
    server = await asyncio.start_server(lie, "127.0.0.1", 0, ssl=ground.connector.server_context(ALPN))
    ground.closing.append(server.close)
    ground.address = server.sockets[0].getsockname()
    liar = await ground.dial()
    with pytest.raises(LinkError, match="malformed"):
        await liar.resume(flow, SESSION, 1)
    assert not await flow.finished
    assert await liar.closed is Reason.MALFORMED


async def test_a_refused_resume_leaves_the_flow_to_the_next_try(ground: Ground) -> None:
    program, carrier, flow = await ground.flow()
    carrier.close(Reason.PEER_GONE)
    ground.refuse = OpenStatus.DENIED
    with pytest.raises(FlowRefused):
        await (await ground.dial()).resume(flow, SESSION, 1)
    ground.refuse = None
    await (await ground.dial()).resume(flow, SESSION, 2)
    await program.send(b"x")
    assert await program.read(1) == b"x"
