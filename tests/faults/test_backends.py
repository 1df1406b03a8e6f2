"""What backends get to see and what becomes of flows when they fail: a whole mesh, real sockets, a real HAProxy."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
import ssl
import subprocess
import threading
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from tests.support.console import require_tools
from tests.support.consul import free_ports
from tests.support.whole_mesh import ECHO, PROMPT, WAIT_SECONDS, Running, WholeMesh, ask, until, whole_mesh
from ztna.cli import status
from ztna.config import BackendConfig, BackendTlsConfig, CheckConfig, ConsulConfig, Endpoint, RouteConfig
from ztna.consul.embedded import EmbeddedConsul
from ztna.jsontypes import to_json
from ztna.reasons import Reason
from ztna.telemetry import REFUSALS

LINE = b"hello\n"
FLOWS, IN_TIME_SECONDS = 5, 15.0
"""So many flows, one after the other, where each dial of 5 s (the default) would be too long for them in all."""
SIZES = (1_200, 1_400, 9_000, 20_000, 60_000)


@pytest.fixture
async def mesh(tmp_path: Path) -> AsyncIterator[WholeMesh]:
    consul = await EmbeddedConsul.start()
    try:
        async with whole_mesh(tmp_path, ConsulConfig(address=consul.address)) as mesh:
            yield mesh
    finally:
        await consul.stop()


def at(port: int) -> Endpoint:
    return Endpoint("127.0.0.1", port)


def route(**keys: Any) -> RouteConfig:
    return RouteConfig(**{"service": ECHO, "port": 7007, "checks": (PROMPT,)} | keys)


async def serve(mesh: WholeMesh, *routes: RouteConfig, **keys: Any) -> str:
    """Start a connector and the agent; return the virtual address once the mesh serves it."""
    await mesh.connector("rack-1", routes, **keys)
    await mesh.agent(ECHO)
    await mesh.served_by(ECHO, "rack-1")
    return str(await mesh.virtual_address(ECHO))


def refusals(reason: Reason) -> float:
    value: float = REFUSALS.labels("connector", reason.value)._value.get()
    return value


async def answered(address: str) -> bytes:
    """Say a line until it is answered: the agent opens its listeners a moment after the name is there."""
    async with asyncio.timeout(WAIT_SECONDS):
        while not (answer := await ask(address, LINE)):
            await asyncio.sleep(0.01)
    return answer


# PROXY protocol


@dataclass
class Introduced:
    """What a v2 header said; parsed here, by the specification, and not by what wrote it."""

    source: str
    destination: tuple[str, int]
    tlvs: dict[int, bytes]


async def read_v2(reader: asyncio.StreamReader) -> Introduced | None:
    """Read a v2 header; None for LOCAL."""
    fixed = await reader.readexactly(16)
    assert fixed[:12] == b"\x0d\x0a\x0d\x0a\x00\x0d\x0a\x51\x55\x49\x54\x0a"
    body = await reader.readexactly(int.from_bytes(fixed[14:16], "big"))
    if fixed[12] == 0x20:
        return None
    assert fixed[12:14] == b"\x21\x11"
    tlvs, rest = {}, body[12:]
    while rest:
        size = int.from_bytes(rest[1:3], "big")
        tlvs[rest[0]] = rest[3 : 3 + size]
        rest = rest[3 + size :]
    destination = (str(ip_address(body[4:8])), int.from_bytes(body[10:12], "big"))
    return Introduced(str(ip_address(body[:4])), destination, tlvs)


async def test_a_backend_hears_by_v2_who_connects(mesh: WholeMesh) -> None:
    seen: list[Introduced | None] = []

    async def serve_one(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        seen.append(await read_v2(reader))
        writer.write(b"heard " + await reader.readline())
        writer.close()

    server = await asyncio.start_server(serve_one, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    async with server:
        address = await serve(mesh, route(backend=at(port), proxy_protocol="v2"))
        assert await answered(address) == b"heard hello\n"
    assert seen[0] is None, "checks speak for themselves"
    flow = next(each for each in seen if each is not None)
    assert (flow.source, flow.destination) == ("127.0.0.1", (address, 7007))
    assert (flow.tlvs[0x02], flow.tlvs[0xE0]) == (ECHO.encode(), b"spiffe://ztna/agent-1")
    assert len(flow.tlvs[0x05]) == 32


@contextlib.contextmanager
def haproxy(directory: Path, port: int) -> Iterator[None]:
    """Run a HAProxy that wants PROXY headers and answers with what it understood of them."""
    require_tools("haproxy")
    config = directory / "haproxy.cfg"
    config.write_text(
        "defaults\n mode http\n timeout connect 5s\n timeout client 5s\n timeout server 5s\n"
        f"frontend f\n bind 127.0.0.1:{port} accept-proxy\n"
        ' http-request return status 200 content-type text/plain lf-string "%[src] %[dst]:%[dst_port] '
        '%[fc_pp_authority] %[fc_pp_unique_id]"\n'
    )
    with subprocess.Popen(["haproxy", "-db", "-f", str(config)], stderr=subprocess.PIPE) as process:
        try:
            yield
        finally:
            process.terminate()


@pytest.mark.parametrize("version", ["v1", "v2"])
async def test_haproxy_understands_it(mesh: WholeMesh, tmp_path: Path, version: str) -> None:
    (port,) = free_ports(1)
    with haproxy(tmp_path, port):
        address = await serve(mesh, route(backend=at(port), proxy_protocol=version))
        async with asyncio.timeout(WAIT_SECONDS):
            while not (said := await get(address)):
                await asyncio.sleep(0.01)
    names = f"{ECHO} " if version == "v2" else " "
    assert said.startswith(f"127.0.0.1 {address}:7007 {names}"), said
    assert len(said.split()) == (4 if version == "v2" else 2)


async def get(address: str) -> str:
    """Ask by HTTP; nothing when that failed."""
    try:
        reader, writer = await asyncio.open_connection(address, 7007)
    except ConnectionError:
        return ""
    with contextlib.closing(writer), contextlib.suppress(ConnectionError):
        writer.write(b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        return (await reader.read()).partition(b"\r\n\r\n")[2].decode()
    return ""


# TLS


async def test_a_backend_by_tls_with_a_client_certificate(mesh: WholeMesh) -> None:
    files = mesh.pki.relay()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(files.certificate, files.key)
    context.load_verify_locations(files.ca)
    context.verify_mode = ssl.CERT_REQUIRED
    askers: set[str] = set()

    async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        subject = writer.get_extra_info("peercert")["subject"]
        askers.add(subject[0][0][1])
        with contextlib.suppress(ConnectionError):
            while data := await reader.read(65_536):
                writer.write(data)
                await writer.drain()
        writer.close()

    own = mesh.pki.agent("connector-to-web", [ECHO])
    server = await asyncio.start_server(echo, "127.0.0.1", 0, ssl=context)
    port = server.sockets[0].getsockname()[1]
    name = certificate_name(files.certificate)
    tls = BackendTlsConfig(ca=files.ca, name=name, certificate=own.certificate, key=own.key)
    async with server:
        address = await serve(mesh, route(backend=at(port), backend_tls=tls))
        assert await answered(address) == LINE
        blob = os.urandom(3_000_000)
        reader, writer = await asyncio.open_connection(address, 7007)
        async with asyncio.timeout(WAIT_SECONDS):
            writer.write(blob)
            assert await reader.readexactly(len(blob)) == blob
        writer.close()
    assert askers == {"connector-to-web"}


def certificate_name(file: str) -> str:
    """Return the first DNS name in a certificate."""
    described: dict[str, Any] = ssl._ssl._test_decode_cert(file)  # type: ignore[attr-defined]
    return str(next(value for kind, value in described["subjectAltName"] if kind == "DNS"))


async def test_tls_half_closes_through_a_small_window(mesh: WholeMesh) -> None:
    """The backend still sends megabytes when the program has said all it has to say."""
    files, blob = mesh.pki.relay(), os.urandom(3_000_000)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(files.certificate, files.key)
    listening = socket.create_server(("127.0.0.1", 0))

    def talk() -> bytes:
        listening.settimeout(WAIT_SECONDS)
        sock, _ = listening.accept()
        sock.settimeout(WAIT_SECONDS)
        with context.wrap_socket(sock, server_side=True) as tls:
            heard = [tls.recv(100)]
            sending = threading.Thread(target=tls.sendall, args=(blob,))
            sending.start()
            while part := tls.recv(65_536):
                heard.append(part)
            sending.join()
            tls.sendall(b"the end")
        return b"".join(heard)

    tls = BackendTlsConfig(ca=files.ca, name=certificate_name(files.certificate))
    port = listening.getsockname()[1]
    plain = route(backend=at(port), backend_tls=tls, checks=(CheckConfig(kind="none"),))
    await mesh.connector("rack-1", (plain,))
    await mesh.served_by(ECHO, "rack-1")
    agent = await mesh.scripted("ann", ECHO)
    opened = await agent.open()
    talking = asyncio.ensure_future(asyncio.to_thread(talk))
    _flow, program = await agent.begin(await agent.carrier(opened), opened.session)
    loop, parts = asyncio.get_running_loop(), []
    with contextlib.closing(program), contextlib.closing(listening):
        async with asyncio.timeout(WAIT_SECONDS):
            await loop.sock_sendall(program, LINE)
            parts.append(await loop.sock_recv(program, 1000))
            await loop.sock_sendall(program, LINE)
            program.shutdown(socket.SHUT_WR)
            while part := await loop.sock_recv(program, 65_536):
                parts.append(part)
            assert await talking == 2 * LINE
    assert b"".join(parts) == blob + b"the end"


async def test_a_backend_with_another_certificate_gets_nothing(mesh: WholeMesh) -> None:
    files = mesh.pki.relay()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(files.certificate, files.key)
    heard: list[bytes] = []

    async def listen(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        heard.append(await reader.read())

    server = await asyncio.start_server(listen, "127.0.0.1", 0, ssl=context)
    port = server.sockets[0].getsockname()[1]
    tls = BackendTlsConfig(ca=files.ca, name="somebody.else")
    async with server:
        address = await serve(mesh, route(backend=at(port), backend_tls=tls))
        await until("listening", lambda: listens(address))
        assert await ask(address, LINE) == b""
    assert not any(heard)


def listens(address: str) -> bool:
    with socket.socket() as sock:
        sock.settimeout(1.0)
        return sock.connect_ex((address, 7007)) == 0


# Several backends


async def test_no_flow_fails_when_a_backend_dies_under_load(mesh: WholeMesh) -> None:
    one, two = await mesh.backend("one"), await mesh.backend("two")
    backends = (BackendConfig(address=at(one.port)), BackendConfig(address=at(two.port)))
    # Checks that are slow to notice: the flows themselves find out first.
    slow = CheckConfig(interval_s=0.5, jitter=0.0, failures_before_critical=3)
    address = await serve(mesh, route(backends=backends, checks=(slow,), eject_after=2, eject_s=60.0))
    await answered(address)
    answers: list[bytes] = []
    is_over = False

    async def load() -> None:
        while not is_over:
            answers.append(await ask(address, LINE))

    def standing(backend: Endpoint) -> dict[str, Any]:
        found = standings(mesh.connectors["rack-1"])
        return next(each for each in found if each["backend"] == str(backend))

    both = [at(one.port), at(two.port)]
    await until("both pass", lambda: all(standing(each)["verdict"] == "passing" for each in both))
    async with asyncio.TaskGroup() as tasks:
        for _ in range(4):
            tasks.create_task(load())
        await until("both serve", lambda: {b"one: hello\n", b"two: hello\n"} <= set(answers))
        one.stop()
        await until("it is ejected", lambda: standing(at(one.port))["ejected"])
        table = shown(mesh.connectors["rack-1"])
        since = len(answers)
        await until("its checks say so, too", lambda: standing(at(one.port))["verdict"] == "critical")
        await until("a hundred more", lambda: len(answers) > since + 100)
        is_over = True
    assert " ejected " in table and f"127.0.0.1:{two.port}" in table
    assert b"" not in answers, "what cannot be dialled is dialled elsewhere"
    # Those of the moment of ejection may still be answers that one gave before it died.
    assert set(answers[since + 8 :]) == {b"two: hello\n"}
    assert mesh.connectors["rack-1"].status("connector")["services"][ECHO]["verdict"] == "passing"
    await one.start()
    await until("it is back", lambda: standing(at(one.port))["verdict"] == "passing")


@contextlib.contextmanager
def never_accepting() -> Iterator[Endpoint]:
    """A backend whose backlog is full: no SYN of the flow's is answered."""
    with contextlib.ExitStack() as held:
        server = held.enter_context(socket.socket())
        server.bind(("127.0.0.1", 0))
        server.listen(0)
        for _ in range(4):
            filler = held.enter_context(socket.socket())
            filler.setblocking(False)
            filler.connect_ex(server.getsockname())
        yield Endpoint(*server.getsockname())


async def test_a_backend_that_never_answers_is_given_up_in_its_services_own_time(mesh: WholeMesh) -> None:
    alive, unchecked = await mesh.backend("alive"), (CheckConfig(kind="none"),)
    with never_accepting() as dead:
        backends = (BackendConfig(address=dead, weight=100), BackendConfig(address=at(alive.port)))
        # By its weight nearly each flow begins with the dead one.
        keys: dict[str, Any] = {"backends": backends, "checks": unchecked, "eject_after": 1_000}
        address = await serve(mesh, route(**keys, connect_timeout_s=0.2))
        await answered(address)
        async with asyncio.timeout(IN_TIME_SECONDS):
            assert [await ask(address, LINE) for _ in range(FLOWS)] == [b"alive: hello\n"] * FLOWS


@pytest.mark.parametrize(
    ("balance", "labels"),
    [("round_robin", [b"one", b"two"]), ("least_connections", [b"one", b"two"]), ("source_hash", [b"one"])],
)
async def test_backends_share_the_flows(mesh: WholeMesh, balance: str, labels: list[bytes]) -> None:
    made = [await mesh.backend(label) for label in ("one", "two")]
    backends = tuple(BackendConfig(address=at(backend.port)) for backend in made)
    address = await serve(mesh, route(backends=backends, balance=balance))
    await answered(address)
    running = mesh.connectors["rack-1"]
    await until("both pass", lambda: all(each["verdict"] == "passing" for each in standings(running)))
    await until("nothing runs", lambda: not any(each["flows"] for each in standings(running)))
    streams = [await asyncio.open_connection(address, 7007) for _ in range(4)]
    said = []
    for reader, writer in streams:
        writer.write(LINE)
        said.append((await reader.readline()).partition(b":")[0])
    assert sorted(each["flows"] for each in standings(running)) == ([0, 4] if len(labels) == 1 else [2, 2])
    assert len(set(said)) == len(labels)
    for _reader, writer in streams:
        writer.close()


def shown(connector: Running) -> str:
    """Return what `ztna status` prints of a connector."""
    console = Console(width=400)
    state: dict[str, Any] = {
        "readiness": {"ready": True, "awaiting": {}, "warnings": {}},
        "version": "1",
        "uptime_s": 1,
        "connector": json.loads(to_json(connector.status("connector"))),
    }
    with console.capture() as captured:
        status.show(console, [status.Seen("connector", "127.0.0.1:9433", state)])
    return captured.get()


def standings(connector: Running) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = connector.status("connector")["services"][ECHO]["backends"]
    return found


# UDP


class Program:
    """A local program's UDP socket, connected to the virtual address."""

    def __init__(self, address: str) -> None:
        self._sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._sock.setblocking(False)
        self._sock.connect((address, 7007))

    async def ask(self, payload: bytes) -> bytes:
        """Send a datagram until it is answered, and return the answer. Raises OSError for what ICMP says."""
        loop = asyncio.get_running_loop()
        async with asyncio.timeout(WAIT_SECONDS):
            while True:
                self._sock.send(payload)
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(1.0):
                        return await loop.sock_recv(self._sock, 65_535)

    async def ask_in_spite_of_errors(self, payload: bytes) -> bytes:
        """Ask again for as long as ICMP says that nobody is there."""
        async with asyncio.timeout(WAIT_SECONDS):
            while True:
                with contextlib.suppress(ConnectionRefusedError):
                    return await self.ask(payload)

    def close(self) -> None:
        self._sock.close()


async def test_large_datagrams_go_both_ways_whole(mesh: WholeMesh) -> None:
    backend = await mesh.backend("echo")
    address = await serve(
        mesh, route(backend=at(backend.port), protocol="udp", checks=(CheckConfig(kind="none"),))
    )
    with contextlib.closing(Program(address)) as program:
        for size in SIZES:
            payload = os.urandom(size)
            assert await program.ask(payload) == b"echo: " + payload


async def test_a_closed_port_is_refused_to_the_program(mesh: WholeMesh) -> None:
    """As root the agent may tell a program by ICMP, in mode listen too."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as held:
        held.bind(("127.0.0.1", 0))
        closed = held.getsockname()[1]
    address = await serve(mesh, route(backend=at(closed), protocol="udp", checks=(CheckConfig(kind="none"),)))
    with contextlib.closing(Program(address)) as program, pytest.raises(ConnectionRefusedError):
        await program.ask(b"anybody?")


async def test_udp_flows_leave_a_backend_that_is_gone(mesh: WholeMesh) -> None:
    one, two = await mesh.backend("one"), await mesh.backend("two")
    backends = tuple(BackendConfig(address=at(each.port)) for each in (one, two))
    shared = route(
        backends=backends, protocol="udp", checks=(CheckConfig(kind="none"),), eject_after=1, eject_s=60.0
    )
    address = await serve(mesh, shared)
    programs = [Program(address) for _ in range(2)]
    try:
        labels = {await program.ask(b"x") for program in programs}
        assert labels == {b"one: x", b"two: x"}
        one.close()
        for program in programs:
            assert await program.ask_in_spite_of_errors(b"y") == b"two: y"
    finally:
        for program in programs:
            program.close()


# Limits, idle times, draining, and what is told of flows


def logged(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


async def test_every_flow_is_told_of_with_its_bytes(mesh: WholeMesh, tmp_path: Path) -> None:
    file, backend = tmp_path / "flows.log", await mesh.backend("echo")
    udp = route(backend=at(backend.port), protocol="udp", checks=(CheckConfig(kind="none"),), udp_idle_s=0.5)
    address = await serve(mesh, route(backend=at(backend.port)), udp, flow_log=str(file))
    await answered(address)
    with contextlib.closing(Program(address)) as program:
        assert await program.ask(b"ping") == b"echo: ping"
    await until("both have ended", lambda: {"tcp", "udp"} <= {each["protocol"] for each in logged(file)})
    told = {each["protocol"]: each for each in logged(file) if each["bytes_to_agent"]}
    for protocol, size in (("tcp", len(LINE)), ("udp", 4)):
        line = told[protocol]
        assert (line["event"], line["agent"], line["service"]) == (
            "flow_ended",
            "spiffe://ztna/agent-1",
            ECHO,
        )
        assert (line["destination"], line["backend"]) == (f"{address}:7007", f"127.0.0.1:{backend.port}")
        assert (line["bytes_to_backend"], line["bytes_to_agent"]) == (size, size + len("echo: "))
    assert (told["tcp"]["ended"], told["udp"]["ended"]) == ("finished", "idle")
    assert (told["udp"]["datagrams_to_backend"], told["udp"]["datagrams_to_agent"]) == (1, 1)
    # As logrotate does it: moved away, then SIGHUP.
    file.rename(tmp_path / "flows.log.1")
    for reload in mesh.connectors["rack-1"].daemon.on_reload:
        reload()
    await answered(address)
    await until("it goes on in a new file", lambda: file.exists() and logged(file))


async def test_a_tcp_flow_that_is_idle_is_reset(mesh: WholeMesh, tmp_path: Path) -> None:
    file, backend = tmp_path / "flows.log", await mesh.backend("echo")
    address = await serve(mesh, route(backend=at(backend.port), tcp_idle_s=1.0), flow_log=str(file))
    await answered(address)
    reader, writer = await asyncio.open_connection(address, 7007)
    with contextlib.closing(writer):
        writer.write(LINE)
        async with asyncio.timeout(WAIT_SECONDS):
            assert await reader.readline() == b"echo: hello\n"
            with pytest.raises(ConnectionResetError):
                await reader.read()
    await until("told", lambda: any(each["ended"] == "idle" for each in logged(file)))


async def test_an_agent_has_no_more_tcp_flows_than_its_limit(mesh: WholeMesh) -> None:
    backend = await mesh.backend("echo")
    address = await serve(mesh, route(backend=at(backend.port)), flows_per_agent=2)
    await answered(address)
    counted = mesh.connectors["rack-1"]
    await until("the first has ended", lambda: counted.status("connector")["tcp_flows"] == 0)
    before = refusals(Reason.LIMIT_REACHED)
    held = [await asyncio.open_connection(address, 7007) for _ in range(2)]
    for reader, writer in held:
        writer.write(LINE)
        assert await reader.readline() == b"echo: hello\n"
    assert await ask(address, LINE) == b"", "none of those in use makes way"
    assert refusals(Reason.LIMIT_REACHED) == before + 1
    held[0][1].close()
    await until("there is room", lambda: counted.status("connector")["tcp_flows"] == 1)
    assert await ask(address, LINE) == b"echo: hello\n"
    held[1][1].close()


async def test_a_flow_that_its_agent_does_not_use_makes_room_and_is_told_with_the_reason(
    mesh: WholeMesh, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sidecar.connector.ledger.EVICTABLE_SECONDS", 0.5)
    file, backend = tmp_path / "flows.log", await mesh.backend("echo")
    address = await serve(mesh, route(backend=at(backend.port)), flows_per_agent=1, flow_log=str(file))
    await answered(address)
    running = mesh.connectors["rack-1"]
    await until("the first has ended", lambda: running.status("connector")["tcp_flows"] == 0)
    reader, writer = await asyncio.open_connection(address, 7007)
    with contextlib.closing(writer):
        writer.write(LINE)
        assert await reader.readline() == b"echo: hello\n"
        assert await answered(address) == b"echo: hello\n"
        async with asyncio.timeout(WAIT_SECONDS):
            with pytest.raises(ConnectionResetError):
                await reader.read()
    await until("told", lambda: any(each["ended"] == "evicted" for each in logged(file)))
    (line,) = [each for each in logged(file) if each["ended"] == "evicted"]
    assert (line["reason"], line["bytes_to_backend"]) == ("limit_reached", len(LINE))


async def test_a_service_drains_for_its_own_time(
    mesh: WholeMesh, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The handover is part of it: one that never ended would keep the connector past every deadline here."""
    monkeypatch.setattr("sidecar.connector.draining.HANDOVER_SECONDS", 10 * WAIT_SECONDS)
    file, backend = tmp_path / "flows.log", await mesh.backend("echo")
    short = route(backend=at(backend.port), drain_s=0.2)
    address = await serve(mesh, short, flow_log=str(file), drain_s=10 * WAIT_SECONDS)
    await answered(address)
    reader, writer = await asyncio.open_connection(address, 7007)
    with contextlib.closing(writer):
        writer.write(LINE)
        assert await reader.readline() == b"echo: hello\n"
        await mesh.connectors["rack-1"].stop()
        with pytest.raises(ConnectionResetError):
            await reader.read()
    assert [each["reason"] for each in logged(file) if each["ended"] == "reset"] == [Reason.DRAINING]
