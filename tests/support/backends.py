"""Backends that tests put behind connectors: UDP echo, byte streams of any size, half-close both ways.

Run as a program: `python -m tests.support.backends --address A --udp P --http P --counting P --speaking P
--tcp P`.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import signal
import socket
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import cast

BLOCK_BYTES = 1 << 20


def block(seed: int) -> bytes:
    """Return a MiB that only this seed gives."""
    return hashlib.shake_128(b"block %d" % seed).digest(BLOCK_BYTES)


def stream_digest(seed: int, size: int) -> str:
    """Return the SHA-256 of what `/bytes/<size>/<seed>` sends."""
    digest, piece = hashlib.sha256(), block(seed)
    for _ in range(size // BLOCK_BYTES):
        digest.update(piece)
    digest.update(piece[: size % BLOCK_BYTES])
    return digest.hexdigest()


class Echo(asyncio.DatagramProtocol):
    """Send back `<label>` and the datagram; with no label the datagram alone."""

    def __init__(self, label: bytes) -> None:
        self._label = label

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.DatagramTransport, transport)  # asyncio's own is no subclass in 3.11

    def datagram_received(self, data: bytes, addr: tuple[str, int]) -> None:
        self._transport.sendto(self._label + data, addr)


@dataclass
class Seen:
    """What the backends saw, told at `/sent` and `/received`."""

    sent: int = 0
    received: int = 0
    connections: int = 0


async def http(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, seen: Seen, label: str) -> None:
    """Answer one GET: `/bytes/<size>/<seed>`, `/sent`, `/received`, `/connections`, else the label."""
    request = await reader.readuntil(b"\r\n\r\n")
    seen.connections += 1
    path = request.split(b" ")[1].decode()
    if path.startswith("/bytes/"):
        size, seed = map(int, path.split("/")[2:4])
        writer.write(b"HTTP/1.0 200 OK\r\nContent-Length: %d\r\n\r\n" % size)
        piece = block(seed)
        while size:
            now = piece[: min(size, BLOCK_BYTES)]
            writer.write(now)
            await writer.drain()
            size -= len(now)
            seen.sent += len(now)
        return
    told = {"/sent": str(seen.sent), "/received": str(seen.received), "/connections": str(seen.connections)}
    body = told.get(path, f"hello from {label}\n").encode()
    writer.write(b"HTTP/1.0 200 OK\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
    await writer.drain()


async def counting(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Read to the other's end of sending, then tell count and SHA-256: the client closes its side first."""
    digest, count = hashlib.sha256(), 0
    while data := await reader.read(BLOCK_BYTES):
        digest.update(data)
        count += len(data)
    writer.write(b"%d %s\n" % (count, digest.hexdigest().encode()))
    await writer.drain()


async def echoing(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Send everything back, as it comes."""
    while data := await reader.read(BLOCK_BYTES):
        writer.write(data)
        await writer.drain()


async def speaking(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, seen: Seen) -> None:
    """Greet and close our side first, then go on reading: what came is told at `/received`."""
    writer.write(b"greeting\n")
    writer.write_eof()
    while data := await reader.read(BLOCK_BYTES):
        seen.received += len(data)


async def serve(arguments: argparse.Namespace) -> None:
    """Open what was asked for and run until SIGTERM."""
    loop, stopping, seen = asyncio.get_running_loop(), asyncio.Event(), Seen()
    loop.add_signal_handler(signal.SIGTERM, stopping.set)

    def closing(body: Callable[..., object], *extra: object) -> Callable[..., object]:
        async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            sock = writer.get_extra_info("socket")
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            try:
                await body(reader, writer, *extra)  # type: ignore[misc]
            except (ConnectionError, asyncio.IncompleteReadError):
                pass
            finally:
                writer.close()

        return handle

    address = arguments.address
    if arguments.udp:
        await loop.create_datagram_endpoint(
            lambda: Echo(arguments.label.encode()), local_addr=(address, arguments.udp)
        )
    for port, handler in (
        (arguments.http, closing(http, seen, arguments.label or "backend")),
        (arguments.counting, closing(counting)),
        (arguments.speaking, closing(speaking, seen)),
        (arguments.tcp, closing(echoing)),
    ):
        if port:
            await asyncio.start_server(handler, address, port, backlog=1024)  # type: ignore[arg-type]
    if arguments.ready:
        Path(arguments.ready).touch()
    await stopping.wait()


def main() -> None:
    """Parse the ports and serve."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--address", default="127.0.0.1")
    parser.add_argument("--label", default="")
    parser.add_argument("--ready", help="a file to make once everything listens")
    for name in ("udp", "http", "counting", "speaking", "tcp"):
        parser.add_argument(f"--{name}", type=int, default=0)
    asyncio.run(serve(parser.parse_args()))


if __name__ == "__main__":
    main()
