"""The connector's local API: programs of this host add, remove and see services, and say how they are.

    PUT    /v1/services/NAME         {"routes": [{"port": 80, "backend": "127.0.0.1:8080", ...}]}, keys as in a file
    GET    /v1/services/NAME         the service: where it comes from, its routes, its health
    DELETE /v1/services/NAME
    GET    /v1/services              all of them
    PUT    /v1/services/NAME/check   {"status": "passing", "output": "..."} for its checks of kind ttl

HTTP on a unix socket that is its owner's (mode 0600): whoever may open it may do all of this. What is answered to a
request that is not carried out is {"error": text, "reason": one of ztna.reasons or null}.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import ExitStack, asynccontextmanager
from pathlib import Path
from typing import Any, Literal

import msgspec
from aiohttp import web

from sidecar.connector.api_state import StateError
from sidecar.connector.discovery import Discovery, NotFromHere
from sidecar.connector.pushes import Pushes
from ztna import sections
from ztna.admin import SHUTDOWN_SECONDS, SOCKET_MODE
from ztna.config import RouteConfig, RoutesFile
from ztna.errors import BadName, ConfigError, ProtocolError, Refused
from ztna.jsontypes import encode_hook, from_json
from ztna.listening import unix_socket
from ztna.names import ServiceName
from ztna.reasons import Reason
from ztna.telemetry import refused

BODY_BYTES_MAX = 256 * 1024

_WHERE = "connector_api"
_STATUS = {Reason.NO_GRANT: 403, Reason.NO_SUCH_SERVICE: 404, Reason.LIMIT_REACHED: 429}

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class _Word(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a program says of itself."""

    status: Literal["passing", "warning", "critical"]
    output: str = ""


@asynccontextmanager
async def serving(discovery: Discovery, pushes: Pushes, path: str) -> AsyncIterator[None]:
    """Serve on the socket for as long as the context lasts. Raises ConfigError for a path that cannot be had."""
    app = web.Application(middlewares=[_told], client_max_size=BODY_BYTES_MAX)
    api = _Api(discovery, pushes)
    app.router.add_get("/v1/services", api.every)
    app.router.add_get("/v1/services/{name}", api.one)
    app.router.add_put("/v1/services/{name}", api.put)
    app.router.add_delete("/v1/services/{name}", api.delete)
    app.router.add_put("/v1/services/{name}/check", api.check)
    runner = web.AppRunner(app, access_log=None, handle_signals=False, shutdown_timeout=SHUTDOWN_SECONDS)
    with ExitStack() as made:
        listener = made.enter_context(unix_socket(Path(path), SOCKET_MODE, "connector.api"))
        await runner.setup()
        try:
            await web.SockSite(runner, listener).start()
            yield
        finally:
            await runner.cleanup()


@web.middleware
async def _told(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Answer what went wrong in JSON, and count it."""
    try:
        return await handler(request)
    except web.HTTPException as error:
        if error.status == web.HTTPRequestEntityTooLarge.status_code:
            return _refuse(error.status, f"expected at most {BODY_BYTES_MAX} bytes", Reason.LIMIT_REACHED)
        return _refuse(error.status, error.reason.lower(), Reason.MALFORMED)
    except Refused as error:
        return _refuse(_STATUS.get(error.reason, 400), error.detail, error.reason)
    except (BadName, ConfigError, ProtocolError) as error:
        return _refuse(400, str(error), Reason.MALFORMED)
    except NotFromHere as error:
        return _refuse(409, str(error), None)
    except StateError as error:
        return _refuse(507, str(error), None)


class _Api:
    def __init__(self, discovery: Discovery, pushes: Pushes) -> None:
        self._discovery = discovery
        self._pushes = pushes

    async def every(self, _request: web.Request) -> web.Response:
        return _json({"services": self._discovery.shown()})

    async def one(self, request: web.Request) -> web.Response:
        return _json(self._discovery.shown_one(_name(request)))

    async def put(self, request: web.Request) -> web.Response:
        service = _name(request)
        await self._discovery.put(service, _routes(service, await request.read()))
        return _json(self._discovery.shown_one(service))

    async def delete(self, request: web.Request) -> web.Response:
        service = _name(request)
        await self._discovery.remove(service)
        return _json({"removed": service})

    async def check(self, request: web.Request) -> web.Response:
        service = _name(request)
        word = from_json(await request.read(), _Word)
        self._discovery.require_ttl(service)
        self._pushes.push(service, word.status, word.output)
        return _json({"service": service, "status": word.status})


def _name(request: web.Request) -> ServiceName:
    return ServiceName(request.match_info["name"])


def _routes(service: ServiceName, body: bytes) -> tuple[RouteConfig, ...]:
    """Return the routes of a PUT. Raises ProtocolError or ConfigError naming the key."""
    raw = from_json(body, dict[str, Any])
    routes = raw.get("routes")
    if not isinstance(routes, list) or not routes:
        raise ConfigError("routes: expected a list of at least one route")
    for number, route in enumerate(routes):
        if isinstance(route, dict) and route.setdefault("service", str(service)) != service:
            raise ConfigError(f"routes[{number}].service: expected {service}, got {route['service']!r}")
    return sections.build(RoutesFile, raw).routes


def _refuse(status: int, text: str, reason: Reason | None) -> web.Response:
    if reason is not None:
        refused(_WHERE, reason)
    return _json({"error": text, "reason": reason}, status)


def _json(value: object, status: int = 200) -> web.Response:
    body = msgspec.json.format(msgspec.json.encode(value, enc_hook=encode_hook), indent=2)
    return web.Response(body=body + b"\n", status=status, content_type="application/json")
