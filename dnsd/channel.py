"""Messages, with open sockets where wanted, between dnsd and a worker of it. What they mean is dnsd.feed's.

A packet of the seqpacket socket is one byte, whether more of the message follows, and a part of it; sockets come
with the first packet (unix(7), SCM_RIGHTS).
"""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Callable, Sequence

from dnsd.snapshot import SNAPSHOT_BYTES_MAX
from ztna.errors import ProtocolError

PACKET_BYTES = 32_768
MESSAGE_BYTES_MAX = SNAPSHOT_BYTES_MAX
"""A message may be one service with all its instances, so as large as all the names may be."""
SOCKETS_MAX = 2
_LAST, _MORE = b"\0", b"\1"


class Channel:
    """One end; it reads in one task, and sends from any."""

    def __init__(self, sock: socket.socket) -> None:
        """Take over one socket of a pair that `pair` made."""
        self._sock = sock
        self._sending = asyncio.Lock()
        sock.setblocking(False)

    async def send(self, message: bytes, sockets: Sequence[socket.socket] = ()) -> None:
        """Send a message once there is room for it; the sockets stay open here. Raises OSError without a reader."""
        fds = [each.fileno() for each in sockets]
        async with self._sending:
            for start in range(0, max(1, len(message)), PACKET_BYTES):
                end = start + PACKET_BYTES
                packet = (_MORE if end < len(message) else _LAST) + message[start:end]
                await self._send_packet(packet, [] if start else fds)

    async def receive(self) -> tuple[bytes, list[socket.socket]] | None:
        """Return the next message and the sockets that came with it, None when the other end is closed.

        Raises ProtocolError for a message over MESSAGE_BYTES_MAX.
        """
        parts: list[bytes] = []
        sockets: list[socket.socket] = []
        size = 0
        while True:
            packet, fds = await self._receive_packet()
            sockets += [socket.socket(fileno=fd) for fd in fds]
            if not packet:
                for each in sockets:
                    each.close()
                return None
            parts.append(packet[1:])
            size += len(packet)
            if size > MESSAGE_BYTES_MAX:
                raise ProtocolError(f"a message over {MESSAGE_BYTES_MAX} bytes")
            if packet[:1] == _LAST:
                return b"".join(parts), sockets

    def close(self) -> None:
        """End it; the other end reads so."""
        self._sock.close()

    async def _send_packet(self, packet: bytes, fds: Sequence[int]) -> None:
        while True:
            try:
                socket.send_fds(self._sock, [packet], fds)
            except BlockingIOError:
                loop = asyncio.get_running_loop()
                await _ready(loop.add_writer, loop.remove_writer, self._sock.fileno())
            else:
                return

    async def _receive_packet(self) -> tuple[bytes, list[int]]:
        while True:
            try:
                packet, fds, _, _ = socket.recv_fds(self._sock, PACKET_BYTES + 1, SOCKETS_MAX)
            except BlockingIOError:
                loop = asyncio.get_running_loop()
                await _ready(loop.add_reader, loop.remove_reader, self._sock.fileno())
            except ConnectionResetError:
                # The other end was closed while something that we sent was still unread there.
                return b"", []
            else:
                for fd in fds:
                    # Python 3.11 gives MSG_CMSG_CLOEXEC to nobody.
                    os.set_inheritable(fd, False)
                return packet, fds


def pair() -> tuple[socket.socket, socket.socket]:
    """Return the sockets of the two ends; neither reaches a child that is not given it."""
    return socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)


async def _ready(
    add: Callable[[int, Callable[[], None]], object], remove: Callable[[int], object], fd: int
) -> None:
    """Wait until a descriptor can be read or written, as `add` has it."""
    ready = asyncio.Event()
    add(fd, ready.set)
    try:
        await ready.wait()
    finally:
        remove(fd)
