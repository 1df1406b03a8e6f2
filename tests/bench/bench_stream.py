"""MB/s and CPU seconds per GB through one agent and connector pair of stream carriers on loopback.

Each end is a process of its own; prints one line per round, per end. `python -m tests.bench.bench_stream [MB] [flows]`.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import multiprocessing.connection
import os
import secrets
import socket
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from ipaddress import IPv4Address
from pathlib import Path

import uvloop

from sidecar.link.budget import Budget
from sidecar.link.stream import Carrier, StreamListener
from tests.support.certificates import Pki
from ztna.config import TlsConfig
from ztna.credentials import Credentials
from ztna.identity import Identity
from ztna.names import ServiceName, SessionId
from ztna.wire.control import Address, LeaseRef
from ztna.wire.stream import WINDOW_BYTES_MIN, OpenFrame

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


async def connector(pipe: Pipe, tls: TlsConfig, backend: tuple[str, int]) -> None:
    loop = asyncio.get_running_loop()

    async def authorise(_peer: Identity, _frame: OpenFrame) -> socket.socket:
        sock = socket.socket()
        sock.setblocking(False)
        await loop.sock_connect(sock, backend)
        return sock

    async def serve() -> None:
        async with asyncio.TaskGroup() as tasks:
            listener = StreamListener(Credentials.load(tls), authorise, tasks=tasks, budget=Budget())
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


def main(megabytes: int, flows: int) -> None:
    with tempfile.TemporaryDirectory() as directory:
        pki = Pki(Path(directory))
        _, backend = start(backend_main)
        far, far_address = start(connector, pki.connector(), backend)
        near, near_address = start(agent, pki.agent(), far_address)
        for _ in range(ROUNDS):
            before = cpu(near), cpu(far)
            seconds = in_parallel(flows, download, near_address, megabytes // flows)
            used = cpu(near) - before[0], cpu(far) - before[1]
            gigabytes = (megabytes // flows * flows << 20) / 1e9
            print(
                f"{flows} flows: {gigabytes * 1000 / seconds:.0f} MB/s, CPU s per GB: "
                f"agent {used[0] / gigabytes:.2f}, connector {used[1] / gigabytes:.2f}",
                flush=True,
            )
        for _ in range(ROUNDS):
            before = cpu(near), cpu(far)
            seconds = in_parallel(SHORT_CONCURRENCY, short, near_address, SHORT_FLOWS // SHORT_CONCURRENCY)
            used = cpu(near) - before[0], cpu(far) - before[1]
            print(
                f"short flows: {SHORT_FLOWS / seconds:.0f} /s, CPU us per flow: "
                f"agent {used[0] / SHORT_FLOWS * 1e6:.0f}, connector {used[1] / SHORT_FLOWS * 1e6:.0f}",
                flush=True,
            )


if __name__ == "__main__":
    arguments = [int(each) for each in sys.argv[1:]] + [1024, 1][len(sys.argv) - 1 :]
    os.environ.setdefault("PYTHONUNBUFFERED", "1")
    main(*arguments)
