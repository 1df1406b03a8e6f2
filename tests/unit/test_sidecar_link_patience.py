"""sidecar.link.patience: only time in which something could have come counts."""

from __future__ import annotations

import asyncio
import itertools
import time

import pytest

from sidecar.link import patience as module
from sidecar.link.patience import patience


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LOOK_SECONDS", 0.01)


async def test_it_ends_what_nothing_comes_of() -> None:
    with pytest.raises(TimeoutError):
        async with patience(0.05):
            await asyncio.Event().wait()


async def test_what_is_done_in_time_is_left_alone() -> None:
    async with patience(0.05):
        pass
    for _ in range(10):  # no timer of it is left that would cancel this task
        await asyncio.sleep(0.01)


async def test_time_in_which_the_loop_was_held_up_does_not_count() -> None:
    async with patience(0.05):
        for _ in range(2):
            time.sleep(0.1)  # which is the point
            await asyncio.sleep(0)


async def test_news_begin_it_anew() -> None:
    numbers = itertools.count()
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.3):
            async with patience(0.02, lambda: next(numbers)):
                await asyncio.Event().wait()
    assert next(numbers) > 3


async def test_a_cancelled_task_is_cancelled() -> None:
    async def wait() -> None:
        async with patience(5.0):
            await asyncio.Event().wait()

    task = asyncio.create_task(wait())
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
