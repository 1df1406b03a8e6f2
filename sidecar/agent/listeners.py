"""The sockets local programs call: TCP and UDP on each published port, where sidecar.agent.places says.

Follows the leases; a port that somebody else holds is reported, left, and tried again. Does not know what
becomes of a connection or a datagram: it hands them on.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import socket
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple
from typing import Protocol as Interface

from sidecar.link.flow import abort
from ztna.errors import PacketError, ZtnaError
from ztna.leases import Lease, Protocol
from ztna.names import ServiceName
from ztna.packet import build_echo_reply, build_udp
from ztna.telemetry import dropped, logger
from ztna.udp import SockAddr, bind_udp

RECEIVE_BUFFER_BYTES = 512 * 1024
BACKLOG_CONNECTIONS = 1024
ACCEPTS_PER_WAKEUP = 64
DATAGRAMS_PER_WAKEUP = 64
DATAGRAM_BYTES_MAX = 65_535
HELD_RETRY_SECONDS = 5.0
EXHAUSTED_PAUSE_SECONDS = 0.5

_IPV6_FREEBIND = 78
"""linux/in6.h; a local route alone does not let a program bind an IPv6 address, as it does an IPv4 one."""
_EXHAUSTED = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})
_log = logger(__name__)


class VirtualPort(NamedTuple):
    """A published port of a service: `ip` is the leased address, `at` the one that programs call here."""

    service: ServiceName
    protocol: Protocol
    ip: str
    port: int
    at: str

    @property
    def called(self) -> SockAddr:
        """Where it listens on this host."""
        return (self.at, self.port)

    @property
    def leased(self) -> SockAddr:
        """What it is for the connector."""
        return (self.ip, self.port)

    @property
    def family(self) -> socket.AddressFamily:
        """The family of the address that programs call."""
        return socket.AF_INET6 if ":" in self.at else socket.AF_INET

    def __str__(self) -> str:
        return f"{self.protocol} {f'[{self.at}]' if ':' in self.at else self.at}:{self.port}"


Places = Callable[[ServiceName, Lease], Sequence[str]]
"""Says at which addresses of this host a leased service is served."""


def at_the_lease(service: ServiceName, lease: Lease) -> Sequence[str]:
    """Serve it at its leased address."""
    return (str(lease.ip),)


class Datagrammed(Interface):
    """A published port where local programs send datagrams, or pings: then the peer's port is their identifier."""

    @property
    def at(self) -> VirtualPort:
        """What is called."""

    @property
    def is_closed(self) -> bool:
        """Whether it is published no more."""

    def send(self, data: bytes, destination: SockAddr) -> None:
        """Send to one local program, from the port that it called."""

    def tell(self, packet: bytes) -> None:
        """Send a program a whole packet, an ICMP error, if that is possible here."""


Accept = Callable[[VirtualPort, socket.socket, SockAddr], None]
"""Takes over a connection (non-blocking) of a local program at that address."""
Receive = Callable[[Datagrammed, bytes, SockAddr], None]
Write = Callable[[bytes], None]
"""Sends a whole packet to a local program."""
MayUse = Callable[[Protocol, SockAddr, SockAddr], bool]
"""Says whether the program at the first address may send to the second."""


class Acceptor:
    """Accepts on a listening socket, on the running loop."""

    def __init__(self, sock: socket.socket, accepted: Callable[[socket.socket, SockAddr], None]) -> None:
        """Take over a non-blocking socket."""
        self._socket = sock
        self._accepted = accepted
        self._loop = asyncio.get_running_loop()
        self._pause: asyncio.TimerHandle | None = None
        self._loop.add_reader(self._socket, self._readable)

    def close(self) -> None:
        """Accept no more; connections that were handed on are not its business."""
        if self._pause is not None:
            self._pause.cancel()
        self._loop.remove_reader(self._socket)
        self._socket.close()

    def _readable(self) -> None:
        for _ in range(ACCEPTS_PER_WAKEUP):
            try:
                local, source = self._socket.accept()
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno not in _EXHAUSTED:
                    dropped("agent_accept", "broken")  # as it waited (accept(2)); whoever is next is not
                    continue
                # The caller stays in the backlog; without the pause this would spin.
                dropped("agent_accept", "exhausted")
                self._loop.remove_reader(self._socket)
                self._pause = self._loop.call_later(EXHAUSTED_PAUSE_SECONDS, self._resume)
                return
            local.setblocking(False)
            self._accepted(local, source[:2])

    def _resume(self) -> None:
        self._pause = None
        self._loop.add_reader(self._socket, self._readable)


class TcpPort(Acceptor):
    """A listening socket of its own for a published port."""

    def __init__(self, at: VirtualPort, accept: Accept, may_use: MayUse | None = None) -> None:
        """Bind and listen; raises OSError."""
        self.at = at
        self._accept = accept
        self._may_use = may_use
        sock = _listening(at)
        _hear_only_this_host(sock)
        super().__init__(sock, self._take)

    def _take(self, local: socket.socket, source: SockAddr) -> None:
        if self._may_use is None or self._may_use("tcp", source, self.at.called):
            self._accept(self.at, local, source)
        else:
            abort(local)


class UdpPort:
    """A UDP socket on the running loop. Datagrams may be of any length UDP allows."""

    def __init__(
        self, at: VirtualPort, receive: Receive, *, write: Write | None = None, may_use: MayUse | None = None
    ) -> None:
        """Bind; raises ZtnaError. `write` is how programs are told of errors."""
        self._at = at
        self._receive = receive
        self._write = write
        self._may_use = may_use
        self._loop = asyncio.get_running_loop()
        self._socket = bind_udp(at.called, prepare=_let_bind)
        _hear_only_this_host(self._socket)
        self._loop.add_reader(self._socket, self._readable)

    def send(self, data: bytes, destination: SockAddr) -> None:
        """Send from the virtual address to one local program; what the kernel refuses is dropped and counted."""
        try:
            self._socket.sendto(data, destination)
        except OSError:
            dropped("agent_udp", "kernel_refused")

    @property
    def at(self) -> VirtualPort:
        """What is called."""
        return self._at

    def tell(self, packet: bytes) -> None:
        """Send a program an ICMP error."""
        if self._write is not None:
            self._write(packet)

    @property
    def is_closed(self) -> bool:
        """Whether it was closed."""
        return self._socket.fileno() < 0

    def close(self) -> None:
        """Stop. Later sends are dropped."""
        self._loop.remove_reader(self._socket)
        self._socket.close()

    def _readable(self) -> None:
        for _ in range(DATAGRAMS_PER_WAKEUP):
            try:
                data, source = self._socket.recvfrom(DATAGRAM_BYTES_MAX)
            except BlockingIOError:
                return
            except OSError:
                # An ICMP error for an earlier reply: that program is gone, the others are not.
                continue
            if self._may_use is None or self._may_use("udp", source[:2], self.at.called):
                self._receive(self, data, source[:2])
            if self.is_closed:
                return


class PacketPort:
    """A published port without a socket of its own: what programs get from it are whole packets."""

    def __init__(self, at: VirtualPort, write: Write) -> None:
        self._at = at
        self._write = write
        self._is_closed = False

    @property
    def at(self) -> VirtualPort:
        """What is called."""
        return self._at

    @property
    def is_closed(self) -> bool:
        """Whether it is published no more."""
        return self._is_closed

    def close(self) -> None:
        """Stop. Later sends are dropped."""
        self._is_closed = True

    def send(self, data: bytes, destination: SockAddr) -> None:
        """Send a datagram, or the answer to a ping: its sequence number (two bytes) and data."""
        if self._is_closed:
            dropped("agent_udp", "closed")
            return
        at = self._at
        try:
            if at.protocol == "udp":
                packet = build_udp(*at.called, *destination, data)
            else:
                sequence = int.from_bytes(data[:2], "big")
                packet = build_echo_reply(at.at, destination[0], destination[1], sequence, data[2:])
        except PacketError:
            dropped("agent_udp", "too_large")
            return
        self._write(packet)

    def tell(self, packet: bytes) -> None:
        """Send a program an ICMP error."""
        self._write(packet)


class Listeners:
    """All listening sockets of an agent, made to agree with the leases by `apply`."""

    def __init__(
        self,
        accept: Accept,
        receive: Receive,
        warn: Callable[[str, str | None], None],
        *,
        write: Write | None = None,
        may_use: MayUse | None = None,
    ) -> None:
        """`warn(name, detail)` tells readiness of a port that cannot be had, and with None that it can again."""
        self._accept = accept
        self._receive = receive
        self._warn = warn
        self._write = write
        self._may_use = may_use
        self._bound: dict[VirtualPort, TcpPort | UdpPort] = {}
        self._held: dict[VirtualPort, str] = {}

    @property
    def bound(self) -> frozenset[VirtualPort]:
        """The ports that are served."""
        return frozenset(self._bound)

    @property
    def held(self) -> Mapping[VirtualPort, str]:
        """The ports that could not be bound, and why."""
        return dict(self._held)

    def apply(self, leases: Mapping[ServiceName, Lease], places: Places = at_the_lease) -> None:
        """Close what no lease publishes any more and bind what is new; `places` says where."""
        wanted = {
            at
            for service, lease in leases.items()
            for at in virtual_ports(service, lease, places(service, lease))
        }
        for at in self._bound.keys() - wanted:
            self._bound.pop(at).close()
            _log.info("listener_closed", service=at.service, at=str(at))
        for at in self._held.keys() - wanted:
            self._free(at)
        for at in sorted(wanted - self._bound.keys() - self._held.keys()):
            self._bind(at)

    async def run(self) -> None:
        """Try the ports that somebody holds again and again, until cancelled."""
        while True:
            await asyncio.sleep(HELD_RETRY_SECONDS)
            self.retry()

    def retry(self) -> None:
        """Try the ports that somebody holds once more."""
        for at in tuple(self._held):
            self._bind(at)

    def close(self) -> None:
        """Close every socket."""
        self.apply({})

    def _bind(self, at: VirtualPort) -> None:
        try:
            made: TcpPort | UdpPort = (
                TcpPort(at, self._accept, self._may_use)
                if at.protocol == "tcp"
                else UdpPort(at, self._receive, write=self._write, may_use=self._may_use)
            )
        except (OSError, ZtnaError) as error:
            self._note_held(at, _why(error))
            return
        self._bound[at] = made
        self._free(at)
        _log.info("listener_opened", service=at.service, at=str(at))

    def _note_held(self, at: VirtualPort, why: str) -> None:
        if self._held.get(at) == why:
            return
        self._held[at] = why
        _log.warning("listener_failed", service=at.service, at=str(at), detail=why)
        self._warn(
            f"port {at}", f"{at.service}: {why}; the other ports are served, and this one is tried again"
        )

    def _free(self, at: VirtualPort) -> None:
        with contextlib.suppress(KeyError):
            del self._held[at]
            self._warn(f"port {at}", None)


def virtual_ports(
    service: ServiceName,
    lease: Lease,
    places: Iterable[str],
    protocols: frozenset[Protocol] = frozenset({"tcp", "udp"}),
) -> tuple[VirtualPort, ...]:
    """Return what is published at each of the places; ICMP has no ports to listen on."""
    return tuple(
        VirtualPort(service, port.protocol, str(lease.ip), port.port, place)
        for port in lease.ports
        for place in places
        if port.protocol in protocols
    )


def _why(error: OSError | ZtnaError) -> str:
    cause = error if isinstance(error, OSError) else error.__cause__
    number = cause.errno if isinstance(cause, OSError) else None
    if number == errno.EADDRINUSE:
        return "another program holds it"
    if number == errno.EACCES:
        return "ports below 1024 need CAP_NET_BIND_SERVICE"
    return os.strerror(number) if number else str(error)


def _listening(at: VirtualPort) -> socket.socket:
    sock = socket.socket(at.family, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        _let_bind(sock)
        sock.bind(at.called)
        # Programs are on this host: what they send ahead of the carriers only goes cold in the CPU's caches.
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, RECEIVE_BUFFER_BYTES)
        sock.listen(BACKLOG_CONNECTIONS)
        sock.setblocking(False)
    except OSError:
        sock.close()
        raise
    return sock


def _let_bind(sock: socket.socket) -> None:
    if sock.family == socket.AF_INET6:
        sock.setsockopt(socket.IPPROTO_IPV6, _IPV6_FREEBIND, 1)


def _hear_only_this_host(sock: socket.socket) -> None:
    """Take nothing that came from another host: this agent's grants are for the programs here (socket(7)).

    With a local route (`anyip`) the kernel takes packets to virtual addresses from every interface; those of local
    programs come through the loopback. Kernels before 5.7 let only root say so, and who needs it, in `anyip`, is.
    """
    with contextlib.suppress(PermissionError):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, b"lo")
