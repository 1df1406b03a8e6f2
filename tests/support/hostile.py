"""Hostile QUIC peers: they show any chain or none, and send data in the same flight as their Finished.

Built on bare aioquic, so that nothing of our driver can keep them honest.
"""

from __future__ import annotations

import asyncio
import ssl
import time
from collections.abc import Callable, Mapping, Sequence

from aioquic.quic import events
from aioquic.quic.configuration import QuicConfiguration
from aioquic.quic.connection import QuicConnection
from aioquic.quic.packet import QuicProtocolVersion

from tests.support.certificates import Presented

Address = tuple[str, int]
Close = tuple[int, int | None, str]
"""Code, frame type (None: an application close) and phrase."""


class _Wire(asyncio.DatagramProtocol):
    def __init__(self, received: Callable[[bytes, Address], None]) -> None:
        self._received = received

    def datagram_received(self, data: bytes, address: Address) -> None:
        self._received(data, address)


def client_connection(alpn: str, presented: Presented | None) -> QuicConnection:
    """Return a bare aioquic client that believes everybody and shows what it is told to."""
    config = QuicConfiguration(
        alpn_protocols=[alpn],
        is_client=True,
        max_datagram_size=1350,
        max_datagram_frame_size=65536,
        server_name="hostile",
        supported_versions=[QuicProtocolVersion.VERSION_1],
        verify_mode=ssl.CERT_NONE,
    )
    if presented is not None:
        config.certificate, *config.certificate_chain = presented.chain
        config.private_key = presented.key
    return QuicConnection(configuration=config)


class HostileClient:
    """Connects with the chain it is told to show; `early` goes out with its Finished, unasked."""

    def __init__(
        self,
        server: Address,
        alpn: str,
        presented: Presented | None,
        *,
        datagrams: Sequence[bytes] = (),
        streams: Mapping[int, bytes] | None = None,
        mangle: Callable[[bytes], bytes] | None = None,
    ) -> None:
        self._server = server
        self._datagrams = datagrams
        self._streams = streams or {}
        self._mangle = mangle
        self._sent_early = False
        self._transport: asyncio.DatagramTransport | None = None
        self.closed: asyncio.Future[Close] = asyncio.get_running_loop().create_future()
        self.confirmed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.received: list[events.QuicEvent] = []
        self.quic = client_connection(alpn, presented)

    async def __aenter__(self) -> HostileClient:
        loop = asyncio.get_running_loop()
        self._transport, _ = await loop.create_datagram_endpoint(
            lambda: _Wire(self._packet), local_addr=("127.0.0.1", 0)
        )
        self.quic.connect(self._server, time.monotonic())
        self.flush()
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._transport is not None
        self._transport.close()

    def flush(self) -> None:
        """Send what the connection has to send."""
        assert self._transport is not None
        for data, address in self.quic.datagrams_to_send(time.monotonic()):
            self._transport.sendto(self._mangle(data) if self._mangle else data, address)

    def send_raw(self, data: bytes) -> None:
        """Send any bytes from this client's address."""
        assert self._transport is not None
        self._transport.sendto(data, self._server)

    def _packet(self, data: bytes, address: Address) -> None:
        self.quic.receive_datagram(data, address, time.monotonic())
        while (event := self.quic.next_event()) is not None:
            self.received.append(event)
        if self.quic._handshake_complete and not self._sent_early:
            # The Finished is still in the queue: this rides in the same flight.
            self._sent_early = True
            for datagram in self._datagrams:
                self.quic.send_datagram_frame(datagram)
            for stream_id, content in self._streams.items():
                self.quic.send_stream_data(stream_id, content)
        self.flush()
        if self.quic._handshake_confirmed and not self.confirmed.done():
            self.confirmed.set_result(None)
        close = self.quic._close_event
        if close is not None and not self.closed.done():
            self.closed.set_result((close.error_code, close.frame_type, close.reason_phrase))


class HostileServer:
    """Accepts one client, shows the chain it is told to, and sends datagrams before the client's Finished."""

    def __init__(self, alpn: str, presented: Presented, *, datagrams: Sequence[bytes] = ()) -> None:
        self._datagrams = datagrams
        self._config = QuicConfiguration(
            alpn_protocols=[alpn],
            connection_id_length=20,
            is_client=False,
            max_datagram_size=1350,
            max_datagram_frame_size=65536,
            certificate=presented.chain[0],
            certificate_chain=list(presented.chain[1:]),
            private_key=presented.key,
        )
        self._quic: QuicConnection | None = None
        self._transport: asyncio.DatagramTransport | None = None
        self.address: Address = ("127.0.0.1", 0)
        self.closed: asyncio.Future[Close] = asyncio.get_running_loop().create_future()

    @property
    def client_chain_shown(self) -> bool:
        """Whether the client showed its certificate before it knew who asked."""
        return self._quic is not None and self._quic.tls._peer_certificate is not None

    async def __aenter__(self) -> HostileServer:
        loop = asyncio.get_running_loop()
        self._transport, _ = await loop.create_datagram_endpoint(
            lambda: _Wire(self._packet), local_addr=("127.0.0.1", 0)
        )
        self.address = self._transport.get_extra_info("sockname")
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._transport is not None
        self._transport.close()

    def _packet(self, data: bytes, address: Address) -> None:
        first = self._quic is None
        if self._quic is None:
            self._quic = QuicConnection(
                configuration=self._config, original_destination_connection_id=data[6 : 6 + data[5]]
            )
            initialize = self._quic._initialize
            quic = self._quic

            def asking(peer_cid: bytes) -> None:
                initialize(peer_cid)
                quic.tls._request_client_certificate = True

            quic._initialize = asking  # type: ignore[method-assign]
        self._quic.receive_datagram(data, address, time.monotonic())
        if first:
            for datagram in self._datagrams:
                self._quic.send_datagram_frame(datagram)
        assert self._transport is not None
        for packet, to in self._quic.datagrams_to_send(time.monotonic()):
            self._transport.sendto(packet, to)
        close = self._quic._close_event
        if close is not None and not self.closed.done():
            self.closed.set_result((close.error_code, close.frame_type, close.reason_phrase))
