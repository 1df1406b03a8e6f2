"""The three sample backends of `ztna up`: a UDP echo, a web page, a database that is down at first.

They are ordinary local services that know nothing of the mesh. `POST /db/up` and `POST /db/down` on the
web page's own port start and stop the third.
"""

from __future__ import annotations

import argparse
import asyncio
import signal
from typing import cast

from aiohttp import web

LINE_BYTES_MAX = 64 * 1024


class UdpEcho(asyncio.DatagramProtocol):
    """Send every datagram back to whoever sent it."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.DatagramTransport, transport)  # asyncio's own is no subclass in 3.11

    def datagram_received(self, data: bytes, addr: tuple[str, int]) -> None:
        self._transport.sendto(data, addr)


class LineDatabase:
    """A TCP service that answers each line with `ok <line>`; it can be opened and closed."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._server: asyncio.Server | None = None

    async def open(self) -> None:
        """Listen; does nothing when already listening."""
        if self._server is None:
            self._server = await asyncio.start_server(
                self._serve, "127.0.0.1", self._port, limit=LINE_BYTES_MAX
            )

    async def close(self) -> None:
        """Stop listening; does nothing when already down."""
        if self._server is not None:
            server, self._server = self._server, None
            server.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while line := await reader.readline():
                writer.write(b"ok " + line)
                await writer.drain()
        except (ValueError, ConnectionError):
            pass  # a line over the bound, or the client went: this connection ends, the service goes on
        finally:
            writer.close()


def web_app(database: LineDatabase) -> web.Application:
    """Return the sample page; `/` greets, `/db/up` and `/db/down` switch the database."""

    async def index(request: web.Request) -> web.Response:
        return web.Response(text=f"hello from web-app, you asked for {request.host}\n")

    async def up(_: web.Request) -> web.Response:
        await database.open()
        return web.Response(text="db is up\n")

    async def down(_: web.Request) -> web.Response:
        await database.close()
        return web.Response(text="db is down\n")

    app = web.Application()
    app.router.add_get("/", index)
    app.router.add_post("/db/up", up)
    app.router.add_post("/db/down", down)
    return app


async def serve(echo_port: int, web_port: int, database_port: int) -> None:
    """Run the three backends on 127.0.0.1 until SIGTERM or SIGINT."""
    loop = asyncio.get_running_loop()
    stopping = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopping.set)
    database = LineDatabase(database_port)
    transport, _ = await loop.create_datagram_endpoint(UdpEcho, local_addr=("127.0.0.1", echo_port))
    runner = web.AppRunner(web_app(database), access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", web_port).start()
    await stopping.wait()
    transport.close()
    await database.close()
    await runner.cleanup()


def main() -> None:
    """Parse the three ports and serve."""
    parser = argparse.ArgumentParser(prog="python -m ztna.cli.samples", description=__doc__)
    parser.add_argument("--echo-port", type=int, required=True)
    parser.add_argument("--web-port", type=int, required=True)
    parser.add_argument("--database-port", type=int, required=True)
    arguments = parser.parse_args()
    asyncio.run(serve(arguments.echo_port, arguments.web_port, arguments.database_port))


if __name__ == "__main__":
    main()
