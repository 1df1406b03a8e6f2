from __future__ import annotations

import asyncio
import os
import shlex
import socket
import ssl
import sys
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent import futures
from contextlib import asynccontextmanager, closing, contextmanager
from pathlib import Path

import grpc
import pytest
import uvloop
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from sidecar.connector.check_files import CheckTls
from sidecar.connector.checks import parse
from sidecar.connector.health import Outcome
from sidecar.connector.probes import OUTPUT_BYTES_MAX, Prober
from tests.support import namespaces
from tests.support.certificates import SERVER, Presented, forge
from ztna.config import CheckConfig, Endpoint

WAIT_SECONDS = 20.0


@pytest.fixture(params=["asyncio", "uvloop"])
def event_loop_policy(request: pytest.FixtureRequest) -> asyncio.AbstractEventLoopPolicy:
    return uvloop.EventLoopPolicy() if request.param == "uvloop" else asyncio.DefaultEventLoopPolicy()


async def probe(backend: Endpoint, kind: str, timeout_s: float = WAIT_SECONDS, **config: object) -> Outcome:
    checked = CheckConfig(kind=kind, timeout_s=timeout_s, **config)  # type: ignore[arg-type]
    prober = Prober()
    try:
        return await prober.probe(parse(checked, "tcp", backend, "check"))
    finally:
        await prober.close()


@pytest.fixture
def closed_tcp() -> Iterator[Endpoint]:
    """A port that is held but where nobody listens."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        yield Endpoint(*sock.getsockname())


@asynccontextmanager
async def server(
    answer: Callable[[bytes], bytes], end: bytes = b"\r\n\r\n", context: ssl.SSLContext | None = None
) -> AsyncIterator[Endpoint]:
    """Answer what ends so, and hang up."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            writer.write(answer(await reader.readuntil(end)))
            await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        writer.close()

    async with await asyncio.start_server(serve, "127.0.0.1", 0, ssl=context) as running:
        yield Endpoint(*running.sockets[0].getsockname())


def http(status: str, body: str = "", seen: list[bytes] | None = None) -> Callable[[bytes], bytes]:
    def answer(request: bytes) -> bytes:
        if seen is not None:
            seen.append(request)
        return f"HTTP/1.1 {status}\r\nContent-Length: {len(body)}\r\nLocation: /\r\n\r\n{body}".encode()

    return answer


async def test_tcp(closed_tcp: Endpoint) -> None:
    with closing(socket.create_server(("127.0.0.1", 0))) as listening:
        assert (await probe(Endpoint(*listening.getsockname()), "tcp")).ok
    outcome = await probe(closed_tcp, "tcp")
    assert not outcome.ok and outcome.output == f"tcp {closed_tcp}: Connection refused"


async def test_tcp_that_asks_and_expects() -> None:
    async with server(lambda _: b"+PONG\r\n", b"\r\n") as backend:
        assert (await probe(backend, "tcp", send="PING\r\n", expect="PONG")).ok
        outcome = await probe(backend, "tcp", send="PING\r\n", expect="PANG")
        assert (outcome.ok, outcome.output) == (False, f"tcp {backend}: expected 'PANG', got '+PONG'")
    async with server(lambda _: b"x" * 3 * OUTPUT_BYTES_MAX, b"\n") as backend:
        assert not (await probe(backend, "tcp", send="more\n", expect="end")).ok


@pytest.mark.parametrize(
    ("status", "ok"), [("200 OK", True), ("204 No Content", True), ("302 Found", False), ("500 Oops", False)]
)
async def test_http(status: str, ok: bool) -> None:
    async with server(http(status)) as backend:
        outcome = await probe(backend, "http", path="/health")
        assert (outcome.ok, outcome.output) == (ok, f"GET /health: {status[:3]}")


async def test_http_asks_and_takes_what_it_is_told() -> None:
    seen: list[bytes] = []
    async with server(http("404 Not Found", "not here, but alive", seen)) as backend:
        told = {
            "method": "POST",
            "path": "/q?a=b",
            "status": ("404",),
            "headers": ("Host: web.internal", "X-Who: us"),
        }
        assert (await probe(backend, "http", body="aliv[e]", **told)).ok
        outcome = await probe(backend, "http", body="^alive", **told)
        assert (outcome.ok, outcome.output) == (
            False,
            "POST /q?a=b: 404, but the answer does not match '^alive'",
        )
    assert seen[0].startswith(b"POST /q?a=b HTTP/1.1\r\n")
    assert b"\r\nHost: web.internal\r\n" in seen[0] and b"\r\nX-Who: us\r\n" in seen[0]


async def test_http_looks_at_the_headers_of_the_answer() -> None:
    async with server(http("302 Found")) as backend:
        told = {"status": ("302",), "expect_headers": ("Location: ^/$",)}
        assert (await probe(backend, "http", **told)).ok
        outcome = await probe(backend, "http", **told | {"expect_headers": ("location: ^/login",)})
        assert (outcome.ok, outcome.output) == (
            False,
            "GET /: 302, but location does not match '^/login': the answer has '/'",
        )


async def test_silence_and_babble_are_failures() -> None:
    with closing(socket.create_server(("127.0.0.1", 0))) as silent:
        backend = Endpoint(*silent.getsockname())
        for kind in ("http", "grpc"):
            outcome = await probe(backend, kind, timeout_s=0.2)
            assert not outcome.ok and "no answer in 0.2 s" in outcome.output
    for kind in ("http", "grpc"):
        async with server(lambda _: os.urandom(100)) as backend:
            assert not (await probe(backend, kind)).ok


def backend_certificate(directory: Path) -> tuple[Presented, str]:
    """A backend's own certificate for web.internal, and the file to believe it by."""
    certificate, key = forge(None, dns=["web.internal"], eku=(SERVER,))
    presented = Presented((certificate,), key)
    (directory / "ca.pem").write_bytes(presented.chain_pem)
    return presented, str(directory / "ca.pem")


@pytest.fixture
def serving_tls(tmp_path: Path) -> tuple[ssl.SSLContext, str]:
    presented, ca = backend_certificate(tmp_path)
    (tmp_path / "key.pem").write_bytes(presented.key_pem)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(ca, tmp_path / "key.pem")
    return context, ca


async def test_https_believes_only_whom_it_is_told_to(serving_tls: tuple[ssl.SSLContext, str]) -> None:
    context, ca = serving_tls
    async with server(http("200 OK"), context=context) as backend:
        assert (await probe(backend, "http", tls=True, ca=ca, tls_name="web.internal")).ok
        for distrusted in (
            {"ca": ca},
            {"ca": ca, "tls_name": "other.internal"},
            {"tls_name": "web.internal"},
        ):
            assert not (await probe(backend, "http", tls=True, **distrusted)).ok, distrusted
        assert (await probe(backend, "http", tls=True, tls_skip_verify=True)).ok
        assert not (await probe(backend, "http", tls=True, ca="/nonexistent.pem")).ok


async def test_a_backends_new_authority_is_believed_without_a_restart(
    serving_tls: tuple[ssl.SSLContext, str], tmp_path: Path
) -> None:
    context, ca = serving_tls
    (tmp_path / "next").mkdir()
    presented, next_ca = backend_certificate(tmp_path / "next")
    (tmp_path / "next" / "key.pem").write_bytes(presented.key_pem)
    follows = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    follows.load_cert_chain(next_ca, tmp_path / "next" / "key.pem")
    believed = tmp_path / "believed.pem"
    believed.write_bytes(Path(ca).read_bytes())
    config = CheckConfig(
        kind="http", tls=True, ca=str(believed), tls_name="web.internal", timeout_s=WAIT_SECONDS
    )
    prober = Prober()

    async def passes(backend: Endpoint) -> bool:
        return (await prober.probe(parse(config, "tcp", backend, "check"))).ok

    try:
        async with (
            server(http("200 OK"), context=context) as old,
            server(http("200 OK"), context=follows) as new,
        ):
            assert (await passes(old), await passes(new)) == (True, False)
            fresh = tmp_path / "fresh.pem"
            fresh.write_bytes(Path(next_ca).read_bytes())
            fresh.replace(believed)
            assert (await passes(old), await passes(new)) == (False, True)
            believed.write_text("no certificate")
            assert await passes(new), "a broken file keeps the one before"
            believed.unlink()
            assert (await passes(old), await passes(new)) == (False, True), "so does one that is gone"
    finally:
        await prober.close()


def test_contexts_are_shared_and_only_those_of_checks_that_are_kept() -> None:
    made = CheckTls()
    checks = [
        parse(CheckConfig(kind=kind, tls=True, tls_skip_verify=skip), "tcp", Endpoint(host, 1), "check")
        for host in ("127.0.0.1", "127.0.0.2")
        for kind, skip in (("http", False), ("http", True), ("grpc", False))
    ]
    assert len({id(made.context(each)) for each in checks}) == len(made) == 3
    kept = made.context(checks[0])
    made.keep_only([checks[0], parse(CheckConfig(), "tcp", Endpoint("127.0.0.1", 1), "check")])
    assert len(made) == 1 and made.context(checks[0]) is kept


@contextmanager
def grpc_server(
    *, credentials: grpc.ServerCredentials | None = None
) -> Iterator[tuple[Endpoint, health.HealthServicer]]:
    running = grpc.server(futures.ThreadPoolExecutor(2))
    servicer = health.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(servicer, running)
    if credentials is None:
        port = running.add_insecure_port("127.0.0.1:0")
    else:
        port = running.add_secure_port("127.0.0.1:0", credentials)
    running.start()
    try:
        yield Endpoint("127.0.0.1", port), servicer
    finally:
        running.stop(None).wait()


async def test_grpc() -> None:
    with grpc_server() as (backend, servicer):
        servicer.set("web", health_pb2.HealthCheckResponse.NOT_SERVING)
        assert await probe(backend, "grpc") == Outcome(True, f"grpc {backend}: SERVING")
        assert await probe(backend, "grpc", grpc_service="web") == Outcome(False, "grpc web: NOT_SERVING")
        assert await probe(backend, "grpc", grpc_service="x" * 300) == Outcome(
            False, f"grpc {'x' * 300}: SERVICE_UNKNOWN"
        )
    running = grpc.server(futures.ThreadPoolExecutor(1))
    backend = Endpoint("127.0.0.1", running.add_insecure_port("127.0.0.1:0"))
    running.start()
    assert "it has no health service" in (await probe(backend, "grpc")).output
    running.stop(None).wait()


async def test_grpc_by_tls(tmp_path: Path) -> None:
    presented, ca = backend_certificate(tmp_path)
    credentials = grpc.ssl_server_credentials([(presented.key_pem, presented.chain_pem)])
    with grpc_server(credentials=credentials) as (backend, _):
        assert (await probe(backend, "grpc", tls=True, ca=ca, tls_name="web.internal")).ok
        assert not (await probe(backend, "grpc", tls=True, ca=ca)).ok
        assert not (await probe(backend, "grpc")).ok


@contextmanager
def udp_backend(reply: bytes) -> Iterator[Endpoint]:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as backend:
        backend.bind(("127.0.0.1", 0))
        backend.settimeout(WAIT_SECONDS)

        def serve() -> None:
            data, source = backend.recvfrom(2000)
            backend.sendto(reply + data, source)

        thread = threading.Thread(target=serve)
        thread.start()
        yield Endpoint(*backend.getsockname())
        thread.join()


async def test_udp() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as backend:
        backend.bind(("127.0.0.1", 0))
        where = Endpoint(*backend.getsockname())
        assert (await probe(where, "udp")).ok
        outcome = await probe(where, "udp", timeout_s=0.2, expect="pong")
        assert not outcome.ok and "no answer" in outcome.output, (
            "silence is a failure where a reply is expected"
        )
    outcome = await probe(where, "udp")
    assert outcome == Outcome(False, f"udp {where}: Connection refused")
    with udp_backend(b"pong ") as where:
        assert (await probe(where, "udp", send="ping", expect="pong ping")).ok
    with udp_backend(b"what? ") as where:
        outcome = await probe(where, "udp", send="ping", expect="pong")
        assert outcome == Outcome(False, f"udp {where}: expected 'pong', got 'what? ping'")


@pytest.fixture(scope="module")
def pinging() -> Iterator[namespaces.Network]:
    """A host that may ping, and a router with what cannot be reached behind it."""
    with namespaces.network("core", "far") as net:
        core, far = net.hosts["core"], net.hosts["far"]
        core.run("sysctl", "-qw", "net.ipv4.ping_group_range=0 2147483647")
        forwards = ("net.ipv4.ip_forward=1", "net.ipv6.conf.all.forwarding=1")
        tells_each = ("net.ipv4.icmp_ratelimit=0", "net.ipv6.icmp.ratelimit=0")
        far.run("sysctl", "-qw", *forwards, *tells_each)
        for host, address in ((core, "fd00:9::1"), (far, "fd00:9::2")):
            host.run("ip", "addr", "add", f"{address}/64", "dev", "eth0", "nodad")
        for there, gateway in (("198.51.100.0/24", far.address), ("2001:db8::/32", "fd00:9::2")):
            core.run("ip", "route", "add", there, "via", gateway)
        for answer, there in (
            ("unreachable", "198.51.100.1"),
            ("prohibit", "198.51.100.2"),
            ("unreachable", "2001:db8::1"),
        ):
            far.run("ip", "route", "add", answer, there)
        yield net


@pytest.mark.namespaces
class TestIcmp:
    @pytest.fixture
    def ping(
        self, event_loop_policy: asyncio.AbstractEventLoopPolicy, pinging: namespaces.Network
    ) -> Callable[[str, float], Outcome]:
        def ping(address: str, timeout_s: float = WAIT_SECONDS) -> Outcome:
            with asyncio.Runner(loop_factory=event_loop_policy.new_event_loop) as runner:
                return runner.run(probe(Endpoint(address, 0), "icmp", timeout_s=timeout_s))

        return lambda *told: pinging.hosts["core"].inside(lambda: ping(*told))

    @pytest.mark.parametrize("address", ["127.0.0.1", "::1", "10.91.0.2", "fd00:9::2"])
    def test_a_reply_passes(self, ping: Callable[..., Outcome], address: str) -> None:
        assert ping(address) == Outcome(True, f"icmp {address}: answered")

    def test_silence_fails_when_the_time_is_over(
        self, ping: Callable[..., Outcome], pinging: namespaces.Network
    ) -> None:
        far = pinging.hosts["far"]
        with far.dropping("icmp type echo-request", "icmpv6 type echo-request"):
            for address in (far.address, "fd00:9::2"):
                outcome = ping(address, 0.2)
                assert not outcome.ok and outcome.output.endswith(": no answer in 0.2 s")
        assert ping(far.address).ok

    @pytest.mark.parametrize(
        ("address", "told"),
        [
            ("198.51.100.1", "No route to host"),
            ("198.51.100.2", "No route to host"),
            ("2001:db8::1", "Network is unreachable"),
            ("203.0.113.1", "Network is unreachable"),
        ],
    )
    def test_what_is_unreachable_fails_as_soon_as_that_is_told(
        self, ping: Callable[..., Outcome], address: str, told: str
    ) -> None:
        outcome = ping(address)
        assert not outcome.ok and outcome.output.endswith(f": {told}")

    def test_without_permission_it_says_what_to_set(
        self, ping: Callable[..., Outcome], pinging: namespaces.Network
    ) -> None:
        core = pinging.hosts["core"]
        core.run("sysctl", "-qw", "net.ipv4.ping_group_range=1 0")
        try:
            for address in ("127.0.0.1", "::1"):
                assert ping(address) == Outcome(
                    False,
                    f"icmp: not allowed to ping: set net.ipv4.ping_group_range to include {os.getegid()}",
                )
        finally:
            core.run("sysctl", "-qw", "net.ipv4.ping_group_range=0 2147483647")


def shell(line: str) -> dict[str, object]:
    return {"command": ("/bin/sh", "-c", line)}


async def test_script() -> None:
    backend = Endpoint("127.0.0.1", 8080)
    ok = await probe(backend, "script", **shell("echo at $ZTNA_BACKEND; echo on $ZTNA_BACKEND_IP >&2"))
    assert ok == Outcome(True, "sh: at 127.0.0.1:8080 on 127.0.0.1")
    assert await probe(backend, "script", **shell("exit 1")) == Outcome(True, "sh: status 1", is_warning=True)
    assert await probe(backend, "script", **shell("echo no; exit 2")) == Outcome(False, "sh: no")
    talkative = await probe(backend, "script", **shell("yes | head -c 1000000"))
    assert talkative.ok and len(talkative.output) <= OUTPUT_BYTES_MAX + 4
    missing = await probe(backend, "script", command=("/nonexistent/check",))
    assert not missing.ok and "No such file" in missing.output


async def test_a_script_ends_with_its_time_and_all_it_started_with_it(tmp_path: Path) -> None:
    pids = tmp_path / "pids"
    program = f"import os, time; open({str(pids)!r}, 'a').write(f'{{os.getpid()}} '); time.sleep(600)"
    started = f"{shlex.quote(sys.executable)} -c {shlex.quote(program)}"
    line = f"{started} & {started} & while [ $(wc -w < {pids} || echo 0) -lt 2 ]; do :; done; wait"
    pids.touch()
    outcome = await probe(Endpoint("127.0.0.1", 1), "script", timeout_s=3.0, **shell(line))
    assert not outcome.ok and "no answer in 3 s" in outcome.output
    async with asyncio.timeout(WAIT_SECONDS):
        for pid in pids.read_text().split():
            while _runs(int(pid)):
                await asyncio.sleep(0)


def _runs(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except OSError:
        return False
    return state != "Z"


async def test_none_passes(closed_tcp: Endpoint) -> None:
    assert (await probe(closed_tcp, "none")).ok
