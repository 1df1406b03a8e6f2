"""An application as orchestrators want it: it answers, and at SIGTERM lets those finish who hold a connection.

Run as a program: `leaving_app.py PORT LABEL`. `GET /held` answers line by line, each with what it was sent, and says
`leaving` once it was told to end; any other GET answers `hello from LABEL` and closes.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
import sys


class App:
    """What is held, and whether it is told to end."""

    def __init__(self, label: str) -> None:
        self._label = label
        self._held: set[asyncio.StreamWriter] = set()
        self._is_leaving = False
        self._empty = asyncio.Event()

    async def serve(self, port: int) -> None:
        """Serve until SIGTERM, then until nobody holds a connection any more."""
        stopping = asyncio.Event()
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stopping.set)
        server = await asyncio.start_server(self._connected, "127.0.0.1", port)
        await stopping.wait()
        self._is_leaving = True
        server.close()
        for each in self._held:
            each.write(b"leaving\n")
        while self._held:
            self._empty.clear()
            await self._empty.wait()

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            request = await reader.readuntil(b"\r\n\r\n")
            if request.startswith(b"GET /held "):
                await self._hold(reader, writer)
            else:
                body = f"hello from {self._label}\n".encode()
                writer.write(b"HTTP/1.0 200 OK\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
                await writer.drain()
        writer.close()

    async def _hold(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._held.add(writer)
        writer.write(f"HTTP/1.0 200 OK\r\n\r\nheld by {self._label}\n".encode())
        try:
            while line := await reader.readline():
                writer.write(line)
                await writer.drain()
        finally:
            self._held.discard(writer)
            self._empty.set()


if __name__ == "__main__":
    asyncio.run(App(sys.argv[2]).serve(int(sys.argv[1])))
