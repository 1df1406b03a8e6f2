"""The admin port of a daemon: metrics, health, its state as JSON and as a page; and a unix socket that changes things.

What shows peers and sessions is for this host alone, whatever address the port has, and never for a browser's page
that calls it by a name of its own (DNS rebinding). Only the unix socket, which is its owner's, takes actions.
"""

from __future__ import annotations

import asyncio
import os
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import ExitStack, asynccontextmanager
from importlib.metadata import version
from ipaddress import ip_address
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
from aiohttp import web
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector

from ztna import log_lines, telemetry
from ztna.config import Endpoint
from ztna.errors import ZtnaError
from ztna.jsontypes import Secret, encode_hook
from ztna.listening import bind_error, unix_socket
from ztna.pages import seen, views
from ztna.pages.document import HEADERS
from ztna.pages.live import Json, Page
from ztna.pages.mesh import Mesh, mesh_of
from ztna.pages.parts import View

if TYPE_CHECKING:
    from ztna.runtime import Daemon

SHUTDOWN_SECONDS = 0.5
"""A scrape or probe that does not end by then is cut off when the daemon stops."""
SOCKET_MODE = 0o600
PROBES_AT_ONCE_MAX = 8
PROBE_SECONDS = 30.0
_OPEN_PATHS = frozenset({"/metrics", "/healthz", "/readyz"})
"""What load balancers and Prometheus read from wherever the port is reached."""

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


@asynccontextmanager
async def serving(daemon: Daemon, admin: Endpoint, socket_path: str | None) -> AsyncIterator[None]:
    """Serve for as long as the context lasts. Raises ZtnaError for an address or path that cannot be had."""
    app = web.Application(middlewares=[guard])
    pages = _Pages(daemon)
    Page(pages.read, shown).add_to(app)
    app.router.add_get("/metrics", pages.metrics)
    app.router.add_get("/healthz", pages.healthz)
    app.router.add_get("/readyz", pages.readyz)
    app.router.add_get("/status", pages.status)
    app.router.add_get("/mesh", pages.mesh)
    app.router.add_post("/{action}/{subject}", pages.act)
    runner = web.AppRunner(app, access_log=None, handle_signals=False, shutdown_timeout=SHUTDOWN_SECONDS)
    with ExitStack() as made:
        listener = None
        if socket_path is not None:
            listener = made.enter_context(unix_socket(Path(socket_path), SOCKET_MODE, "admin_socket"))
        await runner.setup()
        try:
            await _start(runner, admin)
            daemon.admin_address = runner.addresses[0][:2]
            if listener is not None:
                await web.SockSite(runner, listener).start()
            yield
        finally:
            await runner.cleanup()


async def _start(runner: web.AppRunner, admin: Endpoint) -> None:
    try:
        await web.TCPSite(runner, admin.host, admin.port).start()
    except OSError as error:
        raise bind_error(admin, error) from None


def _is_unix(request: web.Request) -> bool:
    own = request.transport.get_extra_info("socket") if request.transport is not None else None
    return own is not None and own.family == socket.AF_UNIX


@web.middleware
async def guard(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Refuse who is elsewhere, or was led here by a name; nothing but the unix socket takes actions."""
    if not _is_unix(request):
        if request.method not in ("GET", "HEAD"):
            return _said("only the admin socket takes actions", 403)
        if request.path not in _OPEN_PATHS and not (_is_loopback(request.remote) and _names_address(request)):
            return _said("this is for http://127.0.0.1 of the host itself, or the admin socket", 403)
        if request.path not in _OPEN_PATHS and _is_of_another_page(request):
            return _said("no other page may ask here", 403)
    response = await handler(request)
    if not response.prepared:
        response.headers.update(HEADERS)
    return response


def _is_of_another_page(request: web.Request) -> bool:
    """Say whether a page from elsewhere asks (Fetch Metadata, W3C); a link on it may still lead here.

    It could read nothing, but take the places of those who look.
    """
    headers = request.headers
    # Another port of this host is the same site, and no more ours than any other page.
    is_own = headers.get("Sec-Fetch-Site", "none") in ("same-origin", "none")
    return not is_own and headers.get("Sec-Fetch-Mode") != "navigate"


def _is_loopback(remote: str | None) -> bool:
    try:
        return remote is not None and ip_address(remote).is_loopback
    except ValueError:
        return False


def _names_address(request: web.Request) -> bool:
    """Say whether the request calls this host by an address: a page of a browser can make any name lead here."""
    host = request.url.host or ""
    return host == "localhost" or _is_loopback(host)


class _Pages:
    """What is served; all but `act` only reads."""

    def __init__(self, daemon: Daemon) -> None:
        self._daemon = daemon
        self._probing = 0

    async def metrics(self, request: web.Request) -> web.Response:
        """Answer in what the scraper takes: Prometheus asks for OpenMetrics, which alone has exemplars."""
        daemon = self._daemon
        telemetry.WARNINGS.set(len(daemon.readiness.report()["warnings"]))
        for measure in daemon.measures:
            measure()
        encode, content_type = _encoder(",".join(request.headers.getall("Accept", ())))
        return web.Response(body=encode(telemetry.Page(daemon.name)), headers={"Content-Type": content_type})

    async def healthz(self, request: web.Request) -> web.Response:
        return web.Response(text="ok\n")

    async def readyz(self, request: web.Request) -> web.Response:
        readiness = self._daemon.readiness
        return _json(readiness.report(), 200 if readiness.ready else 503)

    async def status(self, request: web.Request) -> web.Response:
        return _json(self._state(), 200)

    async def mesh(self, request: web.Request) -> web.Response:
        # In a thread, as pages are: a large mesh takes a while to put together.
        return _json(await asyncio.to_thread(_mesh, await self.read()), 200)

    async def read(self) -> Json:
        """Return the state as JSON has it."""
        state: Json = msgspec.json.decode(msgspec.json.encode(self._state(), enc_hook=_shown))
        return state

    async def act(self, request: web.Request) -> web.Response:
        name, subject = request.match_info["action"], request.match_info["subject"]
        action, probe = self._daemon.actions.get(name), self._daemon.probes.get(name)
        if probe is not None:
            return await self._probe(probe, subject)
        if action is None:
            return _said("no such action", 404)
        done = action(subject)
        return _json({"done": done}, 200 if done else 404)

    async def _probe(self, probe: Callable[[str], Awaitable[object]], subject: str) -> web.Response:
        if self._probing >= PROBES_AT_ONCE_MAX:
            return _said(f"{PROBES_AT_ONCE_MAX} probes are under way already", 503)
        self._probing += 1
        try:
            async with asyncio.timeout(PROBE_SECONDS):
                return _json(await probe(subject), 200)
        except ZtnaError as error:
            return _said(str(error), 400)
        except TimeoutError:
            return _said(f"not done within {PROBE_SECONDS:g} s", 504)
        finally:
            self._probing -= 1

    def _state(self) -> dict[str, object]:
        daemon = self._daemon
        own = {
            "daemon": daemon.name,
            "version": version("ztna-mesh"),
            "pid": os.getpid(),
            "uptime_s": round(time.monotonic() - daemon.started_at, 1),
            "tasks_running": len(asyncio.all_tasks()),
            "readiness": daemon.readiness.report(),
            "counted": telemetry.counted(),
        }
        return own | {name: source() for name, source in daemon.status_sources.items()}


def shown(state: Json, earlier: Json | None) -> View:
    """Return the page of a daemon's state."""
    return views.view(seen.read(state), None if earlier is None else seen.read(earlier))


def _mesh(state: Json) -> Mesh:
    return mesh_of([seen.read(state)])


def _encoder(accept: str) -> tuple[Callable[[Collector], bytes], str]:
    """Return prometheus_client's choice; for a version that is none, over which it fails, the plain format."""
    try:
        return choose_encoder(accept if accept.isascii() else "")
    except (TypeError, ValueError):
        return choose_encoder("")


def _said(text: str, status: int) -> web.Response:
    return _json({"error": text}, status)


def _json(value: object, status: int) -> web.Response:
    body = msgspec.json.format(msgspec.json.encode(value, enc_hook=_shown), indent=2)
    return web.Response(body=body + b"\n", status=status, content_type="application/json")


def _shown(value: Any) -> str:
    return log_lines.HIDDEN if isinstance(value, Secret) else encode_hook(value)
