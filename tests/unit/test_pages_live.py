"""The event stream: what has changed and no more, to a bounded number, and never a backlog for who does not read."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
import msgspec
import pytest
from aiohttp import web

from ztna.pages import live
from ztna.pages.live import Json, Page
from ztna.pages.markup import el
from ztna.pages.parts import View
from ztna.telemetry import DROPS, REFUSALS

WAIT_SECONDS = 10.0
LARGE_BYTES = 400_000


class Subject:
    """What a page shows in these tests: one section with `told`, one that never changes."""

    def __init__(self) -> None:
        self.told = "first"
        self.reads = 0
        self.earlier: list[Json | None] = []
        self.page = Page(self._read, self._show)

    async def _read(self) -> Json:
        self.reads += 1
        return {"told": self.told}

    def _show(self, state: Json, earlier: Json | None) -> View:
        self.earlier.append(earlier)
        return View("Test", {"head": el("header", "still", id="head"), "a": el("p", state["told"], id="a")})


@asynccontextmanager
async def served(subject: Subject) -> AsyncIterator[str]:
    app = web.Application()
    subject.page.add_to(app)
    runner = web.AppRunner(app, shutdown_timeout=0.5)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    try:
        yield "http://{}:{}".format(*runner.addresses[0])
    finally:
        await runner.cleanup()


@pytest.fixture
async def client() -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession() as session:
        yield session


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live, "TICK_SECONDS", 0.02)
    monkeypatch.setattr(live, "COST_FACTOR", 0)


async def sections(answer: aiohttp.ClientResponse) -> Any:
    """Return the sections of the next event."""
    async with asyncio.timeout(WAIT_SECONDS):
        while True:
            line = await answer.content.readline()
            assert line, "the stream ended"
            if line.startswith(b"data: "):
                return msgspec.json.decode(line[6:])


async def until(found: Any) -> None:
    async with asyncio.timeout(WAIT_SECONDS):
        while not found():
            await asyncio.sleep(0.005)


async def test_a_listener_gets_everything_once_and_then_what_has_changed(
    client: aiohttp.ClientSession,
) -> None:
    subject = Subject()
    async with served(subject) as url, client.get(f"{url}/events") as answer:
        assert answer.content_type == "text/event-stream"
        assert "connect-src 'self'" in answer.headers["Content-Security-Policy"]
        assert list(await sections(answer)) == ["head", "a"]
        subject.told = "<b>second</b>"
        assert await sections(answer) == {"a": ["p", {"id": "a"}, "<b>second</b>"]}
        assert subject.earlier[-1] == {"told": "first"} or subject.earlier[-1] == {"told": "<b>second</b>"}


async def test_nothing_is_sent_while_nothing_changes_but_a_heartbeat(
    client: aiohttp.ClientSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(live, "HEARTBEAT_SECONDS", 0.1)
    subject = Subject()
    async with served(subject) as url, client.get(f"{url}/events") as answer:
        await sections(answer)
        assert await answer.content.readline() == b"\n"
        before = subject.reads
        assert await answer.content.readline() == b": still here\n"
        assert subject.reads > before  # it was looked, and there was nothing to tell


async def test_what_costs_much_is_made_less_often(
    client: aiohttp.ClientSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(live, "HEARTBEAT_SECONDS", 0.1)
    monkeypatch.setattr(live, "COST_FACTOR", 1e9)
    subject = Subject()
    async with served(subject) as url, client.get(f"{url}/events") as answer:
        await sections(answer)
        subject.told = "second"
        assert await answer.content.readline() == b"\n"
        assert await answer.content.readline() == b": still here\n"
        assert subject.reads == 1


async def test_to_wait_for_others_is_no_cost(
    client: aiohttp.ClientSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(live, "COST_FACTOR", 1e9)
    monkeypatch.setattr(time, "thread_time", lambda: 0.0)
    subject = Subject()
    async with served(subject) as url, client.get(f"{url}/events") as answer:
        await sections(answer)
        subject.told = "second"
        assert await sections(answer) == {"a": ["p", {"id": "a"}, "second"]}


async def test_however_many_listen_the_state_is_read_once_a_tick(
    client: aiohttp.ClientSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(live, "TICK_SECONDS", 30.0)
    subject = Subject()
    async with served(subject) as url:
        answers = [await client.get(f"{url}/events") for _ in range(5)]
        for answer in answers:
            await sections(answer)
        assert subject.reads == 1
        for answer in answers:
            answer.close()


async def test_nobody_who_looks_costs_nothing(client: aiohttp.ClientSession) -> None:
    subject = Subject()
    async with served(subject) as url:
        async with client.get(f"{url}/events") as answer:
            await sections(answer)
        await until(lambda: subject.page.listeners == 0)
        before = subject.reads
        async with client.get(f"{url}/page.css") as answer:
            assert answer.content_type == "text/css" and "prefers-color-scheme: dark" in await answer.text()
        assert subject.reads == before


async def test_one_too_many_is_refused_counted_and_has_its_place_when_one_goes(
    client: aiohttp.ClientSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(live, "LISTENERS_MAX", 2)
    counted = REFUSALS.labels(live.WHERE, "limit_reached")
    before = counted._value.get()
    async with served(Subject()) as url:
        first, second = [await client.get(f"{url}/events") for _ in range(2)]
        async with client.get(f"{url}/events") as third:
            assert third.status == 503 and "close one" in await third.text()
        assert counted._value.get() == before + 1
        first.close()
        async with asyncio.timeout(WAIT_SECONDS):
            while True:
                async with client.get(f"{url}/events") as again:
                    if again.status == 200:
                        await sections(again)
                        break
        second.close()


async def test_one_that_does_not_read_is_cut_off_and_counted_and_others_go_on(
    client: aiohttp.ClientSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(live, "SLOW_SECONDS", 0.3)
    counted = DROPS.labels(live.WHERE, "slow_listener")
    before = counted._value.get()
    subject = Subject()
    async with served(subject) as url:
        host, _, port = url.removeprefix("http://").partition(":")
        with socket.socket() as slow:
            slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            slow.connect((host, int(port)))
            slow.sendall(b"GET /events HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
            await until(lambda: subject.page.listeners == 1)
            async with client.get(f"{url}/events", read_bufsize=2**24) as other:
                for number in range(10_000):
                    subject.told = str(number) * (LARGE_BYTES // len(str(number)))
                    await sections(other)
                    if counted._value.get() > before:
                        break
                assert counted._value.get() == before + 1
                await until(lambda: subject.page.listeners == 1)
                subject.told = "still here"
                assert "a" in await sections(other)


async def test_the_end_is_prompt_with_streams_that_are_open(
    client: aiohttp.ClientSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(live, "TICK_SECONDS", 60.0)
    async with served(Subject()) as url:
        answer = await client.get(f"{url}/events")
        await sections(answer)
        started = time.monotonic()
    assert time.monotonic() - started < 0.5, (
        "it was not told of the end, but cut off by the shutdown's timeout"
    )
    assert await answer.content.read() == b"\n"  # an end, not a break


async def test_the_page_is_complete_before_any_stream(client: aiohttp.ClientSession) -> None:
    subject = Subject()
    subject.told = "<script>alert(1)</script>"
    async with served(subject) as url, client.get(url) as answer:
        text = await answer.text()
    assert "&lt;script&gt;alert(1)" in text and text.count("<script") == 1 and " UTC; load again" in text


async def test_asking_for_the_head_of_a_stream_takes_no_place(client: aiohttp.ClientSession) -> None:
    subject = Subject()
    async with served(subject) as url, client.head(f"{url}/events") as answer:
        assert answer.status == 405 and subject.page.listeners == 0


@pytest.mark.parametrize("path", ["/page.js", "/page.svg", "/page.css"])
async def test_its_files_are_served_and_no_other(client: aiohttp.ClientSession, path: str) -> None:
    async with served(Subject()) as url:
        async with client.get(url + path) as answer:
            assert answer.status == 200 and await answer.text()
        async with client.get(f"{url}/../document.py") as answer:
            assert answer.status == 404
