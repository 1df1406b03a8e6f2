"""The page of `ztna up`: what the daemons say put together, whoever of them does not answer or makes no sense."""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from tests.support import statuses
from ztna.cli import mesh_page
from ztna.cli.mesh import Mesh, MeshOptions
from ztna.errors import ZtnaError


@asynccontextmanager
async def saying(told: object) -> AsyncIterator[int]:
    """Serve something as /status, and give its port."""

    async def status(request: web.Request) -> web.Response:
        return web.Response(text=told) if isinstance(told, str) else web.json_response(told)

    app = web.Application()
    app.router.add_get("/status", status)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    try:
        yield runner.addresses[0][1]
    finally:
        await runner.cleanup()


async def fetched(url: str) -> Any:
    async with aiohttp.ClientSession() as http, http.get(url) as answer:
        assert answer.status == 200
        return await (answer.json() if answer.content_type == "application/json" else answer.text())


async def test_it_puts_together_what_the_daemons_say(tmp_path: Path) -> None:
    mesh = Mesh(MeshOptions(tmp_path), lambda text: None)
    async with (
        saying(statuses.relay()) as relay,
        saying(statuses.connector()) as connector,
        saying("<no JSON>") as dnsd,
        saying([1]) as agent,
    ):
        mesh.admin = {"relay": relay, "connector": connector, "dnsd": dnsd, "agent": agent}
        async with mesh_page.serving(mesh) as url:
            assert url == f"http://127.0.0.1:{mesh.page_port}/"
            page, told = await fetched(url), await fetched(f"{url}mesh")
            state = await fetched(f"{url}status")
    assert "dnsd does not answer; agent does not answer" in page
    assert f'href="http://127.0.0.1:{relay}/"' in page and "127.0.0.1:5432" in page
    assert [each["name"] for each in told["services"]] == ["db", "echo", "web"]
    assert state["daemons"]["dnsd"] is None and state["daemons"]["relay"]["relay"]["name"] == "north"


async def test_it_is_for_this_host_alone_and_takes_nothing(tmp_path: Path) -> None:
    mesh = Mesh(MeshOptions(tmp_path), lambda text: None)
    mesh.admin = {}
    async with mesh_page.serving(mesh) as url, aiohttp.ClientSession() as http:
        async with http.get(url, headers={"Host": "evil.example"}) as answer:
            assert answer.status == 403
        async with http.post(f"{url}status") as answer:
            assert answer.status == 403


async def test_a_port_that_is_taken_is_named(tmp_path: Path) -> None:
    mesh = Mesh(MeshOptions(tmp_path), lambda text: None)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        mesh.page_port = taken.getsockname()[1]
        with pytest.raises(ZtnaError, match=str(mesh.page_port)):
            async with mesh_page.serving(mesh):
                pass
