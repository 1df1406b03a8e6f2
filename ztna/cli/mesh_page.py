"""The page of a whole mesh that `ztna up` serves: what each daemon says, put together. Reads only.

It asks the daemons' admin ports while somebody looks, and is for this host alone, as theirs are.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
import msgspec
from aiohttp import web

from ztna import admin
from ztna.cli.mesh import Mesh
from ztna.config import Endpoint
from ztna.errors import ProtocolError
from ztna.listening import bind_error
from ztna.pages import page_whole, seen
from ztna.pages.live import Json, Page
from ztna.pages.mesh import mesh_of
from ztna.pages.parts import View

ASK_SECONDS = 2.0
"""A daemon that has not answered by then is shown as silent."""
SHUTDOWN_SECONDS = 0.2


@asynccontextmanager
async def serving(mesh: Mesh) -> AsyncIterator[str]:
    """Serve at the mesh's `page_port` for as long as the context lasts, and say where that is.

    Raises ZtnaError when the port cannot be had.
    """
    app = web.Application(middlewares=[admin.guard])
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=ASK_SECONDS)) as http:
        asking = _Asking(mesh, http)
        Page(asking.read, _shown).add_to(app)
        app.router.add_get("/status", asking.status)
        app.router.add_get("/mesh", asking.mesh)
        runner = web.AppRunner(app, access_log=None, handle_signals=False, shutdown_timeout=SHUTDOWN_SECONDS)
        await runner.setup()
        try:
            try:
                await web.TCPSite(runner, "127.0.0.1", mesh.page_port).start()
            except OSError as error:
                raise bind_error(Endpoint("127.0.0.1", mesh.page_port), error) from None
            yield "http://{}:{}/".format(*runner.addresses[0][:2])
        finally:
            await runner.cleanup()


class _Asking:
    def __init__(self, mesh: Mesh, http: aiohttp.ClientSession) -> None:
        self._mesh = mesh
        self._http = http

    async def read(self) -> Json:
        """Return what each daemon says (None: nothing), where its page is, and which processes run."""
        told = await asyncio.gather(*map(self._ask, self._mesh.admin.values()))
        return {
            "daemons": dict(zip(self._mesh.admin, told, strict=True)),
            "pages": {name: f"http://127.0.0.1:{port}/" for name, port in self._mesh.admin.items()},
            "processes": {
                child.name: "running" if child.running else "ended" for child in self._mesh.children
            },
        }

    async def status(self, request: web.Request) -> web.Response:
        return _json(await self.read())

    async def mesh(self, request: web.Request) -> web.Response:
        return _json(mesh_of(each for each in _seen(await self.read()).values() if each is not None))

    async def _ask(self, port: int) -> Json | None:
        try:
            async with self._http.get(f"http://127.0.0.1:{port}/status") as answer:
                status: Json = msgspec.json.decode(await answer.read())
                return status if answer.status == 200 else None
        except (aiohttp.ClientError, TimeoutError, msgspec.DecodeError):
            return None


def _seen(state: Json) -> dict[str, seen.Daemon | None]:
    return {name: None if status is None else _read(status) for name, status in state["daemons"].items()}


def _read(status: Json) -> seen.Daemon | None:
    try:
        return seen.read(status)
    except ProtocolError:
        return None


def _shown(state: Json, earlier: Json | None) -> View:
    return page_whole.view(_seen(state), state["pages"], state["processes"])


def _json(value: Any) -> web.Response:
    body = msgspec.json.format(msgspec.json.encode(value), indent=2)
    return web.Response(body=body + b"\n", content_type="application/json")
