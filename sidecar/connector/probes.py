"""Ask backends how they are: TCP, UDP, HTTP, gRPC, ICMP and scripts, many at once and each within its time.

Decides nothing about what an outcome means: sidecar.connector.health does. What a backend does, or fails to do, is
an Outcome and never an exception.
"""

from __future__ import annotations

import asyncio
import os
import re
import select
import signal
import socket
from collections.abc import Awaitable, Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path

import aiohttp

from sidecar.connector.backends import connect_tcp, connected_ping, connected_udp, ping_problem, resolve
from sidecar.connector.check_files import CheckTls
from sidecar.connector.checks import Check, Kind
from sidecar.connector.grpc_health import GrpcFailed, ask_health
from sidecar.connector.health import Outcome
from ztna.errors import ConfigError
from ztna.udp import SockAddr

CHECKS_AT_ONCE = 64
UDP_SILENCE_SECONDS = 0.5
"""A UDP backend that says nothing passes: an ICMP error from the same host or network is faster than this."""
BODY_BYTES_MAX = 65_536
OUTPUT_BYTES_MAX = 4_096
"""What a check reads of a script's output or of a reply; the rest is thrown away."""
KILL_SECONDS = 1.0

_WARNING_STATUS = 1
_ECHO_PAYLOAD = b"ztna health check"
_ICMP_ECHO_REQUEST = 8
_ICMP6_ECHO_REQUEST = 128
_ECHO_HEAD_BYTES = 8
_SIZE = re.compile(r"\s+")


class Prober:
    """Checks backends, CHECKS_AT_ONCE at a time. `addresses` has the last known address of each backend's host."""

    def __init__(self) -> None:
        self.addresses: dict[str, str] = {}
        self._room = asyncio.Semaphore(CHECKS_AT_ONCE)
        self._tls = CheckTls()
        self._http = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=CHECKS_AT_ONCE, force_close=True),
            cookie_jar=aiohttp.DummyCookieJar(),
        )
        self._kinds: Mapping[Kind, Callable[[Check, SockAddr], Awaitable[Outcome]]] = {
            "tcp": _tcp,
            "udp": _udp,
            "http": self._ask_http,
            "grpc": self._ask_grpc,
            "icmp": _icmp,
            "script": _script,
            "none": _nothing,
        }

    async def probe(self, check: Check) -> Outcome:
        """Check a backend once; never raises for what the backend does."""
        timeout_s = check.config.timeout_s
        async with self._room:
            try:
                async with asyncio.timeout(timeout_s):
                    address = await resolve(check.target)
                    self.addresses[check.target.host] = address[0]
                    return await self._kinds[check.kind](check, address)
            except TimeoutError:
                return Outcome(False, f"{check.kind} {check.target}: no answer in {timeout_s:g} s")
            except (OSError, aiohttp.ClientError, GrpcFailed, ConfigError, ValueError) as error:
                return Outcome(False, f"{check.kind} {check.target}: {_said(error)}")

    async def locate(self, check: Check) -> None:
        """Learn the address of a backend that somebody else checks; what has none now keeps the one it had."""
        with suppress(TimeoutError, OSError):
            async with self._room, asyncio.timeout(check.config.timeout_s):
                self.addresses[check.target.host] = (await resolve(check.target))[0]

    def keep_only(self, checks: Iterable[Check]) -> None:
        """Forget what was made for checks that are no more."""
        self._tls.keep_only(checks)

    async def close(self) -> None:
        """Close what checks have open."""
        await self._http.close()

    async def _ask_http(self, check: Check, _address: SockAddr) -> Outcome:
        config = check.config
        async with self._http.request(
            config.method,
            check.url,
            headers=check.headers,
            allow_redirects=False,
            ssl=self._tls.context(check) if config.tls else False,
            server_hostname=config.tls_name if config.tls else None,
        ) as response:
            text = f"{config.method} {config.path}: {response.status}"
            if not check.takes(response.status):
                return Outcome(False, text)
            if missed := check.misses(list(response.headers.items())):
                return Outcome(False, f"{text}, but {missed}")
            if check.body is None:
                return Outcome(True, text)
            body = await _read_most(response.content)
            if check.body.search(body):
                return Outcome(True, text)
            return Outcome(False, f"{text}, but the answer does not match {config.body!r}")

    async def _ask_grpc(self, check: Check, address: SockAddr) -> Outcome:
        config = check.config
        context = self._tls.context(check) if config.tls else None
        status = await ask_health(
            address,
            config.grpc_service,
            authority=config.tls_name or str(check.target),
            context=context,
            server_name=config.tls_name or check.target.host,
        )
        return Outcome(status == "SERVING", f"grpc {config.grpc_service or check.target}: {status}")


def _said(error: Exception) -> str:
    if isinstance(error, ConnectionError) and error.errno:
        # asyncio's own text has the call and the address, but not what happened.
        return os.strerror(error.errno)
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


async def _read_most(content: aiohttp.StreamReader) -> bytes:
    body = b""
    while len(body) < BODY_BYTES_MAX:
        part = await content.read(BODY_BYTES_MAX - len(body))
        if not part:
            break
        body += part
    return body


async def _nothing(_check: Check, _address: SockAddr) -> Outcome:
    return Outcome(True, "not checked")


async def _tcp(check: Check, address: SockAddr) -> Outcome:
    where = f"tcp {address[0]}:{address[1]}"
    loop = asyncio.get_running_loop()
    sock = await connect_tcp(address)
    try:
        if check.introduction or check.send:
            await loop.sock_sendall(sock, check.introduction + check.send)
        if check.expect is None:
            return Outcome(True, f"{where}: connected")
        reply = b""
        while check.expect not in reply and len(reply) < OUTPUT_BYTES_MAX:
            part = await loop.sock_recv(sock, OUTPUT_BYTES_MAX)
            if not part:
                break
            reply += part
        return _expected(check, where, reply)
    finally:
        sock.close()


async def _udp(check: Check, address: SockAddr) -> Outcome:
    """Send a datagram: an ICMP error is a failure; silence is one only where a reply is expected."""
    where = f"udp {address[0]}:{address[1]}"
    silence_s = UDP_SILENCE_SECONDS if check.expect is None else None
    with connected_udp(address) as sock:
        sock.send(check.send)
        if not await _becomes_readable(sock, silence_s):
            return Outcome(True, f"{where}: no ICMP error")
        _raise_pending(sock)
        if check.expect is None:
            return Outcome(True, f"{where}: answered")
        return _expected(check, where, sock.recv(OUTPUT_BYTES_MAX))


def _expected(check: Check, where: str, reply: bytes) -> Outcome:
    if check.expect is not None and check.expect in reply:
        return Outcome(True, f"{where}: answered as expected")
    return Outcome(False, f"{where}: expected {check.config.expect!r}, got {_shown(reply)!r}")


async def _icmp(check: Check, address: SockAddr) -> Outcome:
    """Ping by an unprivileged socket: checksum and identifier are the kernel's, and so is whose reply it is."""
    try:
        sock = connected_ping(address)
    except PermissionError:
        return Outcome(False, f"icmp: {ping_problem()}")
    kind = _ICMP6_ECHO_REQUEST if sock.family == socket.AF_INET6 else _ICMP_ECHO_REQUEST
    with sock:
        sock.send(bytes((kind, 0, 0, 0, 0, 0, 0, 1)) + _ECHO_PAYLOAD)
        while await _becomes_readable(sock, None):
            _raise_pending(sock)
            if sock.recv(OUTPUT_BYTES_MAX)[_ECHO_HEAD_BYTES:] == _ECHO_PAYLOAD:
                break
    return Outcome(True, f"icmp {address[0]}: answered")


async def _script(check: Check, address: SockAddr) -> Outcome:
    """Run the command in a process group of its own, which ends with the check. Exit status as in Consul."""
    name = Path(check.config.command[0]).name
    process = await asyncio.create_subprocess_exec(
        *check.config.command,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        start_new_session=True,
        env=os.environ | {"ZTNA_BACKEND": str(check.target), "ZTNA_BACKEND_IP": address[0]},
    )
    try:
        assert process.stdout is not None
        output = await _read_all(process.stdout)
        status = await process.wait()
    finally:
        # Whatever it started and left behind ends too.
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        with suppress(TimeoutError):
            async with asyncio.timeout(KILL_SECONDS):
                await process.wait()
    text = f"{name}: {_shown(output) or f'status {status}'}"
    return Outcome(status in (0, _WARNING_STATUS), text, is_warning=status == _WARNING_STATUS)


async def _read_all(stream: asyncio.StreamReader) -> bytes:
    """Read to the end, keeping the first OUTPUT_BYTES_MAX bytes."""
    kept = b""
    while part := await stream.read(OUTPUT_BYTES_MAX):
        kept += part[: OUTPUT_BYTES_MAX - len(kept)]
    return kept


def _shown(data: bytes) -> str:
    """Return what a backend said as one line."""
    return _SIZE.sub(" ", data.decode(errors="replace")).strip()


def _raise_pending(sock: socket.socket) -> None:
    """Raise the OSError that an ICMP error left at a socket."""
    error = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
    if error:
        raise OSError(error, os.strerror(error))


async def _becomes_readable(sock: socket.socket, timeout_s: float | None) -> bool:
    """Wait for a datagram or an ICMP error.

    Through an epoll set of its own: the loop's poller gives up a descriptor that has an error waiting.
    """
    loop = asyncio.get_running_loop()
    ready: asyncio.Future[None] = loop.create_future()
    with select.epoll() as waiting:
        waiting.register(sock.fileno(), select.EPOLLIN)
        loop.add_reader(waiting.fileno(), _settle, ready)
        try:
            await asyncio.wait((ready,), timeout=timeout_s)
        finally:
            loop.remove_reader(waiting.fileno())
    return ready.done()


def _settle(ready: asyncio.Future[None]) -> None:
    if not ready.done():
        ready.set_result(None)
