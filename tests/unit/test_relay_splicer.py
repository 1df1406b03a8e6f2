"""The TCP half of the forwarder, over real sockets."""

from __future__ import annotations

import asyncio
import errno
import socket
import struct
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Hashable
from typing import cast

import pytest

from relay import dialled, pipes
from relay import splicer as module
from relay.dialled import Owner
from relay.links import Limits
from relay.splicer import Splicer, listen
from ztna.errors import ZtnaError
from ztna.names import SessionId
from ztna.tls_tcp import Delivery
from ztna.wire import forwarder as wire

SESSION, OTHER = SessionId("1" * 16), SessionId("2" * 16)
AGENT_TOKEN, CARRY_TOKEN = b"a" * 32, b"c" * 32
DEADLINE_S = 8.0


class Rig:
    """A splicer that admits each waiting agent's connector with CARRY_TOKEN."""

    def __init__(self) -> None:
        self.waiting: asyncio.Queue[tuple[SessionId, int]] = asyncio.Queue()
        self.splicer = Splicer(
            listen(("127.0.0.1", 0)), lambda *session_and_waiter: self.waiting.put_nowait(session_and_waiter)
        )

    async def dial(self, first: bytes) -> End:
        end = End(*await asyncio.open_connection(*self.splicer.address))
        end.writer.write(first)
        return end

    async def pair(self, owner: Owner | None = None) -> tuple[End, End]:
        assert self.splicer.admit_agent(SESSION, AGENT_TOKEN, owner)
        agent = await self.dial(wire.dial_in(AGENT_TOKEN))
        session, waiter = await asyncio.wait_for(self.waiting.get(), DEADLINE_S)
        assert self.splicer.admit_connector(session, waiter, CARRY_TOKEN)
        connector = await self.dial(wire.dial_in(CARRY_TOKEN))
        await agent.bound()
        await connector.bound()
        return agent, connector


class End:
    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    async def bound(self) -> None:
        data = await asyncio.wait_for(self.reader.readexactly(wire.BOUND_V4_BYTES), DEADLINE_S)
        assert isinstance(wire.decode(data), wire.Bound)

    async def read(self, count: int = -1) -> bytes:
        async with asyncio.timeout(DEADLINE_S):
            return await (self.reader.read() if count < 0 else self.reader.readexactly(count))

    def reset(self) -> None:
        """Go with an RST."""
        sock = self.writer.get_extra_info("socket")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.writer.transport.abort()

    async def refused(self) -> None:
        assert await self.read() == b""
        self.writer.close()


@pytest.fixture
async def rig() -> AsyncIterator[Rig]:
    rig = Rig()
    yield rig
    rig.splicer.close()
    rig.splicer.close()


@pytest.mark.parametrize("lost", ["agent", "connector"])
async def test_who_cannot_be_reached_is_given_up_and_the_other_learns_of_it(
    rig: Rig, monkeypatch: pytest.MonkeyPatch, lost: str
) -> None:
    agent, connector = await rig.pair()
    gone, left = (agent, connector) if lost == "agent" else (connector, agent)
    gone_at = gone.writer.get_extra_info("sockname")

    def unheard(sock: socket.socket) -> Delivery:
        return Delivery(1, 60.0, 0.001) if sock.getpeername() == gone_at else Delivery(0, 60.0, 0.001)

    agent.writer.write(b"both ways")
    connector.writer.write(b"both ways")
    assert await agent.read(9) == await connector.read(9) == b"both ways"
    monkeypatch.setattr(pipes, "delivery", unheard)
    left.writer.write(b"is anybody there?")
    with pytest.raises(ConnectionResetError):
        await left.read()
    assert (rig.splicer.pairs, rig.splicer.refusals["dead_path"]) == (0, 1)


async def test_a_pair_that_is_silent_and_well_is_left_alone(rig: Rig) -> None:
    agent, connector = await rig.pair()
    agent.writer.write(b"a word")
    assert await connector.read(6) == b"a word"
    (pair,) = set(rig.splicer._pairs.values())
    loop = asyncio.get_running_loop()
    for after in range(1, 60):
        assert not pair.is_cut(loop.time() + after)
    assert rig.splicer.pairs == 1


async def test_each_pair_is_looked_at_once_in_a_round_and_never_all_at_once(rig: Rig) -> None:
    """Ten thousand looks take longer than the loop may be blocked."""
    looked_at: Counter[int] = Counter()

    class Looked:
        def __init__(self, number: int) -> None:
            self.number = number

        def is_cut(self, now: float) -> bool:
            looked_at[self.number] += 1
            return False

    pairs = [Looked(number) for number in range(1_000)]
    splicer = rig.splicer
    splicer._looker.cancel()
    splicer._pairs = {fd: cast(pipes.Pair, pairs[fd // 2]) for fd in range(2 * len(pairs))}
    for part in range(1, module.LOOK_PARTS + 1):
        splicer._look()
        splicer._looker.cancel()
        assert looked_at.total() == part * len(pairs) / module.LOOK_PARTS
    splicer._pairs = {}
    assert set(looked_at.values()) == {1}


async def test_a_pair_that_ends_before_it_is_looked_at_is_let_go(rig: Rig) -> None:
    agent, connector = await rig.pair()
    agent.writer.write(b"a word")
    assert await connector.read(6) == b"a word"
    (pair,) = set(rig.splicer._pairs.values())
    rig.splicer._looker.cancel()
    rig.splicer._to_look_at = [[], [pair]]
    rig.splicer.end_session(SESSION)
    rig.splicer._look()
    assert (rig.splicer.pairs, rig.splicer.refusals["dead_path"]) == (0, 0)


async def test_much_goes_both_ways_at_once_and_half_close_passes_through(rig: Rig) -> None:
    agent, connector = await rig.pair()
    up, down = bytes(range(256)) * 50_000, bytes(reversed(range(256))) * 50_000
    agent.writer.write(up)
    connector.writer.write(down)
    agent.writer.write_eof()
    assert await connector.read() == up
    connector.writer.write(b"last words")
    connector.writer.write_eof()
    assert await agent.read() == down + b"last words"
    agent.writer.close()
    connector.writer.close()
    assert not rig.splicer._pairs
    assert rig.splicer.status()["bytes"] == len(up) + len(down) + 10


async def test_a_reader_that_stops_stops_the_writer_and_nothing_is_lost(rig: Rig) -> None:
    agent, connector = await rig.pair()
    total = 64 * 1024 * 1024
    agent.writer.write(bytes(total))
    agent.writer.write_eof()
    async with asyncio.timeout(DEADLINE_S):
        before = -1
        while (now := rig.splicer.status()["bytes"]) != before:
            before = now
            await asyncio.sleep(0.2)
    assert isinstance(now, int) and now < total, "the bytes wait in sockets and one pipe, not in us"
    assert len(await connector.read()) == total
    agent.writer.close()
    connector.writer.close()


async def flood(end: End, until: Callable[[], bool]) -> int:
    """Write without pause until something holds; return how much that was."""
    written = 0
    async with asyncio.timeout(DEADLINE_S):
        while not until():
            end.writer.write(bytes(64 * 1024))
            await end.writer.drain()
            written += 64 * 1024
    return written


async def rig_is_quiet(rig: Rig) -> None:
    async with asyncio.timeout(DEADLINE_S):
        while rig.splicer._bulk or rig.splicer._ticker is not None:
            await asyncio.sleep(module.TICK_SECONDS)


async def test_bulk_moves_in_ticks_and_what_follows_at_each_arrival(rig: Rig) -> None:
    agent, connector = await rig.pair()
    reading = asyncio.create_task(connector.read())
    written = await flood(agent, lambda: bool(rig.splicer._bulk))
    connector.writer.write(b"in the middle")
    assert await agent.read(13) == b"in the middle"
    await rig_is_quiet(rig)
    agent.writer.write(b"small")
    agent.writer.write_eof()
    assert await reading == bytes(written) + b"small"
    agent.writer.close()
    connector.writer.close()


@pytest.mark.parametrize("answer", [4, 64 * 1024], ids=["short answers", "long answers"])
async def test_two_that_take_turns_wait_for_a_few_ticks_and_then_for_a_while_for_none(
    monkeypatch: pytest.MonkeyPatch, rig: Rig, answer: int
) -> None:
    monkeypatch.setattr(pipes, "REST_SECONDS", 10 * DEADLINE_S)
    monkeypatch.setattr(pipes, "BULK_SECONDS", DEADLINE_S)
    agent, connector = await rig.pair()
    [pair] = rig.splicer._pairs_of[SESSION]
    for _ in range(8 * pipes.BULK_BYTES // (64 * 1024)):
        agent.writer.write(bytes(64 * 1024))
        await connector.read(64 * 1024)
        connector.writer.write(bytes(answer))
        await agent.read(answer)
        assert not any(each.is_bulk and each._rests_until for each in (pair.up, pair.down)), "it rests"
    assert pair.up._rests_until
    assert bool(pair.down._rests_until) == (answer > 4)
    assert not rig.splicer._bulk
    agent.writer.close()
    connector.writer.close()


async def test_answers_while_more_is_on_its_way_end_no_bulk(rig: Rig) -> None:
    """As a link acknowledges what it takes."""
    agent, connector = await rig.pair()
    reading = asyncio.create_task(connector.read())
    written = await flood(agent, lambda: bool(rig.splicer._bulk))
    [direction] = rig.splicer._bulk
    answers = 0

    def many() -> bool:
        nonlocal answers
        answers += 1
        connector.writer.write(b"acknowledged")
        return answers == 400

    written += await flood(agent, many)
    assert direction._rests_until == 0.0
    agent.writer.write_eof()
    assert len(await reading) == written
    assert await agent.read(12 * answers) == b"acknowledged" * answers
    agent.writer.close()
    connector.writer.close()


async def test_several_answers_to_one_turn_are_one(rig: Rig) -> None:
    agent, connector = await rig.pair()
    reading = asyncio.create_task(connector.read())
    written = await flood(agent, lambda: bool(rig.splicer._bulk))
    await rig_is_quiet(rig)
    [pair] = rig.splicer._pairs_of[SESSION]
    pair.up._burst_at = asyncio.get_running_loop().time() + DEADLINE_S  # silence does not end it
    rig.splicer._start_ticks(pair, pair.up)
    for _ in range(2 * pipes.TURNS_MAX):
        connector.writer.write(b"answer")
        assert await agent.read(6) == b"answer"
    assert rig.splicer._bulk.keys() == {pair.up}
    agent.writer.write_eof()
    assert len(await reading) == written
    agent.writer.close()
    connector.writer.close()


async def test_a_reset_passes_through_bulk(rig: Rig) -> None:
    agent, connector = await rig.pair()
    reading = asyncio.create_task(connector.read())
    await flood(agent, lambda: bool(rig.splicer._bulk))
    agent.reset()
    with pytest.raises(ConnectionResetError):
        await reading
    assert not rig.splicer._bulk
    connector.writer.close()


async def test_an_end_passes_through_bulk_at_once(rig: Rig) -> None:
    agent, connector = await rig.pair()
    reading = asyncio.create_task(connector.read())
    written = await flood(agent, lambda: bool(rig.splicer._bulk))
    agent.writer.write_eof()
    assert len(await reading) == written
    connector.writer.write_eof()
    assert await agent.read() == b""
    assert not rig.splicer._bulk
    agent.writer.close()
    connector.writer.close()


async def test_a_reset_passes_through(rig: Rig) -> None:
    agent, connector = await rig.pair()
    agent.reset()
    with pytest.raises(ConnectionResetError):
        await connector.read(1)
    connector.writer.close()


@pytest.mark.parametrize(
    ("first", "why"),
    [
        (bytes(36), "malformed"),
        (b"\x16\x03\x01" + bytes(33), "malformed"),
        (wire.dial_in(b"x" * 32), "bad_token"),
    ],
)
async def test_what_is_no_dial_in_is_closed_without_a_byte(rig: Rig, first: bytes, why: str) -> None:
    await (await rig.dial(first)).refused()
    assert rig.splicer.refusals == {why: 1}


async def test_an_end_before_the_token_is_whole(rig: Rig) -> None:
    end = await rig.dial(wire.dial_in(AGENT_TOKEN)[:20])
    end.writer.write_eof()
    await end.refused()
    assert rig.splicer.refusals == {"malformed": 1}


async def test_a_token_in_pieces(rig: Rig) -> None:
    assert rig.splicer.admit_agent(SESSION, AGENT_TOKEN)
    whole = wire.dial_in(AGENT_TOKEN)
    end = await rig.dial(whole[:20])
    await asyncio.sleep(0)
    end.writer.write(whole[20:])
    assert (await asyncio.wait_for(rig.waiting.get(), DEADLINE_S))[0] == SESSION
    end.writer.close()


async def test_a_token_admits_once(rig: Rig) -> None:
    agent, connector = await rig.pair()
    for token in (AGENT_TOKEN, CARRY_TOKEN):
        await (await rig.dial(wire.dial_in(token))).refused()
    assert rig.splicer.refusals == {"bad_token": 2}
    agent.writer.close()
    connector.writer.close()


async def test_a_late_token_is_void(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "TOKEN_SECONDS", -1.0)
    rig.splicer.admit_agent(SESSION, AGENT_TOKEN)
    await (await rig.dial(wire.dial_in(AGENT_TOKEN))).refused()
    rig.splicer.admit_agent(SESSION, AGENT_TOKEN)
    rig.splicer._sweep()
    assert rig.splicer.status()["tokens"] == 0


async def test_who_says_nothing_or_finds_no_connector_is_closed(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "BIND_SECONDS", 0.3)
    assert rig.splicer.admit_agent(SESSION, AGENT_TOKEN)
    silent, alone = await rig.dial(b""), await rig.dial(wire.dial_in(AGENT_TOKEN))
    await silent.refused()
    await alone.refused()
    assert rig.splicer.refusals == {"late": 1, "no_connector": 1}


async def test_the_carry_of_a_waiter_that_went_joins_nobody(rig: Rig) -> None:
    assert rig.splicer.admit_agent(SESSION, AGENT_TOKEN)
    agent = await rig.dial(wire.dial_in(AGENT_TOKEN))
    session, waiter = await asyncio.wait_for(rig.waiting.get(), DEADLINE_S)
    assert not rig.splicer.admit_connector(OTHER, waiter, CARRY_TOKEN)
    assert rig.splicer.admit_connector(session, waiter, CARRY_TOKEN)
    agent.writer.close()
    async with asyncio.timeout(DEADLINE_S):
        while rig.splicer.status()["unbound"]:
            await asyncio.sleep(0.01)
    assert not rig.splicer.admit_connector(session, waiter, b"d" * 32)
    await (await rig.dial(wire.dial_in(CARRY_TOKEN))).refused()


async def test_all_of_a_session_ends_with_it(rig: Rig) -> None:
    agent, connector = await rig.pair()
    rig.splicer.admit_agent(SESSION, b"b" * 32)
    waiting = await rig.dial(wire.dial_in(b"b" * 32))
    await asyncio.wait_for(rig.waiting.get(), DEADLINE_S)
    rig.splicer.admit_agent(SESSION, b"d" * 32)
    rig.splicer.end_session(SESSION)
    rig.splicer.end_session(OTHER)
    for each in (agent, connector):
        with pytest.raises((ConnectionResetError, asyncio.IncompleteReadError)):
            await each.read(1)
    await waiting.refused()
    await (await rig.dial(wire.dial_in(b"d" * 32))).refused()


async def test_numbers_are_bounded(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dialled, "TOKENS_PER_SESSION_MAX", 1)
    monkeypatch.setattr(module, "STRANGERS_MAX", 1)
    assert rig.splicer.admit_agent(SESSION, b"1" * 32)
    assert not rig.splicer.admit_agent(SESSION, b"2" * 32)
    assert rig.splicer.admit_agent(OTHER, b"3" * 32)
    first = await rig.dial(b"")
    async with asyncio.timeout(DEADLINE_S):
        while not rig.splicer.status()["unbound"]:
            await asyncio.sleep(0.01)
    second = await rig.dial(wire.dial_in(b"1" * 32))
    await first.refused()
    await asyncio.wait_for(rig.waiting.get(), DEADLINE_S)
    # Who waits takes no stranger's place.
    third = await rig.dial(b"")
    fourth = await rig.dial(b"")
    await third.refused()
    assert rig.splicer.refusals == {"limit": 3}
    for each in (second, fourth):
        each.writer.close()


async def test_who_hoards_tokens_keeps_nobody_out_who_uses_his(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dialled, "TOKENS_MAX", 10)
    hoarded = [bytes([number]) * 32 for number in range(10)]
    assert all(rig.splicer.admit_agent(OTHER, token) for token in hoarded)
    await rig.pair()
    assert rig.splicer.status()["tokens"] == 9, "the oldest made room"
    await (await rig.dial(wire.dial_in(hoarded[0]))).refused()
    assert rig.splicer.refusals["limit"] == 1 and rig.splicer.refusals["bad_token"] == 1
    rig.splicer.end_session(OTHER)
    assert rig.splicer.status()["tokens"] == 0


async def test_a_flood_of_strangers_keeps_nobody_out_who_has_a_token(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "STRANGERS_MAX", 20)
    flood = [await rig.dial(b"") for _ in range(40)]
    agent, connector = await rig.pair()
    agent.writer.write(b"all the same")
    assert await connector.read(12) == b"all the same"
    for each in (*flood, agent, connector):
        each.writer.close()


async def test_out_of_descriptors_it_pauses_and_then_accepts_who_waited(rig: Rig) -> None:
    rig.splicer.admit_agent(SESSION, AGENT_TOKEN)
    exhausted = OutOfDescriptors(rig.splicer._listener)
    rig.splicer._loop.remove_reader(exhausted.fileno())
    rig.splicer._resume_accepting(exhausted)  # type: ignore[arg-type]
    agent = await rig.dial(wire.dial_in(AGENT_TOKEN))
    assert await asyncio.wait_for(rig.waiting.get(), DEADLINE_S)
    assert rig.splicer.refusals == {"limit": 3}
    assert exhausted.seconds() >= 3 * module.ACCEPT_PAUSE_SECONDS * 0.9, "it span"
    agent.writer.close()


class OutOfDescriptors:
    """A listening socket whose first three accepts find no descriptor."""

    def __init__(self, real: socket.socket) -> None:
        self.real, self.times = real, list[float]()

    def accept(self) -> tuple[socket.socket, object]:
        self.times.append(time.monotonic())
        if len(self.times) <= 3:
            raise OSError(errno.EMFILE, "too many open files")
        return self.real.accept()

    def seconds(self) -> float:
        return self.times[3] - self.times[0]

    def __getattr__(self, name: str) -> object:
        return getattr(self.real, name)


async def test_open_pairs_and_waiters_end_with_the_splicer() -> None:
    rig = Rig()
    agent, connector = await rig.pair()
    waiting = await rig.dial(b"\0")
    async with asyncio.timeout(DEADLINE_S):
        while not rig.splicer.status()["unbound"]:
            await asyncio.sleep(0.01)
    rig.splicer.close()
    for each in (agent, connector, waiting):
        with pytest.raises((ConnectionResetError, asyncio.IncompleteReadError)):
            await each.read(1)
        each.writer.close()


async def test_a_taken_port_is_named(rig: Rig) -> None:
    with pytest.raises(ZtnaError, match=str(rig.splicer.address[1])):
        listen(rig.splicer.address)


class Metered:
    """A splicer with limits, and a quota that is a number."""

    def __init__(self, limits: Limits, quota: int = 1 << 60) -> None:
        self.left = quota
        self.rig = Rig()
        self.rig.splicer.close()
        self.rig.splicer = Splicer(
            listen(("127.0.0.1", 0)),
            lambda *session_and_waiter: self.rig.waiting.put_nowait(session_and_waiter),
            limits,
            self._charge,
        )

    def _charge(self, link: Hashable, size: int) -> bool:
        if link == "free":
            return True
        self.left -= size
        return self.left > 0


@pytest.fixture
async def metered(request: pytest.FixtureRequest) -> AsyncIterator[Metered]:
    metered = Metered(*request.param)
    yield metered
    metered.rig.splicer.close()


RATE = 4_000_000
BURST = Limits(rate_bytes_per_s=RATE).burst_bytes


@pytest.mark.parametrize("metered", [(Limits(rate_bytes_per_s=RATE),)], indirect=True)
async def test_a_rate_holds_each_way_of_a_link_and_loses_nothing(metered: Metered) -> None:
    rig, owner = metered.rig, Owner("agent", "link")
    pairs = [await rig.pair(owner=owner) for _ in range(2)]
    other = await rig.pair(owner=Owner("agent", "other link"))
    size = RATE
    began = time.monotonic()
    for number, (agent, _) in enumerate(pairs):
        agent.writer.write(bytes([number + 1]) * size)
        agent.writer.write_eof()

    async def received(end: End) -> tuple[bytes, float]:
        return await end.read(), time.monotonic() - began

    reading = [asyncio.create_task(received(connector)) for _, connector in pairs]
    # What another link sends, and what comes back on this one, is not held.
    for sender, reader in (other, (pairs[0][1], pairs[0][0])):
        sender.writer.write(b"x" * (BURST // 2))
        assert await reader.read(BURST // 2) == b"x" * (BURST // 2)
    done = await asyncio.gather(*reading)
    for number, (data, _) in enumerate(done):
        assert data == bytes([number + 1]) * size
    assert max(seconds for _, seconds in done) >= (2 * size - BURST) / RATE * 0.95
    # They took turns: neither waited until the other one was through.
    assert min(seconds for _, seconds in done) >= (size - BURST) / RATE * 1.2
    assert rig.splicer.refusals["link_rate"] >= 2
    for end in (*pairs[0], *pairs[1], *other):
        end.writer.close()
    assert rig.splicer.status()["held"] == 0


@pytest.mark.parametrize("metered", [(Limits(rate_bytes_per_s=RATE),)], indirect=True)
async def test_what_is_held_ends_with_its_session(metered: Metered) -> None:
    rig, owner = metered.rig, Owner("agent", "link")
    agent, connector = await rig.pair(owner=owner)
    agent.writer.write(bytes(8 * RATE))
    async with asyncio.timeout(DEADLINE_S):
        while not rig.splicer.status()["held"]:
            await asyncio.sleep(0.005)
    rig.splicer.end_session(SESSION)
    rig.splicer.end_link("link")
    assert rig.splicer.status()["held"] == 0
    with pytest.raises(ConnectionResetError):
        await connector.read()
    for each in (agent, connector):
        each.writer.close()


@pytest.mark.parametrize("metered", [(Limits(quota_bytes=1_000_000), 1_000_000)], indirect=True)
async def test_who_is_beyond_a_quota_is_cut_and_gets_no_further_token(metered: Metered) -> None:
    rig, owner = metered.rig, Owner("agent", "link")
    agent, connector = await rig.pair(owner=owner)
    free = await rig.pair(owner=Owner("other", "free"))
    agent.writer.write(bytes(999_999))
    assert len(await connector.read(999_999)) == 999_999
    connector.writer.write(b"x")
    assert await agent.read(1) == b"x"
    for each in (agent, connector):
        with pytest.raises(ConnectionResetError):
            await each.read(1)
    assert not rig.splicer.admit_agent(SESSION, b"d" * 32, owner)
    assert metered.left == 0 and rig.splicer.refusals == {"link_quota": 2}
    free[0].writer.write(b"not concerned")
    assert await free[1].read(13) == b"not concerned"
    for each in (agent, connector, *free):
        each.writer.close()
