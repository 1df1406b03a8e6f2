"""One pass over a running mesh: resolve, UDP echo, HTTP get, a denied service; each step timed and told."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import asdict, dataclass
from ipaddress import IPv4Address

import aiohttp

from ztna import quic
from ztna.cli.mesh import DATABASE, ECHO, RELAY_NAME, SERVICES, VIRTUAL_PORTS, WEB, Mesh
from ztna.config import Endpoint, TlsConfig
from ztna.credentials import Credentials
from ztna.errors import ZtnaError
from ztna.identity import require_relay
from ztna.names import ServiceName
from ztna.reasons import Reason
from ztna.resolver import Resolver
from ztna.udp import SockAddr, UdpSocket
from ztna.wire import control

STEP_SECONDS = 10.0
RETRY_SECONDS = 0.1
ECHO_ATTEMPTS = 9
ECHO_ATTEMPT_SECONDS = 1.0
ZONE = "ztna.local"


@dataclass
class Step:
    """What one step did."""

    step: str
    ok: bool
    detail: str
    milliseconds: float


class CheckFailed(ZtnaError):
    """A step saw something else than it should."""


async def check(mesh: Mesh, told: Callable[[Step], None]) -> list[Step]:
    """Run every step, each within STEP_SECONDS; returns them all, failed ones with what was seen."""
    bodies: tuple[tuple[str, Callable[[], Awaitable[str]]], ...] = (
        ("resolve", lambda: _resolve(mesh)),
        ("udp echo", lambda: _udp_echo(mesh)),
        ("http get", lambda: _http_get(mesh)),
        ("denied service", lambda: _denied(mesh)),
    )
    steps = []
    for name, body in bodies:
        started = time.perf_counter()
        try:
            async with asyncio.timeout(STEP_SECONDS):
                ok, detail = True, await body()
        except TimeoutError:
            ok, detail = False, f"no success within {STEP_SECONDS:.0f} s"
        except (ZtnaError, OSError, aiohttp.ClientError) as error:
            ok, detail = False, str(error)
        steps.append(Step(name, ok, detail, round((time.perf_counter() - started) * 1000, 1)))
        told(steps[-1])
    return steps


def as_objects(steps: list[Step]) -> list[dict[str, object]]:
    """Return the steps as plain objects for `--json`."""
    return [asdict(step) for step in steps]


async def _address(mesh: Mesh, service: ServiceName) -> str:
    """Return the virtual address of a service, asking dnsd until it has one."""
    resolver = Resolver((Endpoint("127.0.0.1", mesh.dns_port),), timeout_s=1.0)
    while True:
        answer = await resolver.addresses(f"{service}.{ZONE}")
        if answer:
            return answer[0]
        await asyncio.sleep(RETRY_SECONDS)


async def _resolve(mesh: Mesh) -> str:
    found = {}
    for service in SERVICES:
        found[service] = await _address(mesh, service)
    if len(set(found.values())) != len(found):
        raise CheckFailed(f"two services share an address: {found}")
    outside = [address for address in found.values() if _outside(mesh, address)]
    if outside:
        raise CheckFailed(f"{outside} lies outside the pool {mesh.options.pool}")
    return ", ".join(f"{service}.{ZONE} = {address}" for service, address in found.items())


def _outside(mesh: Mesh, address: str) -> bool:
    return IPv4Address(address) not in mesh.options.pool


class _Answers(asyncio.DatagramProtocol):
    def __init__(self) -> None:
        self.queue: asyncio.Queue[bytes] = asyncio.Queue(16)
        self.problem = "no answer"

    def datagram_received(self, data: bytes, addr: tuple[str, int]) -> None:
        if not self.queue.full():
            self.queue.put_nowait(data)

    def error_received(self, exc: Exception) -> None:
        self.problem = str(exc)


async def _udp_echo(mesh: Mesh) -> str:
    address, port = await _address(mesh, ECHO), VIRTUAL_PORTS[ECHO]
    loop = asyncio.get_running_loop()
    transport, answers = await loop.create_datagram_endpoint(_Answers, remote_addr=(address, port))
    try:
        for attempt in range(1, ECHO_ATTEMPTS + 1):
            payload = f"hello {attempt}".encode()
            transport.sendto(payload)
            try:
                answer = await asyncio.wait_for(answers.queue.get(), ECHO_ATTEMPT_SECONDS)
            except TimeoutError:
                continue
            if not answer.startswith(b"hello "):
                raise CheckFailed(f"{address}:{port}/udp answered {answer[:40]!r} instead of an echo")
            return f"{len(answer)} bytes came back from {address}:{port}/udp, datagram {attempt}"
    finally:
        transport.close()
    raise CheckFailed(f"no echo from {address}:{port}/udp: {answers.problem}")


async def _http_get(mesh: Mesh) -> str:
    address = await _address(mesh, WEB)
    url = f"http://{address}:{VIRTUAL_PORTS[WEB]}/"
    last = ""
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=STEP_SECONDS)) as http:
        for _ in range(int(STEP_SECONDS / RETRY_SECONDS)):
            try:
                async with http.get(url) as answer:
                    text = await answer.text()
            except aiohttp.ClientError as error:
                last = str(error)
                await asyncio.sleep(RETRY_SECONDS)
                continue
            if answer.status != 200 or "web-app" not in text:
                raise CheckFailed(f"{url} answered {answer.status} {text[:60]!r}")
            return f"{url} answered 200, {len(text)} bytes"
    raise CheckFailed(f"{url}: {last}")


class _Denials:
    """The client end of a control connection that waits for one answer to one `open`."""

    def __init__(self) -> None:
        self.answer: asyncio.Future[control.Denied | control.Opened] = (
            asyncio.get_running_loop().create_future()
        )
        self._frames = control.FrameReader()

    def datagram_received(self, data: bytes) -> None:
        pass

    def stream_data(self, stream_id: int, data: bytes, end: bool) -> None:
        for message in self._frames.feed(data):
            if isinstance(message, control.Denied | control.Opened) and not self.answer.done():
                self.answer.set_result(message)

    def peer_address_changed(self, address: SockAddr) -> None:
        pass

    def connection_closed(self, code: int, reason: str) -> None:
        if not self.answer.done():
            self.answer.set_exception(CheckFailed(f"the relay closed the connection: {code} {reason}"))


async def open_as(tls: TlsConfig, relay: SockAddr, service: ServiceName) -> control.Denied | control.Opened:
    """Ask the relay, with this certificate, for a session and return what it says."""
    client: quic.Client
    socket = UdpSocket.open(("127.0.0.1", 0), lambda packets: client.packets_received(packets))
    client = quic.Client(
        socket,
        relay,
        RELAY_NAME,
        Credentials.load(tls),
        quic.Settings(alpn=("ztna-v2",), udp_payload=1200, ping_interval_s=3.0),
        check=lambda identity: require_relay(identity, RELAY_NAME),
        factory=lambda _: denials,
    )
    denials = _Denials()
    try:
        connection = await client.connect(timeout_s=5.0)
        stream = connection.open_stream()
        connection.send_stream(stream, control.encode(control.Hello()))
        connection.send_stream(stream, control.encode(control.Open(1, service)))
        return await denials.answer
    finally:
        client.close()
        socket.close()


async def _denied(mesh: Mesh) -> str:
    answer = await open_as(mesh.stranger, ("127.0.0.1", mesh.relay_port), DATABASE)
    if not isinstance(answer, control.Denied):
        raise CheckFailed(f"an agent without a grant for {DATABASE} was given a session")
    if answer.reason is not Reason.NO_GRANT:
        raise CheckFailed(
            f"an agent without a grant for {DATABASE} was told {answer.reason}, not {Reason.NO_GRANT}"
        )
    return f"an agent whose certificate grants only {ECHO} asked for {DATABASE}: {answer.reason}"
