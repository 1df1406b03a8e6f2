"""What programs say of themselves: the last word holds for its time."""

from __future__ import annotations

import asyncio

import pytest

from sidecar.connector.pushes import OUTPUT_CHARACTERS_MAX, Pushes
from ztna.names import ServiceName

WEB, DB = ServiceName("web"), ServiceName("db")


async def test_a_word_counts_at_once_and_wakes_who_waits() -> None:
    pushes = Pushes()
    assert not pushes.now(WEB, 30.0).ok and "nothing was heard" in pushes.now(WEB, 30.0).output
    waiting = [asyncio.ensure_future(pushes.changed(WEB, 30.0)) for _ in range(2)]
    other = asyncio.ensure_future(pushes.changed(DB, 30.0))
    await asyncio.sleep(0)
    pushes.push(WEB, "warning", "3 of 4")
    async with asyncio.timeout(5):
        await asyncio.gather(*waiting)
    said = pushes.now(WEB, 30.0)
    assert (said.ok, said.is_warning, said.output) == (True, True, "3 of 4")
    assert not other.done()
    other.cancel()


@pytest.mark.parametrize(("verdict", "ok"), [("passing", True), ("critical", False)])
async def test_what_is_said_without_words_says_the_verdict(verdict: str, ok: bool) -> None:
    pushes = Pushes()
    pushes.push(WEB, verdict, "")  # type: ignore[arg-type]
    assert (pushes.now(WEB, 1.0).ok, pushes.now(WEB, 1.0).output) == (ok, f"the program says {verdict}")
    pushes.push(WEB, verdict, "x" * 10_000)  # type: ignore[arg-type]
    assert len(pushes.now(WEB, 1.0).output) == OUTPUT_CHARACTERS_MAX


async def test_a_word_whose_time_is_over_is_critical_till_the_next() -> None:
    pushes = Pushes()
    pushes.push(WEB, "passing", "")
    async with asyncio.timeout(5):
        await pushes.changed(WEB, 0.05)
    assert pushes.now(WEB, 0.05).output == "ttl: nothing was heard of the program for 0.05 s"
    waiting = asyncio.ensure_future(pushes.changed(WEB, 0.05))
    done, _ = await asyncio.wait((waiting,), timeout=0.2)
    assert not done, "it does not turn round and round"
    pushes.push(WEB, "passing", "")
    async with asyncio.timeout(5):
        await waiting
    pushes.forget(WEB)
    assert not pushes.now(WEB, 30.0).ok
