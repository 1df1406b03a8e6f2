"""Serve a page, the files that it needs, and what has changed on it as server-sent events.

However many look, the state is read once in TICK_SECONDS, and only while somebody does. A listener gets what it has not
seen yet, never a backlog: nothing is queued for one that reads slowly, and one that does not read at all is cut off.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping
from importlib.resources import files
from typing import Any

import msgspec
from aiohttp import web

from ztna.pages import document
from ztna.pages.parts import View
from ztna.reasons import Reason
from ztna.telemetry import dropped, refused

LISTENERS_MAX = 16
"""Open event streams of one daemon: each is a browser's page."""
TICK_SECONDS = 1.0
"""What has changed is told no more often than this."""
FRESH_PART = 0.9
"""Of a tick: a state that is younger is what every other listener gets too."""
COST_FACTOR = 20
"""A state is kept for as many times the processor time that it took: pages take a twentieth of a core, however much
there is. To wait for the answer of others costs nothing.
"""
HEARTBEAT_SECONDS = 15.0
"""How long a stream says nothing at most, so that both ends notice when the other has gone."""
SLOW_SECONDS = 10.0
"""A listener whose buffers have been full for so long is cut off."""
RETRY_MILLISECONDS = 2_000
"""When a browser whose stream has ended comes back."""
WHERE = "admin.events"

Json = dict[str, Any]
_FILES = {"/page.css": "text/css", "/page.js": "text/javascript", "/page.svg": "image/svg+xml"}
_HEARTBEAT = b": still here\n\n"


class Page:
    """One page. `read` returns the state, `show` makes the page of a state and the one before it."""

    def __init__(
        self, read: Callable[[], Awaitable[Json]], show: Callable[[Json, Json | None], View]
    ) -> None:
        self._read = read
        self._show = show
        self._listeners = 0
        self._reading = asyncio.Lock()
        self._fresh_until = float("-inf")
        self._state: Json = {}
        self._encoded: Mapping[str, bytes] = {}
        self._closing = asyncio.Event()

    @property
    def listeners(self) -> int:
        """How many event streams are open."""
        return self._listeners

    def add_to(self, app: web.Application) -> None:
        """Serve `/`, `/events` and the files of the page, until the application shuts down."""
        app.router.add_get("/", self._page)
        app.router.add_get("/events", self._events, allow_head=False)
        for path in _FILES:
            app.router.add_get(path, self._file)
        app.on_shutdown.append(self._close)

    async def _close(self, app: web.Application) -> None:
        self._closing.set()

    async def _page(self, request: web.Request) -> web.Response:
        # In a thread: a large page takes tens of milliseconds, and the loop has packets to carry meanwhile.
        text = await asyncio.to_thread(self._document, await self._read(), self._state or None)
        return web.Response(text=text, content_type="text/html", charset="utf-8")

    def _document(self, state: Json, earlier: Json | None) -> str:
        raw = msgspec.json.format(msgspec.json.encode(state), indent=2).decode()
        as_of = time.strftime("%H:%M:%S UTC", time.gmtime())
        return document.document(self._show(state, earlier), raw, as_of)

    async def _file(self, request: web.Request) -> web.Response:
        text = files("ztna.pages").joinpath("static", request.path.lstrip("/")).read_text()
        return web.Response(text=text, content_type=_FILES[request.path], charset="utf-8")

    async def _events(self, request: web.Request) -> web.StreamResponse:
        if self._listeners >= LISTENERS_MAX:
            refused(WHERE, Reason.LIMIT_REACHED)
            return web.Response(text=f"{LISTENERS_MAX} pages are open already; close one\n", status=503)
        self._listeners += 1
        try:
            return await self._stream(request)
        finally:
            self._listeners -= 1

    async def _stream(self, request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"} | document.HEADERS)
        await response.prepare(request)
        seen: dict[str, bytes] = {}
        data = f"retry: {RETRY_MILLISECONDS}\n\n".encode()
        silent_since = time.monotonic()
        while not self._closing.is_set():
            await self._refresh()
            changed = {id_: told for id_, told in self._encoded.items() if seen.get(id_) != told}
            data += document.event(changed) if changed else b""
            if not data and time.monotonic() - silent_since >= HEARTBEAT_SECONDS:
                data = _HEARTBEAT
            if data:
                if not await _written(request, response, data):
                    return response
                silent_since = time.monotonic()
            seen |= changed
            data = b""
            if await self._is_over(request):
                return response
        return response

    async def _is_over(self, request: web.Request) -> bool:
        """Wait for the next look; say whether there is none, as the listener has gone or the daemon ends."""
        try:
            async with asyncio.timeout(TICK_SECONDS):
                await self._closing.wait()
        except TimeoutError:
            return request.transport is None or request.transport.is_closing()
        return True

    async def _refresh(self) -> None:
        """Read the state and make the sections anew, unless that was done just now for another listener."""
        async with self._reading:
            if time.monotonic() < self._fresh_until:
                return
            started = time.thread_time()
            state = await self._read()
            cost = time.thread_time() - started
            self._encoded, made = await asyncio.to_thread(self._made, state, self._state or None)
            self._state = state
            kept = max(FRESH_PART * TICK_SECONDS, COST_FACTOR * (cost + made))
            self._fresh_until = time.monotonic() + kept

    def _made(self, state: Json, earlier: Json | None) -> tuple[Mapping[str, bytes], float]:
        """Return the sections, and the processor time that they took."""
        started = time.thread_time()
        sections = document.encoded(self._show(state, earlier).sections)
        return sections, time.thread_time() - started


async def _written(request: web.Request, response: web.StreamResponse, data: bytes) -> bool:
    """Write to a listener; say whether it took it. One that takes too long is cut off and counted."""
    try:
        async with asyncio.timeout(SLOW_SECONDS):
            await response.write(data)
    except TimeoutError:
        dropped(WHERE, "slow_listener")
        if request.transport is not None:
            request.transport.abort()
        return False
    except ConnectionError:
        return False
    return True
