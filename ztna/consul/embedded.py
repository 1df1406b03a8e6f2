"""The embedded Consul: one HTTP server with the part of Consul's API that this mesh uses, for development.

One node, no ACLs, no TLS, nothing replicated, no checks but TTL: it is not for production and says so in its
first line and in a header of every answer. The contract suite holds it to what real Consuls answer.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import signal
import sys
import time
import uuid
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import click
import msgspec
from aiohttp import web

from ztna.config import Endpoint
from ztna.consul.catalog_json import CatalogJson
from ztna.consul.durations import duration_s
from ztna.consul.registry import Registry
from ztna.consul.store import Json, Refusal, Store, TxnFailed
from ztna.errors import ConfigError

BLOCKING_SECONDS_DEFAULT = 300.0
BLOCKING_SECONDS_MAX = 600.0
BODY_BYTES_MAX = 8 * 1024 * 1024
REAP_INTERVAL_SECONDS = 30.0
TICK_SECONDS = 0.2
"""How late a TTL may end. Consul's own timers are no more exact than that under load."""
BANNER = {"X-Ztna-Embedded-Consul": "development server, not for production"}

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class _State(msgspec.Struct):
    """What is kept in the data file."""

    store: Store
    registry: Registry
    node_id: str


class EmbeddedConsul:
    """A running server. `address` is its base URL."""

    def __init__(self, host: str, port: int, data: Path | None) -> None:
        self._host, self._port = host, port
        self._data = data
        state = _load(data)
        self._store, self._registry = state.store, state.registry
        self._node_id = state.node_id
        now = time.monotonic()
        self._store.restart_timers(now)
        self._registry.restart_timers(now)
        self._changed = asyncio.Event()
        self._runner: web.AppRunner | None = None
        self._timers: asyncio.Task[None] | None = None
        self._catalog = CatalogJson(self._registry, state.node_id)

    @classmethod
    async def start(cls, host: str = "127.0.0.1", port: int = 0, data: Path | None = None) -> EmbeddedConsul:
        """Start one; port 0 takes any free port. `data` is a file that keeps the state between runs."""
        server = cls(host, port, data)
        app = web.Application(middlewares=[_refusals], client_max_size=BODY_BYTES_MAX)
        app.add_routes(server._routes())
        server._runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
        await server._runner.setup()
        try:
            await web.TCPSite(server._runner, host, port).start()
        except OSError as error:
            await server._runner.cleanup()
            raise ConfigError(f"cannot listen on {host}:{port}: {error.strerror}") from error
        server._port = server._runner.addresses[0][1]
        server._timers = asyncio.create_task(server._run_timers(), name="embedded-consul-timers")
        return server

    @property
    def address(self) -> str:
        """The base URL, e.g. `http://127.0.0.1:8500`."""
        return f"http://{Endpoint(self._host, self._port)}"

    async def stop(self) -> None:
        """Stop serving and, with a data file, keep the state."""
        if self._timers is not None:
            self._timers.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._timers
        if self._runner is not None:
            await self._runner.cleanup()
        if self._data is not None:
            kept = msgspec.json.encode(_State(self._store, self._registry, self._node_id))
            self._data.write_bytes(kept)

    async def _run_timers(self) -> None:
        reap_at = time.monotonic() + REAP_INTERVAL_SECONDS
        while True:
            await asyncio.sleep(TICK_SECONDS)
            now, index = time.monotonic(), self._store.clock.index
            self._store.expire(now)
            self._registry.expire(now)
            if now >= reap_at:
                self._registry.reap(now)
                reap_at = now + REAP_INTERVAL_SECONDS
            if self._store.clock.index != index:
                self._wake()

    def _wake(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    def _routes(self) -> list[web.RouteDef]:
        get, put = web.get, web.put
        return [
            get("/v1/status/leader", self._plain(lambda _: f"{self._host}:{self._port}")),
            get("/v1/status/peers", self._plain(lambda _: [f"{self._host}:{self._port}"])),
            get("/v1/catalog/datacenters", self._plain(lambda _: ["dc1"])),
            get("/v1/agent/self", self._plain(lambda _: self._catalog.agent_self(self._host, self._port))),
            get("/v1/agent/members", self._plain(lambda _: [self._catalog.member(self._host, self._port)])),
            get("/v1/agent/services", self._plain(lambda _: self._catalog.agent_services())),
            get("/v1/agent/checks", self._plain(lambda _: self._catalog.agent_checks())),
            get("/v1/catalog/services", self._blocking(self._catalog.services)),
            get("/v1/catalog/service/{name}", self._blocking(self._catalog.service)),
            get("/v1/catalog/nodes", self._blocking(self._catalog.nodes)),
            get("/v1/catalog/node/{node}", self._blocking(self._catalog.node)),
            get("/v1/health/service/{name}", self._blocking(self._catalog.health_service)),
            get("/v1/health/checks/{name}", self._blocking(self._catalog.health_checks)),
            get("/v1/health/node/{node}", self._blocking(self._catalog.health_node)),
            get("/v1/health/state/{state}", self._blocking(self._catalog.health_state)),
            get("/v1/session/list", self._blocking(self._session_list)),
            get("/v1/session/info/{id}", self._blocking(self._session_info)),
            put("/v1/session/create", self._create_session),
            put("/v1/session/renew/{id}", self._renew_session),
            put("/v1/session/destroy/{id}", self._destroy_session),
            put("/v1/agent/service/register", self._register),
            put("/v1/agent/service/deregister/{id}", self._deregister),
            put("/v1/agent/service/maintenance/{id}", self._maintain),
            put("/v1/agent/check/update/{id}", self._update_check),
            put("/v1/agent/check/{verdict:pass|warn|fail}/{id}", self._judge_check),
            put("/v1/txn", self._txn),
            web.post("/v1/internal/acl/authorize", _acls_are_off),
            get("/v1/kv/{key:.*}", self._kv_get),
            put("/v1/kv/{key:.*}", self._kv_put),
            web.delete("/v1/kv/{key:.*}", self._kv_delete),
        ]

    # Reading

    def _plain(self, build: Callable[[web.Request], object]) -> Handler:
        async def handle(request: web.Request) -> web.Response:
            return _json(build(request))

        return handle

    def _blocking(self, view: Callable[[web.Request], tuple[int, Callable[[], object]]]) -> Handler:
        """Serve a view, a function that gives an index and what to answer, as a blocking query."""

        async def handle(request: web.Request) -> web.Response:
            index, build = await self._wait(request, lambda: view(request))
            return _json(build(), index=index)

        return handle

    async def _wait(
        self, request: web.Request, look: Callable[[], tuple[int, Callable[[], object]]]
    ) -> tuple[int, Callable[[], object]]:
        """Look until the index is above the one that was asked for, or the wait is over."""
        _known_datacenter(request)
        asked, wait_s = _blocking_query(request)
        loop = asyncio.get_running_loop()
        end = loop.time() + wait_s + random.uniform(0, wait_s / 16)
        while True:
            changed = self._changed
            index, build = look()
            if not asked or index > asked:
                return index, build
            try:
                async with asyncio.timeout_at(end):
                    await changed.wait()
            except TimeoutError:
                return look()

    def _session_list(self, request: web.Request) -> tuple[int, Callable[[], object]]:
        sessions = self._store.sessions
        return max(self._store.sessions_index, 1), lambda: [each.json() for each in sessions.values()]

    def _session_info(self, request: web.Request) -> tuple[int, Callable[[], object]]:
        found = self._store.sessions.get(request.match_info["id"])
        return max(self._store.sessions_index, 1), lambda: [] if found is None else [found.json()]

    async def _kv_get(self, request: web.Request) -> web.Response:
        key, query = request.match_info["key"], request.query
        if "recurse" in query or "keys" in query:
            index, entries = await self._wait(
                request, lambda: (self._store.prefix_index(key), lambda: self._store.under(key))
            )
        else:
            if not key:
                raise Refusal(400, "Missing key name")
            index, entries = await self._wait(
                request, lambda: (self._store.key_index(key), lambda: self._one(key))
            )
        found: Any = entries()
        if not found:
            return web.Response(status=404, headers=_headers(index))
        if "keys" in query:
            return _json(_keys([each.key for each in found], key, query.get("separator", "")), index=index)
        if "raw" in query:
            return web.Response(
                body=found[0].value, content_type="application/octet-stream", headers=_headers(index)
            )
        return _json([each.json() for each in found], index=index)

    def _one(self, key: str) -> list[Any]:
        entry = self._store.entries.get(key)
        return [] if entry is None else [entry]

    # Writing

    async def _kv_put(self, request: web.Request) -> web.Response:
        key, query = request.match_info["key"], request.query
        if not key:
            raise Refusal(400, "Missing key name")
        if len({"cas", "acquire", "release"} & query.keys()) > 1:
            raise Refusal(400, "Conflicting flags: " + request.query_string)
        value, flags = await request.read(), _number(query.get("flags", "0"))
        if "acquire" in query:
            done = self._store.acquire(key, value, flags, query["acquire"], time.monotonic())
        elif "release" in query:
            done = self._store.release(key, value, flags, query["release"])
        else:
            done = self._store.put(key, value, flags, _number(query["cas"]) if "cas" in query else None)
        return self._written(done)

    async def _kv_delete(self, request: web.Request) -> web.Response:
        key, query = request.match_info["key"], request.query
        if "recurse" in query:
            if "cas" in query:
                raise Refusal(400, "Conflicting flags: " + request.query_string)
            self._store.delete_under(key)
            return self._written(True)
        if not key:
            raise Refusal(400, "Missing key name")
        return self._written(self._store.delete(key, _number(query["cas"]) if "cas" in query else None))

    async def _txn(self, request: web.Request) -> web.Response:
        try:
            operations = msgspec.json.decode(await request.read(), type=list[_Operation])
        except msgspec.DecodeError as error:
            raise Refusal(400, f"Failed to parse body: {error}") from error
        try:
            results = self._store.transact(
                [operation.kv.as_json() for operation in operations], time.monotonic()
            )
        except TxnFailed as failed:
            return _json({"Results": None, "Errors": failed.errors}, status=409)
        self._wake()
        return _json({"Results": results, "Errors": None})

    async def _create_session(self, request: web.Request) -> web.Response:
        sent = await _body(request)
        made = self._store.create_session(str(uuid.uuid4()), sent, self._catalog.name, time.monotonic())
        self._wake()
        return _json({"ID": made})

    async def _renew_session(self, request: web.Request) -> web.Response:
        session = self._store.renew_session(request.match_info["id"], time.monotonic())
        return _json([session.json()])

    async def _destroy_session(self, request: web.Request) -> web.Response:
        self._store.end_session(request.match_info["id"], time.monotonic())
        return self._written(True)

    async def _register(self, request: web.Request) -> web.Response:
        replace = request.query.get("replace-existing-checks", "") in ("true", "1")
        self._registry.register(await _body(request), time.monotonic(), replace_checks=replace)
        return self._done()

    async def _deregister(self, request: web.Request) -> web.Response:
        self._registry.deregister(request.match_info["id"])
        return self._done()

    async def _maintain(self, request: web.Request) -> web.Response:
        enable = request.query.get("enable", "")
        if enable not in ("true", "false"):
            raise Refusal(400, "Invalid value for enable: expected true or false")
        reason = request.query.get("reason", "")
        self._registry.maintain(request.match_info["id"], enable == "true", reason, time.monotonic())
        return self._done()

    async def _update_check(self, request: web.Request) -> web.Response:
        sent = {key.lower(): value for key, value in (await _body(request)).items()}
        self._registry.report(
            request.match_info["id"], sent.get("status", ""), sent.get("output", ""), time.monotonic()
        )
        return self._done()

    async def _judge_check(self, request: web.Request) -> web.Response:
        status = {"pass": "passing", "warn": "warning", "fail": "critical"}[request.match_info["verdict"]]
        note = request.query.get("note", "")
        self._registry.report(request.match_info["id"], status, note, time.monotonic())
        return self._done()

    def _written(self, done: bool) -> web.Response:
        self._wake()
        return _json(done)

    def _done(self) -> web.Response:
        self._wake()
        return web.Response(headers=BANNER)


class _KvOperation(msgspec.Struct, rename="pascal", frozen=True):
    verb: str
    key: str = ""
    value: bytes | None = None
    flags: int = 0
    index: int = 0
    session: str = ""

    def as_json(self) -> Json:
        return {
            "Verb": self.verb,
            "Key": self.key,
            "Value": self.value or b"",
            "Flags": self.flags,
            "Index": self.index,
            "Session": self.session,
        }


class _Operation(msgspec.Struct, frozen=True):
    kv: _KvOperation = msgspec.field(name="KV")


@web.middleware
async def _refusals(request: web.Request, handler: Handler) -> web.StreamResponse:
    try:
        return await handler(request)
    except Refusal as refusal:
        return web.Response(status=refusal.status, text=refusal.text, headers=BANNER)
    except web.HTTPNotFound:
        text = "Invalid URL path: not a recognized HTTP API endpoint"
        return web.Response(status=404, text=text, headers=BANNER)
    except web.HTTPMethodNotAllowed as error:
        allow = ",".join(
            ["OPTIONS", *(each for each in ("GET", "PUT", "DELETE") if each in error.allowed_methods)]
        )
        text = f"method {request.method} not allowed"
        return web.Response(status=405, text=text, headers={**BANNER, "Allow": allow})


def _headers(index: int) -> dict[str, str]:
    return {
        **BANNER,
        "X-Consul-Index": str(index),
        "X-Consul-KnownLeader": "true",
        "X-Consul-LastContact": "0",
    }


def _json(value: object, *, status: int = 200, index: int | None = None) -> web.Response:
    return web.Response(
        status=status,
        body=msgspec.json.encode(value),
        content_type="application/json",
        headers=BANNER if index is None else _headers(index),
    )


async def _body(request: web.Request) -> Json:
    """Read a JSON object; an empty body is an empty one."""
    raw = await request.read()
    try:
        sent = json.loads(raw) if raw else {}
    except ValueError as error:
        raise Refusal(400, f"Request decode failed: {error}") from error
    if not isinstance(sent, dict):
        raise Refusal(400, "Request decode failed: expected a JSON object")
    return sent


def _blocking_query(request: web.Request) -> tuple[int, float]:
    try:
        asked = int(request.query.get("index", "0"))
    except ValueError as error:
        raise Refusal(400, "Invalid index") from error
    try:
        wait_s = duration_s(request.query.get("wait", f"{BLOCKING_SECONDS_DEFAULT:g}s"))
    except ValueError as error:
        raise Refusal(400, "Invalid wait time") from error
    return asked, min(wait_s, BLOCKING_SECONDS_MAX)


async def _acls_are_off(request: web.Request) -> web.Response:
    return web.Response(status=401, text="ACL support disabled")


def _known_datacenter(request: web.Request) -> None:
    if request.query.get("dc", "dc1") != "dc1":
        raise Refusal(500, "No path to datacenter")


def _number(text: str) -> int:
    try:
        return int(text)
    except ValueError as error:
        raise Refusal(500, f'strconv.ParseUint: parsing "{text}": invalid syntax') from error


def _keys(keys: list[str], prefix: str, separator: str) -> list[str]:
    """List keys; with a separator, only up to its first place after the prefix, each once."""
    if not separator:
        return keys
    cut = (
        key if (at := key.find(separator, len(prefix))) < 0 else key[: at + len(separator)] for key in keys
    )
    return list(dict.fromkeys(cut))


def _load(data: Path | None) -> _State:
    if data is None or not data.exists():
        store = Store()
        return _State(store, Registry(store.clock), str(uuid.uuid4()))
    try:
        state = msgspec.json.decode(data.read_bytes(), type=_State)
    except (OSError, msgspec.DecodeError) as error:
        raise ConfigError(f"the embedded Consul's data file {data} cannot be used: {error}") from error
    state.registry.clock = state.store.clock
    return state


async def _serve(host: str, port: int, data: Path | None) -> None:
    stopping = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stopping.set)
    server = await EmbeddedConsul.start(host, port, data)
    print(server.address, flush=True)
    print(
        "Embedded Consul for development: one node, no ACLs, no TLS, nothing replicated. Not for production.",
        file=sys.stderr,
        flush=True,
    )
    await stopping.wait()
    await server.stop()


@click.command()
@click.option("--listen", default="127.0.0.1:8500", show_default=True, help="host:port; port 0 takes any.")
@click.option("--data", type=click.Path(path_type=Path), help="A file that keeps the state between runs.")
def main(listen: str, data: Path | None) -> None:
    """Run the embedded Consul, a development server, and print its address."""
    host, _, port = listen.rpartition(":")
    if not host or not port.isdigit():
        raise click.UsageError(f"--listen: expected host:port, got {listen!r}")
    try:
        asyncio.run(_serve(host, int(port), data))
    except ConfigError as error:
        raise click.ClickException(str(error)) from error


if __name__ == "__main__":
    main()
