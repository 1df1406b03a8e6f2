"""The sockets that DNS is answered on: UDP and TCP on one port, each pair alone or beside others (SO_REUSEPORT)."""

from __future__ import annotations

import socket
from typing import NamedTuple

from ztna.config import Endpoint
from ztna.errors import ZtnaError
from ztna.listening import bind_error
from ztna.udp import SockAddr, bind_udp

TCP_BACKLOG = 128
BIND_ATTEMPTS = 16
"""How often another free port is tried when port 0 was asked for and TCP does not get UDP's."""


class Sockets(NamedTuple):
    """A bound UDP socket and a TCP socket that listens, neither of which blocks."""

    udp: socket.socket
    tcp: socket.socket

    @property
    def address(self) -> SockAddr:
        """Where both are."""
        host, port = self.udp.getsockname()[:2]
        return host, port

    def close(self) -> None:
        """Close both; harmless twice."""
        self.udp.close()
        self.tcp.close()


def bind(endpoint: Endpoint, *, shared: bool = False) -> Sockets:
    """Bind UDP and TCP to the same port; port 0 takes a free one. Raises ZtnaError naming a taken port.

    A `shared` port can be bound again in the same way, by this user alone.
    """
    attempt = 0
    while True:
        attempt += 1
        udp = bind_udp((endpoint.host, endpoint.port), reuse_port=shared)
        host, port = udp.getsockname()[:2]
        try:
            return Sockets(udp, _listen_tcp(host, port, shared=shared))
        except OSError as error:
            udp.close()
            if endpoint.port or attempt == BIND_ATTEMPTS:
                raise bind_error(endpoint, error) from None


def bind_several(endpoint: Endpoint, count: int) -> list[Sockets]:
    """Bind so many pairs to one port, between which the kernel spreads what comes. Raises ZtnaError as `bind`."""
    # Another dnsd that shares its port, too, would otherwise be given half of our questions.
    alone = bind(endpoint)
    address = Endpoint(*alone.address)
    alone.close()
    bound: list[Sockets] = []
    try:
        for _ in range(count):
            bound.append(bind(address, shared=True))
    except ZtnaError:
        for each in bound:
            each.close()
        raise
    return bound


def _listen_tcp(host: str, port: int, *, shared: bool) -> socket.socket:
    sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        sock.setblocking(False)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if shared:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        sock.bind((host, port))
        sock.listen(TCP_BACKLOG)
    except OSError:
        sock.close()
        raise
    return sock
