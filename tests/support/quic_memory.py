"""A server of our driver in memory and bare aioquic clients: every packet can be seen, kept, made up and counted."""

from __future__ import annotations

import time
from typing import Any

from aioquic import tls
from aioquic.quic.connection import QuicConnection

from tests.support.certificates import Pki, Presented
from tests.support.hostile import client_connection
from tests.support.quic import ALPN, Recorder, settings
from ztna.quic import Packets, Server
from ztna.udp import SockAddr

HERE = ("127.0.0.1", 1111)


class Bench:
    """The server sends into `sent`; `pump` carries what a client and the server have for each other."""

    def __init__(self, pki: Pki, **changes: Any) -> None:
        self.pki = pki
        self.sent: Packets = []
        self.handlers: list[Recorder] = []
        self.seen: list[bytes] = []
        self.presented: Presented = pki.signed(dns=["agent.echo-service.ztna"])
        self.server = Server(
            self,
            pki.credentials(pki.relay()),
            settings(**changes),
            admit=lambda identity, alpn: None,
            factory=self._handler,
        )

    def send(self, packets: Packets) -> None:
        self.sent += packets

    def _handler(self, connection: object) -> Recorder:
        self.handlers.append(Recorder(connection))  # type: ignore[arg-type]
        return self.handlers[-1]

    def begin(self, address: SockAddr = HERE, presented: Presented | None = None) -> QuicConnection:
        """Return a client whose first flight waits to be carried."""
        client = client_connection(ALPN, presented)
        client.connect(address, time.monotonic())
        return client

    def connect(self, address: SockAddr = HERE) -> QuicConnection:
        client = self.begin(address, self.presented)
        for _ in range(10):
            self.pump(client, address)
            if client._handshake_confirmed:
                return client
        raise AssertionError("no handshake")

    def pump(self, client: QuicConnection, address: SockAddr = HERE) -> None:
        """Carry packets one way and back."""
        packets = client.datagrams_to_send(time.monotonic())
        self.seen += [data for data, _ in packets]
        self.server.packets_received([(data, address) for data, _ in packets])
        back, self.sent = self.sent, []
        self.seen += [data for data, _ in back]
        for data, _ in back:
            client.receive_datagram(data, address, time.monotonic())


def sealed(client: QuicConnection, payload: bytes, number: int) -> bytes:
    """Return a 1-RTT packet of a client with any payload."""
    header = b"\x41" + client._peer_cid.cid + (number & 0xFFFF).to_bytes(2, "big")
    return client._cryptos[tls.Epoch.ONE_RTT].send.encrypt_packet(
        header, payload + bytes(max(0, 4 - len(payload))), number
    )
