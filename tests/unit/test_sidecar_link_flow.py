"""sidecar.link.flow: how the local socket is read, and what is kept of it until the other end has it."""

from __future__ import annotations

import os
import random
import socket
from collections.abc import Iterator
from typing import Any, cast

import pytest

from sidecar.link import flow as flow_module
from sidecar.link.budget import KEPT_FLOOR_BYTES, Budget
from sidecar.link.chunks import DOUBLINGS_MAX, PIECE_BYTES, Spare
from sidecar.link.flow import TcpFlow
from tests.support.stream_ground import open_frame
from ztna.identity import Identity
from ztna.wire.stream import WINDOW_BYTES_MAX, Ack, Data, FrameReader, encode


class Program:
    """The local socket: gives as much as it is asked for, or what `limits` says next."""

    def __init__(self) -> None:
        self.pipe = os.pipe()
        self.given = bytearray()
        self.asked: list[int] = []
        self.limits: list[int] = []
        self._random = random.Random(7)

    def fileno(self) -> int:
        return self.pipe[0]

    def setblocking(self, _flag: bool) -> None: ...

    def setsockopt(self, *_options: int) -> None: ...

    def recvmsg_into(self, buffers: list[memoryview]) -> tuple[int, list[object], int, None]:
        room = sum(map(len, buffers))
        self.asked.append(room)
        left = size = min(room, self.limits.pop(0) if self.limits else room)
        for buffer in buffers:
            part = self._random.randbytes(min(left, len(buffer)))
            buffer[: len(part)] = part
            self.given += part
            left -= len(part)
        return size, [], 0, None

    def close(self) -> None: ...


class Way:
    """A carrier that takes everything at once; `is_stuck`, it takes what comes next only in part, and nothing more."""

    def __init__(self) -> None:
        self.is_stuck = False
        self.is_blocked = False
        self.written: list[bytes | memoryview] = []

    def send(self, frame: bytes) -> None:
        self.written.append(frame)

    def send_data(self, frames: memoryview) -> bool:
        # What is stuck is read as late as it would be written: by then nobody may have changed it.
        self.written.append(frames if self.is_stuck else bytes(frames))
        self.is_blocked = self.is_stuck
        return not self.is_stuck

    def unstick(self) -> None:
        if self.is_blocked:
            self.written[-1] = bytes(self.written[-1])
        self.is_stuck = self.is_blocked = False

    def flow_ended(self, *, reusable: bool) -> None: ...

    @property
    def content(self) -> bytes:
        """The bytes of the flow in all that was written."""
        frames = FrameReader().feed(b"".join(self.written))
        return b"".join(frame.data for frame in frames if isinstance(frame, Data))


@pytest.fixture
def program() -> Iterator[Program]:
    made = Program()
    yield made
    for end in made.pipe:
        os.close(end)


class Spoiling(Spare):
    """Changes what it is given at once, as another flow might: nobody else may need it any more."""

    def give(self, chunk: flow_module._Chunk) -> None:
        chunk[:] = bytes(len(chunk))
        super().give(chunk)


@pytest.fixture
def spare(monkeypatch: pytest.MonkeyPatch) -> tuple[Any, ...]:
    """Fresh stores of spare buffers."""
    made = tuple(Spoiling(1 << doublings) for doublings in range(DOUBLINGS_MAX + 1))
    monkeypatch.setattr(flow_module, "SPARE", made)
    return made


def begun(
    program: Program, way: Way, window: int = WINDOW_BYTES_MAX, budget: Budget | None = None
) -> TcpFlow:
    share = (budget or Budget()).open("peer")
    assert share is not None
    flow = TcpFlow(open_frame(), cast(Identity, None), share, cast(socket.socket, program))
    flow.attach(way, 0, window)
    return flow


def acknowledge(flow: TcpFlow, position: int) -> None:
    flow.frame_received(Ack(position))


async def test_who_has_much_to_say_is_read_in_larger_and_larger_runs(program: Program, spare: object) -> None:
    way = Way()
    flow = begun(program, way)
    for _ in range(6):
        flow._local_readable()
        acknowledge(flow, flow.state.sent_position)
    assert program.asked == [PIECE_BYTES * times for times in (1, 2, 4, 8, 8, 8)]
    program.limits = [1000] * 5
    for _ in range(5):
        flow._local_readable()
    assert program.asked[6:] == [PIECE_BYTES * times for times in (8, 4, 2, 1, 1)], (
        "and in smaller ones again"
    )
    assert way.content == program.given
    flow.reset()


async def test_no_more_is_read_than_the_other_end_takes(program: Program, spare: object) -> None:
    way = Way()
    flow = begun(program, way, 5 * PIECE_BYTES)
    for _ in range(4):
        flow._local_readable()
    assert program.asked == [PIECE_BYTES, 2 * PIECE_BYTES, 2 * PIECE_BYTES], "then its window is full"
    acknowledge(flow, 100)
    flow._local_readable()
    assert program.asked[3:] == [100]
    assert flow.state.kept_bytes <= 5 * PIECE_BYTES + 100
    acknowledge(flow, flow.state.sent_position)
    flow._local_readable()
    assert program.asked[4:] == [4 * PIECE_BYTES], "a full window is no sign of having little to say"
    assert way.content == program.given
    flow.reset()


async def test_a_buffer_is_used_again_when_all_that_it_holds_is_acknowledged(
    program: Program, spare: tuple[Any, ...]
) -> None:
    flow = begun(program, Way())
    for _ in range(3):
        flow._local_readable()
    first, second, third = (PIECE_BYTES * times for times in (1, 3, 7))
    acknowledge(flow, first)
    assert [len(each._chunks) for each in spare] == [1, 0, 0, 0]
    acknowledge(flow, second - 1)
    assert [len(each._chunks) for each in spare] == [1, 0, 0, 0]
    acknowledge(flow, second)
    assert [len(each._chunks) for each in spare] == [1, 1, 0, 0]
    acknowledge(flow, third)
    assert [len(each._chunks) for each in spare] == [1, 1, 1, 0]
    flow._local_readable()
    flow.reset()
    assert [len(each._chunks) for each in spare] == [1, 1, 1, 1], "a flow that ends gives all back"


async def test_who_ends_leaves_alone_what_is_yet_to_be_written(program: Program, spare: object) -> None:
    way = Way()
    flow = begun(program, way)
    flow._local_readable()
    way.is_stuck = True
    flow._local_readable()
    acknowledge(flow, PIECE_BYTES + 1)
    flow.reset()
    assert way.content == program.given


async def test_what_is_mostly_empty_is_not_kept(program: Program, spare: tuple[Any, ...]) -> None:
    way = Way()
    flow = begun(program, way)
    for _ in range(3):
        flow._local_readable()
    acknowledge(flow, flow.state.sent_position)
    program.limits = [PIECE_BYTES + 10_000]
    flow._local_readable()
    assert program.asked[-1] == 8 * PIECE_BYTES
    assert len(spare[3]._chunks) == 1, "the bytes are kept beside it"
    flow.carrier_lost()
    again = Way()
    flow.attach(again, flow.state.acknowledged_position, WINDOW_BYTES_MAX)
    assert again.content == program.given[-(PIECE_BYTES + 10_000) :]
    flow.reset()


async def test_memory_that_no_ack_has_freed_is_counted(program: Program, spare: object) -> None:
    """In flight, and what a buffer still holds of what is acknowledged: else many slow flows pass every limit."""
    way, budget = Way(), Budget()
    flow = begun(program, way, budget=budget)
    reserved = budget.used - KEPT_FLOOR_BYTES
    for _ in range(4):
        flow._local_readable()
        acknowledge(flow, flow.state.sent_position)
    assert budget.used == reserved + KEPT_FLOOR_BYTES
    way.is_stuck = True
    flow._local_readable()
    run = 8 * PIECE_BYTES
    assert budget.used >= reserved + run, "in flight"
    way.unstick()
    flow.data_written()
    acknowledge(flow, flow.state.sent_position - 1)
    assert budget.used >= reserved + run, "one byte holds the whole buffer"
    flow.carrier_lost()
    way = Way()
    flow.attach(way, flow.state.sent_position - 1, WINDOW_BYTES_MAX)
    assert way.content == program.given[-1:]
    acknowledge(flow, flow.state.sent_position)
    assert budget.used == reserved + KEPT_FLOOR_BYTES
    way.is_stuck, program.limits = True, [1]
    flow._local_readable()
    assert flow._in_flight is not None
    assert memoryview(flow._in_flight).nbytes == len(cast(bytes, flow._in_flight.obj)), (
        "a byte needs no large buffer"
    )
    flow.reset()
    assert budget.used == 0


async def test_a_slow_carrier_is_given_less_at_once(
    program: Program, spare: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    way = Way()
    flow = begun(program, way)
    for _ in range(4):
        flow._local_readable()
        acknowledge(flow, flow.state.sent_position)
    monkeypatch.setattr(flow_module, "RUN_SECONDS_MAX", -1.0)  # whatever it takes is long
    for _ in range(3):
        way.is_stuck = True
        flow._local_readable()
        way.unstick()
        flow.data_written()
        acknowledge(flow, flow.state.sent_position)
    assert program.asked[4:] == [PIECE_BYTES * times for times in (8, 1, 1)]
    flow.reset()


async def test_an_ack_that_is_late_goes_as_soon_as_the_carrier_can_be_written(
    program: Program, spare: object
) -> None:
    """Else one that is small would never go beside bulk: the carrier is blocked whenever its time comes."""
    way = Way()
    flow = begun(program, way)
    pair = socket.socketpair()
    with pair[0], pair[1]:
        program.send = pair[0].send  # type: ignore[attr-defined]
        way.is_stuck = True
        flow._local_readable()
        flow.data_received([b"some"])
        flow._ack_delay_over()
        written = len(way.written)
        way.unstick()
        flow.data_written()
        flow.carrier_writable()
        assert encode(Ack(4)) in way.written[written:]
    flow.reset()


@pytest.mark.parametrize("seed", range(20))
async def test_bytes_survive_acks_and_carriers_that_break_anywhere(
    program: Program, spare: object, seed: int
) -> None:
    """The other end has so much of what was written: all of it is there in the end, in order and once."""
    luck = random.Random(seed)
    way, arrived = Way(), bytearray()
    flow = begun(program, way, luck.choice([100_000, 700_000, WINDOW_BYTES_MAX]))
    taken = 0
    for _ in range(60):
        if not way.is_blocked:
            program.limits = [luck.choice([1, 5_000, 40_000, 10**7])]
            flow._local_readable()
        content = way.content
        match luck.randrange(4):
            case 0:
                way.is_stuck = luck.random() < 0.3
                size = luck.randrange(taken, len(content) + 1)
                arrived += content[taken:size]
                taken = size
                acknowledge(flow, len(arrived))
            case 1:
                size = luck.randrange(taken, len(content) + 1)
                arrived += content[taken:size]
                flow.carrier_lost()
                way, taken = Way(), 0
                flow.attach(way, len(arrived), luck.choice([100_000, 700_000, WINDOW_BYTES_MAX]))
            case 2 if way.is_blocked:
                way.unstick()
                flow.data_written()
                flow.carrier_writable()
            case _:
                pass
    way.unstick()
    flow.data_written()
    arrived += way.content[taken:]
    while flow.state.is_owing:
        taken = len(way.content)
        acknowledge(flow, len(arrived))
        arrived += way.content[taken:]
    assert arrived == program.given
    flow.reset()
