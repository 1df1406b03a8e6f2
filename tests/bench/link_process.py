"""One end of a QUIC connection that carries datagrams one way: `link_process ENGINE ROLE TLS [PORT]`.

ENGINE is `ours` (ztna.quic) or `aioquic` (its own asyncio), both on uvloop; TLS.pem and TLS.key are its certificate.
The receiver prints its port and answers each line with what arrived so far; the sender answers each line, a number,
when it has sent so many.
"""

from __future__ import annotations

import asyncio
import ssl
import sys
from collections.abc import Callable
from pathlib import Path

import uvloop
from aioquic.asyncio import QuicConnectionProtocol, connect, serve
from aioquic.quic import events
from aioquic.quic.configuration import QuicConfiguration

from tests.support.quic import ALPN, Dialling, Listening, Recorder, settings
from ztna.config import TlsConfig
from ztna.credentials import Credentials
from ztna.quic import Connection

DATAGRAM_BYTES = 1200
WAITING = 300
"""Datagrams that the sender keeps in the engine's queue."""


class Commands:
    """Lines of the input."""

    def __init__(self) -> None:
        self._reader = asyncio.StreamReader()

    async def open(self) -> Commands:
        await asyncio.get_running_loop().connect_read_pipe(
            lambda: asyncio.StreamReaderProtocol(self._reader), sys.stdin
        )
        return self

    async def next(self) -> str:
        return (await self._reader.readline()).decode().strip()


class _Counter(Recorder):
    """Counts and forgets."""

    arrived = 0

    def datagram_received(self, data: bytes) -> None:
        _Counter.arrived += 1


class _CountingProtocol(QuicConnectionProtocol):
    def quic_event_received(self, event: events.QuicEvent) -> None:
        if isinstance(event, events.DatagramFrameReceived):
            _Counter.arrived += 1


async def pour(
    count: int, waiting: Callable[[], int], send: Callable[[], None], flush: Callable[[], None]
) -> None:
    """Send so many, never more than WAITING ahead of the engine."""
    while count:
        ahead = min(count, WAITING - waiting())
        for _ in range(ahead):
            send()
        count -= max(0, ahead)
        flush()
        await asyncio.sleep(0)
    while waiting():
        await asyncio.sleep(0.001)


async def receive_ours(tls: Path, commands: Commands) -> None:
    """Receive with ztna.quic."""
    listening = Listening(_credentials(tls), settings())
    listening.server._factory = _Counter
    await _report(listening.address[1], commands)
    listening.close()


async def send_ours(tls: Path, port: int, commands: Commands) -> None:
    """Send with ztna.quic."""
    dialling = Dialling(("127.0.0.1", port), _credentials(tls), settings())
    connection: Connection = (await dialling.connect()).connection
    data = bytes(DATAGRAM_BYTES)
    print("ready", flush=True)
    while line := await commands.next():
        await pour(
            int(line),
            lambda: len(connection._engine._datagrams),
            lambda: connection.send_datagram(data),  # type: ignore[arg-type, return-value]
            lambda: None,
        )
        print("{}", flush=True)
    dialling.close()


async def receive_aioquic(tls: Path, commands: Commands) -> None:
    """Receive with aioquic's own server."""
    config = QuicConfiguration(is_client=False, alpn_protocols=[ALPN], max_datagram_frame_size=65536)
    config.load_cert_chain(tls.with_suffix(".pem"), tls.with_suffix(".key"))
    server = await serve("127.0.0.1", 0, configuration=config, create_protocol=_CountingProtocol)
    await _report(server._transport.get_extra_info("sockname")[1], commands)
    server.close()


async def send_aioquic(tls: Path, port: int, commands: Commands) -> None:
    """Send with aioquic's own client."""
    config = QuicConfiguration(
        is_client=True,
        alpn_protocols=[ALPN],
        max_datagram_frame_size=65536,
        max_datagram_size=1350,
        verify_mode=ssl.CERT_NONE,
    )
    async with connect("127.0.0.1", port, configuration=config) as protocol:
        quic, data = protocol._quic, bytes(DATAGRAM_BYTES)
        print("ready", flush=True)
        while line := await commands.next():
            await pour(
                int(line),
                lambda: len(quic._datagrams_pending),
                lambda: quic.send_datagram_frame(data),
                protocol.transmit,
            )
            print("{}", flush=True)


async def _report(port: int, commands: Commands) -> None:
    print(port, flush=True)
    while await commands.next():
        print(f'{{"arrived": {_Counter.arrived}}}', flush=True)


def _credentials(tls: Path) -> Credentials:
    return Credentials.load(
        TlsConfig(certificate=f"{tls}.pem", key=f"{tls}.key", ca=str(tls.parent / "ca" / "ca.pem"))
    )


async def main() -> None:
    """Be what the arguments say."""
    engine, role, tls, *port = sys.argv[1:]
    commands = await Commands().open()
    if role == "receive":
        await {"ours": receive_ours, "aioquic": receive_aioquic}[engine](Path(tls), commands)
    else:
        await {"ours": send_ours, "aioquic": send_aioquic}[engine](Path(tls), int(port[0]), commands)


if __name__ == "__main__":
    uvloop.run(main())
