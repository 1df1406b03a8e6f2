"""The transport: deadlines, what is sent twice, tokens, TLS with a client certificate, error answers."""

from __future__ import annotations

import asyncio
import contextlib
import re
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec
import pytest
from aiohttp import web

from tests.support.consul_tls import ConsulPki
from ztna import telemetry
from ztna.config import ConsulConfig
from ztna.consul import transport
from ztna.consul.client import ConsulClient
from ztna.consul.transport import base_url, blocking_wait_s
from ztna.errors import ConfigError, ConsulError, ConsulForbidden, ConsulRejected, ConsulUnavailable

Answer = Callable[[web.Request], Awaitable[web.StreamResponse]]


@asynccontextmanager
async def server(answer: Answer, tls: ssl.SSLContext | None = None) -> AsyncIterator[str]:
    async def handle(request: web.Request) -> web.StreamResponse:
        return await answer(request)

    app = web.Application()
    app.router.add_route("*", "/{path:.*}", handle)
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0, ssl_context=tls).start()
    try:
        yield f"{'https' if tls else 'http'}://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()


@asynccontextmanager
async def talking_to(answer: Answer, timeout_s: float = 10.0) -> AsyncIterator[ConsulClient]:
    async with (
        server(answer) as address,
        ConsulClient(ConsulConfig(address=address, timeout_s=timeout_s)) as client,
    ):
        yield client


class Counting:
    """Answers what it is given, one after the other, the last one for ever; counts what came."""

    def __init__(self, *answers: tuple[int, str]) -> None:
        self._answers = list(answers)
        self.asked: list[tuple[str, str]] = []

    async def __call__(self, request: web.Request) -> web.StreamResponse:
        self.asked.append((request.method, request.path))
        status, text = self._answers.pop(0) if len(self._answers) > 1 else self._answers[0]
        return web.Response(status=status, text=text, headers={"X-Consul-Index": "7"})


async def test_reads_are_repeated_after_a_5xx() -> None:
    answer = Counting((500, "No cluster leader"), (429, "slow down"), (200, "[]"))
    async with talking_to(answer) as client:
        assert await client.kv_list("x") == ()
    assert len(answer.asked) == 3


async def test_every_try_is_counted_by_what_became_of_it() -> None:
    def counts() -> tuple[float, ...]:
        value, requests = telemetry.REGISTRY.get_sample_value, "ztna_consul_requests_total"
        told = [
            value(requests, {"outcome": outcome}) or 0.0 for outcome in ("answered", "rejected", "failed")
        ]
        return (*told, value("ztna_consul_request_seconds_count") or 0.0)

    async def counted(*answers: tuple[int, str]) -> tuple[float, ...]:
        before = counts()
        async with talking_to(Counting(*answers)) as client:
            with contextlib.suppress(ConsulError):
                await client.kv_list("x")
        return tuple(now - then for now, then in zip(counts(), before, strict=True))

    assert await counted((500, "No cluster leader"), (200, "[]")) == (1, 0, 1, 1)
    assert await counted((404, "")) == (1, 0, 0, 1), "nothing there is an answer"
    assert await counted((409, "{}")) == (1, 0, 0, 1), "somebody else wrote first"
    assert await counted((403, "Permission denied")) == (0, 1, 0, 1)
    assert await counted((500, 'invalid session "x"')) == (0, 1, 0, 0)


async def test_reads_are_not_repeated_for_ever() -> None:
    answer = Counting((500, "No cluster leader"))
    async with talking_to(answer) as client:
        with pytest.raises(ConsulUnavailable, match="500: No cluster leader"):
            await client.kv_get("x")
    assert len(answer.asked) == transport.RETRY_ATTEMPTS


async def test_what_may_not_happen_twice_is_sent_once() -> None:
    answer = Counting((500, "rpc error: leadership lost"))
    async with talking_to(answer) as client:
        for call in (
            client.kv_put("a", b"", cas=0),
            client.kv_delete("b"),
            client.txn([]),
            client.session_create("c", ttl_s=10),
        ):
            with pytest.raises(ConsulUnavailable):
                await call
    assert [path for _, path in answer.asked] == ["/v1/kv/a", "/v1/kv/b", "/v1/txn", "/v1/session/create"]


async def test_repeatable_writes_are_repeated() -> None:
    answer = Counting((500, "No cluster leader"), (200, "true"))
    async with talking_to(answer) as client:
        assert await client.update_check("c", "passing")
    assert len(answer.asked) == 2


async def test_a_write_on_a_kept_connection_that_breaks_is_not_sent_again() -> None:
    """aiohttp alone would: it takes every PUT for idempotent."""
    puts = 0

    async def answer(request: web.Request) -> web.StreamResponse:
        nonlocal puts
        if request.method == "GET":
            return web.Response(text="[]", headers={"X-Consul-Index": "7"})
        puts += 1
        assert request.transport is not None
        request.transport.abort()
        return web.Response(text="true")

    async with talking_to(answer) as client:
        await client.kv_list("x")
        with pytest.raises(ConsulUnavailable):
            await client.kv_put("x", b"", cas=0)
    assert puts == 1


async def test_a_request_that_is_our_fault_is_rejected_and_not_repeated() -> None:
    answer = Counting((500, 'invalid session "x"'))
    async with talking_to(answer) as client:
        with pytest.raises(ConsulRejected, match="invalid session"):
            await client.kv_put("x", b"", acquire="x")
        with pytest.raises(ConsulRejected, match="invalid session"):
            await client.kv_get("x")
    assert len(answer.asked) == 2


async def test_the_deadline_covers_all_attempts() -> None:
    asked = asyncio.Event()

    async def answer(request: web.Request) -> web.StreamResponse:
        asked.set()
        await asyncio.Event().wait()
        raise AssertionError

    async with talking_to(answer, timeout_s=0.2) as client:
        with pytest.raises(ConsulUnavailable, match=r"GET /v1/kv/x: no answer within 0\.2 s"):
            await client.kv_get("x")
    assert asked.is_set()


async def test_nothing_listens() -> None:
    async with ConsulClient(ConsulConfig(address="http://127.0.0.1:1")) as client:
        with pytest.raises(
            ConsulUnavailable, match=r"at http://127\.0\.0\.1:1: cannot connect: Connection refused$"
        ):
            await client.leader()


async def test_a_server_without_tls_is_told_in_words() -> None:
    async with server(Counting((200, "[]"))) as address:
        config = ConsulConfig(address=address.replace("http:", "https:"))
        async with ConsulClient(config) as client:
            with pytest.raises(ConsulUnavailable, match=r"cannot connect: (?!.*SSLContext).*SSL"):
                await client.kv_get("x")


async def test_who_speaks_no_http_is_told_as_that() -> None:
    async def greet(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"SSH-2.0-other\r\n")
        writer.close()

    listening = await asyncio.start_server(greet, "127.0.0.1", 0)
    async with listening:
        port = listening.sockets[0].getsockname()[1]
        async with ConsulClient(ConsulConfig(address=f"http://127.0.0.1:{port}")) as client:
            with pytest.raises(ConsulUnavailable, match=f"at http://127.0.0.1:{port}: .*speaks no HTTP$"):
                await client.kv_get("x")


async def test_another_web_server_is_no_consul_that_has_nothing() -> None:
    """Its 404 would look like a table without leases."""

    async def nothing(_request: web.Request) -> web.Response:
        return web.Response(status=404, text="<h1>no such page</h1>")

    async with talking_to(nothing) as client:
        with pytest.raises(ConsulUnavailable, match=r"is no Consul: 404 at /v1/kv/x$"):
            await client.kv_list("x")
        for ask in (client.kv_get("x"), client.leader()):
            with pytest.raises(ConsulUnavailable, match="is no Consul"):
                await ask
    async with talking_to(Counting((404, ""))) as client:
        assert await client.kv_list("x") == () and await client.kv_get("x") is None


async def test_an_error_page_is_told_in_one_short_line() -> None:
    async with talking_to(Counting((502, "<html>\n  <p>Bad\ngateway</p>\n" + "x" * 5000))) as client:
        with pytest.raises(ConsulUnavailable) as told:
            await client.kv_get("x")
    assert str(told.value).startswith("Consul answered 502: <html> <p>Bad gateway</p> xx")
    assert len(str(told.value)) < 400


async def test_a_client_that_is_closed_says_so() -> None:
    client = ConsulClient(ConsulConfig())
    with pytest.raises(ConsulUnavailable, match="closed"):
        await client.kv_put("x", b"")


async def test_an_endless_answer_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transport, "RESPONSE_BYTES_MAX", 1000)
    async with talking_to(Counting((200, "x" * 5000))) as client:
        with pytest.raises(ConsulRejected, match="larger than 1000 bytes"):
            await client.kv_get("x")


@pytest.mark.parametrize("text", ["", "no json", '{"not": "a list"}'])
async def test_an_answer_of_another_shape(text: str) -> None:
    async with talking_to(Counting((200, text))) as client:
        with pytest.raises(ConsulUnavailable, match="unknown shape"):
            await client.service_instances("x")


async def test_other_refusals_keep_consuls_words() -> None:
    async with talking_to(Counting((400, "Bad thing"))) as client:
        with pytest.raises(ConsulRejected, match="Bad thing"):
            await client.services()
        with pytest.raises(ConsulRejected, match="Bad thing"):
            await client.kv_get("x")
    async with talking_to(Counting((403, "Permission denied"))) as client:
        with pytest.raises(ConsulForbidden, match=re.escape('service "web" { policy = "read" }')):
            await client.service_instances("web")
        with pytest.raises(ConsulForbidden, match=re.escape('key_prefix "a/" { policy = "read" }')):
            await client.read("/v1/kv/a/")
        with pytest.raises(ConsulForbidden, match=re.escape('node_prefix "" { policy = "read" }')):
            await client.services()
    async with talking_to(Counting((401, "ACL support disabled"))) as client:
        with pytest.raises(ConsulRejected, match="ACLs disabled"):
            await client.kv_get("x")


async def test_environment_of_consul_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """python-consul2 lets CONSUL_HTTP_* beat explicit arguments."""
    monkeypatch.setenv("CONSUL_HTTP_ADDR", "http://127.0.0.1:1")
    monkeypatch.setenv("CONSUL_HTTP_TOKEN", "from the environment")
    tokens: list[str | None] = []

    async def answer(request: web.Request) -> web.StreamResponse:
        tokens.append(request.headers.get("X-Consul-Token"))
        return web.Response(text='"leader"')

    async with talking_to(answer) as client:
        assert await client.leader() == "leader"
        async with ConsulClient(ConsulConfig(address=client.address, token="ours")) as other:
            assert await other.leader() == "leader"
    assert tokens == [None, "ours"]


async def test_the_datacenter_is_asked_for() -> None:
    seen: list[str | None] = []

    async def answer(request: web.Request) -> web.StreamResponse:
        seen.append(request.query.get("dc"))
        return web.Response(text="{}", headers={"X-Consul-Index": "1"})

    async with (
        server(answer) as address,
        ConsulClient(ConsulConfig(address=address, datacenter="dc7")) as client,
    ):
        assert await client.services() == ()
    assert seen == ["dc7"]


UNKNOWN_TOKEN = (403, "ACL not found")


async def test_a_token_that_consul_does_not_know_is_said_until_it_does(tmp_path: Path) -> None:
    file = tmp_path / "token"
    file.write_text("one")
    said: list[str | None] = []
    answer = Counting(
        UNKNOWN_TOKEN, (403, "ACL not found: gone"), (200, "[]"), (200, '"leader"'), (200, "[]")
    )
    async with (
        server(answer) as address,
        ConsulClient(ConsulConfig(address=address, token_file=str(file)), said.append) as client,
    ):
        for _ in range(2):
            with pytest.raises(ConsulForbidden, match="does not know the ACL token"):
                await client.kv_put("x", b"")
        (problem,) = said
        assert problem is not None and f"write a valid one to {file}" in problem
        assert await client.kv_list("x") == ()
        assert said == [problem, None]


async def test_consul_that_lets_anybody_ask_says_nothing_of_the_token() -> None:
    said: list[str | None] = []
    answer = Counting(UNKNOWN_TOKEN, (200, '"leader"'))
    config = ConsulConfig(token="one")
    async with (
        server(answer) as address,
        ConsulClient(msgspec.structs.replace(config, address=address), said.append) as client,
    ):
        with pytest.raises(ConsulForbidden):
            await client.kv_put("x", b"")
        assert await client.leader() == "leader"
    assert len(said) == 1 and said[0] is not None and "restart" in said[0]


async def test_what_consul_refused_for_its_token_is_sent_again_by_the_new_one(tmp_path: Path) -> None:
    """Consul did nothing, so that a write too may be sent again."""
    file = tmp_path / "token"
    file.write_text("old")
    seen: list[str | None] = []

    async def answer(request: web.Request) -> web.StreamResponse:
        seen.append(request.headers.get("X-Consul-Token"))
        if seen[-1] == "new":
            return web.Response(text="true")
        file.write_text("new")
        return web.Response(status=403, text="ACL not found")

    said: list[str | None] = []
    async with (
        server(answer) as address,
        ConsulClient(ConsulConfig(address=address, token_file=str(file)), said.append) as client,
    ):
        before = client.token_generation
        assert await client.kv_put("x", b"")
        assert client.token_generation == before + 1
    assert seen == ["old", "new"]
    assert said == []


async def test_an_answer_from_before_takes_no_word_on_the_token_back() -> None:
    """A query that was let in by a token that is revoked meanwhile."""
    held, go = asyncio.Event(), asyncio.Event()

    async def answer(request: web.Request) -> web.StreamResponse:
        if request.query.get("index"):
            held.set()
            await go.wait()
            return web.Response(text="[]", headers={"X-Consul-Index": "8"})
        return web.Response(status=403, text="ACL not found")

    said: list[str | None] = []
    async with (
        server(answer) as address,
        ConsulClient(ConsulConfig(address=address, token="t"), said.append) as client,
    ):
        blocking = asyncio.create_task(client.read("/v1/kv/x", index=7, wait_s=10))
        await held.wait()
        with pytest.raises(ConsulForbidden):
            await client.kv_get("x")
        go.set()
        await blocking
    assert len(said) == 1


@pytest.mark.parametrize(
    ("address", "url"),
    [
        ("127.0.0.1:8500", "http://127.0.0.1:8500"),
        ("http://consul", "http://consul:8500"),
        ("https://consul:8501/", "https://consul:8501"),
        ("http://[::1]:8500", "http://[::1]:8500"),
    ],
)
def test_addresses(address: str, url: str) -> None:
    assert base_url(address) == url


@pytest.mark.parametrize("address", ["ftp://consul", "http://", "http://consul:x", "http://consul/ui"])
def test_addresses_that_are_none(address: str) -> None:
    with pytest.raises(ConfigError, match=r"consul\.address: expected http://host:port"):
        base_url(address)


def test_how_long_a_query_blocks() -> None:
    assert blocking_wait_s(None) == 0
    assert blocking_wait_s([("wait", "10s")]) == 0
    assert blocking_wait_s([("index", "5"), ("wait", "10s")]) == 10
    assert blocking_wait_s({"index": 5}) == 300


# TLS


def mutual(pki: ConsulPki) -> ssl.SSLContext:
    """Return the context of a server that wants a certificate of its clients."""
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=pki.ca)
    context.verify_mode = ssl.CERT_REQUIRED
    context.load_cert_chain(*pki.issue("server"))
    return context


async def test_tls_with_a_ca_and_a_client_certificate(tmp_path: Path) -> None:
    pki = ConsulPki(tmp_path)
    context = mutual(pki)
    certificate, key = pki.issue("client")
    names: list[object] = []

    async def answer(request: web.Request) -> web.StreamResponse:
        assert request.transport is not None
        names.append(request.transport.get_extra_info("peercert")["subject"])
        return web.Response(text='"leader"')

    async with server(answer, context) as address:
        good = ConsulConfig(address=address, ca=pki.ca, certificate=certificate, key=key)
        async with ConsulClient(good) as client:
            assert await client.leader() == "leader"
        async with ConsulClient(ConsulConfig(address=address, ca=pki.ca)) as client:
            with pytest.raises(ConsulUnavailable):
                await client.leader()
        without_ca = ConsulConfig(address=address, certificate=certificate, key=key)
        async with ConsulClient(without_ca) as client:
            with pytest.raises(ConsulUnavailable, match="CERTIFICATE_VERIFY_FAILED"):
                await client.leader()
    assert names == [((("commonName", "client"),),)]


async def test_a_client_certificate_is_taken_up_as_its_files_change(tmp_path: Path) -> None:
    pki = ConsulPki(tmp_path)
    context = mutual(pki)
    certificate, key = pki.issue("first")
    serials: list[object] = []

    async def answer(request: web.Request) -> web.StreamResponse:
        assert request.transport is not None
        serials.append(request.transport.get_extra_info("peercert")["serialNumber"])
        return web.Response(text='"leader"')

    async with (
        server(answer, context) as address,
        ConsulClient(ConsulConfig(address=address, ca=pki.ca, certificate=certificate, key=key)) as client,
    ):
        await client.leader()
        second, second_key = pki.issue("second")
        Path(second).replace(certificate)
        await client.leader()
        assert len(set(serials)) == 1, "half of a renewal changes nothing"
        Path(second_key).replace(key)
        await client.leader()
        await client.leader()
    assert len(set(serials)) == 2 and serials[2] == serials[3]


def test_tls_files_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"consul\.ca"):
        ConsulClient(ConsulConfig(address="https://consul", ca=str(tmp_path / "none")))
    with pytest.raises(ConfigError, match=r"consul\.certificate"):
        ConsulClient(ConsulConfig(address="https://consul", certificate=str(tmp_path / "none")))
