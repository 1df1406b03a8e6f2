"""A flow whose carriers break anywhere, any number of times, loses, repeats and reorders no byte."""

import asyncio
import random
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.cut_carriers import DOWN, UP, Cut, Meadow, Program, carried

REQUEST, ANSWER = b"GET /thing", b"here it is, all of it"


def talk(
    cuts: Sequence[Cut], request: bytes = REQUEST, answer: bytes = ANSWER, **settings: int
) -> tuple[Program, Program, Meadow]:
    """A whole flow; `answers_last`: the backend waits for the end of the request before it answers."""

    async def run() -> tuple[Program, Program, Meadow]:
        local = Program(request)
        backend = Program(answer, answers_last=True)
        return local, backend, await carried(local, backend, list(cuts), **settings)

    return asyncio.run(run())


def check(local: Program, backend: Program, meadow: Meadow) -> None:
    assert backend.heard == local.content
    assert local.heard == backend.content
    assert not local.was_reset and not backend.was_reset
    assert meadow.dials == 1
    assert meadow.far.used == meadow._near.used == 0


def lengths() -> tuple[int, int]:
    """How many bytes go each way when nothing is cut."""
    [(up, down)] = talk(())[2].carried
    return up, down


@pytest.mark.parametrize("way", [UP, DOWN])
def test_a_cut_at_every_byte(way: int) -> None:
    for after in range(lengths()[way] + 1):
        check(*talk([Cut(way, after)], seed=after))


@pytest.mark.parametrize("way", [UP, DOWN])
def test_two_cuts_at_every_byte(way: int) -> None:
    chance = random.Random(7)
    for after in range(lengths()[way] + 1):
        check(*talk([Cut(way, after), Cut(chance.choice((UP, DOWN)), chance.randint(0, 250))], seed=after))


cuts = st.lists(st.builds(Cut, st.sampled_from((UP, DOWN)), st.integers(0, 2000)), max_size=8)
far_cuts = st.lists(st.builds(Cut, st.sampled_from((UP, DOWN)), st.integers(0, 300_000)), max_size=5)


@settings(max_examples=150, deadline=None)
@given(cuts, st.binary(max_size=600), st.binary(max_size=600), st.integers(0, 2**32))
def test_cuts_anywhere_and_often(cuts: list[Cut], request: bytes, answer: bytes, seed: int) -> None:
    check(*talk(cuts, request, answer, seed=seed))


@settings(max_examples=40, deadline=None)
@given(far_cuts, st.integers(0, 400_000), st.integers(0, 400_000), st.integers(0, 2**32))
def test_cuts_in_the_middle_of_bulk_both_ways(cuts: list[Cut], up: int, down: int, seed: int) -> None:
    async def run() -> tuple[Program, Program, Meadow]:
        chance = random.Random(seed)
        local, backend = Program(chance.randbytes(up)), Program(chance.randbytes(down))
        return local, backend, await carried(local, backend, cuts, seed=seed)

    check(*asyncio.run(run()))


@settings(max_examples=60, deadline=None)
@given(cuts, st.booleans(), st.integers(0, 300), st.integers(0, 2**32))
def test_a_reset_comes_through_cuts_and_nothing_wrong_before_it(
    cuts: list[Cut], by_local: bool, after: int, seed: int
) -> None:
    async def run() -> tuple[Program, Program]:
        chance = random.Random(seed)
        local = Program(chance.randbytes(300), resets_after=after if by_local else None)
        backend = Program(chance.randbytes(300), resets_after=None if by_local else after)
        await carried(local, backend, cuts, seed=seed)
        return local, backend

    local, backend = asyncio.run(run())
    assert backend.content.startswith(local.heard)
    assert local.content.startswith(backend.heard)
