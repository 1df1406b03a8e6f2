"""MB/s and CPU seconds per GB through one agent and connector pair of stream carriers on loopback.

Each end is a process of its own; a stunnel pair with the same certificates is measured in turn where it is installed.
Prints medians, and in parentheses the ratio to the last pair: `python -m tests.bench.bench_stream [MB]`.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import multiprocessing.connection
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from functools import partial
from ipaddress import IPv4Address
from pathlib import Path
from statistics import median

import uvloop

from sidecar.link.budget import Budget
from sidecar.link.listener import StreamListener
from sidecar.link.stream import Carrier
from tests.support.certificates import Pki
from ztna.config import TlsConfig
from ztna.credentials import Credentials
from ztna.identity import Identity
from ztna.names import ServiceName, SessionId
from ztna.wire.control import Address, LeaseRef
from ztna.wire.stream import WINDOW_BYTES_MIN, OpenFrame, ResumeFrame

ROUNDS = 4
SHORT_FLOWS = 1000
SHORT_CONCURRENCY = 8
SHORT_BYTES = 1000
CHUNK = b"x" * (1 << 20)

Pipe = multiprocessing.connection.Connection


def open_frame() -> OpenFrame:
    address = Address("127.0.0.1", 80)
    return OpenFrame(
        SessionId("0" * 16),
        secrets.token_hex(16),
        ServiceName("echo-service"),
        LeaseRef(IPv4Address("127.0.0.1"), 1),
        address,
        address,
        WINDOW_BYTES_MIN,
    )


def run_end(body: Callable[..., Awaitable[None]], pipe: Pipe, *args: object) -> None:
    """Run one end in this process; tell its CPU time whenever the pipe asks."""

    async def with_clock() -> None:
        loop = asyncio.get_running_loop()
        done: asyncio.Future[None] = loop.create_future()

        def asked() -> None:
            pipe.recv()
            pipe.send(time.process_time())

        loop.add_reader(pipe.fileno(), asked)
        await body(pipe, *args)
        await done

    uvloop.run(with_clock())


class OneBackend:
    """The same backend for every flow."""

    def __init__(self, backend: tuple[str, int]) -> None:
        self._backend = backend

    async def open(self, peer: Identity, frame: OpenFrame) -> socket.socket:
        sock = socket.socket()
        sock.setblocking(False)
        await asyncio.get_running_loop().sock_connect(sock, self._backend)
        return sock

    def resume(self, peer: Identity, frame: ResumeFrame, service: ServiceName | None) -> None:
        pass


async def connector(pipe: Pipe, tls: TlsConfig, backend: tuple[str, int]) -> None:
    loop = asyncio.get_running_loop()

    async def serve() -> None:
        async with asyncio.TaskGroup() as tasks:
            listener = StreamListener(
                Credentials.load(tls), OneBackend(backend), tasks=tasks, budget=Budget()
            )
            pipe.send(listener.listen(("127.0.0.1", 0)))
            await loop.create_future()

    loop.create_task(serve())  # noqa: RUF006 (lives as long as the process)


async def agent(pipe: Pipe, tls: TlsConfig, connector_address: tuple[str, int]) -> None:
    loop = asyncio.get_running_loop()
    listening = socket.create_server(("127.0.0.1", 0), backlog=256)
    listening.setblocking(False)
    credentials, budget = Credentials.load(tls), Budget()
    idle: list[Carrier] = []

    async def carry(local: socket.socket) -> None:
        while idle:
            carrier = idle.pop()
            if carrier.is_idle:
                break
        else:
            carrier = await Carrier.dial_direct(
                connector_address, credentials, lambda _: None, budget=budget, timeout_s=5
            )
        flow = await carrier.open(open_frame(), local)
        if await flow.finished:
            idle.append(carrier)

    async def serve() -> None:
        pipe.send(listening.getsockname())
        async with asyncio.TaskGroup() as tasks:
            while True:
                local, _ = await loop.sock_accept(listening)
                tasks.create_task(carry(local))

    loop.create_task(serve())  # noqa: RUF006 (lives as long as the process)


def backend_main(pipe: Pipe) -> None:
    """Send as many MiB as the first 8 bytes ask for; for 0 echo SHORT_BYTES."""
    import threading

    def serve(sock: socket.socket) -> None:
        with sock:
            wanted = int.from_bytes(sock.recv(8, socket.MSG_WAITALL), "big")
            if not wanted:
                sock.sendall(sock.recv(SHORT_BYTES, socket.MSG_WAITALL))
            for _ in range(wanted):
                sock.sendall(CHUNK)

    listening = socket.create_server(("127.0.0.1", 0), backlog=256)
    pipe.send(listening.getsockname())
    while True:
        sock, _ = listening.accept()
        threading.Thread(target=serve, args=(sock,), daemon=True).start()


def download(address: tuple[str, int], megabytes: int) -> None:
    sock = socket.create_connection(address)
    sock.sendall(megabytes.to_bytes(8, "big"))
    buffer = bytearray(1 << 18)
    got = 0
    while size := sock.recv_into(buffer):
        got += size
    assert got == megabytes << 20, got


def short(address: tuple[str, int], flows: int) -> None:
    for _ in range(flows):
        sock = socket.create_connection(address)
        sock.sendall(bytes(8) + bytes(SHORT_BYTES))
        assert len(sock.recv(SHORT_BYTES, socket.MSG_WAITALL)) == SHORT_BYTES
        sock.close()


def in_parallel(count: int, target: Callable[..., None], *args: object) -> float:
    started = time.perf_counter()
    children = [multiprocessing.Process(target=target, args=args) for _ in range(count)]
    for child in children:
        child.start()
    for child in children:
        child.join()
        assert child.exitcode == 0
    return time.perf_counter() - started


def cpu(pipe: Pipe) -> float:
    pipe.send(None)
    answer: float = pipe.recv()
    return answer


def start(target: Callable[..., object], *args: object) -> tuple[Pipe, tuple[str, int]]:
    ours, theirs = multiprocessing.Pipe()
    if target is backend_main:
        child = multiprocessing.Process(target=target, args=(theirs,), daemon=True)
    else:
        child = multiprocessing.Process(target=run_end, args=(target, theirs, *args), daemon=True)
    child.start()
    return ours, tuple(ours.recv())


class Pair:
    """Two ends under test: where programs connect, and the CPU seconds that each end has used."""

    def __init__(self, name: str, address: tuple[str, int], ends: tuple[Callable[[], float], ...]) -> None:
        self.name, self.address, self._ends = name, address, ends

    def cpu(self) -> list[float]:
        return [end() for end in self._ends]


def our_pair(pki: Pki, backend: tuple[str, int]) -> Pair:
    far, far_address = start(connector, pki.connector(), backend)
    near, near_address = start(agent, pki.agent(), far_address)
    return Pair("ztna", near_address, (lambda: cpu(near), lambda: cpu(far)))


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port


def stunnel_pair(pki: Pki, backend: tuple[str, int], running: list[subprocess.Popen[bytes]]) -> Pair | None:
    """Start two stunnels with the same certificates; None when stunnel is not installed."""
    binary = shutil.which("stunnel4") or shutil.which("stunnel")
    if binary is None:
        return None
    near_port, far_port = free_port(), free_port()
    ends = (
        ("agent", pki.agent(), "yes", near_port, f"127.0.0.1:{far_port}"),
        ("connector", pki.connector(), "no", far_port, f"127.0.0.1:{backend[1]}"),
    )
    pids = []
    for name, tls, is_client, accept, target in ends:
        path = pki.directory / f"stunnel-{name}.conf"
        path.write_text(
            f"foreground = yes\npid =\ndebug = 3\n[{name}]\nclient = {is_client}\naccept = 127.0.0.1:{accept}\n"
            f"connect = {target}\ncert = {tls.certificate}\nkey = {tls.key}\nCAfile = {tls.ca}\n"
            "verifyChain = yes\nsslVersion = TLSv1.3\nsocket = l:TCP_NODELAY=1\nsocket = r:TCP_NODELAY=1\n"
        )
        child = subprocess.Popen([binary, str(path)], stderr=subprocess.DEVNULL)
        running.append(child)
        pids.append(child.pid)
    wait_until_listening(near_port)
    wait_until_listening(far_port)
    return Pair("stunnel", ("127.0.0.1", near_port), tuple(partial(cpu_of_process, pid) for pid in pids))


def wait_until_listening(port: int) -> None:
    deadline = time.monotonic() + 5
    while True:
        try:
            socket.create_connection(("127.0.0.1", port)).close()
            return
        except ConnectionRefusedError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.02)


def cpu_of_process(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def bulk(pair: Pair, megabytes: int, flows: int) -> tuple[float, ...]:
    """Return MB/s, and CPU seconds per GB of the agent's and the connector's end."""
    gigabytes = (megabytes // flows * flows << 20) / 1e9
    before = pair.cpu()
    seconds = in_parallel(flows, download, pair.address, megabytes // flows)
    used = [(after - start) / gigabytes for after, start in zip(pair.cpu(), before, strict=True)]
    return gigabytes * 1000 / seconds, *used


def short_flows(pair: Pair) -> tuple[float, ...]:
    """Return flows per second, and CPU microseconds a flow of the agent's and the connector's end."""
    before = pair.cpu()
    seconds = in_parallel(SHORT_CONCURRENCY, short, pair.address, SHORT_FLOWS // SHORT_CONCURRENCY)
    used = [(after - start) / SHORT_FLOWS * 1e6 for after, start in zip(pair.cpu(), before, strict=True)]
    return SHORT_FLOWS / seconds, *used


def report(title: str, unit: str, pairs: list[Pair], measure: Callable[[Pair], tuple[float, ...]]) -> None:
    """Measure the pairs in turn, drop the first round, print medians and ratios to the last pair."""
    rounds = [[measure(pair) for pair in pairs] for _ in range(ROUNDS)][1:]
    medians = [[median(values) for values in zip(*each, strict=True)] for each in zip(*rounds, strict=True)]
    for pair, values in zip(pairs, medians, strict=True):
        ratios = [value / peer for value, peer in zip(values, medians[-1], strict=True)]
        print(
            f"{title:14} {pair.name:8} {values[0]:9.1f} ({ratios[0]:.2f}) {unit}: "
            f"agent {values[1]:7.2f} ({ratios[1]:.2f}), connector {values[2]:7.2f} ({ratios[2]:.2f})",
            flush=True,
        )


def main(megabytes: int) -> None:
    running: list[subprocess.Popen[bytes]] = []
    with tempfile.TemporaryDirectory() as directory:
        pki = Pki(Path(directory))
        _, backend = start(backend_main)
        peer = stunnel_pair(pki, backend, running)
        pairs = [our_pair(pki, backend), *([peer] if peer else [])]
        try:
            for flows in (1, 16):
                report(
                    f"{flows} downloads",
                    "MB/s, CPU s per GB",
                    pairs,
                    partial(bulk, megabytes=megabytes, flows=flows),
                )
            report("short flows", "per s, CPU us each", pairs, short_flows)
        finally:
            for child in running:
                child.terminate()
                child.wait()


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 512)
