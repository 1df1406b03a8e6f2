"""Lets what reaches a published port of an agent's container into a service: ztna.testing starts it there.

    python -m ztna.container.gate tcp|udp LISTEN_PORT ADDRESS PORT

Programs elsewhere cannot call a virtual address of the container's own loopback; this listens for them, calls it, and
copies both ways. It goes on in the background once it listens: whoever started it then sees exit status 0.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import struct
import sys
from typing import cast

READ_BYTES = 256 * 1024
PEERS_MAX = 256
"""Senders of datagrams that have a socket of their own towards the service; the longest unheard one gives way."""

_AT_ONCE = struct.pack("ii", 1, 0)

Sender = tuple[str, int]


class _Datagrams(asyncio.DatagramProtocol):
    """Gives each sender a socket of its own, so that an answer reaches only who asked."""

    def __init__(self, target: Sender) -> None:
        self._target = target
        self._peers: dict[Sender, socket.socket] = {}

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.DatagramTransport, transport)

    def datagram_received(self, data: bytes, addr: Sender) -> None:
        sock = self._peers.pop(addr, None) or self._dial(addr)
        self._peers[addr] = sock
        with contextlib.suppress(OSError):  # refused, as UDP may be: the sender hears nothing
            sock.send(data)

    def _dial(self, sender: Sender) -> socket.socket:
        loop = asyncio.get_running_loop()
        if len(self._peers) >= PEERS_MAX:
            oldest = self._peers.pop(next(iter(self._peers)))
            loop.remove_reader(oldest)
            oldest.close()
        sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        sock.setblocking(False)
        sock.connect(self._target)
        loop.add_reader(sock, self._answer, sock, sender)
        return sock

    def _answer(self, sock: socket.socket, sender: Sender) -> None:
        with contextlib.suppress(OSError):  # an ICMP error of an earlier datagram
            self._transport.sendto(sock.recv(READ_BYTES), sender)


class _Connections:
    """Calls the service for each connection and passes bytes and ends of streams on."""

    def __init__(self, target: Sender) -> None:
        self._target = target

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Carry one connection to its end."""
        try:
            there, back = await asyncio.open_connection(*self._target)
        except OSError:
            _reset(writer)
            return
        try:
            async with asyncio.TaskGroup() as both:
                both.create_task(_copy(reader, back), name="there")
                both.create_task(_copy(there, writer), name="back")
        except* OSError:
            _reset(writer)
            _reset(back)
        finally:
            writer.close()
            back.close()


def _reset(writer: asyncio.StreamWriter) -> None:
    """End a connection as the one on the other side was ended (SO_LINGER, socket(7))."""
    sock = writer.get_extra_info("socket")
    with contextlib.suppress(OSError):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _AT_ONCE)
    writer.transport.abort()


async def _copy(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
    while data := await source.read(READ_BYTES):
        sink.write(data)
        await sink.drain()
    sink.write_eof()


async def _serve(listener: socket.socket, target: Sender) -> None:
    loop = asyncio.get_running_loop()
    stopping = asyncio.Event()
    loop.add_signal_handler(signal.SIGTERM, stopping.set)
    if listener.type == socket.SOCK_STREAM:
        await asyncio.start_server(_Connections(target).serve, sock=listener)
    else:
        await loop.create_datagram_endpoint(lambda: _Datagrams(target), sock=listener)
    await stopping.wait()


def main(protocol: str, port: str, address: str, target_port: str) -> None:
    """Listen, leave the foreground, and serve."""
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM if protocol == "tcp" else socket.SOCK_DGRAM)
    listener.bind(("0.0.0.0", int(port)))
    if protocol == "tcp":
        listener.listen()
    listener.setblocking(False)
    if os.fork():
        return
    os.setsid()
    nowhere = os.open(os.devnull, os.O_RDWR)
    for number in range(3):
        os.dup2(nowhere, number)
    asyncio.run(_serve(listener, (address, int(target_port))))


if __name__ == "__main__":
    main(*sys.argv[1:])
