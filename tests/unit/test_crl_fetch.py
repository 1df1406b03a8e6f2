"""Fetching a CRL: http and files, bounded in size and time; whatever goes wrong is one error."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from aiohttp import web

from ztna import crl_fetch
from ztna.crl_fetch import check_url, fetch
from ztna.errors import ConfigError, CrlUnavailable


@pytest.fixture
async def server() -> AsyncIterator[str]:
    async def good(request: web.Request) -> web.Response:
        return web.Response(body=b"a list")

    async def tagged(request: web.Request) -> web.Response:
        headers = {"ETag": '"v7"', "Cache-Control": "max-age=90"}
        if request.headers.get("If-None-Match") == '"v7"':
            return web.Response(status=304, headers=headers)
        return web.Response(body=b"version 7", headers=headers)

    async def dated(request: web.Request) -> web.Response:
        headers = {"Last-Modified": "Thu, 01 Jan 2026 12:00:00 GMT"}
        if request.headers.get("If-Modified-Since") == headers["Last-Modified"]:
            return web.Response(status=304)
        return web.Response(body=b"of noon", headers=headers)

    async def changed(request: web.Request) -> web.Response:
        return web.Response(status=304)

    async def empty(request: web.Request) -> web.Response:
        return web.Response()

    async def large(request: web.Request) -> web.Response:
        return web.Response(body=b"x" * 5_000)

    async def silent(request: web.Request) -> web.Response:
        await asyncio.sleep(60)
        return web.Response()

    async def around(request: web.Request) -> web.Response:
        raise web.HTTPFound("/around")

    app = web.Application()
    handlers = {"/tagged": tagged, "/dated": dated, "/changed": changed}
    handlers |= {"/crl": good, "/empty": empty, "/large": large, "/silent": silent, "/around": around}
    for path, handler in handlers.items():
        app.router.add_get(path, handler)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    await runner.cleanup()


async def test_http_and_files_are_fetched(server: str, tmp_path: Path) -> None:
    assert (await fetch(f"{server}/crl")).data == b"a list"
    (tmp_path / "a list.crl").write_bytes(b"of a file")
    assert (await fetch(f"file://{tmp_path}/a%20list.crl")).data == b"of a file"


@pytest.mark.parametrize(("path", "data"), [("/tagged", b"version 7"), ("/dated", b"of noon")])
async def test_what_is_known_is_not_fetched_again(server: str, path: str, data: bytes) -> None:
    first = await fetch(server + path)
    assert first.data == data
    second = await fetch(server + path, first)
    assert second.data is None and (second.etag, second.modified) == (first.etag, first.modified)
    assert second.good_s == first.good_s == (90.0 if path == "/tagged" else None)
    assert (await fetch(server + path, second)).data is None


async def test_nothing_changed_is_no_answer_to_who_knows_nothing(server: str) -> None:
    with pytest.raises(CrlUnavailable, match="status 304"):
        await fetch(f"{server}/changed")


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("/none", "status 404"),
        ("/empty", "nothing in it"),
        ("/large", "more than"),
        ("/silent", "no answer"),
        ("/around", "around"),
    ],
)
async def test_what_is_no_answer_is_one_error(
    server: str, path: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(crl_fetch, "CRL_BYTES_MAX", 1_000)
    monkeypatch.setattr(crl_fetch, "FETCH_SECONDS", 0.5 if path == "/silent" else 30.0)
    with pytest.raises(CrlUnavailable, match=said):
        await fetch(server + path)


async def test_files_that_are_missing_or_too_large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(CrlUnavailable, match="No such file"):
        await fetch(f"file://{tmp_path}/none")
    monkeypatch.setattr(crl_fetch, "CRL_BYTES_MAX", 3)
    (tmp_path / "large").write_bytes(b"four")
    with pytest.raises(CrlUnavailable, match="more than 3"):
        await fetch(f"file://{tmp_path}/large")


async def test_nobody_there() -> None:
    with pytest.raises(CrlUnavailable, match=r"127\.0\.0\.1:9"):
        await fetch("http://127.0.0.1:9/crl")


@pytest.mark.parametrize("url", ["ldap://x/crl", "http://", "file://", "/etc/crl.pem", ""])
def test_other_urls_are_refused(url: str) -> None:
    with pytest.raises(ConfigError, match="crl_url"):
        check_url(url)


@pytest.mark.parametrize("url", ["http://x/crl", "https://x", "file:///etc/crl.pem"])
def test_urls_that_can_be_fetched(url: str) -> None:
    check_url(url)
